"""The algebra of axes: what the dims of tensors range over, and how ops relate them.

An axis is an ordered set of indices. It is one of four things:

* an **atom**: indices without known structure;
* a **product** of axes, row-major: what a reshape joins or splits (outer x inner);
* a **concatenation** of axes: what cat, split and slices join or cut;
* **ragged**: the dim of a block-structured weight (a grouped convolution) that ranges over another axis in each
  block of dim 0.

`unify` says that two axes are the same; `factor` and `cut` refine one. Refinement replaces an atom by a product or a
concatenation wherever it stands, so the order in which ops are met does not matter. What can't be refined
consistently is frozen, with the reason. The forest is mutable and short-lived: `DependencyGraph` reads the atoms off
it when every op has been seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod

import numpy as np
import numpy.typing as npt

AtomMasks = Mapping["Axis", npt.NDArray[np.bool_]]  # atom -> which of its units stay
ATOM, PRODUCT, CONCAT, RAGGED = "atom", "product", "concat", "ragged"


@dataclass(frozen=True)
class Reason:
    """Why an axis is frozen.

    Attributes:
        text: a sentence without its subject: "is read at a fixed index".
        op: the op that did it; "" where none did.
        module: the path of the module that called it.
        source: the user's line, as ``"file.py:12"``.
    """

    text: str
    op: str = ""
    module: str = ""
    source: str = ""

    def __str__(self) -> str:
        """The sentence with its place."""
        where = f" in {self.module}" if self.module else ""
        return f"{self.text}{where}" + (f" ({self.source})" if self.source else "")


_numbers = count()


class Axis:
    """A node of the forest; see the module docstring. Read `kind`, `parts`, `frozen` through `find` only.

    Axes are equal when they are the same object, and ordered by age.
    """

    __slots__ = (
        "channel",
        "frozen",
        "into",
        "kind",
        "number",
        "original_axis",
        "over",
        "parts",
        "size",
        "solid",
    )

    def __init__(self, size: int, kind: str = ATOM, parts: tuple[Axis, ...] = ()) -> None:
        """An axis of `size` indices, by default an atom."""
        self.number = next(_numbers)
        self.size = size
        self.kind = kind
        self.parts = parts
        self.into: Axis | None = None
        self.frozen: Reason | None = None
        self.original_axis: Axis = self  # the axis that this one is a fragment of
        self.channel = False
        self.solid = False  # every atom in it is frozen: known for sure once true
        self.over: Axis | None = None  # ragged: the axis whose equal blocks the parts belong to

    def find(self) -> Axis:
        """What this axis has become."""
        axis = self
        while axis.into is not None:
            if axis.into.into is not None:
                axis.into = axis.into.into
            axis = axis.into
        return axis

    def __lt__(self, other: Axis) -> bool:
        return self.number < other.number

    def __repr__(self) -> str:
        a = self.find()
        if a.kind == ATOM:
            return f"{'!' if a.frozen else ''}{a.size}"
        sign = {PRODUCT: "*", CONCAT: "+", RAGGED: "|"}[a.kind]
        return f"({sign.join(map(repr, a.parts[:6]))}{'...' if len(a.parts) > 6 else ''})"


def product(parts: Iterable[Axis]) -> Axis:
    """The axis whose index is (i, j, ...) over `parts`, row-major; nested products are flattened."""
    flat: list[Axis] = []
    for part in parts:
        part = part.find()
        flat.extend(_parts(part, PRODUCT) if part.kind == PRODUCT else [part])
    return flat[0] if len(flat) == 1 else Axis(prod(p.size for p in flat), PRODUCT, tuple(flat))


def concat(parts: Iterable[Axis]) -> Axis:
    """The axis whose indices are those of `parts` in order; nested concatenations are flattened."""
    flat: list[Axis] = []
    for part in parts:
        part = part.find()
        flat.extend(_parts(part, CONCAT) if part.kind == CONCAT else [part])
    return flat[0] if len(flat) == 1 else Axis(sum(p.size for p in flat), CONCAT, tuple(flat))


def _parts(axis: Axis, kind: str) -> list[Axis]:
    """The parts of `axis` as one flat list: parts that have become the same kind are opened."""
    axis = axis.find()
    if axis.kind != kind:
        return [axis]
    flat = [q for p in axis.parts for q in _parts(p, kind)]
    axis.parts = tuple(flat)
    return flat


def atoms(axis: Axis) -> list[Axis]:
    """The atoms that `axis` is made of, in order, with repetitions."""
    axis = axis.find()
    return [axis] if axis.kind == ATOM else [a for p in axis.parts for a in atoms(p)]


def frozen(axis: Axis) -> bool:
    """Whether no index of `axis` may go; its inner structure then says nothing any more."""
    axis = axis.find()
    if not axis.solid:
        axis.solid = axis.frozen is not None if axis.kind == ATOM else all(frozen(p) for p in axis.parts)
    return axis.solid


def _reason(axis: Axis) -> Reason | None:
    axis = axis.find()
    return axis.frozen if axis.kind == ATOM else _reason(axis.parts[0])


class Algebra:
    """The operations on axes; `place` is the reason prefix of whatever gets frozen meanwhile."""

    def __init__(self) -> None:
        """An empty algebra; axes are made with `Axis`, `product` and `concat`."""
        self.place = Reason("")

    def freeze(self, axis: Axis | None, text: str) -> None:
        """No index of `axis` may be removed, because of `text` at the current place."""
        if axis is None:
            return
        reason = Reason(text, self.place.op, self.place.module, self.place.source)
        for atom in atoms(axis):
            if atom.frozen is None:
                atom.frozen = reason

    def unify(self, a: Axis | None, b: Axis | None) -> None:
        """`a` and `b` are the same axis: what is removed from one is removed from the other, position by position."""
        if a is None or b is None:
            self.freeze(a, "is combined with a dim of size 1")
            self.freeze(b, "is combined with a dim of size 1")
            return
        a, b = a.find(), b.find()
        if a is b:
            return
        if a.size != b.size:
            raise ValueError(f"axes of sizes {a.size} and {b.size} can't be the same")
        if frozen(a) or frozen(b):
            self._freeze_as(*((b, a) if frozen(a) else (a, b)))
            return
        if a.kind != ATOM and (b.kind == ATOM or (b.kind == RAGGED and a.kind != RAGGED)):
            a, b = b, a
        if a.kind == ATOM:
            self._bind(a, b)
        elif a.kind == RAGGED and b.kind == RAGGED and len(a.parts) == len(b.parts):
            a.into = b
            for p, q in zip(a.parts, b.parts, strict=True):
                self.unify(p, q)
        elif RAGGED in (a.kind, b.kind):
            for axis in (a, b):
                self.collapse(axis)
            self.unify(a, b)
        elif a.kind == PRODUCT and b.kind == PRODUCT:
            self._unify_products(a, b)
        else:
            self._unify_concats(a, b)

    def _freeze_as(self, axis: Axis, other: Axis) -> None:
        """Freeze `axis` for the reason that `other` is frozen for."""
        if not frozen(axis):
            reason = _reason(other)
            for atom in atoms(axis):
                atom.frozen = atom.frozen or reason

    def _fixed_like(self, axis: Axis, *sizes: int) -> tuple[Axis, ...]:
        """New frozen axes of `sizes`, for the reason of a frozen `axis`."""
        made = tuple(Axis(n) for n in sizes)
        for new in made:
            new.frozen = _reason(axis)
        return made

    def collapse(self, axis: Axis) -> None:
        """Make a ragged axis an ordinary one: every block ranges over the same axis."""
        axis = axis.find()
        if axis.kind == RAGGED:
            first, *rest = axis.parts
            axis.into = first
            for part in rest:
                self.unify(part, first)
        elif axis.kind != ATOM:
            for part in axis.parts:
                self.collapse(part)

    def _bind(self, atom: Axis, other: Axis) -> None:
        """An atom becomes `other`; a frozen one freezes it."""
        if atom in atoms(other):  # `other` is this very atom times units of size 1: those can't go
            for leaf in atoms(other):
                if leaf is not atom:
                    self.freeze(leaf, "would empty the dim it stands in")
            return
        atom.into = other
        for leaf in atoms(other):
            leaf.channel |= atom.channel
            if atom.frozen is not None and leaf.frozen is None:
                leaf.frozen = atom.frozen
            if leaf.original_axis is leaf and atom.original_axis is not atom:
                leaf.original_axis = atom.original_axis

    def _refine(self, atom: Axis, kind: str, parts: Sequence[Axis]) -> None:
        """An atom becomes a product or concatenation of new atoms, which inherit what is known of it."""
        whole = Axis(atom.size, kind, tuple(parts))
        for part in parts:
            part.frozen, part.channel = atom.frozen, atom.channel
            if kind == CONCAT:
                part.original_axis = atom.original_axis
        atom.into = whole

    def factor(self, axis: Axis, outer: int) -> tuple[Axis, Axis]:
        """Split `axis` into (outer, inner) with `outer` indices in the outer factor."""
        axis = axis.find()
        inner = axis.size // outer
        if outer * inner != axis.size:
            raise ValueError(f"an axis of size {axis.size} has no factor {outer}")
        if frozen(axis):
            first, second = self._fixed_like(axis, outer, inner)
            return first, second
        if axis.kind == ATOM:
            parts = Axis(outer), Axis(inner)
            self._refine(axis, PRODUCT, parts)
            return parts
        if axis.kind == RAGGED:
            self.collapse(axis)
            return self.factor(axis, outer)
        if axis.kind == CONCAT:
            return self._factor_concat(axis, outer, inner)
        parts_, done = _parts(axis, PRODUCT), 1
        for i, part in enumerate(parts_):
            if done == outer and i:
                return product(parts_[:i]), product(parts_[i:])
            if outer % (done * part.size):
                need = outer // done
                if outer % done == 0 and part.size % need == 0:
                    left, right = self.factor(part, need)
                    return product([*parts_[:i], left]), product([right, *parts_[i + 1 :]])
                break
            done *= part.size
        self.freeze(axis, f"is split as {outer} x {inner} where another op splits it differently")
        parts = Axis(outer), Axis(inner)
        for part in parts:
            self.freeze(part, f"is split as {outer} x {inner} where another op splits it differently")
        return parts

    def _factor_concat(self, axis: Axis, outer: int, inner: int) -> tuple[Axis, Axis]:
        pieces = _parts(axis, CONCAT)
        if all(p.size % inner == 0 for p in pieces):
            split = [self.factor(p, p.size // inner) if p.size != inner else (Axis(1), p) for p in pieces]
            first = split[0][1]
            for _, row in split[1:]:
                self.unify(row, first)
            rows = concat([o for o, _ in split])
            whole = product([rows, first])
        else:  # rows straddle the pieces: every row is the same axis, and no row can go
            rows = Axis(outer)
            self.freeze(rows, f"is split as {outer} x {inner} across the borders of a concatenation")
            rest: Axis = axis
            first = Axis(inner)
            for i in range(outer):
                row, rest = self.cut(rest, inner) if i < outer - 1 else (rest, rest)
                self.unify(row, first)
            whole = product([rows, first])
        axis = axis.find()
        if axis is not whole.find() and axis.kind == CONCAT:
            axis.into = whole
        return rows, first

    def cut(self, axis: Axis, at: int) -> tuple[Axis, Axis]:
        """Cut `axis` into its first `at` indices and the rest; an empty piece is an axis of its own that nothing uses."""
        axis = axis.find()
        if at in (0, axis.size):
            empty = Axis(0)
            self.freeze(empty, "has no indices")
            return (axis, empty) if at else (empty, axis)
        if frozen(axis):
            first, second = self._fixed_like(axis, at, axis.size - at)
            return first, second
        if axis.kind == ATOM:
            parts = Axis(at), Axis(axis.size - at)
            self._refine(axis, CONCAT, parts)
            return parts
        if axis.kind == RAGGED:
            self.collapse(axis)
            return self.cut(axis, at)
        if axis.kind == CONCAT:
            pieces, done = _parts(axis, CONCAT), 0
            for i, piece in enumerate(pieces):
                if done == at and i:
                    return concat(pieces[:i]), concat(pieces[i:])
                if done + piece.size > at:
                    left, right = self.cut(piece, at - done)
                    return concat([*pieces[:i], left]), concat([right, *pieces[i + 1 :]])
                done += piece.size
            raise ValueError(f"can't cut an axis of size {axis.size} at {at}")
        outer, *rest = _parts(axis, PRODUCT)
        inner = product(rest)
        row, offset = divmod(at, inner.size)
        if offset == 0:
            left, right = self.cut(outer, row)
            return product([left, inner]), product([right, inner])
        before, here = self.cut(outer, row) if row else (None, outer)
        here, after = self.cut(here, 1) if here.size > 1 else (here, None)
        head, tail = self.cut(inner, offset)
        return (
            concat([product([p, q]) for p, q in ((before, inner), (here, head)) if p is not None]),
            concat([product([p, q]) for p, q in ((here, tail), (after, inner)) if p is not None]),
        )

    def segments(self, axis: Axis, lengths: Sequence[int]) -> list[Axis]:
        """Cut `axis` into consecutive pieces of `lengths`."""
        pieces = []
        for length in lengths[:-1]:
            piece, axis = self.cut(axis, length)
            pieces.append(piece)
        return [*pieces, axis]

    def factors(self, axis: Axis, lengths: Sequence[int]) -> list[Axis]:
        """Split `axis` into a product of factors of `lengths`, each above 1."""
        found = []
        for length in lengths[:-1]:
            piece, axis = self.factor(axis, length)
            found.append(piece)
        return [*found, axis]

    def _unify_products(self, a: Axis, b: Axis) -> None:
        left, right = _parts(a, PRODUCT), _parts(b, PRODUCT)
        p, q = left[0], right[0]
        if 1 in (p.size, q.size) and p.size != q.size:
            self.freeze(p if p.size == 1 else q, "would empty the dim it stands in")
            short, other = (a, b) if p.size == 1 else (b, a)
            short.into = product(_parts(short, PRODUCT)[1:])
            self.unify(short, other)
        elif p.size == q.size:
            rest = product(left[1:]), product(right[1:])
            a.into = b
            self.unify(p, q)
            self.unify(*rest)
        elif p.size % q.size == 0 or q.size % p.size == 0:
            axis, size = (p, q.size) if p.size > q.size else (q, p.size)
            self.factor(axis, size)
            if axis.find().kind == PRODUCT:
                self.unify(a, b)
        else:
            self._clash(a, b)

    def _clash(self, a: Axis, b: Axis) -> None:
        text = f"is split in two ways that contradict each other ({a!r} and {b!r})"
        self.freeze(a, text)
        self.freeze(b, text)

    def _unify_concats(self, a: Axis, b: Axis) -> None:
        """At least one side is a concatenation: cut both at the other's borders, unify piece by piece."""
        if a.kind != CONCAT:
            a, b = b, a
        if b.kind == CONCAT and len(_parts(b, CONCAT)) < len(_parts(a, CONCAT)):
            a, b = b, a
        rest: Axis = b
        pieces = [p.size for p in _parts(a, CONCAT)]
        mine = list(_parts(a, CONCAT))
        a.into = b
        for i, size in enumerate(pieces):
            if i == len(pieces) - 1:
                piece = rest
            else:
                piece, rest = self.cut(rest, size)
            self.unify(mine[i], piece)


# ---------------------------------------------------------------------------------- reading a finished forest


def kept(axis: Axis | None, masks: AtomMasks, size: int = 1) -> npt.NDArray[np.bool_]:
    """Which indices of `axis` stay, as a bool array, given a mask for each atom that loses some."""
    if axis is None:
        return np.ones(size, dtype=bool)
    axis = axis.find()
    if axis.kind == ATOM:
        mask = masks.get(axis)
        return np.ones(axis.size, dtype=bool) if mask is None else mask
    if axis.kind == CONCAT:
        return np.concatenate([kept(p, masks) for p in axis.parts])
    if axis.kind == RAGGED:
        return kept(axis.parts[0], masks)
    out = kept(axis.parts[0], masks)
    for part in axis.parts[1:]:
        out = (out[:, None] & kept(part, masks)[None, :]).reshape(-1)
    return out


def ordered(axis: Axis, orders: Mapping[Axis, npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """The indices of `axis` in the order in which they stand once the units of each atom stand as `orders` says."""
    axis = axis.find()
    if axis.kind == ATOM:
        return orders.get(axis, np.arange(axis.size, dtype=np.int64))
    if axis.kind == CONCAT:
        starts = np.cumsum([0, *(p.find().size for p in axis.parts)])
        return np.concatenate([ordered(p, orders) + s for p, s in zip(axis.parts, starts, strict=False)])
    out = ordered(axis.parts[0], orders)
    for part in axis.parts[1:]:
        out = (out[:, None] * part.find().size + ordered(part, orders)[None, :]).reshape(-1)
    return out


def positions(axis: Axis, atom: Axis) -> npt.NDArray[np.int64]:
    """Where the units of `atom` stand on `axis`: [units, k] int64, or [units, 0] where it does not occur."""
    axis = axis.find()
    if axis is atom:
        return np.arange(atom.size, dtype=np.int64)[:, None]
    none = np.zeros((atom.size, 0), dtype=np.int64)
    if axis.kind in (ATOM, RAGGED):
        return none
    if axis.kind == CONCAT:
        found, offset = [], 0
        for part in axis.parts:
            part = part.find()
            if part is atom or part.kind != ATOM:
                found.append(positions(part, atom) + offset)
            offset += part.size
        return np.concatenate([none, *found], axis=1)
    per_factor, inner = [], axis.size
    for part in axis.parts:
        inner //= part.find().size
        at = positions(part, atom)
        if at.shape[1]:
            outer = axis.size // (inner * part.find().size)
            grid = (
                np.arange(outer)[None, :, None, None] * (inner * part.find().size)
                + at[:, None, :, None] * inner
                + np.arange(inner)[None, None, None, :]
            )
            per_factor.append(grid.reshape(atom.size, -1))
    if len(per_factor) <= 1:
        return per_factor[0] if per_factor else none
    both = np.concatenate(per_factor, axis=1)  # an atom times itself: each unit's entries once
    return np.stack([np.unique(row) for row in both])
