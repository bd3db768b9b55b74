"""Plans that nest: what a smaller model keeps, a larger one keeps, too."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
import numpy.typing as npt

from ..axes.axes import Axis
from ..base.errors import InputError, listed
from ..grouping.build import build_plan
from ..grouping.graph import DependencyGraph, Group
from ..grouping.members import Member
from ..plan.plan import Plan

Bools = npt.NDArray[np.bool_]


class StaysWhole(InputError):
    """What a larger plan cuts must stay whole in `graph`: the `groups`."""

    def __init__(self, text: str, graph: DependencyGraph, groups: Sequence[Group]) -> None:
        super().__init__(text)
        self.graph, self.groups = graph, groups


def among(plan: Plan | None, names: Container[str]) -> Plan | None:
    """What `plan` says of the tensors `names` and of modules that go: for a model from which branches went."""
    if plan is None:
        return None
    cuts = {n: cut for n, cut in plan.cuts.items() if n in names}
    shapes = {n: shape for n, shape in plan.shapes.items() if n in names}
    return Plan(cuts, shapes, removals=plan.removals)


def removed_units(graph: DependencyGraph, plan: Plan | None) -> dict[Axis, Bools]:
    """Axis -> [units] which of its units `plan` takes, for those that lose some.

    Raises:
        InputError: it is no plan for the model of `graph`, or not one that takes whole units of its groups.
    """
    if plan is None:
        return {}
    wrong = [
        f"{n!r} has shape {tuple(t.shape)}, the plan is for {plan.shapes[n]}"
        for n, t in graph.tensors.items()
        if n in plan.shapes and plan.shapes[n] != tuple(t.shape)
    ]
    if wrong:
        raise InputError(listed("within is a plan for another model", wrong))
    held = [
        g for g in graph.named.values()
        if g.axis not in graph.by_axis and _left(g, plan) is not None and _removed(g, plan).any()
    ]  # fmt: skip
    if held:
        why = "; ".join(f"{g.name!r} {graph.reason(g.axis)}" for g in held[:3])
        raise StaysWhole(f"within cuts what must stay whole: {why}", graph, held)
    found = {g.axis: gone for g in graph.groups if (gone := _removed(g, plan)).any()}
    there = {a: gone for a, gone in found.items() if _left(graph.by_axis[a], plan) is not None}
    again = build_plan(graph, {graph.by_axis[axis].name: ~gone for axis, gone in there.items()})
    left = [n for n in plan.cuts.keys() | again.cuts.keys() if not plan.drops(n)]
    names = [n for n in left if not plan.mask(n).equal(again.mask(n))]
    if names:
        raise InputError(
            f"within removes from {', '.join(map(repr, sorted(names)[:4]))} what is no set of units of this graph: give a "
            "plan that was made for it"
        )
    return found


def _removed(group: Group, plan: Plan) -> Bools:
    """[units] whether nothing of a unit stays in the first dim that the group has."""
    m = _left(group, plan)
    if m is None:
        return np.ones(group.units, dtype=bool)
    cut = plan.cuts.get(m.name)
    kept = None if cut is None else cut.keep[m.dim]
    if cut is not None and cut.blocks is not None and m.rows is not None:
        kept = cut.blocks[m.rows[0] * len(cut.blocks) // cut.shape[0]]
    if kept is None:
        return np.zeros(group.units, dtype=bool)
    return np.asarray(~np.isin(m.indices, kept).any(axis=1))


def _left(group: Group, plan: Plan) -> Member | None:
    """The first dim that the group has, but for those in modules that go."""
    return next((m for m in (group.first, *group.members) if not plan.drops(m.name)), None)
