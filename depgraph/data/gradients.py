"""Runs forward and back, in which the gradient at the result of each consumer's call is seen, too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from ..base.errors import InputError
from ..base.switches import without_cudnn
from ..base.values import output_leaves
from ..surgery.on_demand import OnDemand, Recent
from .calibration import Batch
from .consumers import Consumer
from .watch import Call, Watch, prepared, twin

Tensor = torch.Tensor
Objective = Callable[[Any, Batch], Tensor]  # (output, batch) -> a scalar
UNRELATED = (
    "the loss does not depend on any weight that can be removed: it must be computed from what the model returns, by "
    "differentiable ops"
)


class NoGradientError(InputError):
    """No gradient arrives at any consumer."""


@dataclass(eq=False)
class Reached:
    """A call to whose result, or of a recurrent layer to whose input, the gradient is wanted.

    Attributes:
        call: the call.
        at_input: whether the gradient is that at the input: what happens inside a recurrent layer can't be seen.
        shared: how many consumers that input stands for: those of the call that are given the same.
        edge: where the gradient arrives; None until the result is known, and where no gradient comes.
        samples: how many the run was given, as far as its output tells: the first size of its first tensor.
    """

    call: Call
    at_input: bool = False
    shared: int = 1
    edge: GradientEdge | None = None
    samples: int = 1


class GradientWatch(Watch):
    """Runs a model forward and back, and sees the calls of consumers and the gradients there."""

    gradients = True

    def __init__(
        self,
        model: nn.Module,
        wanted: Iterable[Consumer],
        see: Callable[[Call], None],
        see_gradient: Callable[[Reached, Tensor], None],
        objective: Objective,
    ) -> None:
        """Call `see` after each call of a consumer, and `see_gradient` with the gradient of `objective` there."""
        super().__init__(model, wanted, self._seen)
        self.see_forward, self.see_gradient, self.objective = see, see_gradient, objective
        self.reached: list[Reached] = []
        self.swaps: dict[int, Tensor] = {}

    def copy_of(self, model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
        """The same with parameters that want gradients, in the memory of the model's own."""
        return twin(model, _alias)

    def run_back(self, batch: Batch) -> None:
        """Run forward and back on a batch.

        Raises:
            InputError: the objective can't be differentiated.
        """
        self.reached = []
        try:
            with prepared(), without_cudnn(), self._weights_again():  # cuDNN has no backward in eval mode
                out = self.run_prepared(batch)
                with torch.inference_mode(False), torch.enable_grad():
                    self._find_edges()
                    value = self.objective(out, batch)
                    found = self._gradients(value)
                samples = next((len(t) for t in output_leaves(out) if t.dim()), 1)
                with torch.no_grad():
                    for reached, gradient in zip(self.reached, found, strict=True):
                        reached.samples = samples
                        if gradient is not None:
                            self.see_gradient(reached, gradient)
        finally:
            self.reached = []

    def _weights_again(self) -> AbstractContextManager[None]:
        uses = [t.use for t in self.tensors.values() if isinstance(t, OnDemand)]
        return uses[0].again() if uses and isinstance(uses[0], Recent) else nullcontext()

    def perform(self, op: Any, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        """As in `Watch`; the input of a recurrent layer is replaced by an alias of which the gradient can be told."""
        self._find_edges()
        for consumer in self._whose(op, args):
            if consumer.is_recurrent:
                x = Call(consumer, args, None, self.choices).x
                if id(x) not in self.swaps:
                    self.swaps[id(x)] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        try:
            return super().perform(op, args, kwargs, run)
        finally:
            self.swaps = {}

    def operands(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The aliases for what they stand for."""
        if not self.swaps:
            return args, kwargs
        given: tuple[Any, Any] = pytree.tree_map(
            lambda t: self.swaps.get(id(t), t) if isinstance(t, Tensor) else t, (args, kwargs)
        )
        return given

    def _seen(self, call: Call) -> None:
        self.see_forward(call)
        alias = self.swaps.get(id(call.x)) if self.swaps else None
        if alias is None:
            self.reached.append(Reached(call))
            return
        shared = [r for r in self.reached if r.at_input and r.call.args is call.args and r.call.x is call.x]
        self.reached.append(Reached(call, True, 1, get_gradient_edge(alias)))
        for r in (*shared, self.reached[-1]):
            r.shared = len(shared) + 1

    def _find_edges(self) -> None:
        """Where gradients of the results since the last call arrive: an op knows its derivative only once it is done.

        It must be asked before the next op, which may write into the result.
        """
        for r in reversed(self.reached):
            if r.edge is not None:
                break
            if r.call.out.requires_grad:
                r.edge = get_gradient_edge(r.call.out)

    def _gradients(self, value: Tensor) -> list[Tensor | None]:
        edges = [r.edge for r in self.reached if r.edge is not None]
        if not value.requires_grad or not edges:
            raise NoGradientError(UNRELATED)
        try:
            found = list(torch.autograd.grad(value, edges, allow_unused=True))
        except RuntimeError as error:
            raise InputError(no_derivative(error)) from error
        if all(g is None for g in found):
            raise NoGradientError(UNRELATED)
        gradients = iter(found)
        return [None if r.edge is None else next(gradients) for r in self.reached]


def no_derivative(error: RuntimeError) -> str:
    """What to say where torch could not differentiate."""
    if "use_reentrant" in str(error):
        return (
            "the model uses activation checkpointing with use_reentrant=True, which computes no gradients of chosen "
            "tensors: build it with use_reentrant=False, or switch checkpointing off"
        )
    return f"the loss could not be differentiated: {error}"


def _alias(parameter: Tensor) -> Tensor:
    if isinstance(parameter, OnDemand):
        return parameter
    shared = parameter.detach().clone() if parameter.is_inference() else parameter.detach()
    return nn.Parameter(shared, requires_grad=shared.is_floating_point() or shared.is_complex())
