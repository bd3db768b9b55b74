"""The numbers that a model was built from: its config follows the plan.

Many models keep the object they were built from (``self.config``), whose numbers their forward never reads again. The
class is called once more, on the meta device, with tracked numbers in that object: every attribute that comes out
(`num_heads`, `out_features`) then says which field it was computed from, and with the attributes' new values the
fields can be solved for. A field on which the layers of the smaller model disagree stays as it is.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from ..base.switches import same_random_state, without_warnings
from ..base.values import is_plain_object
from ..plan.plan import Plan, Repair
from ..surgery.remove import StandIn
from ..tracing.attributes import held_at, read_attribute
from ..tracing.sizes import OPERATORS, Expr, Size, attributes_in, expression, track_inside

Key = tuple[Any, ...]  # ("attr", module path, attribute, *keys), as in sizes.py
FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full)


@dataclass
class Origins:
    """Expressions in fields of the objects that modules were built from.

    Attributes:
        attributes: attribute of a module -> what it was computed from.
        shapes: parameter -> for each dim what its size was computed from, or a number.
    """

    attributes: dict[Key, Expr] = field(default_factory=dict)
    shapes: dict[str, tuple[Expr, ...]] = field(default_factory=dict)


def origins(model: nn.Module) -> Origins:
    """Where the numbers in `model` come from.

    Empty where the model keeps no object that it was built from, or where calling its class with it makes another model.
    """
    found = Origins()
    for path, module in outermost(model):
        arguments = _arguments(module, path)
        twin, shapes = (None, {}) if arguments is None else build(type(module), arguments)
        if twin is None or shapes_of(module) != _left(shapes_of(twin), module):
            continue
        for inner, part in twin.named_modules():
            place = ".".join(filter(None, (path, inner)))
            for name, value in vars(part).items():
                for steps, number in tracked_in(value):
                    if held_at(model, (place, name, *steps)) == number:  # forward may have set others since
                        found.attributes[("attr", place, name, *steps)] = number.expr
        for name, parameter in twin.named_parameters():
            exprs = shapes.get(parameter.untyped_storage()._cdata)
            if exprs is not None and len(exprs) == parameter.dim():
                found.shapes[".".join(filter(None, (path, name)))] = exprs
    return found


def outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that keep what they were built from, and that are in no other such module."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if not any(path.startswith(p) for p in inside) and built_from(module):
            inside.append(f"{path}." if path else "")
            yield path, module


@cache
def constructor(kind: type) -> tuple[inspect.Parameter, ...]:
    """What `kind` is called with; nothing where Python can't tell."""
    try:
        return tuple(inspect.signature(kind).parameters.values())
    except (TypeError, ValueError):
        return ()


def built_from(module: nn.Module) -> dict[str, Any]:
    """The objects and dicts among the constructor's arguments that `module` holds under their names; {} if one is missing."""
    held = vars(module)
    given: dict[str, Any] = {}
    for p in constructor(type(module)):  # type: ignore[arg-type]
        if p.name in held and is_plain_object(held[p.name]):
            given[p.name] = held[p.name]
        elif p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            return {}
    return given


def _arguments(module: nn.Module, path: str) -> dict[str, Any] | None:
    """The constructor's arguments again, every number in them tracked."""
    try:
        return {
            name: track_inside(copy.deepcopy(value), (path, name), set())
            for name, value in built_from(module).items()
        }
    except Exception:  # noqa: BLE001  what can't be copied can't be used
        return None


class _Shapes(TorchFunctionMode):
    """Notes the expressions of the sizes that tensors are made with, by the memory of each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.exprs: dict[int, tuple[Expr, ...]] = {}
        self.alive: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in FACTORIES:
            sizes = args[0] if args and isinstance(args[0], (tuple, list)) else args
            sizes = (kwargs or {}).get("size", sizes)
            self.exprs[out.untyped_storage()._cdata] = tuple(map(expression, sizes))[: out.dim()]
            self.alive.append(out)
        return out


def build(
    kind: type[nn.Module], arguments: dict[str, Any], end: float = math.inf
) -> tuple[nn.Module | None, dict[int, tuple[Expr, ...]]]:
    """The class called with `arguments`, without memory where that goes, and the expressions of its tensors' sizes.

    None where it raises, or takes longer than until `end`, in processor time of this thread.
    """
    for device in ("meta", "cpu"):
        try:
            with (
                same_random_state(),
                torch.no_grad(),
                without_warnings(),
                torch.device(device),
                _Shapes() as shapes,
                _until(end),
            ):
                return kind(**arguments), shapes.exprs
        except Exception:  # noqa: BLE001  a class that computes with its weights while it is built
            continue
    return None, {}


@contextmanager
def _until(end: float) -> Iterator[None]:
    """Nothing inside goes on past `end`: a constructor may loop over a number that is tried, for ever."""
    if end == math.inf or sys.getprofile() is not None:  # or somebody measures
        yield
        return

    def look(*_: Any) -> None:
        if time.thread_time() > end:
            raise TimeoutError("the constructor takes too long")

    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(None)


def shapes_of(module: nn.Module | None) -> dict[str, torch.Size]:
    """The shapes of the parameters of a module; {} of none. One without values yet (lazy) has a shape that no other has."""
    if module is None:
        return {}
    return {n: torch.Size([-1]) if is_lazy(p) else p.shape for n, p in module.named_parameters()}


def stand_ins(module: nn.Module) -> list[str]:
    """Paths of the modules in `module` that stand in the place of removed ones."""
    return [path for path, m in module.named_modules() if isinstance(m, StandIn)]


def _left(shapes: dict[str, torch.Size], module: nn.Module) -> dict[str, torch.Size]:
    """Those of `shapes` that are not of a module for which `module` has a stand-in."""
    gone = tuple(f"{path}." for path in stand_ins(module))
    return {n: s for n, s in shapes.items() if not n.startswith(gone)} if gone else shapes


def tracked_in(value: Any, steps: Key = ()) -> Iterator[tuple[Key, Size]]:
    """The tracked whole numbers in nested lists, tuples and dicts, and the keys that lead to them."""
    if isinstance(value, Size):
        yield steps, value
    elif isinstance(value, (tuple, list)) and len(value) <= 64:
        for i, v in enumerate(value):
            yield from tracked_in(v, (*steps, i))
    elif type(value) is dict and len(value) <= 256:
        for k, v in value.items():
            yield from tracked_in(v, (*steps, k))


def field_repairs(
    model: nn.Module, found: Origins, values: dict[Key, int], plan: Plan, reads: set[Key]
) -> list[Repair]:
    """What to set so that what the original was built from (`found`: its `origins`) agrees with what becomes of it.

    `values` has what becomes of the sizes that forward reads. What else it `reads` stays, or it would compute with another
    number. Fields are repaired, and attributes that were computed from them and that forward does not read.
    """
    equations = [(found.attributes[key], n) for key, n in values.items() if key in found.attributes]
    for name, exprs in found.shapes.items():
        if name in plan.shapes or name in plan.aliases:
            equations += [(e, n) for e, n in zip(exprs, plan.new_shape(name), strict=True)]
    given = {k: v for k, v in values.items() if k not in found.attributes}
    given |= {k: v for k in reads - values.keys() if type(v := held_at(model, k[1:])) is int}
    known = solved(lambda f: read_attribute(model, f[1:]), list(dict.fromkeys(equations)), given)
    kept = values.keys() | reads
    repairs = {k: v for k, v in known.items() if k not in kept and v != read_attribute(model, k[1:])}
    for key, expr in found.attributes.items():
        value = evaluate(expr, known)
        if value is not None and key not in kept and value != read_attribute(model, key[1:]):
            repairs[key] = value
    return [Repair(k[1], k[2], tuple(k[3:]), v, read_attribute(model, k[1:])) for k, v in repairs.items()]


def config_mismatches(small: nn.Module, found: Origins) -> list[str]:
    """The parameters and numbers of the smaller model that its class, called with the repaired object, makes otherwise.

    Forward computes a size in its own way, or layers that were built from one field came out different: then no value
    of the field is right for all, though the model itself is.
    """
    wrong: list[str] = []
    for path, module in outermost(small):
        inside = f"{path}." if path else ""
        if not any(name.startswith(inside) for name in found.shapes):
            continue  # the original was not made by its class alone
        twin, _ = build(type(module), {n: copy.deepcopy(v) for n, v in built_from(module).items()})
        have, says = shapes_of(module), shapes_of(twin)
        wrong += [inside + n for n in {**have, **says} if have.get(n) != says.get(n)]
        wrong += [] if twin is None else [inside + n for n in _other_numbers(module, twin)]
    return wrong


def _other_numbers(module: nn.Module, twin: nn.Module) -> Iterator[str]:
    """The numbers, kept as attributes, in which two modules of one structure differ."""
    parts = dict(twin.named_modules())
    for path, part in module.named_modules():
        others = vars(parts[path]) if path in parts else {}
        for name, value in vars(part).items():
            if (
                type(value) in (int, float)
                and type(other := others.get(name)) in (int, float)
                and value != other
            ):
                yield ".".join(filter(None, (path, name)))


def solved(
    value_of: Callable[[Key], int], equations: list[tuple[Expr, int]], known: dict[Key, int]
) -> dict[Key, int]:
    """Field -> value, for the fields that `equations` (expression, its value) determine without contradiction.

    `value_of` says what a field was.
    Fields that are sizes by themselves come first; then one unknown at a time. Where every equation has several, those
    that hold with the old values fix them.
    """
    known, torn = dict(known), set()
    bare = [(e, n) for e, n in equations if isinstance(e, tuple) and e[0] == "attr"]
    while True:
        answers: dict[Key, set[int]] = {}
        for expr, value in bare or equations:
            answer = _solve(expr, value, known)
            if answer is not None:
                answers.setdefault(answer[0], set()).add(answer[1])
        if bare:
            bare = []
        elif not answers:
            for expr, value in equations:
                fields = attributes_in(expr) - known.keys()
                old = {f: value_of(f) for f in fields}
                if fields and evaluate(expr, {**known, **old}) == value:
                    answers = {f: {v} for f, v in old.items()}
                    break
            else:
                return {k: v for k, v in known.items() if k not in torn}
        for key, found in answers.items():
            if len(found) > 1:  # the layers disagree: no one number describes them
                torn.add(key)
            known[key] = found.pop() if len(found) == 1 else value_of(key)


def evaluate(expr: Expr, known: dict[Key, int]) -> int | None:
    """The value of an expression, where it is a whole number; else None."""
    value = _number(expr, known)
    return int(value) if value is not None and math.isfinite(value) and value == int(value) else None


def _number(expr: Expr, known: dict[Key, int]) -> int | float | None:
    if not isinstance(expr, tuple):
        return expr if isinstance(expr, (int, float)) else None
    if expr[0] == "attr":
        return known.get(expr)
    parts = [_number(e, known) for e in expr[1:]]
    if None in parts or expr[0] not in OPERATORS:
        return None
    try:
        value = OPERATORS[expr[0]](*parts)
    except (ArithmeticError, ValueError, TypeError):  # no result for these numbers
        return None
    return value if isinstance(value, (int, float)) else None


def _solve(expr: Expr, value: int, known: dict[Key, int]) -> tuple[Key, int] | None:
    """The one unknown field of ``expr == value`` and what it must be; None with another number of unknowns."""
    if not isinstance(expr, tuple) or value is None:
        return None
    if expr[0] == "attr":
        return None if expr in known else (expr, value)
    if len(expr) != 3:  # what is rounded has several solutions
        return None
    name, left, right = expr
    a, b = evaluate(left, known), evaluate(right, known)
    if (a is None) == (b is None):
        return None
    if name in ("add", "sub"):
        sign = 1 if name == "add" else -1
        if a is not None:
            return _solve(right, sign * (value - a), known)
        return _solve(left, value - sign * b, known) if b is not None else None
    if name == "mul":
        factor = b if a is None else a
        rest = left if a is None else right
        return _solve(rest, value // factor, known) if factor and value % factor == 0 else None
    if name == "floordiv" and a is None and b is not None:
        return _solve(left, value * b, known)
    if name == "floordiv" and a is not None and value and a % value == 0:
        return _solve(right, a // value, known)
    return None
