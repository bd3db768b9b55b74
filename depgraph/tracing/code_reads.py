"""Which attributes the code of a model reads when it is called, and which its other methods read.

Told from the code of the classes alone: what forward leads to is every method, property and function whose name appears in it,
and in these in turn. It errs on the side of saying that forward reads something.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from ..base.values import stored
from .recorder import is_written_by_user

OF_TENSORS = frozenset(dir(torch.Tensor))  # ``x.dim()`` reads no module
DEEPEST = 4  # functions called by functions, from a method on


class Reads(NamedTuple):
    """Names that code reads: of its first argument (``self``), and of whatever else."""

    own: frozenset[str]
    others: frozenset[str]


@lru_cache(maxsize=4096)
def reads_of(kind: type) -> Reads:
    """What a call of a module of this class reads, as far as its own code goes."""
    own: set[str] = set()
    others: set[str] = set()
    ahead = ["forward", "__call__"]
    done: set[str] = set()
    while ahead:
        name = ahead.pop()
        if name in done:
            continue
        done.add(name)
        for function in _methods(kind, name):
            mine, further = _reads(function)
            own |= mine
            others |= further
            ahead += [n for n in (*mine, *further) if n not in done]
    return Reads(frozenset(own), frozenset(others))


@lru_cache(maxsize=4096)
def read_elsewhere(kind: type) -> frozenset[str]:
    """What the methods of a class read that no call of it leads to, but for the one that builds it."""
    called = reads_of(kind)
    names = {n for k in _users(kind) for n in vars(k)} - called.own - called.others - {"forward", "__init__"}
    found = [_reads(f) for name in names for f in _methods(kind, name)]
    return frozenset[str]().union(*(own for own, _ in found))


@lru_cache(maxsize=4096)
def other_forwards(kind: type) -> tuple[str, ...]:
    """Methods of a class that stand in for its forward (``forward_split``): of the same arguments, not called by it.

    Those alone that read attributes which forward does not.
    """
    called = reads_of(kind)
    forward = _arguments(kind, "forward")
    names = dict.fromkeys(n for k in _users(kind) for n in vars(k) if n.startswith("forward_"))
    return tuple(
        n for n in names
        if n not in called.own | called.others and forward and _arguments(kind, n) == forward
        and any(_reads(f).own - called.own for f in _methods(kind, n))
    )  # fmt: skip


def _arguments(kind: type, name: str) -> tuple[str, ...]:
    """What a method takes; () where Python can't tell."""
    function: Any = next(_methods(kind, name), None)
    try:
        return tuple(map(str, inspect.signature(function).parameters))
    except (TypeError, ValueError):
        return ()


def read_by_calls(model: nn.Module) -> dict[type, frozenset[str]]:
    """Class of the modules in `model` -> the attributes of them that a call of the model may read."""
    kinds: set[type] = {type(m) for m in model.modules()}
    others = frozenset[str]().union(*(reads_of(k).others for k in kinds)) - OF_TENSORS
    return {k: reads_of(k).own | others for k in kinds}


def _users(kind: type) -> Iterator[type]:
    """The classes that `kind` is made of, without torch's own base and Python's."""
    yield from (k for k in kind.__mro__ if k not in (object, nn.Module))


def _methods(kind: type, name: str) -> Iterator[types.FunctionType]:
    """The functions behind `name` in a class: every definition, as one may call the one it overrides."""
    for k in _users(kind):
        value = vars(k).get(name)
        for found in (value, stored(value, "fget"), stored(value, "func")):
            found = stored(found, "__func__") or found
            while isinstance(found, types.FunctionType):
                yield found
                found = stored(found, "__wrapped__")


@lru_cache(maxsize=16384)
def _reads(function: types.FunctionType) -> Reads:
    """The names that one function reads, with the functions of the user's that it calls by a global name."""
    own: set[str] = set()
    others: set[str] = set()
    seen: set[Any] = set()

    def look(code: types.CodeType, table: dict[str, Any], first: str | None, depth: int) -> None:
        if code in seen:
            return
        seen.add(code)
        before = ""
        for op in dis.get_instructions(code):
            if op.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR") and isinstance(op.argval, str):
                (own if before == first or "SUPER" in op.opname else others).add(op.argval)
            if op.opname.startswith("LOAD_GLOBAL") and depth:
                called = table.get(op.argval)
                if isinstance(called, types.FunctionType) and is_written_by_user(called.__code__):
                    look(called.__code__, called.__globals__, None, depth - 1)
            before = op.argval if op.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) else ""
            before = before[-1] if isinstance(before, tuple) else before
        for constant in _constants(code.co_consts):
            if isinstance(constant, types.CodeType):
                look(constant, table, first, depth)
            else:  # getattr(self, "name")
                own.add(constant)

    code = function.__code__
    look(code, function.__globals__, code.co_varnames[0] if code.co_argcount else None, DEEPEST)
    own.discard("")
    return Reads(frozenset(own), frozenset(others))


def _constants(values: Iterable[Any]) -> Iterator[types.CodeType | str]:
    for value in values:
        if isinstance(value, (types.CodeType, str)):
            yield value
        elif isinstance(value, (tuple, frozenset)):
            yield from _constants(value)
