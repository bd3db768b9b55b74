"""Pruning where several processes train one model (``DistributedDataParallel``): every process ends with the same plan.

Each process scores the units on its own calibration data; the scores are averaged over the processes. Process 0 alone
chooses, applies and verifies; its plan goes to the others as JSON, and its weights as tensors, so that nothing depends on how
a process rounds. What fails in one process is raised in all. Messages go through gloo, on the CPU, over a process group of
their own, in which nobody waits for another longer than `timeout`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import distributed as dist
from torch import nn

from .base.checks import number
from .base.errors import DepgraphError, InputError
from .data.calibration import Calibration
from .grouping.graph import DependencyGraph, Group
from .importance import AUTO, Importance, by_cost, normalisation, ruled, scores_of
from .plan.plan import Plan
from .prune import PruneResult, analyze, compete, recovery_of
from .prune import prune as prune_alone
from .report import Report
from .surgery.apply import apply
from .tracing.tensors import named_tensors
from .tracing.wrappers import inner_name, wrapped_like

T = TypeVar("T")


@dataclass(repr=False)
class DistributedResult:
    """What `prune` returns in each process.

    Attributes:
        model: the smaller model; in a new `DistributedDataParallel` with the options of the one that was given.
        plan: about the module in it, the same in all processes: what `apply_to_optimizer`, an average of weights and
            checkpoints of that module take.
        report: in process 0; None in the others.
    """

    model: nn.Module
    plan: Plan
    report: Report | None

    def __repr__(self) -> str:
        return str(self.plan if self.report is None else self.report)


def prune(
    model: nn.Module, example_inputs: Any, *, importance: str | Importance = AUTO, calibration: Any = None, loss: Any = None,
    ignore: Any = (), strict: bool = False, constraints: Any = (), timeout: float = 1800.0, **options: Any,
) -> DistributedResult:  # fmt: skip
    """`depgraph.prune`, called by all processes together, each with its replica of the model.

    Args:
        model: a `DistributedDataParallel`, or a plain module of which every process has the same. It stays as it is.
        example_inputs: as for `depgraph.prune`; what process 0 gives is what the result is verified on.
        importance: likewise. A criterion that looks at data sees each process's own; the scores are averaged.
        calibration: this process's batches.
        loss: as for `depgraph.prune`.
        ignore: likewise.
        strict: likewise.
        constraints: likewise; the same in all processes.
        timeout: seconds that a process waits for another: more than pruning takes in process 0.
        **options: as for `depgraph.prune`; those of process 0 count. `inplace` is refused.

    Returns:
        the smaller model with the weights of process 0, and the plan.

    Raises:
        InputError: no process group, `inplace`, or replicas that differ in their shapes.
        DepgraphError: what a process raised, in all of them; or a process ended, or kept the others waiting too long.
    """
    inner = inner_name(model)
    bare = model.get_submodule(inner) if inner else model
    shapes = {name: tuple(t.shape) for name, t in named_tensors(bare)[0].items()}
    with _group(timeout, options) as group:
        every = _gathered(lambda: shapes, group)
        if any(other != every[0] for other in every):
            raise InputError("models have different shapes in different processes: nothing was pruned")
        graph = _together(
            lambda: analyze(bare, example_inputs, ignore=ignore, strict=strict, constraints=constraints),
            group,
        )
        if isinstance(calibration, Iterator):  # it is read for the scores, and to recover
            calibration = list(calibration)
        data = _together(
            lambda: None if calibration is None else Calibration(calibration, example_inputs, loss), group
        )
        criterion = ruled(importance, calibration is not None, compete(options))
        own = _together(lambda: _scores(graph, criterion, data), group)
        averaged = _Averaged(graph, _mean(own, group), criterion)
        options["recover"] = recovery_of(options.get("recover"), importance, calibration)

        def decide() -> PruneResult:
            found = prune_alone(
                bare, example_inputs, importance=averaged, graph=graph, calibration=calibration, loss=loss, **options
            )  # fmt: skip
            if isinstance(importance, str):
                found.plan.request = {**found.plan.request, "importance": importance}
            return found

        result = _by_the_first(decide, group)
        plan = Plan.from_json(_sent(result.plan.to_json() if result else None, group))
        small = _together(lambda: result.model if result else apply(bare, plan), group)
        _synchronise(small, group)
        whole = wrapped_like(model, small) if inner else small
    return DistributedResult(whole, plan, result.report if result else None)


# ------------------------------------------------------------------------------------------------------- scores


def _scores(graph: DependencyGraph, importance: Any, data: Calibration | None) -> torch.Tensor:
    """The scores of all groups, in the order of the graph, [units of all]."""
    found = scores_of(graph, importance, calibration=data)
    parts = [found[g.name] for g in graph.groups]
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.float64)


def _mean(own: torch.Tensor, group: Any) -> torch.Tensor:
    """The mean over all processes; process 0's sum, so that all have the same to the last bit."""
    total = own.clone()
    dist.all_reduce(total, group=group)
    dist.broadcast(total, _first(group), group=group)
    return total / dist.get_world_size(group)


class _Averaged:
    """A criterion that gives scores which are known already, compared between groups as the criterion says they are."""

    def __init__(self, graph: DependencyGraph, scores: torch.Tensor, criterion: Any) -> None:
        parts = scores.split([g.units for g in graph.groups]) if graph.groups else ()
        self.scores = {g.name: part for g, part in zip(graph.groups, parts, strict=True)}
        self.normalise, self.per_cost = normalisation(criterion), by_cost(criterion)

    def __call__(self, group: Group) -> torch.Tensor:
        return self.scores[group.name]


# ----------------------------------------------------------------------------------------------------- messages


@contextmanager
def _group(timeout: float, options: Mapping[str, Any]) -> Iterator[Any]:
    """A process group for the messages of one call, which ends with the call, however that ends."""
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(
            "there is no process group\n  fix: torch.distributed.init_process_group, or depgraph.prune"
        )
    refused = {"inplace", "graph"} & options.keys()
    if refused:
        raise InputError(f"pruning in several processes does not take {', '.join(sorted(refused))}")
    number("timeout", timeout, 0, above=True)
    with _no_longer_than(timeout):
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        try:
            yield group
        finally:
            dist.destroy_process_group(group)


def _first(group: Any) -> int:
    return dist.get_global_rank(group, 0)


@contextmanager
def _no_longer_than(timeout: float) -> Iterator[None]:
    """A process that ended, or does not answer, is an error here and not a wait without an end."""
    try:
        yield
    except DepgraphError:
        raise
    except RuntimeError as error:  # what torch.distributed raises
        raise DepgraphError(
            f"another process exited or did not respond within {timeout:g} s: {error}\n"
            "  nothing was changed here; see the output of the other processes"
        ) from error


def _gathered(work: Callable[[], T], group: Any) -> list[T]:
    """What `work` gives in each process. Where it raises in one, all raise."""
    mine: tuple[Any, str] = None, ""
    cause: Exception | None = None
    try:
        mine = work(), ""
    except Exception as error:  # noqa: BLE001  whatever it is, the others must not wait for this process
        mine, cause = (None, f"{type(error).__name__}: {error}"), error
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group=group)
    if isinstance(cause, DepgraphError):
        raise cause
    problems = [f"process {i}: {text}" for i, (_, text) in enumerate(every) if text]
    if problems:
        raise DepgraphError("pruning failed in\n  " + "\n  ".join(problems)) from cause
    return [value for value, _ in every]


def _together(work: Callable[[], T], group: Any) -> T:
    """What `work` gives in this process, once it has succeeded in all."""
    found: list[T] = []
    _gathered(lambda: found.append(work()), group)
    return found[0]


def _by_the_first(work: Callable[[], T], group: Any) -> T | None:
    """What `work` gives in process 0; None in the others."""
    return _together(lambda: work() if dist.get_rank(group) == 0 else None, group)


def _sent(value: str | None, group: Any) -> str:
    """The text of process 0, in all."""
    box = [value]
    dist.broadcast_object_list(box, _first(group), group=group)
    return cast(str, box[0])


@torch.no_grad()
def _synchronise(model: nn.Module, group: Any) -> None:
    """The tensors of process 0 in all: calibration may have changed them."""
    for tensor in named_tensors(model)[0].values():
        there = tensor.detach().cpu().contiguous()
        dist.broadcast(there, _first(group), group=group)
        tensor.data.copy_(there)
