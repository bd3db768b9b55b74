"""One function a command: options in, a table or JSON out, the exit status back."""

from __future__ import annotations

import argparse
import json
import sys
from functools import reduce
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..costs import cost
from ..costs.latency import latencies
from ..errors import VerificationError
from ..exploring.html import write_html
from ..exploring.sweep import sweep as sweep_model
from ..planning.plan import Plan
from ..proof.verify import verify as verify_values
from ..prune import analyze
from ..prune import prune as prune_model
from ..report import reachable
from ..store import load, load_plans, save
from ..store.document import open_folder
from .sources import function, inputs_of, model_of, pretrained

DONE, DIFFERENT = 0, 3


def _say(options: argparse.Namespace, data: dict[str, Any], *tables: Any) -> None:
    """JSON where it was asked for, tables otherwise."""
    if options.json:
        sys.stdout.write(json.dumps(data, default=str) + "\n")
        return
    console = Console(highlight=False)
    for table in tables:
        console.print(table, markup=False) if isinstance(table, str) else console.print(table)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", overflow="fold")
    return table


def inspect(options: argparse.Namespace) -> int:
    """Groups, what can shrink, and locks."""
    model = model_of(options.model)
    graph = analyze(model, inputs_of(options.input, model), ignore=options.ignore)
    reach = reachable(graph)
    groups: list[dict[str, Any]] = [
        {"name": g.name, "units": g.units, "dims": len(g.members), "modules": sorted({m.name.rpartition(".")[0] for m in g.members})}
        for g in sorted(graph.groups, key=lambda g: -len(g.members))
    ]  # fmt: skip
    locks = [
        {"reason": r.text, "module": r.module, "source": r.source, "params": n}
        for r, n in graph.lock_summary().most_common()
    ]
    table = _table(f"{type(model).__name__}: {len(groups)} groups", "group", "units", "dims", "layers")
    for group in groups[: options.top]:
        table.add_row(group["name"], f"{group['units']:,}", str(group["dims"]), str(len(group["modules"])))
    if len(groups) > options.top:
        table.add_row(f"... and {len(groups) - options.top} more", "", "", "")
    lines = f"{reach['params']:.1%} of the parameters and {reach['macs']:.1%} of the MACs can shrink"
    for reason, n in graph.lock_summary().most_common(10):
        lines += f"\n  locked: {n:,} parameters: {reason}"
    _say(options, {"reachable": reach, "groups": groups, "locks": locks}, table, lines)
    if options.html:
        write_html(graph, options.html)
    return DONE


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `depgraph.prune` that the options of `prune` and `sweep` share."""
    return {
        "importance": options.importance,
        "scope": options.scope,
        "ignore": options.ignore,
        "round_to": options.round_to,
        "uniform": options.uniform,
        "calibration": function(options.calibration, "--calibration")() if options.calibration else None,
        "loss": function(options.loss, "--loss") if options.loss else None,
        "recover": options.recover,
        "latency": options.latency,
        "verify": not options.no_verify,
    }


def prune(options: argparse.Namespace) -> int:
    """Make a model smaller; save it where a folder is given."""
    model = model_of(options.model)
    budgets = {
        f"max_{n}": getattr(options, f"max_{n}") for n in ("params", "macs", "bytes", "memory", "latency")
    }
    result = prune_model(
        model, inputs_of(options.input, model), pruning_ratio=options.ratio, **budgets, **_asked(options)
    )
    lost: list[str] = []
    if options.out and options.pretrained:
        lost = pretrained().save_pretrained(result, options.out)
    elif options.out:
        save(result, options.out)
    if options.html:
        write_html(result, options.html)
    saved = f"saved in {options.out}" if options.out else "not saved: give --out FOLDER"
    if lost:
        saved += f"; stock from_pretrained would not load it: {'; '.join(lost[:3])}"
    _say(
        options, result.report.to_dict() | {"out": options.out, "not_stock": lost}, str(result.report), saved
    )
    return DONE


def sweep(options: argparse.Namespace) -> int:
    """Several ratios, one trace."""
    model = model_of(options.model)
    ratios = tuple(float(r) for r in options.ratios.split(","))
    found = sweep_model(
        model, inputs_of(options.input, model), ratios=ratios, score=function(options.score, "--score"),
        file=options.file, **_asked(options),
    )  # fmt: skip
    _say(options, found.to_dict(), str(found))
    if options.plot:
        found.plot(options.plot)
    return DONE


def verify(options: argparse.Namespace) -> int:
    """The saved model against the masked original."""
    model = model_of(options.model)
    small = load(lambda: model_of(options.model), options.folder)
    plan = reduce(Plan.then, load_plans(options.folder))
    try:
        proof = verify_values(model, small, plan, inputs_of(options.input, model))
    except VerificationError as error:
        _say(options, {"status": "different", "detail": str(error)}, f"different: {error}")
        return DIFFERENT
    data = {"status": proof.status, "max_error": proof.max_error, "detail": proof.detail}
    _say(options, data, f"{proof.status}: {proof.detail}; largest deviation {proof.max_error:.1e}")
    return DONE


def show(options: argparse.Namespace) -> int:
    """What a folder says of itself; no weight is read."""
    document = open_folder(Path(options.folder))
    plan = reduce(Plan.then, document.plans)
    data: dict[str, Any] = {
        "provenance": document.provenance,
        "parameters and buffers": sum(prod(e.shape) for e in document.tensors.values()),
        "before": sum(prod(s) for s in plan.shapes.values()),
        "plans": len(document.plans),
        "repaired attributes": len(plan.repairs),
        "rewritten literals": len(plan.rewrites),
        "widths": [
            {"name": n, "before": list(c.shape), "after": list(c.new_shape)} for n, c in plan.cuts.items()
        ],
    }
    table = _table(str(options.folder), "parameter", "before", "after")
    for row in data["widths"][:60]:
        table.add_row(row["name"], " x ".join(map(str, row["before"])), " x ".join(map(str, row["after"])))
    if len(data["widths"]) > 60:
        table.add_row(f"... and {len(data['widths']) - 60} more", "", "")
    facts = "\n".join(f"{k}: {v}" for k, v in data.items() if k != "widths")
    _say(options, data, table, facts)
    return DONE


def compare(options: argparse.Namespace) -> int:
    """Two models side by side."""
    first = model_of(options.first)
    second = (
        load(lambda: model_of(options.first), options.second)
        if Path(options.second).is_dir()
        else model_of(options.second)
    )
    inputs = inputs_of(options.input, first)
    figures: dict[str, list[float]] = {
        name: [measure(m) for m in (first, second)]
        for name, measure in (
            ("parameters", cost.parameter_count),
            ("bytes", cost.byte_count),
            ("MACs", lambda m: cost.count_macs(m, inputs)),
        )
    }
    figures["latency [s]"] = list(latencies((first, second), inputs))
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (first, second)]
    widths: list[dict[str, Any]] = [
        {"name": n, "first": shapes[0].get(n), "second": shapes[1].get(n)}
        for n in dict.fromkeys([*shapes[0], *shapes[1]])
        if shapes[0].get(n) != shapes[1].get(n)
    ]
    table = _table("", "", "first", "second", "ratio")
    for name, (a, b) in figures.items():
        text = [f"{v:.4g}" if isinstance(v, float) else f"{v:,}" for v in (a, b)]
        table.add_row(name, *text, f"{b / a:.1%}" if a else "-")
    changed = _table("parameters that differ", "parameter", "first", "second")
    for row in widths[:60]:
        changed.add_row(
            row["name"], *(" x ".join(map(str, row[k])) if row[k] else "-" for k in ("first", "second"))
        )
    if len(widths) > 60:
        changed.add_row(f"... and {len(widths) - 60} more", "", "")
    _say(options, {**figures, "widths": widths}, table, changed)
    return DONE
