"""Modules that are copied and pickled in a way of their own: by what they were built from, not by what they hold.

A number that is repaired in such a module is lost in every copy, unless what the copy is made from is repaired, too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import nn

from ..plan.plan import Repair
from ..tracing.attributes import INTERNALS, numbers_in, put
from ..tracing.copying import is_usual
from .apply import held_in


def what_copies_need(model: nn.Module, repairs: Iterable[Repair]) -> list[Repair]:
    """Further repairs, without which a copy of the repaired `model` would hold the old numbers again."""
    by_path: dict[str, list[Repair]] = {}
    for repair in repairs:
        by_path.setdefault(repair.path, []).append(repair)
    found: list[Repair] = []
    for path, known in by_path.items():
        module = model.get_submodule(path)
        kind: type = type(module)
        if not is_usual(kind):
            found += _of_module(module, known)
    return found


def _of_module(module: nn.Module, repairs: list[Repair]) -> list[Repair]:
    def lost(others: list[Repair]) -> list[Repair]:
        twin = copy.deepcopy(module)
        for repair in (*repairs, *others):
            put(vars(twin), [repair.name, *repair.keys], repair.value)
        again = copy.deepcopy(twin)
        held = ((r, held_in(again, [r.name, *r.keys])) for r in repairs)
        return [r for r, at in held if at is None or at[2] != r.value]

    found: list[Repair] = []
    try:
        for repair in lost(found):
            for (name, *keys), number in numbers_in(vars(module)):
                one = Repair(repair.path, name, tuple(keys), repair.value, repair.old)
                if number != repair.old or name in INTERNALS or one in repairs:
                    continue
                if repair not in lost([*found, one]):
                    found.append(one)
                    break
    except Exception:  # noqa: BLE001  it can't be copied at all, or not with these numbers
        return []
    return found
