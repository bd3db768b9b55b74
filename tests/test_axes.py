"""The algebra of axes against brute force: the same relations on single indices, by union-find over integers."""

from __future__ import annotations

import random
from math import prod

import numpy as np
import pytest

from depgraph.axes import axes, polynomials
from depgraph.axes.axes import Algebra, Axis, atoms, concat, kept, product


def classes_by_hand(size: int, relations: list[tuple[list[int], list[int]]]) -> list[int]:
    """Class of each index after the position-wise relations."""
    parent = list(range(size))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for left, right in relations:
        for i, j in zip(left, right, strict=True):
            parent[root(i)] = root(j)
    return [root(i) for i in range(size)]


def partition(labels: list[object]) -> set[frozenset[int]]:
    """The sets of positions with equal labels."""
    found: dict[object, set[int]] = {}
    for i, label in enumerate(labels):
        found.setdefault(label, set()).add(i)
    return {frozenset(s) for s in found.values()}


def labels_of(axis: Axis) -> list[object]:
    """(atom, unit) of every index of an axis made by concatenation alone."""
    return [(a, u) for a in atoms(axis) for u in range(a.size)]


@pytest.mark.parametrize("seed", range(200))
def test_cuts_and_rearrangements_agree_with_single_indices(seed: int) -> None:
    dice = random.Random(seed)
    size = dice.randint(2, 24)
    algebra, whole = Algebra(), Axis(size)
    relations = []
    for _ in range(dice.randint(1, 4)):
        borders = sorted(dice.sample(range(1, size), dice.randint(1, min(3, size - 1))))
        starts, ends = [0, *borders], [*borders, size]
        order = list(range(len(starts)))
        dice.shuffle(order)
        pieces = algebra.segments(whole, [e - s for s, e in zip(starts, ends, strict=True)])
        algebra.unify(whole, concat([pieces[i] for i in order]))
        moved = [j for i in order for j in range(starts[i], ends[i])]
        relations.append((list(range(size)), moved))
    assert partition(labels_of(whole)) == partition(list(classes_by_hand(size, relations)))


@pytest.mark.parametrize("seed", range(200))
def test_a_cut_through_a_product_keeps_what_must_go_together(seed: int) -> None:
    """Whatever is removed, an index of the product stays iff its row and its column do, on both sides of the cut."""
    dice = random.Random(seed)
    rows, columns = dice.randint(2, 6), dice.randint(2, 6)
    algebra, a, k = Algebra(), Axis(rows), Axis(columns)
    whole = product([a, k])
    at = dice.randint(1, rows * columns - 1)
    left, right = algebra.cut(whole, at)
    masks = {}
    for atom in dict.fromkeys((*atoms(a), *atoms(k))):
        masks[atom] = np.array([dice.random() < 0.6 for _ in range(atom.size)])
    expected = (kept(a, masks)[:, None] & kept(k, masks)[None, :]).reshape(-1)
    assert (np.concatenate([kept(left, masks), kept(right, masks)]) == expected).all()
    assert (kept(whole, masks) == expected).all()


@pytest.mark.parametrize(("first", "second"), [((2, 6), (4, 3)), ((6, 2), (3, 4)), ((2, 2, 3), (4, 3))])
def test_factors_that_divide_are_refined(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    algebra, axis = Algebra(), Axis(prod(first))
    algebra.factors(axis, first)
    assert [p.size for p in algebra.factors(axis, second)] == list(second)
    assert not any(a.frozen for a in atoms(axis))


def test_factors_that_do_not_fit_are_frozen_with_the_reason() -> None:
    algebra, axis = Algebra(), Axis(12)
    algebra.factors(axis, (3, 4))
    algebra.factors(axis, (4, 3))
    assert all(a.frozen and "differently" in a.frozen.text for a in atoms(axis))


def test_frozen_spreads_to_what_is_the_same() -> None:
    algebra, a, b = Algebra(), Axis(6), Axis(6)
    left, _ = algebra.cut(a, 2)
    algebra.freeze(left, "is asked for")
    algebra.unify(a, b)
    first, second = atoms(b)
    assert (first.size, second.size) == (2, 4)
    assert first.frozen
    assert second.frozen is None


@pytest.mark.parametrize("seed", range(50))
def test_counts_and_positions_agree_with_masks(seed: int) -> None:
    dice = random.Random(seed)
    parts = [Axis(dice.randint(1, 4)) for _ in range(3)]
    axis = concat([product([parts[0], parts[1]]), parts[2], parts[0]])
    masks = {p: np.array([dice.random() < 0.7 for _ in range(p.size)]) for p in parts}
    stays = kept(axis, masks)
    polynomial = polynomials.count(axis, parts)
    assert polynomials.evaluate(polynomial, {p: int(masks[p].sum()) for p in parts}) == stays.sum()
    gone = np.zeros(axis.size, dtype=bool)
    for p in parts:
        gone[axes.positions(axis, p)[~masks[p]].reshape(-1)] = True
    assert (gone == ~stays).all()
