"""What a plan took before: ratios, caps and floors of a model that is pruned step by step count from its original."""

from __future__ import annotations

from ..axes.axes import Axis
from ..base.errors import InputError, listed
from ..grouping.graph import DependencyGraph, Group
from ..plan.names import in_new_names
from ..plan.plan import Plan


def already_pruned_units(graph: DependencyGraph, plan: Plan | None) -> dict[Axis, int]:
    """Original axis -> how many units more the dims of the original had, that `plan` made the graph's model of.

    A dim that lost a share of its indices to another factor (heads, where the width of a head is cut now) lost that share
    of its units.

    Raises:
        InputError: `plan` makes another model.
    """
    if plan is None:
        return {}
    plan = in_new_names(plan)
    wrong = [
        f"{n!r} has shape {tuple(t.shape)}, the plan gives it {plan.new_shape(n)}"
        for n, t in graph.tensors.items()
        if n in plan.shapes and plan.new_shape(n) != tuple(t.shape)
    ]
    if wrong:
        raise InputError(listed("the model is not the result of the earlier plan", wrong))
    originals: dict[Axis, list[Group]] = {}
    for group in graph.groups:
        originals.setdefault(group.axis.original_axis, []).append(group)
    return {original: _lost(graph, plan, groups) for original, groups in originals.items()}


def _lost(graph: DependencyGraph, plan: Plan, groups: list[Group]) -> int:
    """Of the dims that all `groups` lie in, the one that has least else in it says it."""
    covered: dict[tuple[str, int], int] = {}
    parts: dict[tuple[str, int], int] = {}
    for group in groups:
        for m in group.members:
            if m.rows is None and m.name in plan.shapes:
                key = m.name, m.dim
                covered[key] = covered.get(key, 0) + m.indices.size
                parts[key] = parts.get(key, 0) + 1
    units = sum(g.units for g in groups)
    found = []
    for (name, dim), entries in covered.items():
        now, before = graph.tensors[name].shape[dim], plan.shapes[name][dim]
        if parts[name, dim] == len(groups):
            found.append((now - entries, -(-(before - now) * units // entries)))  # rather more than less
    return min(found, default=(0, 0))[1]
