"""Progress bars on long work: the one place that draws them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from .checks import flag

T = TypeVar("T")
PATIENCE = 1.0  # seconds of work before a bar appears by itself


def length(items: object) -> int | None:
    """How many `items` there are; None where they do not say (a `DataLoader` of an iterable data set has a length that raises)."""
    try:
        return len(items) if isinstance(items, Sized) else None
    except TypeError:
        return None


def track(
    items: Iterable[T], text: str, progress: bool | None = None, total: int | None = None
) -> Generator[T, None, None]:
    """The `items`, with a bar on standard error while they are worked through.

    Args:
        items: what is worked through; its length is taken where it has one.
        text: what is being done, a few words.
        progress: True: a bar. False: none. None: one on a terminal, once the work has taken more than a moment.
        total: how many items there are, where `items` does not say.

    Yields:
        the items, one by one.
    """
    if not _is_shown(progress):
        yield from items
        return
    from rich.console import Console  # noqa: PLC0415  it takes long to import
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    count = length(items) if total is None else total
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(text, total=count)
    start = time.monotonic()
    shown = False
    try:
        for item in items:
            yield item
            bar.advance(task)
            if not shown and (progress or time.monotonic() - start > PATIENCE):
                bar.start()
                shown = True
    finally:
        bar.stop()


def _is_shown(progress: bool | None) -> bool:
    if progress is not None:
        flag("progress", progress)
    return progress is True or (progress is None and sys.stderr.isatty())


@contextmanager
def bytes_bar(text: str, total: int, progress: bool | None = None) -> Iterator[Callable[[int], Any]]:
    """A bar on standard error with bytes, their rate and the time left; what it yields is told how many more are done.

    Args:
        text: what is being done, a few words.
        total: bytes.
        progress: as for `track`.
    """
    if not _is_shown(progress):
        yield lambda count: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda count: bar.advance(task, count)
