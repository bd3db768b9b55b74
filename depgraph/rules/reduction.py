"""Ops that reduce dims, and those that rank or accumulate along one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..propagate import Dims, Site
from .registry import rule

EXACT = ("sum", "nansum", "count_nonzero")
STATISTICS = ("mean", "nanmean", "amax", "amin", "aminmax", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm",
              "logsumexp", "prod", "any", "all", "median", "nanmedian", "mode")  # fmt: skip
INDEXED = ("max", "min", "argmax", "argmin", "median", "mode", "kthvalue")


def _reduced(site: Site, which: Any, keepdim: bool) -> tuple[Dims, Dims]:
    """(dims of the result, dims that are reduced) of a reduction over the dims `which` (None or empty: all)."""
    x = site.dims(site.args[0])
    n = len(x)
    if which is None or (isinstance(which, (list, tuple)) and not which):
        gone = set(range(n))
    else:
        gone = {d % n for d in (which if isinstance(which, Sequence) else [which])} if n else set()
    out = [None if i in gone else a for i, a in enumerate(x) if keepdim or i not in gone]
    return out, [x[i] for i in sorted(gone)]


def _arguments(site: Site) -> tuple[Any, bool]:
    """(dims, keepdim) by the names in the op's schema."""
    values = {a.name: a.default_value for a in site.node.target._schema.arguments}
    values.update(zip(values, site.args, strict=False))
    values.update(site.kwargs)
    return values.get("dim"), bool(values.get("keepdim", False))


@rule(*EXACT)
def sums(site: Site) -> Dims:
    """Summed entries that are removed were zero."""
    out, gone = _reduced(site, *_arguments(site))
    site.contract(*gone)
    return out


@rule(*STATISTICS)
def statistics(site: Site) -> list[Dims]:
    """Taken over the kept entries."""
    out, gone = _reduced(site, *_arguments(site))
    site.statistic(*gone)
    if len(site.shapes) > 1 and str(site.node.target).split(".")[1] in INDEXED:
        for axis in gone:
            site.lock(axis, "is indexed by the result of a maximum, minimum or median")
    return [list(out) for _ in site.shapes]


@rule("max", "min", "argmax", "argmin", "kthvalue")
def extrema(site: Site) -> list[Dims]:
    """The position of the extremum leaves the op, so nothing of the dim may go; without positions, a statistic."""
    name = str(site.node.target)
    if name.endswith(".other"):
        return [site.broadcast(site.dims(site.args[0]), site.dims(site.args[1]))]
    out, gone = _reduced(site, *_arguments(site))
    if len(site.shapes) > 1 or "arg" in name:
        for axis in gone:
            site.lock(axis, "is indexed by the result of a maximum or minimum")
    else:
        site.statistic(*gone)
    return [list(out) for _ in site.shapes]


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "special_softmax")
def softmax(site: Site) -> Dims:
    """Normalised over the kept entries of its dim."""
    x = site.dims(site.args[0])
    if x:
        site.statistic(x[site.arg(1, "dim") % len(x)])
    return x


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "diff")
def along(site: Site) -> list[Dims]:
    """Works along a dim in the order of its indices."""
    x = site.dims(site.args[0])
    given = site.arg(1, "dim", site.kwargs.get("dims", -1))
    for d in given if isinstance(given, (list, tuple)) else [given]:
        site.lock(x[d % len(x)], f"is worked along in order by {site.node.target}")
    return [
        [
            a if a is None or a.size == n else site.fixed(n, "is shortened")
            for a, n in zip(x, shape, strict=True)
        ]
        for shape in site.shapes
    ]


@rule("sort", "argsort", "topk", "msort")
def ranked(site: Site) -> list[Dims]:
    """Reorders a dim by value."""
    x = site.dims(site.args[0])
    name = str(site.node.target)
    position = 2 if "topk" in name else 1
    d = site.kwargs.get("dim", site.args[position] if len(site.args) > position else -1)
    if isinstance(d, bool):
        d = site.args[2] if len(site.args) > 2 else -1
    d %= max(len(x), 1)
    if x:
        site.lock(x[d], "is ordered by value")
    return [
        [
            a if i != d else site.fixed(n, "is ordered by value")
            for i, (a, n) in enumerate(zip(x, shape, strict=True))
        ]
        for shape in site.shapes
    ]


@rule("renorm", "linalg_norm", "linalg_matrix_norm")
def norms(site: Site) -> list[Dims]:
    """Norms over several dims at once are not followed."""
    return site.lock_all(f"goes into {site.node.target}")
