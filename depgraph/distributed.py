"""Pruning where several processes train one model: every process ends with the same plan.

Replicas (``DistributedDataParallel``):

Each process scores the units on its own calibration data; the scores are averaged over the processes. Process 0 alone
chooses, applies and verifies; its plan goes to the others as JSON, and its weights as tensors, so that nothing depends on how
a process rounds.

Shards (FSDP2's ``fully_shard``, tensor parallel, any DTensors): no process has all of a model, so what is looked at is a twin
without values, from a factory. Its parameters are gathered one after the other for the scores, and once more to be cut: a process
holds one whole parameter at a time. The smaller ones are distributed over a fresh model, which is sharded as the user shards.

What fails in one process is raised in all. Messages go through gloo, on the CPU, over a process group of
their own, in which nobody waits for another longer than `timeout`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import distributed as dist
from torch import nn

from .base.checks import flag, function
from .base.errors import InputError
from .base.processes import ProcessGroup, gathered, group_of_all
from .base.values import all_finite
from .checkpoint.shell import shell_of
from .data.calibration import Calibration
from .grouping.graph import DependencyGraph, Group
from .grouping.naming import given_names
from .importance import AUTO, Importance, by_cost, normalisation, ruled, scores_of
from .plan.plan import Plan
from .prune import PruneResult, analyze, analyzed, by_rule, compete, planned, recovery_of, stated_constraints
from .prune import prune as prune_alone
from .report import Report
from .search import Settled
from .select import BUDGETS, OPTIONS, Request
from .surgery.apply import apply
from .tracing.tensors import all_tensors, named_tensors
from .tracing.wrappers import inner_name, wrapped_like
from .verify.weights import DrawnValues

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
    model: nn.Module, example_inputs: Any, *, factory: Callable[[], nn.Module] | None = None,
    shard: Callable[[nn.Module], Any] | None = None, importance: str | Importance = AUTO, calibration: Any = None,
    loss: Any = None, ignore: Any = (), strict: bool = False, constraints: Any = (), timeout: float = 1800.0, **options: Any,
) -> DistributedResult:  # fmt: skip
    """`depgraph.prune`, called by all processes together, each with its replica or its shards of the model.

    Args:
        model: a `DistributedDataParallel`, a plain module of which every process has the same, or one whose parameters are
            DTensors (``fully_shard``). It stays as it is.
        example_inputs: as for `depgraph.prune`; what process 0 gives is what the result is verified on.
        factory: of a sharded model: builds it, unsharded. Its parameters get no memory.
        shard: of a sharded model: shards the smaller model, a fresh one whose parameters are on the meta device, in place, or
            returns it sharded: ``lambda m: fully_shard(m, mesh=mesh)``. The names of its parameters stay.
        importance: likewise. A criterion that looks at data sees each process's own; the scores are averaged.
        calibration: this process's batches.
        loss: as for `depgraph.prune`.
        ignore: likewise.
        strict: likewise.
        constraints: likewise; the same in all processes.
        timeout: seconds that a process waits for another: more than pruning takes in process 0.
        **options: as for `depgraph.prune`; those of process 0 count. `inplace` is refused, and for a sharded model what looks
            at data. With `verify` a sharded model is compared with the smaller one on weights drawn from a seed.

    Returns:
        the smaller model, with the weights of process 0 or sharded as `shard` does, and the plan.

    Raises:
        InputError: no process group, `inplace`, replicas that differ in their shapes; a sharded model without `factory` and
            `shard`, or with a factory that builds another one.
        DepgraphError: what a process raised, in all of them; or a process ended, or kept the others waiting too long.
    """
    if factory is not None or shard is not None or _is_sharded(model):
        if calibration is not None or loss is not None:
            raise InputError(
                "a sharded model is pruned by criteria that look at weights alone: leave calibration and loss away"
            )
        how = {"importance": importance, "ignore": ignore, "strict": strict, "constraints": constraints}
        return _prune_sharded(model, example_inputs, factory, shard, how, timeout, options)
    inner = inner_name(model)
    bare = model.get_submodule(inner) if inner else model
    shapes = {name: tuple(t.shape) for name, t in named_tensors(bare)[0].items()}
    with _group(timeout, options) as group:
        every = gathered(lambda: shapes, group)
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


def _mean(own: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """The mean over all processes; process 0's sum, so that all have the same to the last bit."""
    total = own.clone()
    dist.all_reduce(total, group=group())
    dist.broadcast(total, _first(group), group=group())
    return total / dist.get_world_size(group())


class _Averaged:
    """A criterion that gives scores which are known already, compared between groups as the criterion says they are."""

    def __init__(self, graph: DependencyGraph, scores: torch.Tensor, criterion: Any) -> None:
        parts = scores.split([g.units for g in graph.groups]) if graph.groups else ()
        self.scores = {g.name: part for g, part in zip(graph.groups, parts, strict=True)}
        self.normalise, self.per_cost = normalisation(criterion), by_cost(criterion)

    def __call__(self, group: Group) -> torch.Tensor:
        return self.scores[group.name]


# ------------------------------------------------------------------------------------------------------- shards


def _is_sharded(model: nn.Module) -> bool:
    return isinstance(model, nn.Module) and any(_mesh_of(p) is not None for p in model.parameters())


def _mesh_of(tensor: Any) -> Any:
    """The mesh over which a tensor is spread; None of one that is not."""
    return getattr(tensor, "device_mesh", None) if hasattr(tensor, "full_tensor") else None


class _Gathered:
    """The values of a sharded model: one parameter at a time is whole. All processes ask for the same in the same order."""

    room = 0

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.last: tuple[str, torch.Tensor] | None = None

    def whole(self, name: str) -> torch.Tensor:
        """On the CPU."""
        if self.last is None or self.last[0] != name:
            tensor: Any = self.tensors[name].detach()
            self.last = name, (tensor.full_tensor() if _mesh_of(tensor) is not None else tensor).cpu()
        return self.last[1]

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """A view."""
        return self.whole(name)[first:last]

    def at(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """A copy of these entries."""
        return self.whole(name).index_select(0, index)

    def kept(self, key: str, compute: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """Computed by all together; each has looked at its own shards for what is not finite."""
        return [True] if key.endswith(" finite") else compute()


def _prune_sharded(
    model: nn.Module, example_inputs: Any, factory: Any, shard: Any, how: dict[str, Any], timeout: float,
    options: dict[str, Any],
) -> DistributedResult:  # fmt: skip
    """`prune` of a model whose parameters are DTensors."""
    if not _is_sharded(model):
        raise InputError("factory and shard are for a model whose parameters are sharded: this one's are not")
    if factory is None or shard is None:
        raise InputError(
            "the parameters of this model are sharded over processes\n  fix: give factory, which builds it unsharded, and shard, which "
            "shards the smaller one as this one is: shard=lambda m: fully_shard(m)"
        )
    function("shard", shard, "model")
    asked = how["importance"]
    known = {*OPTIONS, *BUDGETS, "granularity", "verify", "progress"}
    arguments = {"importance": asked, "normalise": None, "per_cost": None}
    arguments |= {k: v for k, v in options.items() if v is not None}
    importance = by_rule(arguments, {}, False)
    request = Request.of(
        {k: v for k, v in arguments.items() if k in known},
        {k: v for k, v in options.items() if k not in known and k != "inplace"},
    )
    verify = options.get("verify", True)
    flag("verify", verify)
    names, stated = given_names("ignore", how["ignore"]), stated_constraints(how["constraints"])
    live = named_tensors(model)[0]
    with _group(timeout, options) as group:
        twin = _together(lambda: _twin(factory, live), group)
        weights = _Gathered(live)
        graph = _together(
            lambda: analyzed(
                twin, example_inputs, names, how["strict"], stated, options.get("granularity"), weights
            ),
            group,
        )
        own = _together(lambda: _scores(graph, importance, None), group)
        known_scores = _Averaged(graph, own, importance)

        def decide() -> Settled:
            drawn = DrawnValues(
                all_tensors(twin), {n for n, p in twin.named_parameters() if p.is_floating_point()}
            )
            found = planned(
                graph, example_inputs, request, known_scores, None, drawn if verify else False, notes
            )
            if isinstance(asked, str):
                found.plan.request = {**found.plan.request, "importance": asked}
            return found

        notes: list[str] = []
        found = _by_the_first(decide, group)
        plan = Plan.from_json(_sent(found.plan.to_json() if found else None, group))
        small = _together(lambda: _sharded_like(model, apply(twin, plan), plan, weights, shard), group)
    report = None
    if found is not None:
        report = Report.of(found.graph, plan, found.model, found.verification, example_inputs, notes=notes)
    return DistributedResult(small, plan, report)


@torch.no_grad()
def _twin(factory: Any, live: Mapping[str, torch.Tensor]) -> nn.Module:
    """The model without values, with the buffers of the one that is sharded; every process has looked at its own shards."""
    twin = shell_of(factory)
    tensors = named_tensors(twin)[0]
    shapes = [{n: tuple(t.shape) for n, t in found.items()} for found in (tensors, live)]
    if shapes[0] != shapes[1]:
        wrong = [n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n)]
        raise InputError(f"factory builds another model than the one that is sharded: {', '.join(wrong[:5])}")
    for name, tensor in tensors.items():
        here: Any = live[name].detach()
        if not tensor.is_meta:
            tensor.copy_(here.full_tensor() if _mesh_of(here) is not None else here)
        elif here.is_floating_point() and not all_finite(_local(here)):
            raise InputError(f"NaN or infinite values in {name}: nothing was pruned")
    return twin


def _local(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor.to_local() if _mesh_of(tensor) is not None else tensor
    return found


@torch.no_grad()
def _sharded_like(
    model: nn.Module, shell: nn.Module, plan: Plan, weights: _Gathered, shard: Callable[[nn.Module], Any]
) -> nn.Module:
    """`shell` sharded by the user, with what `plan` keeps of the model's parameters, each spread as `shard` has spread it."""
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415  it takes long to import

    given = shard(shell)
    small = given if isinstance(given, nn.Module) else shell
    made: dict[str, nn.Parameter] = {}
    for name, empty in list(small.named_parameters(remove_duplicate=False)):
        first = plan.aliases.get(name, name)
        if first not in plan.shapes:
            raise InputError(f"shard gave parameters other names: {name!r} is not in the plan")
        if not empty.is_meta:
            continue
        if first not in made:
            kept = weights.whole(first)
            if (cut := plan.cuts.get(first)) is not None:
                kept = cut.slice(kept)
            mesh = _mesh_of(empty)
            spread: Any = empty
            value = (
                kept.clone()
                if mesh is None
                else distribute_tensor(kept.to(mesh.device_type), mesh, spread.placements)
            )
            made[first] = nn.Parameter(value, requires_grad=empty.requires_grad)
        path, _, last = name.rpartition(".")
        small.get_submodule(path)._parameters[last] = made[first]
    modes = {path: module.training for path, module in model.named_modules()}
    for path, module in small.named_modules():
        module.training = modes.get(path, module.training)
    return small


# ----------------------------------------------------------------------------------------------------- messages


@contextmanager
def _group(timeout: float, options: Mapping[str, Any]) -> Iterator[ProcessGroup]:
    """A process group for the messages of one call."""
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(
            "there is no process group\n  fix: torch.distributed.init_process_group, or depgraph.prune"
        )
    refused = {"inplace", "graph"} & options.keys()
    if refused:
        raise InputError(f"pruning in several processes does not take {', '.join(sorted(refused))}")
    with group_of_all(timeout) as group:
        yield group


def _first(group: ProcessGroup) -> int:
    return dist.get_global_rank(group(), 0)


def _together(work: Callable[[], T], group: ProcessGroup) -> T:
    """What `work` gives in this process, once it has succeeded in all."""
    found: list[T] = []
    gathered(lambda: found.append(work()), group)
    return found[0]


def _by_the_first(work: Callable[[], T], group: ProcessGroup) -> T | None:
    """What `work` gives in process 0; None in the others."""
    return _together(lambda: work() if dist.get_rank(group()) == 0 else None, group)


def _sent(value: str | None, group: ProcessGroup) -> str:
    """The text of process 0, in all."""
    box = [value]
    dist.broadcast_object_list(box, _first(group), group=group())
    return cast(str, box[0])


@torch.no_grad()
def _synchronise(model: nn.Module, group: ProcessGroup) -> None:
    """The tensors of process 0 in all: calibration may have changed them."""
    for tensor in named_tensors(model)[0].values():
        there = tensor.detach().cpu().contiguous()
        dist.broadcast(there, _first(group), group=group())
        tensor.data.copy_(there)
