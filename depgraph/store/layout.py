"""How the tensors of a model lie in those of its files: most as they are, some stacked, joined, split, transposed or interleaved.

`Laid` stands for a tensor that is put together from stored ones. Functions of torch that only move entries (``torch.stack``,
``torch.cat``, ``torch.chunk`` ...) can be called with it, so a library's own code for converting its files says, run on these,
where each entry comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..base.errors import StoreError
from ..plan.plan import Indices


@dataclass(frozen=True)
class Span:
    """A dim of a part: `size` entries of dim `source` of the stored tensor, from `first` on each `step`, which lie at `place` onwards."""

    source: int
    first: int
    place: int
    size: int
    step: int = 1

    @property
    def entries(self) -> slice:
        """Of the stored tensor."""
        return slice(self.first, self.first + self.step * (self.size - 1) + 1, self.step)

    def every(self, first: int, step: int, count: int) -> tuple[int, Span] | None:
        """What lies at `count` places, from `first` on each `step`: which of these is the first, and they alone; None: none."""
        begin = max(0, -(-(self.place - first) // step))
        end = min(count, (self.place + self.size - 1 - first) // step + 1)
        if begin >= end:
            return None
        at = self.first + self.step * (first + step * begin - self.place)
        return begin, Span(self.source, at, begin, end - begin, self.step * step)


@dataclass(frozen=True)
class Part:
    """What one stored tensor gives to a tensor of the model.

    Attributes:
        name: of the stored tensor.
        dims: for each dim of the model's tensor a `Span`, or the one index that the part has there.
        fixed: of the stored tensor, the dims of which only one index is taken (dim, index).
    """

    name: str
    dims: tuple[Span | int, ...]
    fixed: tuple[tuple[int, int], ...] = ()

    def moved(self, dim: int, by: int) -> Part:
        """The same, `by` entries further along `dim`."""
        at = self.dims[dim]
        return self.with_dim(dim, at + by if isinstance(at, int) else replace(at, place=at.place + by))

    def narrowed(self, dim: int, first: int, size: int) -> Part | None:
        """What lies in ``first .. first + size`` along `dim`, counted from there; None where nothing does."""
        at = self.dims[dim]
        if isinstance(at, int):
            return self.moved(dim, -first) if first <= at < first + size else None
        found = at.every(first, 1, size)
        return None if found is None else self.with_dim(dim, found[1])

    def every(self, dim: int, first: int, step: int, count: int, place: int) -> Part | None:
        """What lies at `count` places along `dim`, from `first` on each `step`, put at `place` onwards; None where nothing does."""
        at = self.dims[dim]
        if isinstance(at, int):
            i, left = divmod(at - first, step)
            return None if left or not 0 <= i < count else self.with_dim(dim, place + i)
        found = at.every(first, step, count)
        return None if found is None else self.with_dim(dim, replace(found[1], place=place + found[0]))

    def with_dim(self, dim: int, at: Span | int) -> Part:
        """The same, but for one dim."""
        return replace(self, dims=(*self.dims[:dim], at, *self.dims[dim + 1 :]))


class NotMoved(StoreError):
    """A conversion does more than move whole slices, so that a cut can't be followed through it."""


@dataclass(frozen=True, eq=False)
class Laid:
    """A tensor that is put together from stored ones, as far as functions of torch are concerned that only move entries."""

    shape: torch.Size
    parts: tuple[Part, ...]
    dtype: torch.dtype = torch.float32

    @classmethod
    def stored(cls, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Laid:
        """A stored tensor as it is."""
        part = Part(name, tuple(Span(d, 0, 0, n) for d, n in enumerate(shape)))
        return cls(torch.Size(shape), (part,), dtype)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """A tensor, to those who ask before they call it."""
        return torch.Tensor

    def but(self, shape: Iterable[int], parts: Iterable[Part]) -> Laid:
        """Of the same type, with another shape and other parts."""
        return Laid(torch.Size(shape), tuple(parts), self.dtype)

    @property
    def ndim(self) -> int:
        """The number of dims."""
        return len(self.shape)

    def dim(self) -> int:
        """The number of dims."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> Laid:
        """Itself: memory is no matter here."""
        return self

    def __getitem__(self, key: Any) -> Laid:
        """All of it (``...``), which is how a loader reads a stored tensor."""
        if key is Ellipsis:
            return self
        raise NotMoved(f"indexing with {key!r}")

    def to(self, *_: Any, **__: Any) -> Laid:
        """Itself."""
        return self

    def __getattr__(self, name: str) -> Any:
        raise NotMoved(f"Tensor.{name}")

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Laid, ...]:
        """As of a tensor."""
        size = -(-self.shape[dim] // chunks)
        return self.split(size, dim)

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> tuple[Laid, ...]:
        """As of a tensor."""
        dim %= self.ndim
        whole = self.shape[dim]
        if isinstance(sizes, int):
            sizes = [min(sizes, whole - i) for i in range(0, whole, sizes)]
        found, first = [], 0
        for n in sizes:
            parts = [p for part in self.parts if (p := part.narrowed(dim, first, n)) is not None]
            found.append(self.but((*self.shape[:dim], n, *self.shape[dim + 1 :]), parts))
            first += n
        return tuple(found)

    def squeeze(self, dim: int) -> Laid:
        """As of a tensor."""
        dim %= self.ndim
        if self.shape[dim] != 1:
            return self
        parts = []
        for part in self.parts:
            at = part.dims[dim]
            fixed = part.fixed if isinstance(at, int) else (*part.fixed, (at.source, at.first))
            parts.append(replace(part, dims=(*part.dims[:dim], *part.dims[dim + 1 :]), fixed=fixed))
        return self.but((*self.shape[:dim], *self.shape[dim + 1 :]), parts)

    def unsqueeze(self, dim: int) -> Laid:
        """As of a tensor."""
        dim %= self.ndim + 1
        parts = [replace(p, dims=(*p.dims[:dim], 0, *p.dims[dim:])) for p in self.parts]
        return self.but((*self.shape[:dim], 1, *self.shape[dim:]), parts)

    def unbind(self, dim: int = 0) -> tuple[Laid, ...]:
        """As of a tensor."""
        return tuple(piece.squeeze(dim) for piece in self.split(1, dim))

    def transpose(self, dim0: int, dim1: int) -> Laid:
        """As of a tensor."""
        return self.permute(*_swapped(self.ndim, dim0, dim1))

    def permute(self, *order: int) -> Laid:
        """As of a tensor."""
        parts = [replace(p, dims=tuple(p.dims[d] for d in order)) for p in self.parts]
        return self.but([self.shape[d] for d in order], parts)

    def reshape(self, *shape: Any) -> Laid | Folded:
        """As of a tensor."""
        return Folded(
            self, tuple((Digit(d, n, 1),) if n > 1 else () for d, n in enumerate(self.shape))
        ).reshape(*shape)

    view = reshape

    def ordered(self, dim: int, order: Indices) -> Laid:
        """The entries along `dim` in another order, which digits make."""
        parts = []
        for place, first, step, count in _runs(order):
            found = (part.every(dim, first, step, count, place) for part in self.parts)
            parts += [part for part in found if part is not None]
        return self.but(self.shape, parts)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What functions of torch make of it."""
        known = MOVES.get(func)
        if known is None:
            raise NotMoved(f"torch.{getattr(func, '__name__', func)}")
        return known(*args, **(kwargs or {}))


def _joined(tensors: Sequence[Laid], dim: int = 0) -> Laid:
    first = tensors[0]
    dim %= first.ndim
    parts: list[Part] = []
    offset = 0
    for tensor in tensors:
        parts += [p.moved(dim, offset) for p in tensor.parts]
        offset += tensor.shape[dim]
    return first.but((*first.shape[:dim], offset, *first.shape[dim + 1 :]), parts)


def _stacked(tensors: Sequence[Laid], dim: int = 0) -> Laid:
    return _joined([t.unsqueeze(dim) for t in tensors], dim)


@dataclass(frozen=True)
class Digit:
    """A factor of a dim of a tensor: the index along `dim` has `stride` times what is here, which is below `size`."""

    dim: int
    size: int
    stride: int


@dataclass(frozen=True)
class Folded:
    """A `Laid` whose dims are seen as products of factors, until they are put together to dims again.

    Attributes:
        laid: the tensor.
        dims: the factors of each dim that is seen, the outermost first.
    """

    laid: Laid
    dims: tuple[tuple[Digit, ...], ...]

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """A tensor, as a `Laid` is."""
        return torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """As of a tensor."""
        return torch.Size(math.prod(digit.size for digit in dim) for dim in self.dims)

    def __getattr__(self, name: str) -> Any:
        raise NotMoved(f"Tensor.{name} of a reshaped tensor")

    def transpose(self, dim0: int, dim1: int) -> Laid | Folded:
        """As of a tensor."""
        return self.permute(*_swapped(len(self.dims), dim0, dim1))

    def permute(self, *order: int) -> Laid | Folded:
        """As of a tensor."""
        return Folded(self.laid, tuple(self.dims[d] for d in order)).settled()

    def reshape(self, *shape: Any) -> Laid | Folded:
        """As of a tensor."""
        sizes = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if -1 in sizes:
            sizes[sizes.index(-1)] = math.prod(self.shape) // -math.prod(sizes)
        left = [digit for dim in self.dims for digit in dim]
        found = []
        for size in sizes:
            dim: list[Digit] = []
            while size > 1:
                one = left.pop(0) if left else Digit(0, 0, 0)
                if one.size > size and one.size % size == 0:
                    inner = one.size // size
                    left.insert(0, replace(one, size=inner))
                    one = replace(one, size=size, stride=one.stride * inner)
                if not one.size or size % one.size:
                    raise NotMoved(f"a reshape of {tuple(self.shape)} to {tuple(sizes)}")
                dim.append(one)
                size //= one.size
            found.append(tuple(dim))
        if left or 0 in sizes:
            raise NotMoved(f"a reshape of {tuple(self.shape)} to {tuple(sizes)}")
        return Folded(self.laid, tuple(found)).settled()

    view = reshape

    def settled(self) -> Laid | Folded:
        """A `Laid`, where each dim is one of it in some order, or has one entry."""
        of = [{digit.dim for digit in dim} for dim in self.dims]
        base = [d for dims in of for d in dims]
        if any(len(dims) > 1 for dims in of) or len(set(base)) < len(base):
            return self
        found = self.laid
        for d in reversed(range(found.ndim)):
            found = found if d in base else found.squeeze(d)
        found = found.permute(*(sorted(base).index(d) for d in base))
        for d, dim in enumerate(self.dims):
            found = found if dim else found.unsqueeze(d)
            order = np.zeros(1, dtype=np.int64)
            for digit in dim:
                order = (order[:, None] + np.arange(digit.size) * digit.stride).reshape(-1)
            if not np.array_equal(order, np.arange(len(order))):
                found = found.ordered(d, order)
        return found

    contiguous = settled


def _swapped(ndim: int, dim0: int, dim1: int) -> list[int]:
    order = list(range(ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return order


def _runs(order: Indices) -> Iterator[tuple[int, int, int, int]]:
    """An order that digits make, as runs of equal steps forward: where each begins, its first entry, step and count."""
    steps = np.diff(order)
    turns = np.flatnonzero(np.diff(steps)) + 1  # where another step begins
    place = 0
    while place < len(order):
        step = int(steps[place]) if place < len(steps) else 1
        after = np.searchsorted(turns, place, side="right")
        end = (int(turns[after]) if after < len(turns) else len(steps)) + 1
        yield place, int(order[place]), step, end - place
        place = end


MOVES: dict[Any, Callable[..., Any]] = {
    torch.cat: _joined,
    torch.stack: _stacked,
    torch.chunk: Laid.chunk,
    torch.split: Laid.split,
    torch.unbind: Laid.unbind,
    torch.transpose: Laid.transpose,
    torch.squeeze: Laid.squeeze,
    torch.unsqueeze: Laid.unsqueeze,
}
