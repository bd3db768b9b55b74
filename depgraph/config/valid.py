"""What the class of a config says of its fields: a config that checks itself refuses numbers that no model could have.

Surgery sets fields one by one, past such checks. Here the class of each object that a module was built from is called again with
the fields that it has now. Where it refuses, that field is looked for which, put back, makes it agree, and the numbers that it
would take there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..base.switches import without_warnings
from ..base.values import is_plain_object
from .origin import Key, built_from, constructor, outermost

DEEPEST = 4  # configs in configs
CALLS = 12  # of the class, for one candidate of a multiple


@dataclass(frozen=True)
class Refusal:
    """A field whose new value the class of its config does not take.

    Attributes:
        key: the field, as in expressions.
        old: its value in the original.
        multiple: the class takes multiples of this; `old` where there are no others that it takes.
        error: what it says.
    """

    key: Key
    old: int
    multiple: int
    error: str


def refusals(model: nn.Module, small: nn.Module) -> list[Refusal]:
    """The fields of what `small` was built from that its class refuses, and those of `model`, the original, did not."""
    found = []
    for path, module in outermost(small):
        before = built_from(model.get_submodule(path))
        for name, value in built_from(module).items():
            for steps, new, old in _objects(value, before.get(name)):
                found += [
                    Refusal(("attr", path, name, *steps, field), was, multiple, error)
                    for field, was, multiple, error in _refused(new, old)
                ]
    return found


def _objects(new: Any, old: Any, depth: int = DEEPEST) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """The config and those in it, each with the way to it and with what it was."""
    if not depth or type(new) is not type(old) or not is_plain_object(new):
        return
    yield (), new, old
    for name, value in vars(new).items():
        for steps, inner, before in _objects(value, vars(old).get(name), depth - 1):
            yield (name, *steps), inner, before


def _refused(new: Any, old: Any) -> Iterator[tuple[str, int, int, str]]:
    """The fields of `new` without whose change its class would take it: name, old value, multiple, error."""
    error = _error(new, {})
    if not error or _error(old, {}):
        return
    changed = {
        name: was
        for name, was in vars(old).items()
        if type(was) is int and type(vars(new).get(name)) is int and vars(new)[name] != was
    }
    cures = [name for name, was in changed.items() if not _error(new, {name: was})] or list(changed)[:1]
    for name in cures[:1]:
        yield name, changed[name], _multiple(new, name, changed[name]), error


def _multiple(config: Any, name: str, size: int) -> int:
    """The smallest divisor of `size` of which `config` takes every multiple that is tried in field `name`."""
    for n in range(2, size // 2 + 1):
        if size % n == 0:
            steps = size // n
            tried = {*range(1, min(steps, CALLS // 2) + 1), *range(max(1, steps - CALLS // 2), steps + 1)}
            if not any(_error(config, {name: n * step}) for step in sorted(tried, reverse=True)):
                return n
    return size


def _error(config: Any, changed: dict[str, Any]) -> str:
    """What the class of `config` says when it is called with its fields, some of them `changed`; "" where it takes them."""
    kind: type = type(config)
    fields = {**vars(config), **changed}
    given = {p.name: fields[p.name] for p in constructor(kind) if p.name in fields}
    try:
        with without_warnings():
            kind(**copy.deepcopy(given))
    except Exception as error:  # noqa: BLE001  whatever a config raises
        return " ".join(str(error).split()) or type(error).__name__
    return ""
