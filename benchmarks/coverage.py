"""How much of the world's architectures `depgraph.prune` makes smaller without a hint, and whether it does so rightly.

    python -m benchmarks.coverage --small                                  # a few models of each suite, two minutes
    python -m benchmarks.coverage --suite timm --out timm.jsonl --resume   # all; goes on where it stopped

Every model runs in a process of its own on one thread with a limit on processor time, with random weights.
Torch-Pruning's row stands beside it (`--no-peer` leaves it out, `--peer-cache` takes it from a file). The exit
status is 1 when a result is wrong or a call failed.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from benchmarks import coverage_table
from benchmarks.coverage_row import TOLERANCE, measure
from benchmarks.isolate import Row
from benchmarks.peers import LIMIT, torch_pruning
from benchmarks.rows import append, read
from benchmarks.suites import SUITES, suite


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Prune every model of a suite and check the results.")
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="all")
    parser.add_argument("--models", help="names, separated by commas (default: all of the suite)")
    parser.add_argument("--small", action="store_true", help="only a few small models of each suite")
    parser.add_argument(
        "--peer", action=argparse.BooleanOptionalAction, default=True, help="run Torch-Pruning too"
    )
    parser.add_argument(
        "--peer-cache",
        type=Path,
        action="append",
        default=[],
        help="rows of `benchmarks.peers`, not run again (repeatable)",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        help="seconds of processor time a model and tool (default: %(default)g)",
    )
    parser.add_argument(
        "--uniform",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="check `uniform=True` too, where a model has a config",
    )
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    parser.add_argument("--out", type=Path, help="file of JSON lines to add rows to")
    parser.add_argument("--resume", action="store_true", help="skip the models that --out has a row for")
    parser.add_argument(
        "--write",
        action="store_true",
        help="put the suites into benchmarks/coverage.json and write docs/coverage.md",
    )
    options = parser.parse_args(words)
    options.suites = tuple(SUITES) if options.suite == "all" else (options.suite,)
    if options.write and (options.small or options.models):
        parser.error("--write takes whole suites: leave out --small and --models")
    known = {name for suite_name in options.suites for name in suite(suite_name)}
    unknown = sorted(set(options.models.split(",")) - known) if options.models else []
    if unknown:
        parser.error(f"--models: not in {' or '.join(options.suites)}: {', '.join(unknown)}")
    return options


def run(suite_name: str, options: argparse.Namespace, console: Console) -> tuple[list[Row], dict[str, Row]]:
    """Rows of one suite, depgraph's and the peer's, in the order of the suite."""
    names = list(suite(suite_name, small=options.small))
    if options.models:
        known = suite(suite_name)
        names = [name for name in options.models.split(",") if name in known]
    done = read([options.out], suite_name) if options.resume and options.out else {}
    cache = read(options.peer_cache, suite_name)
    rows, peers = [], {}
    for position, name in enumerate(names, 1):
        row = done.get(name)
        if row is None:
            row = measure(suite_name, name, options.limit, dtype=options.dtype, uniform=options.uniform)
            append(options.out, row)
        rows.append(row)
        if name in cache:
            peers[name] = cache[name]
        elif options.peer:
            peers[name] = torch_pruning(suite_name, name, options.limit)
            for file in options.peer_cache[:1]:
                append(file, peers[name])
        _say(console, f"{position}/{len(names)} {suite_name} {_brief(row)}")
    return rows, peers


def _brief(row: Row) -> str:
    """A row in one line, for those who wait."""
    left = f" {row['params']:.2f} left" if "params" in row else ""
    return f"{row['name']}: {row['verdict']}{left} {row['seconds']:.1f} s {row['why']}"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def main(words: Sequence[str] | None = None) -> int:
    """Run, print, and write what was asked for; the result is the exit status."""
    options = arguments(words)
    # Wide enough for every column where there is no terminal to ask.
    console = Console(width=None if sys.stdout.isatty() else 220)
    entries = {}
    good = True
    for suite_name in options.suites:
        rows, peers = run(suite_name, options, console)
        if not rows:
            continue
        console.print(coverage_table.table(suite_name, rows, peers))
        libraries = ("torch", "torch-pruning", *SUITES[suite_name].libraries)
        entries[suite_name] = coverage_table.entry(
            rows,
            peers,
            written=datetime.date.today().isoformat(),
            limit=options.limit,
            versions={library: version(library) for library in libraries},
        )
        good &= all(row["verdict"] in ("right", "shapes") for row in rows)
    _say(console, coverage_table.page(entries))
    if options.write:
        coverage_table.write(entries)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
