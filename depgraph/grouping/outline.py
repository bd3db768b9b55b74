"""A graph, and what a plan takes from it, as plain data: what outlives the model, and what a page shows."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..axes import axes
from ..plan.plan import Plan
from .graph import DependencyGraph
from .members import Group

ROLES = ("produces", "consumes", "scales")


def outline(graph: DependencyGraph, plan: Plan | None = None) -> dict[str, Any]:
    """The modules, tensors and groups of a graph.

    Args:
        graph: the dependency graph.
        plan: what is removed, where shapes and units afterwards are wanted.

    Returns:
        ``title``: the class of the model; ``modules``: (path, class, numbers of its tensors); ``tensors``: (name, shape, shape
        afterwards or None, and for each dim the numbers of its groups and the (reason, indices) pairs that lock it);
        ``groups``: (name, units, units kept, (tensor, dim, role) members); ``reasons``: the texts that locks number.
    """
    number = {name: i for i, name in enumerate(graph.tensors)}
    reasons: dict[str, int] = {}
    groups_of: dict[tuple[str, int], list[int]] = {}
    for i, group in enumerate(graph.groups):
        for m in group.members:
            groups_of.setdefault((m.name, m.dim), []).append(i)
    unreached = set(graph.trace.unreached)
    tensors = []
    for name, tensor in graph.tensors.items():
        dims = []
        for d in range(tensor.dim()):
            locks: list[tuple[int, int]] = []
            for text, count in _locks(graph, name, d, unreached):
                locks.append((reasons.setdefault(text, len(reasons)), count))
            dims.append([list(dict.fromkeys(groups_of.get((name, d), []))), locks])
        after = None if plan is None else list(plan.new_shape(name)) if name in plan.shapes else None
        tensors.append([name, list(tensor.shape), after, dims])
    return {
        "title": type(graph.model).__name__,
        "modules": _modules(graph, number),
        "tensors": tensors,
        "groups": [
            [
                g.name,
                g.units,
                kept_units(g, plan),
                [[number[m.name], m.dim, ROLES.index(m.role)] for m in g.members],
            ]
            for g in graph.groups
        ],
        "reasons": list(reasons),
    }


def _locks(graph: DependencyGraph, name: str, dim: int, unreached: set[str]) -> list[tuple[str, int]]:
    """(reason, indices) of what locks a dim."""
    if name in unreached:
        return [("belongs to a tensor that no traced run used", graph.tensors[name].shape[dim])]
    dims = graph.dims(name)
    axis = dims[dim] if dim < len(dims) else None
    if axis is None:
        return []
    atoms = dict.fromkeys(axes.atoms(axis))
    return [(str(why), a.size) for a in atoms if (why := graph.reason(a)) is not None]


def _modules(graph: DependencyGraph, number: dict[str, int]) -> list[list[Any]]:
    """(path, class, its own tensors) of each module that holds tensors, in the order of the model."""
    owned: dict[str, list[int]] = {}
    for name, i in number.items():
        owned.setdefault(name.rpartition(".")[0], []).append(i)
    kinds = {path: type(m).__name__ for path, m in graph.model.named_modules(remove_duplicate=False)}
    order = [path for path in kinds if path in owned] + [path for path in owned if path not in kinds]
    return [[path, kinds.get(path, ""), owned[path]] for path in order]


def kept_units(group: Group, plan: Plan | None) -> int:
    """How many units of a group the plan keeps: those of which some member keeps an entry."""
    if plan is None:
        return group.units
    for m in group.members:
        cut = plan.cuts.get(m.name)
        if m.rows is None and m.indices.size:
            keep = None if cut is None else cut.keep[m.dim]
            return group.units if keep is None else int(np.isin(m.indices, keep).any(1).sum())
    return group.units
