"""Recurrent layers and cells as one op: the gates are a fixed factor of the weight's rows."""

from __future__ import annotations

from typing import Any

from ..axes import Axis, concat
from ..propagate import Dims, Site
from .registry import rule


def _gates(site: Site, rows: Axis | None, hidden: Axis | None) -> None:
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


def _step(site: Site, x: Axis | None, h: Axis | None, hidden: Axis | None, weights: list[Any]) -> None:
    """weight_ih[(g c) x], weight_hh[(g c) h], biases[(g c)]."""
    for i, argument in enumerate(weights):
        if argument is None:
            continue
        dims = site.dims(argument)
        _gates(site, dims[0], hidden)
        if i < 2:
            site.same(dims[1], x if i == 0 else h)
            site.weight(argument, [dims[0]], [dims[1]])


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(site: Site) -> list[Dims]:
    """x[n i], h[n c] (and c[n c]) -> the same."""
    x = site.dims(site.args[0])
    states = site.args[1] if isinstance(site.args[1], (list, tuple)) else [site.args[1]]
    hs = [site.dims(s) for s in states]
    for s in hs[1:]:
        for a, b in zip(hs[0], s, strict=True):
            site.same(a, b)
    site.same(x[0], hs[0][0])
    _step(site, x[-1], hs[0][-1], hs[0][-1], list(site.args[2:6]))
    return [list(hs[0]) for _ in site.shapes]


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def layers(site: Site) -> list[Dims]:
    """Stacked, bidirectional, projected layers over a sequence (input, hx, params) or a packed one.

    Every layer and direction has its own hidden axis. Initial states that are not filled with one value, and final
    states, hold all of them in one dim, so they are then the same axis.
    """
    packed = isinstance(site.args[1], type(site.node)) and str(site.node.target).endswith(".data")
    hx, params, has_biases, count = site.args[2 if packed else 1], *site.args[3 if packed else 2 :][:3]
    bidirectional = site.args[8 if packed else 7]
    batch_first = (not packed) and site.args[8]
    x = site.dims(site.args[0])
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
            gates = len_gates(site)
            hidden = site.fresh(site.shape_of(own[1])[0] // gates)
            out = site.dims(own[-1])[0] if projected else hidden
            _step(site, feed, out, hidden, [own[0], own[1], *(own[2:4] if has_biases else [])])
            if projected:
                rows, columns = site.dims(own[-1])
                site.same(columns, hidden)
                site.weight(own[-1], [rows], [columns])
            ends.append(out)
            outs.append(out)
            cells.append(hidden)
        feed = concat([a or site.fixed_segment(1) for a in ends]) if len(ends) > 1 else ends[0]
    _tie_states(site, states, outs, cells, len(outs) > 1)
    rest = x[:-1]
    result: Dims = [*rest, feed]
    batch = None if packed else x[0 if batch_first else 1] if len(x) == 3 else None
    finals = []
    for i, shape in enumerate(site.shapes[1:]):
        axis = (outs if i == 0 else cells)[0]
        finals.append(
            [
                site.fixed(shape[0], "numbers layers and directions"),
                *([batch] if len(shape) == 3 else []),
                axis,
            ]
        )
    for dims, shape in zip(finals, site.shapes[1:], strict=True):
        if len(shape) == 3 and shape[1] > 1 and dims[1] is None:
            dims[1] = site.fixed(shape[1], "ranges over the sequences of a packed batch")
    return [result, *finals]


def len_gates(site: Site) -> int:
    """Gates of one step: 4 for lstm, 3 for gru, 1 for plain."""
    name = str(site.node.target)
    return 4 if "lstm" in name else 3 if "gru" in name else 1


def _tie_states(site: Site, states: list[Any], outs: list[Any], cells: list[Any], several: bool) -> None:
    """Initial states range over the hidden axes; all layers and directions stand in one dim of them."""
    node = site.node
    finals_used = any(
        user.args[1] != 0 and len(user.users) for user in node.users if len(user.args) > 1
    ) or any(s not in site.state.filled for s in states)
    for i, state in enumerate(states):
        axes = outs if i == 0 else cells
        dims = site.dims(state)
        if state in site.state.filled:
            if several and not finals_used:
                site.equal_counts(
                    [a for a in axes if a is not None], "layers of one recurrent module have one width"
                )
            else:
                for axis in axes:
                    site.same(axis, axes[0])
            site.same(dims[-1], axes[0])
        else:
            for axis in axes:
                site.same(dims[-1], axis)
    if several and finals_used:
        for axes in (outs, cells):
            for axis in axes[1:]:
                site.same(axes[0], axis)
