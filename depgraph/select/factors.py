"""Which groups are cut: one factor of each product dim, as far as the constraints on counts can be met."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ..grouping.axes import ATOM, PRODUCT, Axis, Polynomial, Reason
from ..grouping.graph import DependencyGraph, Group

Tie = tuple[Polynomial, Reason]  # a polynomial in counts that must stay zero, and why
Choice = tuple[list[Group], list[Polynomial], dict[int, str]]


def choose_factors(
    graph: DependencyGraph, passed_over: Collection[int] = ()
) -> tuple[list[Group], dict[int, set[int]]]:
    """The groups that a ratio or budget cuts: of each product that a weight produces, the factor with most units.

    Args:
        graph: the dependency graph.
        passed_over: ids of axes that are not to be chosen.

    Returns:
        the groups, and for each axis id the ids of its rivals: axes that are another factor of the same product.
    """
    rivals: dict[int, set[int]] = {}
    seen: set[int] = set()
    for group in graph.groups:
        for m in group.members:
            axis = graph.dims(m.name)[m.dim]
            if m.role == "produces" and axis is not None and id(axis.find()) not in seen:
                seen.add(id(axis.find()))
                _rivals(axis, graph.by_axis, rivals)
    taken: set[int] = set()
    for group in sorted(graph.groups, key=lambda g: -g.units):
        fragment = group.axis.pool is not group.axis
        if id(group.axis) not in passed_over and not rivals.get(id(group.axis), set()) & taken:
            if group.units > 1 or fragment:
                taken.add(id(group.axis))
    return [g for g in graph.groups if id(g.axis) in taken], rivals


def _rivals(axis: Axis, groups: Mapping[int, Group], rivals: dict[int, set[int]]) -> set[int]:
    """Ids of the free atoms in `axis`; atoms in different factors of one product are noted as rivals."""
    axis = axis.find()
    if axis.kind == ATOM:
        return {id(axis)} if id(axis) in groups else set()
    found = [_rivals(p, groups, rivals) for p in axis.parts]
    if axis.kind == PRODUCT:
        for i, a in enumerate(found):
            for j, b in enumerate(found):
                if i != j:
                    for x in a - b:
                        rivals.setdefault(x, set()).update(b - a)
    return set().union(*found)


def choose_groups(graph: DependencyGraph, ties: Sequence[Tie] = ()) -> Choice:
    """The groups to cut, the constraints over them, and locked axes with the reason.

    Where a constraint can't be met with the first choice of factors (it would fix the width of a whole model because
    heads keep their number), the choice that leaves more entries free is taken.

    Args:
        graph: the dependency graph.
        ties: further constraints beside the graph's own.
    """
    constraints = [*graph.constraints, *ties]
    groups, rivals = choose_factors(graph)
    first = _met(graph, constraints, groups)
    taken = {id(g.axis) for g in groups}
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
    second = _met(graph, constraints, choose_factors(graph, blamed)[0])
    return max((first, second), key=lambda c: _reach(graph, c[0]))


def _reach(graph: DependencyGraph, groups: list[Group]) -> int:
    names = {m.name for g in groups for m in g.members}
    return sum(graph.tensors[n].numel() for n in names)


def _met(graph: DependencyGraph, constraints: Sequence[Tie], groups: list[Group]) -> Choice:
    """Constraints over `groups`; the axes of those that can't be met with integers are locked and left out."""
    locked: dict[int, str] = {}
    while True:
        chosen = {id(g.axis): g.axis for g in groups if id(g.axis) not in locked}
        found = [(graph.sizes.reduce(p, chosen), why) for p, why in constraints]
        bad = {
            a: str(why)
            for p, why in found
            for t in p
            for a in t
            if len(p) - (() in p) == 1 or any(len(u) > 1 for u in p)
        }
        if not bad:
            return [g for g in groups if id(g.axis) in chosen], [p for p, _ in found if p], locked
        locked.update(bad)
