"""How many indices axes have, as polynomials in the counts of the atoms that may shrink."""

from __future__ import annotations

from collections.abc import Container, Mapping
from math import prod

from .axes import ATOM, CONCAT, Axis
from .ragged import is_ragged, one_block

Polynomial = dict[tuple[Axis, ...], int]  # sorted free atoms -> coefficient; () is the constant


def count(axis: Axis | None, free: Container[Axis]) -> Polynomial:
    """How many indices `axis` has, as a polynomial in the counts of the atoms in `free`."""
    if axis is None:
        return {(): 1}
    axis = axis.find()
    if axis.kind == ATOM:
        return {(axis,): 1} if axis in free else {(): axis.size}
    if axis.kind == CONCAT:
        total: Polynomial = {}
        for part in axis.parts:
            for term, n in count(part, free).items():
                total[term] = total.get(term, 0) + n
        return total
    if is_ragged(axis):
        return count(one_block(axis), free)
    out: Polynomial = {(): 1}
    for part in axis.parts:
        out = times(out, count(part, free))
    return out


def times(a: Polynomial, b: Polynomial) -> Polynomial:
    """The product of two polynomials."""
    out: Polynomial = {}
    for s, m in a.items():
        for t, n in b.items():
            term = tuple(sorted(s + t))
            out[term] = out.get(term, 0) + m * n
    return out


def divided(a: Polynomial, b: Polynomial) -> Polynomial | None:
    """`a` / `b` for a `b` of one term that divides every term of `a`, else None."""
    if len(b) != 1:
        return None
    ((term, n),) = b.items()
    out: Polynomial = {}
    for t, m in a.items():
        rest = list(t)
        for atom in term:
            if atom not in rest:
                return None
            rest.remove(atom)
        if not n or m % n:
            return None
        out[tuple(rest)] = m // n
    return out


def minus(a: Polynomial, b: Polynomial) -> Polynomial:
    """The difference of two polynomials, without zero terms."""
    out = dict(a)
    for term, n in b.items():
        out[term] = out.get(term, 0) - n
    return {term: n for term, n in out.items() if n}


def evaluate(polynomial: Polynomial, counts: Mapping[Axis, int]) -> int:
    """The value of `polynomial` where each atom has `counts` indices."""
    return sum(n * prod(counts[a] for a in term) for term, n in polynomial.items())
