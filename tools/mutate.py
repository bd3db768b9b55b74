"""Random mutants of the library, and whether its tests notice them.

    python -m tools.mutate measure                                     # once: which test runs which line, minutes
    python -m tools.mutate run 300 depgraph/select depgraph/costs      # goes on where it stopped

A mutant changes one place of one file: a comparison, an operator, a number, a condition, a returned value, an argument,
an entry of a table, a statement. Each is put into a copy of the working tree, and the tests that run its line are run there,
those that run the fewest lines first, until one fails. What no test noticed is printed with its place and its change: a
test is missing, or the change makes no difference, which only a reader can tell. `build/mutants` keeps what was measured.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import json
import multiprocessing
import os
import queue
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from coverage import CoverageData
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "mutants"
MAP, RESULTS = WORK / "map.json", WORK / "results.json"
IMPORTED = [
    "pytest",
    "torch",
    "torch.export",
    "torch.onnx",
    "safetensors.torch",
    "networkx",
    "transformers",
    "rich.table",
]
MEMORY = 6 * 2**30  # bytes of data that a run may allocate: some mutants never stop allocating
PATIENCE, START = (
    5.0,
    60.0,
)  # a run hangs that takes so many times what its tests took, and so many seconds to start
COMPARED: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
COMPUTED: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)


@dataclass(frozen=True)
class Mutant:
    """One change of one file: bytes `start` to `end` become `text`.

    `lines` are where its statement stands, `around` where the function that it is in does: what tests run of these says
    which tests have to do with it.
    """

    file: str
    line: int
    way: str
    start: int
    end: int
    text: str
    lines: tuple[int, int]
    around: tuple[int, int]

    def change(self, source: bytes) -> bytes:
        """The file with the change."""
        return source[: self.start] + self.text.encode() + source[self.end :]

    @property
    def key(self) -> str:
        """What it is known by in the results."""
        return f"{self.file}:{self.line}:{self.start}-{self.end}: {self.way}: {self.text}"


# ------------------------------------------------------------------------------------------------------ mutants


def mutants(file: str, source: bytes) -> Iterator[Mutant]:
    """Every mutant of a file."""
    starts = [0]
    for text in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(text))

    def visit(node: ast.AST, lines: tuple[int, int], around: tuple[int, int]) -> Iterator[Mutant]:
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            lines = (
                node.lineno,
                body[0].lineno - 1 if isinstance(body, list) else node.end_lineno or node.lineno,
            )
            lines = (lines[0], max(lines))
        if isinstance(node, ast.FunctionDef):
            around = (node.lineno, node.end_lineno or node.lineno)
        for way, old, new in ways(node):
            start, end = (
                starts[row - 1] + column
                for row, column in ((old.lineno, old.col_offset), (old.end_lineno, old.end_col_offset))
            )
            text = f"({ast.unparse(new)})" if isinstance(new, ast.expr) else ast.unparse(new)
            if ast.unparse(old) == ast.unparse(new):  # equal arguments swapped
                continue
            yield Mutant(file, old.lineno, way, start, end, text, lines, around)
        for child in parts(node):
            yield from visit(child, lines, around)

    yield from visit(ast.parse(source), (1, 1), (0, 0))


def parts(node: ast.AST) -> Iterator[ast.AST]:
    """The children of a node that say what is done: no annotations, docstrings, decorators or formatted text."""
    left_out = {"annotation", "returns", "decorator_list"}
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            text = isinstance(child, ast.JoinedStr) or (
                isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            )
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if isinstance(child, ast.AST) and not (name in left_out or text or typing):
                yield child


def ways(node: ast.AST) -> Iterator[tuple[str, Any, ast.AST]]:
    """What can be changed at one node: the way, the node to replace, what replaces it."""
    match node:
        case ast.Compare(ops=[op], left=left, comparators=[right]):
            for other in COMPARED[type(op)]:
                yield "comparison", node, ast.Compare(left, [other()], [right])
        case ast.BinOp(left=left, op=op, right=right) if type(op) in COMPUTED:
            yield "operator", node, ast.BinOp(left, COMPUTED[type(op)](), right)
        case ast.AugAssign(target=target, op=op, value=value) if type(op) in COMPUTED:
            yield "operator", node, ast.AugAssign(target, COMPUTED[type(op)](), value)
        case ast.BoolOp(op=op, values=values):
            yield "operator", node, ast.BoolOp(COMPUTED[type(op)](), values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield "not removed", node, operand
        case ast.Constant(value=bool(value)):
            yield "constant", node, ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield "constant", node, ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield "constant", node, ast.Constant(value * 10 or 1.0)
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield "condition negated", test, ast.UnaryOp(ast.Not(), test)
        case ast.Return(value=value) if value and not (
            isinstance(value, ast.Constant) and value.value is None
        ):
            yield "returns None", node, ast.Return(ast.Constant(None))
        case ast.Slice(lower=lower, upper=upper):
            for bound in (lower, upper):
                if bound and not isinstance(bound, ast.Constant):
                    yield "off by one", bound, ast.BinOp(bound, ast.Add(), ast.Constant(1))
        case ast.Dict(keys=keys, values=values) if len(keys) > 1:
            at = len(keys) // 2
            yield "entry dropped", node, ast.Dict(keys[:at] + keys[at + 1 :], values[:at] + values[at + 1 :])
        case ast.Tuple(elts=items, ctx=ast.Load()) | ast.List(elts=items, ctx=ast.Load()) if len(
            items
        ) > 2 and not any(isinstance(item, ast.Slice) for item in items):
            yield "entry dropped", node, type(node)(items[:-1], ast.Load())
        case ast.comprehension(ifs=[test]):
            yield "condition negated", test, ast.UnaryOp(ast.Not(), test)
    if isinstance(node, ast.Call):
        if len(node.args) > 1 and not any(isinstance(a, ast.Starred) for a in node.args[:2]):
            yield (
                "arguments swapped",
                node,
                ast.Call(node.func, node.args[1::-1] + node.args[2:], node.keywords),
            )
        if node.keywords and not isinstance(node.func, ast.Name):
            yield "argument dropped", node, ast.Call(node.func, node.args, node.keywords[:-1])
        if isinstance(node.func, ast.Name) and node.func.id == "range" and len(node.args) == 1:
            yield "off by one", node.args[0], ast.BinOp(node.args[0], ast.Sub(), ast.Constant(1))
    stored = isinstance(node, ast.Assign) and not isinstance(node.targets[0], (ast.Name, ast.Tuple))
    called = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
    if stored or called or isinstance(node, (ast.AugAssign, ast.Raise, ast.Continue, ast.Break)):
        yield "statement deleted", node, ast.Pass()


# ------------------------------------------------------------------------------------------------------ tests


def copied(folder: Path) -> Path:
    """A copy of the working tree without what git ignores."""
    shutil.rmtree(folder, ignore_errors=True)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\0"
    ):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def ran(folder: Path, *words: str, limit: float | None = None) -> tuple[int | None, str]:
    """The exit status of pytest in a copy, and what it prints; None where it took longer than `limit` seconds.

    It is forked from a process that has imported what tests import, but for the library: most mutants are noticed by the
    first test, and would cost mostly imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_ran, args=(str(folder), words))
    process.start()
    process.join(limit)
    status = process.exitcode
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)  # with all that the tests have started
    process.join()
    return status, (folder / "printed.txt").read_text()


def _ran(folder: str, words: Sequence[str]) -> None:
    """Run pytest in `folder`, in a process group of its own."""
    os.setpgrp()
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    printed = os.open("printed.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.path[:] = [folder, *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    sys.argv = ["pytest"]
    ignored = "ignore::pytest.PytestAssertRewriteWarning"  # of plugins that IMPORTED have imported
    os._exit(pytest.main(["-q", "--durations=0", "-W", ignored, *words]))


def measure(words: Sequence[str]) -> None:
    """Run the tests once under coverage and write which of them runs which line, and how long each takes."""
    folder = copied(WORK / "measured")
    recorded = ["--cov=depgraph", "--cov-context=test", "--cov-report=", "--junitxml=times.xml"]
    _, printed = ran(folder, *recorded, "-o", "junit_duration_report=call", *words)
    for failed in re.findall(r"^(?:FAILED|ERROR) .*", printed, re.MULTILINE):
        console.print(failed)
    console.print(printed.strip().rpartition("\n")[2])
    seconds = {}
    for case in ET.parse(folder / "times.xml").iter("testcase"):
        if not any(child.tag in ("failure", "error", "skipped") for child in case):
            file = case.attrib["classname"].replace(".", "/") + ".py"
            seconds[f"{file}::{case.attrib['name']}"] = float(case.attrib["time"])
    names = {name: index for index, name in enumerate(seconds)}
    data = CoverageData(str(folder / ".coverage"))
    data.read()
    lines: dict[str, dict[int, list[int]]] = {}
    for path in sorted(data.measured_files()):
        tests = {
            line: sorted({names[c.rpartition("|")[0]] for c in contexts if c.rpartition("|")[0] in names})
            for line, contexts in data.contexts_by_lineno(path).items()
        }
        lines[str(Path(path).relative_to(folder))] = {line: found for line, found in tests.items() if found}
    sources = {file: (folder / file).read_text() for file in lines}
    MAP.write_text(json.dumps({"seconds": seconds, "lines": lines, "sources": sources}))
    shutil.rmtree(folder)


class Tests:
    """Which tests have to do with a mutant, by what `measure` wrote."""

    def __init__(self) -> None:
        if not MAP.exists():
            raise SystemExit("nothing is measured yet: run `python -m tools.mutate measure`")
        found = json.loads(MAP.read_text())
        self.seconds: dict[str, float] = found["seconds"]
        self.names = list(self.seconds)
        self.lines = {f: {int(n): tests for n, tests in rows.items()} for f, rows in found["lines"].items()}
        self.sources: dict[str, str] = found["sources"]
        self.run_by = Counter(t for rows in self.lines.values() for tests in rows.values() for t in tests)

    def of(self, mutant: Mutant, most: float) -> list[str]:
        """Names of tests, those that run the fewest lines first, as many as take `most` seconds.

        They run the mutant's statement; where none does, as it runs at import, its function; or else its file.
        """
        rows = self.lines.get(mutant.file, {})
        for first, last in (mutant.lines, mutant.around, (0, 10**9)):
            found = {test for line, tests in rows.items() if first <= line <= last for test in tests}
            if found:
                break
        chosen, total = [], 0.0
        for test in sorted(found, key=lambda t: (self.run_by[t], self.names[t])):
            total += self.seconds[self.names[test]]
            if chosen and total > most:
                break
            chosen.append(self.names[test])
        return chosen


# ------------------------------------------------------------------------------------------------------ runs


def judged(mutant: Mutant, tests: Tests, folder: Path, most: float) -> dict[str, Any]:
    """What becomes of one mutant in a copy: `noticed` with the test that did, `survived`, or `run by no test`."""
    path = folder / mutant.file
    source, chosen = path.read_bytes(), tests.of(mutant, most)
    changed = mutant.change(source)
    row: dict[str, Any] = {"file": mutant.file, "line": mutant.line, "way": mutant.way, "tests": len(chosen)}
    row["diff"] = [
        line
        for line in difflib.unified_diff(
            source.decode().splitlines(), changed.decode().splitlines(), n=0, lineterm=""
        )
        if not line.startswith(("---", "+++", "@@"))
    ]
    if not chosen:
        return {**row, "verdict": "run by no test", "by": "", "seconds": 0.0}
    (folder / "chosen.txt").write_text("\n".join(chosen))
    limit = START + PATIENCE * sum(tests.seconds[name] for name in chosen)
    start = time.monotonic()
    try:
        path.write_bytes(changed)
        for cached in path.parent.glob(
            f"__pycache__/{path.stem}.*.pyc"
        ):  # same size, same second: Python would take it
            cached.unlink()
        status, printed = ran(folder, "-x", "-p", "no:cacheprovider", "@chosen.txt", limit=limit)
    finally:
        path.write_bytes(source)
    if "ERROR: not found" in printed or status == 5:
        raise SystemExit(f"the tests are not those that were measured: measure again\n{printed[-2000:]}")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE)
    by = "hangs" if status is None else failed[0] if failed else "pytest itself fails" if status else ""
    verdict = "noticed" if by else "survived"
    return {**row, "verdict": verdict, "by": by, "seconds": round(time.monotonic() - start, 1)}


def run(count: int, folders: Sequence[str], seed: int, jobs: int, most: float) -> None:
    """Judge `count` random mutants of the files in `folders`, but for those that have been judged."""
    tests = Tests()
    files = [
        f
        for name in folders
        for f in sorted((ROOT / name).rglob("*.py") if (ROOT / name).is_dir() else [ROOT / name])
    ]
    every: list[Mutant] = []
    for path in files:
        file = str(path.relative_to(ROOT))
        if file in tests.sources and path.read_text() != tests.sources[file]:
            raise SystemExit(f"{file} has changed: run `python -m tools.mutate measure` again")
        every += mutants(file, path.read_bytes())
    picked = random.Random(seed).sample(every, min(count, len(every)))
    console.print(f"{len(picked)} of {len(every)} mutants in {len(files)} files")
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    folders_free: queue.Queue[Path] = queue.Queue()
    for job in range(jobs):
        folders_free.put(folder := copied(WORK / f"copy-{job}"))
    status, printed = ran(folder, "-p", "no:cacheprovider", tests.names[0])
    if status:
        raise SystemExit(f"without any change, a test fails\n{printed[-2000:]}")

    def work(mutant: Mutant) -> None:
        folder = folders_free.get()
        try:
            results[mutant.key] = row = judged(mutant, tests, folder, most)
        finally:
            folders_free.put(folder)
        RESULTS.write_text(json.dumps(results, indent=1))
        console.print(
            f"{row['verdict']}: {mutant.file}:{mutant.line} {mutant.way}, {row['seconds']} s {row['by']}"
        )

    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(work, mutant) for mutant in picked if mutant.key not in results]:
            done.result()
    show([results[mutant.key] for mutant in picked])


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A table of folders, and every mutant that no test noticed."""
    verdicts = ("noticed", "survived", "run by no test")
    table = Table("folder", "mutants", *verdicts, "noticed %")
    by_folder = {str(Path(row["file"]).parent): [] for row in sorted(rows, key=lambda row: row["file"])}
    for row in rows:
        by_folder[str(Path(row["file"]).parent)].append(row)
    for folder, found in (*by_folder.items(), ("all", list(rows))):
        counts = Counter(row["verdict"] for row in found)
        share = f"{100 * counts['noticed'] / max(len(found), 1):.0f}"
        table.add_row(folder, str(len(found)), *(str(counts[v]) for v in verdicts), share)
    for row in rows:
        if row["verdict"] != "noticed":
            console.print(
                f"\n{row['file']}:{row['line']} {row['way']}: {row['verdict']} ({row['tests']} tests)"
            )
            console.print("\n".join(row["diff"]))
    console.print(table)


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutate", description=(__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "measure", help="which test runs which line; further words go to pytest, as `-n 2` does"
    )
    runs = commands.add_parser("run", help="judge random mutants of files or folders")
    runs.add_argument("count", type=int)
    runs.add_argument("folders", nargs="+")
    runs.add_argument("--seed", type=int, default=0)
    runs.add_argument("--jobs", type=int, default=2)
    runs.add_argument("--seconds", type=float, default=120.0, help="of tests for each mutant")
    options, rest = parser.parse_known_args(words)
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.command == "measure":
        measure(rest)
    elif rest:
        parser.error(f"unknown: {' '.join(rest)}")
    else:
        run(options.count, options.folders, options.seed, options.jobs, options.seconds)


if __name__ == "__main__":
    main()
