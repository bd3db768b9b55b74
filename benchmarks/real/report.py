"""The figures as tables: in the terminal, and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.real.case import Case

Row = dict[str, Any]
MARKER = "<!-- figures: written by benchmarks/quality.py -->"
HEADINGS = ("method", "left", "as pruned", "batch norm re-estimated", "after training", "seconds")


def show(cases: Sequence[Case], rows: list[Row]) -> None:
    """A table a case, in the terminal."""
    console = Console(width=None if Console().is_terminal else 140)
    for case in cases:
        table = Table(*HEADINGS, title=f"{case.title}: {metric(case, rows)}")
        for line in lines(case, rows):
            table.add_row(*line)
        console.print(table)


def page(cases: Sequence[Case], rows: list[Row], versions: dict[str, str]) -> str:
    """All cases as Markdown: the finalists over all seeds, every criterion at seed 0, latencies."""
    parts = [
        f"Versions: {', '.join(f'{name} {number}' for name, number in versions.items())}. Measured "
        f"{min(r['date'] for r in rows)[:10]}." if rows else ""
    ]  # fmt: skip
    for case in cases:
        of_case = [r for r in rows if r["case"] == case.name]
        if not of_case:
            continue
        parts.append(f"## {case.title}\n\nFigure: {metric(case, rows)}.")
        parts.append(markdown(HEADINGS, lines(case, rows)))
        if timed := latencies(of_case):
            parts.append(markdown(("milliseconds (batch x threads)", *timed[0][1:]), timed[1:]))
    return "\n\n".join(part for part in parts if part) + "\n"


def write(path: Path, figures: str) -> None:
    """Put the figures into the page, below its marker; what stands above it is kept, and the cases without new ones."""
    above, _, old = path.read_text().partition(MARKER) if path.exists() else ("", "", "")
    first, *new = figures.split("\n## ")
    kept = {part.partition("\n")[0]: part.strip() for part in old.split("\n## ")[1:]}
    kept |= {part.partition("\n")[0]: part.strip() for part in new}
    parts = [f"{above}{MARKER}", first.strip(), *(f"## {part}" for part in kept.values())]
    path.write_text("\n\n".join(part for part in parts if part) + "\n")


def metric(case: Case, rows: list[Row]) -> str:
    """What the first figure of the case's score is called."""
    first = next((r["score"] for r in rows if r["case"] == case.name and r.get("score")), {"score": 0})
    return next(iter(first))


def lines(case: Case, rows: list[Row]) -> list[list[str]]:
    """A line a method: dense first, then from best to worst."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["case"] == case.name:
            found.setdefault(row["method"], []).append(row)

    def rank(name: str) -> tuple[bool, float]:
        values = _values(found[name], "renormed") or _values(found[name], "score")
        middle = mean(values) if values else float("nan")
        return name != "dense", (-middle if case.higher else middle) if values else float("inf")

    return [_line(name, found[name]) for name in sorted(found, key=rank)]


def _line(name: str, rows: list[Row]) -> list[str]:
    errors = [r["error"] for r in rows if "error" in r]
    if errors and not _values(rows, "score"):
        return [name, "-", errors[0][:80].replace("|", "/"), "", "", ""]
    share = mean(r["share"] for r in rows if "share" in r)
    seconds = [r["seconds"] for r in rows if "seconds" in r]
    spent = f"{mean(seconds):.0f}" if seconds else ""
    figures = [_spread(_values(rows, kind)) for kind in ("score", "renormed", "tuned")]
    return [name, f"{share:.3f}", *figures, spent]


def _values(rows: list[Row], key: str) -> list[float]:
    """The first figure of each seed; a seed that was measured with and without training counts once."""
    by_seed = {r["seed"]: next(iter(r[key].values())) for r in rows if r.get(key)}
    return list(by_seed.values())


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    middle = f"{mean(values):.4g}"
    return (
        middle
        if len(values) == 1
        else f"{middle} ({min(values):.4g} to {max(values):.4g}, {len(values)} seeds)"
    )


def latencies(rows: list[Row]) -> list[list[str]]:
    """Header and lines: milliseconds of each timed method, and how many times faster than the dense model."""
    timed = [r for r in rows if "dense_latency" in r]
    if not timed:
        return []
    keys = list(timed[0]["latency"])
    body = [
        [
            r["method"],
            *(f"{r['latency'][k]:.2f} ({r['dense_latency'][k] / r['latency'][k]:.2f}x faster)" for k in keys),
        ]
        for r in timed
    ]
    return [["", *keys], *body]


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
