"""The least numbers of units that may go together: the moves of a block under its constraints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import gcd, lcm

from ..axes.axes import Axis
from ..axes.polynomials import Polynomial
from ..base.unions import Unions

Move = dict[Axis, int]  # how many units of each axis it takes


def least_moves(axes: Iterable[Axis], relations: Sequence[Polynomial]) -> list[Move]:
    """The least moves over `axes` that keep every relation (a linear polynomial that stays zero)."""
    same = Unions(axes)
    rest = []
    for p in relations:
        terms = {t: n for t, n in p.items() if t}
        if len(terms) == 2 and sum(terms.values()) == 0 and () not in p:
            (x,), (y,) = terms
            same.join(y, x)
        else:
            rest.append(p)
    classes = {same.root(found[0]): found for found in same.sets()}
    merged = []
    for p in rest:
        q: Move = {}
        for t, n in p.items():
            if t:
                q[same.root(t[0])] = q.get(same.root(t[0]), 0) + n
        q = {a: n for a, n in q.items() if n}
        if q:
            merged.append(q)
    bound = {a for q in merged for a in q}
    directions: list[Move] = [{r: 1} for r in classes if r not in bound]
    directions += _directions(merged)
    return [{a: n for r, n in d.items() for a in classes[r]} for d in directions]


def _directions(relations: list[Move]) -> list[Move]:
    """Least integer directions d >= 0 with every relation sum(c * d) = 0.

    One relation alone has the pairs (x on one side, y on the other) as its extreme directions. Several relations are
    met together by removing in proportion to the sizes.
    """
    out: list[Move] = []
    for part in _components(relations):
        ids = {a for q in part for a in q}
        if len(part) == 1:
            (q,) = part
            for x, n in q.items():
                for y, m in q.items():
                    if n > 0 > m:
                        both = lcm(n, -m)
                        out.append({x: both // n, y: both // -m})
            continue
        step = gcd(*(a.size for a in ids))
        proportional = {a: a.size // step for a in ids}
        if all(sum(c * proportional[a] for a, c in q.items()) == 0 for q in part):
            out.append(proportional)
    return out


def _components(relations: list[Move]) -> list[list[Move]]:
    """Relations that share axes together, each once."""
    together = Unions(a for q in relations for a in q)
    for q in relations:
        together.join(*q)
    parts: dict[Axis, list[Move]] = {}
    for q in relations:
        parts.setdefault(together.root(next(iter(q))), []).append(q)
    return [_distinct(part) for part in parts.values()]


def _distinct(relations: list[Move]) -> list[Move]:
    """`relations` without those that say what another one, or its negative, says."""
    found: dict[tuple[tuple[Axis, int], ...], Move] = {}
    for q in relations:
        scale = gcd(*q.values())
        first = q[min(q)]
        key = tuple(sorted((a, n // (scale if first > 0 else -scale)) for a, n in q.items()))
        found.setdefault(key, dict(key))
    return list(found.values())
