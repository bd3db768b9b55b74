"""Gradual pruning of a network that somebody else holds on to: a trainer, its optimizer, its checkpoints.

A trainer keeps a reference to the network and calls it for as long as it trains, so the smaller model has to appear in that
very object. It takes over the attributes of the smaller model, and shares its modules and parameters from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..base.checks import whole_number
from ..base.errors import DepgraphError, InputError, PlanError
from ..base.values import map_tensors
from ..plan.plan import Plan
from ..prune import analyze
from ..surgery.lineage import same
from ..tracing.literals import class_of
from ..training.schedule import GradualPruner, GradualResult


class InPlacePruner:
    """Prunes a network step by step while something else trains it.

    Attributes:
        result: what the last step gave: plan and report from the original to the model as it is; None before the first.
    """

    def __init__(
        self, example_inputs: Any, *, every: int, start: int = 0,
        regulariser: Callable[[Any], Any] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """Say when and how.

        Args:
            example_inputs: as for `prune`; moved to the network's device.
            every: steps of the optimizer from one pruning step to the next.
            start: steps of the optimizer before the first.
            regulariser: makes one of a `DependencyGraph`: ``lambda graph: GroupLasso(graph, 1e-4)``. Its ``step(lr)`` is
                called after each step of the optimizer, with the learning rate of the optimizer's first group, until the
                last pruning step.
            **options: as for `GradualPruner`: ``steps=5, max_macs=0.5, score=...``.

        Raises:
            InputError: bad numbers. What is wrong with the options is said when training begins.
        """
        self.example_inputs = example_inputs
        self.every, self.start = whole_number("every", every, 1), whole_number("start", start)
        self.regulariser, self.options = regulariser, options
        self.result: GradualResult | None = None
        self._pruner: GradualPruner | None = None
        self._current: nn.Module | None = None
        self._acting: Any = None
        self._seen = 0

    @property
    def done(self) -> bool:
        """Whether the last pruning step has been made."""
        return self.result is not None and self.result.done

    @property
    def plan(self) -> Plan | None:
        """From the original to the network as it is; None before the first step."""
        return None if self.result is None else self.result.plan

    def begin(self, network: nn.Module) -> GradualPruner:
        """Get ready to prune `network`; at the beginning of training, or where it is resumed, nothing."""
        if self._pruner is None:
            several = torch.distributed.is_available() and torch.distributed.is_initialized()
            if several and torch.distributed.get_world_size() > 1:
                raise InputError(
                    "a trainer that runs several processes can't continue with a smaller model: it reduces the gradients "
                    "of the parameters it started with\n  fix: prune in a loop of your own, see depgraph.distributed"
                )
            self._current = _twin(network)
            self._pruner = GradualPruner(self._current, self._inputs(network), **self.options)
        if self._acting is None:
            self._regularise(network)
        return self._pruner

    def after_step(self, network: nn.Module, optimizers: Iterable[Any], step: int) -> bool:
        """To be called after each step of the optimizer, with gradients used up.

        Args:
            network: what `begin` was given.
            optimizers: of which one has the parameters of `network`.
            step: steps of the optimizer so far.

        Returns:
            whether `network` is smaller now.
        """
        if self._pruner is None or self._current is None:
            raise DepgraphError("call begin(network) before after_step")
        if step == self._seen or self.done:
            return False
        self._seen = step
        optimizer = _the_one(optimizers, network)
        if self._acting is not None:
            self._acting.step(optimizer.param_groups[0]["lr"])
        if step < max(self.start, 1) or (step - self.start) % self.every:
            return False
        self._current.training = network.training
        self._pruner.example_inputs = self._inputs(network)
        before = self._current
        self.result = self._pruner.step(before, optimizer)
        self._current = self.result.model
        adopt(network, self._current)
        self._regularise(network)
        return self._current is not before

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {} if self._pruner is None else {"pruner": self._pruner.state_dict(), "done": self.done}

    def resume(self, network: nn.Module, state: Mapping[str, Any]) -> None:
        """Make `network`, dense as its code builds it, as small as it was when the checkpoint was written.

        Before its weights and the optimizer's state are loaded.

        Args:
            network: changed in place.
            state: from `state_dict`.

        Raises:
            PlanError: the state is about another network.
        """
        if not state:
            return
        if "pruner" not in state or "done" not in state:
            raise PlanError("this checkpoint was not written with this callback")
        pruner = self.begin(network)
        self._current = pruner.resume(state["pruner"])
        adopt(network, self._current)
        if state["done"]:
            self.result, self._acting = pruner.step(self._current), None
        else:
            self._regularise(network)

    def _inputs(self, network: nn.Module) -> Any:
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        return map_tensors(self.example_inputs, lambda t: t.to(device))

    def _regularise(self, network: nn.Module) -> None:
        """A regulariser belongs to the parameters that it was made for."""
        if self.regulariser is None or self.done or self._current is None:
            self._acting = None
        else:
            self._acting = self.regulariser(analyze(self._current, self._inputs(network)))


def adopt(network: nn.Module, other: nn.Module) -> None:
    """Let the object `network` be `other`: the same modules, parameters and attributes, shared from now on.

    Where a number in its own code was changed, it has the changed code too.

    Raises:
        InputError: they are of different classes.
    """
    if class_of(network) is not class_of(other):
        raise InputError(f"a {type(network).__name__} can't become a {type(other).__name__}")
    network.__class__ = type(other)
    for name in vars(network).keys() - vars(other).keys():
        del vars(network)[name]
    vars(network).update(vars(other))
    same(network, other)


def _twin(network: nn.Module) -> nn.Module:
    """Another object that shares everything with `network` as it is, and keeps it when `network` becomes another."""
    twin: nn.Module = object.__new__(type(network))
    vars(twin).update(vars(network))
    same(twin, network)
    return twin


def _the_one(optimizers: Iterable[Any], network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `network`, without what wraps it."""
    mine = {id(p) for p in network.parameters()}
    plain = [getattr(o, "optimizer", o) for o in optimizers]
    found: list[Any] = [o for o in plain if any(id(p) in mine for g in o.param_groups for p in g["params"])]
    if len(found) != 1:
        raise InputError(
            f"{len(found)} optimizers have parameters of the network to prune; exactly one is needed"
        )
    return found[0]
