"""Scales of norms into the linear layers that follow: which can move, as the recorded run tells."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..plan.plan import Scale
from ..tracing.recorder import Node, record_of
from ..tracing.trace import Trace

aten = torch.ops.aten
# Norms that take their scale, and mostly a shift, as arguments: where these stand.
NORMS = {aten.layer_norm.default: (2, 3), aten.rms_norm.default: (2, None)}


def movable(model: nn.Module, recorded: Trace) -> list[Scale]:
    """The scales [channels] that one norm, or one product of activations, reads and whose result only linear layers read."""
    aliases = recorded.aliases
    names = {
        node: name for name, node in recorded.tensors.items() if name not in {*aliases, *aliases.values()}
    }
    outputs = set(recorded.outputs)
    found = []
    for node in recorded.graph.nodes:
        if node.op != "call_function" or record_of(node).training:
            continue
        scale, shift = _operands(node, names, model)
        if scale is None or node in outputs:
            continue
        layers = [_layer(model, user, node, names) for user in _users(node)]
        if layers and all(layers):
            found.append(Scale(scale, shift, tuple(dict.fromkeys(str(path) for path in layers))))
    return found


def _users(node: Node) -> list[Node]:
    return [u for u in node.users if u.op == "call_function" and not record_of(u).training]


def _operands(node: Node, names: dict[Node, str], model: nn.Module) -> tuple[str | None, str | None]:
    """The names of the scale and the shift that `node` applies; (None, None) where it applies none that can move."""
    width = record_of(node).shape[-1:] if record_of(node).one_tensor else ()

    def own(value: Any) -> str | None:
        name = names.get(value) if isinstance(value, Node) else None
        fits = name is not None and record_of(value).shape == width and len(_users(value)) == 1
        return name if fits and isinstance(_parameter(model, str(name)), nn.Parameter) else None

    if node.target in NORMS:
        scale, shift = NORMS[node.target]
        given = node.args[shift] if shift is not None and len(node.args) > shift else None
        first = own(node.args[scale]) if len(node.args) > scale and node.args[1] == width else None
        moved = own(given)
        return (first, moved) if first and (given is None or moved) else (None, None)
    if node.target is aten.mul.Tensor:
        scales = [own(a) for a in node.args]
        made = [
            a
            for a in node.args
            if isinstance(a, Node) and a.op == "call_function" and record_of(a).shape == record_of(node).shape
        ]
        if len(made) == 1 and any(scales) and record_of(made[0]).module == record_of(node).module:
            return next(s for s in scales if s), None
    return None, None


def _parameter(model: nn.Module, name: str) -> Any:
    path, _, own = name.rpartition(".")
    return model.get_submodule(path)._parameters.get(own)


def _layer(model: nn.Module, user: Node, source: Node, names: dict[Node, str]) -> str | None:
    """The path of the linear layer that `user` is the one call of, if that reads `source`."""
    if user.target is not aten.linear.default or user.args[0] is not source:
        return None
    path, weight = record_of(user).module, user.args[1]
    layer = model.get_submodule(path)
    stock = type(layer) is nn.Linear and isinstance(weight, Node) and names.get(weight) == f"{path}.weight"
    plain = stock and not layer._forward_hooks and (layer.bias is None or f"{path}.bias" in names.values())
    return path if plain and len(_users(weight)) == 1 else None  # type: ignore[arg-type]
