"""What a pruned model must compute, said without any of depgraph's code.

The oracle reads one thing of a plan: `plan.mask(name)`, True where an entry of a parameter or buffer stays. It zeroes
the other entries and runs the original under a mode that keeps one promise about every tensor of the run:

    an element is exactly 0  <=>  it is dead (it does not exist in the smaller model).

* A live zero (a ReLU, a padding, position 0 of a table) is written as `tiny`, too small to change any result.
* A pointwise result is dead where an operand is dead, so sigmoid(0) = 0.5 or x - mean(x) revive nothing.
* A statistic (mean, variance, norm, softmax, maximum ...) is taken over live elements only.

Every other op (convolution, matmul, view, cat, index ...) keeps the promise by itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

aten = torch.ops.aten


def newer(name: str, function: Any) -> dict[Any, Any]:
    """A row of a table of ops, of one that older versions of torch lack."""
    return {getattr(aten, name).default: function} if hasattr(aten, name) else {}


# --- live zeros -------------------------------------------------------------------------------------------------


def is_inexact(value: Any) -> bool:
    """True for dense floating-point and complex tensors, the only ones that hold values of channels."""
    dense = isinstance(value, Tensor) and value.layout is torch.strided
    return dense and (value.is_floating_point() or value.is_complex())


def tiny(x: Tensor) -> float:
    """A number that is not 0, whose square is not 0, and that changes no sum of ordinary numbers."""
    return 1e-150 if x.dtype in (torch.float64, torch.complex128) else 1e-18


def mark_live_(x: Any, live: Tensor | bool = True) -> Any:
    """Write the zeros of `x` at `live` elements as tiny, in place."""
    if is_inexact(x) and x.numel():
        x.masked_fill_((x == 0) & live, tiny(x))
    return x


def true_zeros(x: Any) -> Any:
    """`x` with its tiny elements as the zeros they stand for."""
    return x.masked_fill(x.abs() <= 1e9 * tiny(x), 0) if is_inexact(x) else x


# --- statistics over live elements ------------------------------------------------------------------------------


def count(x: Tensor, dim, keepdim: bool) -> Tensor:
    return (x != 0).to(x.real.dtype).sum(dim, keepdim)


def all_dims(x: Tensor, dim) -> list[int]:
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(x.dim()))
    return [dim] if isinstance(dim, int) else list(dim)


def mean(x: Tensor, dim=None, keepdim: bool = False, *, dtype=None) -> Tensor:
    x, dim = x.to(dtype or x.dtype), all_dims(x, dim)
    n = count(x, dim, keepdim)
    return mark_live_(x.sum(dim, keepdim) / n.clamp(min=1), n > 0)


def variance(x: Tensor, dim=None, *, correction=1, keepdim: bool = False) -> Tensor:
    dim, correction = all_dims(x, dim), 1 if correction is None else correction
    centred = (x - mean(x, dim, True)).masked_fill(x == 0, 0)
    n = count(x, dim, keepdim)
    return mark_live_(centred.square().sum(dim, keepdim) / (n - correction).clamp(min=1e-9), n > 0)


def deviation(x: Tensor, dim=None, *, correction=1, keepdim: bool = False) -> Tensor:
    return variance(x, dim, correction=correction, keepdim=keepdim).sqrt()


def variance_and_mean(x: Tensor, dim=None, *, correction=1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return variance(x, dim, correction=correction, keepdim=keepdim), mean(x, dim, keepdim)


def deviation_and_mean(x: Tensor, dim=None, *, correction=1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return deviation(x, dim, correction=correction, keepdim=keepdim), mean(x, dim, keepdim)


def normalised(x: Tensor, dim, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Zero mean and unit variance of live elements over `dim`; dead ones stay 0. Also the mean and 1 / deviation."""
    centre, scale = mean(x, dim, True), (variance(x, dim, correction=0, keepdim=True) + eps).rsqrt()
    return mark_live_(((x - centre) * scale).masked_fill(x == 0, 0), x != 0), centre, scale


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def layer_norm(x, shape, weight, bias, eps):
    out, centre, scale = normalised(x, list(range(-len(shape), 0)), eps)
    return affine(out, weight, bias), centre, scale


def rms_norm(x, shape, weight, eps=None):
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scale = (mean(x.square(), list(range(-len(shape), 0)), True) + eps).rsqrt()
    return affine(x * scale, weight, None), scale


def group_norm(x, weight, bias, n, c, pixels, groups, eps):
    out, centre, scale = normalised(x.reshape(n, groups, -1), -1, eps)
    per_channel = [1, c] + [1] * (x.dim() - 2)
    weight, bias = (None if t is None else t.view(per_channel) for t in (weight, bias))
    return affine(out.view(x.shape), weight, bias), centre.view(n, groups), scale.view(n, groups)


def batch_norm_in_training(x, weight, bias, eps):
    dims = [d for d in range(x.dim()) if d != 1]
    out, centre, scale = normalised(x, dims, eps)
    per_channel = [1, -1] + [1] * (x.dim() - 2)
    weight, bias = (None if t is None else t.view(per_channel) for t in (weight, bias))
    return affine(out, weight, bias), centre.flatten(), scale.flatten()


def legit_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps):
    if training:
        return batch_norm_in_training(x, weight, bias, eps)
    return aten.native_batch_norm(x, weight, bias, running_mean, running_var, False, momentum, eps)


def stateless_batch_norm(x, weight, bias, training, momentum, eps):
    return batch_norm_in_training(x, weight, bias, eps)


def without_dead(x: Tensor) -> Tensor:
    return x.masked_fill(x == 0, -math.inf)


def softmax(x, dim, half_to_float=False):
    return mark_live_(without_dead(x).softmax(dim).nan_to_num(0), x != 0)


def log_softmax(x, dim, half_to_float=False):
    return mark_live_(without_dead(x).log_softmax(dim).masked_fill(x == 0, 0), x != 0)


def logsumexp(x, dim, keepdim=False):
    return without_dead(x).logsumexp(dim, keepdim).nan_to_num(neginf=0)


def maximum(x, dim=(), keepdim=False):
    if not is_inexact(x):
        return x.amax(all_dims(x, dim), keepdim)
    out = without_dead(x).amax(all_dims(x, dim), keepdim)
    return out.masked_fill(out == -math.inf, 0)


def minimum(x, dim=(), keepdim=False):
    return -maximum(-x, dim, keepdim)


def minimum_and_maximum(x, *, dim=None, keepdim=False):
    return minimum(x, dim, keepdim), maximum(x, dim, keepdim)


def product(x, dim=None, keepdim=False, *, dtype=None):
    dims = all_dims(x, dim)
    out = x.masked_fill(x == 0, 1).prod() if dim is None else x.masked_fill(x == 0, 1).prod(dim, keepdim)
    return out.masked_fill(count(x, dims, keepdim and dim is not None) == 0, 0)


def every(x, dim=None, keepdim=False):
    alive = (x == 0) | (true_zeros(x.clone()) != 0) if is_inexact(x) else x != 0
    return alive.all() if dim is None else alive.all(dim, keepdim)


def median(x):
    return x[x != 0].median()


def squared_loss(x, y, reduction=1):
    loss = ((x - y) ** 2).masked_fill((x == 0) | (y == 0), 0)
    return mean(loss) if reduction == 1 else loss.sum() if reduction == 2 else loss


def smooth_loss(x, y, reduction=1, beta=1.0):
    loss = aten.smooth_l1_loss(x, y, 0, beta).masked_fill((x == 0) | (y == 0), 0)
    return mean(loss) if reduction == 1 else loss.sum() if reduction == 2 else loss


def renormalised(x, p, dim, maxnorm):
    return mark_live_(aten.renorm(x, p, dim, maxnorm), x != 0)


def maximum_and_place(x, dim, keepdim=False):
    return maximum(x, dim, keepdim), without_dead(x).argmax(dim, keepdim)


def argmax(x, dim=None, keepdim=False):
    return without_dead(x).argmax(dim, keepdim)


def argmin(x, dim=None, keepdim=False):
    return without_dead(-x).argmax(dim, keepdim)


def topk(x, k, dim=-1, largest=True, sorted=True):  # noqa: A002
    values, places = aten.topk(without_dead(x if largest else -x), k, dim)
    values = values.masked_fill(values == -math.inf, 0)
    return values if largest else -values, places


def minimum_and_place(x, dim, keepdim=False):
    return minimum(x, dim, keepdim), without_dead(-x).argmax(dim, keepdim)


def weight_norm(v, g, dim=0):
    weight, norms = aten._weight_norm_interface(v, g, dim)
    return weight.nan_to_num(0), norms


def squared_distance(x, y, reduction=1):
    distance = (x - y).square()
    return distance if reduction == 0 else mean(distance) if reduction == 1 else distance.sum()


STATISTICS: dict[Any, Callable] = {
    aten.mean.default: mean,
    aten.mean.dim: mean,
    aten.mse_loss.default: squared_distance,
    aten.var.correction: variance,
    aten.std.correction: deviation,
    aten.var_mean.correction: variance_and_mean,
    aten.std_mean.correction: deviation_and_mean,
    aten.aminmax.default: minimum_and_maximum,
    aten.prod.default: product,
    aten.prod.dim_int: product,
    aten.all.default: every,
    aten.all.dim: every,
    aten.all.dims: every,
    aten.median.default: median,
    aten.nanmedian.default: median,
    aten.mse_loss.default: squared_loss,
    aten.smooth_l1_loss.default: smooth_loss,
    aten.renorm.default: renormalised,
    aten.native_layer_norm.default: layer_norm,
    aten.native_group_norm.default: group_norm,
    **newer("_fused_rms_norm", rms_norm),
    aten.native_batch_norm.default: legit_batch_norm,
    aten._native_batch_norm_legit.default: legit_batch_norm,
    aten._native_batch_norm_legit.no_stats: stateless_batch_norm,
    aten._softmax.default: softmax,
    aten._safe_softmax.default: lambda x, dim, dtype=None: softmax(x, dim),
    aten._log_softmax.default: log_softmax,
    aten.logsumexp.default: logsumexp,
    aten.max.default: maximum,
    aten.min.default: minimum,
    aten.amax.default: maximum,
    aten.amin.default: minimum,
    aten.max.dim: maximum_and_place,
    aten.min.dim: minimum_and_place,
    aten.argmax.default: argmax,
    aten.argmin.default: argmin,
    aten.topk.default: topk,
    aten._weight_norm_interface.default: weight_norm,
}

# Ops that make their result from sizes and scalars alone: nothing they write is dead.
CREATORS = {
    aten.zeros_like, aten.new_zeros, aten.full_like, aten.new_full, aten.zero_, aten.fill_, aten.ones_like,
    aten.new_ones, aten.lift_fresh, aten.lift_fresh_copy,
}  # fmt: skip
# Ops that add to what is there: a base of live zeros must not hide that what was added is dead.
ACCUMULATORS = {aten.index_add, aten.scatter_add, aten.scatter_reduce, aten.index_put, aten.index_add_,
                aten.scatter_add_, aten.scatter_reduce_, aten.index_put_}  # fmt: skip
# Pointwise, or as good as, without torch's tag.
POINTWISE_TOO = {aten.tril, aten.triu, aten.tril_, aten.triu_, aten.hardswish, aten.hardswish_, aten.masked_fill_,
                 aten._prelu_kernel, aten.polar, aten.complex, aten._to_copy}  # fmt: skip


def grouped_mm(a, b, offs=None, bias=None, out_dtype=None):
    """`torch._grouped_mm`, which has no kernel for float64: the rows of a[n k] up to each of `offs` meet their b[e k m]."""
    ends = [0, *offs.tolist()]
    spans = [slice(i, j) for i, j in pairwise(ends)]
    if a.dim() == 2 and b.dim() == 3:
        rows = [a[s] @ b[e] for e, s in enumerate(spans)]
        return torch.cat([*rows, a.new_zeros(a.shape[0] - ends[-1], b.shape[2])])
    return torch.stack([a[:, s] @ b[s] for s in spans])


def observed(
    x, observer_on, fake_quant_on, low, high, scale, zero, constant, least, most, axis, per_row=False, _=False
):
    """`torch._fused_moving_avg_obs_fq_helper` with its observer off: rounding to steps of `scale` around `zero`."""
    assert not observer_on, "the oracle knows no observers"
    if not fake_quant_on:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    spread = [-1 if per_row and d == axis else 1 for d in range(x.dim())]
    scale, zero = scale.view(spread), zero.view(spread)
    steps = (x / scale).round() + zero
    return (steps.clamp(least, most) - zero) * scale, (steps >= least) & (steps <= most)


WIDE = {**newer("_grouped_mm", grouped_mm), aten._fused_moving_avg_obs_fq_helper.default: observed}


class WideKernels(TorchDispatchMode):
    """Ops that torch has no float64 kernel for, written out."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        call = (
            WIDE.get(func, func) if args and is_inexact(args[0]) and args[0].dtype == torch.float64 else func
        )
        return call(*args, **(kwargs or {}))


class LiveElementsOnly(TorchDispatchMode):
    """Runs a zeroed model as the smaller model would run: see the promise at the top of this file."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if func in STATISTICS:
            return STATISTICS[func](*args, **kwargs)
        if packet is aten.constant_pad_nd:
            return pad(*args, **kwargs)
        if packet in ACCUMULATORS:
            return accumulate(func, packet, args, kwargs)
        floats = [t for t in tree_leaves((args, kwargs)) if is_inexact(t)]
        if packet in CREATORS or not floats:
            return tree_map(mark_live_, func(*args, **kwargs))
        if torch.Tag.pointwise in func.tags or packet in POINTWISE_TOO:
            return pointwise(func, args, kwargs, floats)
        out = func(*args, **kwargs)
        if not func._schema.is_mutable and not any((t == 0).any() for t in floats):  # nothing dead goes in
            return tree_map(lambda t: mark_live_(t) if is_inexact(t) and (t == 0).any() else t, out)
        return out


def pointwise(func, args, kwargs, floats: list[Tensor]):
    """The op's result: dead where any operand is dead, live (never exactly 0) elsewhere."""
    dead = torch.zeros((), dtype=torch.bool)
    for operand in floats:
        dead = dead | (operand == 0)
    out = func(*args, **kwargs)
    if not is_inexact(out):
        args, kwargs = tree_map(true_zeros, (args, kwargs))
        return func(*args, **kwargs)
    if out.numel() and out.shape == torch.broadcast_shapes(out.shape, dead.shape):
        out.masked_fill_(dead, 0)
        mark_live_(out, ~dead)
    return out


def pad(x, sizes, value=0):
    return (
        aten.constant_pad_nd(x, sizes, value or tiny(x))
        if is_inexact(x)
        else aten.constant_pad_nd(x, sizes, value)
    )


def accumulate(func, packet, args, kwargs):
    base = args[0]
    overwrites = packet in (aten.index_put, aten.index_put_) and not (len(args) > 3 and args[3])
    if is_inexact(base) and not overwrites:
        cleaned = true_zeros(base)
        args = (base.copy_(cleaned) if str(packet).endswith("_") else cleaned, *args[1:])
    return func(*args, **kwargs)


# --- the masked original ----------------------------------------------------------------------------------------


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a tensor, a tuple of positional arguments or a dict of keyword arguments."""
    with WideKernels():
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every parameter and buffer, under every name that tied ones have."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def zeroed(model: nn.Module, plan) -> nn.Module:
    """A copy of `model` whose removed entries are 0, and whose kept zeros are tiny. Integer buffers stay."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in tensors_of(model):
            if is_inexact(tensor):
                mask = plan.mask(name)
                assert mask.shape == tensor.shape, f"mask of {name}: {mask.shape}"
                tensor.masked_fill_(~mask, 0)
                mark_live_(tensor, mask)
        registered = {id(t) for _, t in tensors_of(model)}
        for module in model.modules():  # tables held as plain attributes: nothing of them is dead by itself
            mine = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
            tree_map(lambda t: t if id(t) in registered else mark_live_(t), mine)
    return model


@contextmanager
def live_elements_only() -> Iterator[None]:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), LiveElementsOnly():
        yield


def expected_output(model: nn.Module, plan, inputs: Any) -> Any:
    """The output of `model` with the removed entries taken away, by masking alone."""
    masked = zeroed(model, plan)
    inputs = tree_map(lambda t: mark_live_(t.clone()) if is_inexact(t) else t, inputs)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with live_elements_only():
            return call(masked, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


# --- assertions -------------------------------------------------------------------------------------------------


def output_tensors(output: Any) -> list[Tensor]:
    leaves, _ = tree_flatten(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def largest_deviation(original: nn.Module, result, inputs: Any) -> float:
    """Max |pruned - masked original| / (1 + max |masked original|) over all output tensors; inf if shapes differ."""
    expected = output_tensors(expected_output(original, result.plan, inputs))
    with torch.no_grad():
        actual = output_tensors(call(copy.deepcopy(result.model), inputs))
    if [t.shape for t in actual] != [t.shape for t in expected]:
        return math.inf
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if not e.numel():
            continue
        if not is_inexact(e):
            worst = max(worst, 0.0 if torch.equal(a, e) else math.inf)
            continue
        gap = ((a - e).abs().max() / (1 + e.abs().max())).item()
        worst = max(worst, math.inf if math.isnan(gap) else gap)
    return worst


def assert_equal_to_masked(original: nn.Module, result, inputs: Any, tol: float = 1e-9) -> None:
    """Every output tensor of the pruned model equals the masked original's."""
    with torch.no_grad():
        actual = output_tensors(call(copy.deepcopy(result.model), inputs))
    expected = output_tensors(expected_output(original, result.plan, inputs))
    assert [tuple(t.shape) for t in actual] == [tuple(t.shape) for t in expected], (
        "the outputs' shapes changed"
    )
    assert any(t.abs().max() > 1e-6 for t in expected if is_inexact(t) and t.numel()), (
        "the expected output is all zero"
    )
    deviation = largest_deviation(original, result, inputs)
    assert deviation <= tol, (
        f"the pruned model is off its masked original by {deviation:.2e} (tolerance {tol:.0e})"
    )


def assert_state_matches_plan(original: nn.Module, pruned: nn.Module, plan) -> None:
    """Every entry of the pruned state is the original's kept entry. Integer buffers may be renumbered: size only."""
    before, after = original.state_dict(), pruned.state_dict()
    assert list(before) == list(after), f"names changed: {sorted(set(before) ^ set(after))}"
    for name, tensor in before.items():
        if tensor.layout is not torch.strided:
            assert plan.mask(name).all(), f"{name}: sparse"
            assert torch.equal(after[name].to_dense(), tensor.to_dense()), f"{name} has other values"
            continue
        kept = tensor[plan.mask(name)]
        assert after[name].dtype == tensor.dtype, f"{name}: {tensor.dtype} became {after[name].dtype}"
        assert after[name].numel() == kept.numel(), (
            f"{name}: {tuple(after[name].shape)}, the plan keeps {kept.numel()}"
        )
        if is_inexact(tensor):
            assert torch.equal(after[name].flatten(), kept), f"{name}: not the entries that the plan keeps"


def gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor | None]:
    """The gradient of every parameter that asks for one, of a sum of squares of the outputs; {} without a graph."""
    model = copy.deepcopy(model)
    with torch.enable_grad():
        outputs = [t for t in output_tensors(call(model, inputs)) if is_inexact(t) and t.requires_grad]
        if not outputs:
            return {}
        with WideKernels():
            sum(t.abs().square().sum() for t in outputs).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_trains(pruned: nn.Module, inputs: Any, original: nn.Module | None = None) -> None:
    """Backward gives a finite gradient to every parameter that had one in the original."""
    after = gradients(pruned, inputs)
    before = after if original is None else gradients(original, inputs)
    assert set(before) == set(after), f"requires_grad changed: {sorted(set(before) ^ set(after))}"
    for name, gradient in after.items():
        assert (gradient is None) == (before[name] is None), f"{name}: a gradient came or went"
        assert gradient is None or gradient.isfinite().all(), f"{name}: gradient is not finite"


def runs(model: nn.Module, inputs: Any) -> str:
    """The error that a copy of the model raises on these inputs, or nothing."""
    try:
        with torch.no_grad():
            call(copy.deepcopy(model), inputs)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return ""


def assert_runs_in_both_modes(pruned: nn.Module, inputs: Any, original: nn.Module) -> None:
    """Where the original runs in train mode (auxiliary heads), or in eval mode, the pruned model does."""
    for mode in (True, False):
        if not runs(copy.deepcopy(original).train(mode), inputs):
            error = runs(copy.deepcopy(pruned).train(mode), inputs)
            assert not error, f"with train({mode}) the pruned model fails: {error}"


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All a user could notice to have changed: values, identities, flags and plain attributes."""
    tensors = {
        name: (id(t), t._version, t.detach().clone(), t.requires_grad) for name, t in tensors_of(model)
    }
    skip = {"_parameters", "_buffers", "_modules"}
    plain = {
        path: (
            type(m),
            {k: repr(v) for k, v in vars(m).items() if k not in skip and not isinstance(v, Tensor)},
        )
        for path, m in model.named_modules()
    }
    return {"tensors": tensors, "plain": plain}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    """The model is bit for bit what it was at the snapshot."""
    after = snapshot(model)
    assert list(after["tensors"]) == list(before["tensors"]), "parameters or buffers came or went"
    for name, (ident, _, value, grad) in before["tensors"].items():
        now = after["tensors"][name]
        assert (now[0], now[3]) == (ident, grad), f"{name} was replaced"
        assert torch.equal(now[2].to_dense(), value.to_dense()), f"{name} has other values"
    for path, state in before["plain"].items():
        assert after["plain"][path] == state, f"an attribute of {path or 'the model'} changed"
