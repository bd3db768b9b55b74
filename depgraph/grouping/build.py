"""Masks of groups -> Plan: the cuts of every tensor, the attributes to repair, the numbers in code to rewrite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..axes import polynomials
from ..base.checks import flag, of_kind
from ..config.origin import field_repairs
from ..plan.plan import Masks, Plan, Repair, Rewrite
from ..surgery.copied import what_copies_need
from .given import checked_masks, checked_orders
from .graph import DependencyGraph
from .unread import unread_values


def build_plan(
    graph: DependencyGraph, masks: Masks, *, order: Mapping[str, Any] | None = None,
    assume_unused_config_reads: bool = False,
) -> Plan:  # fmt: skip
    """The plan that keeps the units in `masks`.

    Args:
        graph: the dependency graph.
        masks: what `choose` returned, or what you made yourself: group name -> [units] bool (an array, a tensor or a list),
            True where a unit stays. Groups without one lose nothing.
        order: group name -> [units] the order in which its units then stand, as the indices that they have now; groups
            without one keep theirs. Such a plan must be verified: an op may look at the order of units.
        assume_unused_config_reads: also repair numbers of the config that forward reads without a visible use; such a plan must be verified.

    Raises:
        InputError: unknown names, something else than masks or orders, masks that leave nothing of a dim or break a
            constraint, or an order of units that must stand as they do.
    """
    of_kind("graph", graph, DependencyGraph, "what depgraph.analyze returned")
    flag("assume_unused_config_reads", assume_unused_config_reads)
    kept, orders = checked_masks(graph, masks), checked_orders(graph, {} if order is None else order)
    plan = Plan(
        shapes={
            n: tuple(t.shape) for n, t in graph.tensors.items() if n not in graph.trace.attribute_tensors
        },
        aliases=dict(graph.trace.aliases),
    )
    for name in graph.trace.tensors:
        cut = graph.cut(name, kept, orders)
        if cut is not None:
            plan.shapes[name], plan.cuts[name] = cut.shape, cut
    counts, values = graph.sizes.counts(kept), {}
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
    for place, size in graph.sizes.held.items():
        old = graph.sizes.value(size)
        if polynomials.evaluate(graph.sizes.polynomial(size) or {}, counts) != old:
            plan.rewrites.append(Rewrite(*place, old, old))
    if plan.cuts:
        plan.repairs.extend(
            field_repairs(
                graph.model,
                graph.origins,
                values,
                plan,
                set() if assume_unused_config_reads else graph.trace.reads,
            )
        )
        plan.repairs.extend(
            Repair(key[1], key[2], tuple(key[3:]), value, graph.sizes.value(key))
            for key, value in unread_values(graph, plan, counts)[0].items()
        )
    plan.repairs.extend(what_copies_need(graph.model, plan.repairs))
    return plan


def flipped(graph: DependencyGraph, masks: Masks) -> list[tuple[list[str], str]]:
    """The comparisons of sizes in forward that `masks` would change: the groups in each, and how it comes out."""
    return [
        ([graph.by_axis[a].name for a in sorted(atoms) if a in graph.by_axis], text)
        for atoms, text in graph.sizes.flipped({graph.named[name].axis: mask for name, mask in masks.items()})
    ]
