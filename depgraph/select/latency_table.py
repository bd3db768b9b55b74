"""The model of latency: a table of layers, measured on the model and on uniformly pruned copies of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from ..axes.axes import Axis
from ..costs.cost import Cost
from ..costs.latency import RATIOS, LatencyTable, Timer, measure_rows, shared_out
from ..grouping.build import build_plan
from ..grouping.graph import DependencyGraph
from ..surgery.apply import apply

if TYPE_CHECKING:
    from .request import Request


def latency_cost(
    graph: DependencyGraph, example_inputs: Any, request: Request, timer: Timer | None = None
) -> Callable[[DependencyGraph], Cost]:
    """Time the model of `graph` and copies of it that keep to `request`; the points outlive axes that are frozen later.

    With a `timer` of the user's, its seconds are shared out among the modules by their work.
    """
    points: list[tuple[dict[Axis, int], dict[str, float]]] = []
    ones = {g.name: np.ones(g.units) for g in graph.groups}
    even = replace(request, pruning_ratio=None, scope=None, max_ratio=None, per_cost=False, normalise="mean",
                   threshold=None, already_pruned=None, budgets={})  # fmt: skip

    def rows_of(small: nn.Module, counts: dict[Axis, int]) -> dict[str, float]:
        if timer is None:
            return measure_rows(small, example_inputs)
        return shared_out(graph, LatencyTable(graph).macs.vector(counts), timer(small, example_inputs))

    for ratio in RATIOS:
        small, counts = graph.model, {a: a.size for a in graph.by_axis}
        if ratio:
            masks = replace(even, pruning_ratio=ratio).masks(graph, ones)
            counts = {g.axis: int(masks[g.name].sum()) if g.name in masks else g.units for g in graph.groups}
            try:
                small = apply(graph.model, build_plan(graph, masks))
                rows = rows_of(small, counts)
            except Exception:  # noqa: BLE001  a comparison of sizes in forward, say: the other points will do
                continue
        else:
            rows = rows_of(small, counts)
        points.append((counts, rows))

    def cost(graph: DependencyGraph) -> Cost:
        table = LatencyTable(graph)
        for counts, rows in points:
            table.add(table.macs.vector(counts), rows)
        return table

    return cost
