"""The edges of a graph, and what belongs to them: objects with ``edge_index``, or a store of each kind of edges."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..base.checks import is_whole
from ..base.errors import InputError

Tensor = torch.Tensor
Kind = tuple[str, str, str]  # a kind of edges: from which nodes, what they say, to which
ONE: Kind = ("", "edge_index", "")  # of data with one kind


def kinds_of(data: Any) -> list[Kind]:
    """The kinds of edges that data have."""
    kinds = getattr(data, "edge_types", None)
    if isinstance(kinds, (list, tuple)) and kinds and isinstance(kinds[0], tuple):
        return [tuple(k) for k in kinds]
    if not isinstance(getattr(data, "edge_index", None), Tensor):
        raise InputError(
            f"data must have edge_index, a tensor [2, edges] of node numbers; {type(data).__name__} has none"
        )
    return [ONE]


def store_of(data: Any, kind: Kind) -> Any:
    """Where the edges of a kind and their attributes are."""
    return data if kind == ONE else data[kind]


def edges_of(data: Any, kind: Kind) -> Tensor:
    """Both ends of the edges of a kind: [2, edges]."""
    found = getattr(store_of(data, kind), "edge_index", None)
    if not isinstance(found, Tensor):
        raise InputError(f"edges {' '.join(kind)} have no edge_index")
    return found


def nodes_of(data: Any, kind: Kind) -> tuple[int, int]:
    """How many nodes there are at each end of a kind of edges."""

    def count(store: Any, row: int) -> int:
        features: Any = getattr(store, "x", None)
        given: Any = getattr(store, "num_nodes", None)
        if isinstance(features, Tensor):
            return int(features.shape[0])
        if is_whole(given):
            return int(given)
        edges = edges_of(data, kind)
        return int(edges[row].max()) + 1 if edges.numel() else 0

    if kind == ONE:
        features = getattr(data, "x", None)
        if not isinstance(features, Tensor) and not is_whole(getattr(data, "num_nodes", None)):
            both = max(count(data, 0), count(data, 1))
            return both, both
        return count(data, 0), count(data, 1)
    return count(data[kind[0]], 0), count(data[kind[2]], 1)


def check_edges(data: Any, kind: Kind) -> None:
    """Refuse edges that are no pairs of nodes."""
    edges = edges_of(data, kind)
    name = kind[1] if kind == ONE else " ".join(kind)
    if edges.dim() != 2 or len(edges) != 2 or edges.is_floating_point() or edges.dtype == torch.bool:
        raise InputError(
            f"{name} must be whole numbers of shape [2, edges], not {edges.dtype} {list(edges.shape)}"
        )
    for row, count in enumerate(nodes_of(data, kind)):
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


def with_edges(data: Any, masks: Mapping[Kind, Tensor]) -> Any:
    """A copy of the data with the edges in `masks`, and what belongs to them."""
    made = copy.copy(data)
    for kind, mask in masks.items():
        store, nodes = store_of(made, kind), max(nodes_of(data, kind))
        edges = edges_of(data, kind)
        there = mask.to(edges.device)
        changed = {"edge_index": edges[:, there]}
        for name in _of_edges(store, edges.shape[1], nodes):
            value = getattr(store, name)
            changed[name] = value[mask.to(value.device)]
        for name, value in changed.items():
            setattr(store, name, value)
    return made


def counted(edges: Mapping[Kind, int]) -> str:
    """How many edges there are, in words."""
    return ", ".join(f"{n} edges {'' if k == ONE else ' '.join(k)}".strip() for k, n in edges.items())


# ------------------------------------------------------------------------------------------ what goes together


def sets_of(data: Any, kinds: list[Kind], undirected: bool) -> dict[Kind, npt.NDArray[np.int64]]:
    """For each edge the number of the set that goes as a whole; -1: a loop, which stays."""
    keys: dict[Kind, npt.NDArray[np.int64]] = {}
    done = 0
    for kind in kinds:
        source, target = edges_of(data, kind).cpu().numpy().astype(np.int64)
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
                _order(*edges_of(data, kind).cpu().numpy()[::-1], *edges_of(data, partner).cpu().numpy())
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
    a, b = edges_of(data, kind).cpu().numpy(), edges_of(data, other).cpu().numpy()
    return a.shape == b.shape and np.array_equal(a[::-1][:, np.lexsort(a)], b[:, np.lexsort(b[::-1])])


def _order(source: Any, target: Any, other_source: Any, other_target: Any) -> npt.NDArray[np.int64]:
    """Where each edge stands among the others, which are the same ones."""
    found = np.empty(len(source), dtype=np.int64)
    found[np.lexsort((target, source))] = np.lexsort((other_target, other_source))
    return found
