"""Numbers and tensors inside the attributes of modules: read and set by the keys that lead to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..base.values import is_plain_object

LONGEST = 64  # entries of a list that are looked at
INTERNALS = frozenset(vars(nn.Module()))  # attributes that are torch's own


def read_attribute(model: nn.Module, key: tuple[Any, ...]) -> Any:
    """The number at (module path, attribute, *keys into it) of `model`."""
    path, *rest = key
    value: Any = model
    for name in path.split(".") if path else ():
        value = value._modules[name]
    for step in rest:
        value = value[step] if isinstance(value, tuple) else holders(value, step)[0][step]
    return value


def held_at(holder: Any, key: tuple[Any, ...]) -> Any:
    """What a model (or with path "" another object) has at (module path, attribute, *keys), or None."""
    try:
        return read_attribute(holder, key)
    except (AttributeError, KeyError, IndexError, TypeError):
        return None


def numbers_in(
    value: Any, steps: tuple[Any, ...] = (), depth: int = 4
) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Every int in plain objects, dicts, lists and tuples, and the keys that lead to it."""
    if type(value) is int:
        yield steps, value
    elif depth and isinstance(value, (list, tuple)) and len(value) <= LONGEST:
        for i, v in enumerate(value):
            yield from numbers_in(v, (*steps, i), depth - 1)
    elif depth and isinstance(value, dict):
        for k, v in Items(value).items():
            yield from numbers_in(v, (*steps, k), depth - 1)
    if depth and is_plain_object(value):
        for k, v in vars(value).items():
            yield from numbers_in(v, (*steps, k), depth - 1)


def put(holder: Any, steps: list[Any], value: Any) -> Any:
    """`holder` with the entry at `steps` set to `value`: changed in place, or a new one for a tuple."""
    if not steps:
        return value
    if isinstance(holder, tuple):
        items = list(holder)
        items[steps[0]] = put(items[steps[0]], steps[1:], value)
        return type(holder)(items)
    tables = holders(holder, steps[0])
    old = tables[0][steps[0]]
    new = put(old, steps[1:], value)
    for table in tables:  # a config may repeat its fields as items
        if table[steps[0]] is old or (not isinstance(old, torch.Tensor) and table[steps[0]] == old):
            table[steps[0]] = new
    return holder


def holders(value: Any, step: Any) -> list[Any]:
    """What of `value` holds its entry `step`: its items, its attributes, or both (a config that is a dict as well)."""
    if isinstance(value, list):
        return [value]
    attributes = getattr(value, "__dict__", {})
    found = [attributes] if step in attributes else []
    return [*found, Items(value)] if isinstance(value, dict) and step in value else found


class Items:
    """The items of a dict, also of one whose own methods permit no change."""

    def __init__(self, table: dict[Any, Any]) -> None:
        self.table = table

    def items(self) -> Iterable[tuple[Any, Any]]:
        """Keys and values."""
        return dict.items(self.table)

    def __getitem__(self, key: Any) -> Any:
        return dict.__getitem__(self.table, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        dict.__setitem__(self.table, key, value)
