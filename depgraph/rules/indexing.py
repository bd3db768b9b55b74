"""Ops that read or write entries chosen by an index tensor: the indexed dims stay whole, the others pass.

Two kinds of index are followed. A constant permutation or selection of an axis is followed unit by unit, and its buffer
renumbered. An index whose values number the axis that it is used on (a topk or maximum returned them) is counted anew
when units go.
"""

from __future__ import annotations

from typing import Any

import torch

from ..axes.axes import Axis
from ..axes.nodes import op_name
from ..axes.op_call import Dims, OpCall
from ..tracing.recorder import record_of
from .registry import rule

PICKED = "is indexed by a tensor"


@rule("embedding")
def embedding(site: OpCall) -> Dims:
    """weight[v c], index[...] -> [... c]; rows v are looked up by number."""
    rows, channels = site.dims(site.args[0])
    site.looked_up(rows, site.args[1], "is looked up by number (rows of an embedding)")
    site.weight(site.args[0], [channels], [])
    return [*site.dims(site.args[1]), channels]


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(site: OpCall) -> list[Dims]:
    """weight[v c] -> [bags c]; rows are looked up by number, and bags are runs of those numbers."""
    rows, channels = site.dims(site.args[0])
    site.lock(rows, "is looked up by number (rows of an embedding)")
    site.weight(site.args[0], [channels], [])
    for other in site.node.all_input_nodes[1:]:
        for axis in site.dims(other):
            site.lock(axis, "ranges over bags")
    bags = [[site.fixed(n, "ranges over bags") for n in shape[:1]] for shape in site.shapes]
    return [
        [*dims, channels] if len(shape) == 2 else dims for dims, shape in zip(bags, site.shapes, strict=True)
    ]


def _table_read(site: OpCall, x: Dims, taken: list[Any]) -> None:
    """Rows of a table [v c] that are read by number are an embedding: the table produces the channels c."""
    if len(x) == 2 and taken == [0]:
        site.weight(site.args[0], [x[1]], [])


def _permuted(site: OpCall, axis: Axis | None, index: Any) -> Axis | None:
    """The axis of ``axis[index]`` where `index` is a buffer without repetitions: its values can be renumbered."""
    values = site.constant(index)
    if (
        axis is None
        or values is None
        or values.dim() != 1
        or values.dtype is torch.bool  # chooses, and does not number
        or index.op != "get_attr"
        or record_of(index).kind != "tensor"
    ):
        return None
    if len(index.users) != 1 or values.numel() < 2:
        return None
    found = site.reorder(axis, [int(i) % axis.size for i in values.tolist()])
    if found is not None:
        site.state.dims[index] = [[found]]
        site.state.renumbered[str(index.target)] = axis
    return found


@rule("index_select")
def index_select(site: OpCall) -> Dims:
    """Dim d is read at the indices of a vector, and is the vector's then; the others pass."""
    x = site.dims(site.args[0])
    d = site.args[1] % max(len(x), 1)
    permuted = _permuted(site, x[d], site.args[2])
    if permuted is not None:
        return [*x[:d], permuted, *x[d + 1 :]]
    index = site.dims(site.args[2])
    _table_read(site, x, [d])
    site.looked_up(x[d], site.args[2], PICKED)
    x[d] = index[0] if index and site.shape[d] != 1 else None
    site.lock(x[d], "ranges over an index")
    return x


@rule("index", "_unsafe_index")
def index(site: OpCall) -> Dims:
    """x[i, :, j]: the broadcast dims of the indices take the place of the indexed ones; the others pass."""
    x = site.dims(site.args[0])
    entries = list(site.args[1])
    given = [i for i, e in enumerate(entries) if e is not None]
    if len(given) == 1:
        d = given[0]
        permuted = _permuted(site, x[d], entries[d])
        if permuted is not None:
            return [*x[:d], permuted, *x[d + 1 :]]
    _table_read(site, x, [i for i, e in enumerate(entries) if e is not None])
    before, after, groups = _chosen(site, x, entries)
    shape = site.shape[len(before) : len(site.shape) - len(after)]
    middle = site.broadcast(*groups, size=shape)
    for axis in middle:
        site.lock(axis, "ranges over an index")
    return [*before, *middle, *after]


def _chosen(site: OpCall, x: Dims, entries: list[Any]) -> tuple[Dims, Dims, list[Dims]]:
    """Dims of x that stand before and behind those of the indices in ``x[entries]``, and those of each index.

    The indexed dims are locked, and the dims of masks, whose place one dim of unknown size takes.
    """
    taken: list[int] = []
    groups: list[Dims] = []
    d = 0
    for entry in entries:
        if entry is None:
            d += 1
            continue
        boolean = record_of(entry).dtype in (torch.bool, torch.uint8)
        own = site.dims(entry)
        width = len(own) if boolean else 1
        for axis in (*x[d : d + width], *own) if boolean else ():
            site.lock(axis, PICKED)
        if not boolean:
            site.looked_up(x[d], entry, PICKED)
        taken.extend(range(d, d + width))
        groups.append([None] if boolean else own)
        d += width
    passing = [i for i in range(len(x)) if i not in taken]
    together = not taken or taken == list(range(taken[0], taken[0] + len(taken)))
    before = [x[i] for i in passing if taken and together and i < taken[0]]
    after = [x[i] for i in passing][len(before) :]
    return before, after, groups


def _fill_by_mask(site: OpCall, x: Dims, values: Dims) -> bool:
    """Whether x[mask] = values writes the same for all entries that the mask chooses; then x ranges over its dims.

    `values` are the dims of the values, last first.
    """
    entries = site.args[1]
    (start, mask), *more = [(i, e) for i, e in enumerate(entries) if e is not None]
    own = site.dims(mask)
    behind = len(x) - start - len(own)
    if more or record_of(mask).dtype not in (torch.bool, torch.uint8) or any(values[behind : behind + 1]):
        return False
    slots = [*x[:start], None, *x[start + len(own) :]]
    for a, b in (*zip(x[start:], own, strict=False), *zip(slots[::-1], values, strict=False)):
        site.same(a, b)
    return True


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(site: OpCall) -> Dims:
    """x[i] = values, which broadcast over what x[i] would be: indexed dims stay whole, unless one value fills a mask."""
    x, values = site.dims(site.args[0]), site.dims(site.args[2])[::-1]
    if _fill_by_mask(site, x, values):
        return x
    before, after, groups = _chosen(site, list(x), list(site.args[1]))
    count = max(map(len, groups), default=0)
    for axis in (*values[len(after) : len(after) + count], *(a for dims in groups for a in dims)):
        site.lock(axis, "ranges over an index")
    for a, b in (
        *zip(after[::-1], values, strict=False),
        *zip(before[::-1], values[len(after) + count :], strict=False),
    ):
        site.same(a, b)
    return x


@rule("gather")
def gather(site: OpCall) -> Dims:
    """Dim d is read at an index of the same rank; in the other dims, index and source match where sizes do."""
    x, index_dims = site.dims(site.args[0]), site.dims(site.args[2])
    d = site.args[1] % len(x)
    for i, (a, b) in enumerate(zip(x, index_dims, strict=True)):
        if i == d:
            site.looked_up(a, site.args[2], PICKED)
            site.lock(b, "ranges over an index")
        elif a is not None and b is not None and a.size == b.size:
            site.same(a, b)
        else:
            site.lock(a, PICKED)
            site.lock(b, PICKED)
    return index_dims


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(site: OpCall) -> Dims:
    """Dim d is written at an index; in the other dims target, index and source match where sizes do."""
    x, index_dims = site.dims(site.args[0]), site.dims(site.args[2])
    source = site.dims(site.args[3]) if isinstance(site.args[3], torch.fx.Node) else []
    d = site.args[1] % len(x)
    others = [index_dims, source] if len(source) == len(x) else [index_dims]
    site.looked_up(x[d], site.args[2], PICKED)
    for i, a in enumerate(x):
        for other in others:
            b = other[i]
            if i == d:
                site.lock(b, PICKED)
            elif a is not None and b is not None and a.size == b.size:
                site.same(a, b)
            elif a is not None or b is not None:
                site.lock(a, PICKED)
                site.lock(b, PICKED)
    return x


@rule("index_add", "index_copy", "index_reduce", "index_fill")
def index_add(site: OpCall) -> Dims:
    """Dim d is written at the indices of a vector; the others match."""
    x = site.dims(site.args[0])
    d = site.args[1] % len(x)
    site.looked_up(x[d], site.args[2], PICKED)
    for axis in site.dims(site.args[2]):
        site.lock(axis, "ranges over an index")
    if len(site.args) > 3 and isinstance(site.args[3], torch.fx.Node):
        for i, (a, b) in enumerate(zip(x, site.dims(site.args[3]), strict=False)):
            if i != d:
                site.same(a, b)
            else:
                site.lock(b, "ranges over an index")
    return x


@rule("one_hot")
def one_hot(site: OpCall) -> Dims:
    """index[...] -> [... c]: the index numbers the new dim."""
    axis = site.new(len(site.shape) - 1)
    site.looked_up(axis, site.args[0], "is looked up by number (columns of a one-hot table)")
    return [*site.dims(site.args[0]), axis]


@rule("histc")
def histc(site: OpCall) -> Dims:
    """How often each index of an axis occurs: one bin of width 1 an index, from 0 to the last."""
    bins, low, high = site.arg(1, "bins", 100), site.arg(2, "min", 0), site.arg(3, "max", 0)
    numbered = site.numbers(site.args[0])
    if numbered is None or (bins, low, high) != (numbered.size, 0, numbered.size - 1):
        site.lock(numbered, "is counted in bins")
        return data_dependent(site)[0]
    axis = site.new(0)
    site.same(axis, numbered)
    return [axis]


@rule("masked_select", "nonzero", "unique_dim", "_unique2", "unique_consecutive", "searchsorted", "bincount",
      "multinomial", "isin", "take")  # fmt: skip
def data_dependent(site: OpCall) -> list[Dims]:
    """What comes out, or how much of it, depends on values: all dims stay whole."""
    return site.lock_all(f"goes into {site.node.target}, whose result depends on values")


@rule("masked_scatter")
def masked_scatter(site: OpCall) -> Dims:
    """Filled in reading order: the last dim passes where the mask is the same along it; all others stay whole."""
    x, source = site.dims(site.args[0]), site.dims(site.args[2])
    if not source or x[-1] is None or source[-1] is None or not _repeated(site.args[1], site.shape[-1]):
        return site.lock_all("is filled in reading order by a mask")[0]
    site.same(x[-1], source[-1])
    for axis in (*x[:-1], *source[:-1], *site.dims(site.args[1])[:-1]):
        site.lock(axis, "is filled in reading order by a mask")
    for axis in site.dims(site.args[1])[-1:]:
        site.same(axis, x[-1])
    return x


def _repeated(mask: Any, width: int) -> bool:
    """Whether a mask is one column, or copies of one column side by side."""
    while True:
        shape = record_of(mask).shape if record_of(mask).shapes else ()
        if not shape or shape[-1] == 1 != width:
            return bool(shape)
        name = op_name(mask.target)
        if name in ("expand", "expand_as"):
            return record_of(mask.args[0]).shape[-1:] == (1,)
        if name not in ("_to_copy", "clone", "detach", "alias", "contiguous"):
            return False
        mask = mask.args[0]
