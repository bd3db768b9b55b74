"""Masks of groups -> Plan: the cuts of every tensor, the attributes to repair, the literals to rewrite."""

from __future__ import annotations

import numpy as np

from ..axes import axes, polynomials
from ..axes.axes import Axis, Reason
from ..config.origin import field_repairs
from ..plan.plan import Cut, Masks, Plan, Repair, Rewrite
from ..surgery.rewrite import can_rewrite
from .graph import DependencyGraph
from .sizes import is_constant


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
            plan.repairs.append(Repair(path, name, tuple(keys), int(value), int(graph.sizes.value(key))))
    if plan.cuts:
        plan.repairs.extend(
            field_repairs(graph.model, graph.origins, values, plan, set() if bold else graph.trace.reads)
        )
    for literal in graph.sizes.literals:
        value = polynomials.evaluate(literal.target, counts)
        use = literal.use
        if value != use.value:
            plan.rewrites.append(
                Rewrite(use.module, use.function, use.occurrence, use.argument, use.value, value)
            )
    plan.rewrites = list(dict.fromkeys(plan.rewrites))
    return plan


def freeze_unwritable_literals(graph: DependencyGraph) -> None:
    """Freeze the axes that a literal in forward repeats where that forward can't be recorded and rewritten."""
    checked: dict[Rewrite, bool] = {}
    free = graph.free
    for literal in graph.sizes.literals:
        target = graph.sizes.reduce(literal.target, free)
        if is_constant(target):
            continue
        use = literal.use
        edit = Rewrite(use.module, use.function, use.occurrence, use.argument, use.value, use.value)
        if edit not in checked:
            checked[edit] = can_rewrite(graph.model.get_submodule(use.module), edit)
        if not checked[edit]:
            found: list[Axis] = [free[a] for t in target for a in t]
            text = f"is written as the literal {use.value} in forward, which torch.fx can't record"
            graph.freeze(found, Reason(text, use.function, use.module, use.source))
            free = graph.free
