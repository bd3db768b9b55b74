"""The tensors of a model by name, those in nested values, and copies of a model that share or replace its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..base.values import is_plain_object
from .wrappers import copied, core, inner_name, without


def named_tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each parameter and buffer under its first name, and a map from every further name of a tied one to its first."""
    first: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for pairs in (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in pairs:
            if id(tensor) in first:
                aliases[name] = first[id(tensor)]
            else:
                first[id(tensor)] = name
                tensors[name] = tensor
    return tensors, aliases


@dataclass(frozen=True)
class AttributeTensor:
    """A tensor that modules hold as a plain attribute, and where: (module path, keys from its attributes on)."""

    tensor: torch.Tensor
    places: list[tuple[str, tuple[Any, ...]]]


def attribute_tensors(model: nn.Module) -> dict[str, AttributeTensor]:
    """The tensors of numbers that are neither parameters nor buffers, by name (``rope.cos``, ``tables.0``).

    Modules hold them as attributes, or in lists, dicts and objects there: tables made in ``__init__``, filled caches. Not those
    that hooks make of parameters.
    Objects in objects in objects (a trainer, a data set) are nobody's tables.
    """
    registered = {id(t) for t in named_tensors(model)[0].values()}
    internals = set(vars(nn.Module()))
    found: dict[int, AttributeTensor] = {}
    names: dict[str, AttributeTensor] = {}
    seen: set[int] = set()

    def look(value: Any, path: str, keys: tuple[Any, ...], objects: int = 2) -> None:
        if isinstance(value, torch.Tensor):
            numbers = value.is_floating_point() or value.is_complex() or value.dtype is torch.bool
            if id(value) in registered or value.grad_fn is not None or not numbers or not value.dim():
                return
            if id(value) not in found:
                names[".".join(map(str, (path, *keys) if path else keys))] = found[id(value)] = (
                    AttributeTensor(value, [])
                )
            found[id(value)].places.append((path, keys))
        elif len(keys) > 6:  # a list that holds itself, say
            return
        elif type(value) in (list, tuple) and len(value) <= 64:
            for i, v in enumerate(value):
                look(v, path, (*keys, i), objects)
        elif type(value) is dict and len(value) <= 256:
            for k, v in value.items():
                look(v, path, (*keys, k), objects)
        elif objects and is_plain_object(value) and id(value) not in seen:
            seen.add(id(value))
            for k, v in vars(value).items():
                look(v, path, (*keys, k), objects - 1)

    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            made = {getattr(h, "name", getattr(h, "_tensor_name", None)) for h in hooks_of_weights(module)}
            for name, value in vars(module).items():
                if name not in internals and type(value) not in _NUMBERS and name not in made:
                    look(value, path, (name,))
    return names


def hooks_of_weights(module: nn.Module) -> list[Any]:
    """The hooks of ``torch.nn.utils`` (weight_norm, prune ...) that make a weight anew before each call."""
    return [h for h in module._forward_pre_hooks.values() if type(h).__module__.startswith("torch.nn.utils.")]


_NUMBERS = frozenset((int, float, bool, str, type(None)))


def place_of(tensor: torch.Tensor) -> torch.device:
    """Where a run has `tensor`: values that come from elsewhere come to the CPU."""
    return torch.device("cpu") if tensor.is_meta else tensor.device


def is_elsewhere(tensors: Iterable[torch.Tensor], inputs: Iterable[torch.Tensor]) -> bool:
    """Whether some of a model's `tensors` are on the meta device though it is called with `inputs` that are not."""
    return any(t.is_meta for t in tensors) and not all(t.is_meta for t in inputs)


def all_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers and attribute tensors by name, tied ones once."""
    return {**named_tensors(model)[0], **{name: h.tensor for name, h in attribute_tensors(model).items()}}


def skeleton(model: nn.Module, replace: Mapping[int, Any]) -> nn.Module:
    """A deep copy of the module tree in which the tensors whose ``id`` is a key of `replace` are those given there.

    A `WrapperStandIn` module stands in the place of each wrapper (data parallel, compiled). What leads to a module or
    tensor of the model (functions that close over it, weak references) leads to the copy's.
    """
    memo: dict[int, Any] = dict(replace)
    own = {id(t) for t in (*model.parameters(), *model.buffers())}.union(map(id, model.modules()), replace)
    for module in model.modules():
        for value in vars(
            module
        ).values():  # deepcopy refuses tensors with a history, such as a hooked weight
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    made = copied(model, memo, frozenset(own))
    modes = {path: module.training for path, module in model.named_modules()}
    for (
        path,
        module,
    ) in made.named_modules():  # one that is copied in a way of its own may have come in train mode
        module.training = modes.get(path, module.training)
    return made


def unwrapped(model: nn.Module) -> nn.Module:
    """`model` without wrappers: the module in them, or where parts are wrapped, a copy of the tree on the same tensors."""
    model = core(model)
    if not any(inner_name(module) for module in model.modules()):
        return model
    return without(skeleton(model, {id(t): t for t in all_tensors(model).values()}))


def memory_of(tensor: torch.Tensor) -> Any:
    """What two tensors have in common that are the same numbers; None for one without memory of its own kind."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.is_meta or not tensor.numel():
        return None
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def on_one_memory(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The tensors that share the memory of another one and are objects of their own -> the name of the first."""
    first: dict[Any, str] = {}
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        memory = memory_of(tensor)
        if memory is not None and first.setdefault(memory, name) != name:
            found[name] = first[memory]
    return found


def take_values(model: nn.Module, other: nn.Module) -> None:
    """Parameters and buffers of `model` take the values of those of `other`, a model of the same shapes."""
    given = named_tensors(other)[0]
    with torch.no_grad():
        for name, tensor in named_tensors(model)[0].items():
            tensor.data.copy_(given[name])
