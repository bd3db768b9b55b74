"""Norms: channels keep their place; what is averaged over is averaged over the kept entries."""

from __future__ import annotations

from typing import Any

from ..propagate import Dims, Site
from .registry import rule


def _per_channel(site: Site, channel: Any, arguments: tuple[Any, ...]) -> None:
    for argument in arguments:
        if argument is not None:
            site.same(channel, site.dims(argument)[0])


def _with_stats(site: Site, x: Dims) -> list[Dims]:
    """The result and the saved statistics that native norms also return."""
    return [x, *([site.fresh(n) for n in shape] for shape in site.shapes[1:])]


@rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
      "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update",
      "_batch_norm_impl_index", "instance_norm")  # fmt: skip
def batch_norm(site: Site) -> list[Dims]:
    """x[n c ...], weight, bias, running mean, running variance [c] -> [n c ...]."""
    x = site.dims(site.args[0])
    vectors = tuple(a for a in site.args[1:5] if hasattr(a, "op"))
    _per_channel(site, x[1], vectors)
    name = str(site.node.target)
    uses_batch = "no_training" not in name and (
        (site.arg(5, "training", False) is True) or not any(hasattr(a, "op") for a in site.args[3:5])
    )
    if uses_batch:  # mean and variance of this very tensor, over every other dim
        site.statistic(*x[2:], *(x[:1] if "instance" not in name else ()))
    return _with_stats(site, x)


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(site: Site) -> list[Dims]:
    """x[... shape], weight[shape], bias[shape] -> [... shape]; a statistic over `shape`."""
    x = site.dims(site.args[0])
    k = len(site.args[1])
    for argument in site.args[2:4]:
        if hasattr(argument, "op"):
            for a, b in zip(x[-k:], site.dims(argument), strict=True):
                site.same(a, b)
    site.statistic(*x[-k:])
    return _with_stats(site, x)


@rule("group_norm", "native_group_norm")
def group_norm(site: Site) -> list[Dims]:
    """x[n (g c) ...] in g blocks of equal count; a statistic over a block and all positions."""
    native = "native" in str(site.node.target)
    x = site.dims(site.args[0])
    groups = site.args[6] if native else site.args[1]
    vectors = site.args[1:3] if native else (site.arg(2, "weight"), site.arg(3, "bias"))
    axis = x[1]
    _per_channel(site, axis, tuple(v for v in vectors if v is not None))
    if axis is not None:
        size = axis.size // groups
        if groups > 1:
            site.equal_counts(
                site.algebra.segments(axis, [size] * groups), "every group of a norm needs as many channels"
            )
        if size > 1:
            site.statistic(axis)
        elif groups > 1:
            site.lock(axis, "is normalised in groups of one channel each")
    return _with_stats(site, x)


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(site: Site) -> list[Dims]:
    """v[...], g[1.. n ..1] -> v * g / norm of v over all dims but `dim`."""
    v, g, dim = site.dims(site.args[0]), site.dims(site.args[1]), site.arg(2, "dim", 0)
    out = site.broadcast(v, g)
    site.statistic(*(a for i, a in enumerate(v) if i != dim % len(v)))
    return _with_stats(site, out)


@rule("local_response_norm")
def mixing_norm(site: Site) -> list[Dims]:
    """Mixes neighbouring channels."""
    return site.lock_all("is normalised over neighbouring indices")
