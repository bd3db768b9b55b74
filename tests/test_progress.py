"""Progress bars: what comes through them, when they are drawn, and that they end."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from depgraph.base import progress
from depgraph.base.progress import length, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal for standard error (not a fixture: pytest sets its own for the call)."""
    found = Terminal()
    monkeypatch.setattr("sys.stderr", found)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return found


def text(screen: Terminal) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())


@pytest.mark.parametrize("shown", [True, False, None])
def test_items_come_through_one_by_one(monkeypatch: pytest.MonkeyPatch, shown: bool | None) -> None:
    terminal(monkeypatch)
    taken: list[int] = []

    def source() -> Iterator[int]:
        for i in range(5):
            taken.append(i)
            yield i

    items = track(source(), "working", shown)
    assert next(items) == 0
    assert taken == [0]
    assert list(items) == [1, 2, 3, 4]


def test_a_bar_counts_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    for _ in track(range(7), "reading rows", True):
        pass
    assert "reading rows" in text(screen)
    assert "7/7" in text(screen)
    for _ in track(iter(range(3)), "steps", True, total=11):
        pass
    assert "3/11" in text(screen)


def test_no_bar_without_a_terminal_or_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    assert list(track(range(3), "never", False)) == [0, 1, 2]
    assert screen.getvalue() == ""
    plain = io.StringIO()
    monkeypatch.setattr("sys.stderr", plain)
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    assert list(track(range(3), "never")) == [0, 1, 2]
    assert plain.getvalue() == ""


def test_on_a_terminal_a_bar_comes_once_work_has_taken_long(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    now = [0.0]
    monkeypatch.setattr("depgraph.base.progress.time.monotonic", lambda: now[0])
    for _ in track(range(3), "quick"):
        now[0] += progress.PATIENCE / 4
    assert "quick" not in text(screen)
    for i in track(range(5), "slow"):
        assert ("slow" in text(screen)) == (i > 2)
        now[0] += progress.PATIENCE / 2.5
    assert "5/5" in text(screen)


@pytest.mark.parametrize("how", ["close", "raise"])
def test_a_bar_ends_with_its_work(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    terminal(monkeypatch)
    before = set(threading.enumerate())

    def source() -> Iterator[int]:
        yield 1
        raise KeyError

    items: Any = track(source(), "broken", True)
    next(items)
    if how == "close":
        items.close()
    else:
        with pytest.raises(KeyError):
            next(items)
    for thread in set(threading.enumerate()) - before:
        thread.join(3)
        assert not thread.is_alive()
    assert list(track(range(2), "another", True)) == [0, 1]


def test_bars_may_stand_inside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    pairs = [(i, j) for i in track(range(2), "outer", True) for j in track(range(3), "inner", True)]
    assert pairs == [(i, j) for i in range(2) for j in range(3)]
    assert "outer" in text(screen)
    assert "inner" in text(screen)


def test_lengths() -> None:
    class Raises:
        def __len__(self) -> int:
            raise TypeError("an iterable data set has none")

    assert [length(x) for x in ([1, 2], range(3), iter([1]), Raises())] == [2, 3, None, None]
