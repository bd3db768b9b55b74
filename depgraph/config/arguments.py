"""What a module was built with, where it keeps no object that says so: found by calling its class.

The arguments of a constructor are looked for among the attributes of the same names, the defaults and the sizes of the module's
tensors; those are right that make tensors of the same shapes. Called with these once more, and all numbers in them tracked, the class
says which attribute comes from which argument, and which dims do: of two sizes that were equal, which one an
attribute repeats.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice, product
from typing import Any

from torch import nn

from ..base.values import is_plain_object
from ..tracing.sizes import Expr, attributes_in, track_inside
from .origin import Key, Origins, build, constructor, evaluate, shapes_of, solved, tracked_in

TRIES = 64  # calls of one class
LARGEST = 40  # modules in one that is built again so often; a larger one only once
LONG = 1.0  # seconds of processor time that the calls of one class take together
MOST_MISSING = 3  # arguments that are found by trying
GIVEN = (int, float, bool, str, type(None), list, tuple, dict)  # what an argument that a module keeps may be


@dataclass
class Rebuilt:
    """A module of which the arguments are known.

    Attributes:
        arguments: those that are numbers, by the key that they have in expressions.
        origins: attributes and shapes of the module and of what it has inside, named as in the module.
    """

    arguments: dict[Key, int]
    origins: Origins

    def value(self, key: Key, shapes: dict[str, tuple[int, ...]]) -> int | None:
        """What attribute `key` of the module is where its tensors have `shapes`; None where they do not tell."""
        expr = self.origins.attributes.get(key)
        if expr is None:
            return None
        equations = [
            (e, n)
            for name, exprs in self.origins.shapes.items()
            for e, n in zip(exprs, shapes[name], strict=True)
            if attributes_in(e)
        ]
        known = solved(lambda f: self.arguments[f], list(dict.fromkeys(equations)), {})
        return evaluate(expr, known)


def rebuilt(module: nn.Module) -> Rebuilt | None:
    """The arguments that make a module like this one, or None."""
    wanted = shapes_of(module)
    large = next(islice(module.modules(), LARGEST, None), None) is not None
    end = time.thread_time() + LONG
    for arguments in islice(_arguments(module), 1 if large else TRIES):
        if shapes_of(build(type(module), arguments, end)[0]) == wanted:
            return _tracked(module, arguments)
        if time.thread_time() > end:
            break
    return None


def _arguments(module: nn.Module) -> Iterator[dict[str, Any]]:
    """What the class may have been called with, the likeliest first."""
    held = vars(module)
    sizes = sorted({n for p in module.parameters() for n in p.shape if n > 1}, reverse=True)
    known: dict[str, Any] = {}
    missing: list[str] = []
    optional: list[str] = []
    for p in constructor(type(module)):  # type: ignore[arg-type]
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        value = held.get(p.name, held.get(f"_{p.name}", inspect.Parameter.empty))
        if type(value) in GIVEN or is_plain_object(value):
            known[p.name] = value
        elif p.default is p.empty:
            missing.append(p.name)
        elif p.default is None or type(p.default) is int:
            optional.append(p.name)
    if len(missing) > MOST_MISSING:
        return
    for chosen in product(sizes, repeat=len(missing)):
        yield {**known, **dict(zip(missing, chosen, strict=True))}
    if not missing:
        for name, value in product(optional, [1, *sizes]):
            yield {**known, name: value}
        for pair in combinations(optional, 2):
            for values in product(sizes, repeat=2):
                yield {**known, **dict(zip(pair, values, strict=True))}


def _tracked(module: nn.Module, arguments: dict[str, Any]) -> Rebuilt | None:
    """The class called with `arguments` as tracked numbers."""
    parameters = constructor(type(module))  # type: ignore[arg-type]
    defaults = {p.name: p.default for p in parameters if type(p.default) is int}
    try:
        tracked = {
            n: track_inside(copy.deepcopy(v), ("", ("argument", n)), set())
            for n, v in {**defaults, **arguments}.items()
        }
    except Exception:  # noqa: BLE001  what can't be copied can't be used
        return None
    keys = {size.expr: int(size) for v in tracked.values() for _, size in tracked_in(v)}
    twin, exprs = build(type(module), tracked)
    if twin is None:
        return None
    found = Origins()
    for path, part in twin.named_modules():
        for name, value in vars(part).items():
            for steps, number in tracked_in(value):
                found.attributes[("attr", path, name, *steps)] = number.expr
    for name, parameter in twin.named_parameters():
        made: tuple[Expr, ...] | None = exprs.get(parameter.untyped_storage()._cdata)
        if made is not None and len(made) == parameter.dim():
            found.shapes[name] = made
    return Rebuilt(keys, found)
