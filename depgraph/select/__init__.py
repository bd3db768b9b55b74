"""Scores, scopes, budgets and constraints -> which units of which groups go.

In the order of the way: `factors.py` (which groups are cut), `floors.py` (what must stay), `moves.py` and `blocks.py`
(groups that are chosen together, and the order of their units), `already_pruned.py` (what went before), `nested.py` (what a larger plan takes), `aligned.py` (widths that run fast), `normalise.py` (scores made comparable), `scope.py` (who
competes with whom), `budget_kinds.py` (what can be bounded), `budget.py` (how far), `repeated.py` (equal widths), `request.py` (the request), `selection.py` (all of it in a row).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..base.checks import of_kind, several
from ..base.errors import InputError
from ..grouping.given import checked_scores
from ..grouping.graph import DependencyGraph
from ..plan.plan import Masks, Plan
from .aligned import AUTO
from .blocks import Block
from .budget import Budget, counts_of, lock_lines, nothing_text
from .budget_kinds import BUDGETS, BudgetKind, register_budget
from .factors import choose_factors
from .request import OPTIONS, Request
from .scope import Scope
from .selection import Selection


def choose(
    graph: DependencyGraph, scores: Mapping[str, Any], *, pruning_ratio: float | Mapping[str, float] | None = None,
    max_params: float | str | None = None, max_macs: float | str | None = None, max_bytes: float | str | None = None,
    max_memory: float | str | None = None, budgets: Sequence[Budget] = (), scope: str | Sequence[Scope] | None = None,
    max_ratio: float | None = None, normalise: str = "mean", per_cost: bool = False, round_to: int | str = AUTO,
    uniform: bool = False, already_pruned: Plan | None = None, within: Plan | None = None,
    threshold: float | None = None,
    **further_budgets: float | str | None,
) -> Masks:  # fmt: skip
    """Which units of which groups stay.

    Args:
        graph: the dependency graph.
        scores: group name -> [units] scores (arrays, tensors or lists), the lowest go first: what `scores_of` gives, or your own.
        pruning_ratio: the share of the units of each prunable dim that goes (of each competition group, with such a
            `scope`); or a ratio for each group that a name or glob names, later ones first: the rest stays whole.
        max_params: at most so many parameters: a share of what there is (0.5), a number, or a text as for `prune`.
        max_macs: at most so many multiply-accumulates in the traced pass, as the model of their cost counts them.
        max_bytes: at most so many bytes of parameters and buffers.
        max_memory: at most so many bytes of activations at their peak, as the model of their cost counts them.
        budgets: further ones; all of them hold together.
        scope: who competes with whom: "local", "global", "isomorphic", or a list of `Scope` (see `scope.py`).
        max_ratio: no group loses a larger share. By default 0.9 where units compete, or more if that is asked for, or
            if budgets can't be met otherwise.
        normalise: how scores of different groups are made comparable: see `normalise.py`.
        per_cost: with budgets, take the units with the least score per saved cost first.
        round_to: every parameter dim that shrinks keeps a multiple of this (the groups of a convolution counted together).
            "auto": under budgets, the channels of two-dimensional convolutions that come in multiples of 4 stay in such, as
            exported models run faster so, and a ratio is met to one unit where that makes them such. Widths below 16 are
            free, and all where a hundredth or more of the budget would be left.
        uniform: equal widths in repeated blocks, and in all sizes that come from one field of the model's config.
        already_pruned: the plan that made the model of its original: ratios, caps and floors then count from that one's
            sizes.
        within: the plan of a larger model: what that removes goes here, too, so that what the smaller one keeps the larger
            one keeps.
        threshold: instead of a ratio: the units whose normalised score is below this go.
        **further_budgets: those of `register_budget`.

    Returns:
        group name -> bool array, True where a unit stays; groups that lose nothing are absent.

    Raises:
        InputError: arguments that are out of range, contradict each other, or name nothing; a budget that is measured,
            such as ``max_latency``: only `prune` can.
        NothingToPruneError: no group is free.
        BudgetError: a budget is below what can be reached.
    """
    request = Request.of(locals(), further_budgets)
    of_kind("graph", graph, DependencyGraph, "what depgraph.analyze returned")
    limits = several("budgets", budgets, Budget, "depgraph.Budgets")
    for kind, given in request.amounts:
        if kind.cost is None or kind.calibrate is not None:
            raise InputError(f"{kind.name} needs runs of the model: use it with prune")
        cost = kind.cost(graph)
        limits.append(
            Budget(kind.name, cost, kind.amount(given, cost.value(counts_of(graph, {}))), kind.show)
        )
    request = replace(request, budgets={b.name: b for b in limits})
    return request.masks(graph, checked_scores(graph, scores), limits)


__all__ = [
    "BUDGETS",
    "OPTIONS",
    "Block",
    "Budget",
    "BudgetKind",
    "Masks",
    "Request",
    "Scope",
    "Selection",
    "choose",
    "choose_factors",
    "lock_lines",
    "nothing_text",
    "register_budget",
]
