"""Sizes in the user's code -> what must be repaired, and which counts must keep fitting together.

Every `SizeUse` is an equation: the expression that the code computes must equal the number of kept indices. With an
attribute alone on one side, the attribute is repaired. An equation between sizes ("C // heads is the width of a head")
becomes a constraint for the planner. A bare literal can only be rewritten in the code.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..axes import axes, polynomials
from ..axes.axes import ATOM, CONCAT, Axis, Reason
from ..axes.nodes import base_name
from ..axes.op_call import DimFacts
from ..axes.polynomials import Polynomial
from ..axes.ragged import is_ragged
from ..tracing.attributes import read_attribute
from ..tracing.recorder import Node, record_of
from ..tracing.size_uses import ScalarUse, SizeUse
from ..tracing.sizes import Expr
from .decisions import Decision, decision


@dataclass(frozen=True)
class Literal:
    """A number written in `forward` that must follow an axis."""

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
        self.decisions: dict[Node, Decision] = {}
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
        self._scalars()
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
                self.attributes.setdefault(("attr", there, *key[2:]), target)
        for literal in list(self.literals):
            there = moved(literal.use.module)
            if there is not None:
                self.literals.append(Literal(replace(literal.use, module=there), literal.target))

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
        prefix = self._prefix(axis, use.extent)
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
            target = self._target(use)
            if target is None:
                axis = (
                    self.state.dims[use.node][0][use.dim]
                    if use.node in self.state.dims and use.dim is not None
                    else None
                )
                self._freeze_axis(axis, use, f"is used by part of a group in {use.function}")
                continue
            kind = use.expr[0] if isinstance(use.expr, tuple) else "literal"
            if kind == "literal":
                if not is_constant(target):
                    self.literals.append(Literal(use, target))
            elif kind == "attr":
                self._attribute(use.expr, target, use)
            else:
                self.known.setdefault(use.expr, target)
                pending.append((use, target))
        return pending

    def _attribute(self, key: Expr, target: Polynomial, use: SizeUse) -> None:
        if key in self.attributes:
            self._require(
                polynomials.minus(self.attributes[key], target),
                use,
                f"shares the attribute {'.'.join(map(str, key[1:]))}",
            )
        else:
            self.attributes[key] = target

    def _require(self, difference: Polynomial, use: SizeUse | None, text: str) -> None:
        if difference:
            place = (use.module, use.source) if use is not None else ("", "")
            self.constraints.append((difference, Reason(text, "", *place)))

    def _comparisons(self) -> None:
        """``a == b`` held in the traced run: it must keep holding."""
        for operator, left, right, outcome in self.state.comparisons:
            if (operator, outcome) not in (("eq", True), ("ne", False)):
                continue
            if self._determined(left, right):
                continue
            p, q = self.polynomial(left), self.polynomial(right)
            if p is not None and q is not None:
                self._require(polynomials.minus(p, q), None, "is compared with another size")
            else:
                atoms = self.atoms_of(left) | self.atoms_of(right)
                self._freeze(atoms, Reason("enters a comparison of sizes that can't be followed"))

    def _bounds(self) -> None:
        """``a <= b`` of equal sizes: an attribute that nothing else determines stays equal."""
        for operator, left, right, _ in self.state.comparisons:
            if operator not in ("eq", "ne") and self.value(left) == self.value(right):
                self._determined(left, right)

    def _determined(self, left: Expr, right: Expr) -> bool:
        """Whether one side is an attribute that nothing has determined yet: from now on it is the other."""
        for a, b in ((left, right), (right, left)):
            p = self.polynomial(b)
            if isinstance(a, tuple) and a[0] == "attr" and p is not None and a not in self.attributes:
                if not is_constant(p):
                    self.attributes[a] = p
                return True
        return False

    def _infer(self, expr: Expr, target: Polynomial) -> None:
        """Solve ``expr == target`` for the one attribute in it that no use has determined: ``3 * self.dim``."""
        if not isinstance(expr, tuple) or expr[0] == "dim":
            return
        if expr[0] == "attr":
            if expr not in self.attributes and not is_constant(target):
                self.attributes[expr] = target
            return
        name, a, b = expr
        p, q = self.polynomial(a), self.polynomial(b)
        open_a, open_b = self._open(a), self._open(b) and name != "floordiv"
        if open_a == open_b or p is None or q is None or name not in ("add", "sub", "mul", "floordiv"):
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
        return expr not in self.attributes if expr[0] == "attr" else any(map(self._open, expr[1:]))

    def _equate(self, use: SizeUse, target: Polynomial) -> None:
        got = self.polynomial(use.expr, structural=True)
        if got is None and use.expr[0] == "floordiv":
            a, b = self.polynomial(use.expr[1]), self.polynomial(use.expr[2])
            if (
                a is not None
                and b is not None
                and self.value(use.expr[1]) == self.value(use.expr[2]) * abs(use.value)
            ):
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

    def _scalars(self) -> None:
        """A number the op computes with must stay what it was, unless it only decides something."""
        for use in self.state.trace.scalar_uses:
            if self._decides(use):
                continue
            if isinstance(use.expr, tuple):
                found = self.atoms_of(use.expr)
            else:
                found = self._suspects(use)
            text = f"sets a number that the op computes with ({use.value:g})"
            self._freeze(found, Reason(text, str(use.node.target), record_of(use.node).module, use.source))

    def _decides(self, use: ScalarUse) -> bool:
        """Whether the number goes into a tensor that only decides; then it is noted for `flipped`."""
        if not isinstance(use.expr, tuple) or self.polynomial(use.expr) is None:
            return False
        found = self.decisions.get(use.node) or decision(self.state.trace, use.node)
        if found is not None:
            self.decisions[use.node] = found
            found.uses.append(use)
        return found is not None

    def _suspects(self, use: Any) -> set[Axis]:
        """Atoms of dims whose size n explains a bare factor n, 1/n, sqrt(n) or 1/sqrt(n)."""
        if base_name(use.node.target) not in ("mul", "div") or use.value <= 0 or use.value == 1:
            return set()
        dims = [a for n in use.node.all_input_nodes for d in self.state.dims.get(n, []) for a in d]
        for n in use.node.all_input_nodes:
            dims.extend(self.state.contracted.get(n, []))
        found: set[Axis] = set()
        for axis in dims:
            if axis is not None and axis.size > 2:
                forms = (axis.size**p for p in (1.0, -1.0, 0.5, -0.5, 0.25, -0.25))
                if any(math.isclose(use.value, f, rel_tol=1e-6) for f in forms):
                    found |= self.free.intersection(axes.atoms(axis))
        return found

    # ----------------------------------------------------------------------------------------------- evaluation

    def polynomial(self, expr: Expr, structural: bool = False) -> Polynomial | None:
        """The value of `expr` as a polynomial in counts; None where its arithmetic has none."""
        if isinstance(expr, (int, float)):
            return {(): int(expr)} if expr == int(expr) else None
        if not structural and expr in self.known:
            return self.known[expr]
        kind = expr[0]
        if kind == "attr":
            value = self.value(expr)
            return self.attributes.get(expr, {(): int(value)} if isinstance(value, int) else None)
        if kind == "dim":
            return polynomials.count(self.state.dims[expr[1]][0][expr[2]], self.free)
        a, b = self.polynomial(expr[1]), self.polynomial(expr[2])
        if a is None or b is None:
            return None
        if kind == "add":
            return polynomials.minus(a, {t: -n for t, n in b.items()})
        if kind == "sub":
            return polynomials.minus(a, b)
        if kind == "mul":
            return polynomials.times(a, b)
        if is_constant(a) and is_constant(b):
            value = self.value(expr)
            return {(): value} if isinstance(value, int) else None
        if kind == "floordiv" and is_constant(b) and b.get(()) and all(n % b[()] == 0 for n in a.values()):
            return {t: n // b[()] for t, n in a.items()}
        return None

    def value(self, expr: Expr) -> Any:
        """The number that `expr` had in the traced run."""
        if not isinstance(expr, tuple):
            return expr
        if expr[0] == "attr":
            return read_attribute(self.model, expr[1:])
        if expr[0] == "dim":
            return record_of(expr[1]).shape[expr[2]]
        a, b = self.value(expr[1]), self.value(expr[2])
        function = {
            "add": "__add__",
            "sub": "__sub__",
            "mul": "__mul__",
            "floordiv": "__floordiv__",
            "mod": "__mod__",
        }
        if expr[0] in function:
            return getattr(type(a), function[expr[0]])(a, b) if type(a) is type(b) else _mixed(expr[0], a, b)
        return a**b if expr[0] == "pow" else a / b

    def atoms_of(self, expr: Expr) -> set[Axis]:
        """The free atoms whose counts `expr` depends on."""
        if not isinstance(expr, tuple):
            return set()
        if expr in self.known:
            return {a for t in self.known[expr] for a in t}
        if expr[0] in ("attr", "dim"):
            p = self.attributes.get(expr) if expr[0] == "attr" else self.polynomial(expr)
            return {a for t in (p or {}) for a in t}
        return self.atoms_of(expr[1]) | self.atoms_of(expr[2])

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
        """Comparisons of sizes that would come out differently with `masks`: their atoms and text."""
        found, counts = [], self.counts(masks)
        compare = {
            "eq": "__eq__",
            "ne": "__ne__",
            "lt": "__lt__",
            "le": "__le__",
            "gt": "__gt__",
            "ge": "__ge__",
        }
        for operator, left, right, outcome in self.state.comparisons:
            p, q = self.polynomial(left), self.polynomial(right)
            if p is None or q is None or (is_constant(p) and is_constant(q)):
                continue
            now = [polynomials.evaluate(r, counts) for r in (p, q)]
            if bool(getattr(now[0], compare[operator])(now[1])) != outcome:
                found.append(({a for r in (p, q) for t in r for a in t}, f"{now[0]} {operator} {now[1]}"))
        for made in self.decisions.values():
            numbers = [polynomials.evaluate(self.polynomial(use.expr) or {}, counts) for use in made.uses]
            if not made.stands(self.state.trace, numbers):
                atoms = {a for use in made.uses for a in self.atoms_of(use.expr)}
                found.append((atoms, f"another branch for sizes {numbers}"))
        return found


def _mixed(name: str, a: Any, b: Any) -> Any:
    operations = {"add": a + b, "sub": a - b, "mul": a * b}
    if name in operations:
        return operations[name]
    return a // b if name == "floordiv" else a % b
