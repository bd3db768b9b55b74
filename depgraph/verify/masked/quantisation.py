"""Fake quantisation: rounding to a grid, whose bounds an observer may take from the entries alive."""

from __future__ import annotations

from typing import Any

import torch

from ...base.running import tensors_in
from .run import DOUBLE, MaskedRun, all_alive, handles, named

aten = torch.ops.aten
Tensor = torch.Tensor


@handles(
    "fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask "
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams _fake_quantize_learnable_per_tensor_affine "
    "_fake_quantize_learnable_per_channel_affine _fused_moving_avg_obs_fq_helper _fused_moving_avg_obs_fq_helper_functional"
)
def fake_quantised(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Alive where the tensor is, and where its channel's scale is; extremes are those of the entries alive."""
    given = named(func, args, kwargs)
    x, axis = args[0], _axis(given)
    alive = run.full(x)
    if given.get("observer_on") is not None and bool(given["observer_on"]) and not bool(alive.all()):
        run.restricted.add("fake quantisation")
        x = _without_dead(x, alive, axis)
    out = run.computed(func, (x, *args[1:]), kwargs)
    for table in tensors_in(args[1:], kwargs):  # one entry for each channel
        known = run.mask(table)
        if axis is not None and known is not None and known.numel() == alive.shape[axis]:
            alive = alive * known.view([-1 if d == axis else 1 for d in range(alive.dim())])
    for result in out if isinstance(out, tuple) else [out]:
        run.finish(result, alive if result.shape == alive.shape else all_alive(result.shape, result.device))
    return out


def _axis(given: dict[str, Any]) -> int | None:
    """The dim of channels; None where all share one scale."""
    if "per_row_fake_quant" in given:
        axis = given["ch_axis"] if given["per_row_fake_quant"] else None
    else:
        axis = given.get("axis")
    return None if axis is None else axis % given["self"].dim()


def _without_dead(x: Tensor, alive: Tensor, axis: int | None) -> Tensor:
    """`x` with entries alive in the place of dead ones (of their channel, if it has any), which leaves extremes as they are."""
    dims = [d for d in range(x.dim()) if d != axis]
    lowest = x.masked_fill(alive == 0, torch.inf).amin(dims, keepdim=True)
    return torch.where(alive > 0, x, lowest.masked_fill(lowest.isinf(), 0))


# --- in float64, which torch's kernels for channels do not take ---


def _rounded(
    x: Tensor, scale: Tensor, zero: Tensor, axis: int | None, low: int, high: int
) -> tuple[Tensor, Tensor]:
    if axis is not None:
        scale, zero = (
            t.view([-1 if d == axis % x.dim() else 1 for d in range(x.dim())]) for t in (scale, zero)
        )
    steps = (x * (1 / scale)).round() + zero.round()
    return (steps.clamp(low, high) - zero.round()) * scale, (steps >= low) & (steps <= high)


def _per_channel(
    x: Tensor, scale: Tensor, zero: Tensor, axis: int, low: int, high: int
) -> tuple[Tensor, Tensor]:
    return _rounded(x, scale, zero, axis, low, high)


def _learned_per_channel(
    x: Tensor, scale: Tensor, zero: Tensor, axis: int, low: int, high: int, _: float = 1.0
) -> Tensor:
    return _rounded(x, scale, zero.clamp(low, high), axis, low, high)[0]


def _observed(
    x: Tensor, observes: Tensor, rounds: Tensor, lowest: Tensor, highest: Tensor, scale: Tensor, zero: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What is observed is kept in float32, as torch does; the rounding is done in the type of `x`."""
    _, low, high, axis, per_channel = (*rest, False)[:5]
    tables = lowest, highest, scale
    if bool(observes):
        narrow = [t.float() for t in tables]
        aten._fused_moving_avg_obs_fq_helper(x.float(), observes, rounds, *narrow, zero, *rest)
        for table, value in zip(tables, narrow, strict=True):
            table.resize_(value.shape).copy_(value)
    if not bool(rounds):
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    return _rounded(x, scale, zero, axis if per_channel else None, low, high)


DOUBLE |= {
    "aten::fake_quantize_per_channel_affine_cachemask": _per_channel,
    "aten::_fake_quantize_learnable_per_channel_affine": _learned_per_channel,
    "aten::_fused_moving_avg_obs_fq_helper": _observed,
}
