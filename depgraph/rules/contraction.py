"""Ops that sum over a dim which two operands share: their letters are the rule."""

from __future__ import annotations

from ..axes.axes import Axis
from ..axes.nodes import base_name
from ..axes.op_call import Dims, OpCall
from ..tracing.recorder import record_of
from .registry import contract_as, equation, rule

rule("mm")(equation("nk,km->nm", weight=1))
rule("bmm")(equation("bnk,bkm->bnm", weight=1))
rule("mv")(equation("nk,k->n", weight=0))
rule("dot", "vdot")(equation("k,k->"))
rule("cdist", "_cdist_forward", "_euclidean_dist")(equation("...nk,...mk->...nm"))
rule("bilinear")(equation("...i,...j,oij,o->...o", weight=2))


@rule("linear")
def linear(site: OpCall) -> Dims:
    """x[... k], weight[m k], bias[m] -> [... m]; a weight [k] is a matrix of one row whose dim is dropped."""
    text = "...k,mk,m->...m" if len(site.shape_of(site.args[1])) > 1 else "...k,k->..."
    return equation(text, weight=1)(site)


@rule("linalg_solve_triangular")
def solve_triangular(site: OpCall) -> Dims:
    """A[... n n] X = B[... n k]: the columns of B pass to X, or with left=False its rows; the matrix stays whole."""
    a, b = site.dims(site.args[0]), site.dims(site.args[1])
    passing = -1 if site.kwargs.get("left", True) else -2
    for axis in (a[-1], a[-2], b[-3 - passing]):
        site.lock(axis, "is a dim of a system of equations")
    lead = site.broadcast(a[:-2], b[:-2], size=site.shape[:-2])
    return [*lead, b[-2], b[-1]]


ADDED = {"addmm": (["nk", "km"], "nm"), "baddbmm": (["bnk", "bkm"], "bnm"), "addbmm": (["bnk", "bkm"], "nm"),
         "addmv": (["nk", "k"], "n"), "addr": (["n", "m"], "nm"), "_sparse_addmm": (["nk", "km"], "nm")}  # fmt: skip


@rule(*ADDED)
def add_product(site: OpCall) -> Dims:
    """bias + a @ b: the product's rule, and the bias broadcast on the result."""
    bias, *operands = site.args[:3]
    letters, result = ADDED[base_name(site.node.target)]
    out = contract_as(site, list(operands), letters, result, 1)
    function = record_of(site.node).function
    if bias in site.state.filled and record_of(bias).function == function and site.given("beta") == 0:
        site.state.dims[bias] = [out]  # zeros that torch itself made for the call
    site.broadcast(site.dims(bias), out)
    return out


@rule("matmul")
def matmul(site: OpCall) -> Dims:
    """a[... n k], b[... k m] -> [... n m]; a vector has no n, or no m, and neither has the result."""
    a, b = (len(site.shape_of(n)) for n in site.args[:2])
    left = "...nk" if a > 1 else "k"
    right = "...km" if b > 1 else "k"
    result = "..." + ("n" if a > 1 else "") + ("m" if b > 1 else "")
    if a == 1 and b == 1:
        result = ""
    return contract_as(site, list(site.args[:2]), [left, right], result, 1 if b <= a else None)


@rule("einsum")
def einsum(site: OpCall) -> Dims:
    """The letters in the call are the rule; a path only says in which order operands are taken."""
    text, *rest = site.args
    operands = list(rest[0]) if isinstance(rest[0], (list, tuple)) else rest
    left, arrow, right = str(text).replace(" ", "").partition("->")
    letters = left.split(",")
    if not arrow:
        flat = "".join(letters).replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(flat) if flat.count(c) == 1))
    return contract_as(site, operands, letters, right, None)


@rule("_grouped_mm")
def grouped_matmul(site: OpCall) -> Dims:
    """a[n k], b[e k m] -> [n m]: rows of a belong to blocks, each with its own matrix of b.

    The kernel wants rows of a multiple of 16 bytes, so k and m go in runs of that length.
    """
    a, b = site.dims(site.args[0]), site.dims(site.args[1])
    if len(a) != 2 or len(b) != 3:
        raise ValueError("only [rows, k] x [blocks, k, m] is covered")
    site.same(b[0], site.dims(site.arg(2, "offs"))[0])
    site.lock(a[0], "is counted in blocks of rows")
    site.same(a[1], b[1])
    for axis in b[1:]:
        _in_runs(site, axis, 16 // record_of(site.args[1]).dtype.itemsize)
    site.contract(a[1])
    site.weight(site.args[1], [b[2]], [b[1]], site.args[0])
    site.macs(a[0], b[1], b[2])
    return [a[0], b[2]]


def _in_runs(site: OpCall, axis: Axis | None, length: int) -> None:
    """Indices of `axis` go in runs of `length` only."""
    if axis is None or axis.size == length:
        site.lock(axis, "is as narrow as the kernel allows")
        return
    _, run = site.algebra.factor(axis, axis.size // length)
    site.lock(run, "is as narrow as the kernel allows")
