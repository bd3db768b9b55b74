"""Numbers that remember where they came from.

While a model is traced, the ints and floats that its modules hold as attributes, and the sizes that it reads from
tensors, are replaced by `Size` and `Scalar`: an ``int`` and a ``float`` that behave as before and carry an
expression, such as "dim 2 of this tensor // attribute `num_heads` of blocks.0.attn". When such a number arrives as
the argument of a view, the surgeon knows what to repair, or which counts must keep fitting together.

An expression is an ``int`` (a literal), ``("attr", path, name, *keys)``, ``("dim", node, d)`` or
``(operator name, left, right)``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from ..base.values import is_plain_object
from .attributes import Items

Expr = Any  # int | tuple, as the module docstring says


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
        return int, (int(self),)


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
        return float, (float(self),)


class NumpyScalar(np.float64, Scalar):  # type: ignore[misc]  # numpy's class is a float too
    """What numpy makes of a tracked number, with the expression that produced it."""

    def __new__(cls, value: float, expr: Expr) -> NumpyScalar:
        """Return `value` (a numpy scalar) carrying `expr`."""
        self: NumpyScalar = np.float64.__new__(cls, value)
        self.expr = expr
        return self


def through_numpy(self: Any, function: Any, method: str, *inputs: Any, **options: Any) -> Any:
    """A numpy function of tracked numbers: a single float that comes out is tracked."""
    out = getattr(function, method)(*map(plain, inputs), **options)
    if method != "__call__" or type(out) is not np.float64:
        return out
    first, second = (*map(expression, inputs), 0.5 if function is np.sqrt else 1)[:2]
    return NumpyScalar(out, (NUMPY_NAMES.get(function.__name__, function.__name__), first, second))


NUMPY_NAMES = {"sqrt": "pow", "power": "pow", "float_power": "pow", "subtract": "sub", "multiply": "mul",
               "divide": "truediv", "true_divide": "truediv", "floor_divide": "floordiv"}  # fmt: skip


def expression(value: Any) -> Expr:
    """The expression of a number: its own where it has one, else the number itself."""
    return value.expr if isinstance(value, (Size, Scalar)) else value


def plain(value: Any) -> Any:
    """`value` with every tracked number in it (also inside lists, tuples and dicts) turned back into int or float."""
    if isinstance(value, Size):
        return int(value)
    if isinstance(value, Scalar):
        return float(value)
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


class _Run(threading.local):
    """What is recorded in this thread: int.__eq__ and __getattribute__ have no other way to know their trace."""

    comparisons: list[tuple[str, Expr, Expr, bool]] | None = None
    reads: set[Expr] | None = None


_run = _Run()


@contextmanager
def recording_comparisons(into: list[tuple[str, Expr, Expr, bool]]) -> Iterator[None]:
    """Append every comparison of a tracked int with a number to `into` as (operator, left, right, outcome)."""
    before, _run.comparisons = _run.comparisons, into
    try:
        yield
    finally:
        _run.comparisons = before


def _arithmetic(name: str) -> Callable[[Any, Any], Any]:
    plain_int, plain_float = getattr(int, name), getattr(float, name)
    reflected = name.startswith("__r")
    label = name.strip("_").removeprefix("r") if reflected else name.strip("_")

    def operate(self: Any, other: Any, *rest: Any) -> Any:
        if type(other) not in (int, Size, float, Scalar, NumpyScalar):
            return NotImplemented
        both_int = isinstance(self, int) and isinstance(other, int)
        value = plain_int(self, other, *rest) if both_int else plain_float(float(self), other, *rest)
        left, right = expression(self), expression(other)
        return track(value, (label, right, left) if reflected else (label, left, right))

    return operate


def _comparison(name: str) -> Callable[[Any, Any], Any]:
    plain_int = getattr(int, name)

    def compare(self: Any, other: Any) -> Any:
        outcome = plain_int(self, other)
        if _run.comparisons is not None and isinstance(other, int) and outcome is not NotImplemented:
            _run.comparisons.append((name.strip("_"), self.expr, expression(other), bool(outcome)))
        return outcome

    return compare


for _name in ("add", "sub", "mul", "floordiv", "mod", "pow", "truediv"):
    for _form in (f"__{_name}__", f"__r{_name}__"):
        setattr(Size, _form, _arithmetic(_form))
        for _kind in (Scalar, NumpyScalar):
            setattr(_kind, _form, _arithmetic(_form)) if hasattr(float, _form) else None
Size.__array_ufunc__ = Scalar.__array_ufunc__ = through_numpy  # type: ignore[attr-defined]
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Size, f"__{_name}__", _comparison(f"__{_name}__"))
Size.__hash__ = int.__hash__  # type: ignore[method-assign]


def negative(self: Size) -> Any:
    """``-n`` of a tracked int: tracked."""
    return Size(-int(self), ("mul", -1, self.expr))


def divmod_tracked(self: Size, other: int) -> tuple[Any, Any]:
    """``divmod`` of a tracked int: both results tracked."""
    return self // other, self % other


Size.__neg__ = negative  # type: ignore[method-assign, assignment]
Size.__divmod__ = divmod_tracked  # type: ignore[method-assign, assignment]


def tracked_sqrt(value: float) -> float:
    """``math.sqrt`` that keeps the expression of a tracked number (installed while a model is traced)."""
    root = math_sqrt(value)
    return Scalar(root, ("pow", value.expr, 0.5)) if isinstance(value, (Size, Scalar)) else root


math_sqrt = math.sqrt


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


def track_attributes(model: nn.Module, run: int = 0) -> None:
    """Replace every int and float that a module, or an object it holds, has as an attribute by a tracked one of that run."""
    seen: set[int] = set()
    internals = set(vars(nn.Module()))
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, value in list(vars(module).items()):
            if name not in internals:
                vars(module)[name] = track_inside(value, (OfRun(path, run), name), seen)


def track_inside(value: Any, key: tuple[Any, ...], seen: set[int]) -> Any:
    """`value` with every int and float in it tracked; lists, dicts and objects are changed in place, each once."""
    kind = type(value)
    if kind in (int, float):
        return track(value, ("attr", *key))
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


@contextmanager
def recording_reads(into: set[Expr]) -> Iterator[None]:
    """Add to `into` the expression of every tracked number that is read from an object that a module holds."""
    before, _run.reads = _run.reads, into
    try:
        yield
    finally:
        _run.reads = before


def _watch(holder: Any) -> None:
    """Let `holder`, a copy that nobody else sees, tell which of its numbers are read."""
    kind: Any = type(holder)
    if kind not in _watched:

        def read(self: Any, name: str) -> Any:
            value = kind.__getattribute__(self, name)
            if _run.reads is not None and name != "__dict__":
                _run.reads.update(expressions_in(value))
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
    if type(value) in (list, tuple):
        return [e for v in value for e in expressions_in(v)]
    return [e for v in value.values() for e in expressions_in(v)] if type(value) is dict else []


def attributes_in(expr: Expr) -> set[Expr]:
    """The attributes that an expression depends on."""
    if not isinstance(expr, tuple) or expr[0] == "dim":
        return set()
    return {expr} if expr[0] == "attr" else attributes_in(expr[1]) | attributes_in(expr[2])


def nodes_in(expr: Expr) -> set[Any]:
    """The nodes whose dims an expression depends on."""
    if not isinstance(expr, tuple) or expr[0] == "attr":
        return set()
    return {expr[1]} if expr[0] == "dim" else nodes_in(expr[1]) | nodes_in(expr[2])
