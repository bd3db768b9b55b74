"""Results of one size, compared by what they give on calibration data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .base.errors import DepgraphError
from .base.running import WriteGuardMode, in_mode
from .base.switches import eagerly, same_random_state
from .base.values import tensor_leaves
from .data.calibration import Calibration
from .importance import Importance, KfacInTurn
from .recover import Recovery
from .search import Settled
from .tracing.caches import nothing_kept


class Made(NamedTuple):
    """A smaller model, what was recovered of it, and notes for the report."""

    settled: Settled
    recovery: Recovery | None
    notes: list[str]


def by_loss_or_outputs(make: Callable[[Importance], Made], model: nn.Module, data: Calibration) -> Made:
    """The better of the models whose units are scored by the loss, and by signs at the outputs, after recovery.

    A loss on few samples can mislead: where a model fits them, what is left of its gradients is that of the hardest samples.

    Args:
        make: makes a model by a criterion.
        model: the original.
        data: the calibration data; the loss on its held-out batches decides. Where it has no loss, only one model is made.
    """
    judge, criterion = data.held_out(), KfacInTurn()
    first = make(criterion)
    if not criterion.by_loss:
        return first
    try:
        second = make(KfacInTurn(use_loss=False))
    except DepgraphError as error:
        first.notes.append(f"importance: scored by the loss alone, since by signs at the outputs: {error}")
        return first
    off = [_distance(model, made.settled.model, judge) for made in (first, second)]
    chosen = second if off[1] < off[0] else first
    chosen.notes.append(
        f"importance: units were scored by {'signs at the outputs' if chosen is second else 'the loss'}: on the held-out calibration data "
        f"the loss is {min(off):.4g} then, and {max(off):.4g} with scores by {'the loss' if chosen is second else 'signs at the outputs'}"
    )
    return chosen


def _distance(model: nn.Module, small: nn.Module, data: Calibration) -> float:
    try:
        return distance(model, small, data, "comparing scores")
    except DepgraphError:  # its loss is not finite
        return math.inf


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().sum() / b.square().sum().clamp(min=1e-30))


def distance(model: nn.Module, small: nn.Module, data: Calibration, text: str) -> float:
    """How far `small` is from `model` on the data: by the loss where there is one, otherwise by their outputs.

    Args:
        model: the original; neither is changed.
        small: what was made of it.
        data: the batches, and the loss; the mean over batches is taken, of outputs that of |small - model|^2 / |model|^2.
        text: what the progress bar says.
    """
    total, count = 0.0, 0
    shared = [*model.parameters(), *small.parameters()]
    with (
        same_random_state(), torch.no_grad(), eagerly(), nothing_kept(model), nothing_kept(small), in_mode(model, False),
        in_mode(small, False), WriteGuardMode(shared),
    ):  # fmt: skip
        for batch in data.batches(text):
            count += 1
            out = batch.copy().run(small)
            if data.has_loss(out):
                total += float(data.loss_of(out, batch))
                continue
            pairs = zip(tensor_leaves(out), tensor_leaves(batch.copy().run(model)), strict=True)
            errors = [_error(a.double(), b.double()) for a, b in pairs if b.is_floating_point()]
            total += sum(errors) / max(1, len(errors))
    return total / max(1, count)
