"""Norms: channels keep their place; what is averaged over is averaged over the kept entries."""

from __future__ import annotations

from typing import Any

from ..axes.nodes import BATCH_NORMS
from ..axes.op_call import Dims, OpCall
from .registry import rule


def _per_channel(site: OpCall, channel: Any, arguments: tuple[Any, ...]) -> None:
    for argument in arguments:
        if argument is not None:
            site.same(channel, site.dims(argument)[0])


def _with_stats(site: OpCall, x: Dims, stats: Dims) -> list[Dims]:
    """The result and the statistics [stats] that native norms also return, or return empty."""
    sizes = tuple(1 if a is None else a.size for a in stats)
    return [
        x,
        *(stats if s == sizes else [site.fixed(n, "is state of a norm") for n in s] for s in site.shapes[1:]),
    ]


@rule("batch_norm", *sorted(BATCH_NORMS - {"batch_norm"}), "instance_norm")
def batch_norm(site: OpCall) -> list[Dims]:
    """x[n c ...], weight, bias, running mean and variance [c] -> [n c ...]; without running ones, a statistic over n and ..."""
    x = site.dims(site.args[0])
    vectors = tuple(a for a in site.args[1:5] if hasattr(a, "op"))
    _per_channel(site, x[1], vectors)
    training = site.given("training", site.given("use_input_stats", site.name == "_batch_norm_with_update"))
    uses_batch = training or not any(hasattr(a, "op") for a in site.args[3:5])
    if uses_batch:  # mean and variance of this very tensor, over every other dim
        site.statistic(*x[2:], *(x[:1] if site.name != "instance_norm" else ()))
    return _with_stats(site, x, x[1:2])


@rule("layer_norm", "native_layer_norm", "rms_norm")
def layer_norm(site: OpCall) -> list[Dims]:
    """x[... shape], weight[shape], bias[shape] -> [... shape]; a statistic over `shape`."""
    x = site.dims(site.args[0])
    k = len(site.args[1])
    for axis in x[-k:]:
        site.repaired(axis)
    for argument in site.args[2:4]:
        if hasattr(argument, "op"):
            for a, b in zip(x[-k:], site.dims(argument), strict=True):
                site.same(a, b)
    site.statistic(*x[-k:])
    return _with_stats(site, x, [*x[:-k], *[None] * k])


@rule("group_norm", "native_group_norm")
def group_norm(site: OpCall) -> list[Dims]:
    """x[n (g c) ...] in g blocks of equal count; a statistic over a block and all positions."""
    native = site.name == "native_group_norm"
    x = site.dims(site.args[0])
    groups = site.args[6] if native else site.args[1]
    vectors = site.args[1:3] if native else (site.arg(2, "weight"), site.arg(3, "bias"))
    axis = x[1]
    _per_channel(site, axis, tuple(v for v in vectors if v is not None))
    if native:  # sizes are arguments of this one
        for size in (x[0], axis, *x[2:]):
            site.repaired(size)
    if axis is not None and axis.size == groups:  # one channel each
        site.argument_is_size_of(axis, 6 if native else 1)
        site.repaired(axis)
        site.statistic(*x[2:])
        return _with_stats(site, x, x[:2])
    if axis is not None and groups > 1:
        blocks = site.algebra.segments(axis, [axis.size // groups] * groups)
        site.equal_counts(blocks, "every group of a norm needs equally many channels")
    site.statistic(*x[1:])
    return _with_stats(site, x, [x[0], site.fixed(groups, "numbers the groups of a norm")])


@rule("_weight_norm_interface")
def weight_norm(site: OpCall) -> list[Dims]:
    """v[...], g[1.. n ..1] -> v * g / norm of v over all dims but `dim`."""
    v, g, dim = site.dims(site.args[0]), site.dims(site.args[1]), site.arg(2, "dim", 0)
    out = site.broadcast(v, g)
    site.statistic(*(a for i, a in enumerate(v) if i != dim % len(v)))
    return _with_stats(site, out, g)
