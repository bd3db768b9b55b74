"""Mean compensation: what the removed inputs added on average goes into the consumer's bias.

For a consumer with weight W, of whose inputs x the set R is removed:  b' = b + sum_{j in R} W[:, j] E[x_j].

Source: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024 (arXiv 2312.11983),
baseline bias compensation. A layer without a bias gets none unless "new_bias" is asked for, as a bias that its class does not
make is no longer loaded by a model built from the same config; where a batch norm follows, its running mean takes the constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from .pairs import Pair
from .result import NOT_FINITE, LayerRecovery
from .sequence import sums_of_removed
from .task import Task

NO_PLACE = (
    "has no bias, and a model built from the same config could not load a new one (recover=['new_bias', ...] gives one to layers "
    "whose class has a place for it)"
)


def compensate(task: Task, found: Iterable[Pair]) -> None:
    """Add to the biases of the smaller model what the removed inputs gave on average; pairs that lost none stay."""
    recovery = task.recovery
    wanted = [p for p in found if p.loses]
    recovery.skipped += [(p.name, NO_PLACE) for p in wanted if p.shift is None]
    fitting = [p for p in wanted if p.shift is not None]
    for pair, fit, held_out, whole in sums_of_removed(task, fitting, "means of removed inputs", kept=False):
        before, after = (
            float(error.sum()) / whole for error in (held_out.rr, held_out.error(*fit.solve(0.0, True)))
        )
        if not math.isfinite(before + after):
            recovery.skipped.append((pair.name, NOT_FINITE))
            continue
        recovery.layers.append(LayerRecovery(pair.name, "compensation", before, after, after < before))
        if after < before:
            task.changes.add(pair, None, fit.plus(held_out).solve(0.0, True)[1])
