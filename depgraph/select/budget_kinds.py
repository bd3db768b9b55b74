"""The one table of budgets: what can be bounded, how it is modelled and measured, and the units of its amounts.

`prune`, `choose`, `sweep`, gradual pruning, the command line and docs/options.md read `BUDGETS`. A new budget is one
entry:

    register_budget(BudgetKind("max_energy", "joules of one forward pass", cost=Energy, measure=joules, units={"J": 1}))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any

from torch import nn

from ..base.checks import is_number, shown
from ..base.errors import InputError
from ..costs import cost
from ..costs.cost import Cost
from ..costs.latency import Timer, measure_latency, pairs_of, relative_latency, timed
from ..costs.memory import measure_memory, memory_cost
from ..grouping.graph import DependencyGraph
from .latency_table import latency_cost

if TYPE_CHECKING:
    from .request import Request

CostOf = Callable[[DependencyGraph], Cost]
COUNTS = {"K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30,
         "TiB": 1 << 40}  # fmt: skip
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


@dataclass(frozen=True)
class BudgetKind:
    """Something that a budget can bound.

    Attributes:
        name: the argument of `prune` and its like: ``"max_macs"``.
        what: what is counted, for help and docs: ``"multiply-accumulates of one forward pass"``.
        cost: the model of it: a graph -> a `Cost`, a function of how many units of each group are left.
        measure: ``measure(model, example_inputs)`` -> what a model really has of it, in the same unit.
        units: suffix of an amount given as text -> what one of them is: ``{"ms": 1e-3}``.
        exact: whether the model of the cost always equals the measurement, so that nothing need be measured.
        near: how far below the limit is near enough, as a share of it.
        bare: whether a number without a unit is an amount; seconds need one.
        calibrate: ``calibrate(graph, example_inputs, request)`` -> `cost`, where the model of the cost is itself made of
            measurements; beside it, `cost` is what it falls back on where these do not lead there.
        compare: ``compare(smaller, model, example_inputs)`` -> the measurement of `smaller` as a share of that of `model`,
            where a second measurement gives another number than the first: both are then taken together.
        stored: what one more number in a parameter of a model takes of it, at most; None where that is nothing.
        show: an amount as a person reads it.
    """

    name: str
    what: str
    cost: CostOf | None
    measure: Callable[[nn.Module, Any], float]
    units: Mapping[str, float] = field(default_factory=dict)
    exact: bool = False
    near: float = 0.01
    bare: bool = True
    calibrate: Callable[[DependencyGraph, Any, Request], CostOf] | None = None
    compare: Callable[[nn.Module, nn.Module, Any], float] | None = None
    stored: Callable[[nn.Module], int] | None = None
    show: Callable[[float], str] = "{:,.0f}".format

    @property
    def ways(self) -> str:
        """How an amount may be given."""
        bare = ["a positive int"] if self.bare else []
        units = [f"a text with a unit ({', '.join(self.units)})"] if self.units else []
        return " or ".join(["a share up to 1 (0.5 or '50%')", *bare, *units])

    def cost_of(self, graph: DependencyGraph, example_inputs: Any, request: Request) -> CostOf:
        """The model of the cost: a graph, whose axes may be frozen later -> a `Cost`.

        Args:
            graph: the dependency graph of the original.
            example_inputs: what it was traced with.
            request: what else was asked for: models of the cost that are measured keep to it.
        """
        if self.calibrate is not None:
            return self.calibrate(graph, example_inputs, request)
        assert self.cost is not None  # noqa: S101  register_budget sees to it
        return self.cost

    def timed_by(self, timer: Timer) -> BudgetKind:
        """The same, of seconds that a timer of the user's gives."""

        def compare(small: nn.Module, model: nn.Module, example_inputs: Any) -> float:
            return pairs_of(model, small, example_inputs, timer).ratio

        return replace(
            self,
            measure=partial(timed, timer),
            calibrate=partial(latency_cost, timer=partial(timed, timer)),
            compare=compare,
        )

    def check(self, given: Any) -> None:
        """Refuse what is not an amount, whatever the model is.

        Args:
            given: as for `amount`.

        Raises:
            InputError: see `amount`.
        """
        self.amount(given, float("inf"))

    def amount(self, given: Any, whole: float) -> float:
        """The limit that `given` stands for.

        Args:
            given: a share of what the model has (a float up to 1, or ``"50%"``), a number, or a number with a unit.
            whole: what the model has.

        Raises:
            InputError: it is none of these, or more than `whole`.
        """
        share, value = self._read(given)
        if share is not None:
            return share * whole
        if value > whole:
            raise InputError(f"{self.name}={given} is above what the model has, {self.show(whole)}")
        return value

    def _read(self, given: Any) -> tuple[float | None, float]:
        """A share and no amount, or no share and an amount."""
        wrong = InputError(f"{self.name}={shown(given)} can't be read: give {self.ways}")
        if isinstance(given, str):
            match = re.fullmatch(r"\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*(%|[A-Za-z]*)\s*", given)
            try:
                number = float(match[1]) if match is not None else 0.0
            except ValueError:
                raise wrong from None
            if match is None or not isfinite(number) or number <= 0:
                raise wrong
            if match[2] == "%" and number <= 100:
                return number / 100, 0.0
            if match[2] not in self.units:
                raise wrong
            return None, number * self.units[match[2]]
        if not is_number(given) or not given > 0:
            raise wrong
        if isinstance(given, float) and given <= 1:
            return given, 0.0
        if isinstance(given, float) or not self.bare:
            raise wrong
        return None, float(min(given, 10**300))

    def spell(self, value: float) -> int | str:
        """An amount as an argument that `amount` reads as just that.

        Args:
            value: in what `measure` returns.
        """
        if self.bare:
            return max(int(value), 1)
        unit = min(self.units, key=lambda u: self.units[u])
        return f"{value / self.units[unit]!r}{unit}"


BUDGETS: dict[str, BudgetKind] = {}


def register_budget(kind: BudgetKind) -> BudgetKind:
    """Make `kind` an argument of `prune`, `choose`, `sweep`, `prune_gradually` and an option of the command line.

    Args:
        kind: what is bounded, how it is modelled and measured, and its units.

    Returns:
        `kind`.

    Raises:
        InputError: its name does not begin with ``max_``, or is taken; it has neither `cost` nor `calibrate`.
    """
    if not isinstance(kind, BudgetKind):
        raise InputError(f"register_budget takes a depgraph.BudgetKind, not {kind!r}")
    if not kind.name.isidentifier() or not kind.name.startswith("max_") or kind.name == "max_ratio":
        raise InputError(f"the name of a budget begins with max_, such as 'max_energy', not {kind.name!r}")
    if kind.name in BUDGETS:
        raise InputError(f"budget {kind.name!r} exists already: {BUDGETS[kind.name].what}")
    if kind.cost is None and kind.calibrate is None:
        raise InputError(f"{kind.name} needs cost, a function from a graph to a Cost, or calibrate")
    BUDGETS[kind.name] = kind
    return kind


def budget_kind(name: str) -> BudgetKind:
    """The entry of `name`.

    Raises:
        InputError: there is none; those that there are are listed.
    """
    if name not in BUDGETS:
        raise InputError(f"unknown budget {name!r}: the budgets are {', '.join(BUDGETS)}")
    return BUDGETS[name]


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:,.3f} ms"


for _kind in (
    BudgetKind("max_params", "parameters", cost.parameter_cost, lambda m, _: cost.parameter_count(m), COUNTS, exact=True,
               stored=lambda m: 1),
    BudgetKind("max_macs", "multiply-accumulates of one forward pass", cost.mac_cost, cost.count_macs, COUNTS),
    BudgetKind("max_bytes", "bytes of parameters and buffers", cost.byte_cost, lambda m, _: cost.byte_count(m), BYTES,
               exact=True, stored=lambda m: max(p.element_size() for p in m.parameters())),
    BudgetKind("max_memory", "bytes of activations at their peak", memory_cost, measure_memory, BYTES),
    BudgetKind("max_latency", "seconds of one forward pass on this machine", cost.mac_cost, measure_latency, SECONDS, near=0.05,
               bare=False, calibrate=latency_cost, compare=relative_latency, show=_milliseconds),
):  # fmt: skip
    register_budget(_kind)
