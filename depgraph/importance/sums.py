"""Sums of a function of the entries of a tensor along each of its dims: what most criteria are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from ..axes.nodes import VALUES_KEPT, op_name
from ..base.errors import InputError
from ..grouping.graph import DependencyGraph, Group, Member
from ..tracing.tensors import place_of
from .criterion import Scores

CHUNK = 1 << 17  # entries summed at a time: few enough to stay in the processor's cache
DOUBLE = (torch.float64, torch.complex128)
Rows = tuple[int, int] | None
Entry = Callable[..., object]  # entry(out, *blocks): writes the values of the entries of `blocks` into `out`


def absolute(out: torch.Tensor, weight: torch.Tensor) -> None:
    """|w|."""
    if weight.dtype == out.dtype:
        torch.abs(weight, out=out)
    else:
        out.copy_(weight).abs_()


def squared(out: torch.Tensor, weight: torch.Tensor) -> None:
    """w^2."""
    if weight.dtype == out.dtype:
        torch.mul(weight, weight, out=out)
    else:
        out.copy_(weight).square_()


def sums_along(entry: Entry, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """For each dim, the sums of the values of all entries at each index: 1-D tensors, float32 or wider, on the CPU.

    `entry`, such as `absolute`, is a function of the `tensors`, all of one shape. They are read once, as matrices of dim 0
    by the rest, in blocks of rows that stay in the processor's cache.
    """
    wide = torch.float64 if any(t.dtype in DOUBLE for t in tensors) else torch.float32

    def blocks(first: int, last: int) -> list[torch.Tensor]:
        return [t[first:last] if t.dim() else t for t in tensors]

    return _summed(entry, tuple(tensors[0].shape), tensors[0].dtype, wide, tensors[0].device, blocks)


def _summed(
    entry: Entry,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    wide: torch.dtype,
    device: torch.device,
    read: Callable[[int, int], list[torch.Tensor]],
) -> list[torch.Tensor]:
    """The sums of a tensor of `shape`, whose entries (of several, if they are combined) from one row to another `read` gives."""
    if dtype.is_complex:  # re and im as a last dim, over which is summed, too

        def pairs(first: int, last: int) -> list[torch.Tensor]:
            return [torch.view_as_real(t.resolve_conj()) for t in read(first, last)]

        return _summed(entry, (*shape, 2), wide, wide, device, pairs)[:-1]
    rows = shape[0] if shape else 1
    if len(shape) <= 1:
        out = torch.empty(shape, dtype=wide, device=device)
        entry(out, *read(0, rows))
        return [out.cpu()] * len(shape)
    columns = prod(shape[1:])
    step = max(1, min(rows, CHUNK // max(1, columns)))
    buffer = torch.empty(step, columns, dtype=wide, device=device)
    per_row = torch.empty(rows, dtype=wide, device=device)
    per_column = torch.zeros(columns, dtype=wide, device=device)
    across, down = (torch.ones(n, dtype=wide, device=device) for n in (columns, step))
    for start in range(0, rows, step):
        blocks = [t.flatten(1) for t in read(start, min(start + step, rows))]
        n = blocks[0].shape[0]
        entry(buffer[:n], *blocks)
        torch.mv(buffer[:n], across, out=per_row[start : start + n])
        per_column.addmv_(buffer[:n].t(), down[:n])
    rest = per_column.reshape(shape[1:])
    sums = [per_row]
    for d in range(rest.dim()):
        others = [e for e in range(rest.dim()) if e != d]
        sums.append(rest.sum(others) if others else rest)
    return [s.cpu() for s in sums]


def values_of(graph: DependencyGraph, name: str) -> torch.Tensor:
    """All values of the parameter or buffer `name`; an `InputError` where there are none."""
    return _with_values(name, graph.weights.whole(name))


def _with_values(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        raise InputError(f"{name} is on the meta device: it has no values to score")
    return tensor


def moved_from(node: Any) -> Node | None:
    """The parameter or buffer that `node` is a view or copy of, or None."""
    while isinstance(node, Node) and node.op == "call_function":
        if op_name(node.target) not in VALUES_KEPT:
            return None
        node = node.args[0]
    return node if isinstance(node, Node) and node.op == "get_attr" else None


class MemberSums:
    """Sums over the entries of each unit in each parameter of a graph's groups; a tensor is read once for all of them."""

    def __init__(self, graph: DependencyGraph) -> None:
        """Nothing is summed yet; buffers and plain tensors never are."""
        self.graph = graph
        self.blocks: dict[str, set[Rows]] = {n: set() for n, _ in graph.model.named_parameters()}
        for group in graph.groups:
            for m in group.members:
                if m.name in self.blocks:
                    self.blocks[m.name].add(m.rows)
        self._sums: dict[tuple[str, Rows], list[Scores]] = {}

    @property
    def names(self) -> list[str]:
        """The parameters that some group has a part of."""
        return [n for n, blocks in self.blocks.items() if blocks]

    def add(self, name: str, entry: Entry, *tensors: torch.Tensor) -> None:
        """Add the sums of `entry` over finite `tensors`, which have the shape of parameter `name`."""
        for rows in self.blocks[name]:
            parts = tensors if rows is None else tuple(t[slice(*rows)] for t in tensors)
            self._noted(name, rows, [s.double().numpy() for s in sums_along(entry, *parts)])

    def _noted(self, name: str, rows: Rows, found: list[Scores]) -> None:
        if not all(np.isfinite(s).all() for s in found):
            raise InputError(f"NaN or infinite values in {name}, or in what is computed from it")
        known = self._sums.get((name, rows))
        self._sums[name, rows] = [a + b for a, b in zip(known, found, strict=True)] if known else found

    def read(self, name: str, entry: Entry) -> None:
        """Add the sums of `entry` over the values of parameter `name`, which are read block by block."""
        weights, tensor = self.graph.weights, self.graph.tensors[name]
        wide = torch.float64 if tensor.dtype in DOUBLE else torch.float32
        for rows in self.blocks[name]:
            first, last = rows or (0, tensor.shape[0] if tensor.dim() else 1)
            shape = (last - first, *tensor.shape[1:]) if tensor.dim() else ()

            def blocks(a: int, b: int, first: int = first, shape: Any = shape) -> list[torch.Tensor]:
                found = weights.rows(name, first + a, first + b) if shape else weights.whole(name)
                return [_with_values(name, found)]

            def summed(
                shape: tuple[int, ...] = shape, read: Callable[[int, int], list[torch.Tensor]] = blocks
            ) -> list[Scores]:
                device = place_of(tensor)
                return [s.double().numpy() for s in _summed(entry, shape, tensor.dtype, wide, device, read)]

            found = weights.kept(f"{name} {first}:{last} {entry.__name__}", summed)
            if found is not None:
                self._noted(name, rows, list(found))

    def clear(self) -> None:
        """Forget what was added."""
        self._sums.clear()

    def has(self, name: str) -> bool:
        """Whether something was added for parameter `name`."""
        return any((name, rows) in self._sums for rows in self.blocks[name])

    def of(self, member: Member) -> Scores:
        """[units] float64: for each unit, the sum over its entries in `member`; 0 where nothing was added."""
        sums = self._sums.get((member.name, member.rows))
        if sums is None:
            return np.zeros(len(member.indices))
        return np.asarray(sums[member.dim][member.indices].sum(1))

    def over(self, group: Group, members: Iterable[Member]) -> Scores:
        """[units] float64: the sum over `members` of a group."""
        return sum((self.of(m) for m in members), np.zeros(group.units))
