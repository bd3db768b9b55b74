"""Tables and lines of text as people read them: the one place that lays them out (rich is imported when it does)."""

from __future__ import annotations

import io
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

NARROW, WIDE = 60, 110  # characters


def width() -> int:
    """Of a line: that of the terminal, within reason; without one the widest."""
    return min(max(shutil.get_terminal_size((WIDE, 1)).columns, NARROW), WIDE)


def table(title: str, *headings: str) -> Table:
    """An empty table: names in the first column, which may take several lines, numbers in the others."""
    from rich.table import Table  # noqa: PLC0415

    made = Table(title=title or None, title_justify="left", header_style="bold")
    for i, heading in enumerate(headings):
        if i:
            made.add_column(heading, justify="right", no_wrap=True)
        else:
            made.add_column(heading, overflow="fold", min_width=8)
    return made


def printed(*parts: Any) -> str:
    """Tables and lines, one below the other; brackets and colons in them are what they are, no markup."""
    from rich.console import Console  # noqa: PLC0415

    out = io.StringIO()
    console = Console(file=out, highlight=False, markup=False, emoji=False)
    unbounded = console.options.update(max_width=10_000)
    for part in parts:
        console.width = width()
        if not isinstance(part, str):  # numbers are never broken, nor is a word of theirs cut
            for column in (c for c in part.columns if c.no_wrap):
                texts = (column.header, *column.cells)
                column.min_width = max(console.measure(t, options=unbounded).maximum for t in texts)
            least = console.measure(part, options=unbounded).minimum
            console.width = max(console.width, least)
        console.print(part)
    return out.getvalue().rstrip()
