"""Sums of products: alive where some pair of alive entries is summed."""

from __future__ import annotations

from typing import Any

import torch

from ...axes.nodes import op_name
from .run import MaskedRun, Unfollowed, all_alive, handles

aten = torch.ops.aten
Tensor = torch.Tensor


@handles("_sparse_addmm mm bmm addmm baddbmm convolution mv dot vdot addmv addbmm _grouped_mm")
def contraction(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Alive where some pair of alive entries is summed."""
    out = run.computed(func, args, kwargs)
    values = [isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex()) for a in args]
    tensors = [run.full(a) if value else a for a, value in zip(args, values, strict=True)]
    name = func._schema.name
    bias = None
    if name == "aten::convolution":
        bias = args[2]
    elif name == "aten::_sparse_addmm":
        func, tensors[0] = aten.addmm.default, torch.zeros_like(run.full(args[0]))
    elif name in ("aten::addmm", "aten::baddbmm", "aten::addmv", "aten::addbmm"):
        bias, tensors[0] = args[0], torch.zeros_like(run.full(args[0]))
    if name == "aten::convolution":
        mask = _of_convolution(tensors[0], tensors[1], args, out)
    else:
        rows = _alike(tensors[-2]) if name in ("aten::mm", "aten::addmm") else None
        if rows is None:
            mask = (func(*tensors, **kwargs) > 0).float()
        else:
            mask = (rows @ tensors[-1] > 0).float().expand(out.shape).clone()
    if any(isinstance(t, Tensor) and not t.numel() for t in tensors):  # a sum of nothing is a constant
        mask = all_alive(mask.shape, mask.device)
    if bias is not None and run.mask(bias) is not None:
        known = run.full(bias)
        mask = mask * (known.view(1, -1, *[1] * (mask.dim() - 2)) if name == "aten::convolution" else known)
    return run.finish(out, mask)


def _alike(rows: Tensor) -> Tensor | None:
    """The first row of a mask where all are as it is, as where units are removed; else None."""
    first = rows[:1]
    return first if rows.shape[0] > 1 and bool((rows == first).all()) else None


def _of_convolution(x: Tensor, weight: Tensor, args: Any, out: Tensor) -> Tensor:
    """The mask of a convolution; where channels of `x` are dead or alive as wholes, positions need no look."""
    dims = [0, *range(2, x.dim())]
    channels = x.amax(dims, keepdim=True) if x.numel() and x.dim() > 2 else None
    plain = channels is not None and torch.equal(channels, x.amin(dims, keepdim=True))
    taps = weight.amax(tuple(range(2, weight.dim())), keepdim=True)
    if channels is None or not plain or (args[8] > 1 and args[6]):
        return (aten.convolution.default(x, weight, None, *args[3:]) > 0).float()
    ones = [1] * (x.dim() - 2)
    one = aten.convolution.default(
        channels[:1], taps, None, ones, [0 * d for d in ones], ones, args[6], [0 * d for d in ones], args[8]
    )
    return (one > 0).float().expand(out.shape).clone()


@handles(
    "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_attention_math"
)
def attention(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """A head's output is alive where its values are; dead widths of q and k are zero and add nothing."""
    out = func(*args, **kwargs)
    q, k, v = (run.full(a) for a in args[:3])
    if (k.amax((-1, -2), keepdim=True) != k.amax(-1, keepdim=True)).any():
        raise Unfollowed("attention over pruned keys")
    heads = v.amax(-2, keepdim=True)
    if heads.dim() > 3 and heads.shape[-3] != q.shape[-3]:  # one key head serves a run of query heads
        heads = heads.repeat_interleave(q.shape[-3] // heads.shape[-3], -3)
    mask = heads.expand(*q.shape[:-1], v.shape[-1]).clone()
    mask = mask * q.amax(-1, keepdim=True)
    run.finish(out[0] if isinstance(out, tuple) else out, mask)
    return out


@handles("_cdist_forward _euclidean_dist cdist")
def cdist(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Distances sum over the width: dead widths are zero on both sides."""
    out = func(*args, **kwargs)
    return run.finish(out, all_alive(out.shape, out.device))


@handles("_fft_r2c _fft_c2r _fft_c2c")
def spectrum(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Linear along its dims: alive where anything is."""
    out = func(*args, **kwargs)
    alive = run.full(args[0]).amax(tuple(args[1]), keepdim=True)
    return run.finish(out, alive.expand(out.shape).clone())


@handles("_weight_norm _weight_norm_interface")
def weight_norm(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """v * g / |v| over all dims but one; a row that is gone stays zero."""
    v, g = args[0], args[1]
    d = args[2] if len(args) > 2 else 0
    dims = [i for i in range(v.dim()) if i != d % v.dim()]
    norm = (v.square().sum(dims, keepdim=True)).sqrt()
    mask = run.full(v) * run.full(g)
    out = run.finish(torch.where(mask > 0, v * (g / norm.clamp(min=1e-300)), torch.zeros_like(v)), mask)
    return (out, norm) if op_name(func) == "_weight_norm_interface" else out


@handles("linalg_solve_triangular")
def solve_triangular(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Each column of the right-hand side by itself, and each system of a batch; nothing else of a matrix may be dead."""
    a, b = run.full(args[0]), run.full(args[1])
    along = -2 if kwargs.get("left", True) else -1
    systems, alive = a.amax((-2, -1), keepdim=True), b.amax(along, keepdim=True)
    whole = torch.equal(systems, a.amin((-2, -1), keepdim=True))
    if not whole or not torch.equal(alive, b.amin(along, keepdim=True)):
        raise Unfollowed("linalg_solve_triangular")
    one = torch.eye(a.shape[-1], dtype=args[0].dtype, device=a.device)
    out = func(torch.where(systems > 0, args[0], one), *args[1:], **kwargs)
    return run.finish(out, (alive * systems).expand(out.shape).clone())
