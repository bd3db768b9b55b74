"""The least numbers of units that may go together: the moves of a block under its constraints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import gcd, lcm

from ..axes.axes import Axis
from ..axes.polynomials import Polynomial

Move = dict[int, int]  # axis id -> how many units it takes


def least_moves(ids: Iterable[int], relations: Sequence[Polynomial], axis: Mapping[int, Axis]) -> list[Move]:
    """The least moves over the axes `ids` that keep every relation (a linear polynomial that stays zero)."""
    ids = list(ids)
    same = {a: a for a in ids}

    def root(a: int) -> int:
        while same[a] != a:
            same[a] = same[same[a]]
            a = same[a]
        return a

    rest = []
    for p in relations:
        terms = {t: n for t, n in p.items() if t}
        if len(terms) == 2 and sum(terms.values()) == 0 and () not in p:
            (x,), (y,) = terms
            same[root(x)] = root(y)
        else:
            rest.append(p)
    classes: dict[int, list[int]] = {}
    for a in ids:
        classes.setdefault(root(a), []).append(a)
    merged = []
    for p in rest:
        q: dict[int, int] = {}
        for t, n in p.items():
            if t:
                q[root(t[0])] = q.get(root(t[0]), 0) + n
        q = {a: n for a, n in q.items() if n}
        if q:
            merged.append(q)
    bound = {a for q in merged for a in q}
    directions: list[Move] = [{r: 1} for r in classes if r not in bound]
    directions += _directions(merged, {r: axis[r].size for r in bound})
    return [{a: n for r, n in d.items() for a in classes[r]} for d in directions]


def _directions(relations: list[dict[int, int]], sizes: dict[int, int]) -> list[Move]:
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
        step = gcd(*(sizes[a] for a in ids))
        proportional = {a: sizes[a] // step for a in ids}
        if all(sum(c * proportional[a] for a, c in q.items()) == 0 for q in part):
            out.append(proportional)
    return out


def _components(relations: list[dict[int, int]]) -> list[list[dict[int, int]]]:
    """Relations that share axes together, each once."""
    parts: list[tuple[set[int], list[dict[int, int]]]] = []
    for q in relations:
        ids, mine = set(q), [q]
        rest = []
        for other, rs in parts:
            if other & ids:
                ids |= other
                mine = rs + mine
            else:
                rest.append((other, rs))
        parts = [*rest, (ids, mine)]
    return [_distinct(rs) for _, rs in parts]


def _distinct(relations: list[dict[int, int]]) -> list[dict[int, int]]:
    """`relations` without those that say what another one, or its negative, says."""
    found: dict[tuple[tuple[int, int], ...], dict[int, int]] = {}
    for q in relations:
        scale = gcd(*q.values())
        first = q[min(q)]
        key = tuple(sorted((a, n // (scale if first > 0 else -scale)) for a, n in q.items()))
        found.setdefault(key, dict(key))
    return list(found.values())
