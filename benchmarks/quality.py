"""What is left of trained models after pruning: depgraph's recipes beside magnitude, random and Torch-Pruning.

    python -m benchmarks.quality --small                                  # digits, a minute, no download
    python -m benchmarks.quality --out quality.jsonl                      # all cases, hours; goes on where it stopped
    python -m benchmarks.quality --case resnet20-0.5 --out quality.jsonl
    python -m benchmarks.quality --out quality.jsonl --latency            # times of the models, on a quiet machine
    python -m benchmarks.quality --out quality.jsonl --models models      # keep what was pruned, and prune nothing twice
    python -m benchmarks.quality --out quality.jsonl --only-report --markdown docs/quality.md

Each case keeps every method to the same budget. First each criterion prunes once (seed 0) and is scored as it is. Then
random, magnitude, the best of depgraph's recipes and the best of Torch-Pruning's criteria prune with all seeds, are
scored, trained alike for a short while where the case has such training, and scored again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.real import cases, latency, report
from benchmarks.real.case import Case
from benchmarks.real.methods import (
    MAGNITUDE,
    OTHER,
    RANDOM,
    RECIPES,
    Method,
    Pruned,
    prune,
    recipes,
    renorm,
    rivals,
)
from depgraph.costs.cost import count_macs, parameter_count

Row = dict[str, Any]
AS_PRUNED = ("share", "macs", "params", "seconds", "score", "renormed")


@dataclass
class Results:
    """Rows by (case, method, seed, trained), written to a file as they come."""

    path: Path | None
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path and self.path.exists():
            self.rows = [json.loads(line) for line in self.path.read_text().splitlines() if line.strip()]

    def find(self, case: str, method: str, seed: int, trained: bool | str) -> Row | None:
        """The row, where there is one."""
        key = (case, method, seed, trained)
        return next((r for r in self.rows if (r["case"], r["method"], r["seed"], r["trained"]) == key), None)

    def add(self, row: Row) -> None:
        """Keep the row and write it."""
        self.rows.append(row)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def best(self, case: Case, tool: str) -> str | None:
        """The method of this tool whose first seed scored best before training, random and plain magnitude apart.

        On held-out calibration data where the case has that, else as evaluated; either with batch norms re-estimated,
        where there are any: without, most criteria score like guessing.
        """
        shown = [
            r for r in self.rows
            if r["case"] == case.name and r["tool"] == tool and r["seed"] == 0 and not r["trained"]
            and "score" in r and r["method"] not in {str(RANDOM), str(MAGNITUDE)}
        ]  # fmt: skip
        first = max if case.higher else min
        if case.held_out:
            shown = [r for r in shown if "held_out" in r]
            return first(shown, key=lambda r: r["held_out"])["method"] if shown else None
        return first(shown, key=lambda r: first_figure(r, "renormed", "score"))["method"] if shown else None


def first_figure(row: Row, *kinds: str) -> float:
    """The figure that methods are compared by, of the first of these kinds that the row has."""
    scores: dict[str, float] = next(row[kind] for kind in kinds if row.get(kind))
    return next(iter(scores.values()))


def measure_dense(case: Case, results: Results) -> None:
    """The row of the dense model."""
    if results.find(case.name, "dense", 0, False):
        return
    model = case.build()
    row = _row(case, "dense", "dense", {}, 0, False) | _size(case, model) | {"score": case.score(model)}
    results.add(row)
    say(row)


def measure(
    case: Case, method: Method, seed: int, train: bool, results: Results, models: Path | None = None
) -> None:
    """One row: prune, score, and with `train` train and score again; a failure is a row with its error.

    What was pruned is kept in the folder `models`, if there is one, and taken from there.
    """
    if results.find(case.name, str(method), seed, train):
        return
    row = _row(case, str(method), method.tool, method.options, seed, train)
    try:
        pruned = _pruned(method, case, seed, models)
        known = results.find(case.name, str(method), seed, False) or {}
        row |= {key: known[key] for key in AS_PRUNED if key in known} or _as_pruned(
            case, method, seed, pruned, choose=not train
        )
        if train and case.tune:
            case.tune(pruned.model, seed)
            row["tuned"] = case.score(pruned.model)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    results.add(row)
    say(row)


def _as_pruned(case: Case, method: Method, seed: int, pruned: Pruned, choose: bool) -> Row:
    """What is measured before any training; with `choose` also the figure that methods are chosen by."""
    row = _size(case, pruned.model) | {
        "seconds": round(pruned.seconds, 1),
        "score": case.score(pruned.model),
    }
    ready = pruned.model  # as good as it gets without training
    if "recover" not in method.options:
        ready = copy.deepcopy(pruned.model)
        if renorm(ready, case.calibration(seed)):
            row["renormed"] = case.score(ready)
    if choose and case.held_out:
        row["held_out"] = case.held_out(ready, seed)
    return row


def _pruned(method: Method, case: Case, seed: int, models: Path | None) -> Pruned:
    if models is None:
        return prune(method, case, seed)
    path = models / f"{case.name}, {method}, seed {seed}.pt".replace(":", "")
    if path.exists():
        kept: Pruned = torch.load(path, weights_only=False)
        return kept
    pruned = prune(method, case, seed)
    models.mkdir(parents=True, exist_ok=True)
    torch.save(pruned, path)
    return pruned


def run_case(
    case: Case, seeds: int, results: Results, chosen: Sequence[str] | None, folder: Path | None = None
) -> None:
    """All rows of a case."""
    measure_dense(case, results)
    methods = {str(m): m for m in [RANDOM, MAGNITUDE, *recipes(case), *rivals(case)]}
    if chosen:
        methods = {name: m for name, m in methods.items() if any(c in name for c in chosen)}
    for method in methods.values():
        measure(case, method, 0, False, results, folder)
    finalists = [str(RANDOM), str(MAGNITUDE), results.best(case, "depgraph"), results.best(case, OTHER)]
    for seed in range(0 if case.tune else 1, seeds):  # without training, seed 0 has nothing more to say
        for name in finalists:
            if name in methods:
                measure(case, methods[name], seed, True, results, folder)


def measure_latency(case: Case, results: Results) -> None:
    """A row for each recipe: milliseconds of its model and of the dense one, all side by side."""
    if case.image is None or results.find(case.name, str(RECIPES[0]), 0, "latency"):
        return
    models = {"dense": case.build()}
    for method in RECIPES:  # recovery changes values alone
        plain = dataclasses.replace(method, options=method.options | {"recover": None})
        models[str(method)] = prune(plain, case, 0).model
    found = latency.milliseconds(models, case.image)
    for method in RECIPES:
        row = _row(case, str(method), method.tool, method.options, 0, "latency") | _size(
            case, models[str(method)]
        )
        results.add(row | {"latency": found[str(method)], "dense_latency": found["dense"]})


def say(row: Row) -> None:
    """One line about a row."""
    scores = dict(row.get("score", {}))
    for kind, text in (("renormed", "with batch norms re-estimated"), ("tuned", "after training")):
        scores |= {f"{name} {text}": value for name, value in row.get(kind, {}).items()}
    text = ", ".join(f"{name} {value:.4g}" for name, value in scores.items()) or row.get("error", "")
    share = f"{row['share']:.3f}" if "share" in row else "-"
    print(f"{row['case']} | {row['method']} | seed {row['seed']} | {share} | {text}", flush=True)


def _row(case: Case, method: str, tool: str, options: dict[str, Any], seed: int, trained: bool | str) -> Row:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    row = {
        "case": case.name,
        "method": method,
        "tool": tool,
        "options": options,
        "seed": seed,
        "trained": trained,
    }
    return row | {"date": now, "torch": torch.__version__}


def _size(case: Case, model: torch.nn.Module) -> Row:
    dense = case.build()
    share = case.budget.cost(model, case.example()) / case.budget.cost(dense, case.example())
    return {"share": share, "macs": count_macs(model, case.example()), "params": parameter_count(model)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="digits alone: a minute, nothing is downloaded")
    parser.add_argument(
        "--case", action="append", choices=cases.names(), help="only this case (may be repeated)"
    )
    parser.add_argument(
        "--method", action="append", help="only methods whose name holds this text (may be repeated)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, help="file of JSON lines to add to; what it holds is not measured again"
    )
    parser.add_argument(
        "--models", type=Path, help="a folder: pruned models are kept there and taken from there"
    )
    parser.add_argument("--latency", action="store_true", help="time the recipes' models, and nothing else")
    parser.add_argument("--only-report", action="store_true", help="measure nothing, show what --out holds")
    parser.add_argument("--markdown", type=Path, help="write the figures into this page, below its marker")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    results = Results(options.out)
    chosen = (
        [cases.small()] if options.small else [cases.case(name) for name in options.case or cases.names()]
    )
    started = time.perf_counter()
    if not options.only_report:
        for case in chosen:
            if options.latency:
                measure_latency(case, results)
            else:
                seeds = 1 if options.small else options.seeds
                run_case(case, seeds, results, options.method, options.models)
    report.show(chosen, results.rows)
    if options.markdown:
        versions = {name: version(name) for name in ("torch", "torch-pruning", "transformers", "timm")}
        report.write(options.markdown, report.page(chosen, results.rows, versions))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
