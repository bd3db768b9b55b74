"""Equal widths: what one number says stays one number.

Two things say widths: the object that a model was built from (its config), whose fields `origin.py` finds in the sizes
of parameters and in attributes, and repetition, since code that builds blocks in a loop gives all the same widths. Both
become constraints on counts, like those that the model's forward imposes.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any

from torch import nn

from .. import axes
from ..axes import Polynomial, Reason
from ..constraints import read_attribute
from ..graph import DependencyGraph
from ..sizes import Expr
from .factors import Tie

Equation = tuple[Expr, Polynomial]  # an expression in fields, and the count that it must say
FIELD = Reason("is one with other sizes in what the model was built from")
COMPUTED = Reason("is computed anew, at its full size, by the class that the config is given to")
BLOCK = Reason("is as wide as in the blocks that repeat its own")
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def ties(graph: DependencyGraph) -> list[Tie]:
    """Polynomials in counts that must stay zero so that a config, or a loop, still says all widths."""
    return [*_of_fields(graph), *_of_buffers(graph), *_of_blocks(graph)]


# ------------------------------------------------------------------------------------------------------- fields


def _equations(graph: DependencyGraph) -> list[Equation]:
    """What the fields of the model's config must say: sizes of parameters, and attributes that forward reads.

    A size whose origin was lost on the way (rounded, multiplied by 4.0) says nothing here; what the config then can't
    say shows when the class is called with it.
    """
    free, found = graph.free, graph.origins
    equations: list[Equation] = []
    for name, exprs in found.shapes.items():
        shape = tuple(graph.tensors[name].shape) if name in graph.tensors else ()
        for expr, (_, size) in zip(exprs, _counts(graph, name, shape), strict=False):
            equations.append((expr, size))
    for key, expr in found.attributes.items():
        if key in graph.sizes.attributes:
            equations.append((expr, graph.sizes.reduce(graph.sizes.attributes[key], free)))
    return [(expr, count) for expr, count in equations if isinstance(expr, tuple)]


def _of_fields(graph: DependencyGraph) -> Iterator[Tie]:
    """Equations that are left when each field has got its value from one of them."""
    fields: dict[Expr, Polynomial] = {}
    # Sizes by themselves come first; of several counts for one field, that which most numbers divide.
    rest = sorted(_equations(graph), key=lambda e: (not _is_field(e[0]), -gcd(*e[1].values())))
    pins: list[Tie] = []
    while rest:
        open_: list[Equation] = []
        for expr, count in rest:
            tie = _residue(expr, count, fields)
            if tie is not None:
                if tie:
                    yield tie, FIELD
            elif not _solve(expr, count, fields, pins):
                open_.append((expr, count))
        if len(open_) == len(rest):
            _settle(graph, *open_[0], fields, pins)
        rest = open_
    yield from pins


def _settle(
    graph: DependencyGraph, expr: Expr, count: Polynomial, fields: dict[Expr, Polynomial], pins: list[Tie]
) -> None:
    """Decide about an equation of several unknowns: all but one, which then is a whole number, stay as they are."""
    unknown = [f for f in _fields(expr) if f not in fields]
    held: dict[Expr, Polynomial] = {f: {(): read_attribute(graph.model, f[1:])} for f in unknown}
    for free in unknown:
        trial = {**fields, **{f: n for f, n in held.items() if f != free}}
        if _solve(expr, count, trial, pins, graph):
            fields.update(trial)
            return
    fields.update(held)
    if not unknown:  # arithmetic that has no polynomial: what the same expression says is the same
        fields[expr] = count


def _fields(expr: Expr) -> list[tuple[Any, ...]]:
    """The fields in an expression."""
    expr = _cancelled(expr)
    if not isinstance(expr, tuple):
        return []
    return [expr] if expr[0] == "attr" else [*_fields(expr[1]), *_fields(expr[2])]


def _is_field(expr: Expr) -> bool:
    return isinstance(expr, tuple) and expr[0] == "attr"


def _residue(expr: Expr, count: Polynomial, fields: dict[Expr, Polynomial]) -> Polynomial | None:
    """``expr - count`` where all fields in `expr` are known, else None."""
    expr = _cancelled(expr)
    if isinstance(expr, tuple) and expr not in fields and expr[0] == "floordiv":
        a, b = _value(expr[1], fields), _value(expr[2], fields)
        return None if a is None or b is None else axes.minus(axes.times(count, b), a)
    value = _value(expr, fields)
    return None if value is None else axes.minus(value, count)


def _cancelled(expr: Expr) -> Expr:
    """``a // b * b`` is a: what is split into heads is divisible by their number."""
    if isinstance(expr, tuple) and expr[0] == "mul":
        for one, other in ((expr[1], expr[2]), (expr[2], expr[1])):
            if isinstance(one, tuple) and one[0] == "floordiv" and one[2] == other:
                return _cancelled(one[1])
    return expr


def _value(expr: Expr, fields: dict[Expr, Polynomial]) -> Polynomial | None:
    """What `expr` says, as a polynomial in counts."""
    expr = _cancelled(expr)
    if not isinstance(expr, tuple):
        return {(): expr} if isinstance(expr, int) else None
    if expr in fields:
        return fields[expr]
    if expr[0] not in ("add", "sub", "mul", "floordiv"):
        return None
    a, b = _value(expr[1], fields), _value(expr[2], fields)
    if a is None or b is None:
        return None
    if expr[0] == "mul":
        return axes.times(a, b)
    if expr[0] == "floordiv":
        return axes.divided(a, b)
    return axes.minus(a, b if expr[0] == "sub" else {term: -n for term, n in b.items()})


def _solve(
    expr: Expr,
    count: Polynomial,
    fields: dict[Expr, Polynomial],
    pins: list[Tie],
    graph: DependencyGraph | None = None,
) -> bool:
    """Give the one unknown field of ``expr == count`` its value; False where there are more, or it can't be said."""
    expr = _cancelled(expr)
    if not isinstance(expr, tuple):
        return False
    if expr[0] == "attr":
        fields[expr] = count
        return True
    if expr[0] not in ("add", "sub", "mul", "floordiv"):
        return False
    a, b = _value(expr[1], fields), _value(expr[2], fields)
    if (a is None) == (b is None):
        return False
    known, unknown = (b, expr[1]) if a is None else (a, expr[2])
    value: Polynomial | None
    if known is None:
        return False
    if expr[0] == "mul":
        value = _quotient(count, known, pins, graph)
    elif expr[0] == "floordiv":
        value = axes.times(count, known) if a is None else axes.divided(known, count)
    elif expr[0] == "add":
        value = axes.minus(count, known)
    elif a is None:
        value = axes.minus(count, {term: -n for term, n in known.items()})
    else:
        value = axes.minus(known, count)
    return value is not None and _solve(unknown, value, fields, pins, graph)


def _quotient(
    count: Polynomial, known: Polynomial, pins: list[Tie], graph: DependencyGraph | None
) -> Polynomial | None:
    """``count / known``; by a number that is the size of a factor of `count`, that factor, which then must stay."""
    exact = axes.divided(count, known)
    if exact is not None or graph is None or set(known) != {()} or len(count) != 1:
        return exact
    ((term, n),) = count.items()
    free, size = graph.free, known[()]
    for atom in dict.fromkeys(term):
        if n == 1 and len(term) > 1 and free[atom].size == size:
            pins.append(({(atom,): 1, (): -size}, FIELD))
            rest = list(term)
            rest.remove(atom)
            return {tuple(rest): 1}
    return None


def _of_buffers(graph: DependencyGraph) -> Iterator[Tie]:
    """What a saved model does not hold (tables of rotary angles, for one) is as the class computes it."""
    if not graph.origins.shapes:
        return
    saved, free = set(graph.model.state_dict()), graph.free
    for name in graph.trace.tensors:
        if name not in saved and name not in graph.trace.constants:
            for axis, n in zip(graph.dims(name), graph.tensors[name].shape, strict=True):
                if tie := axes.minus(axes.count(axis, free), {(): n}):
                    yield tie, COMPUTED


# ------------------------------------------------------------------------------------------------------- blocks


def _of_blocks(graph: DependencyGraph) -> Iterator[Tie]:
    """Members of a container that look alike have equal counts in every dim of every parameter."""
    for path, container in graph.model.named_modules():
        if not isinstance(container, CONTAINERS):
            continue
        alike: dict[object, str] = {}
        for key, child in container.named_children():
            if isinstance(container, nn.Sequential) and not any(child.children()):
                continue  # layers in a row are no repetition
            place = f"{path}.{key}" if path else key
            shapes = [(name, tuple(p.shape)) for name, p in child.named_parameters()]
            first = alike.setdefault((type(child), tuple(shapes)), place)
            if first == place:
                continue
            for name, shape in shapes:
                mine, others = (_counts(graph, f"{at}.{name}", shape) for at in (place, first))
                for (free, count), (also, other) in zip(mine, others, strict=True):
                    if (free or also) and (tie := axes.minus(count, other)):
                        yield tie, BLOCK


def _counts(graph: DependencyGraph, name: str, shape: tuple[int, ...]) -> list[tuple[bool, Polynomial]]:
    """For each dim of a parameter: whether it can shrink, and its count; numbers where no run used it."""
    dims = graph.dims(name)
    if len(dims) != len(shape):
        return [(False, {(): n}) for n in shape]
    free = graph.free
    counts = [axes.count(axis, free) for axis in dims]
    return [(set(p) > {()} or () not in p, p) for p in counts]
