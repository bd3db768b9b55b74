"""Equal widths, so that a stock config describes the result.

Two things tie counts. Members of a list of modules that are built alike keep equal counts, position for position: each
still keeps its own best units. And where the model keeps what it was built from, every size is an expression in fields of
that: sizes that come from one field stay equal, what the class computes from a field follows it (a hidden width of heads
x head width, an inner width of four times the hidden one), and what a config can't express stays whole. A number that forward
computes with, such as a scale of 1 / sqrt(head width), is computed anew from the config too: the fields behind it stay
as they are, or in proportion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from math import gcd
from typing import Any

from torch import nn

from ..axes import polynomials
from ..axes.axes import ATOM, Axis, Reason
from ..axes.polynomials import Polynomial
from ..config.described import Described, described
from ..config.origin import Key, evaluate
from ..grouping.graph import DependencyGraph
from ..tracing.sizes import Expr, attributes_in
from .factors import Tie

ONE: Polynomial = {(): 1}
Ratio = tuple[Polynomial, Polynomial]  # numerator, denominator
ALIKE = "keeps as many indices as in the other repeated blocks (uniform)"


def ties(graph: DependencyGraph) -> list[Tie]:
    """Polynomials in counts that must stay zero for equal widths."""
    found = [(_simplest(p), why) for p, why in (*_repeated(graph), *_from_fields(graph)) if p]
    return list({tuple(sorted(p.items())): (p, why) for p, why in found}.values())


def _simplest(p: Polynomial) -> Polynomial:
    """`p` without what all its terms have in common: no count is zero."""
    common = Counter(next(iter(p)))
    for term in p:
        common &= Counter(term)
    scale = gcd(*p.values())
    return {tuple(sorted((Counter(t) - common).elements())): n // scale for t, n in p.items()}


# --------------------------------------------------------------------------------------------- repeated blocks


def _repeated(graph: DependencyGraph) -> Iterator[Tie]:
    for path, container in graph.model.named_modules():
        if isinstance(container, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            alike: dict[object, list[str]] = {}
            for name, child in container.named_children():
                if not isinstance(container, nn.Sequential) or next(child.children(), None) is not None:
                    alike.setdefault(_looks(child), []).append(f"{path}.{name}" if path else name)
            for first, *others in alike.values():
                names = [n for n, _ in container.get_submodule(first.rpartition(".")[2]).named_parameters()]
                for other in others:
                    for name in names:
                        yield from _equal(graph, f"{first}.{name}", f"{other}.{name}")


def _looks(module: nn.Module) -> object:
    """Classes and shapes: equal for blocks of one structure."""
    kinds = tuple((n, type(m)) for n, m in module.named_modules())
    return kinds, tuple((n, tuple(p.shape)) for n, p in module.named_parameters())


def _equal(graph: DependencyGraph, one: str, other: str) -> Iterator[Tie]:
    for a, b in zip(graph.dims(one), graph.dims(other), strict=False):
        if a is not None and b is not None:
            yield from ((p, Reason(ALIKE, "", other)) for p in _matched(graph, a.find(), b.find()))


def _matched(graph: DependencyGraph, a: Axis, b: Axis) -> Iterator[Polynomial]:
    """Equal counts of two axes, part by part where both are made up alike."""
    if a is b:
        return
    same = a.kind == b.kind != ATOM and [p.find().size for p in a.parts] == [p.find().size for p in b.parts]
    if same:
        for p, q in zip(a.parts, b.parts, strict=True):
            yield from _matched(graph, p.find(), q.find())
    else:
        yield polynomials.minus(polynomials.count(a, graph.by_axis), polynomials.count(b, graph.by_axis))


# ------------------------------------------------------------------------------------------------------ fields


def _from_fields(graph: DependencyGraph) -> Iterator[Tie]:
    if not graph.origins.shapes:
        return
    yield from _Fields(graph, described(graph.model, graph.origins)).ties()
    for key, count in graph.sizes.attributes.items():
        if key[0] == "literal":
            value = graph.sizes.value(key)
            text = f"is the number {value} in the code of a class, which no config changes (uniform)"
            yield (
                polynomials.minus(graph.sizes.reduce(count, graph.by_axis), {(): value}),
                Reason(text, "", str(key[1])),
            )


class _Fields:
    """The fields of what a model was built from, as quotients of polynomials in counts."""

    def __init__(self, graph: DependencyGraph, known: Described) -> None:
        self.graph, self.known = graph, known
        self.fields: dict[Key, Ratio] = {}
        self.sizes = dict(self._sizes())
        self.products: dict[Axis, Polynomial] = {}  # axis -> a product of other counts that its count is
        for expr in known.exprs.values():
            if not self._followed(expr):
                self._pin(attributes_in(expr))
        for powers in known.powers.values():
            if _proportion(powers) is None:
                self._pin(powers)

    def _sizes(self) -> Iterator[tuple[Any, Polynomial]]:
        """Each place that must come out as counts say, and what they say."""
        free = self.graph.by_axis
        for place in self.known.places:
            if place[0] == "shape":
                dims = self.graph.dims(place[1])  # none for what no run used: it stays
                yield place, polynomials.count(dims[place[2]], free) if dims else {(): self._whole(place)}
        for key, p in self.graph.sizes.attributes.items():
            if key in self.known.places or key in self.known.fields:
                yield key, self.graph.sizes.reduce(p, free)

    def _whole(self, place: Any) -> int:
        """The size of a dim of a parameter."""
        return self.graph.tensors[self.graph.trace.aliases.get(place[1], place[1])].shape[place[2]]

    def _pin(self, fields: Any) -> None:
        for f in fields:
            self.fields[f] = {(): self.known.fields[f]}, ONE

    def ties(self) -> Iterator[Tie]:
        """What must stay zero for the fields to say every size."""
        open_ = []
        for place, size in sorted(self.sizes.items(), key=lambda item: str(item[0])):
            expr = place if place in self.known.fields else self.known.exprs.get(place)
            if expr is not None:
                open_.append((self._cancelled(expr), size, place))
            elif place[0] == "shape":  # this size comes from no field
                yield polynomials.minus(size, {(): self._whole(place)}), self._why(place)
        open_.sort(key=lambda e: (e[0][0] != "attr", max(map(len, e[1]), default=0)))
        open_ += [(e, {(): self._now(e)}, p) for p, e in self.known.exprs.items() if self._held(p)]
        self._solve(open_)
        for expr, size, place in open_:
            n, d = self._value(expr)
            yield polynomials.minus(n, polynomials.times(d, size)), self._why(place)
        for place, powers in self.known.powers.items():
            pair = _proportion(powers)
            if pair is not None and all(f in self.fields for f in pair):
                f, g = pair
                (a, b), (c, d) = self.fields[f], self.fields[g]
                left = polynomials.times(polynomials.times(a, d), {(): self.known.fields[g]})
                yield (
                    polynomials.minus(
                        left, polynomials.times(polynomials.times(b, c), {(): self.known.fields[f]})
                    ),
                    self._why(place),
                )

    def _held(self, place: Any) -> bool:
        """Whether a number may not change: it sizes a buffer that is made anew, or forward reads it, and not as a size."""
        return place[0] == "buffer" or (place in self.graph.trace.reads and place not in self.sizes)

    def _now(self, expr: Expr) -> int:
        return evaluate(expr, self.known.fields) or 0

    def _why(self, place: Any) -> Reason:
        name = ".".join(map(str, place[1:])) if place[0] == "attr" else place[1]
        return Reason(f"must stay what the config says of {name} (uniform)")

    def _solve(self, equations: list[tuple[Expr, Polynomial, Any]]) -> None:
        """Give every field a value: from the equation that it is alone in, or else the one that it has.

        A quotient that is not a polynomial would have to come out whole: such a field stays as it is, but for what something
        is divided by (heads), as the quotient is a count.
        """
        while True:
            progress = False
            quotients: dict[Key, Ratio] = {}
            for expr, size, _ in equations:
                unknown = attributes_in(expr) - self.fields.keys()
                if not unknown:
                    n, d = self._value(expr)
                    self._note(polynomials.minus(n, polynomials.times(d, size)))
                elif len(unknown) == 1:
                    found = self._solved(expr, (size, ONE))
                    whole = None if found is None else self._whole_number(*found)
                    if whole is not None:
                        self.fields[next(iter(unknown))] = whole, ONE
                        progress = True
                    elif found is not None and expr[0] == "floordiv":
                        quotients.setdefault(next(iter(unknown)), found)
            if not progress and quotients:
                self.fields.update(quotients)
            elif not progress:
                left = [f for expr, _, _ in equations for f in attributes_in(expr) if f not in self.fields]
                if not left:
                    return
                self._pin([min(left, key=str)])

    def _note(self, relation: Polynomial) -> None:
        """Remember what one count is a product of, or which number it must be, where a relation says so."""
        if len(relation) == 2:
            found = list(_simplest(relation).items())
            for (one, n), (other, m) in (found, found[::-1]):
                if len(one) == 1 and m % n == 0:
                    self.products.setdefault(one[0], {other: -m // n})
                    return

    def _whole_number(self, n: Polynomial, d: Polynomial) -> Polynomial | None:
        """n / d where that is a polynomial, given what counts are products of."""
        if d == ONE:
            return n
        for _ in range(2):  # what one count is may have another in it
            for a, product in self.products.items():
                n, d = (_put(p, a, product) for p in (n, d))
        return polynomials.divided(n, d)

    def _cancelled(self, expr: Expr) -> Expr:
        """``a // b * b`` is a, where it was when the model was built."""
        if not isinstance(expr, tuple) or expr[0] == "attr" or not _of_whole_numbers(expr):
            return expr
        name, *parts = expr
        left, right = map(self._cancelled, parts)
        for one, other in ((left, right), (right, left)) if name == "mul" else ():
            if isinstance(one, tuple) and one[0] == "floordiv" and one[2] == other and self._exact(one):
                return one[1]
        return name, left, right

    def _solved(self, expr: Expr, target: Ratio) -> Ratio | None:
        """The one unknown field of ``expr == target``."""
        if expr[0] == "attr":
            return target
        if not _of_whole_numbers(expr):  # what is rounded has several solutions
            return None
        name, left, right = expr
        first = bool(attributes_in(left) - self.fields.keys())
        if first and attributes_in(right) - self.fields.keys():
            return None
        other = self._value(right if first else left)
        rest = left if first else right
        if name == "mul":
            return self._solved(rest, _quotient(target, other))
        if name == "floordiv" and self._exact(expr):
            return self._solved(rest, _product(target, other) if first else _quotient(other, target))
        if name in ("add", "sub"):
            sign = 1 if name == "sub" and first else -1
            if name == "sub" and not first:
                return self._solved(rest, _sum(other, target, -1))
            return self._solved(rest, _sum(target, other, sign))
        return None

    def _value(self, expr: Expr) -> Ratio:
        """An expression in fields that are all known; what can't be followed keeps its number, as its fields do."""
        if not isinstance(expr, tuple):
            return {(): int(expr)}, ONE
        if expr[0] == "attr":
            return self.fields[expr]
        if not _of_whole_numbers(expr):
            return {(): self._now(expr)}, ONE
        a, b = self._value(expr[1]), self._value(expr[2])
        if expr[0] == "mul":
            return _product(a, b)
        if expr[0] in ("add", "sub"):
            return _sum(a, b, 1 if expr[0] == "add" else -1)
        if expr[0] == "floordiv" and self._exact(expr):
            return _quotient(a, b)
        return {(): self._now(expr)}, ONE

    def _followed(self, expr: Expr) -> bool:
        """Whether an expression is sums, differences, products and exact quotients."""
        if not isinstance(expr, tuple) or expr[0] == "attr":
            return True
        kind = expr[0] in ("add", "sub", "mul") or (expr[0] == "floordiv" and self._exact(expr))
        return kind and all(map(self._followed, expr[1:]))

    def _exact(self, expr: Expr) -> bool:
        a, b = (evaluate(e, self.known.fields) for e in expr[1:])
        return a is not None and b is not None and b != 0 and a % b == 0


def _of_whole_numbers(expr: Expr) -> bool:
    """Whether an expression has two sides, neither of which is a fraction."""
    return len(expr) == 3 and all(not isinstance(e, float) or e.is_integer() for e in expr[1:])


def _proportion(powers: Mapping[Key, Fraction]) -> tuple[Key, Key] | None:
    """The two fields whose quotient is all that a number depends on; None for any other number."""
    if len(powers) != 2 or not any(powers.values()) or sum(powers.values()) != 0:
        return None
    f, g = powers
    return f, g


def _put(p: Polynomial, atom: Axis, product: Polynomial) -> Polynomial:
    """`p` with `product` in the place of a count."""
    out: Polynomial = {}
    for term, n in p.items():
        found: Polynomial = {tuple(a for a in term if a != atom): n}
        for _ in range(term.count(atom)):
            found = polynomials.times(found, product)
        out = polynomials.minus(out, {t: -m for t, m in found.items()})
    return out


def _product(a: Ratio, b: Ratio) -> Ratio:
    return _reduced(polynomials.times(a[0], b[0]), polynomials.times(a[1], b[1]))


def _quotient(a: Ratio, b: Ratio) -> Ratio:
    return _reduced(polynomials.times(a[0], b[1]), polynomials.times(a[1], b[0]))


def _sum(a: Ratio, b: Ratio, sign: int) -> Ratio:
    left, right = polynomials.times(a[0], b[1]), polynomials.times(b[0], a[1])
    return _reduced(
        polynomials.minus(left, {t: -sign * n for t, n in right.items()}), polynomials.times(a[1], b[1])
    )


def _reduced(n: Polynomial, d: Polynomial) -> Ratio:
    whole = polynomials.divided(n, d)
    return (n, d) if whole is None else (whole, ONE)
