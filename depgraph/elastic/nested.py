"""The order of the units, and a plan for each size in that of the next larger one."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

from ..axes.axes import Reason
from ..base.checks import is_number, several, shown
from ..base.errors import BudgetError, InputError, NothingToPruneError, VerificationError
from ..base.weights import Weights
from ..data.calibration import Calibration
from ..depth.request import Depth
from ..grouping.build import build_plan
from ..grouping.graph import GRANULARITIES, DependencyGraph, Group
from ..grouping.members import Member
from ..grouping.naming import named
from ..importance import Scores
from ..plan.plan import Indices, Plan
from ..prune import analyze
from ..search import Settled, settle
from ..select import BUDGETS, OPTIONS, Request, nothing_text
from ..select.budgets import read_budgets
from ..select.nested import StaysWhole
from ..shorten import shorten
from ..surgery.apply import apply
from ..verify.verify import Verification, verify

COSTS = {"macs": "max_macs", "params": "max_params", "latency": "max_latency"}
OWN = ("pruning_ratio", "threshold", "already_pruned", "within")  # what sizes say


def checked_sizes(sizes: Any) -> list[float]:
    """`sizes` as floats that fall from 1, which may be left out."""
    given = several("sizes", sizes, (int, float), "shares of the whole model")
    fine = all(is_number(s) and 0 < s <= 1 for s in given)
    if not given or not fine or any(a <= b for a, b in pairwise(given)):
        raise InputError(
            f"sizes must be shares of the whole model that fall from 1, such as [1, 0.5, 0.25], not {shown(sizes)}"
        )
    return [1.0, *(float(s) for s in given if s < 1)]


def checked_options(cost: Any, options: Mapping[str, Any]) -> None:
    """Refuse an unknown cost, and options that say how much goes, or nothing at all."""
    if not isinstance(cost, str) or cost not in COSTS:
        raise InputError(f"cost must be one of {', '.join(COSTS)}, not {shown(cost)}")
    for name in options:
        if name in OWN or name in BUDGETS:
            raise InputError(f"Elastic takes no {name}: sizes say how much stays")
        if name not in OPTIONS:
            raise InputError(
                f"unknown argument {name!r}: the options are {', '.join(n for n in OPTIONS if n not in OWN)}"
            )
    Request.of(options)


def in_order(
    model: nn.Module, graph: DependencyGraph, scores: Mapping[str, Scores], example_inputs: Any
) -> tuple[dict[str, Indices], Verification]:
    """Group name -> the order in which its units stand by falling score, where the model computes the same so; the proof.

    An op that looks at the order of units (a running sum, say) shows in the proof: such groups stay as they are.
    """
    orders: dict[str, Indices] = {}
    for group in graph.groups:
        order = np.argsort(-scores[group.name], kind="stable")
        if group.axis not in graph.in_order and not np.array_equal(order, np.arange(group.units)):
            orders[group.name] = order

    unmoved = Verification("equal", detail="every unit stands where it stood")

    def proof(names: list[str]) -> Verification | None:
        """What is proved with these groups in order; None where the model computes something else so."""
        if not names:
            return unmoved
        plan = build_plan(graph, {}, order={n: orders[n] for n in names})
        try:
            return verify(model, apply(model, plan), plan, example_inputs)
        except VerificationError:
            return None

    def fine(names: list[str]) -> list[str]:
        """Those of `names` that can be in order, found by halves."""
        if proof(names) is not None:
            return names
        half = len(names) // 2
        found = [*fine(names[:half]), *fine(names[half:])] if half else []
        return found if proof(found) is not None else []

    names = fine(list(orders))
    found = proof(names)
    if found is None or found.status != "equal":  # values that can't be compared prove no order
        return {}, unmoved
    return {n: orders[n] for n in names}, found


def falling(scores: Scores) -> Scores:
    """`scores` that never rise, without two that are the same: of those the first is the highest."""
    found = scores.astype(np.float64)
    for i in range(1, len(found)):
        if found[i] >= found[i - 1]:
            found[i] = np.nextafter(found[i - 1], -np.inf)
    return found


@dataclass
class Nested:
    """Plans that nest.

    Attributes:
        graph: of the model whose units are in order, without what had to stay whole.
        example_inputs: what it was traced with.
        scores: group name -> [units].
        cost: what sizes are shares of, a key of `COSTS`.
        options: those of `choose`.
        order: what was proved of the order of the units.
        plans: size -> its plan; that of 1 cuts nothing.
        stated: arguments of `analyze` with which the model was traced, but for the granularity.
        depth: which branches smaller sizes leave out; None: none.
        data: what branches are ranked on; None: the example inputs.
        proofs: size -> what was proved of it.
        notes: what had to stay whole, and why.
        one_at_a_time: held while a size is planned for a call, as calls may come from several threads.
    """

    graph: DependencyGraph
    example_inputs: Any
    scores: Mapping[str, Scores]
    cost: str
    options: Mapping[str, Any]
    order: Verification
    stated: Mapping[str, Any] = field(default_factory=dict)
    depth: Depth | None = None
    data: Calibration | None = None
    plans: dict[float, Plan] = field(default_factory=dict)
    proofs: dict[float, Verification] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    one_at_a_time: AbstractContextManager[Any] = field(default_factory=threading.Lock)

    def find(self, sizes: Sequence[float]) -> None:
        """Plan all `sizes`, the largest first; where one fails with coarse units, all are planned with fine ones."""
        ways = [self.graph.granularity] if self.graph.granularity else [None, GRANULARITIES[-1]]
        for way in ways:
            self.graph = self.graph.without([], Reason(""))
            self.graph.granularity = way
            try:
                return self._find(sizes)
            except InputError:
                if way == ways[-1]:
                    raise
        return None

    def _find(self, sizes: Sequence[float]) -> None:
        again = True
        while again:  # what does not verify stays whole in all sizes
            again, self.proofs = False, {1.0: self.order}
            if self.depth is not None:  # each size has a graph of its own, which says anew what stays
                self.notes.clear()
            self.plans = {1.0: build_plan(self.graph, {})}
            for size in sizes[1:]:
                before = self.graph
                try:
                    self.graph = self.add(size)
                except StaysWhole as error:
                    self.graph = error.graph if self.depth is None else self._holding(error.groups)
                if again := self.graph is not before:
                    break

    def add(self, size: float) -> DependencyGraph:
        """Plan one size between its neighbours; the graph without what had to stay whole for it."""
        larger = min((s for s in self.plans if s > size), default=None)
        smaller = max((s for s in self.plans if s < size), default=None)
        arguments = {**self.options, COSTS[self.cost]: size, "within": self.plans.get(larger or 1.0)}
        request = replace(Request.of(arguments), around=self.plans.get(smaller or 0.0))
        graph, inputs = self.graph, self.example_inputs
        try:
            if self.depth is not None:
                ignored = {n for name in self.stated.get("ignore", ()) for n in named(graph, name)[0]}
                short = shorten(graph, inputs, self.depth, request, self.data, ignored, True, self._cut)
                self.plans[size], self.proofs[size] = short.plan, short.verification
                self.notes.append(f"{size:g}: {short.note}")
                return graph
            targets = read_budgets(graph, inputs, request)
            found = settle(graph, inputs, self.scores, request, targets, True, self.notes)
        except BudgetError as error:
            raise InputError(
                f"size {size:g} can't be reached between its neighbours: {error}\n  fix: other sizes, or less that "
                "stays whole"
            ) from error
        self.plans[size], self.proofs[size] = found.plan, found.verification
        return found.graph

    def _holding(self, groups: Sequence[Group]) -> DependencyGraph:
        """The graph without its groups that have a dim in common with `groups` of another one."""
        dims = {(m.name, m.dim) for g in groups for m in g.members}
        held = [g.name for g in self.graph.groups if dims & {(m.name, m.dim) for m in g.members}]
        return self.graph.without(held, Reason("stays whole in a smaller size"))

    def _cut(self, base: nn.Module, request: Request, verify: bool | Weights) -> Settled:
        """Widths of `base`, the model with stand-ins for branches, by the scores of the model: units stand in their order."""
        graph, own = self.graph, dict(self.scores)
        if base is not graph.model:
            graph = analyze(base, self.example_inputs, **{**self.stated, "granularity": graph.granularity})
            known = {_place(m): g.name for g in self.graph.groups for m in g.members}
            match = {
                g.name: next((n for m in g.members if (n := known.get(_place(m)))), "") for g in graph.groups
            }
            own = {name: self.scores[n] for name, n in match.items() if n}
            graph = graph.without([n for n in match if n not in own], Reason("stays whole with all branches"))
        if not graph.groups:
            raise NothingToPruneError(nothing_text(graph))
        targets = read_budgets(graph, self.example_inputs, request)
        return settle(graph, self.example_inputs, own, request, targets, verify, [])


def _place(member: Member) -> tuple[str, int, bytes]:
    """Where units stand in a tensor."""
    return member.name, member.dim, member.indices.tobytes()
