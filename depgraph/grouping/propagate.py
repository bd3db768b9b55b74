"""Trace -> the axes of every tensor: each node's dims, by the rule of its op.

`propagate` walks the graph once. Relations do not depend on the order in which they are found, so views, in-place ops
and repeated use need no special care. An op without a rule, or one whose rule fails, freezes every axis it touches.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..axes.axes import ATOM, PRODUCT, Algebra, Axis, Reason
from ..axes.nodes import VALUES_KEPT, argument_of
from ..axes.op_call import DimFacts, Dims, OpCall
from ..axes.ragged import misplaced
from ..base.errors import UnknownOpError
from ..rules import rule_for
from ..tracing.recorder import Node, record_of
from ..tracing.tensors import memory_of
from ..tracing.trace import Trace
from ..tracing.whole import own_namespace


def propagate(trace: Trace, strict: bool = False) -> DimFacts:
    """Give every dim of every tensor of `trace` an axis.

    Args:
        trace: what `trace()` recorded.
        strict: raise at an op that no rule covers, instead of freezing its axes.

    Raises:
        UnknownOpError: with `strict`, naming the op, the module and the user's line.
    """
    state, algebra = DimFacts(trace, comparisons=list(trace.comparisons)), Algebra()
    for use in trace.size_uses:
        made: Any = use.node
        state.sized.add((made, use.dim))
        while made.target is torch.ops.aten.detach.default:  # factories detach what they made
            made = made.args[0]
            state.sized.add((made, use.dim))
    on_memory: dict[Any, Dims] = {}  # parameters of their own that are the same numbers have the same axes
    for node in trace.graph.nodes:
        if node.op == "output":
            continue
        record = record_of(node)
        algebra.place = _place(node)
        if node.op == "placeholder":
            state.dims[node] = [_fixed(algebra, record.shape, "ranges over a model input")]
        elif node.op == "get_attr":
            dims: Dims = [Axis(n) if n != 1 else None for n in record.shape]
            if (memory := memory_of(trace.values[node.target])) is not None:
                dims = on_memory.setdefault(memory, dims)
            state.dims[node] = [dims]
            if record.shape and not record.strides[0]:
                for axis in dims:
                    algebra.freeze(axis, "ranges over a sparse tensor")
            elif not record.holds_values and record.dtype is not torch.bool and not _are_zero_points(node):
                for axis in dims:
                    algebra.freeze(axis, "ranges over a table of integers")
            elif record.kind == "constant":
                for axis in dims:
                    algebra.freeze(axis, "ranges over a constant that is neither parameter nor buffer")
        elif node.target is operator.getitem:
            source, index = node.args
            state.dims[node] = [state.dims[source][index]]
            if (source, index) in state.numbers:
                state.numbers[node, 0] = state.numbers[source, index]
        else:
            state.dims[node] = _apply(state, algebra, node, rule_for(node.target), strict)
    for node, text, module, source in trace.escapes:
        algebra.place = Reason("", str(node.target), module, source)
        for axis in state.dims[node][0]:
            algebra.freeze(axis, text)
    for node in trace.outputs:
        algebra.place = _place(node)
        for axis in state.dims[node][0]:
            algebra.freeze(axis, "is a dim of a model output")
        algebra.freeze(state.numbers.get((node, 0)), "is numbered by a model output")
    _settle(state, algebra)
    return state


def _place(node: Node) -> Reason:
    """Where `node` is, for the reasons of what is frozen there."""
    return Reason("", str(node.target), record_of(node).module, record_of(node).source)


def _are_zero_points(node: Node) -> bool:
    """Whether integers are read as what zero is rounded to, one for each channel, and as nothing else."""
    return bool(node.users) and all(argument_of(user, "zero_point") is node for user in node.users)


def _fixed(algebra: Algebra, shape: Sequence[int], text: str) -> Dims:
    dims: Dims = [Axis(n) if n != 1 else None for n in shape]
    for axis in dims:
        algebra.freeze(axis, text)
    return dims


def _apply(state: DimFacts, algebra: Algebra, node: Node, rule: Any, strict: bool) -> list[Dims]:
    site = OpCall(state, algebra, node)
    foreign = own_namespace(node.target)
    silent = not site.shapes and not foreign and not node.target._schema.is_mutable  # type: ignore[union-attr]
    if rule is None and silent:
        return []  # such as an assertion
    if rule is None:
        state.unknown.setdefault(str(node.target), []).append(node)
        if strict:
            raise UnknownOpError(
                f"no rule says what {node.target} does to the dims of its arguments\n"
                f"  in module {record_of(node).module or '(root)'}, {record_of(node).source}\n"
                "  fix: call without strict=True (its axes are then frozen), or state a rule (depgraph.op_rule)"
            )
        remedy = ": depgraph.op_rule can state one" if foreign else ""
        return site.lock_all(f"goes through {node.target}, for which there is no rule{remedy}")
    if foreign and node.target._schema.is_mutable:  # type: ignore[union-attr]
        return site.lock_all(f"goes through {node.target}, which changes its arguments")
    try:
        out = rule(site)
        out = [] if out is None else out
        results: list[Dims] = [out] if site.shapes and (not out or not isinstance(out[0], list)) else out
        if len(results) != len(site.shapes):
            raise ValueError(f"{len(results)} results for {len(site.shapes)} tensors")
        for i, (dims, shape) in enumerate(zip(results, site.shapes, strict=True)):
            sizes = tuple(1 if a is None else a.size for a in dims)
            if sizes != shape:
                raise ValueError(f"the rule says {sizes} where the result {i} is {shape}")
    except Exception as error:  # noqa: BLE001  a rule that fails must freeze, not crash
        state.unknown.setdefault(str(node.target), []).append(node)
        return site.lock_all(f"goes through {node.target}, whose rule does not cover this call ({error})")
    _pass_numbers(site)
    return results


# Ops that only compare the values of their first argument, or don't look at them.
ORDER_ONLY = {"sort", "argsort", "empty_like", "zeros_like", "ones_like", "new_zeros"}


def _pass_numbers(site: OpCall) -> None:
    """Tensors that hold indices of an axis: moved they still do; what else an op makes of them is not followed."""
    node, state = site.node, site.state
    for argument in node.all_input_nodes:
        axis = state.numbers.get((argument, 0))
        if axis is None or argument in site.understood:
            continue
        if site.name in VALUES_KEPT and argument is site.args[0]:
            for i in range(1 if site.name == "sort" else len(site.shapes)):
                site.number(axis, i)
        elif site.name not in ORDER_ONLY:
            site.lock(axis, f"is numbered by values that go into {node.target}")


def _settle(state: DimFacts, algebra: Algebra) -> None:
    """What can be said only when every op has been seen: which ragged dims stand beside their blocks."""
    for node, results in state.dims.items():
        for dims in results:
            for axis in [a for a in dims if a is not None]:
                if misplaced(dims, axis, node.op == "get_attr"):
                    algebra.place = replace(_place(node), source="")
                    algebra.collapse(axis)
    algebra.place = Reason("")
    seen: set[Axis] = set()
    for results in state.dims.values():
        for dims in results:
            for whole in dims:
                if whole is not None and whole.find() not in seen:
                    seen.add(whole.find())
                    for atom in _lone_units(whole):
                        algebra.freeze(atom, "is the only index of a dim")


def _lone_units(axis: Axis) -> list[Axis]:
    """Atoms of size 1 that are a whole dim, or a factor of one."""
    axis = axis.find()
    if axis.kind == ATOM:
        return [axis] if axis.size == 1 and axis.frozen is None else []
    if axis.kind == PRODUCT:
        return [u for p in axis.parts for u in _lone_units(p)]
    return []


__all__ = ["propagate"]
