"""Fewer edges in the graphs that a model is run on: which go, by what the model makes of them, and what is left.

Data are objects with ``edge_index`` [2, edges], such as those of torch_geometric or your own; data with ``edge_types`` and a
store of each, ``data[type]``, have several kinds of nodes. A model is called by the names of its forward's parameters
(``forward(x, edge_index, edge_weight)`` gets ``data.x``, ...), or with the data where it takes one argument.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from .base.checks import a_module, flag, function, is_number, is_whole, number, shown, whole_number
from .base.errors import InputError, PlanError
from .base.running import in_mode
from .base.switches import same_random_state
from .base.tables import printed, table
from .plan.bits import Bits
from .training.ramps import ramp_of
from .verify.verify import Verification

Tensor = torch.Tensor
Kind = tuple[str, str, str]  # a kind of edges: from which nodes, what they say, to which
Kept = dict[Kind, npt.NDArray[np.bool_]]
ONE: Kind = ("", "edge_index", "")  # of data with one kind
CRITERIA = ("agreement", "gradient", "degree", "random")
SEED = 0


@dataclass(frozen=True)
class Threshold:
    """``keep=Threshold(0.1)``: the edges whose score is at least this stay."""

    score: float


@dataclass(frozen=True)
class Ramp:
    """``keep=Ramp(0.5, steps=5)``: in steps, scored anew after each, on a ramp of gradual pruning, down to this share."""

    keep: float
    steps: int = 5
    ramp: Any = "cubic"


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
        kinds = _kinds(data)
        found = {kind: int(_edges(data, kind).shape[1]) for kind in kinds}
        if found != {kind: bits.shape[0] for kind, bits in self.kept.items()}:
            raise PlanError(
                f"the plan is for {_counts({k: b.shape[0] for k, b in self.kept.items()})}, the data have {_counts(found)}"
            )
        return _with_edges(data, {kind: bits.mask() for kind, bits in self.kept.items()})

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
    kinds = _kinds(data)
    for kind in kinds:
        _check_edges(data, kind)
    together = _together(data, kinds, undirected)
    total = sum(int((together[k] >= 0).sum()) for k in kinds)
    kept: Kept = {k: np.ones(len(together[k]), dtype=bool) for k in kinds}
    for share in _shares(keep, total):
        now = _with_edges(data, {k: torch.from_numpy(v) for k, v in kept.items()})
        scores = _scores(model, now, by, loss, kinds)
        kept = _chosen(kept, together, scores, share, total)
    masks = {k: torch.from_numpy(v) for k, v in kept.items()}
    fewer = _with_edges(data, masks)
    request = {
        "keep": keep if is_number(keep) else str(keep),
        "by": by if isinstance(by, str) else "a function",
        "undirected": undirected,
    }
    plan = EdgePlan({k: Bits.of(m) for k, m in masks.items()}, request)
    return EdgeResult(model, fewer, plan, _report(model, data, fewer, kinds, masks))


# ------------------------------------------------------------------------------------------------------ data


def _kinds(data: Any) -> list[Kind]:
    kinds = getattr(data, "edge_types", None)
    if isinstance(kinds, (list, tuple)) and kinds and isinstance(kinds[0], tuple):
        return [tuple(k) for k in kinds]
    if not isinstance(getattr(data, "edge_index", None), Tensor):
        raise InputError(
            f"data must have edge_index, a tensor [2, edges] of node numbers; {type(data).__name__} has none"
        )
    return [ONE]


def _store(data: Any, kind: Kind) -> Any:
    return data if kind == ONE else data[kind]


def _edges(data: Any, kind: Kind) -> Tensor:
    found = getattr(_store(data, kind), "edge_index", None)
    if not isinstance(found, Tensor):
        raise InputError(f"edges {' '.join(kind)} have no edge_index")
    return found


def _nodes(data: Any, kind: Kind) -> tuple[int, int]:
    """How many nodes there are at each end of a kind of edges."""

    def count(store: Any, row: int) -> int:
        features: Any = getattr(store, "x", None)
        given: Any = getattr(store, "num_nodes", None)
        if isinstance(features, Tensor):
            return int(features.shape[0])
        if is_whole(given):
            return int(given)
        edges = _edges(data, kind)
        return int(edges[row].max()) + 1 if edges.numel() else 0

    if kind == ONE:
        features = getattr(data, "x", None)
        if not isinstance(features, Tensor) and not is_whole(getattr(data, "num_nodes", None)):
            both = max(count(data, 0), count(data, 1))
            return both, both
        return count(data, 0), count(data, 1)
    return count(data[kind[0]], 0), count(data[kind[2]], 1)


def _check_edges(data: Any, kind: Kind) -> None:
    edges = _edges(data, kind)
    name = kind[1] if kind == ONE else " ".join(kind)
    if edges.dim() != 2 or len(edges) != 2 or edges.is_floating_point() or edges.dtype == torch.bool:
        raise InputError(
            f"{name} must be whole numbers of shape [2, edges], not {edges.dtype} {list(edges.shape)}"
        )
    for row, count in enumerate(_nodes(data, kind)):
        wrong = edges[row][(edges[row] < 0) | (edges[row] >= count)]
        if wrong.numel():
            raise InputError(
                f"{name} names node {int(wrong[0])}, and there are nodes 0 to {count - 1}: {wrong.numel()} such edges\n"
                "  fix: leave these edges out, or give features x (or num_nodes) of all nodes"
            )


def _of_edges(store: Any, count: int, nodes: int) -> list[str]:
    """The attributes of which there is one for each edge."""
    names = list(store.keys()) if callable(getattr(store, "keys", None)) else list(vars(store))
    found = []
    for name in names:
        value = getattr(store, name, None)
        if (
            name == "edge_index"
            or not isinstance(value, Tensor)
            or not value.dim()
            or value.shape[0] != count
        ):
            continue
        if "label" not in name and (name.startswith("edge_") or count != nodes):
            found.append(name)
    return found


def _with_edges(data: Any, masks: Mapping[Kind, Tensor]) -> Any:
    made = copy.copy(data)
    for kind, mask in masks.items():
        store, nodes = _store(made, kind), max(_nodes(data, kind))
        edges = _edges(data, kind)
        there = mask.to(edges.device)
        changed = {"edge_index": edges[:, there]}
        for name in _of_edges(store, edges.shape[1], nodes):
            value = getattr(store, name)
            changed[name] = value[mask.to(value.device)]
        for name, value in changed.items():
            setattr(store, name, value)
    return made


def _counts(edges: Mapping[Kind, int]) -> str:
    return ", ".join(f"{n} edges {'' if k == ONE else ' '.join(k)}".strip() for k, n in edges.items())


# ------------------------------------------------------------------------------------------ what goes together


def _together(data: Any, kinds: list[Kind], undirected: bool) -> dict[Kind, npt.NDArray[np.int64]]:
    """For each edge the number of the set that goes as a whole; -1: a loop, which stays."""
    keys: dict[Kind, npt.NDArray[np.int64]] = {}
    done = 0
    for kind in kinds:
        source, target = _edges(data, kind).cpu().numpy().astype(np.int64)
        partner = next(
            (
                k
                for k in keys
                if undirected and kind[0] == k[2] and kind[2] == k[0] and _reversed(data, kind, k)
            ),
            None,
        )
        same = kind[0] == kind[2]
        if partner is not None:
            keys[kind] = keys[partner][
                _order(*_edges(data, kind).cpu().numpy()[::-1], *_edges(data, partner).cpu().numpy())
            ]
            continue
        loops = (source == target) if same else np.zeros(len(source), dtype=bool)
        if undirected and same:
            low, high = np.minimum(source, target), np.maximum(source, target)
        else:
            low, high = source, target
        turn = _occurrence(
            source, target
        )  # parallel edges are told apart: the first i→j goes with the first j→i
        ends = [low, high, turn]
        most = [int(e.max(initial=0)) + 1 for e in ends]
        _, numbers = np.unique(np.ravel_multi_index(ends, most), return_inverse=True)
        keys[kind] = np.where(loops, -1, numbers.reshape(-1) + done)
        done += int(numbers.max()) + 1 if len(numbers) else 0
    return keys


def _occurrence(source: Any, target: Any) -> npt.NDArray[np.int64]:
    """How many edges with the same ends come before each."""
    order = np.lexsort((np.arange(len(source)), target, source))
    new = np.r_[True, (np.diff(source[order]) != 0) | (np.diff(target[order]) != 0)][: len(order)]
    starts = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    found = np.empty(len(order), dtype=np.int64)
    found[order] = np.arange(len(order)) - starts
    return found


def _reversed(data: Any, kind: Kind, other: Kind) -> bool:
    """Whether two kinds have the same edges, reversed."""
    a, b = _edges(data, kind).cpu().numpy(), _edges(data, other).cpu().numpy()
    return a.shape == b.shape and np.array_equal(a[::-1][:, np.lexsort(a)], b[:, np.lexsort(b[::-1])])


def _order(source: Any, target: Any, other_source: Any, other_target: Any) -> npt.NDArray[np.int64]:
    """Where each edge stands among the others, which are the same ones."""
    found = np.empty(len(source), dtype=np.int64)
    found[np.lexsort((target, source))] = np.lexsort((other_target, other_source))
    return found


# ---------------------------------------------------------------------------------------------------- scores


def _arguments(model: nn.Module, data: Any) -> dict[str, Any] | None:
    """The arguments of forward that the data have by name; None where it takes the data themselves."""
    parameters = [
        p
        for p in signature(model.forward).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    names = [p.name for p in parameters]
    if "edge_index" not in names and "edge_index_dict" not in names:
        return None
    found = {}
    for p in parameters:
        value = getattr(data, p.name, None)
        if value is not None:
            found[p.name] = value
        elif p.default is Parameter.empty:
            raise InputError(f"forward needs {p.name!r}, which the data do not have")
    return found


def _run(model: nn.Module, data: Any, **given: Any) -> Any:
    arguments = _arguments(model, data)
    try:
        return model(data) if arguments is None else model(**{**arguments, **given})
    except Exception as error:
        raise InputError(
            f"the model could not be run on the data: {type(error).__name__}: {error}"
        ) from error


def _scores(
    model: nn.Module, data: Any, by: Any, loss: Any, kinds: list[Kind]
) -> dict[Kind, npt.NDArray[np.float64]]:
    """One score for each edge."""
    if not isinstance(by, str):
        return _own(by(data), data, kinds)
    if by == "random":
        dice = np.random.default_rng(SEED)
        return {k: dice.random(_edges(data, k).shape[1]) for k in kinds}
    if by == "degree":
        return {k: _by_degree(data, k) for k in kinds}
    with same_random_state(), in_mode(model, False):
        if by == "gradient":
            return {ONE: _by_gradient(model, data, loss, kinds)}
        with torch.no_grad():
            output = _run(model, data)
    return {k: _agreement(output, data, k) for k in kinds}


def _own(given: Any, data: Any, kinds: list[Kind]) -> dict[Kind, npt.NDArray[np.float64]]:
    found = {}
    for kind in kinds:
        value = given if kind == ONE else given.get(kind) if isinstance(given, Mapping) else None
        count = _edges(data, kind).shape[1]
        scores = (
            np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=float)
            if value is not None
            else np.empty(0)
        )
        if scores.shape != (count,) or np.isnan(scores).any():
            raise InputError(
                f"by must return {count} numbers, one for each edge{'' if kind == ONE else ' ' + ' '.join(kind)}"
            )
        found[kind] = scores
    return found


def _by_degree(data: Any, kind: Kind) -> npt.NDArray[np.float64]:
    source, target = _edges(data, kind).cpu().numpy()
    first, second = _nodes(data, kind)
    out, into = np.bincount(source, minlength=first), np.bincount(target, minlength=second)
    if kind[0] == kind[2]:
        out = into = out + into
    return np.asarray(1 / np.sqrt(out[source] * into[target]))


def _agreement(output: Any, data: Any, kind: Kind) -> npt.NDArray[np.float64]:
    ends = []
    for name, count in zip((kind[0], kind[2]), _nodes(data, kind), strict=True):
        found = output if kind == ONE else output.get(name) if isinstance(output, Mapping) else None
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != count:
            raise InputError(
                'by="agreement" needs an output [nodes, classes] for both ends of each edge'
                + (f", and {name!r} has none" if name else "")
                + '\n  fix: choose by="degree" or by="random", or a function of the data'
            )
        ends.append(found.double().softmax(-1))
    source, target = _edges(data, kind)
    return np.asarray((ends[0][source] * ends[1][target]).sqrt().sum(-1).cpu())


def _by_gradient(model: nn.Module, data: Any, loss: Any, kinds: list[Kind]) -> npt.NDArray[np.float64]:
    arguments = _arguments(model, data)
    takes = signature(model.forward).parameters
    if kinds != [ONE] or arguments is None or "edge_weight" not in takes:
        raise InputError(
            'by="gradient" needs a forward(x, edge_index, edge_weight, ...): gradients are taken of the weights of edges\n'
            '  fix: choose by="agreement", or a function of the data'
        )
    given = arguments.get("edge_weight")
    real = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    edges = data.edge_index
    weight = torch.ones(edges.shape[1], dtype=real, device=edges.device) if given is None else given
    weight = weight.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = _loss(_run(model, data, edge_weight=weight), data, loss)
        (gradient,) = torch.autograd.grad(value, weight, allow_unused=True)
    if gradient is None:
        raise InputError('the loss does not depend on edge_weight: choose by="agreement"')
    score = (gradient * weight.detach()).abs()
    return np.asarray(score.reshape(len(score), -1).sum(1).double().cpu())


def _loss(output: Any, data: Any, loss: Any) -> Tensor:
    if loss is not None:
        return torch.as_tensor(loss(output, data))
    if not isinstance(output, Tensor):
        raise InputError("the model returns more than one tensor: give loss(output, data)")
    labels, chosen = getattr(data, "y", None), getattr(data, "train_mask", None)
    if isinstance(labels, Tensor) and labels.shape == output.shape[:1] and not labels.is_floating_point():
        some = slice(None) if chosen is None else chosen
        return F.cross_entropy(output[some], labels[some])
    return output.square().mean() / 2


# ------------------------------------------------------------------------------------------------------ choice


def _shares(keep: Any, total: int) -> list[Any]:
    """How many edges stay after each step, or the threshold of one."""
    if isinstance(keep, Threshold):
        number("keep=Threshold(...)", keep.score)
        return [keep]
    if isinstance(keep, Ramp):
        whole_number("steps", keep.steps, 1)
        last, removed = _count(keep.keep, total), ramp_of(keep.ramp)
        gone = 1 - last / max(total, 1)
        return [
            max(last, round(total * (1 - removed((i + 1) / keep.steps, gone)))) for i in range(keep.steps - 1)
        ] + [last]
    return [_count(keep, total)]


def _count(keep: Any, total: int) -> int:
    if is_whole(keep):
        if not 0 <= keep <= total:
            raise InputError(
                f"keep={keep}, and there are {total} edges (without loops): give at most that, or a share such as 0.5"
            )
        return int(keep)
    if not is_number(keep) or not 0 <= keep <= 1:
        raise InputError(
            f"keep must be a share from 0 to 1, a number of edges, Threshold(...) or Ramp(...), not {shown(keep)}: 0.5 keeps half"
        )
    return round(keep * total)


def _chosen(kept: Kept, together: Any, scores: Any, share: Any, total: int) -> Kept:
    """Which edges stay: whole sets go, those with the lowest mean score first, of equal ones those that come first."""
    here = {k: np.flatnonzero(v) for k, v in kept.items()}
    numbers = np.concatenate([together[k][here[k]] for k in kept])
    flat = np.concatenate([scores[k] for k in kept])
    size = 1 + max(
        int(together[k].max(initial=-1)) for k in kept
    )  # sets that are gone already keep their numbers
    real = numbers >= 0
    sizes = np.bincount(numbers[real], minlength=size)
    sums = np.bincount(numbers[real], weights=flat[real], minlength=size)
    means = np.where(sizes > 0, sums / np.maximum(sizes, 1), np.inf)
    first = np.full(size, len(numbers))
    np.minimum.at(first, numbers[real], np.flatnonzero(real))
    if isinstance(share, Threshold):
        gone = means < share.score
    else:
        order = np.lexsort((first, means))
        excess = int(sizes.sum()) - share
        gone = np.zeros(size, dtype=bool)
        gone[order] = np.cumsum(sizes[order]) <= excess
    made = {}
    for kind, before in kept.items():
        made[kind] = before & ((together[kind] < 0) | ~gone[together[kind]])
    return made


# ------------------------------------------------------------------------------------------------------ report


def _report(
    model: nn.Module, data: Any, fewer: Any, kinds: list[Kind], masks: Mapping[Kind, Tensor]
) -> EdgeReport:
    shapes = [_shape(d, kinds) for d in (data, fewer)]
    counts = {k: (len(m), int(m.sum())) for k, m in masks.items()}
    for kind in kinds:
        if not torch.equal(
            _edges(fewer, kind), _edges(data, kind)[:, masks[kind].to(_edges(data, kind).device)]
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
        for name, count in zip((kind[0], kind[2]), _nodes(data, kind), strict=True):
            sizes[name] = max(count, sizes.get(name, 0))
    for name in sizes:
        offsets[name] = sum(sizes[n] for n in offsets)
    total = sum(sizes.values())
    ends = [
        np.stack([e[0] + offsets[k[0]], e[1] + offsets[k[2]]])
        for k in kinds
        for e in [_edges(data, k).cpu().numpy()]
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
        before, after = _run(model, data), _run(model, fewer)
    if (
        not isinstance(before, Tensor)
        or before.dim() != 2
        or before.shape[1] < 2
        or before.shape != after.shape
    ):
        return None
    return float((before.argmax(1) == after.argmax(1)).double().mean())


__all__ = ["CRITERIA", "EdgePlan", "EdgeReport", "EdgeResult", "Ramp", "Threshold", "prune_edges"]
