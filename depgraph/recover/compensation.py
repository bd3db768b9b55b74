"""Mean compensation: what the removed inputs added on average goes into the consumer's bias.

For a consumer with weight W, of whose inputs x the set R is removed:  b' = b + sum_{j in R} W[:, j] E[x_j].

Source: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024 (arXiv 2312.11983),
baseline bias compensation. A layer without a bias gets none, as a bias that its class does not make is no longer loaded
by a model built from the same config; where a batch norm follows, its running mean takes the constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ..data.watch import Call, Watch
from .pairs import Pair
from .result import NOT_FINITE, UNREACHED, LayerRecovery
from .sequence import without_removed
from .solve import wide
from .task import Task

NO_PLACE = "has no bias, and a model built from the same config could not load a new one"


def compensate(task: Task, found: Iterable[Pair]) -> None:
    """Add to the biases of the smaller model what the removed inputs gave on average.

    Args:
        task: the models and the data.
        found: pairs of consumers; those that lost no inputs are left alone.
    """
    recovery = task.recovery
    wanted = [p for p in found if p.loses]
    recovery.skipped += [(p.name, NO_PLACE) for p in wanted if p.shift is None]
    by_consumer = {p.dense: p for p in wanted if p.shift is not None}
    sums = {p: _Sums(p) for p in by_consumer.values()}
    if not sums:
        return
    held_now = False

    def see(call: Call) -> None:
        pair = by_consumer[call.consumer]
        for where, _, missing in without_removed(call, pair):
            sums[pair].add(where, missing.to(wide(missing.device)), held_now)
        sums[pair].whole[held_now] += float(call.out.double().square().sum())

    watch = Watch(task.model, list(by_consumer), see)
    for batch, held_now in task.each("means of removed inputs"):  # noqa: B007  `see` reads it
        watch.run(batch)
    for pair, found_sums in sums.items():
        if not float(found_sums.count.sum()):
            recovery.skipped.append((pair.name, UNREACHED))
            continue
        before, after = found_sums.errors()
        if not math.isfinite(before + after):
            recovery.skipped.append((pair.name, NOT_FINITE))
            continue
        kept = after < before
        recovery.layers.append(LayerRecovery(pair.name, "compensation", before, after, kept))
        if kept:
            task.changes.add_constant(pair, found_sums.mean())


class _Sums:
    """Of what the removed inputs of a pair added: sums and squares, of fitted and of held-out samples."""

    def __init__(self, pair: Pair) -> None:
        stacks, rows, _ = pair.at.shape
        self.sum = torch.zeros(2, stacks, rows, dtype=torch.float64)
        self.squares = torch.zeros(2, stacks, dtype=torch.float64)
        self.count = torch.zeros(2, stacks, dtype=torch.float64)
        self.whole = [0.0, 0.0]  # squares of the results

    def add(self, where: slice, missing: torch.Tensor, held_out: bool) -> None:
        """Samples [stacks, n, rows] of the stacks `where`."""
        self.sum[int(held_out), where] += missing.sum(1).double().cpu()
        self.squares[int(held_out), where] += missing.square().sum((1, 2)).double().cpu()
        self.count[int(held_out), where] += missing.shape[1]

    def mean(self) -> torch.Tensor:
        """[stacks, rows] over all samples."""
        return self.sum.sum(0) / self.count.sum(0).clamp(min=1)[:, None]

    def errors(self) -> tuple[float, float]:
        """Relative error on held-out samples without a constant, and with the mean of the fitted ones."""
        fit = 0 if float(self.count[0].sum()) else 1
        which = 1 if float(self.count[1].sum()) else 0
        fitted = self.sum[fit] / self.count[fit].clamp(min=1)[:, None]
        before = float(self.squares[which].sum())
        change = self.count[which][:, None] * fitted.square() - 2 * fitted * self.sum[which]
        scale = max(self.whole[which], 1e-300)
        return before / scale, (before + float(change.sum())) / scale
