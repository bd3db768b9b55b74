"""One score for each entry of a weight: from the weight alone, from gradients, or from what the weight is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..base.errors import InputError
from ..base.inputs import Examples
from ..base.values import output_leaves
from ..data.calibration import Batch, Calibration, Loss
from ..data.consumers import Consumer, consumers
from ..data.watch import Call, Watch
from ..grouping.graph import DependencyGraph
from ..importance.differentiate import differentiate
from ..prune import analyze

Tensor = torch.Tensor
DATA = ("gradient", "taylor", "wanda")  # criteria that look at data
Found = tuple[Callable[[str], Tensor], dict[str, str], set[str]]


def scored(
    model: nn.Module, x: Any, importance: Any, weights: dict[str, Tensor], calibration: Iterable[Any] | None,
    loss: Loss | None, arguments: int = 1,
) -> Found:  # fmt: skip
    """What scores a weight by its name, float32 or float64 in the weight's shape; the weights without scores, and why.

    Where inputs are looked at, also the names of matrices whose columns, not rows, each make one output.

    Args:
        model: the model.
        x: example inputs.
        importance: a criterion, checked.
        weights: those to score.
        calibration: batches, or None: the example inputs.
        loss: or None.
        arguments: how many a function of the user's takes.
    """
    if importance == "magnitude":
        return lambda name: _real(weights[name]).abs(), {}, set()
    if importance == "random":
        seeds = {name: i for i, name in enumerate(weights)}
        return (
            lambda name: torch.rand(
                weights[name].shape, generator=torch.Generator().manual_seed(seeds[name])
            ),
            {},
            set(),
        )
    if not isinstance(importance, str):
        given = {n: _own(importance, n, w, arguments) for n, w in weights.items()}
        return given.__getitem__, {}, set()
    if x is None:
        raise InputError(f"importance={importance!r} looks at data: give example inputs, mask(model, x, ...)")
    examples = list(x.examples) if isinstance(x, Examples) else [x]
    data = _Data(examples if calibration is None else calibration, x, loss)
    graph = analyze(model, x)
    if importance == "wanda":
        return _by_inputs(graph, data, weights)
    return _by_gradients(graph, data, weights, importance == "taylor")


def _real(weight: Tensor) -> Tensor:
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()


def _own(importance: Any, name: str, weight: Tensor, arguments: int) -> Tensor:
    """What a function of the user's says of one weight, checked."""
    found = importance(weight.clone()) if arguments == 1 else importance(name, weight.clone())
    try:
        found = torch.as_tensor(found).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"importance must return a tensor of scores for {name!r}: {error}") from error
    if found.shape != weight.shape or found.is_complex():
        raise InputError(
            f"importance gave {name!r} scores of shape {tuple(found.shape)}, not {tuple(weight.shape)}"
        )
    found = found if found.dtype == torch.float64 else found.float()
    if bool(torch.isnan(found).any()):
        raise InputError(f"importance gave {name!r} scores that are NaN")
    return found


class _Data(Calibration):
    """Calibration with a loss for models and users that have none: half the mean square of the outputs."""

    def loss_of(self, output: Any, batch: Batch) -> Tensor:
        """The user's loss, the model's own, or else that."""
        own = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if self.loss is not None or own is not None:
            return super().loss_of(output, batch)
        found = [t.square().mean() for t in output_leaves(output) if t.is_floating_point()]
        if not found:
            raise InputError("the model returns no real numbers: give a loss of output and target")
        return torch.stack(found).sum() / 2


def _by_gradients(
    graph: DependencyGraph, data: Calibration, weights: dict[str, Tensor], times_weight: bool
) -> Found:
    total: dict[str, Tensor] = {}

    def visit(_: Any, found: dict[str, Tensor]) -> None:
        for name, gradient in found.items():
            total[name] = total[name] + gradient.detach() if name in total else gradient.detach().clone()

    differentiate(graph, data, list(weights), visit)
    lacking = {n: "the loss does not depend on it" for n in weights if n not in total}

    def score(name: str) -> Tensor:
        gradient = _real(total[name])
        return (gradient * _real(weights[name]) if times_weight else gradient).abs()

    return score, lacking, set()


def _by_inputs(graph: DependencyGraph, data: Calibration, weights: dict[str, Tensor]) -> Found:
    """|w| times the norm of the input that w meets, over all samples; of a convolution, over all its windows."""
    lacking = dict.fromkeys(weights, "no product reads it")
    wanted = []
    for consumer in consumers(graph):
        if consumer.name in weights:
            reason = consumer.reason or _unfit(consumer, weights[consumer.name])
            lacking[consumer.name] = reason
            wanted += [] if reason else [consumer]
    wanted = [c for c in wanted if not lacking[c.name]]
    squares: dict[Consumer, dict[int, Tensor]] = {c: {} for c in wanted}

    def see(call: Call) -> None:
        for stack, piece in call.inputs():
            sums = piece.detach().double().square().sum(0)
            known = squares[call.consumer]
            known[stack] = known[stack] + sums if stack in known else sums

    Watch(graph.model, wanted, see).run_all(data, "inputs of weights")
    norms: dict[str, Tensor] = {}
    for consumer, found in squares.items():
        if not found:
            lacking[consumer.name] = "no run gave it inputs"
            continue
        shaped = _shaped(consumer, weights[consumer.name], found)
        norms[consumer.name] = norms.get(consumer.name, torch.zeros(())) + shaped

    def score(name: str) -> Tensor:
        weight = _real(weights[name])
        return weight.abs() * norms[name].sqrt().to(weight.dtype)

    columns = {c.name for c in wanted if c.dim == 0 and weights[c.name].dim() == 2}
    return score, {n: why for n, why in lacking.items() if why and n not in norms}, columns


def _unfit(consumer: Consumer, weight: Tensor) -> str:
    """Why the inputs that its entries meet can't be told, or ""."""
    if consumer.is_convolution:
        return ""
    if consumer.dim is None or weight.dim() > 3 or weight.shape[consumer.dim] != consumer.width:
        return "the inputs that its entries meet can't be told"
    return "" if weight.dim() == 2 or consumer.dim else "the inputs that its entries meet can't be told"


def _shaped(consumer: Consumer, weight: Tensor, squares: dict[int, Tensor]) -> Tensor:
    """The sums of squares, so that they broadcast over the weight."""
    if consumer.is_convolution:
        sums = squares[0]  # [channels of the input, kernel positions]
        kernel = weight.shape[2:]
        if len(sums) == len(weight) and consumer.dim == 0:  # transposed: [in, out of a group, ...]
            return sums.view(len(sums), 1, *kernel)
        groups = len(sums) // weight.shape[1]
        by_group = sums.view(groups, weight.shape[1], *kernel)
        return by_group.repeat_interleave(len(weight) // groups, 0)
    width = consumer.width
    if weight.dim() == 2:
        sums = torch.stack([*squares.values()]).sum(0)
        return sums.view(1, width) if consumer.dim == 1 else sums.view(width, 1)
    stacked = torch.zeros(weight.shape[0], width, dtype=torch.float64, device=weight.device)
    for stack, sums in squares.items():
        stacked[stack] = sums
    return stacked.unsqueeze(1 if consumer.dim == 2 else 2)
