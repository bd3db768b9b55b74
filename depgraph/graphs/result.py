"""What pruning edges gives: the plan, the data with fewer edges, and figures of both graphs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..base.checks import is_whole, shown
from ..base.errors import PlanError
from ..base.running import in_mode
from ..base.switches import same_random_state
from ..base.tables import printed, table
from ..plan.bits import Bits
from ..verify.verify import Verification
from .data import ONE, Kind, counted, edges_of, kinds_of, nodes_of, with_edges
from .scores import run_on

Tensor = torch.Tensor


@dataclass(eq=False, repr=False)
class EdgePlan:
    """Which edges stay. Plain data that replays on data with the same edges.

    Attributes:
        kept: kind of edges -> which of them stay, in the order of ``edge_index``.
        request: the arguments that led to it, for the reader.
    """

    kept: dict[Kind, Bits]
    request: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"EdgePlan({sum(b.shape[0] - b.gone for b in self.kept.values())} edges)"

    def mask(self, name: Any = "edge_index") -> Tensor:
        """Bool tensor [edges], True where an edge stays.

        Args:
            name: ``"edge_index"``, or of data with several kinds of nodes the kind of edges, as a tuple or its parts joined by
                blanks; also the name of an attribute of edges.

        Raises:
            PlanError: there is no such kind.
        """
        if len(self.kept) == 1 and ONE in self.kept and isinstance(name, str):
            return self.kept[ONE].mask()
        kind = tuple(name.split()) if isinstance(name, str) else name
        if kind not in self.kept:
            raise PlanError(f"the plan has no edges {name!r}: it has {', '.join(map(' '.join, self.kept))}")
        return self.kept[kind].mask()

    def apply(self, data: Any) -> Any:
        """A copy of `data` with the edges that stay, and what belongs to them.

        Raises:
            PlanError: the data have other edges than the plan is for.
        """
        kinds = kinds_of(data)
        found = {kind: int(edges_of(data, kind).shape[1]) for kind in kinds}
        if found != {kind: bits.shape[0] for kind, bits in self.kept.items()}:
            raise PlanError(
                f"the plan is for {counted({k: b.shape[0] for k, b in self.kept.items()})}, the data have {counted(found)}"
            )
        return with_edges(data, {kind: bits.mask() for kind, bits in self.kept.items()})

    def to_json(self) -> str:
        """The plan as JSON text."""
        rows = [[*kind, bits.shape[0], bits.to_text()] for kind, bits in self.kept.items()]
        return json.dumps({"edges": rows, "request": self.request})

    @classmethod
    def from_json(cls, text: str) -> EdgePlan:
        """The plan that `to_json` wrote.

        Raises:
            PlanError: the text is not such a plan.
        """
        try:
            data = json.loads(text)
            kept = {}
            for source, name, target, count, bits in data["edges"]:
                if (
                    not all(isinstance(part, str) for part in (source, name, target))
                    or not is_whole(count)
                    or count < 0
                ):
                    raise ValueError(f"invalid edges {shown((source, name, target, count))}")
                kept[source, name, target] = Bits.from_text((count,), bits)
            return cls(kept, dict(data["request"]))
        except (ValueError, TypeError, KeyError) as error:
            raise PlanError(f"this text is not a plan of edges: {error}") from error


@dataclass(repr=False)
class EdgeReport:
    """What the graph was and is; prints as a table.

    Attributes:
        edges: their number before and after.
        degrees: mean and largest number of edges at a node, both directions counted, before and after.
        components: parts that are connected, before and after.
        isolated: nodes without an edge to another one, before and after.
        kinds: of data with several kinds of edges, the number of each before and after.
        same_predictions: share of nodes whose largest output is the same on the graph with fewer edges; None where outputs
            are no classes of nodes.
        verification: what was compared.
        notes: sentences.
    """

    edges: tuple[int, int]
    degrees: tuple[tuple[float, int], tuple[float, int]]
    components: tuple[int, int]
    isolated: tuple[int, int]
    kinds: dict[str, tuple[int, int]]
    same_predictions: float | None
    verification: Verification
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain data."""
        means, largest = zip(*self.degrees, strict=True)
        pairs = {
            "edges": self.edges, "mean_degree": means, "largest_degree": largest, "components": self.components,
            "isolated": self.isolated,
        }  # fmt: skip
        return {
            **{name: {"before": a, "after": b} for name, (a, b) in pairs.items()},
            "kinds": {name: {"before": a, "after": b} for name, (a, b) in self.kinds.items()},
            "same_predictions": self.same_predictions,
            "verification": {"status": self.verification.status, "detail": self.verification.detail},
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        shown_as = table("edges", "", "before", "after")
        for name, found in self.to_dict().items():
            if isinstance(found, dict) and "before" in found:
                shown_as.add_row(
                    name.replace("_", " "),
                    *(f"{v:,.4g}" if isinstance(v, float) else f"{v:,}" for v in found.values()),
                )
        for name, (a, b) in self.kinds.items():
            shown_as.add_row(name, f"{a:,}", f"{b:,}")
        same = self.same_predictions
        lines = [] if same is None else [f"{same:.1%} of the nodes are predicted as before"]
        return printed(shown_as, *lines, *(f"note: {n}" for n in self.notes), self.verification.detail)


@dataclass(repr=False)
class EdgeResult:
    """What `prune_edges` returns.

    Attributes:
        model: the one given.
        data: a copy of the data with fewer edges; what belongs to edges followed, the rest is shared.
        plan: which edges stay.
        report: figures before and after.
    """

    model: nn.Module
    data: Any
    plan: EdgePlan
    report: EdgeReport

    def __repr__(self) -> str:
        return str(self.report)


def report_of(
    model: nn.Module, data: Any, fewer: Any, kinds: list[Kind], masks: Mapping[Kind, Tensor]
) -> EdgeReport:
    """Figures of both graphs, and the comparison of the smaller one with its plan."""
    shapes = [_shape(d, kinds) for d in (data, fewer)]
    counts = {k: (len(m), int(m.sum())) for k, m in masks.items()}
    for kind in kinds:
        if not torch.equal(
            edges_of(fewer, kind), edges_of(data, kind)[:, masks[kind].to(edges_of(data, kind).device)]
        ):
            raise PlanError(f"edges {' '.join(kind)} are not those that the plan keeps")
    return EdgeReport(
        edges=(sum(a for a, _ in counts.values()), sum(b for _, b in counts.values())),
        degrees=(shapes[0][0], shapes[1][0]),
        components=(shapes[0][1], shapes[1][1]),
        isolated=(shapes[0][2], shapes[1][2]),
        kinds={} if kinds == [ONE] else {" ".join(k): c for k, c in counts.items()},
        same_predictions=_same(model, data, fewer),
        verification=Verification("equal", detail="the edges, and what belongs to them, are those of the data that stay"),
    )  # fmt: skip


def _shape(data: Any, kinds: list[Kind]) -> tuple[tuple[float, int], int, int]:
    """Mean and largest degree, components and isolated nodes; loops do not count."""
    offsets: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for kind in kinds:
        for name, count in zip((kind[0], kind[2]), nodes_of(data, kind), strict=True):
            sizes[name] = max(count, sizes.get(name, 0))
    for name in sizes:
        offsets[name] = sum(sizes[n] for n in offsets)
    total = sum(sizes.values())
    ends = [
        np.stack([e[0] + offsets[k[0]], e[1] + offsets[k[2]]])
        for k in kinds
        for e in [edges_of(data, k).cpu().numpy()]
    ]
    edges = np.concatenate(ends, axis=1)
    edges = edges[:, edges[0] != edges[1]]
    degree = np.bincount(edges.ravel(), minlength=total)
    mean = float(degree.mean()) if total else 0.0
    return (mean, int(degree.max(initial=0))), _components(edges, total), int((degree == 0).sum())


def _components(edges: npt.NDArray[np.int64], total: int) -> int:
    """Parts that are connected, of `total` nodes."""
    import networkx as nx  # noqa: PLC0415  on demand: it takes long

    graph = nx.Graph()
    graph.add_nodes_from(range(total))
    graph.add_edges_from(edges.T.tolist())
    return int(nx.number_connected_components(graph))


def _same(model: nn.Module, data: Any, fewer: Any) -> float | None:
    with same_random_state(), in_mode(model, False), torch.no_grad():
        before, after = run_on(model, data), run_on(model, fewer)
    if (
        not isinstance(before, Tensor)
        or before.dim() != 2
        or before.shape[1] < 2
        or before.shape != after.shape
    ):
        return None
    return float((before.argmax(1) == after.argmax(1)).double().mean())
