"""What single nodes of a recorded graph are: views, writes, weights, constants."""

from __future__ import annotations

import operator
from math import prod
from typing import Any

import torch

from ..tracing.recorder import Node
from ..tracing.trace import Trace


def op_name(node: Node) -> str:
    """``view`` of aten.view.default; of a node that is no op, nothing."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).removeprefix("aten::")


def _aliases(node: Node, write: bool) -> bool:
    """Whether an op's schema says that it writes into an argument, or that its result shares memory with one."""
    schema = getattr(node.target, "_schema", None)
    infos = [a.alias_info for a in schema.arguments] if schema is not None else []
    return any(info is not None and info.is_write == write for info in infos)


def writes(node: Node) -> bool:
    """Whether an op writes into one of its arguments."""
    return _aliases(node, write=True)


def is_view(node: Node) -> bool:
    """Whether the result of an op shares memory with one of its arguments."""
    return node.target is operator.getitem or _aliases(node, write=False)


def written(node: Node) -> bool:
    """Whether something is written into the memory of `node`, itself or through a view of it."""
    return any(writes(user) or (is_view(user) and written(user)) for user in node.users)


def leaves_of(node: Node, depth: int = 0) -> list[Node]:
    """The parameters that `node` is made of without any other input or contraction, else []; an index is no input."""
    if "leaves" in node.meta:
        found: list[Node] = node.meta["leaves"]
        return found
    if node.op == "get_attr":
        found = [node] if node.meta["kind"] == "tensor" else []
    elif node.op == "placeholder" or depth > 30 or node.meta.get("contracts"):
        found = []
    else:
        given = [n for n in node.all_input_nodes if n.op == "get_attr" or _holds_values(n)]
        parts = [leaves_of(n, depth + 1) for n in given]
        fine = all(p or n.op == "get_attr" for n, p in zip(given, parts, strict=True))
        found = [leaf for p in parts for leaf in p] if fine else []
    node.meta["leaves"] = found
    return found


def _holds_values(node: Node) -> bool:
    dtype = node.meta.get("dtype")
    return dtype is None or dtype.is_floating_point or dtype.is_complex


def constant_value(trace: Trace, node: Any, depth: int = 0) -> torch.Tensor | None:
    """Evaluate a node that rests on constants, index buffers and factory ops alone."""
    if not isinstance(node, Node) or depth > 40:
        return None
    if "constant" in node.meta:
        value: torch.Tensor | None = node.meta["constant"]
        return value
    value = None
    if node.op == "get_attr":
        value = trace.values.get(str(node.target))
        if value is not None and (value.is_floating_point() or value.device.type == "meta"):
            value = None
    elif node.op == "call_function" and node.target is not operator.getitem:
        inputs = {n: constant_value(trace, n, depth + 1) for n in node.all_input_nodes}
        name = str(node.target)
        if all(v is not None for v in inputs.values()) and "rand" not in name and "_." not in name:
            size = prod(node.meta["shapes"][0]) if node.meta["shapes"] else 1 << 30
            if size < 1 << 20:
                try:
                    args = torch.fx.map_arg(node.args, lambda n: inputs[n])
                    kwargs = torch.fx.map_arg(node.kwargs, lambda n: inputs[n])
                    kwargs = {k: v for k, v in kwargs.items() if k != "device"}
                    value = node.target(*args, **kwargs)  # type: ignore[operator]
                except Exception:  # noqa: BLE001  what can't be evaluated is not a constant
                    value = None
    node.meta["constant"] = value if isinstance(value, torch.Tensor) else None
    return node.meta["constant"]


def is_convolution(op: Any) -> bool:
    """Whether the op is a convolution of any kind."""
    return "convolution" in op._schema.name


def is_grouped(op: Any) -> bool:
    """Whether the op multiplies runs of rows by a matrix each."""
    return bool(op._schema.name == "aten::_grouped_mm")


def tokens(letters: str, rank: int) -> list[str]:
    """A name for each dim of an einsum's operand; leading dims that broadcast are numbered from the last one."""
    head, dots, tail = letters.partition("...")
    middle = rank - len(head) - len(tail) if dots else 0
    return [*head, *(f".{i}" for i in range(middle, 0, -1)), *tail]
