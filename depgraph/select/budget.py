"""Budgets: how far each block's sequence is followed until every one of them is met, and no further.

All budgets are met together: the units that compete go in one order until the last budget holds, then what there is
room for under all of them comes back, the dearest first.

The order is by score; `per_cost` divides each score by what its step saves of the budgets that are still exceeded, as
a knapsack does (Shen et al., "Structural Pruning via Latency-Saliency Knapsack", NeurIPS 2022). What a step saves
depends on the widths around it, so the way down is walked in stages, with new prices at each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import BudgetError
from ..costs.cost import Cost
from ..costs.size_table import Floats, Integers
from ..grouping.graph import DependencyGraph
from ..plan.plan import Masks
from .scope import CompetitionGroup

if TYPE_CHECKING:
    from .selection import Selection

STAGES = 12  # of the way down with prices


@dataclass
class Budget:
    """A bound on a cost.

    Attributes:
        name: the argument that asked for it.
        cost: what is bounded.
        limit: the most that it may be.
        text: an amount of it as a person reads it.
    """

    name: str
    cost: Cost
    limit: float
    text: Callable[[float], str] = "{:,.0f}".format


class _Order:
    """The steps of one competition group that are still to go, in the order in which they go."""

    def __init__(
        self, selection: Selection, competition: CompetitionGroup, steps: Integers, prices: Floats | None
    ) -> None:
        blocks = [selection.blocks[i] for i in competition.blocks]
        keys, taken, owner = [], [], []
        for i, b in zip(competition.blocks, blocks, strict=True):
            rest = slice(int(steps[i]), None)
            keys.append(b.scores[rest] if prices is None else selection.density(b, prices)[rest])
            taken.append(b.taken[rest])
            owner.append(np.full(len(taken[-1]), i))
        order = np.argsort(np.concatenate(keys), kind="stable")
        self.owner = np.concatenate(owner)[order]
        self.share = np.cumsum(np.concatenate(taken)[order]) / max(1, sum(b.units for b in blocks))

    def steps(self, share: float, into: Integers) -> None:
        """Add the steps that take up to `share` of the group's units."""
        n = int(np.searchsorted(self.share, share + 1e-12, side="right"))
        into += np.bincount(self.owner[:n], minlength=len(into))


def meet(
    selection: Selection,
    competitions: Sequence[CompetitionGroup],
    steps: Integers,
    budgets: Sequence[Budget],
    per_cost: bool,
) -> Integers:
    """Steps per block at which every budget holds, as close below as the units allow.

    Args:
        selection: the blocks.
        competitions: those that budgets decide about.
        steps: [blocks] where each block starts.
        budgets: what must hold.
        per_cost: order by score per saved cost, instead of by score.

    Raises:
        BudgetError: they do not hold with every unit gone.
    """
    _check_reachable(selection, competitions, steps, budgets)
    start, stages = steps, STAGES if per_cost else 1
    first = _amounts(selection, steps, budgets)
    for stage in range(1, stages + 1):
        aims = [
            b.limit + max(0.0, a - b.limit) * (1 - stage / stages)
            for a, b in zip(first, budgets, strict=True)
        ]
        prices = _prices(selection, steps, budgets) if per_cost else None
        orders = [_Order(selection, f, steps, prices) for f in competitions]
        steps = _shortest(selection, orders, steps, budgets, aims)
    return _give_back(selection, competitions, start, steps, budgets)


def _amounts(selection: Selection, steps: Integers, budgets: Sequence[Budget]) -> list[float]:
    counts = selection.counts(steps)
    return [b.cost.value(counts) for b in budgets]


def _holds(selection: Selection, steps: Integers, budgets: Sequence[Budget], aims: Sequence[float]) -> bool:
    counts = selection.counts(steps)
    return all(b.cost.value(counts) <= aim for b, aim in zip(budgets, aims, strict=True))


def _shortest(
    selection: Selection,
    orders: Sequence[_Order],
    steps: Integers,
    budgets: Sequence[Budget],
    aims: Sequence[float],
) -> Integers:
    """The least equal share of all competition groups at which the costs are at most `aims`."""
    shares = np.unique(np.concatenate([np.zeros(1), *(o.share for o in orders)]))

    def after(n: int) -> Integers:
        out = steps.copy()
        for order in orders:
            order.steps(float(shares[n]), out)
        return selection.rounded_up(out)

    low, high = 0, len(shares) - 1
    while low < high:
        middle = (low + high) // 2
        if _holds(selection, after(middle), budgets, aims):
            high = middle
        else:
            low = middle + 1
    return after(low)


def _prices(selection: Selection, steps: Integers, budgets: Sequence[Budget]) -> Floats:
    """[free axes]: what a unit of each saves of the budgets that do not hold yet, in shares of what is exceeded."""
    counts = selection.counts(steps)
    total = np.zeros(len(counts))
    for b in budgets:
        over = b.cost.value(counts) - b.limit
        if over > 0:
            total += b.cost.slopes(counts) / over
    return total


def _give_back(
    selection: Selection,
    competitions: Sequence[CompetitionGroup],
    start: Integers,
    steps: Integers,
    budgets: Sequence[Budget],
) -> Integers:
    """Undo the dearest steps that the budgets have room for, block by block."""
    limits = [b.limit for b in budgets]
    blocks = selection.blocks
    mine = [i for f in competitions for i in f.blocks]
    progress = True
    while progress:
        progress = False
        for i in sorted(mine, key=lambda i: -(blocks[i].scores[steps[i] - 1] if steps[i] else 0)):
            if steps[i] > start[i]:
                trial = steps.copy()
                trial[i] = max(blocks[i].at_most(int(steps[i]) - 1), start[i])
                if _holds(selection, trial, budgets, limits):
                    steps, progress = trial, True
    return steps


def _check_reachable(
    selection: Selection, competitions: Sequence[CompetitionGroup], steps: Integers, budgets: Sequence[Budget]
) -> None:
    """Refuse budgets that do not hold with every unit of `competitions` gone."""
    least = steps.copy()
    for f in competitions:
        for i in f.blocks:
            least[i] = selection.blocks[i].allowed[-1]
    counts, full = selection.counts(least), selection.full
    for b in budgets:
        reached, whole = b.cost.value(counts), b.cost.value(full)
        if reached > b.limit:
            held = "".join(f"\n  asked for: {line}" for line in selection.rules.notes[:5])
            raise BudgetError(
                f"{b.name}={b.text(b.limit)} can't be reached: {b.text(reached)} remain "
                f"of {b.text(whole)} ({reached / max(whole, 1e-300):.1%}) without the removable units{held}\n  what locks the rest:\n"
                f"{lock_lines(selection.graph)}",
                reached / max(b.limit, 1e-300),
            )


def counts_of(graph: DependencyGraph, masks: Masks) -> Integers:
    """[groups] how many units `masks` keep."""
    kept = [int(masks[g.name].sum()) if g.name in masks else g.units for g in graph.groups]
    return np.array(kept, dtype=np.int64)


def lock_lines(graph: DependencyGraph) -> str:
    """The largest locks of a model, one a line."""
    locks = "\n".join(f"  {n:,} parameters: {reason}" for reason, n in graph.lock_summary().most_common(5))
    return locks or "  no parameter was used by the traced run"


def nothing_text(graph: DependencyGraph) -> str:
    """Why nothing of a model can be removed: its largest locks."""
    return f"no axis of this model can shrink:\n{lock_lines(graph)}"
