"""Derivatives that torch has ops of its own for: a gradient has the dims of what it is the gradient of."""

from __future__ import annotations

from ..axes.axes import concat
from ..axes.op_call import Dims, OpCall
from .registry import rule

# Op -> the arguments that its results are the gradients of, by their names in the schema.
OF = {
    "native_layer_norm_backward": ("input", "weight", "bias"),
    "_fused_rms_norm_backward": ("input", "weight"),
    "native_group_norm_backward": ("input", "weight", "weight"),
    "native_batch_norm_backward": ("input", "weight", "weight"),
    "_softmax_backward_data": ("output",),
    "_log_softmax_backward_data": ("output",),
    "_scaled_dot_product_flash_attention_for_cpu_backward": ("query", "key", "value"),
    "_scaled_dot_product_flash_attention_backward": ("query", "key", "value"),
    "_scaled_dot_product_efficient_attention_backward": ("query", "key", "value", "attn_bias"),
    "max_pool2d_with_indices_backward": ("self",),
    "max_pool3d_with_indices_backward": ("self",),
    "avg_pool2d_backward": ("self",),
    "avg_pool3d_backward": ("self",),
    "_adaptive_avg_pool2d_backward": ("self",),
    "_adaptive_avg_pool3d_backward": ("self",),
    "adaptive_max_pool2d_backward": ("self",),
}
NORMS = ("native_layer_norm_backward", "_fused_rms_norm_backward")


@rule(*OF)
def gradient(site: OpCall) -> list[Dims]:
    """Each result has the dims of the argument that it is the gradient of; where all of an op keeps its dims, so do theirs."""
    asked = site.given("output_mask", site.given("grad_input_mask", (True,) * len(OF[site.name])))
    of = [site.given(name) for name, yes in zip(OF[site.name], asked, strict=True) if yes]
    first = site.dims(of[0]) if of else []
    given = site.dims(site.args[0])
    if site.shape_of(site.args[0]) == site.shape_of(site.given(OF[site.name][0])):
        for a, b in zip(given, site.dims(site.given(OF[site.name][0])), strict=True):
            site.same(a, b)
    else:
        for a, b in zip(given[:2], first[:2], strict=False):
            site.same(a, b)
    if site.name in NORMS:
        site.statistic(*site.dims(site.given("input"))[-len(site.given("normalized_shape")) :])
    elif site.name.endswith("softmax_backward_data") and given:
        site.statistic(given[site.given("dim") % len(given)])
    return [site.dims(argument) for argument in of if argument is not None]


@rule("convolution_backward")
def convolution_gradient(site: OpCall) -> list[Dims]:
    """The gradients of a convolution's input, weight and bias have their dims."""
    gradients = [site.dims(site.args[1]), site.dims(site.args[2]), site.dims(site.args[0])[1:2]]
    return [dims for dims, asked in zip(gradients, site.given("output_mask"), strict=True) if asked]


@rule("embedding_dense_backward")
def embedding_gradient(site: OpCall) -> Dims:
    """gradient[... c], index[...] -> [v c]: the rows v stay whole."""
    rows = site.fixed(site.shape[0], "is looked up by number (rows of an embedding)")
    return [rows, site.dims(site.args[0])[-1]]


@rule("slice_backward", "select_backward")
def piece_gradient(site: OpCall) -> Dims:
    """The gradient of what a piece of a dim was cut from: zeros before and behind it; the other dims pass."""
    x, d = site.dims(site.args[0]), site.given("dim") % len(site.shape)
    size = site.shape[d]
    if site.name == "select_backward":
        return [*x[:d], site.fixed(size, "is read at a fixed index"), *x[d:]]
    start, stop, step = slice(site.args[3], site.args[4], site.args[5]).indices(size)
    if step != 1:
        site.lock(x[d], "is sliced with a step")
        x[d] = site.fixed(size, "is sliced with a step")
    elif stop - start != size:
        parts = [site.fresh(start) if start else None, x[d], site.fresh(size - stop) if stop < size else None]
        lengths = [start, stop - start, size - stop]
        x[d] = concat([p or site.fixed_segment(n) for p, n in zip(parts, lengths, strict=True) if n])
    return x


RESAMPLED = {
    "nearest1d": 1,
    "linear1d": 1,
    "nearest2d": 2,
    "bilinear2d": 2,
    "bicubic2d": 2,
    "nearest3d": 3,
    "trilinear3d": 3,
}


@rule(*(f"upsample_{mode}_backward" for mode in RESAMPLED))
def resampled_gradient(site: OpCall) -> Dims:
    """Leading dims (batch, channels) pass; the positions in the others stay whole."""
    count = RESAMPLED[site.name.removeprefix("upsample_").removesuffix("_backward")]
    found = [site.fixed(n, "ranges over positions that are resampled") for n in site.shape[-count:]]
    return [*site.dims(site.args[0])[:-count], *found]
