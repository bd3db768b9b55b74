"""Masks of groups -> Plan: the cuts of every tensor, the attributes to repair, the numbers in code to rewrite."""

from __future__ import annotations

import numpy as np

from ..axes import axes, polynomials
from ..axes.axes import Reason
from ..config.origin import field_repairs
from ..plan.plan import Cut, Masks, Plan, Repair, Rewrite
from .graph import DependencyGraph
from .sizes import Literal, is_constant


def build_plan(graph: DependencyGraph, masks: Masks, *, bold: bool = False) -> Plan:
    """The plan that keeps the units in `masks` (axis id -> bool array; absent axes lose nothing).

    Args:
        graph: the dependency graph.
        masks: what `choose` returned, or what you made yourself: group key -> [units] bool, True where a unit stays.
        bold: numbers of the config which forward reads without showing what for follow, too: such a plan must be verified.
    """
    plan = Plan(
        shapes={n: tuple(t.shape) for n, t in graph.tensors.items() if n not in graph.trace.held},
        aliases=dict(graph.trace.aliases),
    )
    for name in graph.trace.tensors:
        keep, blocks = graph.keeps(name, masks)
        if blocks is not None or any(k is not None for k in keep):
            numbered = graph.state.renumbered.get(name)
            numbers = None if numbered is None else np.flatnonzero(axes.kept(numbered, masks))
            plan.shapes[name] = tuple(graph.tensors[name].shape)
            plan.cuts[name] = Cut(plan.shapes[name], tuple(keep), blocks, numbers)
    counts = {id(a): int(masks[id(a)].sum()) if id(a) in masks else a.size for a in graph.sizes.free.values()}
    values = {}
    for key, polynomial in graph.sizes.attributes.items():
        value = polynomials.evaluate(polynomial, counts)
        values[key] = value
        if value != graph.sizes.value(key):
            path, name, *keys = key[1:]
            old = int(graph.sizes.value(key))
            if key[0] == "literal":
                plan.rewrites.append(Rewrite(path, name, keys[0], old, int(value)))
            else:
                plan.repairs.append(Repair(path, name, tuple(keys), int(value), old))
    if plan.cuts:
        plan.repairs.extend(
            field_repairs(graph.model, graph.origins, values, plan, set() if bold else graph.trace.reads)
        )
    return plan


def open_literals(graph: DependencyGraph) -> list[tuple[Literal, set[int]]]:
    """The numbers of unknown origin that repeat a size which may change, with the ids of the axes that change it."""
    free = graph.free
    found = [(literal, graph.sizes.reduce(literal.target, free)) for literal in graph.sizes.literals]
    return [(literal, {a for term in p for a in term}) for literal, p in found if not is_constant(p)]


def freeze_open_literals(graph: DependencyGraph) -> None:
    """Freeze the axes whose size a number of unknown origin repeats."""
    for literal, _ in open_literals(graph):
        free, use = graph.free, literal.use
        target = graph.sizes.reduce(literal.target, free)
        text = f"is repeated by the number {use.value}, which stands in no method of a module that a plan can change"
        graph.freeze([free[a] for t in target for a in t], Reason(text, use.function, use.module, use.source))
