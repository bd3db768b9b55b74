"""How the sizes and numbers of a model depend on the fields of what it was built from.

`origin.py` builds the class again with tracked numbers, which say what each size was computed from. Where the class
rounds (``int(hidden / heads)``), the track is lost. Here each field is doubled in turn and the class is built again: what
an expression foretells wrongly is replaced by the product of powers of fields that fits every build, or by nothing.
By nothing, for one, where half of a quotient is not a whole number: the fields behind an odd head width stay.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import nn

from ..tracing.attributes import put, read_attribute
from ..tracing.sizes import Expr, attributes_in
from .origin import Key, Origins, build, built_from, evaluate, outermost, stand_ins

Place = tuple[
    Any, ...
]  # ("shape", parameter or saved buffer, dim), ("buffer", name, dim) or ("attr", module path, attribute, *keys)
Numbers = dict[Place, float]
STEEPEST = 3  # no size grows faster than with this power of a field


@dataclass
class Described:
    """What each number of a model comes from.

    Attributes:
        exprs: place of an int -> an expression in fields that holds in every build.
        powers: place of any other number that depends on fields -> exponent of each; of a place that no product of
            powers fits, what it depends on, with exponent 0.
        fields: field -> its value.
        places: all numbers that were looked at.
    """

    exprs: dict[Place, Expr] = field(default_factory=dict)
    powers: dict[Place, dict[Key, Fraction]] = field(default_factory=dict)
    fields: dict[Key, int] = field(default_factory=dict)
    places: set[Place] = field(default_factory=set)


def described(model: nn.Module, found: Origins) -> Described:
    """Build the parts of `model` that keep what they were built from once for each of their fields."""
    out = Described()
    tracked: dict[Place, Expr] = {
        ("shape", n, d): e for n, es in found.shapes.items() for d, e in enumerate(es)
    }
    tracked |= found.attributes
    for path, module in outermost(model):
        inside = f"{path}." if path else ""
        mine = {p: e for p, e in tracked.items() if p[1] == path or p[1].startswith(inside)}
        fields = {f for e in mine.values() for f in attributes_in(e)}
        base = _numbers(_built(module, path, {}), path)
        if base is None:
            continue
        gone = tuple(f"{inside}{p}." for p in stand_ins(module))
        base = {p: n for p, n in base.items() if not f"{p[1]}.".startswith(gone)} if gone else base
        values = {f: int(read_attribute(model, f[1:])) for f in sorted(fields, key=str)}
        probes = {f: _numbers(_built(module, path, {f: 2 * v}), path) for f, v in values.items() if v > 0}
        out.fields |= values
        out.places |= base.keys()
        _explain(out, mine, base, values, {f: n for f, n in probes.items() if n is not None})
    return out


def _explain(
    out: Described,
    tracked: Mapping[Place, Expr],
    base: Numbers,
    values: dict[Key, int],
    probes: Mapping[Key, Numbers],
) -> None:
    """Sort the numbers of one part into expressions and powers."""
    for place, number in base.items():
        expr = tracked.get(place)
        known = {f: n[place] for f, n in probes.items() if place in n}
        whole = isinstance(number, int)
        if expr is not None and all(
            evaluate(expr, {**values, f: 2 * values[f]}) == n for f, n in known.items()
        ):
            if attributes_in(expr):
                out.exprs[place] = expr
            continue
        powers = {f: _exponent(n / number) for f, n in known.items() if number and n != number}
        fits = {f: e for f, e in powers.items() if e is not None}
        if len(fits) < len(powers) or (not number and any(known.values())):
            out.powers[place] = {f: Fraction(0) for f in known if known[f] != number}
        elif whole and all(e.denominator == 1 for e in fits.values()):
            product = _product(int(number), values, fits)
            if fits and product is not None:
                out.exprs[place] = product
        elif fits:
            out.powers[place] = fits


def _exponent(ratio: float) -> Fraction | None:
    """e with ratio = 2 ** e, where that is a number of quarters."""
    if ratio <= 0:
        return None
    found = Fraction(round(4 * math.log2(ratio)), 4)
    exact = math.isclose(ratio, 2 ** float(found), rel_tol=1e-6)
    return found if exact and abs(found) <= STEEPEST else None


def _product(number: int, values: Mapping[Key, int], powers: Mapping[Key, Fraction]) -> Expr | None:
    """``number`` as a constant times powers of fields: one quotient of whole numbers."""
    upper, lower = Fraction(number), Fraction(1)
    above: Expr = 1
    below: Expr = 1
    for f, e in powers.items():
        for _ in range(abs(int(e))):
            if e > 0:
                above, lower = ("mul", above, f), lower * values[f]
            else:
                below, upper = ("mul", below, f), upper * values[f]
    constant = upper / lower
    above, below = ("mul", above, constant.numerator), ("mul", below, constant.denominator)
    return ("floordiv", above, below)


def _built(module: nn.Module, path: str, changed: Mapping[Key, int]) -> nn.Module | None:
    """The class of `module` called again on the meta device, with some fields changed."""
    arguments = {name: copy.deepcopy(value) for name, value in built_from(module).items()}
    for key, value in changed.items():
        _, place, name, *steps = key
        if place != path or name not in arguments:
            return None
        arguments[name] = put(arguments[name], list(steps), value)
    return build(type(module), arguments)[0]


def _numbers(module: nn.Module | None, path: str) -> Numbers | None:
    """The shapes and the numbers in the attributes of a module that would be at `path`."""
    if module is None:
        return None
    inside = f"{path}." if path else ""
    found: Numbers = {}
    kept = module.state_dict().keys()
    for name, p in module.named_parameters():
        found |= {("shape", inside + name, d): n for d, n in enumerate(p.shape)}
    for name, b in module.named_buffers():
        kind = "shape" if name in kept else "buffer"  # what is saved is loaded into what the class makes
        found |= {(kind, inside + name, d): n for d, n in enumerate(b.shape)}
    for inner, part in module.named_modules():
        place = ".".join(filter(None, (path, inner)))
        for name, value in vars(part).items():
            for i, n in (
                enumerate(value) if isinstance(value, (tuple, list)) and len(value) <= 64 else [(None, value)]
            ):
                if type(n) in (int, float):
                    found[("attr", place, name) if i is None else ("attr", place, name, i)] = n
    return found
