"""What was asked for, as data: checked once, then put to any graph and any scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..base.checks import flag, number, of_kind, whole_number
from ..base.errors import BudgetError, InputError, NothingToPruneError
from ..grouping.graph import GRANULARITIES, DependencyGraph
from ..importance import Scores
from ..plan.plan import Masks, Plan
from .already_pruned import already_pruned_units
from .blocks import Block
from .budget import Budget, nothing_text
from .normalise import NORMALISATIONS
from .repeated import ties
from .scope import MOST, Scope, check_scope
from .selection import Selection


@dataclass(frozen=True)
class Request:
    """The arguments of `choose` but for budgets, which depend on the model."""

    pruning_ratio: float | Mapping[str, float] | None = None
    scope: str | Sequence[Scope] | None = None
    max_ratio: float | None = None
    normalise: str = "mean"
    per_cost: bool = False
    round_to: int = 1
    uniform: bool = False
    earlier: Plan | None = None
    threshold: float | None = None

    def check(self, budgets: Sequence[str] = ()) -> None:
        """Refuse what is out of range or contradicts itself; `budgets`: the names of those that are given.

        Raises:
            InputError: naming the argument and the remedy.
        """
        ratio = self.pruning_ratio
        if budgets and ratio is not None and not isinstance(ratio, Mapping):
            raise InputError(
                f"pruning_ratio and a budget ({', '.join(budgets)}) contradict each other: give one of them\n"
                "  fix: max_ratio bounds what each group may lose to a budget; a pruning_ratio by names, or "
                "depgraph.Scope(modules, ratio=...), fixes a part of the model, and budgets decide about the rest"
            )
        check_scope(self.scope, ratio, self.max_ratio)
        self._check_threshold(budgets)
        if not isinstance(self.normalise, str) or self.normalise not in NORMALISATIONS:
            raise InputError(f"normalise must be one of {', '.join(NORMALISATIONS)}, not {self.normalise!r}")
        if self.per_cost and self.normalise == "standard":
            raise InputError(
                "per_cost divides scores, which normalise='standard' makes negative: use another one"
            )
        whole_number("round_to", self.round_to, 1)
        for name in ("per_cost", "uniform"):
            flag(name, getattr(self, name))
        if self.earlier is not None:
            of_kind("earlier", self.earlier, Plan, "the depgraph.Plan that made the model of its original")

    def _check_threshold(self, budgets: Sequence[str]) -> None:
        given = self.threshold
        if given is None:
            return
        number("threshold", given)
        shares = (
            any(s.ratio is not None for s in self.scope)
            if isinstance(self.scope, (list, tuple))
            else self.scope
        )
        if budgets or self.pruning_ratio is not None or shares:
            raise InputError(
                "threshold says how far every group is cut, and so do ratios, scopes and budgets: give one of them"
            )

    def selection(
        self, graph: DependencyGraph, scores: Mapping[int, Scores], max_ratio: float | None = None,
        granularity: str | None = None,
    ) -> Selection:  # fmt: skip
        """The blocks of `graph`, under `max_ratio` instead of the request's own and a `granularity` instead of the graph's."""
        return Selection(
            graph, scores, self.round_to, ratio=self.pruning_ratio, scope=self.scope, max_ratio=max_ratio,
            normalise=self.normalise, ties=ties(graph) if self.uniform else (), lost=already_pruned_units(graph, self.earlier),
            threshold=self.threshold, granularity=granularity,
        )  # fmt: skip

    def blocks(self, graph: DependencyGraph, scores: Mapping[int, Scores], masks: Masks) -> list[Block]:
        """The blocks that `masks` cut."""
        for granularity in _granularities(graph):
            blocks = self.selection(graph, scores, granularity=granularity).blocks
            if masks.keys() <= {a for b in blocks for a in b.gone}:
                break
        return [b for b in blocks if any(a in masks for a in b.gone)]

    def masks(
        self, graph: DependencyGraph, scores: Mapping[int, Scores], budgets: Sequence[Budget] = ()
    ) -> Masks:
        """Which units stay: axis id -> bool array, for the axes that lose some.

        Raises:
            InputError: see `check`; or a name that matches nothing.
            NothingToPruneError: no group is free.
            BudgetError: the budgets can't be met.
        """
        self.check([b.name for b in budgets])
        if not graph.groups:
            raise NothingToPruneError(nothing_text(graph))
        usual = MOST if self.max_ratio is None and self._competes(bool(budgets)) else self.max_ratio
        failed: list[BudgetError] = []
        for granularity in _granularities(graph):
            for most in dict.fromkeys((usual, self.max_ratio)):
                try:
                    return self.selection(graph, scores, most, granularity).choose(budgets, self.per_cost)
                except BudgetError as error:
                    failed.append(error)
        raise min(failed, key=lambda e: e.over)

    def _competes(self, budgets: bool) -> bool:
        """Whether units of several groups compete, and no share above the usual cap is asked for."""
        asked: list[Any] = (
            [] if self.scope is None or isinstance(self.scope, str) else [s.ratio for s in self.scope]
        )
        ratio = self.pruning_ratio
        asked += list(ratio.values()) if isinstance(ratio, Mapping) else [ratio]
        together = budgets or self.scope not in (None, "local") or self.threshold is not None
        return together and all(r is None or r <= MOST for r in asked)


def _granularities(graph: DependencyGraph) -> tuple[str, ...]:
    """How products are cut: as was asked, or coarsely where budgets can be met so, and finely otherwise."""
    return (graph.granularity,) if graph.granularity else GRANULARITIES
