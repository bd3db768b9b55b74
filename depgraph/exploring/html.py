"""The dependency graph as one HTML file to explore: no server, no network, nothing but the file."""

from __future__ import annotations

import html as escapes
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ..axes import axes
from ..grouping.graph import DependencyGraph, Group
from ..plan.plan import Plan
from ..prune import PruneResult
from ..report import reachable

ROLES = ("produces", "consumes", "scales")


def page_data(source: DependencyGraph | PruneResult) -> dict[str, Any]:
    """What the page shows, as plain data.

    Returns:
        ``title``; ``facts``: (label, before, after or None); ``modules``: (path, class, numbers of its tensors);
        ``tensors``: (name, shape, shape afterwards, and for each dim the numbers of its groups and the (reason, indices)
        pairs that lock it); ``groups``: (name, units, units kept, (tensor, dim, role) members); ``reasons``; ``notes``.
    """
    graph = source if isinstance(source, DependencyGraph) else source.report.graph
    plan = None if isinstance(source, DependencyGraph) else source.plan
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
        "facts": _facts(source),
        "modules": _modules(graph, number),
        "tensors": tensors,
        "groups": [
            [
                g.name,
                g.units,
                _kept(g, plan),
                [[number[m.name], m.dim, ROLES.index(m.role)] for m in g.members],
            ]
            for g in graph.groups
        ],
        "reasons": list(reasons),
        "notes": [] if isinstance(source, DependencyGraph) else list(source.report.notes),
    }


def write_html(source: DependencyGraph | PruneResult, path: str | os.PathLike[str]) -> Path:
    """Write a page on which the groups and locks of a model can be searched and clicked through.

    Args:
        source: what `analyze` or `prune` returned; with the latter, shapes before and after are shown.
        path: the file to write; it holds all it needs and asks for nothing from outside.

    Returns:
        the path.
    """
    data = page_data(source)
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no tag can end the script early
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    page = template.replace("{{title}}", escapes.escape(data["title"])).replace("{{data}}", text)
    target = Path(path)
    target.write_text(page, encoding="utf-8")
    return target


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


def _kept(group: Group, plan: Plan | None) -> int:
    """How many units of a group the plan keeps: those of which some member keeps an entry."""
    if plan is None:
        return group.units
    for m in group.members:
        cut = plan.cuts.get(m.name)
        if m.rows is None and m.indices.size:
            keep = None if cut is None else cut.keep[m.dim]
            return group.units if keep is None else int(np.isin(m.indices, keep).any(1).sum())
    return group.units


def _facts(source: DependencyGraph | PruneResult) -> list[tuple[str, float, float | None]]:
    graph = source if isinstance(source, DependencyGraph) else source.report.graph
    found: list[tuple[str, float, float | None]] = []
    if isinstance(source, PruneResult):
        report = source.report
        found += [("parameters", *report.parameters), ("MACs", *report.macs), ("bytes", *report.byte_counts)]
    else:
        found.append(("parameters", sum(p.numel() for p in graph.model.parameters()), None))
    reach = reachable(graph)
    found.append(("groups", len(graph.groups), None))
    found.append(("parameters that can shrink [%]", round(100 * reach["params"], 1), None))
    found.append(("MACs that can shrink [%]", round(100 * reach["macs"], 1), None))
    return found
