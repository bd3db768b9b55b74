"""Budgets as users give them: read, met by the models of cost, and held against a measurement of the smaller model.

Parameters and bytes are exact. What torch's counter calls a multiply-accumulate, which tensors are alive at once and
how long a layer takes is modelled: the model says where to look, and a measurement of what came out says by how much
it was wrong there. That factor goes into the next plan, until every budget holds and none could be closer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from ..base.checks import is_number, shown
from ..base.errors import BudgetError, InputError
from ..costs import cost
from ..costs.cost import Cost
from ..costs.latency import RATIOS, LatencyTable, measure_latency, measure_rows, relative_latency
from ..costs.memory import measure_memory, memory_cost
from ..costs.size_table import Integers
from ..grouping.build import build_plan
from ..grouping.graph import DependencyGraph
from ..importance import Scores
from ..plan.plan import Masks
from ..surgery.apply import apply
from . import Budget, Request

MOST = 1e300  # a budget above is a slip
ROUNDS = 8  # plans that are measured at most
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10,
         "MiB": 1 << 20, "GiB": 1 << 30}  # fmt: skip
WITH_UNIT = {"max_latency": tuple(UNITS)[:3], "max_bytes": tuple(UNITS)[3:], "max_memory": tuple(UNITS)[3:]}


@dataclass
class Target:
    """One budget.

    Attributes:
        name: the argument.
        limit: the most that is allowed, in what `measure` returns.
        whole: what the original has.
        measure: of a smaller model; None where the model of the cost is exact.
        model: the cost as a function of the counts in a graph.
        near: how far below the limit is near enough, as a share of it.
        factor: measured over modelled, as far as is known.
        noisy: whether a second measurement gives another number than the first.
        seen: measured over modelled, of each plan that was measured, where it is.
    """

    name: str
    limit: float
    whole: float
    measure: Callable[[nn.Module], float] | None
    model: Callable[[DependencyGraph], Cost]
    near: float = 0.01
    factor: float = 1.0
    noisy: bool = False
    seen: list[float] = field(default_factory=list)

    @property
    def aim(self) -> float:
        """What to plan for: below the limit where a second measurement gives another number than the first."""
        return self.limit * (1 - self.near / 2) if self.noisy else self.limit

    def budget(self, graph: DependencyGraph) -> Budget:
        """The same in the terms of the model of the cost."""
        factor = self.factor
        return Budget(self.name, self.model(graph), self.aim / factor, lambda n: _text(self.name, n * factor))

    def learn(self, counts: Integers, graph: DependencyGraph, small: nn.Module) -> tuple[float, bool]:
        """What `small`, the model at `counts`, costs, and whether a plan with what that teaches may come closer."""
        modelled = self.model(graph).value(counts)
        found = self.measure(small) if self.measure is not None else modelled
        before, self.factor = self.factor, found / max(modelled, 1e-300)
        if self.noisy:  # what was measured of all plans so far says more than the last measurement
            self.seen.append(self.factor)
            self.factor = float(np.median(self.seen))
        if found > self.limit:  # the next plan is smaller, whatever the model says
            self.factor = max(self.factor, before * (1 + self.near / 10))
        return found, before > self.factor * (1 + self.near / 10)


@dataclass
class Targets:
    """All budgets of one call, and the best plan that a measurement has confirmed."""

    targets: list[Target] = field(default_factory=list)
    tried: int = 0
    best: Masks | None = None
    best_slack: float = np.inf
    over: str = ""

    def masks(self, graph: DependencyGraph, request: Request, scores: Mapping[int, Scores]) -> Masks:
        """The next plan to try: which units stay.

        Raises:
            BudgetError: the budgets can't be met.
        """
        if self.tried >= ROUNDS:
            if self.best is None:
                raise BudgetError(
                    f"{self.over} after {self.tried} plans: the machine's measurements do not settle"
                )
            return self.best
        try:
            return request.masks(graph, scores, [t.budget(graph) for t in self.targets])
        except BudgetError:
            if self.best is None:
                raise
            self.tried = ROUNDS
            return self.best

    def restart(self) -> None:
        """The graph has changed: what was measured is of no use any more."""
        self.tried, self.best, self.best_slack = 0, None, np.inf

    def settled(self, graph: DependencyGraph, masks: Masks, small: nn.Module) -> bool:
        """Whether `masks`, which made `small`, are the plan to take; else the next is made with what was measured."""
        if all(t.measure is None for t in self.targets) or self.tried >= ROUNDS:
            return True
        self.tried += 1
        if self.best is not None and _same(masks, self.best):  # what was learnt leads nowhere else
            return True
        slack, room, fits = np.inf, False, True
        for t in self.targets:
            found, more = t.learn(counts_of(graph, masks), graph, small)
            if found > t.limit:
                fits = False
                self.over = (
                    f"{t.name}={_text(t.name, t.limit)} is not met: {_text(t.name, found)} was measured"
                )
            slack, room = min(slack, 1 - found / t.limit - t.near), room or more
        if fits and slack < self.best_slack:
            self.best, self.best_slack = masks, slack
        return fits and (slack <= 0 or not room)


def _same(a: Masks, b: Masks) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def counts_of(graph: DependencyGraph, masks: Masks) -> Integers:
    """[free axes] how many units `masks` keep."""
    kept = [int(masks[a].sum()) if a in masks else axis.size for a, axis in graph.free.items()]
    return np.array(kept, dtype=np.int64)


def check_budgets(request: Request, given: Mapping[str, float | str | None]) -> None:
    """Refuse what is wrong whatever the model is.

    Raises:
        InputError: naming the argument and the remedy.
    """
    for name, value in given.items():
        if value is not None:
            amount(value, float("inf"), name)
    request.check([name for name, value in given.items() if value is not None])


def read_budgets(
    graph: DependencyGraph, example_inputs: Any, request: Request, given: Mapping[str, float | str | None]
) -> Targets:
    """The budgets that were asked for.

    Args:
        graph: the dependency graph of the original.
        example_inputs: what it was traced with.
        request: what else was asked for; the latency table is made of plans that keep to it.
        given: max_params, max_macs, max_bytes, max_memory, max_latency: None, a share of the original's (a float up to
            1), a number (an int), or a number with a unit ("12ms", "3MB").

    Raises:
        InputError: something else, or more than the original has.
    """
    model, found = graph.model, Targets()
    for name, value in given.items():
        if value is None:
            continue
        measure: Callable[[nn.Module], float] | None = None
        cost_of: Callable[[DependencyGraph], Cost]
        near = 0.01
        if name == "max_params":
            whole, cost_of = float(cost.parameter_count(model)), cost.parameter_cost
        elif name == "max_bytes":
            whole, cost_of = float(cost.byte_count(model)), cost.byte_cost
        elif name == "max_macs":
            measure, cost_of = _on(cost.count_macs, example_inputs), cost.mac_cost
            whole = measure(model)
        elif name == "max_memory":
            measure, cost_of = _on(measure_memory, example_inputs), memory_cost
            whole = measure(model)
        else:
            whole = measure_latency(model, example_inputs)
            measure, near = _seconds(model, example_inputs, whole), 0.05
            cost_of = _Latency(graph, example_inputs, request)
        noisy = name == "max_latency"
        target = Target(name, amount(value, whole, name), whole, measure, cost_of, near, noisy=noisy)
        full = np.array([axis.size for axis in graph.free.values()], dtype=np.int64)
        target.factor = whole / max(cost_of(graph).value(full), 1e-300) if measure is not None else 1.0
        found.targets.append(target)
    return found


def _on(measure: Callable[[nn.Module, Any], float], example_inputs: Any) -> Callable[[nn.Module], float]:
    return lambda model: float(measure(model, example_inputs))


def _seconds(model: nn.Module, example_inputs: Any, whole: float) -> Callable[[nn.Module], float]:
    """Seconds of a smaller model where the original, measured beside it, takes `whole`."""

    def measure(small: nn.Module) -> float:
        return relative_latency(small, model, example_inputs) * whole

    return measure


class _Latency:
    """The latency of a graph's model from a table that is made once, by axis ids that outlive frozen axes."""

    def __init__(self, graph: DependencyGraph, example_inputs: Any, request: Request) -> None:
        self.points: list[tuple[dict[int, int], dict[str, float]]] = []
        ones = {id(g.axis): np.ones(g.units) for g in graph.groups}
        for ratio in RATIOS:
            small, counts = graph.model, {a: axis.size for a, axis in graph.free.items()}
            if ratio:
                even = Request(pruning_ratio=ratio, round_to=request.round_to, uniform=request.uniform)
                masks = even.masks(graph, ones)
                counts = dict(zip(graph.free, counts_of(graph, masks).tolist(), strict=True))
                try:
                    small = apply(graph.model, build_plan(graph, masks))
                    rows = measure_rows(small, example_inputs)
                except Exception:  # noqa: BLE001  a comparison of sizes in forward, say: the other points will do
                    continue
            else:
                rows = measure_rows(small, example_inputs)
            self.points.append((counts, rows))

    def __call__(self, graph: DependencyGraph) -> Cost:
        table = LatencyTable(graph)
        for counts, rows in self.points:
            table.add(table.macs.vector(counts), rows)
        return table


def amount(given: Any, whole: float, name: str) -> float:
    """A budget as a number.

    Raises:
        InputError: it is no share, number or number with a unit, or more than `whole`, what the original has.
    """
    ways = "a fraction up to 1" + (" or a text as '12ms'" if name == "max_latency" else " or a positive int")
    if isinstance(given, str) and name in WITH_UNIT:
        value = _with_unit(given, name)
    elif not is_number(given) or not 0 < given < MOST:
        raise InputError(f"{name} must be {ways}, not {shown(given)}")
    elif name == "max_latency" and isinstance(given, int):
        raise InputError(f"{name}={given} has no unit: pass {ways}")
    elif isinstance(given, float):
        if given > 1:
            raise InputError(f"{name}={given} is a float above 1: pass {ways}")
        return float(given * whole)
    else:
        value = float(given)
    if value > whole:
        raise InputError(f"{name}={_text(name, value)} is above what the model has, {_text(name, whole)}")
    return value


def _with_unit(given: str, name: str) -> float:
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]+)\s*", given)
    if match is None or match[2] not in WITH_UNIT[name]:
        raise InputError(
            f"{name}={given!r} is no amount: pass a number with one of {', '.join(WITH_UNIT[name])}"
        )
    value = float(match[1]) * UNITS[match[2]]
    if not 0 < value < MOST:
        raise InputError(f"{name} must be above 0 and below {MOST:g}, not {given!r}")
    return value


def _text(name: str, value: float) -> str:
    """An amount as a person reads it."""
    return f"{value * 1e3:,.3f} ms" if name == "max_latency" else f"{int(value):,}"
