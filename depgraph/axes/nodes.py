"""What an op is, by its identity and its schema; and what single nodes of a recorded graph are: views, writes."""

from __future__ import annotations

import operator
from typing import Any

import torch

from ..tracing.recorder import Node

# ------------------------------------------------------------------------------------------------------ ops by name

CONVOLUTIONS = frozenset({"convolution", "_convolution", "convolution_overrideable"})
GROUPED_PRODUCTS = frozenset({"_grouped_mm"})
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1,
         "lstm_cell": 4, "gru_cell": 3, "rnn_tanh_cell": 1, "rnn_relu_cell": 1}  # fmt: skip
BATCH_NORMS = frozenset(
    {"batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
     "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update"}
)  # fmt: skip
NORMS = BATCH_NORMS | {"instance_norm", "layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "group_norm",
                       "native_group_norm"}  # fmt: skip

# The result holds values of the first argument, moved or chosen.
VALUES_KEPT = frozenset(
    {"view", "reshape", "_unsafe_view", "flatten", "transpose", "permute", "t", "squeeze", "unsqueeze", "expand", "clone",
     "_to_copy", "contiguous", "detach", "alias", "slice", "select", "index", "index_select", "gather", "unbind", "split",
     "chunk", "sort", "repeat", "repeat_interleave", "view_as", "expand_as"}
)  # fmt: skip


def op_name(op: Any) -> str:
    """``view`` of aten.view.default; with its namespace the name of another library's op; of what is not an op, nothing."""
    schema = getattr(op, "_schema", None)
    return "" if schema is None else str(schema.name).removeprefix("aten::")


def base_name(op: Any) -> str:
    """The name of an op, or of the one that it is the in-place form of."""
    name = op_name(op)
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def is_convolution(op: Any) -> bool:
    """Whether the op is a convolution of any kind."""
    return op_name(op) in CONVOLUTIONS


def is_grouped(op: Any) -> bool:
    """Whether the op multiplies runs of rows by a matrix each."""
    return op_name(op) in GROUPED_PRODUCTS


def is_function(op: Any) -> bool:
    """Whether the op only makes something of its arguments: it draws nothing at random and writes into none."""
    schema = getattr(op, "_schema", None)
    return schema is not None and not schema.is_mutable and torch.Tag.nondeterministic_seeded not in op.tags


def argument_of(node: Node, name: str, default: Any = None) -> Any:
    """The argument of a call that the op's schema calls `name`, or its default there; `default` where that is None."""
    schema = getattr(node.target, "_schema", None)
    for position, a in enumerate(schema.arguments if schema is not None else ()):
        if a.name == name:
            given = (
                node.args[position] if len(node.args) > position else node.kwargs.get(name, a.default_value)
            )
            return default if given is None else given
    return default


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


def tokens(letters: str, rank: int) -> list[str]:
    """A name for each dim of an einsum's operand; leading dims that broadcast are numbered from the last one."""
    head, dots, tail = letters.partition("...")
    middle = rank - len(head) - len(tail) if dots else 0
    return [*head, *(f".{i}" for i in range(middle, 0, -1)), *tail]
