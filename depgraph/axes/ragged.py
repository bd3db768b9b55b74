"""Ragged axes: a dim that ranges over another axis in each equal block of dim 0.

There is one such dim: the input side of a grouped convolution's weight, ``[(groups outputs), inputs of a group, ...]``.
Row block b multiplies the channels of group b, so its columns are those channels: as many in each block, but other ones.
In the algebra that is an axis of kind `RAGGED` whose parts are the axes of the blocks, and `over` the axis of dim 0
that the blocks are parts of. It can stand only where the blocks do; anywhere else, and wherever an op splits it or
sees it as an ordinary dim, it is collapsed: all blocks then lose the same positions (`Algebra.collapse`).

Whoever meets an axis that may be ragged asks here: what its blocks are, how many indices it has, what of it is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .axes import PRODUCT, RAGGED, AtomMasks, Axis, kept

Indices = npt.NDArray[np.int64]


def ragged(blocks: Sequence[Axis], over: Axis) -> Axis:
    """The axis that is ``blocks[b]`` in block b of the dim that ranges over `over`."""
    axis = Axis(blocks[0].size, RAGGED, tuple(blocks))
    axis.over = over
    return axis


def is_ragged(axis: Axis | None) -> bool:
    """Whether `axis` is another one in each block."""
    return axis is not None and axis.find().kind == RAGGED


def one_block(axis: Axis) -> Axis:
    """The axis of the first block: as all keep equally many indices, its count is that of the ragged axis."""
    return axis.find().parts[0]


def pieces(axis: Axis, rows: int) -> list[tuple[Axis, tuple[int, int] | None]]:
    """The axes that a dim ranges over, each with the `rows` (first, behind the last) of dim 0 where that is so; None: in all."""
    axis = axis.find()
    if axis.kind != RAGGED:
        return [(axis, None)]
    height = rows // len(axis.parts)
    return [(part.find(), (b * height, (b + 1) * height)) for b, part in enumerate(axis.parts)]


def block_count(axis: Axis | None) -> int:
    """In how many blocks a dim ranges over an axis of its own: 1 where it is not ragged."""
    return len(axis.find().parts) if axis is not None and is_ragged(axis) else 1


def kept_by_block(axis: Axis, masks: AtomMasks) -> list[Indices] | None:
    """The kept indices of a ragged axis in each block; None where all stay. `masks` as for `kept`."""
    found = [kept(part, masks) for part in axis.find().parts]
    return None if all(mask.all() for mask in found) else [np.flatnonzero(mask) for mask in found]


def misplaced(dims: Sequence[Axis | None], axis: Axis, parameter: bool) -> bool:
    """Whether in `axis`, one of `dims`, a ragged one stands where its blocks don't.

    In a `parameter` dim 0 must hold the blocks, and the ragged axis be a dim by itself; elsewhere some dim must.
    """

    def fits(found: Axis) -> bool:
        over = found.over.find() if found.over is not None else None
        beside = [a for a in (dims[:1] if parameter else dims) if a is not None and a.find() is over]
        return bool(beside) and (axis.find() is found or not parameter)

    return not all(map(fits, _inside(axis)))


def _inside(axis: Axis) -> list[Axis]:
    axis = axis.find()
    if axis.kind == RAGGED:
        return [axis]
    return [] if axis.kind != PRODUCT else [r for part in axis.parts for r in _inside(part)]
