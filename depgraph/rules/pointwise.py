"""Ops that work entry by entry: operands broadcast, aligned dims are the same axis."""

from __future__ import annotations

from ..axes.op_call import Dims, OpCall
from .registry import rule

# Not tagged as pointwise by torch, and pointwise all the same.
ALSO = (
    "copy", "_to_copy", "clone", "detach", "alias", "lift_fresh", "lift", "native_dropout",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like", "bernoulli",
    "fill", "zero", "uniform", "normal", "exponential", "masked_fill", "nan_to_num", "where", "_conj", "clamp", "lerp",
    "addcmul", "addcdiv", "rrelu_with_noise", "_prelu_kernel", "log_sigmoid_forward", "native_dropout_backward", "_assert_async",
    "softplus_backward", "silu_backward", "gelu_backward", "elu_backward", "leaky_relu_backward", "hardtanh_backward",
    "hardswish_backward", "hardsigmoid_backward", "threshold_backward", "tanh_backward", "sigmoid_backward",
    "log_sigmoid_backward", "softshrink_backward", "hardshrink_backward", "logit_backward",
    "prims::add", "prims::sub", "prims::mul", "prims::div", "prims::neg",  # what forward derivatives are written in
    "polar", "complex", "hardswish", "hardsigmoid", "hardtanh", "mish", "softplus", "geometric", "log_normal",
    "feature_dropout", "alpha_dropout", "poisson", "binomial", "_standard_gamma", "cauchy", "random",
)  # fmt: skip


@rule("pointwise", *ALSO)
def pointwise(site: OpCall) -> list[Dims]:
    """Every operand's dims, aligned at the last one, are those of the result; size 1 broadcasts."""
    operands = [site.dims(n) for n in site.node.all_input_nodes]
    if not site.shapes:  # an assertion
        return []
    if not operands:
        return [noise(site)]
    out = site.broadcast(*operands)
    return [out if shape == site.shape else [site.fresh(n) for n in shape] for shape in site.shapes]


@rule("bucketize")
def bucketize(site: OpCall) -> Dims:
    """Each entry becomes the number of the bucket that it falls into: dims pass, the borders stay whole."""
    *values, borders = site.node.all_input_nodes
    for axis in site.dims(borders):
        site.lock(axis, "separates buckets, which are numbered")
    return site.dims(values[0]) if values else []


@rule("mse_loss", "smooth_l1_loss")
def loss(site: OpCall) -> Dims:
    """Losses over matching entries: aligned dims are the same axis, and a reduced result has none."""
    shapes = [site.shape_of(n) for n in site.node.all_input_nodes]
    full = max(shapes, key=len)
    out = site.broadcast(*(site.dims(n) for n in site.node.all_input_nodes), size=full)
    if len(site.shape) == len(full):
        return out
    site.statistic(*out)
    return []


@rule("glu")
def glu(site: OpCall) -> Dims:
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
def triangle(site: OpCall) -> Dims:
    """What is kept depends on the positions in the last two dims, which stay whole."""
    x = site.dims(site.args[0])
    for axis in x[-2:]:
        site.lock(axis, "is masked by position (a triangle)")
    return x


@rule("view_as_real")
def view_as_real(site: OpCall) -> Dims:
    """Complex numbers become a last dim of two."""
    return [*site.dims(site.args[0]), site.fixed(2, "holds the real and the imaginary part")]


@rule("view_as_complex")
def view_as_complex(site: OpCall) -> Dims:
    """A last dim of two becomes complex numbers."""
    *rest, last = site.dims(site.args[0])
    site.lock(last, "holds the real and the imaginary part")
    return rest


@rule("scalar_tensor", "zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full",
      "empty_strided", "new_empty_strided", "empty_permuted", "_efficientzerotensor")  # fmt: skip
def filled(site: OpCall) -> Dims:
    """A new tensor with one value everywhere: its axes are new, and what is written into it says what they are."""
    site.state.filled.add(site.node)
    return [site.new(d) for d in range(len(site.shape))]


@rule("rand", "randn")
def noise(site: OpCall) -> Dims:
    """Numbers drawn at random, independently: one is as good as another, so any of them may go."""
    return [site.new(d) for d in range(len(site.shape))]


@rule("arange", "linspace", "randint", "eye", "randperm", "logspace", "hann_window", "tril_indices",
      "triu_indices", "bartlett_window", "hamming_window", "kaiser_window")  # fmt: skip
def positional(site: OpCall) -> Dims:
    """A new tensor whose values depend on the position: nothing of it can go."""
    for argument in site.node.all_input_nodes:
        for axis in site.dims(argument):
            site.lock(axis, f"goes into {site.node.target}")
    return [site.fixed(n, "ranges over positions that the code numbers") for n in site.shape]


@rule("_local_scalar_dense", "equal", "is_same_size", "allclose")
def to_python(site: OpCall) -> list[Dims]:
    """The result is a Python number; tensors that are compared have the same axes."""
    shapes = [site.shape_of(n) for n in site.node.all_input_nodes]
    if len(set(shapes)) == 1:
        site.broadcast(*(site.dims(n) for n in site.node.all_input_nodes), size=shapes[0])
    return []
