"""Scores, scopes, budgets and constraints -> which units of which groups go.

In the order of the way: `factors.py` (which groups are cut), `floors.py` (what must stay), `moves.py` and `blocks.py`
(groups that are chosen together, and the order of their units), `earlier.py` (what went before), `normalise.py` (scores made comparable), `scope.py` (who
competes with whom), `budget.py` (how far), `uniform.py` (equal widths), `selection.py` (all of it in a row).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..costs.cost import byte_cost, mac_cost, parameter_cost
from ..grouping.given import checked_scores
from ..grouping.graph import DependencyGraph
from ..plan.plan import Masks, Plan
from .blocks import Block
from .budget import Budget, lock_lines, nothing_text
from .factors import choose_factors
from .request import Request
from .scope import Scope
from .selection import Selection

COSTS = {"max_params": parameter_cost, "max_macs": mac_cost, "max_bytes": byte_cost}


def choose(
    graph: DependencyGraph, scores: Mapping[str, Any], *, pruning_ratio: float | Mapping[str, float] | None = None,
    max_params: int | None = None, max_macs: int | None = None, max_bytes: int | None = None,
    budgets: Sequence[Budget] = (), scope: str | Sequence[Scope] | None = None, max_ratio: float | None = None,
    normalise: str = "mean", per_cost: bool = False, round_to: int = 1, uniform: bool = False,
    earlier: Plan | None = None, threshold: float | None = None,
) -> Masks:  # fmt: skip
    """Which units of which groups stay.

    Args:
        graph: the dependency graph.
        scores: group name -> [units] scores (arrays, tensors or lists), the lowest go first: what `scores_of` gives, or your own.
        pruning_ratio: the share of the units of each prunable dim that goes (of each field that competes, with such a
            `scope`); or a ratio for each group that a name or glob names, later ones first: the rest stays whole.
        max_params: at most so many parameters.
        max_macs: at most so many multiply-accumulates in the traced pass.
        max_bytes: at most so many bytes of parameters and buffers.
        budgets: further ones; all of them hold together.
        scope: who competes with whom: "local", "global", "isomorphic", or a list of `Scope` (see `scope.py`).
        max_ratio: no group loses a larger share. By default 0.9 where units compete, or more if that is asked for, or
            if budgets can't be met otherwise.
        normalise: how scores of different groups are made comparable: see `normalise.py`.
        per_cost: with budgets, take the units with the least score per saved cost first.
        round_to: every parameter dim that shrinks keeps a multiple of this (the groups of a convolution counted together).
        uniform: equal widths in repeated blocks, and in all that one field of the model's config says.
        threshold: instead of a ratio: the units whose normalised score is below this go.
        earlier: the plan that made the model of its original: ratios, caps and floors then count from that one's sizes.

    Returns:
        group name -> bool array, True where a unit stays; groups that lose nothing are absent.

    Raises:
        InputError: arguments that are out of range, contradict each other, or name nothing.
        NothingToPruneError: no group is free.
        BudgetError: a budget is below what can be reached.
    """
    given = {"max_params": max_params, "max_macs": max_macs, "max_bytes": max_bytes}
    own = [Budget(name, COSTS[name](graph), limit) for name, limit in given.items() if limit is not None]
    request = Request(
        pruning_ratio, scope, max_ratio, normalise, per_cost, round_to, uniform, earlier, threshold
    )
    return request.masks(graph, checked_scores(graph, scores), [*own, *budgets])


__all__ = [
    "Block",
    "Budget",
    "Masks",
    "Request",
    "Scope",
    "Selection",
    "choose",
    "choose_factors",
    "lock_lines",
    "nothing_text",
]
