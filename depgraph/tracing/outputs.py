"""What a call of a model gives away: the tensors that somebody can reach afterwards.

These are what it returns, in containers, records (objects without methods), functions and their closures; what it put
into containers and objects that the caller passed, or wrote into the tensors in them; and what it left as an attribute that
no code of the model reads. An object with methods of its own, such as a cache, is a part of the machinery: what is in it
may get smaller with the model. It is named where it holds tensors.
"""

from __future__ import annotations

import dis
import functools
import types
from collections import deque
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..base.inputs import Arguments
from ..base.values import is_plain_object, output_leaves, stored
from .attributes import INTERNALS
from .copying import inside, slots_of

Tensor = torch.Tensor
DEPTH = 12  # levels of containers and objects that are looked into
ENTRIES = 4096  # of one container
_PLAIN = frozenset(
    (int, float, bool, complex, str, bytes, type(None), type, torch.Size, torch.dtype, torch.device)
)
_ITERATORS = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)


@lru_cache(maxsize=4096)
def is_record(kind: Any) -> bool:
    """Whether instances of a class hold values and nothing else: it has no methods that are part of its interface."""
    own = [k for k in kind.__mro__ if k is not object]
    return not any(
        isinstance(v, (types.FunctionType, staticmethod, classmethod)) and not name.startswith("__")
        for k in own
        for name, v in vars(k).items()
    )


class _Walk:
    """The tensors in a value, and the names of the classes of what could not be looked into."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.unseen: list[str] = []
        self.seen: dict[int, Any] = {}

    def look(self, value: Any, depth: int = DEPTH) -> None:
        if type(value) in _PLAIN or isinstance(value, (nn.Module, types.ModuleType, type)):
            return
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return
        if id(value) in self.seen or not depth:
            return
        self.seen[id(value)] = value
        if isinstance(value, _ITERATORS):
            self.unseen.append(type(value).__name__)
            return
        for entry in list(self._inside(value)):
            self.look(entry, depth - 1)

    def _inside(self, value: Any) -> Iterator[Any]:
        if isinstance(value, Mapping):
            yield from list(value.values())[:ENTRIES]
        elif isinstance(value, (list, tuple, deque)):
            yield from list(value)[:ENTRIES]
        elif hasattr(type(value), "__dataclass_fields__"):
            own = getattr(
                value, "__dict__", None
            )  # looked into without a read that a trace would take for forward's
            for k in type(value).__dataclass_fields__:
                yield getattr(value, k, None) if own is None else own.get(k)
        elif isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            yield from (held for _, held in inside(value))
        elif hasattr(type(value), "__dict__") and not isinstance(value, torch._C._FunctionBase):
            yield from self._of_object(value)

    def _of_object(self, value: Any) -> Iterator[Any]:
        kind: Any = type(value)
        held = [*getattr(value, "__dict__", {}).values(), *(getattr(value, s, None) for s in slots_of(kind))]
        if is_record(kind):
            yield from held
            return
        own = _Walk()
        own.seen = dict(self.seen)
        for entry in held:
            own.look(entry, 4)
        if own.tensors:
            self.unseen.append(kind.__name__)


class Call:
    """One call of a model: made before it, asked afterwards what it gave away."""

    def __init__(self, model: nn.Module, example: Arguments) -> None:
        """`model` will be called with these arguments."""
        self.model, self.example = model, example
        self.arguments = example.args, example.kwargs
        self.given = {id(t): (t, t._version) for t in self._tensors(self.arguments, _Walk()) if _counts(t)}
        self.held = {id(t): t for _, _, t in self._attributes()}
        self.unseen: tuple[str, ...] = ()

    def outputs(self, out: Any) -> list[Tensor]:
        """The tensors that the call gave away, in an order that depends on the code alone; `out` is what it returned."""
        walk = _Walk()
        found = self._tensors(self.example.counting(out), walk)
        if self.example.outputs is not None:  # nothing else counts
            return found
        if not found:
            found = output_leaves(out)
        elif walk.unseen:
            self.unseen = tuple(dict.fromkeys(walk.unseen))
        returned = {id(t) for t in found}
        for t in self._tensors(self.arguments, _Walk()):
            before = self.given.get(id(t))
            if id(t) not in returned and (before is None or before[1] != t._version) and _counts(t):
                found.append(t)
        left = [(owner, name, t) for owner, name, t in self._attributes() if id(t) not in self.held]
        if left:
            kinds: dict[Any, None] = dict.fromkeys(type(m) for m in self.model.modules())
            read = frozenset().union(*map(_names_read, kinds))
            found += [t for _, name, t in left if name not in read and id(t) not in returned]
        return found

    @staticmethod
    def _tensors(value: Any, walk: _Walk) -> list[Tensor]:
        walk.look(value)
        return walk.tensors

    def _attributes(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """The tensors that modules hold in plain attributes."""
        for module in self.model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            for name, value in vars(module).items():
                if name in INTERNALS or type(value) in _PLAIN:
                    continue
                if type(value) in (tuple, list) and all(type(v) in _PLAIN for v in value):
                    continue
                if isinstance(value, Tensor) or type(value) in (list, tuple, dict) or is_plain_object(value):
                    walk = _Walk()
                    walk.look(value, 4)
                    yield from ((module, name, t) for t in walk.tensors)


def _counts(tensor: Tensor) -> bool:
    """Whether torch counts what is written into a tensor."""
    return not tensor.is_inference()


@lru_cache(maxsize=4096)
def _names_read(kind: Any) -> frozenset[str]:
    """The attributes that methods of a class of modules read, of whatever object."""
    found: set[str] = set()

    def look(code: types.CodeType) -> None:
        for op in dis.get_instructions(code):
            if op.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(op.argval, str):
                found.add(op.argval)
        for const in code.co_consts:
            if isinstance(const, types.CodeType):
                look(const)
            elif isinstance(const, str):  # getattr(self, "name")
                found.add(const)

    for k in kind.__mro__:
        if k in (object, nn.Module):
            continue
        for value in vars(k).values():
            function = stored(value, "fget") or stored(value, "__func__") or value
            function = stored(function, "__wrapped__") or function
            if isinstance(function, types.FunctionType):
                look(function.__code__)
    return frozenset(found)
