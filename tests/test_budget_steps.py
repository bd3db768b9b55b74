"""How far a budget goes, and what it gives back: against steps that are written out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from depgraph.axes.axes import Axis
from depgraph.select import Budget
from depgraph.select.blocks import Block
from depgraph.select.budget import _give_back, _Order, _prices, _shortest
from depgraph.select.scope import CompetitionGroup


def group(axis: Axis) -> Any:
    return SimpleNamespace(axis=axis, units=axis.size)


def two_blocks() -> Any:
    """Blocks of four units, three of which may go, by turns; the cost is how many units are left."""
    blocks = [Block([group(Axis(4))], scores=np.array(s), taken=np.ones(3, dtype=np.int64), allowed=np.arange(4))
              for s in ([1.0, 3.0, 5.0], [2.0, 4.0, 6.0])]  # fmt: skip
    return SimpleNamespace(blocks=blocks, rounded_up=lambda s: s, counts=lambda s: np.array([4, 4]) - s)


def units_left(limit: float) -> Budget:
    cost: Any = SimpleNamespace(value=lambda counts: float(counts.sum()), slopes=lambda counts: np.ones(2))
    return Budget("units", cost, limit)


BY_SCORE = [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2], [3, 2], [3, 3]]


def test_steps_up_to_a_share_include_the_one_that_reaches_it() -> None:
    order = _Order(two_blocks(), CompetitionGroup([0, 1]), np.array([0, 0]), None)
    assert order.share.tolist() == [n / 8 for n in range(1, 7)]
    for n, wanted in enumerate(BY_SCORE):
        for share, reached in ((n / 8, True), (n / 8 + 0.1, True), (n / 8 - 0.01, n == 0)):
            into = np.zeros(2, dtype=np.int64)
            order.steps(share, into)
            assert into.tolist() == (wanted if reached else BY_SCORE[n - 1])
    begun, into = _Order(two_blocks(), CompetitionGroup([0, 1]), np.array([2, 0]), None), np.array([2, 0])
    begun.steps(2 / 8, into)  # 2 and 4 are next
    assert into.tolist() == [2, 2]


def test_the_least_share_that_meets_a_budget() -> None:
    for n, wanted in enumerate(BY_SCORE):
        start = np.array([0, 0])
        order = _Order(two_blocks(), CompetitionGroup([0, 1]), start, None)
        budgets = [units_left(0)]
        assert _shortest(two_blocks(), [order], start, budgets, [8.0 - n]).tolist() == wanted
        assert start.tolist() == [0, 0]


def test_prices_are_what_a_unit_saves_of_what_is_exceeded() -> None:
    one, other = units_left(6), units_left(9)
    one.cost.slopes = lambda counts: np.array([3.0, 5.0])  # type: ignore[method-assign]
    assert _prices(two_blocks(), np.array([0, 0]), [one, other]).tolist() == [1.5, 2.5]  # 8 are 2 above 6
    assert _prices(two_blocks(), np.array([0, 0]), [units_left(8)]).tolist() == [0, 0]
    assert _prices(two_blocks(), np.array([0, 0]), [one, units_left(4)]).tolist() == [1.75, 2.75]


@pytest.mark.parametrize(
    ("steps", "start", "limit", "wanted"),
    [
        ([2, 2], [0, 0], 4, [2, 2]),
        ([2, 3], [0, 0], 4, [2, 2]),  # 6 before 3
        ([3, 2], [0, 0], 4, [2, 2]),  # 5 before 4
        ([3, 1], [0, 0], 5, [2, 1]),  # 5 before 2, though 1 was the first
        ([3, 3], [0, 3], 4, [1, 3]),  # what was asked for stays
        ([3, 0], [0, 0], 8, [0, 0]),
        ([2, 2], [0, 0], 8, [0, 0]),
    ],
)  # fmt: skip
def test_the_dearest_step_is_undone_first(
    steps: list[int], start: list[int], limit: float, wanted: list[int]
) -> None:
    groups = [CompetitionGroup([0]), CompetitionGroup([1])]
    found = _give_back(two_blocks(), groups, np.array(start), np.array(steps), [units_left(limit)])
    assert found.tolist() == wanted


def test_steps_go_back_as_far_as_a_width_is_allowed() -> None:
    selection = two_blocks()
    selection.blocks[1].allowed = np.array([0, 3])
    both = [CompetitionGroup([0, 1])]
    for limit, wanted in ((3, [2, 3]), (4, [1, 3]), (5, [3, 0]), (6, [2, 0]), (7, [1, 0]), (8, [0, 0])):
        found = _give_back(selection, both, np.array([0, 0]), np.array([3, 3]), [units_left(limit)])
        assert found.tolist() == wanted
