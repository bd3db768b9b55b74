"""Fewer edges in the graphs that a model is run on: which go, by what the model makes of them, and what is left.

Data are objects with ``edge_index`` [2, edges], such as those of torch_geometric or your own; data with ``edge_types`` and a
store of each, ``data[type]``, have several kinds of nodes. A model is called by the names of its forward's parameters
(``forward(x, edge_index, edge_weight)`` gets ``data.x``, ...), or with the data where it takes one argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ..base.checks import a_module, flag, function, is_number, shown
from ..base.errors import InputError
from ..plan.bits import Bits
from .choice import Kept, Ramp, Threshold, chosen, shares_of
from .data import check_edges, kinds_of, sets_of, with_edges
from .result import EdgePlan, EdgeReport, EdgeResult, report_of
from .scores import CRITERIA, scores_of

Tensor = torch.Tensor


def prune_edges(
    model: nn.Module, data: Any, *, keep: float | Threshold | Ramp = 0.5, by: str | Callable[[Any], Any] = "agreement",
    undirected: bool = True, loss: Callable[[Any, Any], Tensor] | None = None,
) -> EdgeResult:  # fmt: skip
    """Remove edges from the graph that a model runs on.

    What the model computes on the smaller graph is the definition of the result: with a mean, a softmax or degrees in the model,
    no weight of an edge stands for its absence. Time goes down with the number of edges.

    Args:
        model: any module; neither it nor the data are touched.
        data: an object with ``edge_index`` [2, edges] of node numbers, or with several kinds of nodes and edges (see above).
            ``edge_attr``, ``edge_weight``, types and times, and whatever else there is one of for each edge, follow.
        keep: the share of edges that stay (a float up to 1), their number (an int), `Threshold` or `Ramp`. Loops always stay,
            and do not count.
        by: the lowest scores go. "agreement": how far the class probabilities p and q that the model gives to both ends
            overlap, sum sqrt(p·q).
            "gradient": abs(weight · gradient) of the weight of the edge, which forward must take as ``edge_weight``.
            "degree": 1 / sqrt of both ends' degrees, so that edges between hubs go first. "random"; or a function of the data
            that returns [edges] scores (a dict of them, by kind, where there are several).
        undirected: edges i→j and j→i go together, by the mean of their scores (so that one more edge may stay than asked for);
            across kinds, those of a kind and of the kind that has the same edges reversed.
        loss: ``loss(output, data)`` -> scalar, for "gradient". By default the cross-entropy with ``data.y`` (on ``train_mask``
            where there is one), or without labels half the mean square of the outputs.

    Returns:
        the model, the data with fewer edges, a plan, and a report.

    Raises:
        InputError: more edges are to be kept than there are, edges name missing nodes, or an argument is something else.
    """
    a_module("model", model)
    flag("undirected", undirected)
    if isinstance(by, str) and by not in CRITERIA:
        raise InputError(
            f"by must be a function of the data or one of {', '.join(CRITERIA)}, not {shown(by)}"
        )
    if not isinstance(by, str):
        function("by", by, "data")
    if loss is not None:
        function("loss", loss, "output", "data")
    kinds = kinds_of(data)
    for kind in kinds:
        check_edges(data, kind)
    together = sets_of(data, kinds, undirected)
    total = sum(int((together[k] >= 0).sum()) for k in kinds)
    kept: Kept = {k: np.ones(len(together[k]), dtype=bool) for k in kinds}
    for share in shares_of(keep, total):
        now = with_edges(data, {k: torch.from_numpy(v) for k, v in kept.items()})
        scores = scores_of(model, now, by, loss, kinds)
        kept = chosen(kept, together, scores, share, total)
    masks = {k: torch.from_numpy(v) for k, v in kept.items()}
    fewer = with_edges(data, masks)
    request = {
        "keep": keep if is_number(keep) else str(keep),
        "by": by if isinstance(by, str) else "a function",
        "undirected": undirected,
    }
    plan = EdgePlan({k: Bits.of(m) for k, m in masks.items()}, request)
    return EdgeResult(model, fewer, plan, report_of(model, data, fewer, kinds, masks))


__all__ = ["CRITERIA", "EdgePlan", "EdgeReport", "EdgeResult", "Ramp", "Threshold", "prune_edges"]
