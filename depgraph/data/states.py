"""What weights inside a recurrent layer are given: the states of the step before, or what the layer below gives.

Neither is an argument of the op, which is called once for all steps and layers. Both follow from its arguments: the op is called again,
layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..axes.nodes import op_name
from ..axes.op_call import Product
from ..tracing.whole import PACKED
from .consumers import path_to

Tensor = torch.Tensor
LAYERS = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


def reads_states(product: Product) -> bool:
    """Whether a product is inside a recurrent layer, of a weight whose inputs `states` can tell: not of a projection."""
    if product.activation is not None or op_name(product.node.target) not in LAYERS:
        return False
    path = path_to(product.node.args, product.weight)
    params, count, directions = _settings(product.node.target, product.node.args)
    per = len(params) // (count * directions)
    return path is not None and int(path[-1]) % per < 2


def states(op: Any, args: Sequence[Any], place: int) -> Tensor:
    """The inputs [samples, columns] of the weight that is parameter `place` of a call of the recurrent layer `op`.

    Of ``weight_hh`` they are the states before each step, of a layer's ``weight_ih`` the results of the layer below.
    """
    params, count, directions = _settings(op, args)
    per = len(params) // (count * directions)
    layer, direction = divmod(place // per, directions)
    feed = args[0]
    for below in range(layer):
        feed = _layer(op, args, feed, below)
    if place % per == 0:
        return feed.flatten(0, -2)
    out = _layer(op, args, feed, layer).chunk(directions, -1)[direction]
    packed = op in PACKED.values()
    hx = args[2 if packed else 1]
    first = (hx[0] if isinstance(hx, (list, tuple)) else hx)[layer * directions + direction]
    if packed:
        steps = _unpacked(out, args[1])
    else:
        steps = list(out.unbind(1 if args[8] else 0))
    before = _shifted(steps, first, backwards=direction == 1)
    return torch.cat(before) if packed else torch.stack(before, 1 if args[8] else 0).flatten(0, 1)


def _settings(op: Any, args: Sequence[Any]) -> tuple[Sequence[Any], int, int]:
    """(parameters, layers, directions)."""
    start = 3 if op in PACKED.values() else 2
    return args[start], args[start + 2], 2 if args[start + 5] else 1


def _layer(op: Any, args: Sequence[Any], feed: Tensor, layer: int) -> Tensor:
    """The result of one layer, of both directions where there are two."""
    packed = op in PACKED.values()
    params, count, directions = _settings(op, args)
    per = len(params) // count
    hx = args[2 if packed else 1]
    own = slice(layer * directions, (layer + 1) * directions)
    first = [s[own] for s in hx] if isinstance(hx, (list, tuple)) else hx[own]
    given = [feed, args[1], first] if packed else [feed, first]
    settings = [args[4 if packed else 3], 1, 0.0, False, directions == 2, *([] if packed else [args[8]])]
    out: Tensor = op(*given, list(params[layer * per : (layer + 1) * per]), *settings)[0]
    return out


def _unpacked(out: Tensor, sizes: Tensor) -> list[Tensor]:
    """The rows of each step of a packed batch."""
    return list(out.split(sizes.tolist()))


def _shifted(steps: list[Tensor], first: Tensor, backwards: bool) -> list[Tensor]:
    """The states before each step. A sequence that begins at a step has its first state there: those behind the others' rows."""
    order = steps[::-1] if backwards else steps
    before, last = [], first[:0]
    for now in order:
        known = last[: len(now)]
        before.append(torch.cat([known, first[len(known) : len(now)]]))
        last = now
    return before[::-1] if backwards else before
