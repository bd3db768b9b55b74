"""Fake quantisation: values are rounded to a grid whose step is one number, or one for each index of a dim."""

from __future__ import annotations

from ..axes.op_call import Dims, OpCall
from .registry import rule


@rule("_fused_moving_avg_obs_fq_helper", "_fused_moving_avg_obs_fq_helper_functional")
def observed(site: OpCall) -> list[Dims]:
    """x[...] -> [...]; running extremes, scales and zero points [c] per channel; the extremes are a statistic over the rest."""
    x = site.dims(site.args[0])
    d = site.given("ch_axis") % len(x) if site.given("per_row_fake_quant") else None
    tables = [site.given(name) for name in ("running_min", "running_max", "scale", "zero_point")]
    if d is not None:
        _per_channel(site, x, d, tables)
    site.statistic(*(a for i, a in enumerate(x) if i != d))
    return [list(x), list(x), *(site.dims(table) for table in tables[: len(site.shapes) - 2])]


@rule(
    "fake_quantize_per_tensor_affine_cachemask",
    "fake_quantize_per_channel_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "_fake_quantize_learnable_per_tensor_affine",
    "_fake_quantize_learnable_per_channel_affine",
)
def rounded(site: OpCall) -> list[Dims]:
    """x[...] -> [...]; per channel, scales and zero points [c]."""
    x = site.dims(site.args[0])
    if "per_channel" in site.name:
        _per_channel(site, x, site.given("axis") % len(x), [site.given("scale"), site.given("zero_point")])
    return [list(x) for _ in site.shapes]


def _per_channel(site: OpCall, x: Dims, d: int, tables: list[object]) -> None:
    for table in tables:
        if site.shape_of(table) != (0,):  # not observed yet
            site.same(x[d], site.dims(table)[0])
