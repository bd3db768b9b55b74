"""Sizes in the user's code -> what must be repaired, and which counts must keep fitting together.

Every `SizeUse` is an equation: the expression that the code computes must equal the number of kept indices. With an
attribute, or a number in the code of a method, alone on one side, that is set. An equation between sizes ("C // heads is
the width of a head") becomes a constraint for the planner. A number of unknown origin can't be changed. Where the code
computes with a size itself (``h * h.shape[-1]``), the load of it becomes the number that it was, if nothing else uses it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Container
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..axes import axes, polynomials
from ..axes.axes import ATOM, CONCAT, Axis, Reason
from ..axes.op_call import DimFacts
from ..axes.polynomials import Polynomial
from ..axes.ragged import is_ragged
from ..surgery.apply import repeated_size
from ..tracing.attributes import read_attribute
from ..tracing.literals import ANY
from ..tracing.recorder import COUNTED, LENGTH, Choice, Node, record_of
from ..tracing.size_uses import ScalarUse, SizeUse
from ..tracing.sizes import ROUNDING, SETTABLE, SOURCES, Expr, Place, evaluate, places_in, sources_in
from .decisions import Decision, decision
from .ranging import Ranging


@dataclass(frozen=True)
class Literal:
    """A number of unknown origin that must follow an axis."""

    use: SizeUse
    target: Polynomial


def is_constant(polynomial: Polynomial) -> bool:
    """Whether no count occurs in it."""
    return all(not term for term in polynomial)


class SizeSystem:
    """The equations of one trace, over the atoms that are free when it is built."""

    def __init__(self, state: DimFacts, model: nn.Module) -> None:
        """Collect and solve; atoms that the code's arithmetic can't follow are frozen."""
        self.state, self.model = state, model
        self.attributes: dict[tuple[Any, ...], Polynomial] = {}
        self.known: dict[Expr, Polynomial] = {}
        self.constraints: list[tuple[Polynomial, Reason]] = []
        self.literals: list[Literal] = []
        self.meets_literals = (
            False  # whether a size that may change was compared with a number of unknown origin
        )
        self.decisions: dict[Node, Decision] = {}
        self.held: dict[Place, Expr] = {}  # loads of sizes that become the numbers that they were
        self.multiples: list[
            tuple[Axis, int]
        ] = []  # axes of which as many stay as are a multiple of a number
        self.ranging = Ranging(state, self.value)
        self.pinned: set[Axis] = set()  # those that an equation fixes by itself
        self.tests: list[
            tuple[Expr, Polynomial]
        ] = []  # what arithmetic of the code must give with the new sizes
        self.free = {
            a
            for results in state.dims.values()
            for dims in results
            for axis in dims
            if axis is not None
            for a in axes.atoms(axis)
            if a.frozen is None
        }
        pending = self._direct_uses()
        self._comparisons()
        for use, target in pending:
            self._infer(use.expr, target)
        self._bounds()
        for use, target in pending:
            self._equate(use, target)
        self._losses()
        self._scalars()
        self._steps()
        self._pin()
        self._divided()
        self._pin()

    def _pin(self) -> None:
        """Freeze the atoms that an equation fixes by itself, so that another factor of their dims may go instead."""
        while True:
            free = {a for a in self.free if a.frozen is None}
            reduced = [(self.reduce(p, free), why) for p, why in self.constraints]
            alone = [(p, why) for p, why in reduced if len({a for term in p for a in term}) == 1]
            if not alone:
                return
            for p, why in alone:
                self.pinned |= {a for term in p for a in term}
                self._freeze({a for term in p for a in term}, why)

    def reduce(self, polynomial: Polynomial, free: Container[Axis]) -> Polynomial:
        """`polynomial` with the count of every atom outside `free` put in as a number."""
        if all(a in free for term in polynomial for a in term):
            return polynomial
        out: Polynomial = {}
        for term, n in polynomial.items():
            rest = tuple(a for a in term if a in free)
            value = n * math.prod(a.size for a in term if a not in free)
            out[rest] = out.get(rest, 0) + value
        return {term: n for term, n in out.items() if n}

    def follow(self, path: str, executed: str) -> None:
        """Module `path`, which no run called, repeats the sizes that its executed sibling repeats: of equal counts."""

        def moved(place: str) -> str | None:
            inside = place == executed or place.startswith(executed + ".")
            return path + place[len(executed) :] if inside else None

        for key, target in list(self.attributes.items()):
            there = moved(key[1])
            if there is not None:
                self.attributes.setdefault((key[0], there, *key[2:]), target)

    # ------------------------------------------------------------------------------------------------ equations

    def _target(self, use: SizeUse) -> Polynomial | None:
        if use.dim is None:
            axis = self.state.counted.get((use.node, use.argument))
            return {(): use.value} if axis is None else polynomials.count(axis, self.free)
        if use.node not in self.state.dims:
            return None
        axis = self.state.dims[use.node][0][use.dim]
        if axis is None:
            return {(): use.value}
        prefix = self._prefix(axis, use.extent or 0)
        if prefix is None:
            return None
        before = polynomials.count(axis, self.free) if use.negative else prefix if use.minus else {}
        return polynomials.minus({} if use.minus else prefix, before)

    def _prefix(self, axis: Axis, extent: int) -> Polynomial | None:
        """How many of the first `extent` indices of `axis` are kept; None where that is not a border of its pieces."""
        axis = axis.find()
        if extent in (0, axis.size):
            return polynomials.count(axis, self.free) if extent else {}
        if axis.kind == ATOM:
            return {(): extent} if axis not in self.free else None
        if is_ragged(axis):
            return None
        if axis.kind == CONCAT:
            total: Polynomial = {}
            for part in axis.parts:
                size = part.find().size
                piece = self._prefix(part, min(extent, size))
                if piece is None:
                    return None
                total = polynomials.minus(total, {t: -n for t, n in piece.items()})
                extent -= min(extent, size)
                if not extent:
                    return total
            return total
        inner = axis.size // axis.parts[0].find().size
        if extent % inner:
            return {(): extent} if is_constant(polynomials.count(axis, self.free)) else None
        outer = self._prefix(axis.parts[0], extent // inner)
        return (
            None
            if outer is None
            else polynomials.times(outer, polynomials.count(axes.product(axis.parts[1:]), self.free))
        )

    def _direct_uses(self) -> list[tuple[SizeUse, Polynomial]]:
        """Attributes and literals used bare; returns the uses that compute."""
        pending = []
        for use in self.state.trace.size_uses:
            if use.extent is None:
                continue
            target = self._target(use)
            if target is None:
                self._freeze_axis(self._axis_of(use), use, f"is used by part of a group in {use.function}")
                continue
            if not isinstance(use.expr, tuple):
                if not is_constant(target):
                    self.literals.append(Literal(use, target))
            elif use.expr[0] in SETTABLE:
                self._attribute(use.expr, target, use)
            else:
                self.known.setdefault(use.expr, target)
                pending.append((use, target))
        return pending

    def _axis_of(self, use: SizeUse) -> Axis | None:
        if use.dim is None or use.node not in self.state.dims:
            return None
        return self.state.dims[use.node][0][use.dim]

    def _divided(self) -> None:
        """A dim of the model's tensors that other inputs divide elsewhere must stay whole."""
        for use in self.state.trace.size_uses:
            axis = self._axis_of(use)
            if axis is None or not self.ranging.ranges(use.expr) or not self.ranging.of_model(axis):
                continue
            atoms = set(axes.atoms(axis))
            for whole in self.ranging.dims_of_tensors:
                if not atoms.isdisjoint(axes.atoms(whole)):
                    self._freeze_axis(whole, use, f"is divided in {use.function} by a size of an input")

    def _attribute(self, key: Expr, target: Polynomial, use: SizeUse) -> None:
        self._declared(key)
        if key in self.attributes:
            self._require(
                polynomials.minus(self.attributes[key], target),
                use,
                f"shares {_named(key)}",
            )
        else:
            self.attributes[key] = target

    def _declared(self, key: Expr) -> None:
        """An attribute that one of torch's modules has of its weight (``out_channels``) is the size of that weight."""
        if key in self.attributes or key[0] != "attr" or len(key) != 3:
            return
        path, name = key[1:]
        found = repeated_size(self.model.get_submodule(path), name)
        node = (
            None
            if found is None
            else self.state.trace.tensors.get(f"{path}.{found[0]}" if path else found[0])
        )
        if found is not None and node is not None:
            count = polynomials.count(self.state.dims[node][0][found[1]], self.free)
            if polynomials.minus(count, {(): self.value(key)}) and self._before(count) == self.value(key):
                self.attributes[key] = count

    def _require(self, difference: Polynomial, use: SizeUse | None, text: str) -> None:
        if difference:
            place = (use.module, use.source) if use is not None else ("", "")
            self._keep_equal(difference, text, *place)

    def _keep_equal(self, difference: Polynomial, text: str, module: str, source: str) -> None:
        """`difference` stays 0, because of `text`; the reason says what equals what: embedding = heads x width."""
        names = {
            term: key[2] for key, p in self.attributes.items() if key[:2] == ("attr", module) and len(key) == 3
            for term, n in p.items() if len(p) == n == 1
        }  # fmt: skip

        def side(sign: int) -> str:
            made: list[str] = []
            for term, n in difference.items():
                if n * sign > 0:
                    factors = [str(abs(n))] if abs(n) > 1 or not term else []
                    product = " x ".join([*factors, *(names.get((a,), str(a.size)) for a in term)])
                    named = len(term) > 1 and term in names
                    made.append(f"{names[term]} ({product})" if named else product)
            return " + ".join(made) or "0"

        self.constraints.append((difference, Reason(f"{text}: {side(1)} = {side(-1)}", "", module, source)))

    def _comparisons(self) -> None:
        """``a == b`` held in the traced run: it must go on holding; ``a < b``, whatever size an input has."""
        for test in self.state.comparisons:
            name, left, right, outcome = test
            module, source = self.state.trace.places.get(test, ("", ""))
            atoms = self.atoms_of(left) | self.atoms_of(right)
            equal = (name, outcome) in (("eq", True), ("ne", False))
            if not equal and any(
                self.atoms_of(a) and self.ranging.ranges(b) for a, b in ((left, right), (right, left))
            ):
                text = "is compared with a size that ranges over an input, and may be larger or smaller"
                self._freeze(atoms, Reason(text, "", module, source))
            if not equal:
                continue
            if self._divides(left, right) or self._determined(left, right):
                continue
            p, q = self.polynomial(left), self.polynomial(right)
            if p is not None and q is not None:
                if difference := polynomials.minus(p, q):
                    self._keep_equal(difference, "is compared with another size", module, source)
                for expr, other in ((left, q), (right, p)):
                    self.meets_literals |= not isinstance(expr, tuple) and not is_constant(other)
            else:
                text = "enters a comparison of sizes that can't be followed"
                self._freeze(atoms, Reason(text, "", module, source))

    def open_choices(self) -> list[Choice]:
        """Tests in forward that come out otherwise for other values or sizes of inputs, whatever the plan."""
        found = []
        for choice, tested in self.state.trace.choices.items():
            ranging = [isinstance(side, tuple) and self.ranging.ranges(side) for side in tested]
            if not tested or (ranging.count(True) == 1 and not any(map(self.atoms_of, tested))):
                made = {source[1] for side in tested for source in sources_in(side) if source[0] == "dim"}
                if not any(
                    map(_depends_on_values, made)
                ):  # how many are chosen: for none, the way means nothing
                    found.append(choice)
        return found

    def _divides(self, left: Expr, right: Expr) -> bool:
        """``a % b == 0``: a stays a multiple of b, which is no reason to stay what it is."""
        expr, rest = (left, right) if isinstance(left, tuple) else (right, left)
        if rest != 0 or not isinstance(expr, tuple) or expr[0] != "mod":
            return False
        p, q = self.polynomial(expr[1]), self.polynomial(expr[2])
        if p is None or q is None:
            return False
        divisor = q.get((), 0) if is_constant(q) else 0
        if divisor and len(p) == 1:
            ((term, factor),) = p.items()
            if len(term) == 1:
                self.multiples.append((term[0], divisor // math.gcd(divisor, factor)))
        return True  # a count that is no multiple is found when all are chosen: see `flipped`

    def _bounds(self) -> None:
        """``a <= b`` of equal sizes: an attribute that nothing else determines goes on being equal."""
        for name, left, right, _ in self.state.comparisons:
            if name not in ("eq", "ne") and self.value(left) == self.value(right):
                self._determined(left, right)

    def _determined(self, left: Expr, right: Expr) -> bool:
        """Whether one side is an attribute that nothing has determined yet: from now on it is the other."""
        for a, b in ((left, right), (right, left)):
            p = self.polynomial(b)
            if isinstance(a, tuple) and a[0] in SETTABLE and p is not None and a not in self.attributes:
                if not is_constant(p):
                    self.attributes[a] = p
                return True
        return False

    def _infer(self, expr: Expr, target: Polynomial) -> None:
        """Solve ``expr == target`` for the one attribute in it that no use has determined: ``3 * self.dim``."""
        if not isinstance(expr, tuple) or expr[0] == "dim":
            return
        if expr[0] in SETTABLE:
            if expr not in self.attributes and not is_constant(target):
                self.attributes[expr] = target
            return
        if expr[0] not in ("add", "sub", "mul", "floordiv"):
            return
        name, a, b = expr
        p, q = self.polynomial(a), self.polynomial(b)
        open_a, open_b = self._open(a), self._open(b) and name != "floordiv"
        if open_a == open_b or p is None or q is None:
            return
        known = q if open_a else p
        wanted: Polynomial | None = None
        if name == "add":
            wanted = polynomials.minus(target, known)
        elif name == "sub":
            wanted = (
                polynomials.minus(target, {t: -n for t, n in known.items()})
                if open_a
                else polynomials.minus(known, target)
            )
        elif name == "mul":
            wanted = polynomials.divided(target, known)
        elif self.value(a) == self.value(b) * self.value(expr):
            wanted = polynomials.times(target, known)
        if wanted is not None:
            self._infer(a if open_a else b, wanted)

    def _open(self, expr: Expr) -> bool:
        """Whether an attribute occurs in `expr` that no use has determined yet."""
        if not isinstance(expr, tuple) or expr[0] == "dim" or (expr in self.known and expr[0] == "floordiv"):
            return False
        return expr not in self.attributes if expr[0] in SETTABLE else any(map(self._open, expr[1:]))

    def _equate(self, use: SizeUse, target: Polynomial) -> None:
        got = self.polynomial(use.expr, structural=True)
        if got is None and (parts := self._quotient(use.expr)) is not None:
            a, b = parts
            if self._before(a) == self._before(b) * abs(use.value):
                self.tests.append((use.expr, target))
                self._require(
                    polynomials.minus(a, polynomials.times(b, target)),
                    use,
                    "is divided to compute another size",
                )
                return
        if got is not None:
            self._require(polynomials.minus(got, target), use, "is computed from other sizes")
            return
        atoms = self.atoms_of(use.expr) | {a for t in target for a in t}
        self._freeze(
            atoms,
            Reason(
                "has a size that the code computes in a way that can't be followed",
                "",
                use.module,
                use.source,
            ),
        )

    def _quotient(self, expr: Expr) -> tuple[Polynomial, Polynomial] | None:
        """Polynomials a and b where `expr` is a divided by b and rounded: ``a // b``, ``a >> 2``, ``int(a * 0.25)``."""
        while expr[0] in ROUNDING and isinstance(expr[1], tuple):
            expr = expr[1]
        if expr[0] == "neg":  # -(-a // b)
            inner = self._quotient(expr[1])
            return None if inner is None else (polynomials.minus({}, inner[0]), inner[1])
        if expr[0] not in ("floordiv", "truediv", "rshift", "mul"):
            return None
        left, right = expr[1:]
        if expr[0] == "mul":
            left, right = (right, left) if isinstance(left, float) else (left, right)
            if not isinstance(right, float):
                return None
            factor = Fraction(right).limit_denominator(1 << 10)
            a = self.polynomial(left)
            return (
                None
                if a is None
                else (polynomials.times(a, {(): factor.numerator}), {(): factor.denominator})
            )
        a, b = self.polynomial(left), self.polynomial(right)
        if a is None or b is None:
            return None
        return (a, {(): 2 ** b.get((), 0)} if is_constant(b) else b) if expr[0] == "rshift" else (a, b)

    def _before(self, polynomial: Polynomial) -> int:
        """What `polynomial` was in the traced run."""
        return polynomials.evaluate(polynomial, {axis: axis.size for axis in self.free})

    def _losses(self) -> None:
        """A size that became a plain number, or a text: nobody sees what the code does with it."""
        for expr, how, module, source in self.state.trace.losses:
            if how == COUNTED:
                continue
            atoms = self.atoms_of(expr)
            self.meets_literals |= bool(atoms) or (how == LENGTH and self.ranging.ranges(expr))
            if not self._hold(expr):
                self._freeze(atoms, Reason(f"is turned into a plain number by {how}", "", module, source))

    def _scalars(self) -> None:
        """A number the op computes with must stay what it was, unless it only decides something, or scales gradients."""
        for use in self.state.trace.scalar_uses:
            if record_of(use.node).backward or self._decides(use):
                continue
            self._keep_number(use, str(use.node.target), record_of(use.node).module)

    def _steps(self) -> None:
        """Nor may a number of copies or parts change, a step or an amount of padding, where it repeats no size as well."""
        uses = self.state.trace.size_uses
        repeating = {_argument_of(use) for use in uses if use.extent is not None}
        for use in uses:
            if use.extent is not None or not self.atoms_of(use.expr) or _argument_of(use) in repeating:
                continue
            a, b = self._quotient(use.expr) or (self.polynomial(use.expr), {(): 1})
            if a is None or polynomials.minus(a, polynomials.times(b, {(): use.value})):
                self._keep_number(use, use.function, use.module)

    def _keep_number(self, use: SizeUse | ScalarUse, op: str, module: str) -> None:
        """What `use` computes with stays: the sizes that it is made of become numbers in the code, or else they stay, too."""
        atoms = self.atoms_of(use.expr)
        self.meets_literals |= any(s[0] == "dim" and self.atoms_of(s) for s in sources_in(use.expr))
        if not self._hold(use.expr):
            text = f"sets a number that the op computes with ({use.value:g})"
            self._freeze(atoms, Reason(text, op, module, use.source))

    @cached_property
    def _followed(self) -> set[Place]:
        """Loads that must not become numbers: a shape or a test depends on them, they were of several sizes, or go on."""
        trace = self.state.trace
        several = {
            place
            for place, dims in trace.sizes_read.items()
            if not all(
                dim is not None and dim[1] in self.state.dims and self.ranging.is_fixed(dim) for dim in dims
            )
            or len({self.value(dim) for dim in dims}) > 1
        }
        shapes = (places_in(use.expr) for use in trace.size_uses if use.extent is not None)
        tests = (places_in(side) for _, *sides, _ in trace.comparisons for side in sides)
        return several.union(*shapes, *tests)

    def _holds(self, place: Place) -> bool:
        """Whether a load can become a number: no code that did not run may lead there with another size."""
        path, method, _ = place
        leads = {method, ANY} if method != "forward" else self._names_of.get(path, set())
        return place not in self._followed and self.state.trace.not_run.isdisjoint(leads)

    @cached_property
    def _names_of(self) -> dict[str, set[str]]:
        """Path of a module -> the names by which code may call it."""
        names: dict[int, set[str]] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), set()).update((*path.split("."), ANY) if path else ())
        return {path: names[id(module)] for path, module in self.model.named_modules()}

    def _hold(self, expr: Expr) -> bool:
        """Whether `expr` can stay what it was: each size that may change comes from a load that can become a number."""
        sources = [s for s in sources_in(expr) if self.atoms_of(s)]
        if not all(s[0] == "dim" and len(s) > 3 and self._holds(s[3]) for s in sources):
            return False
        self.held.update((s[3], s) for s in sources)
        return True

    def _decides(self, use: ScalarUse) -> bool:
        """Whether the number goes into a tensor that only decides; then it is noted for `flipped`."""
        if not isinstance(use.expr, tuple) or self.polynomial(use.expr) is None:
            return False
        found = self.decisions.get(use.node) or decision(self.state.trace, use.node)
        if found is not None:
            self.decisions[use.node] = found
            found.uses.append(use)
        return found is not None

    # ----------------------------------------------------------------------------------------------- evaluation

    def polynomial(self, expr: Expr, structural: bool = False) -> Polynomial | None:
        """The value of `expr` as a polynomial in counts; None where its arithmetic has none."""
        if isinstance(expr, (int, float)):
            return {(): int(expr)} if expr == int(expr) else None
        if not structural and expr in self.known:
            return self.known[expr]
        kind = expr[0]
        if kind in SETTABLE:
            self._declared(expr)
            value = self.value(expr)
            return self.attributes.get(expr, {(): int(value)} if isinstance(value, int) else None)
        if kind == "dim":
            return polynomials.count(self.state.dims[expr[1]][0][expr[2]], self.free)
        parts = [self.polynomial(e) for e in expr[1:]]
        known = [p for p in parts if p is not None]
        if len(known) < len(parts):
            return None
        if all(map(is_constant, known)):
            value = self.value(expr)
            return {(): value} if isinstance(value, int) else None
        if kind in ROUNDING:  # of a whole number
            return known[0] if len(known) == 1 else None
        if kind == "neg":
            return polynomials.minus({}, known[0])
        if len(known) != 2:
            return None
        a, b = known
        if kind == "add":
            return polynomials.minus(a, {t: -n for t, n in b.items()})
        if kind == "sub":
            return polynomials.minus(a, b)
        if kind == "mul":
            return polynomials.times(a, b)
        divisor = b.get((), 0) if is_constant(b) else 0
        if kind == "rshift":
            divisor = 2**divisor if is_constant(b) else 0
        if (
            kind in ("floordiv", "rshift", "truediv")
            and divisor
            and all(n % divisor == 0 for n in a.values())
        ):
            return {t: n // divisor for t, n in a.items()}
        return None

    def value(self, expr: Expr) -> Any:
        """The number that `expr` had in the traced run."""

        def at(source: Expr) -> Any:
            if source[0] == "dim":
                return record_of(source[1]).shape[source[2]]
            return source[-1] if source[0] == "literal" else read_attribute(self.model, source[1:])

        return evaluate(expr, at)

    def atoms_of(self, expr: Expr) -> set[Axis]:
        """The free atoms whose counts `expr` depends on."""
        if not isinstance(expr, tuple):
            return set()
        if expr in self.known:
            return {a for t in self.known[expr] for a in t}
        if expr[0] in SOURCES:
            p = self.polynomial(expr) if expr[0] == "dim" else self.attributes.get(expr)
            return {a for t in (p or {}) for a in t}
        return set().union(*map(self.atoms_of, expr[1:]))

    def _freeze(self, atoms: set[Axis], reason: Reason) -> None:
        for a in atoms:
            a.frozen = a.frozen or reason

    def _freeze_axis(self, axis: Axis | None, use: SizeUse, text: str) -> None:
        if axis is not None:
            self._freeze(self.free.intersection(axes.atoms(axis)), Reason(text, "", use.module, use.source))

    def counts(self, masks: axes.AtomMasks) -> dict[Axis, int]:
        """How many indices of each atom `masks` keep."""
        return {a: int(masks[a].sum()) if a in masks else a.size for a in self.free}

    def flipped(self, masks: axes.AtomMasks) -> list[tuple[set[Axis], str]]:
        """Tests of sizes that would come out differently with `masks`: their atoms and text."""
        found, counts = [], self.counts(masks)
        for name, left, right, outcome in self.state.comparisons:
            atoms = self.atoms_of(left) | self.atoms_of(right)
            if atoms:
                now = [self._after(side, counts) for side in (left, right)]
                if None in now or bool(getattr(operator, name)(*now)) != outcome:
                    found.append((atoms, f"{now[0]} {name} {now[1]}"))
        for expr, target in self.tests:
            now = [self._after(expr, counts), polynomials.evaluate(target, counts)]
            if now[0] != now[1]:
                found.append((self.atoms_of(expr) | {a for t in target for a in t}, f"{now[0]} eq {now[1]}"))
        for made in self.decisions.values():
            numbers = [polynomials.evaluate(self.polynomial(use.expr) or {}, counts) for use in made.uses]
            if not made.stands(self.state.trace, numbers):
                atoms = {a for use in made.uses for a in self.atoms_of(use.expr)}
                found.append((atoms, f"another branch for sizes {numbers}"))
        return found

    def _after(self, expr: Expr, counts: dict[Axis, int]) -> Any:
        """The number that `expr` is with `counts`; None where its arithmetic fails."""

        def at(source: Expr) -> Any:
            p = self.polynomial(source)
            return self.value(source) if p is None else polynomials.evaluate(p, counts)

        try:
            return evaluate(expr, at)
        except (ArithmeticError, ValueError, TypeError, LookupError):
            return None


def _depends_on_values(node: Node) -> bool:
    """Whether the shape of `node` depends on values of the tensors that it is made of."""
    ahead, seen = [node], {node}
    while ahead:
        one = ahead.pop()
        if torch.Tag.dynamic_output_shape in getattr(one.target, "tags", ()):
            return True
        further = [n for n in one.all_input_nodes if n not in seen]
        seen.update(further)
        ahead.extend(further)
    return False


def _named(key: Expr) -> str:
    """An attribute or a number in code, for a reason."""
    if key[0] == "attr":
        return f"the attribute {'.'.join(map(str, key[1:]))}"
    return f"the number {key[-1]} in {key[2]}"


def _argument_of(use: SizeUse) -> tuple[Any, ...]:
    return use.function, use.module, use.occurrence, use.argument
