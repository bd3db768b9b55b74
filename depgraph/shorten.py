"""Depth beside widths: branches go first, ranked again after each; then widths meet what is left to meet.

Under budgets, how many branches go is tried, none among the numbers: for each, widths are cut as far as the budgets still need,
and the model whose outputs are nearest to the original's is taken. Neither kind is worth more by itself, and scores of branches
and of units do not compare, but two models of one size do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .base.errors import BudgetError, InputError, NothingToPruneError, VerificationError
from .base.weights import Weights
from .comparing import distance
from .costs.cost import parameter_count
from .costs.latency import Timer
from .data.calibration import Calibration
from .depth.branches import Branch
from .depth.choose import Candidates
from .depth.removing import without
from .depth.request import Depth
from .grouping.graph import DependencyGraph
from .grouping.naming import given_names, named
from .plan.plan import Plan
from .search import Settled, by_group
from .select import BudgetKind, Request
from .select.budgets import amounts
from .select.nested import among
from .select.scope import DEFAULT_RATIO
from .surgery.apply import apply
from .tracing.tensors import named_tensors
from .verify.verify import Verification
from .verify.verify import verify as verify_values

TRIED = 7  # numbers of branches at first, none among them
# What branches say they have of it.
COUNTED = {"max_params": "parameters", "max_bytes": "parameters", "max_macs": "macs"}
# Widths of a model by a request, verified or not.
Cut = Callable[[nn.Module, Request, bool | Weights], Settled]


class Shortened(NamedTuple):
    """The smaller model, its plan, what was proved; and the same with stand-ins for what was removed, in the original's names."""

    model: nn.Module
    plan: Plan
    verification: Verification
    unshifted: Settled
    branches: list[Branch]
    note: str


@dataclass
class _Shortening:
    """One search: `cut` makes widths, `candidates` says which branches go."""

    graph: DependencyGraph
    example_inputs: Any
    request: Request
    cut: Cut
    candidates: Candidates
    data: Calibration
    limits: dict[str, tuple[BudgetKind, float]] = field(default_factory=dict)  # the most of what, by name

    @property
    def least(self) -> int:
        """How many branches go in any case."""
        return len(self.candidates.fixed)

    def base(self, count: int) -> nn.Module:
        """The model with stand-ins for `count` branches."""
        chosen = self.candidates.first(count)
        return apply(self.graph.model, replace(self.plan(chosen), repairs=[])) if chosen else self.graph.model

    def plan(self, chosen: list[Branch], compact: bool = False) -> Plan:
        """The plan that removes the `chosen` branches alone."""
        return without(self.candidates.residual, chosen, self.example_inputs, compact=compact)

    def exceeded(self, model: nn.Module, base: nn.Module | None = None) -> dict[str, Any]:
        """The budgets that `model` does not meet yet, for cuts of `base`, which may have more widths.

        Amounts, or where each measurement gives another number shares of what `base` has: an amount may be above that the next time.
        """
        found: dict[str, Any] = {}
        for name, (kind, limit) in self.limits.items():
            if (has := kind.measure(model, self.example_inputs)) <= limit:
                continue
            if base is not None and base is not model and kind.compare is not None:
                has = max(limit, kind.measure(base, self.example_inputs))
            found[name] = kind.spell(limit) if kind.compare is None else limit / has
        return found

    def at(self, count: int, verify: bool | Weights) -> Settled:
        """The model with `count` branches fewer, and widths by the rest of the request.

        Raises:
            BudgetError: widths can't meet what is left.
        """
        base, rest = self.base(count), self._named(count)
        found = self.given(base, rest, verify)
        rest = replace(rest, budgets=self.exceeded(found.model, base) if self.limits else {})
        return (
            self.cut(base, rest, verify) if _asks_widths(rest) and not self.candidates.depth.alone else found
        )

    def given(self, base: nn.Module, rest: Request, verify: bool | Weights) -> Settled:
        """`base` with the widths that a larger plan says, and no others."""
        if rest.within is None or not rest.within.cuts:
            return Settled(base, Plan(), Verification("skipped", detail=""), self.graph)
        alone = Request(within=rest.within, around=rest.around, budgets={"max_params": 1.0})
        return self.cut(base, alone, verify)

    def _named(self, count: int) -> Request:
        """The request without what it says of parts that are gone without `count` branches."""
        request, moves = self.request, self.plan(self.candidates.first(count)).moves

        def left(names: Any) -> bool:
            given = given_names("scope", names)
            meant = {n for name in given for n in named(self.graph, name)[0]}
            return not meant or not all(map(moves.holds, meant))

        ratio, scope = request.pruning_ratio, request.scope
        if isinstance(ratio, Mapping):
            ratio = {n: r for n, r in ratio.items() if left(n)} or None
        if isinstance(scope, (list, tuple)):
            scope = [s for s in scope if left(s.modules)] or None
        there = {n for n in self.graph.tensors if not moves.holds(n)}
        within, around = among(request.within, there), among(request.around, there)
        if within is not None:
            within.removals = []  # they have gone
        return replace(request, pruning_ratio=ratio, scope=scope, within=within, around=around)

    def best(self) -> int:
        """How many branches go, where budgets decide: of those that were tried the number with the nearest outputs.

        Raises:
            BudgetError: no number meets them.
        """
        most = self._most()
        if self.candidates.depth.alone:
            if over := self.exceeded(self.base(most)):
                raise BudgetError(
                    f"branches alone can't meet {', '.join(f'{n}={v}' for n, v in over.items())}: {most} of {self.candidates.total} can "
                    "go\n  fix: let widths go, too (leave alone=True away)"
                )
            return most
        seen: dict[int, float] = {}
        failed: list[BudgetError | NothingToPruneError] = []

        def attempt(count: int) -> None:
            if count not in seen:
                try:
                    seen[count] = distance(
                        self.graph.model, self.at(count, False).model, self.data, "comparing depths"
                    )
                except (BudgetError, NothingToPruneError) as error:
                    seen[count] = float("inf")
                    failed.append(error)

        for i in range(TRIED):
            attempt(self.least + round((most - self.least) * i / (TRIED - 1)))
        found = min(seen, key=lambda n: (seen[n], n))
        for near in (found - 1, found + 1):
            if self.least <= near <= most:
                attempt(near)
        found = min(seen, key=lambda n: (seen[n], n))
        if seen[found] == float("inf"):
            raise min(failed, key=lambda e: getattr(e, "over", float("inf")))
        return found

    def _most(self) -> int:
        """The least number of branches without which the budgets hold, or the largest that can go."""
        low, high = self.least, len(self.candidates.branches)
        one_by_one = not self.candidates.depth.contiguous  # then one more is one more ranking
        if one_by_one and all(kind.compare is None for kind, _ in self.limits.values()):
            for count in range(low, high + 1):
                if (enough := self._enough(count)) is not False:
                    return count if enough else max(low, count - 1)
            return high
        while low < high:
            middle = (low + high) // 2
            if (enough := self._enough(middle)) is None:
                high = middle - 1 if middle > low else low
            else:
                low, high = (low, middle) if enough else (middle + 1, high)
        while low > self.least and self._enough(low) is None:
            low -= 1
        return low

    def _enough(self, count: int) -> bool | None:
        """Whether the budgets hold without `count` branches; None where so many can't go."""
        try:
            base = self.base(count)
        except InputError:
            return None
        return not self.exceeded(self.given(base, self._named(count), False).model)


def shorten(
    graph: DependencyGraph, example_inputs: Any, depth: Depth, request: Request, data: Calibration | None,
    ignored: set[str], verify: bool | Weights, cut: Cut, timer: Timer | None = None,
) -> Shortened:  # fmt: skip
    """Remove branches and cut widths of the model of `graph`.

    Args:
        graph: of the original.
        example_inputs: what it was traced with.
        depth: which branches go.
        request: what else was asked for.
        data: what branches are ranked on, and results compared on; None: the example inputs.
        ignored: names of tensors that stay.
        verify: compare the result with the original whose branches are zero and whose other removed entries are masked; or the
            source of the weights on which that is done.
        cut: makes widths.
        timer: what measures seconds for budgets, instead of runs on this machine.

    Raises:
        InputError: it is not said how many branches go; as for `Candidates`.
        NothingToPruneError, BudgetError, VerificationError: as for `prune`.
    """
    ratio = request.pruning_ratio
    undecided = not request.budgets and (
        _scoped(request) or isinstance(ratio, Mapping) or request.threshold is not None
    )
    if depth.keep is None and undecided:
        raise InputError(
            "depth has no number: give Depth(keep=...), a budget such as max_params, or a pruning_ratio"
        )
    if graph.elsewhere is not None and depth.keep is None and request.budgets and not depth.alone:
        raise InputError(
            "how many branches go beside widths is found by comparing whole models, which are not in memory here\n"
            "  fix: give Depth(keep=...), or Depth(alone=True), which leaves widths as they are"
        )
    candidates = Candidates(
        graph.model, example_inputs, depth, data, ignored=ignored, whole=request.uniform, within=request.within,
        around=request.around, weights=graph.elsewhere,
    )  # fmt: skip
    if depth.keep is None and not request.budgets and ratio is None:
        request = replace(request, pruning_ratio=DEFAULT_RATIO)
    examples = getattr(example_inputs, "examples", (example_inputs,))
    search = _Shortening(
        graph,
        example_inputs,
        request,
        cut,
        candidates,
        data or Calibration(list(examples), example_inputs, progress=False),
    )
    for kind, given in amounts(request, timer):
        has = float(kind.measure(graph.model, example_inputs))
        limit = kind.amount(given, has)
        search.limits[kind.name] = kind, limit
        what = COUNTED.get(kind.name) if depth.keep is None else None
        if what is not None and limit < has:
            goes = (1 - limit / has) * (has if what == "macs" else parameter_count(graph.model))
            candidates.needs[what] = max(goes, candidates.needs.get(what, 0.0))
    if depth.keep is not None:
        count = candidates.total - depth.keep
    elif request.budgets:
        count = search.best()
    else:
        count = max(search.least, int(float(request.pruning_ratio) * candidates.total))  # type: ignore[arg-type]
    found = search.at(count, verify)
    gone = candidates.gone(candidates.first(count))
    for plan in _plans(search, candidates.first(count), found):
        small = apply(graph.model, plan)
        proof = Verification("skipped", detail="verify=False")
        try:
            if verify:
                values = None if isinstance(verify, bool) else verify
                proof = verify_values(graph.model, small, plan, example_inputs, weights=values)
        except VerificationError as error:
            problem = error
            continue
        every = {g.name: g.units for g in found.graph.groups}
        text = (
            f"{len(gone)} of {candidates.total} branches removed"
            if gone
            else "no branch was removed: widths alone are closer"
        )
        names = ": " + ", ".join(b.name for b in gone[:6]) + (" ..." if len(gone) > 6 else "") if gone else ""
        unshifted = found._replace(
            plan=next(iter(_plans(search, candidates.first(count), found, compact=False)))
        )
        return Shortened(small, plan, by_group(found.graph, every, proof), unshifted, gone, text + names)
    raise VerificationError(f"{problem}\n  nothing was changed or returned") from problem


def _plans(search: _Shortening, chosen: list[Branch], found: Settled, compact: bool = True) -> Iterator[Plan]:
    """The plan of both, first with children that go, then with stand-ins alone."""
    for way in (True, False) if compact else (False,):
        short, repairs = search.plan(chosen, way), {}
        for r in (*found.plan.repairs, *short.repairs):
            repairs[r.path, r.name, r.keys] = r
        shapes = {**short.shapes, **{n: c.shape for n, c in found.plan.cuts.items()}}
        yield replace(
            found.plan, cuts=found.plan.cuts, shapes=shapes, aliases=short.aliases, repairs=[*repairs.values()],
            removals=short.removals,
        )  # fmt: skip


def _scoped(request: Request) -> bool:
    scope = request.scope
    return isinstance(scope, (list, tuple)) and any(s.ratio is not None for s in scope)


def _asks_widths(request: Request) -> bool:
    """Whether the request says anything of widths, beside depth."""
    return (
        bool(request.budgets)
        or request.pruning_ratio is not None
        or request.threshold is not None
        or _scoped(request)
    )


def recovered_values(model: nn.Module, small: nn.Module, plan: Plan) -> None:
    """`model` takes the values of `small`, which has stand-ins where `plan` removes modules."""
    given, moves = named_tensors(small)[0], plan.moves
    with torch.no_grad():
        for name, tensor in named_tensors(model)[0].items():
            tensor.data.copy_(given[moves.old(name)])
