"""Numbers that remember where they came from.

While a model is traced, the ints and floats that its modules hold as attributes, and the sizes that it reads from
tensors, are replaced by `Size` and `Scalar`: an ``int`` and a ``float`` that behave as before and carry an
expression, such as "dim 2 of this tensor // attribute `num_heads` of blocks.0.attn". When such a number arrives as
the argument of a view, the surgeon knows what to repair, or which counts must keep fitting together.

An expression is an ``int`` or ``float`` (a number of unknown origin), ``("attr", path, name, *keys)``, ``("literal",
path, method, position, value)`` (a number in the code of a method, see `literals.py`), ``("dim", node, d)``, with
the `Place` of the read behind it where that is known, or ``(name, *expressions)``, where the name is one of `OPERATORS`. What turns a tracked number into anything else (a plain number, a
text, the truth of a test) is told to whoever listens.
"""

from __future__ import annotations

import math
import operator
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from ..base.values import is_plain_object, stored
from .attributes import INTERNALS, Items

Expr = Any  # int | float | tuple, as the module docstring says
Place = tuple[str, str, int]  # of a read of a size in code: module, method, position in it
_OWN_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class Listener(Protocol):
    """Who is told what becomes of tracked numbers."""

    def compared(self, name: str, left: Expr, right: Expr, outcome: bool, frame: Any) -> bool:
        """A test of two numbers came out so in `frame`; returns what the code shall see."""

    def read(self, value: Any) -> None:
        """An object that a module holds was asked for `value`."""

    def lost(self, expr: Expr, how: str) -> None:
        """A number became something that carries no expression."""


class _Run(threading.local):
    """Who listens in this thread: int.__eq__ and __getattribute__ have no other way to know their trace."""

    listener: Listener | None = None


_run = _Run()


@contextmanager
def telling(listener: Listener) -> Iterator[None]:
    """Tell `listener` what becomes of tracked numbers."""
    before, _run.listener = _run.listener, listener
    try:
        yield
    finally:
        _run.listener = before


def tell_lost(expr: Expr, how: str) -> None:
    """Tell whoever listens in this thread that a number may go on without its expression."""
    if _run.listener is not None:
        _run.listener.lost(expr, how)


def _lost(expr: Expr, how: str) -> None:
    """A tracked number leaves, unless it is this library that asks: the frame above that of the special method."""
    if _run.listener is not None and not sys._getframe(2).f_code.co_filename.startswith(_OWN_ROOT):
        tell_lost(expr, how)


def _calls_memoised(caller: types.FrameType) -> bool:
    """Whether the code of a frame names a memoised function, which remembers a number with its expression.

    As a global, in its closure, or as a method of its first argument.
    """
    code, here = caller.f_code, caller.f_locals
    named = [caller.f_globals.get(n) for n in code.co_names] + [here.get(n) for n in code.co_freevars]
    if code.co_argcount:
        first = here.get(code.co_varnames[0])
        spaces = [stored(first, "__dict__") or {}, *map(vars, type(first).__mro__)]
        named += [space.get(n) for n in code.co_names for space in spaces]
    return any(stored(stored(f, "__func__") or f, "cache_clear") is not None for f in named if f is not None)


class Size(int):
    """An int with the expression that produced it."""

    expr: Expr

    def __new__(cls, value: int, expr: Expr) -> Size:
        """Return `value` (int) carrying `expr`."""
        self = int.__new__(cls, value)
        self.expr = expr
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Size:
        return self

    def __reduce__(self) -> Any:
        return int, (plain(self),)

    def __hash__(self) -> int:
        if _run.listener is not None and not _calls_memoised(sys._getframe(1)):
            _lost(self.expr, "a look-up in a table")
        return int.__hash__(self)

    def conjugate(self) -> Size:
        """Itself."""
        return self

    real = numerator = property(conjugate)


class Scalar(float):
    """A float with the expression that produced it."""

    expr: Expr

    def __new__(cls, value: float, expr: Expr) -> Scalar:
        """Return `value` (float) carrying `expr`."""
        self = float.__new__(cls, value)
        self.expr = expr
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Scalar:
        return self

    def __reduce__(self) -> Any:
        return float, (plain(self),)

    __hash__ = float.__hash__


class NumpyScalar(np.float64, Scalar):  # type: ignore[misc]  # numpy's class is a float too
    """What numpy makes of a tracked number, with the expression that produced it."""

    def __new__(cls, value: float, expr: Expr) -> NumpyScalar:
        """Return `value` (a numpy scalar) carrying `expr`."""
        self: NumpyScalar = np.float64.__new__(cls, value)
        self.expr = expr
        return self


TRACKED = (Size, Scalar, NumpyScalar)


def through_numpy(self: Any, function: Any, method: str, *inputs: Any, **options: Any) -> Any:
    """A numpy function of tracked numbers: a single float that comes out is tracked."""
    if any(isinstance(i, np.ndarray) and i.ndim for i in inputs):
        _lost(self.expr, f"numpy.{function.__name__}")
    out = getattr(function, method)(*map(plain, inputs), **options)
    if method != "__call__" or type(out) is not np.float64:
        return out
    name = NUMPY_NAMES.get(function.__name__, f"numpy.{function.__name__}")
    OPERATORS.setdefault(name, function)
    expressions = (*map(expression, inputs), *((0.5,) if function is np.sqrt else ()))
    return NumpyScalar(out, (name, *expressions))


NUMPY_NAMES = {"sqrt": "pow", "power": "pow", "float_power": "pow", "subtract": "sub", "multiply": "mul",
               "divide": "truediv", "true_divide": "truediv", "floor_divide": "floordiv", "add": "add"}  # fmt: skip


def expression(value: Any) -> Expr:
    """The expression of a number: its own where it has one, else the number itself."""
    return value.expr if isinstance(value, (Size, Scalar)) else value


def plain(value: Any) -> Any:
    """`value` with every tracked number in it (also inside lists, tuples and dicts) turned back into int or float."""
    if isinstance(value, Size):
        return int.__index__(value)
    if isinstance(value, Scalar):
        return float.__float__(value)
    if type(value) in (list, tuple):
        return type(value)(plain(v) for v in value)
    if type(value) is dict:
        return {k: plain(v) for k, v in value.items()}
    return value


def track(value: int | float, expr: Expr) -> Any:
    """Give a number an expression; bools and everything else are returned as they are."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return Size(int(value), expr)
    return Scalar(float(value), expr) if isinstance(value, float) else value


# ------------------------------------------------------------------------------------------------------- operators

# What the names in expressions compute.
OPERATORS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, f"__{name}__")
    for name in ("add", "sub", "mul", "floordiv", "mod", "pow", "truediv", "lshift", "rshift", "and", "or", "xor",
                 "neg", "pos", "abs", "invert")
} | {"trunc": math.trunc, "floor": math.floor, "ceil": math.ceil, "round": round}  # fmt: skip
ROUNDING = ("trunc", "floor", "ceil", "round")
# Functions of numbers in modules that read an int without asking it: (module, name); they are replaced in a run.
_NOT_OF_ONE = ("fsum", "prod", "dist", "sumprod", "frexp", "modf")
FUNCTIONS: dict[tuple[types.ModuleType, str], Callable[..., Any]] = {
    (math, name): function
    for name, function in vars(math).items()
    if callable(function) and name not in (*_NOT_OF_ONE, *ROUNDING)
}
OPERATORS |= {f"math.{name}": function for (_, name), function in FUNCTIONS.items()}


def evaluate(expr: Expr, at: Callable[[Expr], Any]) -> Any:
    """The number that `expr` is, where `at` says what its dims, attributes and numbers in code are.

    Raises:
        KeyError: a function in it is not known here.
        ArithmeticError, ValueError, TypeError: the arithmetic has no result for these numbers.
    """
    if not isinstance(expr, tuple):
        return expr
    if expr[0] in SOURCES:
        return at(expr)
    return OPERATORS[expr[0]](*(evaluate(e, at) for e in expr[1:]))


def _arithmetic(name: str, kind: type) -> Callable[..., Any]:
    reflected = name.startswith("__r") and name not in ("__rshift__", "__round__")
    label = name.strip("_").removeprefix("r") if reflected else name.strip("_")
    compute, is_int = OPERATORS[label], kind is Size

    def operate(self: Any, *others: Any) -> Any:
        if label == "mul" and others and isinstance(others[0], (str, bytes, list, tuple, bytearray)):
            _lost(self.expr, "copies of a sequence")
        if not all(type(o) in NUMBERS for o in others):
            return NotImplemented
        if is_int and label in ROUNDING and not others:
            return self
        operands = (*others, self) if reflected else (self, *others)
        value = compute(*map(plain, operands))
        return track(value, (label, *map(expression, operands))) if type(value) in (int, float) else value

    return operate


NUMBERS = (int, float, *TRACKED)


def _comparison(name: str, kind: type) -> Callable[[Any, Any], Any]:
    compute, label = getattr(kind, name), name.strip("_")

    def compare(self: Any, other: Any) -> Any:
        outcome = compute(self, other)
        if _run.listener is not None and isinstance(other, (int, float)) and outcome is not NotImplemented:
            return _run.listener.compared(
                label, self.expr, expression(other), bool(outcome), sys._getframe(1)
            )
        return outcome

    return compare


def _losing(name: str, kind: type) -> Callable[..., Any]:
    compute = getattr(kind, name)
    how = {"__array__": "an array"}.get(name, f"{name.strip('_')}()")

    def lose(self: Any, *others: Any) -> Any:
        _lost(self.expr, how)
        return compute(self, *others)

    return lose


def _true(self: Any) -> bool:
    outcome = plain(self) != 0
    if _run.listener is not None:
        return _run.listener.compared("ne", self.expr, 0, outcome, sys._getframe(1))
    return outcome


def _divmod(self: Any, other: Any) -> Any:
    return NotImplemented if type(other) not in NUMBERS else (self // other, self % other)


def _rdivmod(self: Any, other: Any) -> Any:
    return NotImplemented if type(other) not in NUMBERS else (other // self, other % self)


for _kind, _plain in ((Size, int), (Scalar, float), (NumpyScalar, float)):
    for _name in OPERATORS:
        for _form in (f"__{_name}__", f"__r{_name}__"):
            if hasattr(_plain, _form):
                setattr(_kind, _form, _arithmetic(_form, _kind))
    for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(_kind, f"__{_name}__", _comparison(f"__{_name}__", _plain))
    for _form in ("__int__", "__float__", "__str__", "__repr__", "__format__", "bit_length", "bit_count", "to_bytes",
                  "as_integer_ratio", "is_integer", "hex"):  # fmt: skip
        if hasattr(_plain, _form):
            setattr(_kind, _form, _losing(_form, _plain))
    _kind.__bool__, _kind.__divmod__, _kind.__rdivmod__ = _true, _divmod, _rdivmod  # type: ignore[method-assign]
Size.__array_ufunc__ = Scalar.__array_ufunc__ = through_numpy  # type: ignore[attr-defined]


def tracked_function(module: types.ModuleType, name: str) -> Callable[..., Any]:
    """What stands in for `name` of `module` (see `switches.replaced`): its result is tracked where an argument is."""
    compute, label = FUNCTIONS[module, name], f"{module.__name__}.{name}"

    def call(before: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if kwargs or not any(type(a) in TRACKED for a in args):
            return before(*args, **kwargs)
        value = compute(*map(plain, args))
        if type(value) is bool:
            for a in args:
                if type(a) in TRACKED:
                    _lost(a.expr, f"{name}()")
        expr = ("pow", expression(args[0]), 0.5) if name == "sqrt" else (label, *map(expression, args))
        return track(value, expr)

    return call


class OfRun(str):
    """The path of a module, in the expressions of one run: a number that came out of an earlier one is just a number."""

    run: int

    def __new__(cls, path: str, run: int) -> OfRun:
        """Return `path` (str) marked with the number of a run."""
        self = str.__new__(cls, path)
        self.run = run
        return self

    def __reduce__(self) -> Any:
        return str, (str(self),)


def track_attributes(model: nn.Module, original: nn.Module, run: int = 0) -> None:
    """Replace every int and float that a module, or an object it holds, has as an attribute by a tracked one of that run.

    Except in what `model`, a copy, shares with the `original` (a class may fill its copies from a table that it keeps).
    """
    seen: set[int] = set()
    for *_, value in _own_attributes(original):
        _note_holders(value, seen)
    for path, module, name, value in _own_attributes(model):
        vars(module)[name] = track_inside(value, (OfRun(path, run), name), seen)


def _own_attributes(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """Path, module, name and value of each attribute that is not torch's own."""
    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            yield from ((path, module, n, v) for n, v in list(vars(module).items()) if n not in INTERNALS)


def _note_holders(value: Any, found: set[int]) -> None:
    """Add the ids of the lists, dicts and objects that `track_inside` would change."""
    if isinstance(value, (list, tuple)):
        items: Any = value
    elif type(value) is dict:
        items = value.values()
    elif is_plain_object(value):
        items = vars(value).values()
    else:
        return
    if id(value) not in found:
        found.add(id(value))
        for item in items:
            _note_holders(item, found)


def track_inside(value: Any, key: tuple[Any, ...], seen: set[int]) -> Any:
    """`value` with every int and float in it tracked; lists, dicts and objects are changed in place, each once.

    Those whose ids are in `seen` stay as they are.
    """
    kind = type(value)
    if kind in (int, float):
        return track(value, ("attr", *key))
    if kind in (list, dict) and id(value) in seen:
        return value
    if kind in (tuple, list) and len(value) <= 64:
        items = [track_inside(v, (*key, i), seen) for i, v in enumerate(value)]
        if kind is list:
            value[:] = items
            return value
        return tuple(items)
    if kind is dict and len(value) <= 256:
        for k, v in value.items():
            value[k] = track_inside(v, (*key, k), seen)
    elif is_plain_object(value) and id(value) not in seen:
        seen.add(id(value))
        for table in (vars(value), Items(value)) if isinstance(value, dict) else (vars(value),):
            for k, v in list(table.items()):
                table[k] = track_inside(v, (*key, k), seen)
        _watch(value)
    return value


_watched: dict[type, Any] = {}


def _watch(holder: Any) -> None:
    """Let `holder`, a copy that nobody else sees, tell which of its numbers are read."""
    kind: Any = type(holder)
    if kind not in _watched:

        def read(self: Any, name: str) -> Any:
            value = kind.__getattribute__(self, name)
            if _run.listener is not None and name != "__dict__":
                _run.listener.read(value)
            return value

        try:
            _watched[kind] = type(kind)(kind.__name__, (kind,), {"__getattribute__": read, "__slots__": ()})
        except Exception:  # noqa: BLE001  a class that allows no subclass, or none with slots
            _watched[kind] = kind
    with suppress(TypeError):
        object.__setattr__(holder, "__class__", _watched[kind])


def expressions_in(value: Any) -> list[Expr]:
    """The expressions of the tracked numbers in nested lists, tuples and dicts."""
    if type(value) in (Size, Scalar):
        return [value.expr]
    if type(value) in (list, tuple, torch.Size):
        return [e for v in value for e in expressions_in(v)]
    return [e for v in value.values() for e in expressions_in(v)] if type(value) is dict else []


def sources_in(expr: Expr) -> set[Expr]:
    """The dims, attributes and numbers in code that an expression is computed from."""
    if not isinstance(expr, tuple):
        return set()
    return {expr} if expr[0] in SOURCES else set().union(*map(sources_in, expr[1:]))


def places_in(expr: Expr) -> set[Place]:
    """The places of the reads that an expression is computed from."""
    return {source[3] for source in sources_in(expr) if source[0] == "dim" and len(source) > 3}


def attributes_in(expr: Expr) -> set[Expr]:
    """The attributes that an expression depends on."""
    return {source for source in sources_in(expr) if source[0] == "attr"}


SOURCES = ("dim", "attr", "literal")
SETTABLE = ("attr", "literal")  # those that a plan can set
