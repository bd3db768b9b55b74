"""Recurrent layers and cells as one op: the gates are a fixed factor of the weight's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..axes.axes import Axis, concat
from ..axes.nodes import GATES
from ..axes.op_call import Dims, OpCall
from ..tracing.whole import PACKED
from .registry import rule

STEPS = "ranges over the steps of a packed batch"


def _gates(site: OpCall, rows: Axis | None, hidden: Axis | None) -> None:
    """Rows of a gate matrix are (gates hidden)."""
    if rows is None or hidden is None:
        site.lock(rows, "holds the gates of a recurrent layer of width 1")
        return
    if rows.size == hidden.size:
        site.same(rows, hidden)
        return
    gates, inner = site.algebra.factor(rows, rows.size // hidden.size)
    site.lock(gates, "numbers the gates of a recurrent layer")
    site.same(inner, hidden)


def _step(
    site: OpCall,
    steps: Dims,
    x: Axis | None,
    h: Axis | None,
    hidden: Axis | None,
    weights: Sequence[Any],
    inputs: tuple[Any, Any] = (None, None),
) -> None:
    """weight_ih[(g c) x], weight_hh[(g c) h], biases[(g c)], once for every index of `steps`.

    `inputs` are the arguments that hold x and h, where the call has them.
    """
    for i, argument in enumerate(weights):
        if argument is None:
            continue
        dims = site.dims(argument)
        _gates(site, dims[0], hidden)
        if i < 2:
            site.same(dims[1], x if i == 0 else h)
            site.contract(dims[1])
            site.weight(argument, [dims[0]], [dims[1]], inputs[i], ("...k", "mk", "...m"))
            site.macs(*steps, *dims)


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(site: OpCall) -> list[Dims]:
    """x[n i], states[n c], weights[(g c) i], [(g c) c], biases[(g c)] -> states[n c]; the gates g stay whole."""
    x = site.dims(site.args[0])
    states = site.args[1] if isinstance(site.args[1], (list, tuple)) else [site.args[1]]
    hs = [site.dims(s) for s in states]
    for s in hs[1:]:
        for a, b in zip(hs[0], s, strict=True):
            site.same(a, b)
    site.same(x[0], hs[0][0])
    _step(site, x[:-1], x[-1], hs[0][-1], hs[0][-1], list(site.args[2:6]), (site.args[0], states[0]))
    return [list(hs[0]) for _ in site.shapes]


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def layers(site: OpCall) -> list[Dims]:
    """Cells over a sequence, stacked, bidirectional or projected: each layer and direction has units of its own.

    Called with (input, hx, params), or with a packed sequence. All hidden axes have one width. Where first or last states tell their
    entries apart, the axes are the same, as all of them stand in one dim there.
    """
    packed = site.node.target in PACKED.values()
    hx, params, has_biases, count = site.args[2 if packed else 1 :][:4]
    bidirectional = site.args[8 if packed else 7]
    x = site.dims(site.args[0])
    batch = _sequences(site, x, packed)
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    directions = 2 if bidirectional else 1
    per = len(params) // (count * directions)
    projected = per == (5 if has_biases else 3)
    feed, outs, cells = x[-1], [], []
    for layer in range(count):
        ends: list[Axis | None] = []
        for direction in range(directions):
            start = (layer * directions + direction) * per
            own = list(params[start : start + per])
            hidden = site.fresh(site.shape_of(own[1])[0] // GATES[site.name])
            out = site.dims(own[-1])[0] if projected else hidden
            own_weights = [own[0], own[1], *(own[2:4] if has_biases else [])]
            first = site.args[0] if layer == 0 else None
            _step(site, x[:-1], feed, out, hidden, own_weights, (first, None))
            if projected:
                _project(site, x[:-1], own[-1], hidden)
            ends.append(out)
            outs.append(out)
            cells.append(hidden)
        feed = concat([a or site.fixed_segment(1) for a in ends]) if len(ends) > 1 else ends[0]
    finals = [_states(site, i, state, (outs, cells)[i], batch) for i, state in enumerate(states)]
    return [[*x[:-1], feed], *finals]


def _project(site: OpCall, steps: Dims, weight: Any, hidden: Axis | None) -> None:
    """weight_hr[out c]; torch knows a projection by its being narrower than the layer."""
    rows, columns = site.dims(weight)
    site.same(columns, hidden)
    site.contract(columns)
    site.weight(weight, [rows], [columns])
    site.macs(*steps, rows, columns)
    site.narrower(weight, 0, 1)


def _sequences(site: OpCall, x: Dims, packed: bool) -> Axis | None:
    """The axis that tells sequences apart, if x has a dim of that alone; steps stand in a fixed order."""
    if packed:
        site.lock(site.dims(site.args[1])[0], STEPS)
    steps = 1 if not packed and len(x) == 3 and site.given("batch_first") else 0
    site.lock(x[steps], "ranges over the steps of a recurrent layer")
    return x[1 - steps] if len(x) == 3 else None


def _states(site: OpCall, number: int, first: Any, axes: list[Axis | None], batch: Axis | None) -> Dims:
    """Dims of the last states [layers*directions, n, c], whose first ones are `first` and hidden axes `axes`.

    Where neither tells its entries apart, every layer and direction keeps units of its own.
    """
    dims = site.dims(first)
    last = [user for user in site.node.users if user.args[1] == number + 1]
    if site.uniform(first) and not any(map(site.reaches_result, last)):
        wide = [a for a in axes if a is not None]
        if len(wide) > 1:
            site.equal_counts(wide, "layers of one recurrent module have one width")
    else:
        for axis in axes[1:]:
            site.same(axes[0], axis)
    site.same(dims[-1], axes[0])
    site.lock(dims[0], "numbers layers and directions")
    if batch is None:
        site.lock(dims[1] if len(dims) == 3 else None, STEPS)
    else:
        site.same(batch, dims[1])
    return dims


@rule("_pack_padded_sequence")
def pack(site: OpCall) -> list[Dims]:
    """x[n t ...] -> [steps ...], numbers of sequences: what follows n and t passes."""
    first, second, *rest = site.dims(site.args[0])
    for axis in (first, second, *site.dims(site.args[1])):
        site.lock(axis, STEPS)
    return [[site.fixed(site.shape[0], STEPS), *rest], [site.fixed(n, STEPS) for n in site.shapes[1]]]


@rule("_pad_packed_sequence")
def unpack(site: OpCall) -> list[Dims]:
    """x[steps ...] -> [n t ...], lengths: what follows the steps passes."""
    steps, *rest = site.dims(site.args[0])
    for axis in (steps, *site.dims(site.args[1])):
        site.lock(axis, STEPS)
    padded = [site.fixed(n, STEPS) for n in site.shape[:2]]
    return [[*padded, *rest], [site.fixed(n, STEPS) for n in site.shapes[1]]]
