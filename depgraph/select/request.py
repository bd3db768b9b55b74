"""What was asked for, as data: checked once, then put to any graph and any scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from ..base.checks import flag, number, of_kind
from ..base.errors import BudgetError, InputError, NothingToPruneError, likely
from ..grouping.graph import GRANULARITIES, DependencyGraph
from ..importance import Scores
from ..plan.plan import Masks, Plan
from .aligned import AUTO, NEAR, check_round_to, spoken
from .already_pruned import already_pruned_units
from .blocks import Block
from .budget import Budget, counts_of, nothing_text
from .budget_kinds import BUDGETS, BudgetKind, budget_kind
from .factors import choose_groups
from .nested import removed_units
from .normalise import NORMALISATIONS
from .repeated import ties
from .scope import MOST, SCOPES, Scope, check_scope
from .selection import Selection


def option(
    default: Any, text: str, kind: Callable[[str], Any] | None = None, choices: Sequence[str] = ()
) -> Any:
    """A field of `Request`.

    Args:
        default: what it is where nothing is said.
        text: what it does, for the help of the command line and docs/options.md.
        kind: what makes its value of a word of the command line; None: the command line has no such option. Of a switch,
            `bool`.
        choices: the values that it may have, where these can be listed.
    """
    about = {"text": text, "kind": kind, "choices": choices}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Request:
    """What was asked for: the one list of options that say how much goes and where; checked when it is made.

    `prune`, `choose`, `sweep`, gradual pruning, the command line and docs/options.md read these fields: an option is one
    line here, and an argument of `prune` and `choose` that documents it.

    Raises:
        InputError: an option is out of range, or contradicts another: naming the argument and the remedy.
    """

    pruning_ratio: float | Mapping[str, float] | None = option(
        None, "share of each prunable dim to remove, such as 0.5", float
    )
    scope: str | Sequence[Scope] | None = option(None, "which groups compete", str, SCOPES)
    max_ratio: float | None = option(None, "no group loses a larger share", float)
    threshold: float | None = option(None, "remove the units whose normalised score is below this", float)
    normalise: str = option("mean", "how scores of groups are made comparable", str, NORMALISATIONS)
    per_cost: bool = option(False, "budgets take the units with the least score per saved cost first", bool)
    round_to: int | str = option(
        AUTO,
        'widths are multiples of this; "auto": channels of convolutions, of 4, where budgets allow it',
        spoken,
    )
    uniform: bool = option(
        False,
        "equal widths in repeated blocks, and in all sizes that come from one field of the config",
        bool,
    )
    already_pruned: Plan | None = option(None, "the plan that made the model of its original")
    within: Plan | None = option(None, "the plan of a larger model: what that removes goes here, too")
    around: Plan | None = None  # the plan of a smaller model: what that keeps stays here, too
    budgets: Mapping[str, Any] = field(
        default_factory=dict
    )  # by the names in `BUDGETS`: amounts, or a `Budget` each

    @classmethod
    def of(cls, arguments: Mapping[str, Any], further: Mapping[str, Any] | None = None) -> Request:
        """The request in the `arguments` of a call: its fields by name, and every budget in them and in `further`.

        Raises:
            InputError: `further` holds what is not a budget; as for the class.
        """
        for name in further or ():
            if name not in BUDGETS:
                close = likely(name, [*arguments, *BUDGETS])
                hint = f"did you mean {close[0]!r}?" if close else f"the budgets are {', '.join(BUDGETS)}"
                raise InputError(f"unknown argument {name!r}: {hint}")
        everything = {**arguments, **(further or {})}
        own = {name: everything[name] for name in OPTIONS if name in everything}
        return cls(**own, budgets={n: everything[n] for n in BUDGETS if everything.get(n) is not None})

    def __post_init__(self) -> None:
        check_round_to(self.round_to)
        for name in ("per_cost", "uniform"):
            flag(name, getattr(self, name))
        ratio, budgets = self.pruning_ratio, list(self.budgets)
        for kind, given in self.amounts:
            kind.check(given)
        if budgets and ratio is not None and not isinstance(ratio, Mapping):
            raise InputError(
                f"pruning_ratio and a budget ({', '.join(budgets)}) contradict each other: give one of them\n"
                "  fix: max_ratio bounds what each group may lose to a budget; a pruning_ratio by names, or "
                "depgraph.Scope(modules, ratio=...), fixes a part of the model, and budgets decide about the rest"
            )
        check_scope(self.scope, ratio, self.max_ratio)
        self._check_threshold()
        if not isinstance(self.normalise, str) or self.normalise not in NORMALISATIONS:
            raise InputError(f"normalise must be one of {', '.join(NORMALISATIONS)}, not {self.normalise!r}")
        if self.per_cost and self.normalise == "standard":
            raise InputError(
                "per_cost divides scores, which normalise='standard' makes negative: use another one"
            )
        if self.within is not None:
            of_kind("within", self.within, Plan, "the depgraph.Plan of a larger model")
        if self.already_pruned is not None:
            of_kind(
                "already_pruned",
                self.already_pruned,
                Plan,
                "the depgraph.Plan that made the model of its original",
            )

    @property
    def amounts(self) -> list[tuple[BudgetKind, Any]]:
        """The budgets that are given as amounts, each with its entry in the table."""
        return [(budget_kind(n), given) for n, given in self.budgets.items() if not isinstance(given, Budget)]

    def as_data(self) -> dict[str, Any]:
        """What differs from the defaults, as far as it is numbers and names: what a plan remembers."""
        options = {
            name: getattr(self, name) for name, f in OPTIONS.items() if getattr(self, name) != f.default
        }
        return {n: v for n, v in {**options, **self.budgets}.items() if isinstance(v, (int, float, str))}

    def _check_threshold(self) -> None:
        given = self.threshold
        if given is None:
            return
        number("threshold", given)
        shares = (
            any(s.ratio is not None for s in self.scope)
            if isinstance(self.scope, (list, tuple))
            else self.scope
        )
        if self.budgets or self.pruning_ratio is not None or shares:
            raise InputError(
                "threshold says how far every group is cut, and so do ratios, scopes and budgets: give one of them"
            )

    def selection(
        self, graph: DependencyGraph, scores: Mapping[str, Scores], max_ratio: float | None = None,
        granularity: str | None = None,
    ) -> Selection:  # fmt: skip
        """The blocks of `graph`, under `max_ratio` instead of the request's own and a `granularity` instead of the graph's."""
        return Selection(
            graph, scores, self.round_to, ratio=self.pruning_ratio, scope=self.scope, max_ratio=max_ratio,
            normalise=self.normalise, ties=ties(graph) if self.uniform else (),
            lost=already_pruned_units(graph, self.already_pruned), threshold=self.threshold, granularity=granularity,
            within=removed_units(graph, self.within),
            around=None if self.around is None else removed_units(graph, self.around),
        )  # fmt: skip

    def blocks(self, graph: DependencyGraph, scores: Mapping[str, Scores], masks: Masks) -> list[Block]:
        """The blocks that `masks` cut."""
        for granularity in self._granularities(graph):
            blocks = self.selection(graph, scores, granularity=granularity).blocks
            if masks.keys() <= {name for b in blocks for name in b.names}:
                break
        return [b for b in blocks if any(name in masks for name in b.names)]

    def masks(
        self, graph: DependencyGraph, scores: Mapping[str, Scores], budgets: Sequence[Budget] = ()
    ) -> Masks:
        """Which units stay: group name -> bool array, for the groups that lose some.

        Raises:
            InputError: a name that matches nothing.
            NothingToPruneError: no group is free.
            BudgetError: the budgets can't be met.
        """
        if not graph.groups:
            raise NothingToPruneError(nothing_text(graph))
        if self.round_to != AUTO:
            return self._masks(graph, scores, budgets)
        free = replace(self, round_to=1)
        if self.threshold is not None:  # says of each unit whether it goes
            return free._masks(graph, scores, budgets)
        try:
            aligned = self._masks(graph, scores, budgets)
        except BudgetError:
            return free._masks(graph, scores, budgets)
        used = _used(graph, aligned, budgets)
        if aligned and used >= 1 - NEAR:
            return aligned
        close = free._masks(graph, scores, budgets)
        return close if not aligned or _used(graph, close, budgets) > used else aligned

    def _masks(
        self, graph: DependencyGraph, scores: Mapping[str, Scores], budgets: Sequence[Budget]
    ) -> Masks:
        """As `masks`, with widths as `round_to` says.

        Raises:
            BudgetError: the budgets can't be met so.
        """
        usual = MOST if self.max_ratio is None and self._competes(bool(budgets)) else self.max_ratio
        failed: list[BudgetError] = []
        idle: list[Masks] = []  # where whole heads can't go one at a time, widths can
        for granularity in self._granularities(graph):
            for most in dict.fromkeys((usual, self.max_ratio)):
                try:
                    found = self.selection(graph, scores, most, granularity).choose(budgets, self.per_cost)
                except BudgetError as error:
                    failed.append(error)
                    continue
                if self.threshold is not None or not all(mask.all() for mask in found.values()):
                    return found
                idle.append(found)
        if idle:
            return idle[0]
        raise min(failed, key=lambda e: e.over)

    def _granularities(self, graph: DependencyGraph) -> list[str]:
        """How products are cut: as was asked, or coarsely where that removes something and meets budgets, and finely otherwise.

        Raises:
            InputError: neither way cuts the groups that `within` cuts.
        """
        if self.within is not None and any(map(self.within.drops, graph.tensors)):
            raise InputError(
                "within removes modules that stay here: what the smaller model keeps, the larger one would not\n"
                "  fix: prune(..., depth=True), so that they go here, too"
            )
        ways = [graph.granularity] if graph.granularity else list(GRANULARITIES)
        cut = removed_units(graph, self.within).keys()
        fine = [w for w in ways if cut <= {g.axis for g in choose_groups(graph, (), w)[0]}] if cut else ways
        if not fine:
            raise InputError(
                "within cuts groups that can't be cut here: make both plans with the same granularity"
            )
        return fine

    def _competes(self, budgets: bool) -> bool:
        """Whether units of several groups compete, and no share above the usual cap is asked for."""
        asked: list[Any] = (
            [] if self.scope is None or isinstance(self.scope, str) else [s.ratio for s in self.scope]
        )
        ratio = self.pruning_ratio
        asked += list(ratio.values()) if isinstance(ratio, Mapping) else [ratio]
        together = budgets or self.scope not in (None, "local") or self.threshold is not None
        return together and all(r is None or r <= MOST for r in asked)


def _used(graph: DependencyGraph, masks: Masks, budgets: Sequence[Budget]) -> float:
    """The largest share of a budget that `masks` leave; 1 where there is none."""
    counts = counts_of(graph, masks)
    return max((b.cost.value(counts) / max(b.limit, 1e-300) for b in budgets), default=1.0)


OPTIONS: dict[str, Field[Any]] = {f.name: f for f in fields(Request) if "text" in f.metadata}
