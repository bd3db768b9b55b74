"""How the tensors of a model lie in those of its files: most as they are, some stacked, joined, split or transposed.

`Laid` stands for a tensor that is put together from stored ones. Functions of torch that only move entries (``torch.stack``,
``torch.cat``, ``torch.chunk`` ...) can be called with it, so a library's own code for converting its files says, run on these,
where each entry comes from. A cut of the model's tensor is then pulled back to cuts of the stored ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..base.errors import StoreError
from ..plan.plan import Cut, Indices


@dataclass(frozen=True)
class Span:
    """A dim of a part: entries ``first .. first + size`` of dim `source` of the stored tensor, which lie at `place` onwards."""

    source: int
    first: int
    place: int
    size: int


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
        new = at + by if isinstance(at, int) else replace(at, place=at.place + by)
        return replace(self, dims=(*self.dims[:dim], new, *self.dims[dim + 1 :]))

    def narrowed(self, dim: int, first: int, size: int) -> Part | None:
        """What lies in ``first .. first + size`` along `dim`, counted from there; None where nothing does."""
        at = self.dims[dim]
        if isinstance(at, int):
            return self.moved(dim, -first) if first <= at < first + size else None
        begin, end = max(at.place, first), min(at.place + at.size, first + size)
        if begin >= end:
            return None
        new = Span(at.source, at.first + begin - at.place, begin - first, end - begin)
        return replace(self, dims=(*self.dims[:dim], new, *self.dims[dim + 1 :]))


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
            shape = torch.Size((*self.shape[:dim], n, *self.shape[dim + 1 :]))
            found.append(replace(self, shape=shape, parts=tuple(parts)))
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
        return replace(
            self, shape=torch.Size((*self.shape[:dim], *self.shape[dim + 1 :])), parts=tuple(parts)
        )

    def unsqueeze(self, dim: int) -> Laid:
        """As of a tensor."""
        dim %= self.ndim + 1
        parts = tuple(replace(p, dims=(*p.dims[:dim], 0, *p.dims[dim:])) for p in self.parts)
        return replace(self, shape=torch.Size((*self.shape[:dim], 1, *self.shape[dim:])), parts=parts)

    def unbind(self, dim: int = 0) -> tuple[Laid, ...]:
        """As of a tensor."""
        return tuple(piece.squeeze(dim) for piece in self.split(1, dim))

    def transpose(self, dim0: int, dim1: int) -> Laid:
        """As of a tensor."""
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        parts = tuple(replace(p, dims=tuple(p.dims[d] for d in order)) for p in self.parts)
        return replace(self, shape=torch.Size(self.shape[d] for d in order), parts=parts)

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
    shape = torch.Size((*first.shape[:dim], offset, *first.shape[dim + 1 :]))
    return replace(first, shape=shape, parts=tuple(parts))


def _stacked(tensors: Sequence[Laid], dim: int = 0) -> Laid:
    return _joined([t.unsqueeze(dim) for t in tensors], dim)


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


def pulled_back(
    laid: Mapping[str, Laid], cuts: Mapping[str, Cut], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Cut], dict[str, str | None]]:
    """What makes of the files what `cuts` make of the model: cuts of stored tensors, and names that change.

    Where whole stored tensors go (one of the experts that a model stacks), the others close up: each takes the name of the
    one whose place it has now. Those that go have None for a name.

    Args:
        laid: the model's tensors, as they lie in stored ones.
        cuts: of the model's tensors.
        shapes: of the stored tensors.

    Raises:
        NotMoved: no cuts of stored tensors do that, naming the tensor.
    """
    whole: dict[str, Cut] = {}  # an entry as it is, cut as the model's
    names: dict[str, str | None] = {}
    kept: dict[
        str, list[dict[int, Indices]]
    ] = {}  # for each dim: the entries that parts keep, by where the part begins
    for name, tensor in laid.items():
        cut = cuts.get(name)
        only = tensor.parts[0] if len(tensor.parts) == 1 else None
        if only is not None and only == Laid.stored(only.name, shapes[only.name]).parts[0]:
            if cut is not None:
                whole[only.name] = cut
            continue
        at = {part.dims: part.name for part in tensor.parts}
        for part in tensor.parts:
            places = _new_places(part, cut)
            new = None if places is None else at.get(places, "")
            if new == "":
                raise NotMoved(f"{name}: no stored tensor has the place of {part.name} afterwards")
            if names.setdefault(part.name, new) != new:
                raise NotMoved(f"{part.name}: its parts would get different names")
            if new is not None:
                _note_kept(name, part, cut, kept.setdefault(part.name, [{} for _ in shapes[part.name]]))
    found = dict(whole)
    names = {old: new for old, new in names.items() if old != new}
    for name, dims in kept.items():
        shape = tuple(shapes[name])
        keep = [_united(name, pieces) for pieces in dims]
        plain = [None if len(k) == n else k for k, n in zip(keep, shape, strict=True)]
        if any(k is not None for k in plain):
            found[name] = Cut(shape, tuple(plain))
    return found, names


def _new_places(part: Part, cut: Cut | None) -> tuple[Span | int, ...] | None:
    """Where the part is afterwards, in terms of what was there before: the same dims, fixed indices closed up; None: gone."""
    places = list(part.dims)
    for d, at in enumerate(part.dims):
        keep = None if cut is None else cut.keep[d]
        if isinstance(at, int) and keep is not None:
            j = int(np.searchsorted(keep, at))
            if j == len(keep) or keep[j] != at:
                return None
            places[d] = j
    return tuple(places)


def _note_kept(name: str, part: Part, cut: Cut | None, dims: list[dict[int, Indices]]) -> None:
    if cut is not None and (cut.blocks is not None or cut.numbers is not None):
        raise NotMoved(f"{name}, a grouped convolution or a buffer of indices")
    for d, at in enumerate(part.dims):
        keep = None if cut is None else cut.keep[d]
        if isinstance(at, int):
            continue
        own = np.arange(at.place, at.place + at.size)
        mine = own if keep is None else np.intersect1d(own, keep)
        indices = np.asarray(mine - at.place + at.first, dtype=np.int64)
        known = dims[at.source].setdefault(at.first, indices)
        if not np.array_equal(known, indices):
            raise NotMoved(f"{part.name}: its parts would keep different entries of dim {at.source}")
    for d, index in part.fixed:
        dims[d][index] = np.array([index], dtype=np.int64)


def _united(name: str, pieces: Mapping[int, Indices]) -> Indices:
    joined = np.concatenate([pieces[first] for first in sorted(pieces)])
    if len(joined) > 1 and not bool((np.diff(joined) > 0).all()):
        raise NotMoved(f"{name}: its parts overlap")
    return joined


def stored_names(laid: Iterable[Laid]) -> set[str]:
    """The stored tensors that some tensor of the model is made of."""
    return {part.name for tensor in laid for part in tensor.parts}
