"""What user's code keeps beyond a call: memoised functions, and what its modules, classes and functions hold.

A run of ours is none of the user's: its tensors are fake, masked or of another type, its numbers remember where they came
from. Nothing of it may stay there, and what earlier calls left there must not hide from a trace where a number came from.
"""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper, partial
from operator import is_
from typing import Any

import torch
from torch import nn

from ..base.switches import alone
from ..base.values import stored

LIBRARIES = frozenset((*sys.stdlib_module_names, "torch", "numpy", "depgraph"))  # which keep what they keep
MOST_ENTRIES = 10_000  # of a table that is looked after
DEEP = 3  # steps from a module's globals that are taken
MOST_HELD = 50_000  # tables, objects and functions that are
_TABLES = (dict, OrderedDict, defaultdict, Counter)
_PLAIN = frozenset((str, int, float, bool, bytes, type(None), property))  # most of what there is
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)


class Kept:
    """What was found after a run.

    Attributes:
        stale: it was answered by a memoised function from an earlier call; there is nothing in that any more.
    """

    stale = False


@contextmanager
def nothing_kept(model: nn.Module, kept: Kept | None = None) -> Iterator[None]:
    """Afterwards the memoised functions that were called inside are empty, and what `model`'s code holds is as it was.

    One thread at a time; inside another one for the same classes, what that looks after is not looked for again. Code that
    was defined or imported inside stays. What else was found is noted in `kept`.
    """
    with alone:
        kinds = _kinds(model)
        held = next((h for h in _open if kinds <= h.kinds), None) or _Held(kinds)
        _open.append(held)
        before = {cache: _count(cache) for cache in held.memoised()}
        try:
            yield
        finally:
            _open.pop()
            for cache in held.memoised():
                calls, entries = before.get(cache, (0, 0))
                if _count(cache)[0] != calls:
                    if kept is not None and entries:
                        kept.stale = True
                    cache.cache_clear()
            held.restore()


def _count(cache: Any) -> tuple[int, int]:
    """Calls of a memoised function, and its entries."""
    hits, misses, _, entries = cache.cache_info()
    return hits + misses, entries


def _is_users(name: Any) -> bool:
    return isinstance(name, str) and name.partition(".")[0] not in LIBRARIES


_memoised: tuple[int, list[weakref.ref[Any]]] = 0, []


def _all_memoised() -> list[Any]:
    """The memoised functions of all libraries; looked for anew when another module has been imported."""
    global _memoised  # noqa: PLW0603  found once for all models
    if _memoised[0] != len(sys.modules):
        found = [
            c
            for c in gc.get_objects()
            if type(c) is _lru_cache_wrapper and _is_users(getattr(c, "__module__", None))
        ]
        _memoised = len(sys.modules), [weakref.ref(c) for c in found]
    return [cache for ref in _memoised[1] if (cache := ref()) is not None]


def _kinds(model: nn.Module) -> set[type]:
    """The classes of `model`'s modules that are not torch's."""
    return {k for kind in {type(m) for m in model.modules()} for k in kind.__mro__ if _is_users(k.__module__)}


class _Held:
    """What a model's code holds: the globals of its modules and of those that these use, in tables, classes and functions."""

    def __init__(self, kinds: set[type]) -> None:
        self.kinds = kinds
        self.seen: set[int] = set()
        self.put_back: list[Callable[[], None]] = []
        self.own_memoised: list[Any] = []
        for kind in kinds:
            self.hold(kind)
        spaces = [vars(sys.modules[name]) for name in {k.__module__ for k in kinds} if name in sys.modules]
        for depth in (1, 0):
            found = [value for space in spaces for value in self.in_space(space)]
            spaces = [s for value in found if depth for s in _globals_of(value) if id(s) not in self.seen]

    def memoised(self) -> set[Any]:
        """All memoised functions that a run may call."""
        return {*_all_memoised(), *self.own_memoised}

    def restore(self) -> None:
        """Everything as it was when this was made."""
        for put_back in self.put_back:
            put_back()

    def in_space(self, space: dict[str, Any]) -> list[Any]:
        """Look after the globals of a module; returns them."""
        if id(space) in self.seen:
            return []
        self.seen.add(id(space))
        values = [v for name, v in space.items() if not name.startswith("__")]
        self.put_back.append(_names(space, space.__setitem__, space.__delitem__))
        for value in values:
            self.hold(value)
        return values

    def hold(self, value: Any, depth: int = DEEP) -> None:
        """Look after `value` and what is in it, as far as it is data of the user's."""
        if id(value) in self.seen or not depth or len(self.seen) > MOST_HELD:
            return
        kind = type(value)
        if kind in _TABLES or kind in (list, set, deque):
            if len(value) > MOST_ENTRIES:
                return
            self.seen.add(id(value))
            self.put_back.append(_table(value) if kind in _TABLES else _items(value))
            for inner in list(value.values() if kind in _TABLES else value):
                if type(inner) not in _PLAIN:
                    self.hold(inner, depth - 1)
        elif kind is _lru_cache_wrapper:
            self.seen.add(id(value))
            self.own_memoised.append(value)
        elif isinstance(value, (nn.Module, torch.Tensor, types.ModuleType)):
            return
        elif isinstance(value, type):
            self.seen.add(id(value))
            if _is_users(value.__module__):
                self.attributes(vars(value), depth, value)
        elif isinstance(value, types.FunctionType):
            self.seen.add(id(value))
            if _is_users(value.__module__):
                for cell in value.__closure__ or ():
                    self.cell(cell, depth)
                for inner in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
                    self.hold(inner, depth - 1)
                if depth == DEEP or value.__dict__:  # not of a method
                    self.attributes(vars(value), depth)
        elif _is_users(kind.__module__) and isinstance(getattr(value, "__dict__", None), dict):
            self.seen.add(id(value))
            self.attributes(vars(value), depth)

    def attributes(self, space: Any, depth: int, kind: Any = None) -> None:
        """Look after the attributes of an object or function, or of a class, `kind`, whose own are set by other means."""
        put, remove = (
            (space.__setitem__, space.__delitem__)
            if kind is None
            else (partial(setattr, kind), partial(delattr, kind))
        )
        self.put_back.append(_names(space, put, remove))
        for name, inner in list(space.items()):
            if name[:2] != "__" and type(inner) not in _PLAIN:
                self.hold((stored(inner, "__func__") or inner) if kind else inner, depth - 1)

    def cell(self, cell: Any, depth: int) -> None:
        """Look after what a function has closed over."""
        if id(cell) in self.seen or cell == types.CellType():
            return
        self.seen.add(id(cell))
        inner = cell.cell_contents

        def put_back() -> None:
            if cell == types.CellType() or cell.cell_contents is not inner:
                cell.cell_contents = inner

        self.put_back.append(put_back)
        self.hold(inner, depth - 1)


_open: list[_Held] = []  # those of the runs that are going on, one in another; only with `alone` held


def _globals_of(value: Any) -> list[dict[str, Any]]:
    """The globals of the user's module that a global of another one comes from."""
    if isinstance(value, types.ModuleType):
        return [vars(value)] if _is_users(value.__name__) else []
    if isinstance(value, types.FunctionType):
        return [value.__globals__] if _is_users(value.__module__) else []
    module = sys.modules.get(value.__module__) if isinstance(value, type) else None
    return [vars(module)] if module is not None and _is_users(module.__name__) else []


def _names(space: Any, put: Callable[[str, Any], None], remove: Callable[[str], None]) -> Callable[[], None]:
    """What gives names in a module, class, function or object their values back; code and what is named so is left."""
    before = dict(space)

    def put_back() -> None:
        if _same(space, before):
            return
        for name, value in list(space.items()):
            if before.get(name, put_back) is not value and not isinstance(value, _CODE) and name[:2] != "__":
                if name in before:
                    put(name, before[name])
                else:
                    remove(name)
        for name in before.keys() - space.keys():
            put(name, before[name])

    return put_back


def _same(now: Any, before: dict[Any, Any]) -> bool:
    """Whether a table has the very keys and values that it had, in the same order: thousands are asked, after each run."""
    return (
        len(now) == len(before)
        and all(map(is_, now.values(), before.values()))
        and all(map(is_, now, before))
    )


def _table(table: Any) -> Callable[[], None]:
    before = dict(table)

    def put_back() -> None:
        if _same(table, before):
            return
        new = {k: v for k, v in table.items() if k not in before and isinstance(v, _CODE)}
        table.clear()
        table.update(before)
        table.update(new)

    return put_back


def _items(items: Any) -> Callable[[], None]:
    before = list(items)

    def put_back() -> None:
        now = list(items)
        if len(now) == len(before) and all(map(is_, now, before)):
            return
        known = set(map(id, before))
        again = [*before, *(v for v in now if id(v) not in known and isinstance(v, _CODE))]
        items.clear()
        items.update(again) if isinstance(items, set) else items.extend(again)

    return put_back
