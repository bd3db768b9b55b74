"""Results as files of JSON lines, one row a model, written as they come so that a stopped run can go on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.isolate import Row


def read(paths: Sequence[Path], suite: str) -> dict[str, Row]:
    """Rows of one suite by the name of their model, the last one where a name stands twice; missing files have none."""
    lines = [
        line for path in paths if path.exists() for line in path.read_text().splitlines() if line.strip()
    ]
    rows = [json.loads(line) for line in lines]
    return {row["name"]: row for row in rows if row["suite"] == suite}


def append(path: Path | None, row: Row) -> None:
    """Add one row at the end of the file; nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
