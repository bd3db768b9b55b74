"""Means, norms, maxima, softmax: statistics, taken over the entries alive."""

from __future__ import annotations

from typing import Any

import torch

from ...axes.nodes import op_name
from .run import MaskedRun, Unfollowed, all_alive, dead_of, dims_of, handles, named

aten = torch.ops.aten
Tensor = torch.Tensor


@handles(
    "sum nansum mean amax amin max min var std var_mean std_mean norm linalg_vector_norm logsumexp prod any all _is_all_true _is_any_true"
)
def reduction(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Sums of zeroed entries are exact; other statistics are taken over the alive ones."""
    x, mask = args[0], run.full(args[0])
    given = named(func, args, kwargs)
    name = op_name(func)
    if not mask.numel():  # of nothing: a constant
        out = func(*args, **kwargs)
        for t in out if isinstance(out, tuple) else [out]:
            run.finish(t, all_alive(t.shape, t.device))
        return out
    dims, keep = dims_of(given.get("dim"), x.dim()), bool(given.get("keepdim", False))
    alive = mask.amax(dims, keepdim=keep) if dims else mask
    uniform = not (mask.amax(dims, keepdim=True) - mask.amin(dims, keepdim=True)).any()
    if not dims or uniform:
        out = func(*args, **kwargs)
        for t in out if isinstance(out, tuple) else [out]:
            if t.shape == alive.shape:
                run.finish(t, alive)
        return out
    run.restricted.add(name)
    m = mask.to(x.dtype)
    n = m.sum(dims, keepdim=True).clamp(min=1)

    def mean_and_var() -> tuple[Tensor, Tensor]:
        mean = (x * m).sum(dims, keepdim=True) / n
        correction = given.get("correction")
        correction = (1 if given.get("unbiased", True) else 0) if correction is None else correction
        var = (((x - mean) * m) ** 2).sum(dims, keepdim=True) / (n - correction).clamp(min=0)
        return mean, var

    def shaped(t: Tensor) -> Tensor:
        return t if keep else t.squeeze(tuple(dims)) if dims else t

    if name in ("sum", "nansum", "norm", "linalg_vector_norm", "any", "_is_any_true", "count_nonzero"):
        run.restricted.discard(name)
        out = func(*args, **kwargs)
    elif name == "mean":
        out = shaped((x * m).sum(dims, keepdim=True) / n)
    elif name in ("var", "std", "var_mean", "std_mean"):
        mean, var = mean_and_var()
        spread = var.sqrt() if name.startswith("std") else var
        if name.endswith("_mean"):
            out = (shaped(spread), shaped(mean))
            for t in out:
                run.finish(t, alive)
            return out
        out = shaped(spread)
    else:
        if name in ("all", "_is_all_true"):  # nobody asks about entries that are not there
            run.restricted.discard(name)
        fill = {"amax": float("-inf"), "max": float("-inf"), "amin": float("inf"), "min": float("inf"), "prod": 1.0,
                "logsumexp": float("-inf"), "all": True, "_is_all_true": True}.get(name)  # fmt: skip
        if fill is None:
            raise Unfollowed(f"{name} over a pruned dim")
        out = func(x.masked_fill(mask == 0, fill), *args[1:], **kwargs)
        if isinstance(out, tuple):  # with positions, which are those among the alive entries
            run.finish(out[0], alive)
            return out
    return run.finish(out, alive)


@handles("_softmax softmax _log_softmax log_softmax _safe_softmax")
def softmax(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Over the alive entries of its dim."""
    x, mask = args[0], run.full(args[0])
    dead = dead_of(mask)
    out = func(x if dead is None else x.masked_fill(dead, float("-inf")), *args[1:], **kwargs)
    if dead is not None:
        if (mask.amax(args[1], keepdim=True) != mask.amin(args[1], keepdim=True)).any():
            run.restricted.add("softmax")
        out.masked_fill_(dead, 0)
    run.give(out, mask.clone())
    return out


@handles("native_layer_norm _fused_rms_norm rms_norm")
def layer_norm(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Mean and variance over the alive entries of the normalised dims."""
    x, shape = args[0], args[1]
    given = named(func, args, kwargs)
    mask = run.full(x)
    dims = list(range(x.dim() - len(shape), x.dim()))
    m = mask.to(x.dtype)
    n = m.sum(dims, keepdim=True).clamp(min=1)
    rms = op_name(func) in ("rms_norm", "_fused_rms_norm")
    mean = torch.zeros_like(n) if rms else (x * m).sum(dims, keepdim=True) / n
    var = (((x - mean) * m) ** 2).sum(dims, keepdim=True) / n
    eps = given.get("eps")
    rstd = torch.rsqrt(var + (torch.finfo(x.dtype).eps if eps is None else eps))
    out = (x - mean) * rstd
    if given.get("weight") is not None:
        out = out * given["weight"]
    if given.get("bias") is not None:
        out = out + given["bias"]
    if (mask.amax(dims) != mask.amin(dims)).any():
        run.restricted.add("layer_norm")
    out = run.finish(out * m, mask)
    return (out, rstd) if rms else (out, mean, rstd)


@handles("native_group_norm")
def group_norm(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Mean and variance over the alive entries of each group."""
    x, weight, bias, n, c, _, groups, eps = args
    mask = run.full(x)
    flat, m = x.reshape(n, groups, -1), mask.reshape(n, groups, -1).to(x.dtype)
    count = m.sum(-1, keepdim=True).clamp(min=1)
    mean = (flat * m).sum(-1, keepdim=True) / count
    var = (((flat - mean) * m) ** 2).sum(-1, keepdim=True) / count
    rstd = torch.rsqrt(var + eps)
    out = ((flat - mean) * rstd).reshape(x.shape)
    spread = [1, c, *[1] * (x.dim() - 2)]
    if weight is not None:
        out = out * weight.view(spread)
    if bias is not None:
        out = out + bias.view(spread)
    if (m.amax(-1) != m.amin(-1)).any():
        run.restricted.add("group_norm")
    return run.finish(out * mask.to(x.dtype), mask), mean.reshape(n, groups), rstd.reshape(n, groups)


@handles("native_layer_norm_backward _fused_rms_norm_backward")
def layer_norm_gradient(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """The gradients of a mean and variance over the alive entries."""
    given = named(func, args, kwargs)
    x, grad, weight, mean = given["input"], given["grad_out"], given.get("weight"), given.get("mean")
    mask = run.full(x)
    normalised = list(range(x.dim() - len(given["normalized_shape"]), x.dim()))
    m = mask.to(x.dtype)
    unit = (x if mean is None else x - mean) * given["rstd"] * m  # what the norm made, before its weight
    inner = _through_norm(
        grad * m if weight is None else grad * weight * m, unit, m, normalised, mean is not None
    )
    outer = list(range(x.dim() - len(normalised)))
    if (mask.amax(normalised) != mask.amin(normalised)).any():
        run.restricted.add("layer_norm")
    kept = mask.amax(outer) if outer else mask
    per_weight = [g.sum(outer) if outer else g for g in (grad * unit, grad * m)]
    found = [run.finish(inner * given["rstd"], mask), *(run.finish(g, kept) for g in per_weight)]
    return tuple(g if asked else None for g, asked in zip(found, given["output_mask"], strict=False))


@handles("native_group_norm_backward")
def group_norm_gradient(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """The gradients of a mean and variance over the alive entries of each group."""
    grad, x, mean, rstd, weight, n, c, _, groups, asked = args
    mask = run.full(x)
    m = mask.to(x.dtype)
    spread, grouped = [1, c, *[1] * (x.dim() - 2)], (n, groups, -1)
    mean, rstd, flat = mean.reshape(n, groups, 1), rstd.reshape(n, groups, 1), m.reshape(grouped)
    unit = (x.reshape(grouped) - mean) * rstd * flat
    scaled = grad * m if weight is None else grad * weight.view(spread) * m
    inner = _through_norm(scaled.reshape(grouped), unit, flat, [-1], True) * rstd
    if (flat.amax(-1) != flat.amin(-1)).any():
        run.restricted.add("group_norm")
    others = [d for d in range(x.dim()) if d != 1]
    per_weight = [(grad * unit.reshape(x.shape)).sum(others), (grad * m).sum(others)]
    found = [
        run.finish(inner.reshape(x.shape), mask),
        *(run.finish(g, mask.amax(others)) for g in per_weight),
    ]
    return tuple(g if a else None for g, a in zip(found, asked, strict=True))


def _through_norm(grad: Tensor, unit: Tensor, m: Tensor, dims: list[int], centred: bool) -> Tensor:
    """The gradient of what a norm divides, from that of its result `unit`: without its part along it, and its mean."""
    n = m.sum(dims, keepdim=True).clamp(min=1)
    found = grad - unit * (grad * unit).sum(dims, keepdim=True) / n
    return (found - grad.sum(dims, keepdim=True) / n) * m if centred else found


@handles("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm")
def batch_norm(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Per channel: alive where the input and the channel's parameters are."""
    x = args[0]
    out = func(*args, **kwargs)
    mask = run.full(x)
    for vector in args[1:5]:
        if run.mask(vector) is not None:
            mask = mask * run.full(vector).view(1, -1, *[1] * (x.dim() - 2))
    training = any(a is True for a in args) or (args[3] is None and args[4] is None)
    if training:
        dims = [d for d in range(x.dim()) if d != 1]
        if (
            mask.amax(dims) != mask.amin(dims)
        ).any():  # a norm over folded channels: dead ones inside a statistic
            m = mask.to(x.dtype)
            n = m.sum(dims, keepdim=True).clamp(min=1)
            mean = (x * m).sum(dims, keepdim=True) / n
            var = (((x - mean) * m) ** 2).sum(dims, keepdim=True) / n
            spread = [1, -1, *[1] * (x.dim() - 2)]
            y = (x - mean) * torch.rsqrt(var + args[7])
            y = y * args[1].view(spread) if args[1] is not None else y
            y = y + args[2].view(spread) if args[2] is not None else y
            run.restricted.add("batch_norm")
            out = (y * m, *out[1:])
    run.finish(out[0], mask)
    return out


@handles("cumsum cumprod sort argsort")
def along(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Ops along dims that lost nothing: the mask of one index there is that of every one."""
    out = func(*args, **kwargs)
    given = named(func, args, kwargs)
    x, mask = args[0], run.full(args[0])
    d = given.get("dim", given.get("dims", -1))
    if (mask.amax(d, keepdim=True) != mask.amin(d, keepdim=True)).any():
        raise Unfollowed(f"{op_name(func)} along a pruned dim")
    one = mask.amax(d, keepdim=True)
    for t in out if isinstance(out, (tuple, list)) else [out]:
        if t.dim() == x.dim():
            run.give(t, one.expand(t.shape).clone())
        else:
            run.give(t, one.squeeze(d).clone())
    return out


@handles("argmax argmin")
def extreme(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """The position of the largest or least of the alive entries."""
    given = named(func, args, kwargs)
    x, mask, d = args[0], run.full(args[0]), given.get("dim")
    every = list(range(x.dim())) if d is None else d
    alive = mask.amax(every, keepdim=bool(given.get("keepdim")))
    if (mask.amax(every) != mask.amin(every)).any():
        run.restricted.add(op_name(func))
    dead = float("-inf") if "argmax" in op_name(func) else float("inf")
    filled = x.masked_fill(mask == 0, dead) if x.is_floating_point() else x
    if filled is x and not (mask == 1).all():
        raise Unfollowed(f"{op_name(func)} of whole numbers along a pruned dim")
    out = func(filled, *args[1:], **kwargs)
    run.give(out, alive)
    return out


@handles("topk")
def topk(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """The largest of the alive entries."""
    given = named(func, args, kwargs)
    x, mask, d = args[0], run.full(args[0]), given["dim"]
    if not x.numel():
        return func(*args, **kwargs)
    alive = mask.sum(d, keepdim=True)
    if ((alive > 0) & (alive < given["k"])).any():
        raise Unfollowed("topk over fewer entries than it takes")
    if (mask.amax(d, keepdim=True) != mask.amin(d, keepdim=True)).any():
        run.restricted.add("topk")
    out = func(
        x.masked_fill(mask == 0, float("-inf") if given["largest"] else float("inf")), *args[1:], **kwargs
    )
    run.finish(out[0], (alive > 0).float().expand(out[0].shape).clone())
    return out


@handles("mse_loss smooth_l1_loss")
def loss(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """A mean is taken over the alive entries; where both sides are dead they are zero, and so is their distance."""
    given = named(func, args, kwargs)
    mode = given.pop("reduction")
    x, y = given.pop("self"), given.pop("target")
    mask = torch.maximum(*torch.broadcast_tensors(run.full(x), run.full(y)))
    distance = func(x, y, reduction=0, **given)
    if mode == 0:
        return run.finish(distance, mask)
    if mode == 1 and bool((mask == 0).any()):
        run.restricted.add(op_name(func))
    out = distance.sum() / (mask.sum().clamp(min=1).to(x.dtype) if mode == 1 else 1)
    return run.finish(out, all_alive(out.shape, out.device))
