"""How fields and numbers are tied, worked out by hand: powers of fields, the multiples that a class takes, its time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from depgraph.config.described import _exponent, _product
from depgraph.config.origin import _until, evaluate
from depgraph.config.valid import _error, _multiple, _objects, _refused


@pytest.mark.parametrize(
    ("ratio", "exponent"),
    [
        (1, 0), (2, 1), (4, 2), (8, 3), (0.5, -1), (0.125, -3), (2**0.5, Fraction(1, 2)), (2**0.25, Fraction(1, 4)),
        (2**-0.75, Fraction(-3, 4)), (8 * (1 + 1e-7), 3),
        (16, None), (1 / 16, None), (2**3.25, None), (3, None), (2**0.1, None), (8 * (1 + 1e-5), None), (0, None), (-2, None),
    ],
)  # fmt: skip
def test_an_exponent_is_a_number_of_quarters_of_at_most_three(ratio: float, exponent: Any) -> None:
    assert _exponent(ratio) == exponent


def test_a_product_of_powers_is_the_number_and_follows_its_fields() -> None:
    a, b = ("attr", "", "config", "a"), ("attr", "", "config", "b")
    for number, values, powers, then in (
        (24, {a: 4, b: 3}, {a: 1, b: 1}, [({a: 8, b: 3}, 48), ({a: 8, b: 6}, 96)]),  # 2 a b
        (6, {a: 2}, {a: -1}, [({a: 4}, 3), ({a: 5}, 2)]),  # 12 / a
        (36, {a: 3}, {a: 2}, [({a: 5}, 100)]),  # 4 a^2
        (3, {a: 4}, {a: 1}, [({a: 8}, 6), ({a: 6}, 4)]),  # 3 a / 4, rounded down
        (6, {a: 12, b: 4}, {a: 1, b: -1}, [({a: 12, b: 8}, 3), ({a: 20, b: 4}, 10)]),  # 2 a / b
        (7, {a: 4}, {a: 0}, [({a: 9}, 7)]),
    ):
        expr = _product(number, values, {f: Fraction(e) for f, e in powers.items()})
        assert evaluate(expr, values) == number
        for others, wanted in then:
            assert evaluate(expr, others) == wanted


class Takes:
    """A config whose class takes the widths in `good`, all where that is empty; `tried` has those it was called with."""

    good: ClassVar[set[int]] = set()
    tried: ClassVar[list[int]] = []

    def __init__(self, width: int, name: str = "") -> None:
        self.tried.append(width)
        if self.good and width not in self.good:
            raise ValueError(f"{width}\n  is bad")
        self.width, self.name = width, name


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(width: int, good: set[int]) -> Takes:
        monkeypatch.setattr(Takes, "good", set())
        config = Takes(width)
        monkeypatch.setattr(Takes, "good", good)
        monkeypatch.setattr(Takes, "tried", [])
        return config

    return make


@pytest.mark.parametrize(
    ("size", "good", "multiple"),
    [(16, {4, 8, 12, 16}, 4), (12, {3, 6, 9, 12}, 3), (12, {6, 12}, 6), (12, {4, 12}, 12), (16, {16}, 16), (7, {7}, 7), (4, set(), 2)],
)  # fmt: skip
def test_the_smallest_divisor_all_of_whose_multiples_are_taken(
    takes: Any, size: int, good: set[int], multiple: int
) -> None:
    assert _multiple(takes(size, good), "width", size) == multiple


def test_of_many_multiples_the_smallest_and_the_largest_are_tried(takes: Any) -> None:
    config = takes(100, set())
    assert _multiple(config, "width", 100) == 2
    assert Takes.tried == [100, 98, 96, 94, 92, 90, 88, 12, 10, 8, 6, 4, 2]
    config = takes(6, set())
    assert _multiple(config, "width", 6) == 2
    assert Takes.tried == [6, 4, 2]


def test_a_field_is_refused_where_putting_it_back_is_a_cure(takes: Any) -> None:
    new, old = takes(10, {4, 8}), takes(8, {4, 8})
    assert _error(new, {}) == "10 is bad"
    assert _error(new, {"width": 4}) == ""
    assert list(_refused(new, old)) == [("width", 8, 4, "10 is bad")]
    assert list(_refused(old, old)) == []
    assert list(_refused(new, takes(6, {4, 8}))) == []  # the old one was refused as well


def test_configs_in_configs_are_paired_with_what_they_were_four_deep() -> None:
    def chain(depth: int, width: int) -> SimpleNamespace:
        inner: Any = SimpleNamespace(width=width)
        for _ in range(depth):
            inner = SimpleNamespace(inner=inner)
        return inner

    new, old = chain(5, 1), chain(5, 2)
    found = list(_objects(new, old))
    assert [steps for steps, _, _ in found] == [("inner",) * n for n in range(4)]
    for steps, one, other in found:
        for _ in steps:
            new, old = new.inner, old.inner
        assert one is new
        assert other is old
        new, old = found[0][1:]
    few = list(_objects(chain(1, 1), chain(1, 2)))
    assert [(one.width, other.width) for _, one, other in few[1:]] == [(1, 2)]
    assert list(_objects(SimpleNamespace(), None)) == []
    assert list(_objects(3, 3)) == []


@pytest.fixture
def _unprofiled() -> Iterator[None]:
    before = sys.getprofile()
    sys.setprofile(None)
    yield
    sys.setprofile(before)


def called() -> int:
    return 1


@pytest.mark.usefixtures("_unprofiled")
def test_time_is_looked_at_where_it_has_an_end_and_nobody_measures() -> None:
    with _until(float("inf")):
        assert sys.getprofile() is None
    with _until(time.thread_time() + 999):
        assert sys.getprofile() is not None
        assert called() == 1
    assert sys.getprofile() is None
    with pytest.raises(TimeoutError, match="takes too long"), _until(time.thread_time() - 1):
        called()
    assert sys.getprofile() is None

    def measure(*_: Any) -> None:
        pass

    sys.setprofile(measure)
    with _until(time.thread_time() - 1):
        assert sys.getprofile() is measure
        assert called() == 1
    assert sys.getprofile() is measure
