"""A weight's product as plain matrices: ``y[s] = x[s] @ w[s].T`` for each of some stacks, whatever the op is.

Stacks are what has matrices of its own and shares nothing: the groups of a convolution, the matrices of ``bmm``, experts.
A layout says how the arguments of one call, its weight and its result are brought into that form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ..axes.nodes import is_convolution, is_grouped, tokens
from .patches import Choice, patches

Tensor = torch.Tensor
Samples = slice | Tensor  # a range of them, or their numbers
Piece = tuple[slice, Samples, Tensor]  # which stacks, which samples, x [stacks, samples, columns]


def layout_of(
    op: Any, args: Any, shape: Sequence[int], weight: Tensor, letters: tuple[str, str, str] | None
) -> Layout:
    """The layout of a call of the ATen op `op`, which may be a recorded one.

    `shape` is that of the activation, `weight` the weight operand or any tensor of its shape and strides, `letters` the
    einsum of (activation, weight, result), where the op is one.
    """
    if is_convolution(op):
        return Convolved(int(args[8]), bool(args[6]), weight.dim() - 2)
    if is_grouped(op):
        return Runs()
    assert letters is not None  # noqa: S101  a consumer without has a reason
    return einsum_layout(shape, weight, letters)


@dataclass(frozen=True)
class Einsum:
    """Dims by what becomes of them.

    Attributes:
        stacked: (dim of the activation, dim of the weight, dim of the result) that both operands have.
        samples: (dim of the activation, dim of the result) that the activation alone has.
        rows: (dim of the weight, dim of the result) that the weight alone has.
        columns: (dim of the activation, dim of the weight) that are summed over.
        summed: dims of the activation that are summed over by themselves.
        spread: (dim of the activation, size): of size 1, where the weight's is larger and summed over.
        repeated: dims of the weight along which all entries are the same.
    """

    stacked: tuple[tuple[int, int, int], ...]
    samples: tuple[tuple[int, int], ...]
    rows: tuple[tuple[int, int], ...]
    columns: tuple[tuple[int, int], ...]
    summed: tuple[int, ...]
    spread: tuple[tuple[int, int], ...]
    repeated: tuple[int, ...]

    def matrices(self, weight: Tensor) -> Tensor:
        """The weight operand as [stacks, rows, columns]."""
        for d in self.repeated:
            weight = weight.narrow(d, 0, 1)
        parts = [[w for _, w, _ in self.stacked], [w for w, _ in self.rows], [w for _, w in self.columns]]
        return _arranged(weight, parts)

    def inputs(self, args: Any, x: Tensor, stacks: slice, chosen: Choice | None = None) -> Iterator[Piece]:
        """The activation of some stacks in pieces, or the `chosen` samples of each."""
        if self.summed:
            x = x.sum(self.summed, keepdim=True)
        for d, size in self.spread:
            sizes = [-1] * x.dim()
            sizes[d] = size
            x = x.expand(sizes)
        parts = [[d for d, *_ in part] for part in (self.stacked, self.samples, self.columns)]
        yield _taken(stacks, 0, _arranged(x, parts)[stacks], chosen)

    def outputs(self, args: Any, out: Tensor, stacks: slice, samples: Samples) -> Tensor:
        """The part of the result that belongs to a piece: [stacks, samples, rows]."""
        parts = [[d for *_, d in part] for part in (self.stacked, self.samples, self.rows)]
        return _arranged(out, parts)[stacks, samples]


def einsum_layout(shape: Sequence[int], weight: Tensor, letters: tuple[str, str, str]) -> Einsum:
    """The layout of the einsum `letters` of an activation of `shape` and a weight."""
    in_x, in_w = tokens(letters[0], len(shape)), tokens(letters[1], weight.dim())
    dots = max((sum("." in t for t in part) for part in (in_x, in_w)), default=0)
    plain = letters[2].replace("...", "")
    result = tokens(letters[2], len(plain) + (dots if "..." in letters[2] else 0))
    size_x, size_w = dict(zip(in_x, shape, strict=True)), dict(zip(in_w, weight.shape, strict=True))
    same = {t for t, n, step in zip(in_w, weight.shape, weight.stride(), strict=True) if n == 1 or step == 0}
    at_x, at_w, at_out = ({t: i for i, t in enumerate(part)} for part in (in_x, in_w, result))
    columns = [t for t in in_w if t not in at_out]
    both = [t for t in in_w if t in at_x and t in at_out]
    stacked = [t for t in both if t not in same and size_x[t] == size_w[t]]
    rows = [t for t in in_w if t in at_out and t not in same and t not in stacked]
    samples = [t for t in in_x if t in at_out and t not in stacked and t not in rows]
    used = {*columns, *stacked, *rows}
    return Einsum(
        tuple((at_x[t], at_w[t], at_out[t]) for t in stacked),
        tuple((at_x[t], at_out[t]) for t in samples),
        tuple((at_w[t], at_out[t]) for t in rows),
        tuple((at_x[t], at_w[t]) for t in columns),
        tuple(at_x[t] for t in in_x if t not in at_out and t not in at_w),
        tuple((at_x[t], size_w[t]) for t in columns if size_x[t] != size_w[t]),
        tuple(at_w[t] for t in in_w if t not in used),
    )


@dataclass(frozen=True)
class Convolved:
    """A convolution: its groups are the stacks, its windows the samples."""

    groups: int
    transposed: bool
    spatial: int

    def matrices(self, weight: Tensor) -> Tensor:
        """As for `Einsum`."""
        apart = weight.unflatten(0, (self.groups, -1))
        return (apart.transpose(1, 2) if self.transposed else apart).flatten(2)

    def inputs(self, args: Any, x: Tensor, stacks: slice, chosen: Choice | None = None) -> Iterator[Piece]:
        """As for `Einsum`."""
        taken: list[Samples] = []

        def noted(count: int, start: int) -> Tensor | None:
            some = None if chosen is None else chosen(count, start)
            taken.append(slice(start, start + count) if some is None else some + start)
            return some

        for piece in patches(args, noted):
            blocks = piece.unflatten(1, (self.groups, -1))[:, stacks].flatten(2).transpose(0, 1)
            yield stacks, taken[-1], blocks

    def outputs(self, args: Any, out: Tensor, stacks: slice, samples: Samples) -> Tensor:
        """As for `Einsum`."""
        out = out if out.dim() > self.spatial + 1 else out[None]
        blocks = out.unflatten(1, (self.groups, -1))[:, stacks].movedim((1, 2), (0, -1))
        if isinstance(samples, Tensor):  # nothing else is copied
            return blocks[(slice(None), *torch.unravel_index(samples, blocks.shape[1:-1]))]
        return blocks.flatten(1, -2)[:, samples]


@dataclass(frozen=True)
class Runs:
    """A grouped product: each run of rows meets its own matrix."""

    def matrices(self, weight: Tensor) -> Tensor:
        """As for `Einsum`."""
        return weight.transpose(1, 2)

    def inputs(self, args: Any, x: Tensor, stacks: slice, chosen: Choice | None = None) -> Iterator[Piece]:
        """As for `Einsum`."""
        ends = [0, *args[2].tolist()]
        for e in range(*stacks.indices(len(ends) - 1)):
            yield _taken(slice(e, e + 1), ends[e], x[None, ends[e] : ends[e + 1]], chosen)

    def outputs(self, args: Any, out: Tensor, stacks: slice, samples: Samples) -> Tensor:
        """As for `Einsum`."""
        return out[None, samples]


Layout = Einsum | Convolved | Runs


def _arranged(x: Tensor, parts: list[list[int]]) -> Tensor:
    """`x` with one dim for the dims in each of `parts`; what is left of it has size 1."""
    rest = [d for d in range(x.dim()) if not any(d in dims for dims in parts)]
    sizes = [prod(x.shape[d] for d in dims) for dims in parts]
    return x.permute([d for dims in (*parts, rest) for d in dims]).reshape(sizes)


def _taken(stacks: slice, start: int, x: Tensor, chosen: Choice | None) -> Piece:
    """The piece x [stacks, samples, columns], whose first sample has number `start`, or what is chosen of it."""
    some = None if chosen is None else chosen(x.shape[1], start)
    if some is None:
        return stacks, slice(start, start + x.shape[1]), x
    return stacks, some + start, x[:, some]


def slices(count: int, entries: int, limit: int) -> list[slice]:
    """Ranges of `count` stacks of so many `entries` each, of at most `limit` entries where one alone is not more."""
    step = max(1, limit // max(entries, 1))
    return [slice(i, min(i + step, count)) for i in range(0, count, step)]
