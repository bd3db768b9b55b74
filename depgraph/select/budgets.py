"""Budgets as users give them: read, met by the models of cost, and held against a measurement of the smaller model.

Parameters and bytes are exact. What torch's counter calls a multiply-accumulate, which tensors are alive at once and
how long a layer takes is modelled: the model says where to look, and a measurement of what came out says by how much
it was wrong there. That factor goes into the next plan, until every budget holds and none could be closer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from ..base.errors import BudgetError
from ..costs.cost import Cost
from ..costs.latency import Timer, relative_latency
from ..costs.size_table import Integers
from ..grouping.graph import DependencyGraph
from ..importance import Scores
from ..plan.plan import Masks
from .budget import Budget, counts_of
from .budget_kinds import BudgetKind
from .request import Request
from .scope import Scope

ROUNDS = 12  # plans that are measured at most
STEP = 0.7  # the next plan is at least so large a share of one that was measured to be too slow
SURE = 0.8  # of what is near enough below a limit, where a second measurement gives another number than the first
FAR = 0.15  # so far below a limit a plan is not what was asked for: where measurements led there, they say nothing
CLOSE = 0.01  # what fits and what does not are so near to each other that nothing between them is worth a try


@dataclass
class Target:
    """One budget.

    Attributes:
        kind: its entry in the table of budgets.
        limit: the most that is allowed, in what `measure` returns.
        whole: what the original has.
        measure: of a smaller model; None where the model of the cost is exact.
        model: the cost as a function of the counts in a graph.
        factor: measured over modelled, as far as is known.
        seen: measured over modelled, of each plan that was measured, where a measurement may give another number again.
        fits, over: what the model says of the largest plan that was measured to fit, and of the smallest that was not.
        missed: how many plans in a row did not fit.
    """

    kind: BudgetKind
    limit: float
    whole: float
    measure: Callable[[nn.Module], float] | None
    model: Callable[[DependencyGraph], Cost]
    factor: float = 1.0
    seen: list[float] = field(default_factory=list)
    fits: float | None = None
    over: float | None = None
    missed: int = 0

    @property
    def near(self) -> float:
        """How far below the limit a measurement is near enough, as a share of it."""
        return self.kind.near * (SURE if self.kind.compare is not None else 1)

    @property
    def aim(self) -> float:
        """What to plan for: below the limit where a second measurement gives another number than the first."""
        return self.limit * (1 - self.near / 2) if self.kind.compare is not None else self.limit

    @property
    def planned(self) -> float:
        """The same in what the model of the cost says: between the largest plan that fits and the smallest that does not."""
        wanted, low, high = self.aim / self.factor, self.fits, self.over
        if high is not None:
            # What is measured may jump, or vary, by more than a step.
            wide = 2 ** (self.missed - 1) if low is None else 1
            wanted = min(wanted, high * (1 - self.kind.near / 10 * wide))
            wanted = max(wanted, high * STEP)  # one measurement does not decide about half of the model
        if low is not None and high is None and wanted <= low:
            wanted = low * (1 + self.kind.near)
        elif low is not None and high is not None and wanted < low + (high - low) / 8:  # it jumps in between
            wanted = (low + high) / 2
        return wanted

    def budget(self, graph: DependencyGraph) -> Budget:
        """The same in the terms of the model of the cost."""
        factor = self.factor
        return Budget(self.kind.name, self.model(graph), self.planned, lambda n: self.kind.show(n * factor))

    def learn(self, counts: Integers, graph: DependencyGraph, small: nn.Module) -> tuple[float, bool]:
        """What `small`, the model at `counts`, costs, and whether a plan with what that teaches may come closer."""
        modelled = self.model(graph).value(counts)
        found = self.measure(small) if self.measure is not None else modelled
        before, self.factor = self.factor, found / max(modelled, 1e-300)
        if (
            self.kind.compare is not None
        ):  # what was measured of all plans so far says more than the last measurement
            self.seen.append(self.factor)
            self.factor = float(np.median(self.seen))
            self._bracket(modelled, found <= self.limit)
            near = (
                self.over is not None and self.fits is not None and self.over - self.fits < CLOSE * self.over
            )
            return found, not near
        if found > self.limit:  # the next plan is smaller, whatever the model says
            self.factor = max(self.factor, before * (1 + self.kind.near / 10))
        return found, before > self.factor * (1 + self.kind.near / 10)

    def _bracket(self, modelled: float, fits: bool) -> None:
        """Take in that a plan fits, or does not; what contradicts what was measured before was noise and is dropped."""
        self.missed = 0 if fits else self.missed + 1
        if fits:
            self.fits = modelled if self.fits is None else max(self.fits, modelled)
            self.over = None if self.over is not None and self.over <= self.fits else self.over
        else:
            self.over = modelled if self.over is None else min(self.over, modelled)
            self.fits = None if self.fits is not None and self.fits >= self.over else self.fits

    def fall_back(self, graph: DependencyGraph) -> bool:
        """Whether there is a plainer model of the cost to go on with, now that the measured one leads nowhere."""
        plain = self.kind.cost
        if self.kind.calibrate is None or plain is None or self.model is plain:
            return False
        self.model, self.seen, self.fits, self.over, self.missed = plain, [], None, None, 0
        self.factor = self.whole / max(plain(graph).value(counts_of(graph, {})), 1e-300)
        return True


@dataclass
class Targets:
    """All budgets of one call, and the best plan that a measurement has confirmed.

    Attributes:
        targets: the budgets.
        tried: how many plans were measured.
        best: the plan that fits and comes closest; `best_slack`: by how much it could be closer to be near enough.
        factors: measured over modelled, of that plan, by budget.
        beyond: the last plan that did not fit.
        over: what was measured of that, as a text.
        narrowed: the request, with groups held at what they have in a plan that fits.
    """

    targets: list[Target] = field(default_factory=list)
    tried: int = 0
    best: Masks | None = None
    best_slack: float = np.inf
    factors: list[float] = field(default_factory=list)
    beyond: Masks | None = None
    over: str = ""
    narrowed: Request | None = None

    def masks(self, graph: DependencyGraph, request: Request, scores: Mapping[str, Scores]) -> Masks:
        """The next plan to try: which units stay.

        Raises:
            BudgetError: the budgets can't be met.
        """
        if self.tried >= ROUNDS:
            if self.best is None:
                raise BudgetError(
                    f"{self.over} after {self.tried} plans: measurements on this machine vary too much"
                )
            if self.best_slack > FAR and self.over:
                raise BudgetError(
                    f"{self.over}, and the largest plan that fits is {self.best_slack:.0%} below it, after {self.tried} plans: "
                    "measurements on this machine vary too much"
                )
            return self.best
        try:
            return (self.narrowed or request).masks(graph, scores, [t.budget(graph) for t in self.targets])
        except BudgetError:
            if self.best is None:
                if any(t.fall_back(graph) for t in self.targets):
                    return self.masks(graph, request, scores)
                raise
            self.tried = ROUNDS
            return self.best

    def restart(self) -> None:
        """The graph has changed: what was measured is of no use any more."""
        self.tried, self.best, self.best_slack, self.over = 0, None, np.inf, ""
        self.beyond = self.narrowed = None

    def settled(self, graph: DependencyGraph, request: Request, masks: Masks, small: nn.Module) -> bool:
        """Whether `masks`, which made `small`, are the plan to take; else the next is made with what was measured."""
        if all(t.measure is None for t in self.targets) or self.tried >= ROUNDS:
            return True
        self.tried += 1
        if self.best is not None and _same(masks, self.best):  # what was learnt leads nowhere else
            return not self._hold(request)
        slack, room, fits = np.inf, False, True
        for t in self.targets:
            found, more = t.learn(counts_of(graph, masks), graph, small)
            if found > t.limit:
                fits = False
                self.over = (
                    f"{t.kind.name}={t.kind.show(t.limit)} is not met: {t.kind.show(found)} was measured"
                )
            slack, room = min(slack, 1 - found / t.limit - t.near), room or more
        if fits and slack < self.best_slack:
            self.best, self.best_slack = masks, slack
            self.factors = [t.seen[-1] if t.seen else t.factor for t in self.targets]
        if not fits:
            self.beyond = masks
        if fits and slack <= 0:
            return True
        return not room and not self._hold(request) and fits

    def _hold(self, request: Request) -> bool:
        """Whether other groups may fill a gap: a kernel can take far longer for a few units more.

        The groups that keep more in the plan that does not fit than in the one that does stay at what they have in that.
        """
        best, beyond, asked = self.best, self.beyond, self.narrowed or request
        if best is None or beyond is None or self.best_slack <= 0:
            return False
        measured = all(t.kind.compare is not None for t in self.targets)
        if not measured or asked.scope in ("local", "isomorphic"):  # a list of scopes has others compete
            return False
        jumps = [n for n in best if n not in beyond or beyond[n].sum() > best[n].sum()]
        if not jumps or len(jumps) == len(best) or isinstance(asked.pruning_ratio, Mapping):
            return False
        held = [Scope(name, ratio=1 - float(np.mean(best[name]))) for name in jumps]
        others = () if asked.scope is None or isinstance(asked.scope, str) else asked.scope
        self.narrowed, self.beyond = replace(asked, scope=[*others, *held]), None
        for t, factor in zip(self.targets, self.factors, strict=True):
            t.factor, t.seen, t.over = factor, [factor], None
        return True


def _same(a: Masks, b: Masks) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def read_budgets(
    graph: DependencyGraph, example_inputs: Any, request: Request, timer: Timer | None = None
) -> Targets:
    """The budgets of `request`, in what the model of `graph` has.

    Args:
        graph: the dependency graph of the original.
        example_inputs: what it was traced with.
        request: what was asked for.
        timer: what measures seconds instead of runs on this machine.

    Raises:
        InputError: more than the original has.
    """
    return Targets([_target(graph, example_inputs, request, *amount) for amount in amounts(request, timer)])


def amounts(request: Request, timer: Timer | None) -> list[tuple[BudgetKind, Any]]:
    """The budgets of `request` that are amounts, of which `timer` measures the seconds, where there is one."""
    return [
        (kind.timed_by(timer) if timer is not None and kind.compare is relative_latency else kind, given)
        for kind, given in request.amounts
    ]


def _target(
    graph: DependencyGraph, example_inputs: Any, request: Request, kind: BudgetKind, given: Any
) -> Target:
    model = graph.model
    whole = float(kind.measure(model, example_inputs))
    limit = kind.amount(given, whole)
    cost_of = kind.cost_of(graph, example_inputs, request)
    if kind.exact:
        return Target(kind, limit, whole, None, cost_of)

    def measure(small: nn.Module) -> float:
        if kind.compare is None:
            return float(kind.measure(small, example_inputs))
        found = kind.compare(small, model, example_inputs) * whole
        if limit * (1 - kind.near) <= found <= limit:  # near enough to be taken: once could be by chance
            found = (found + kind.compare(small, model, example_inputs) * whole) / 2
        return found

    full = counts_of(graph, {})
    return Target(kind, limit, whole, measure, cost_of, whole / max(cost_of(graph).value(full), 1e-300))
