"""Convolutions, and ops over the spatial dims that keep channels."""

from __future__ import annotations

from ..axes.axes import Axis, product
from ..axes.op_call import Dims, OpCall
from ..axes.ragged import ragged
from .registry import rule


@rule("convolution", "_convolution", "convolution_overrideable")
def convolution(site: OpCall) -> Dims:
    """x[n (g i) ...], weight[(g o) i ...], bias[(g o)] -> [n (g o) ...]; transposed: weight[(g i) o ...].

    One group contracts i. With one channel a group on either side the groups themselves are the axis (depthwise, with
    a multiplier). Otherwise each block of channels has its own best ones: only their counts must agree.
    """
    x, w = site.dims(site.args[0]), site.dims(site.args[1])
    bias = site.args[2]
    groups, transposed = site.args[8], site.args[6]
    batch = len(x) == len(w)
    c = 1 if batch else 0
    mixed = [w[2 + i] is not None or site.args[3][i] != 1 or site.args[4][i] != 0 for i in range(len(w) - 2)]
    for axis in (*(a for a, m in zip(x[c + 1 :], mixed, strict=True) if m), *w[2:]):
        site.lock(axis, "ranges over the positions that a convolution mixes")
    n_in, n_out = site.shape_of(site.args[0])[c], site.shape[c]
    near, far = (w[0], w[1]) if not transposed else (w[1], w[0])  # near: output side of the weight
    if groups == 1:
        site.same(x[c], far)
        site.contract(far)
        out, consumed = near, far
    else:
        out, consumed = _grouped(site, x[c], near, far, (n_in, n_out, groups), transposed)
    spatial = [
        site.fixed(n, "ranges over the output of a convolution") if m else a
        for n, m, a in zip(site.shape[c + 1 :], mixed, x[c + 1 :], strict=True)
    ]
    if bias is not None:
        site.same(site.dims(bias)[0], out)
    site.weight(site.args[1], [out], [consumed], site.args[0])
    inner = w[1]
    per_position = spatial if not transposed else x[c + 1 :]
    site.macs(*x[:c], out if not transposed else x[c], inner, *w[2:], *per_position)
    return [*x[:c], out, *spatial]


def _grouped(
    site: OpCall,
    x: Axis | None,
    near: Axis | None,
    far: Axis | None,
    sizes: tuple[int, int, int],
    transposed: bool,
) -> tuple[Axis | None, Axis | None]:
    """(output axis, consumed axis) of a grouped convolution; the weight's dim 0 holds the groups."""
    n_in, n_out, groups = sizes
    i, o = n_in // groups, n_out // groups
    whole, inner = (near, far) if not transposed else (far, near)  # weight dim 0, weight dim 1
    if i == 1 or o == 1:
        group = Axis(groups)
        site.argument_is_size_of(group, 6)
        site.repaired(group)
        parts = {n: product([group, Axis(n)]) if n > 1 else group for n in {i, o}}
        site.same(x, parts[i])
        out = parts[o]
        site.same(whole, parts[o] if not transposed else parts[i])
        factor = parts[i if not transposed else o]
        if inner is not None:
            site.same(inner, factor.find().parts[1])
        return out, x
    text = "every group of a convolution needs equally many channels"
    if x is None or whole is None:
        raise ValueError("a grouped convolution over one channel")
    inputs = site.algebra.segments(x, [i] * groups)
    if not transposed:
        outputs = site.algebra.segments(whole, [o] * groups)
        blocks = inputs
        out = whole
    else:
        site.same(whole, x)
        out = Axis(n_out)
        outputs = blocks = site.algebra.segments(out, [o] * groups)
    site.algebra.unify(inner, ragged(blocks, whole))
    site.contract(*inputs)
    site.equal_counts(inputs, text)
    site.equal_counts(outputs, text)
    return out, x


@rule("*::deform_conv2d")
def deformed_convolution(site: OpCall) -> Dims:
    """x[n i ...], weight[o i ...], bias[o], offsets and mask [n ...] -> [n o ...]: the places it samples stay whole.

    Of several groups, of the weight or of the offsets, all lose the same channels; with one channel each, they are the channels.
    """
    x, w, offset, mask, bias = (
        [] if not hasattr(a, "op") else site.dims(a) for a in site.named("input weight offset mask bias")
    )
    groups, offset_groups = site.named("groups offset_groups")
    text = "ranges over the positions that a convolution mixes"
    for axis in (*x[2:], *w[2:], *offset[1:], *mask[1:]):
        site.lock(axis, text)
    for other in (offset, mask):
        for a, b in zip(x[:1], other, strict=False):
            site.same(a, b)
    out = w[0]
    site.broadcast(bias, [out], size=site.shape[1:2])
    if groups == 1:
        site.same(x[1], w[1])
    elif x[1] is not None and out is not None and groups == x[1].size == out.size:
        site.same(x[1], out)
        names = [a.name for a in site.node.target._schema.arguments]
        site.argument_is_size_of(out, names.index("groups"))
    else:
        site.same(_in_groups(site, x[1], groups), w[1])
        _in_groups(site, out, groups)
    if offset_groups != 1:
        _in_groups(site, x[1], offset_groups)
    site.contract(x[1])
    spatial = [site.fixed(n, "ranges over the output of a convolution") for n in site.shape[2:]]
    site.weight(site.given("weight"), [out], [w[1]], site.given("input"))
    site.macs(x[0], out, *w[1:], *spatial)
    return [x[0], out, *spatial]


def _in_groups(site: OpCall, axis: Axis | None, groups: int) -> Axis | None:
    """What an axis of channels has in each of its groups, which stay."""
    text = "numbers the groups of a deformed convolution"
    if axis is None or axis.size == groups:
        site.lock(axis, text)
        return None
    outer, inner = site.algebra.factor(axis, groups)
    site.lock(outer, text)
    return inner


@rule("*::roi_align", "*::roi_pool")
def pooled_regions(site: OpCall) -> list[Dims]:
    """x[n c h w], regions[k 5] -> [k c ...]: channels pass, the places that are sampled stay whole."""
    x, regions = (site.dims(a) for a in site.named("input rois"))
    for axis in (x[0], *x[2:], *regions[1:]):
        site.lock(axis, "ranges over the positions that a sampling mixes")
    return [
        [regions[0], x[1], *(site.fixed(n, "ranges over the output of a pooling") for n in shape[2:])]
        for shape in site.shapes
    ]


# Ops over the last dims: leading dims stay, the others are positions.
SPATIAL = {
    1: ("upsample_nearest1d", "upsample_linear1d", "_upsample_nearest_exact1d", "reflection_pad1d",
        "replication_pad1d"),
    2: ("avg_pool2d", "_adaptive_avg_pool2d", "max_pool2d_with_indices", "adaptive_max_pool2d",
        "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d",
        "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "reflection_pad2d", "replication_pad2d",
        "fractional_max_pool2d", "max_unpool2d"),
    3: ("avg_pool3d", "_adaptive_avg_pool3d", "max_pool3d_with_indices", "adaptive_max_pool3d",
        "upsample_nearest3d", "upsample_trilinear3d", "_upsample_nearest_exact3d", "reflection_pad3d",
        "replication_pad3d", "fractional_max_pool3d", "max_unpool3d"),
}  # fmt: skip


def _spatial(count: int) -> None:
    @rule(*SPATIAL[count])
    def spatial(site: OpCall) -> list[Dims]:
        """Leading dims (batch, channels) pass; the positions in the others are mixed, and stay whole."""
        x = site.dims(site.args[0])
        for axis in x[-count:]:
            site.lock(axis, "ranges over the positions that a pooling or resampling mixes")
        out = x[:-count]
        for other in site.node.all_input_nodes[
            1:
        ]:  # the indices of an unpooling, the samples of a random pooling
            for a, b in zip(out, site.dims(other), strict=False):
                site.same(a, b)
            for axis in site.dims(other)[len(out) :]:
                site.lock(axis, "ranges over the positions that a pooling or resampling mixes")
        return [
            [*out, *(site.fixed(n, "ranges over the output of a pooling") for n in shape[-count:])]
            for shape in site.shapes
        ]


for _count in SPATIAL:
    _spatial(_count)


@rule("grid_sampler_2d", "grid_sampler_3d")
def grid_sample(site: OpCall) -> Dims:
    """x[n c ...], grid[n ... d] -> [n c ...]: channels pass, and so do the places where x is sampled."""
    x, grid = site.dims(site.args[0]), site.dims(site.args[1])
    site.same(x[0], grid[0])
    for axis in (*x[2:], grid[-1]):
        site.lock(axis, "ranges over the positions that a sampling mixes")
    return [*x[:2], *grid[1:-1]]


@rule("im2col")
def im2col(site: OpCall) -> Dims:
    """x[n c h w] -> [n (c kh kw) l]: channels pass, positions and window stay whole."""
    x = site.dims(site.args[0])
    kernel = site.args[1]
    for axis in x[-2:]:
        site.lock(axis, "ranges over the positions that an unfold mixes")
    window = site.fixed(kernel[0] * kernel[1], "ranges over the window of an unfold")
    channel = x[-3]
    joined = product([a for a in (channel, window) if a is not None]) if channel or window else None
    return [*x[:-3], joined, site.fixed(site.shape[-1], "ranges over the positions of an unfold")]


@rule("col2im")
def col2im(site: OpCall) -> Dims:
    """x[n (c kh kw) l] -> [n c h w]: channels pass, positions and window stay whole."""
    x = site.dims(site.args[0])
    kernel = site.args[2]
    n = kernel[0] * kernel[1]
    axis = x[-2]
    site.lock(x[-1], "ranges over the positions of a fold")
    channels = site.shape[-3]
    if axis is not None and channels > 1 and n > 1:
        axis, window = site.algebra.factor(axis, channels)
        site.lock(window, "ranges over the window of a fold")
    elif channels == 1:
        site.lock(axis, "ranges over the window of a fold")
        axis = None
    return [*x[:-2], axis, *(site.fixed(k, "ranges over the positions of a fold") for k in site.shape[-2:])]
