"""Ops that work entry by entry: operands broadcast, aligned dims are the same axis."""

from __future__ import annotations

from ..propagate import Dims, Site
from .registry import rule

# Not tagged as pointwise by torch, and pointwise all the same.
ALSO = (
    "copy", "_to_copy", "clone", "contiguous", "detach", "alias", "lift_fresh", "lift", "native_dropout", "dropout",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like", "bernoulli",
    "fill", "zero", "uniform", "normal", "exponential", "masked_fill", "nan_to_num", "where", "_conj", "resolve_conj",
    "real", "imag", "clamp", "clip", "lerp", "addcmul", "addcdiv", "rrelu_with_noise", "feature_dropout", "type_as",
    "log_sigmoid_forward", "bucketize", "fake_quantize_per_tensor_affine", "mse_loss",
    "smooth_l1_loss", "l1_loss", "native_dropout_backward", "to", "_assert_async", "prelu", "_prelu_kernel",
    "polar", "complex", "hardswish", "hardsigmoid", "hardtanh", "mish", "log_sigmoid", "softplus", "_fused_moving_avg_obs_fq_helper", "geometric", "log_normal", "isclose",
)  # fmt: skip


@rule("pointwise", *ALSO)
def pointwise(site: Site) -> list[Dims]:
    """Every operand's dims, aligned at the last one, are those of the result; size 1 broadcasts."""
    operands = [site.dims(n) for n in site.node.all_input_nodes]
    out = site.broadcast(*operands)
    return [out if shape == site.shape else [site.fresh(n) for n in shape] for shape in site.shapes]


REDUCED_LOSSES = ("mse_loss", "smooth_l1_loss", "l1_loss")


@rule(*REDUCED_LOSSES)
def loss(site: Site) -> Dims:
    """Losses over matching entries: their axes are compared one to one, a reduced result has no dims."""
    shapes = [site.shape_of(n) for n in site.node.all_input_nodes]
    full = max(shapes, key=len)
    out = site.broadcast(*(site.dims(n) for n in site.node.all_input_nodes), size=full)
    if len(site.shape) == len(full):
        return out
    site.statistic(*out)
    return []


@rule("prelu", "_prelu_kernel")
def prelu(site: Site) -> Dims:
    """x[n c ...], weight[c] or weight[1] -> [n c ...]."""
    x = site.dims(site.args[0])
    weight = site.dims(site.args[1])
    axes = [a for a in weight if a is not None]
    if axes:
        site.same(axes[0], x[1] if len(x) > 1 else x[0])
    return x


@rule("glu")
def glu(site: Site) -> Dims:
    """A dim is cut in two halves which are the same axis."""
    x = site.dims(site.args[0])
    d = site.arg(1, "dim", -1) % len(x)
    axis = x[d]
    if axis is None:
        return x
    left, right = site.algebra.cut(axis, axis.size // 2)
    site.same(left, right)
    x[d] = left if left.size > 1 else None
    if left.size == 1:
        site.lock(left, "is gated in two halves of one index")
    return x


@rule("tril", "triu")
def triangle(site: Site) -> Dims:
    """What is kept depends on the positions in the last two dims."""
    x = site.dims(site.args[0])
    for axis in x[-2:]:
        site.lock(axis, "is masked by position (a triangle)")
    return x


@rule("view_as_real")
def view_as_real(site: Site) -> Dims:
    """Complex numbers become a last dim of two."""
    return [*site.dims(site.args[0]), site.fixed(2, "holds the real and the imaginary part")]


@rule("view_as_complex")
def view_as_complex(site: Site) -> Dims:
    """A last dim of two becomes complex numbers."""
    *rest, last = site.dims(site.args[0])
    site.lock(last, "holds the real and the imaginary part")
    return rest


@rule("scalar_tensor", "zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full",
      "empty_strided", "new_empty_strided", "empty_permuted")  # fmt: skip
def filled(site: Site) -> Dims:
    """A new tensor with one value everywhere: its axes are new, and what is written into it says what they are."""
    site.state.filled.add(site.node)
    return [site.new(d) for d in range(len(site.shape))]


@rule("arange", "linspace", "randn", "rand", "randint", "eye", "randperm", "logspace", "hann_window", "tril_indices",
      "triu_indices", "bartlett_window", "hamming_window", "kaiser_window")  # fmt: skip
def positional(site: Site) -> Dims:
    """A new tensor whose values depend on the position: nothing of it can go."""
    for argument in site.node.all_input_nodes:
        for axis in site.dims(argument):
            site.lock(axis, f"goes into {site.node.target}")
    return [site.fixed(n, "ranges over positions that the code numbers") for n in site.shape]


@rule("item", "_local_scalar_dense", "is_nonzero", "equal", "is_same_size", "allclose")
def to_python(site: Site) -> list[Dims]:
    """Leaves the graph as a Python number."""
    return []
