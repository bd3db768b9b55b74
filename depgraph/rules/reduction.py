"""Ops that reduce dims, and those that rank or accumulate along one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..axes.op_call import Dims, OpCall
from ..tracing.recorder import record_of
from .registry import rule

EXACT = ("sum", "nansum", "count_nonzero")
STATISTICS = ("mean", "amax", "amin", "aminmax", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm",
              "logsumexp", "prod", "any", "all", "median", "nanmedian", "mode", "kthvalue",
              "_is_all_true", "_is_any_true")  # fmt: skip
INDEXED = ("median", "nanmedian", "mode", "kthvalue")
PAIRWISE = (torch.ops.aten.max.other, torch.ops.aten.min.other)  # of two tensors, entry by entry


def _reduced(site: OpCall, which: Any, keepdim: bool) -> tuple[Dims, Dims]:
    """(dims of the result, dims that are reduced) of a reduction over the dims `which` (None or empty: all)."""
    x = site.dims(site.args[0])
    n = len(x)
    if which is None or (isinstance(which, (list, tuple)) and not which):
        gone = set(range(n))
    else:
        gone = {d % n for d in (which if isinstance(which, Sequence) else [which])} if n else set()
    out = [None if i in gone else a for i, a in enumerate(x) if keepdim or i not in gone]
    return out, [x[i] for i in sorted(gone)]


def _arguments(site: OpCall) -> tuple[Any, bool]:
    """(dims, keepdim) by the names in the op's schema."""
    return site.given("dim"), bool(site.given("keepdim"))


@rule(*EXACT)
def sums(site: OpCall) -> Dims:
    """Summed over some dims, which may lose any indices, as removed entries are zero; the others pass."""
    out, gone = _reduced(site, *_arguments(site))
    site.contract(*gone)
    return out


@rule(*STATISTICS)
def statistics(site: OpCall) -> list[Dims]:
    """A statistic over some dims; the others pass."""
    out, gone = _reduced(site, *_arguments(site))
    site.statistic(*gone)
    if len(site.shapes) > 1 and site.name in INDEXED:
        for axis in gone:
            site.lock(axis, "is indexed by the result of a median")
    return [list(out) for _ in site.shapes]


@rule("max", "min", "argmax", "argmin")
def extrema(site: OpCall) -> list[Dims]:
    """A statistic over some dims; a position that is returned numbers the dim, where it is one dim."""
    if site.node.target in PAIRWISE:
        return [site.broadcast(site.dims(site.args[0]), site.dims(site.args[1]))]
    out, gone = _reduced(site, *_arguments(site))
    site.statistic(*gone)
    positions = len(site.shapes) > 1 or site.name in ("argmax", "argmin")
    if positions and len(gone) == 1:
        site.number(gone[0], len(site.shapes) - 1)
    elif positions:
        for axis in gone:
            site.lock(axis, "is indexed by a position in several dims")
    return [list(out) for _ in site.shapes]


@rule("_softmax", "_log_softmax", "_safe_softmax")
def softmax(site: OpCall) -> Dims:
    """A statistic over one dim, and every dim passes."""
    x = site.dims(site.args[0])
    if x:
        site.statistic(x[site.arg(1, "dim") % len(x)])
    return x


@rule("segment_reduce")
def segments(site: OpCall) -> Dims:
    """Runs of indices of a dim become one each, and stay whole; the other dims pass."""
    x, d = site.dims(site.args[0]), site.given("axis")
    site.lock(x[d], "is reduced in segments")
    for lengths in site.node.all_input_nodes[1:]:
        *lead, last = site.dims(lengths)
        site.lock(last, "is reduced in segments")
        for a, b in zip(lead, x, strict=False):
            site.same(a, b)
    x[d] = site.fixed(site.shape[d], "numbers the segments of a reduction")
    return x


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")
def along(site: OpCall) -> list[Dims]:
    """Works along a dim in order, which stays whole, but for running sums of whole numbers: zeros change none of them."""
    x = site.dims(site.args[0])
    counts = site.name == "cumsum" and not record_of(site.node).dtype.is_floating_point
    if x and not counts:
        site.lock(x[site.given("dim") % len(x)], f"is processed in order by {site.node.target}")
    return [list(x) for _ in site.shapes]


@rule("topk")
def topk(site: OpCall) -> list[Dims]:
    """The largest k of the kept entries, of which as many must stay; their positions number the dim."""
    x = site.dims(site.args[0])
    if not x:
        return [[], []]
    k, d = site.arg(1, "k"), site.arg(2, "dim", -1) % len(x)
    site.statistic(x[d])
    site.at_least(x[d], k)
    site.number(x[d], 1)
    return [
        [a if i != d else site.fixed(k, "counts the largest entries") for i, a in enumerate(x)]
        for _ in range(2)
    ]


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def spectrum(site: OpCall) -> Dims:
    """A Fourier transform mixes the indices of its dims; the others pass."""
    x = site.dims(site.args[0])
    for d in site.args[1]:
        site.lock(x[d], "ranges over positions that a Fourier transform mixes")
        x[d] = site.fixed(site.shape[d], "ranges over frequencies")
    return x


@rule("sort")
def ranked(site: OpCall) -> list[Dims]:
    """A dim is reordered by value, and stays whole."""
    x = site.dims(site.args[0])
    d = site.given("dim") % max(len(x), 1)
    if x:
        site.lock(x[d], "is ordered by value")
    return [
        [
            a if i != d else site.fixed(n, "is ordered by value")
            for i, (a, n) in enumerate(zip(x, shape, strict=True))
        ]
        for shape in site.shapes
    ]


@rule("renorm")
def renorm(site: OpCall) -> Dims:
    """The norm at each index of one dim is bounded: a statistic over the other dims."""
    x = site.dims(site.args[0])
    d = site.given("dim") % len(x)
    site.statistic(*x[:d], *x[d + 1 :])
    return x
