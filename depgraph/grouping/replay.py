"""Does the smaller model run the same program? Op by op, with the sizes that were planned and the same numbers.

No weight and no input matters for this: whatever the code made of a size, by whatever way, shows in the ops it calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ..axes import polynomials
from ..axes.axes import Axis
from ..axes.nodes import written
from ..base.errors import VerificationError
from ..plan.plan import Masks
from ..tracing.recorder import Node, record_of
from ..tracing.trace import Trace, replay
from .graph import DependencyGraph

aten = torch.ops.aten
# Ops whose ints outside of lists are values, as those of pointwise ops are; all other ops take sizes, places and dims.
VALUED = {aten.full, aten.full_like, aten.new_full, aten.fill, aten.fill_, aten.scalar_tensor, aten.linspace, aten.logspace,
          aten.masked_fill, aten.masked_fill_, aten.constant_pad_nd}  # fmt: skip
DEPENDENT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
# Ops through which a number in a table comes to where Python reads it.
MOVING = {
    aten.select,
    aten.slice,
    aten.view,
    aten.squeeze,
    aten.unsqueeze,
    aten.clone,
    aten.detach,
    aten.alias,
    aten._to_copy,
}


def is_needed(graph: DependencyGraph, verify: bool) -> bool:
    """Whether `check_program` can find what a comparison of values on the example does not.

    Where nothing else is compared, a size became a plain number, or not every run of the trace is one of the example in eval mode.
    """
    return not verify or bool(graph.trace.losses or graph.trace.other_ways or graph.trace.train)


def check_program(graph: DependencyGraph, masks: Masks, small: nn.Module, example_inputs: Any) -> None:
    """Compare a run of `small` with the traced run of its original.

    From the first op on whose result depends on values a difference means nothing: there the runs may part.

    Raises:
        VerificationError: an op is another one, has another shape than planned, or computes with another number.
    """
    before = graph.trace
    try:
        after = replay(small, example_inputs, before)
    except Exception as error:
        raise VerificationError(f"the smaller model does not run: {type(error).__name__}: {error}") from error
    counts = graph.sizes.counts({graph.named[name].axis: mask for name, mask in masks.items()})
    values = {node for node, *_ in before.escapes}
    tables = {
        n for n in before.graph.nodes if _is_constant(n)
    }  # they hold nothing that depends on weights or inputs
    changed: set[Node] = set()  # those that hold other integers: sizes, which Python may read
    (ran, sources), (runs, others) = _program(before), _program(after)
    place = dict(zip(ran, runs, strict=False))
    for copy, source in sources.items():
        place[copy] = place.get(source, copy)
    for old in ran:
        if old.op == "output":
            return
        if any(tag in getattr(old.target, "tags", ()) for tag in DEPENDENT) and not tables >= {
            *old.all_input_nodes
        }:
            values.add(old)
        new = place.get(old)
        packet = getattr(old.target, "overloadpacket", None)
        if packet in MOVING and old.args[0] in tables:
            tables.add(old)
            changed |= {old} if old.args[0] in changed else set()
        if new is None:
            text = "is followed by nothing"
        elif old in tables and packet is None and _holds_other_integers(graph.trace, old, after, new):
            text = ""
            changed.add(old)
        elif (
            old not in tables and packet is not aten._local_scalar_dense and changed & {*old.all_input_nodes}
        ):
            text = "computes with other sizes, put into a tensor"
        else:
            text = _difference(graph, counts, old, new, place, others, after)
        if text:
            if values:
                return
            seen = record_of(old)
            where = f" in {seen.module}" if seen.module else ""
            raise VerificationError(f"{old.target}{where} {text} ({seen.source})")


def _is_constant(node: Node) -> bool:
    return node.op == "get_attr" and record_of(node).kind == "constant"


def _holds_other_integers(before: Trace, old: Node, after: Trace, new: Node) -> bool:
    if before.fake or not _is_constant(new):
        return False
    a, b = before.constants[str(old.target)], after.constants[str(new.target)]
    exact = not (a.is_floating_point() or a.is_complex() or a.dtype == torch.bool)
    return exact and a.shape == b.shape and a.dtype == b.dtype and not a.is_meta and not torch.equal(a, b)


def _program(trace: Trace) -> tuple[list[Node], dict[Node, Node]]:
    """The ops in order, and copy -> what it copies.

    Tensors of siblings that no run called are left out, and copies that nobody could tell from what they copy: a
    `reshape` makes them where strides leave it no other way, and a dim of one index leaves it more.
    """
    nodes: list[Node] = []
    sources: dict[Node, Node] = {}
    for node in trace.graph.nodes:
        source = node.args[0] if getattr(node.target, "overloadpacket", None) is aten.clone else None
        if isinstance(source, Node) and not written(node) and not written(source):
            sources[node] = sources.get(source, source)
        elif node.op != "get_attr" or node.users:
            nodes.append(node)
    return nodes, sources


def _name(node: Node) -> str:
    return str(node.target).replace("_unsafe_view", "view")  # a view, of a copy


def _difference(
    graph: DependencyGraph,
    counts: dict[Axis, int],
    old: Node,
    new: Node,
    place: dict[Node, Node],
    others: dict[Node, Node],
    after: Trace,
) -> str:
    """How `new` is not what became of `old`; "" where it is."""
    if (old.op, _name(old)) != (new.op, _name(new)):
        return f"became {new.target}"
    for dims, shape in zip(graph.state.dims.get(old, ()), record_of(new).shapes, strict=False):
        planned = tuple(polynomials.evaluate(polynomials.count(a, graph.sizes.free), counts) for a in dims)
        if planned != shape:
            return f"gives the shape {shape} where {planned} is planned"
    if str(old.target) in {str(table.target) for table in graph.sizes.decisions}:
        return ""  # a table of sizes that only decides: it decides as before
    if record_of(old).backward:
        return ""  # numbers there only scale gradients
    if _is_constant(old):
        a, b = graph.trace.constants[str(old.target)], after.constants[str(new.target)]
        same = (
            a.shape == b.shape and a.dtype == b.dtype and (graph.trace.fake or a.is_meta or torch.equal(a, b))
        )
        return "" if same else f"has the values {_short(b)} instead of {_short(a)}"
    packet = getattr(old.target, "overloadpacket", None)
    if torch.Tag.pointwise in getattr(old.target, "tags", ()) or packet in VALUED:
        ints, now = ([v for v in (*n.args, *n.kwargs.values()) if type(v) in (int, bool)] for n in (old, new))
        if ints != now:
            return f"computes with {now} instead of {ints}"
    for a, b in zip(_leaves((old.args, old.kwargs)), _leaves((new.args, new.kwargs)), strict=False):
        same = place.get(a) is others.get(b, b) if isinstance(a, Node) else type(a) is type(b)
        if same and type(a) is float:
            same = a == b or (a != a and b != b)  # noqa: PLR0124  NaN
        if not same:
            return f"computes with {b} instead of {a}"
    return ""


def _short(tensor: torch.Tensor) -> Any:
    return tensor.tolist() if tensor.numel() < 5 else tuple(tensor.shape)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for v in value:
            yield from _leaves(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from _leaves(v)
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    elif not isinstance(value, np.ndarray):
        yield value
