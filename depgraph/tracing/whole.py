"""Which ops a trace takes whole: composite ones, of whose parts less can be said than of their name."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional

aten = torch.ops.aten

# Python functions recorded as one ATen call instead of the calls they are made of.
WHOLE: dict[Any, Any] = {
    torch.nn.functional.linear: aten.linear.default,
    torch._C._nn.linear: aten.linear.default,
    torch.nn.functional.scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
    torch._C._nn.scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
    torch.matmul: aten.matmul.default,
    torch.Tensor.matmul: aten.matmul.default,
    torch.Tensor.__matmul__: aten.matmul.default,
    torch.bmm: aten.bmm.default,
    torch.functional.einsum: aten.einsum.default,
    torch._VF.einsum: aten.einsum.default,  # type: ignore[attr-defined]
    torch.instance_norm: aten.instance_norm.default,
    torch.rms_norm: aten.rms_norm.default,
    torch.group_norm: aten.group_norm.default,
    torch.layer_norm: aten.layer_norm.default,
    torch.batch_norm: aten.batch_norm.default,
    torch.lstm: aten.lstm.input,
    torch.gru: aten.gru.input,
    torch.rnn_tanh: aten.rnn_tanh.input,
    torch.rnn_relu: aten.rnn_relu.input,
    torch._VF.lstm: aten.lstm.input,
    torch._VF.gru: aten.gru.input,
    torch._VF.rnn_tanh: aten.rnn_tanh.input,
    torch._VF.rnn_relu: aten.rnn_relu.input,
    torch.lstm_cell: aten.lstm_cell.default,
    torch.gru_cell: aten.gru_cell.default,
    torch.rnn_tanh_cell: aten.rnn_tanh_cell.default,
    torch.rnn_relu_cell: aten.rnn_relu_cell.default,
    torch._VF._pad_packed_sequence: aten._pad_packed_sequence.default,
    **dict.fromkeys((torch.feature_dropout, torch._VF.feature_dropout), aten.feature_dropout.default),
    **dict.fromkeys((torch.alpha_dropout, torch._VF.alpha_dropout), aten.alpha_dropout.default),
    torch.cdist: aten.cdist.default,
    torch.repeat_interleave: aten.repeat_interleave.self_int,
    torch.Tensor.repeat_interleave: aten.repeat_interleave.self_int,
    torch.Tensor.expand_as: aten.expand_as.default,
    torch.Tensor.view_as: aten.view_as.default,
    torch.Tensor.reshape_as: aten.reshape_as.default,
    torch.chunk: aten.chunk.default,
    torch.Tensor.chunk: aten.chunk.default,
    torch.tensor_split: aten.tensor_split.sections,
    torch.Tensor.tensor_split: aten.tensor_split.sections,
    torch.hsplit: aten.hsplit.int,
    torch.Tensor.hsplit: aten.hsplit.int,
    torch.vsplit: aten.vsplit.int,
    torch.Tensor.vsplit: aten.vsplit.int,
    torch.dsplit: aten.dsplit.int,
    torch.Tensor.dsplit: aten.dsplit.int,
    torch._VF.broadcast_tensors: aten.broadcast_tensors.default,  # type: ignore[attr-defined]
    torch._VF.meshgrid: aten.meshgrid.default,  # type: ignore[attr-defined]
    torch.channel_shuffle: aten.channel_shuffle.default,
    torch.nn.functional.pad: aten.pad.default,
    torch._C._nn.pad: aten.pad.default,
    torch.pixel_shuffle: aten.pixel_shuffle.default,
    torch.pixel_unshuffle: aten.pixel_unshuffle.default,
    torch.bilinear: aten.bilinear.default,
    torch._C._nn.one_hot: aten.one_hot.default,
}


# Those that only move entries: their derivatives need nothing of what happens inside.
MOVING = frozenset(
    function
    for function, op in WHOLE.items()
    if op in (aten.chunk.default, aten.tensor_split.sections, aten.hsplit.int, aten.vsplit.int, aten.dsplit.int,
              aten.expand_as.default, aten.view_as.default, aten.reshape_as.default)
)  # fmt: skip


# Recurrent layers: the overload for a packed sequence, which Python calls by the same name.
PACKED: dict[Any, Any] = {
    aten.lstm.input: aten.lstm.data,
    aten.gru.input: aten.gru.data,
    aten.rnn_tanh.input: aten.rnn_tanh.data,
    aten.rnn_relu.input: aten.rnn_relu.data,
}


_composite: dict[Any, bool] = {}


def own_namespace(func: Any) -> bool:
    """Whether `func` is an op of a library other than torch's own, called as ``torch.ops.mylib.op``."""
    name = getattr(func, "namespace", None) or getattr(func, "_qualified_op_name", "").partition("::")[0]
    return bool(name) and name not in ("aten", "prim", "prims")


def is_composite(op: Any) -> bool:
    """Whether an op is defined by the ops it calls, and nothing else."""
    if op not in _composite:
        _composite[op] = torch._C._dispatch_has_kernel_for_dispatch_key(
            op.name(), "CompositeImplicitAutograd"
        )
    return _composite[op]


def in_order(op: Any, args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a Python call in the order of the ATen op's schema: what was given by name joins the others.

    What the schema takes by name alone stays among the named.
    """
    placed = [a for a in op._schema.arguments if not a.kwarg_only]
    names = [a.name for a in placed]
    spelled = {"self": "input", "A": "tensor1", "B": "tensor2"}
    ordered, rest = list(args), dict(kwargs)
    for a in placed[len(ordered) :]:
        key = a.name if a.name in rest else spelled.get(a.name, a.name)
        if key in rest:
            ordered.append(rest.pop(key))
        elif any(n in rest or spelled.get(n) in rest for n in names[len(ordered) :]):
            ordered.append(a.default_value)
        else:
            break
    return ordered, rest
