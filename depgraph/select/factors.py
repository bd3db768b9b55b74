"""Which groups are cut: one factor of each product dim, as far as the constraints on counts can be met.

The rows of an attention projection are a product, heads x width of a head: each factor could shrink, and the other would
have to stay, or the loss would be paid twice. What is cut is the granularity:

* coarse: of the factors that only weights sum over, the one that is in most weights, or has most units where that is the
  same. Heads are in the projections of queries, keys and values and in the one that reads them, which recovery can fit to
  the heads that stay. The width of queries and keys is summed over where these meet, with no weight to be fitted, so that
  nothing can make up for what goes;
* fine: the factor with most units, so that widths follow a ratio closely.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial

from ..axes.axes import ATOM, PRODUCT, Axis, Reason, atoms
from ..axes.polynomials import Polynomial
from ..grouping.graph import DependencyGraph, Group

Tie = tuple[Polynomial, Reason]  # a polynomial in counts that must stay zero, and why
Choice = tuple[list[Group], list[Polynomial], dict[Axis, str]]


def choose_factors(
    graph: DependencyGraph, passed_over: Collection[Axis] = (), granularity: str | None = None
) -> tuple[list[Group], dict[Axis, set[Axis]]]:
    """The groups that a ratio or budget cuts: of each product that a weight produces, one factor.

    Args:
        graph: the dependency graph.
        passed_over: axes that are not to be chosen.
        granularity: "coarse" or "fine"; None: the graph's own, or coarse.

    Returns:
        the groups, and for each axis its rivals: axes that are another factor of the same product.
    """
    rivals: dict[Axis, set[Axis]] = {}
    seen: set[Axis] = set()
    for group in graph.groups:
        for m in group.members:
            axis = graph.dims(m.name)[m.dim]
            if m.role == "produces" and axis is not None and axis.find() not in seen:
                seen.add(axis.find())
                _rivals(axis, graph.by_axis, rivals)
    taken: set[Axis] = set()
    coarse = partial(_coarse, graph, _summed_without_weight(graph))
    rank = _fine if (granularity or graph.granularity) == "fine" else coarse
    for group in sorted(graph.groups, key=rank):
        fragment = group.axis.original_axis is not group.axis
        if group.axis not in passed_over and not rivals.get(group.axis, set()) & taken:
            if group.units > 1 or fragment:
                taken.add(group.axis)
    return [g for g in graph.groups if g.axis in taken], rivals


def _fine(group: Group) -> tuple[float, ...]:
    return (-group.units,)


def _coarse(graph: DependencyGraph, unweighted: Collection[Axis], group: Group) -> tuple[float, ...]:
    """What comes first is cut: by what sums over it, the parameters of the weights that it is in, its units."""
    reach = sum(graph.tensors[n].numel() for n in {m.name for m in group.members if m.role != "scales"})
    return group.axis in unweighted, -reach, -group.units


def _summed_without_weight(graph: DependencyGraph) -> set[Axis]:
    """The atoms that some op sums over without a weight, as the product of queries and keys does."""
    weighted = {p.node for p in graph.state.products if graph.state.leaves_of(p.weight)}
    sums = [found for node, found in graph.state.contracted.items() if node not in weighted]
    return {a for found in sums for axis in found for a in atoms(axis)}


def _rivals(axis: Axis, groups: Mapping[Axis, Group], rivals: dict[Axis, set[Axis]]) -> set[Axis]:
    """The free atoms in `axis`; atoms in different factors of one product are noted as rivals."""
    axis = axis.find()
    if axis.kind == ATOM:
        return {axis} if axis in groups else set()
    found = [_rivals(p, groups, rivals) for p in axis.parts]
    if axis.kind == PRODUCT:
        for i, a in enumerate(found):
            for j, b in enumerate(found):
                if i != j:
                    for x in a - b:
                        rivals.setdefault(x, set()).update(b - a)
    return set().union(*found)


def choose_groups(graph: DependencyGraph, ties: Sequence[Tie] = (), granularity: str | None = None) -> Choice:
    """The groups to cut, the constraints over them, and locked axes with the reason.

    Where a constraint can't be met with the first choice of factors (it would fix the width of a whole model because
    heads keep their number), the choice that leaves more entries free is taken.

    Args:
        graph: the dependency graph.
        ties: further constraints beside the graph's own.
        granularity: as in `choose_factors`.
    """
    constraints = [*graph.constraints, *ties]
    groups, rivals = choose_factors(graph, granularity=granularity)
    first = _met(graph, constraints, groups)
    taken = {g.axis for g in groups}
    blamed = taken & {
        r
        for p, _ in constraints
        if any(a in first[2] for t in p for a in t)
        for t in p
        for a in t
        for r in (a, *rivals.get(a, ()))
        if rivals.get(r)
    }
    if not first[2] or not blamed:
        return first
    second = _met(graph, constraints, choose_factors(graph, blamed, granularity)[0])
    return max((first, second), key=lambda c: _reach(graph, c[0]))


def _reach(graph: DependencyGraph, groups: list[Group]) -> int:
    names = {m.name for g in groups for m in g.members}
    return sum(graph.tensors[n].numel() for n in names)


def _met(graph: DependencyGraph, constraints: Sequence[Tie], groups: list[Group]) -> Choice:
    """Constraints over `groups`; the axes of those that can't be met with integers are locked and left out."""
    locked: dict[Axis, str] = {}
    while True:
        chosen = {g.axis for g in groups if g.axis not in locked}
        found = [(graph.sizes.reduce(p, chosen), why) for p, why in constraints]
        bad = {
            a: str(why)
            for p, why in found
            for t in p
            for a in t
            if len(p) - (() in p) == 1 or any(len(u) > 1 for u in p)
        }
        if not bad:
            return [g for g in groups if g.axis in chosen], [p for p, _ in found if p], locked
        locked.update(bad)
