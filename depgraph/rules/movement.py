"""Ops that only move entries: reshapes, transpositions, joins, cuts, shifts."""

from __future__ import annotations

import math

from ..axes.axes import Axis, concat, product
from ..axes.op_call import Dims, OpCall
from ..tracing.recorder import record_of
from .registry import rule


@rule("view", "_unsafe_view", "_reshape_alias")
def view(site: OpCall) -> Dims:
    """Dims are joined to products and split into factors, matched by position."""
    return site.regroup(site.dims(site.args[0]), site.shape)


@rule("t", "transpose", "permute", "t_", "transpose_")
def permute(site: OpCall) -> Dims:
    """Dims change places."""
    x = site.dims(site.args[0])
    if site.name in ("t", "t_"):
        return x[::-1]
    if site.name == "permute":
        return [x[d] for d in site.args[1]]
    a, b = (site.args[i] % len(x) for i in (1, 2))
    x[a], x[b] = x[b], x[a]
    return x


@rule("squeeze", "unsqueeze", "squeeze_", "unsqueeze_")
def squeeze(site: OpCall) -> Dims:
    """Dims of size 1 come and go; the others pass. Without a dim, every other one keeps two indices: it would go, too."""
    found = [a for a in site.dims(site.args[0]) if a is not None]
    if len(site.args) == 1:
        for axis in found:
            site.at_least(axis, 2)
    axes = iter(found)
    return [next(axes) if n != 1 else None for n in site.shape]


@rule("expand")
def expand(site: OpCall) -> Dims:
    """A dim of size 1 is repeated: a new axis; the others pass."""
    x = site.dims(site.args[0])
    kept = [None] * (len(site.shape) - len(x)) + x
    return [a or site.new(d) for d, a in enumerate(kept)]


@rule("expand_as", "view_as", "reshape_as")
def like(site: OpCall) -> Dims:
    """The result has the same dims as another tensor."""
    x, other = site.dims(site.args[0]), site.dims(site.args[1])
    mine = site.broadcast(x) if site.name == "expand_as" else site.regroup(x, site.shape)
    for a, b in zip(mine, other, strict=True):
        site.same(a, b)
    return other


@rule("repeat")
def repeat(site: OpCall) -> Dims:
    """Each dim is copied r times: (r, dim) row-major; the number of copies is fixed where there is a dim to copy."""
    x = site.dims(site.args[0])
    lead: Dims = [None] * (len(site.shape) - len(x))
    x = lead + x
    out: Dims = []
    for axis, n in zip(x, site.shape, strict=True):
        copies = n // (axis.size if axis else 1)
        if axis is None:
            out.append(site.new(len(out)))
        elif copies == 1:
            out.append(axis)
        else:
            out.append(product([site.fixed(copies, "numbers the copies of a repeat") or Axis(1), axis]))
    return out


@rule("repeat_interleave")
def repeat_interleave(site: OpCall) -> Dims:
    """A dim times a fixed number of copies, copies innermost."""
    x = site.dims(site.args[0])
    copies = site.arg(1, "repeats")
    dim = site.arg(2, "dim")
    if dim is None:
        return site.lock_all("is flattened and repeated")[0]
    if not isinstance(copies, int):
        site.lock(x[dim], "is repeated by a tensor of counts")
        dim %= len(x)
        return [
            site.fixed(n, "numbers repeated indices") if d == dim else x[d] for d, n in enumerate(site.shape)
        ]
    axis = x[dim % len(x)]
    inner = site.fixed(copies, "numbers the copies of a repeat")
    x[dim % len(x)] = product([a for a in (axis, inner) if a is not None]) if axis or inner else None
    return x


@rule("cat")
def cat(site: OpCall) -> Dims:
    """Dim d is the concatenation of the operands' dims; the others are the same axes."""
    operands = [n for n in site.args[0] if record_of(n).shape != (0,)]
    d = site.arg(1, "dim", 0) % len(site.shape)
    dims = [site.dims(n) for n in operands]
    sizes = [site.shape_of(n)[d] for n in operands]
    out: Dims = []
    for i in range(len(site.shape)):
        if i == d:
            out.append(site.join([x[i] for x in dims], sizes) if len(operands) > 1 else dims[0][i])
            continue
        for x in dims[1:]:
            site.same(dims[0][i], x[i])
        out.append(dims[0][i])
    return out


@rule("stack")
def stack(site: OpCall) -> Dims:
    """A new dim that stays whole; the others are the same axes."""
    operands = [site.dims(n) for n in site.args[0]]
    for x in operands[1:]:
        for a, b in zip(operands[0], x, strict=True):
            site.same(a, b)
    d = site.arg(1, "dim", 0) % len(site.shape)
    out = list(operands[0])
    out.insert(d, site.fixed(len(operands), "tells stacked tensors apart"))
    return out


@rule("unbind")
def unbind(site: OpCall) -> list[Dims]:
    """Every index of a dim becomes a tensor: the dim stays whole."""
    x = site.dims(site.args[0])
    d = site.arg(1, "dim", 0) % len(x)
    site.lock(x[d], "is taken apart index by index")
    return [x[:d] + x[d + 1 :] for _ in site.shapes]


@rule("select")
def select(site: OpCall) -> Dims:
    """One index is taken: it can't go, and as code counts indices, nor can those around it."""
    x = site.dims(site.args[0])
    d = site.args[1] % len(x)
    site.lock(x[d], "is read at a fixed index")
    return x[:d] + x[d + 1 :]


def _cut_equally(site: OpCall, x: Dims, d: int, sizes: list[int]) -> list[Dims]:
    axis = x[d]
    if axis is None:
        return [[*x[:d], site.fixed(n, "has no indices"), *x[d + 1 :]] for n in sizes]
    if len(sizes) == 1:
        return [x]
    pieces = site.algebra.segments(axis, sizes)
    for piece in pieces:
        if piece.size == 1:
            site.lock(piece, "is cut out as a dim of size 1")
    return [[*x[:d], p if p.size != 1 else None, *x[d + 1 :]] for p in pieces]


@rule("split", "chunk", "tensor_split", "unsafe_split", "hsplit", "vsplit", "dsplit")
def split(site: OpCall) -> list[Dims]:
    """Consecutive pieces of as many indices each, whose counts must stay equal."""
    x = site.dims(site.args[0])
    along = {"hsplit": min(len(x) - 1, 1), "vsplit": 0, "dsplit": 2}
    d = along.get(site.name, site.arg(2, "dim", 0)) % len(x)
    sizes = [shape[d] for shape in site.shapes]
    if isinstance(site.args[1], (list, tuple)) or site.name in ("split", "unsafe_split"):
        site.repaired(x[d])
    out = _cut_equally(site, x, d, sizes)
    if isinstance(site.args[1], (list, tuple)) or len(sizes) == 1:  # places of the cuts
        return out
    if len(set(sizes)) > 1:
        site.lock(x[d], "is split into pieces of one size and a remainder")
    elif sizes[0] > 1:
        axes = [dims[d] for dims in out]
        site.equal_counts([a for a in axes if a is not None], "is split into pieces of one size")
    return out


@rule("split_with_sizes", "unsafe_split_with_sizes", "split_with_sizes_copy")
def split_with_sizes(site: OpCall) -> list[Dims]:
    """Consecutive pieces, each of its own size."""
    x = site.dims(site.args[0])
    d = site.arg(2, "dim", 0) % len(x)
    site.repaired(x[d])
    return _cut_equally(site, x, d, [shape[d] for shape in site.shapes])


@rule("slice", "narrow_copy")
def slice_(site: OpCall) -> Dims:
    """Indices start..stop of a dim are a piece of its axis; with a step, a factor is taken where it fits."""
    x = site.dims(site.args[0])
    d = site.arg(1, "dim", 0) % len(x)
    n = site.shape_of(site.args[0])[d]
    axis = x[d]
    if site.name == "narrow_copy":
        start = site.args[2] % n
        stop, step = start + site.args[3], 1
    else:
        start, stop, step = site.arg(2, "start"), site.arg(3, "end"), site.arg(4, "step", 1)
        start, stop, _ = slice(start, stop, None).indices(n)
    if axis is None or (step == 1 and stop - start == n):
        return x
    site.repaired(axis)
    if site.shape[d] == 0:
        return [*x[:d], Axis(0), *x[d + 1 :]]
    if step > 1:
        x[d] = _stride(site, axis, start, stop, step, site.shape[d])
    else:
        x[d] = site.slice(axis, start, stop)
    return x


def _stride(site: OpCall, axis: Axis, start: int, stop: int, step: int, size: int) -> Axis | None:
    """Every step-th index: the outer factor of (outer x step), when the dim is a whole number of steps."""
    if stop != axis.size or axis.size % step or start >= step:
        site.lock(axis, "is sliced with a step")
        return site.fixed(size, "is sliced with a step")
    if axis.size == step:
        site.lock(axis, "is sliced with a step")
        return None
    outer, inner = site.algebra.factor(axis, axis.size // step)
    site.lock(inner, "is taken apart by a slice with a step")
    return outer


@rule("slice_scatter")
def slice_scatter(site: OpCall) -> Dims:
    """A run of indices of dim d is replaced by a tensor, whose dims are those of what it replaces."""
    x, source = site.dims(site.args[0]), site.dims(site.args[1])
    d = site.arg(2, "dim", 0) % len(x)
    n = site.shape_of(site.args[0])[d]
    start, stop, _ = slice(site.arg(3, "start"), site.arg(4, "end"), None).indices(n)
    if site.arg(5, "step", 1) != 1:
        raise ValueError("a step is not covered")
    if stop - start != n:
        site.repaired(x[d])
    for i, (a, b) in enumerate(zip(x, source, strict=True)):
        if i != d:
            site.same(a, b)
    piece = x[d] if stop - start == n or x[d] is None else site.slice(x[d], start, stop)
    site.same(piece, source[d])
    return x


@rule("pad", "constant_pad_nd")
def pad(site: OpCall) -> Dims:
    """Fixed segments before and after; a negative pad cuts; modes that repeat entries lock the dim."""
    x = site.dims(site.args[0])
    amounts = list(site.args[1])
    constant = site.arg(2, "mode", "constant") == "constant" or site.name == "constant_pad_nd"
    for i in range(len(amounts) // 2):
        d = len(x) - 1 - i
        before, after = amounts[2 * i], amounts[2 * i + 1]
        n, axis = site.shape_of(site.args[0])[d], x[d]
        if not (isinstance(before, int) and isinstance(after, int)):
            site.lock(axis, "is padded by a computed amount")
            x[d] = site.fixed(site.shape[d], "is padded by a computed amount")
            continue
        if not (before or after):
            continue
        if not constant:
            site.lock(axis, "is padded by its own entries")
            x[d] = site.fixed(site.shape[d], "is padded by its own entries")
            continue
        if before < 0 or after < 0:
            site.repaired(axis)
        start, stop = max(0, -before), n - max(0, -after)
        piece = site.slice(axis, start, stop) if (start, stop) != (0, n) else axis
        parts = [piece or site.fixed_segment(stop - start)]
        if before > 0:
            parts.insert(0, site.fixed_segment(before))
        if after > 0:
            parts.append(site.fixed_segment(after))
        x[d] = site.join(parts, [p.size for p in parts])
    return x


@rule("roll")
def roll(site: OpCall) -> Dims:
    """A dim is cut and its two pieces change places."""
    x = site.dims(site.args[0])
    listed = [v if isinstance(v, (list, tuple)) else [v] for v in (site.args[1], site.arg(2, "dims", ()))]
    if len(listed[1]) != len(listed[0]):
        return site.lock_all("is rolled as a whole")[0]
    for shift, d in zip(*listed, strict=True):
        axis = x[d % len(x)]
        if axis is not None and abs(shift) >= axis.size:
            site.lock(axis, "is rolled more than once around")
        if axis is not None and shift % axis.size:
            site.repaired(axis)
            left, right = site.algebra.cut(axis, axis.size - shift % axis.size)
            x[d % len(x)] = concat([right, left])
    return x


@rule("flip")
def flip(site: OpCall) -> Dims:
    """Dims are reversed: the same units in the opposite order."""
    x = site.dims(site.args[0])
    for d in site.args[1]:
        x[d % len(x)] = _reversed(site, x[d % len(x)])
    return x


def _reversed(site: OpCall, axis: Axis | None) -> Axis | None:
    if axis is None:
        return None
    turned = site.reorder(axis, range(axis.size - 1, -1, -1))
    if turned is None:
        site.lock(axis, "is reversed")
        turned = site.fixed(axis.size, "is reversed")
    return turned


@rule("rot90")
def rot90(site: OpCall) -> Dims:
    """By one or three quarters two dims change places and one of them is reversed, by two quarters both are."""
    x = site.dims(site.args[0])
    quarters, (a, b) = site.given("k") % 4, (d % len(x) for d in site.given("dims"))
    for d in {0: (), 1: (b,), 2: (a, b), 3: (a,)}[quarters]:
        x[d] = _reversed(site, x[d])
    if quarters % 2:
        x[a], x[b] = x[b], x[a]
    return x


def _space_and_depth(site: OpCall, x: Dims, r: int, unpack: bool) -> Dims:
    """Channels (c r r), positions fixed."""
    for axis in x[-2:]:
        site.lock(axis, "ranges over the positions that a pixel shuffle mixes")
    spatial = [site.fixed(n, "ranges over the positions of a pixel shuffle") for n in site.shape[-2:]]
    channel = x[-3]
    if r == 1:
        return [*x[:-3], channel, *spatial]
    if unpack:
        if site.shape[-3] == 1:
            site.lock(channel, "is turned into positions by a pixel shuffle")
            return [*x[:-3], None, *spatial]
        if channel is None:
            raise ValueError("a pixel shuffle of one channel")
        channel, inner = site.algebra.factor(channel, site.shape[-3])
        site.lock(inner, "is turned into positions by a pixel shuffle")
        return [*x[:-3], channel, *spatial]
    inner_axis = site.fixed(r * r, "numbers the positions that a pixel unshuffle turns into channels")
    return [*x[:-3], product([a for a in (channel, inner_axis) if a is not None]), *spatial]


@rule("pixel_shuffle")
def pixel_shuffle(site: OpCall) -> Dims:
    """x[n (c r r) h w] -> [n c (h r) (w r)]: c passes, the rest stays whole."""
    return _space_and_depth(site, site.dims(site.args[0]), site.args[1], unpack=True)


@rule("pixel_unshuffle")
def pixel_unshuffle(site: OpCall) -> Dims:
    """x[n c (h r) (w r)] -> [n (c r r) h w]: c passes, the rest stays whole."""
    return _space_and_depth(site, site.dims(site.args[0]), site.args[1], unpack=False)


@rule("channel_shuffle")
def channel_shuffle(site: OpCall) -> Dims:
    """x[n (g c) ...] -> [n (c g) ...]: the groups g stay whole."""
    x = site.dims(site.args[0])
    g, axis = site.args[1], x[1]
    if axis is None or g == 1:
        return x
    if g == axis.size:
        site.lock(axis, "numbers the groups of a channel shuffle")
        return x
    outer, inner = site.algebra.factor(axis, g)
    site.lock(outer, "numbers the groups of a channel shuffle")
    return [x[0], product([inner, outer]), *x[2:]]


@rule("unfold")
def unfold(site: OpCall) -> Dims:
    """Windows along a dim: its positions are mixed, and stay whole."""
    x = site.dims(site.args[0])
    d = site.args[1] % len(x)
    site.lock(x[d], "ranges over the positions that an unfold mixes")
    x[d] = site.fixed(site.shape[d], "ranges over the windows of an unfold")
    return [*x, site.fixed(site.shape[-1], "ranges over the window of an unfold")]


@rule("as_strided", "as_strided_")
def as_strided(site: OpCall) -> list[Dims]:
    """x[...] -> dims that walk through memory: those that together walk all of a dim of x are its factors, others mix positions.

    Dims whose positions are mixed stay whole. Strides repeat the sizes of the dims that lie closer in memory.
    """
    x, record = site.dims(site.args[0]), record_of(site.args[0])
    laid = sorted((-step, d) for d, step in enumerate(record.strides[0]) if record.shape[d] != 1)
    order = [d for _, d in laid]  # from the slowest to the fastest
    dense = [math.prod(record.shape[e] for e in order[i + 1 :]) for i in range(len(order))]
    sizes, steps = (list(map(int, given)) for given in site.args[1:3])
    memory = [(record.shape[d], step) for d, step in zip(order, dense, strict=True)]
    whole = [-step for step, _ in laid] == dense and not site.given("storage_offset")
    walks = _walks(memory, sizes, steps) if whole else None
    if walks is None:
        return site.lock_all(f"goes through {site.node.target}, which picks entries by position")
    out: Dims = [None] * len(sizes)
    for first, last, walking in walks:
        dims, inner, step = [x[d] for d in order[first:last]], [x[d] for d in order[last:]], dense[last - 1]
        walking.sort(key=lambda k: -steps[k])
        extents = [sizes[k] for k in walking]
        regular = [step * math.prod(extents[i + 1 :]) for i in range(len(extents))]
        if regular == [steps[k] for k in walking] and math.prod(extents) == math.prod(
            a.size for a in dims if a
        ):
            found = site.regroup(dims, extents)
        else:
            for axis in dims:
                site.lock(axis, "ranges over positions that windows in memory mix")
            found = [
                site.fixed(n, "ranges over windows in memory, or over the positions of one") for n in extents
            ]
            regular = []
        for i, k in enumerate(walking):
            out[k] = found[i]
            between = (
                found[i + 1 :]
                if regular
                else [site.fixed(steps[k] // step, "is a number of steps in memory")]
            )
            counted = product([a for a in (*between, *inner) if a is not None])
            for argument in (2, "stride"):
                site.argument_is_size_of(counted, argument, k)
    return [out]


def _walks(
    dims: list[tuple[int, int]], sizes: list[int], steps: list[int]
) -> list[tuple[int, int, list[int]]] | None:
    """(first, last, walking): which of the dims of a result walk the `dims` (size, step) of memory from `first` to `last`.

    Dims of memory are taken together where a walk goes over the end of one. None where a dim of the result repeats entries.
    """
    spans = [(i, i + 1) for i in range(len(dims))]
    while True:
        found = [
            (a, b, [k for k in range(len(sizes)) if _walked(dims, spans, sizes[k], steps[k]) == b])
            for a, b in spans
        ]
        if sum(len(walking) for *_, walking in found) != sum(n != 1 for n in sizes):
            return None
        for i, (a, b, walking) in enumerate(found):
            step = dims[b - 1][1]
            reach = sum((sizes[k] - 1) * (steps[k] // step) for k in walking)
            if reach >= math.prod(n for n, _ in dims[a:b]):
                if not i:
                    return None
                spans[i - 1 : i + 1] = [(spans[i - 1][0], b)]
                break
        else:
            return found


def _walked(dims: list[tuple[int, int]], spans: list[tuple[int, int]], size: int, step: int) -> int | None:
    """The end of the slowest span whose steps add up to `step`; None of a dim of one entry, or one that repeats entries."""
    fitting = [b for _, b in spans if step >= dims[b - 1][1] and step % dims[b - 1][1] == 0]
    return fitting[0] if size != 1 and step > 0 and fitting else None


@rule("trace")
def by_position(site: OpCall) -> list[Dims]:
    """Entries are picked by position: all dims stay whole."""
    return site.lock_all(f"goes through {site.node.target}, which picks entries by position")


@rule("diag_embed")
def diag_embed(site: OpCall) -> Dims:
    """x[... i] -> [... i i]: both dims are the axis that was one."""
    x = site.dims(site.args[0])
    d, e = (site.given(name) % len(site.shape) for name in ("dim1", "dim2"))
    if site.given("offset"):
        return site.lock_all("is laid out beside a diagonal")[0]
    rest = iter(x[:-1])
    return [x[-1] if i in (d, e) else next(rest) for i in range(len(site.shape))]


@rule("diagonal")
def diagonal(site: OpCall) -> Dims:
    """x[... i i] -> [... i]: both dims are the same axis."""
    x = site.dims(site.args[0])
    d, e = site.arg(2, "dim1", 0) % len(x), site.arg(3, "dim2", 1) % len(x)
    if site.arg(1, "offset", 0) or x[d] is None or x[e] is None or x[d].size != x[e].size:
        return site.lock_all("is read along a diagonal")[0]
    site.same(x[d], x[e])
    return [*(a for i, a in enumerate(x) if i not in (d, e)), x[d]]


@rule("broadcast_tensors")
def broadcast_tensors(site: OpCall) -> list[Dims]:
    """Every operand takes the shape of all: aligned dims are the same axis."""
    out = site.broadcast(*(site.dims(n) for n in site.args[0]))
    return [list(out) for _ in site.shapes]


@rule("meshgrid")
def meshgrid(site: OpCall) -> list[Dims]:
    """[i], [j] ... -> [i j ...] each ("xy": [j i ...])."""
    out = [site.dims(n)[0] if site.shape_of(n) else None for n in site.args[0]]
    if site.arg(1, "indexing") == "xy" and len(out) > 1:
        out[0], out[1] = out[1], out[0]
    return [list(out) for _ in site.shapes]
