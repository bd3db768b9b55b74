"""One function a command: options in, a table or JSON out, the exit status back."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import checkpoint
from ..base.errors import InputError, VerificationError
from ..base.processes import is_first
from ..base.tables import printed, table
from ..costs import cost
from ..costs.latency import latencies
from ..depth.request import Depth
from ..elastic import Elastic
from ..exploring import pictures
from ..exploring.html import write_html
from ..exploring.sweep import sweep as sweep_model
from ..graphs import prune_edges
from ..plan.compose import joined
from ..plan.plan import Plan
from ..prune import analyze
from ..prune import prune as prune_model
from ..recipe import Recipe
from ..recipe.sources import called, function, inputs_of, model_of, pretrained
from ..report import reachable
from ..select import BUDGETS, OPTIONS
from ..simplify.compress import compress as nearest_of
from ..simplify.fusion import fuse as fuse_norms
from ..simplify.low_rank import factorise as as_factors
from ..simplify.masking import mask as mask_weights
from ..simplify.result import Simplified
from ..simplify.weight_scores import DATA as NEED_DATA
from ..store import load, load_plans, save
from ..store.document import FILE_NAME, open_folder
from ..surgery.apply import apply
from ..verify.verify import verify as verify_values

DONE, DIFFERENT = 0, 3
ROWS = 60  # of a table of shapes


def _say(options: argparse.Namespace, data: dict[str, Any], *parts: Any) -> None:
    """JSON where it was asked for, tables and lines otherwise."""
    sys.stdout.write((json.dumps(data, default=str) if options.json else printed(*parts)) + "\n")


def _shapes(title: str, rows: list[dict[str, Any]], first: str, second: str) -> Iterator[Any]:
    """A table of shapes, of those with more than one dim: biases, scales and statistics follow them."""
    matrices = [r for r in rows if max(len(r[k] or ()) for k in (first, second)) > 1]
    shown = table(title, "parameter", first, second)
    for row in matrices[:ROWS]:
        shown.add_row(
            row["name"], *(" x ".join(map(str, row[k])) if row[k] else "-" for k in (first, second))
        )
    yield shown
    more, vectors = len(matrices) - ROWS, len(rows) - len(matrices)
    if more > 0:
        yield f"... and {more} more"
    if vectors:
        yield f"... and {vectors} of one dim"


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
    shown = table(f"{type(model).__name__}: {len(groups)} groups", "group", "units", "dims", "layers")
    for group in groups[: options.top]:
        shown.add_row(group["name"], f"{group['units']:,}", str(group["dims"]), str(len(group["modules"])))
    if len(groups) > options.top:
        shown.add_row(f"... and {len(groups) - options.top} more", "", "", "")
    lines = [f"{reach['params']:.1%} of the parameters and {reach['macs']:.1%} of the MACs can shrink"]
    lines += [f"  locked: {n:,} parameters: {reason}" for reason, n in graph.lock_summary().most_common(10)]
    if options.html:
        lines.append(f"page: {write_html(graph, options.html)}")
    _say(options, {"reachable": reach, "groups": groups, "locks": locks}, shown, *lines)
    return DONE


def _request(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `depgraph.prune` that the options of `prune` and `sweep` share."""
    own = {name: value for name in OPTIONS if (value := getattr(options, name, None)) is not None}
    return {
        **own,
        "importance": options.importance,
        "ignore": options.ignore,
        "granularity": options.granularity,
        **_data(options),
        "recover": getattr(options, "recover", None),
        "latency": options.latency,
        "verify": not getattr(options, "no_verify", False),
    }


def _budgets(options: argparse.Namespace) -> dict[str, Any]:
    return {name: given for name in BUDGETS if (given := getattr(options, name)) is not None}


def _depth(options: argparse.Namespace) -> Depth | None:
    """What --depth asks for: alone as many as budgets or the ratio say, with a number so many branches stay."""
    if options.depth is None:
        return None
    return Depth(None if options.depth is True else options.depth, options.depth_by)


def prune(options: argparse.Namespace) -> int:
    """Make a model smaller; save it where a folder is given."""
    if options.checkpoint is not None:
        return _prune_checkpoint(options)
    if options.dry_run:
        raise InputError(
            "--dry-run is for --checkpoint FOLDER: a model in memory is pruned without writing where --out is left away"
        )
    model = model_of(options.model)
    result = prune_model(
        model,
        inputs_of(options.input, model),
        pruning_ratio=options.ratio,
        depth=_depth(options),
        **_budgets(options),
        **_request(options),
    )
    lost: list[str] = []
    if options.out and options.pretrained:
        lost = pretrained().save_pretrained(result, options.out)
    elif options.out:
        save(result, options.out)
    lines = [f"saved in {options.out}" if options.out else "not saved: give --out FOLDER"]
    if lost:
        lines.append(f"stock from_pretrained would not load it: {'; '.join(lost[:3])}")
    if options.html:
        lines.append(f"page: {write_html(result, options.html)}")
    _say(
        options, result.report.to_dict() | {"out": options.out, "not_stock": lost}, str(result.report), *lines
    )
    return DIFFERENT if lost else DONE


def _prune_checkpoint(options: argparse.Namespace) -> int:
    """From file to file."""
    if options.out is None and not options.dry_run:
        raise InputError("give --out FOLDER, where the smaller checkpoint is written")
    request = _request(options)
    refused = ["--latency"] if request.pop("latency") else []
    refused += [f"--{n}" for n in ("html", "pretrained") if getattr(options, n)]
    if refused:
        raise InputError(f"--checkpoint does not take {', '.join(refused)}: there is no model in memory")
    factory = None if options.model is None else function(options.model, "the model")
    request["verify"] = options.proof if request["verify"] else False
    shell = None if options.input else checkpoint.shell(options.checkpoint, factory)
    found = checkpoint.prune(
        options.checkpoint, inputs_of(options.input, shell), out=options.out or f"{options.checkpoint}-smaller",
        factory=factory, memory=amount(options.memory), pruning_ratio=options.ratio, depth=_depth(options), dry_run=options.dry_run,
        **_budgets(options), **request,
    )  # fmt: skip
    if not is_first():
        return DONE
    if isinstance(found, checkpoint.Forecast):
        _say(options, found.to_dict(), str(found))
        return DONE
    data = {
        **found.report.to_dict(),
        "out": str(found.folder),
        "not_stock": found.differences,
        "load": found.load,
    }
    lines = [f"saved in {found.folder}; {found.load} loads it"]
    if found.differences:
        lines.append(f"stock from_pretrained would not load it: {'; '.join(found.differences[:3])}")
    _say(options, data, str(found.report), *lines)
    return DONE


def amount(text: str) -> int | str:
    """``6GB``, or a number of bytes."""
    return int(text) if text.isdigit() else text


def edges(options: argparse.Namespace) -> int:
    """Fewer edges in the graph that a model runs on."""
    result = prune_edges(
        model_of(options.model), called(options.data, "data"), keep=options.keep, by=options.by,
        undirected=not options.directed,
    )  # fmt: skip
    line = "not saved: give --out FILE"
    if options.out:
        Path(options.out).write_text(result.plan.to_json())
        line = f"saved in {options.out}: EdgePlan.from_json(text).apply(data) makes the data of it"
    _say(options, result.report.to_dict() | {"out": options.out}, str(result.report), line)
    return DONE


def elastic(options: argparse.Namespace) -> int:
    """One set of weights, several sizes."""
    if options.plot:
        pictures.check_available()
        if not options.score:
            raise InputError("--plot draws scores: give --score package.module:function, too")
    model, asked = model_of(options.model), _request(options)
    own = {k: v for k, v in asked.items() if k not in ("recover", "latency", "verify")}
    inputs = inputs_of(options.input, model)
    made = Elastic(model, inputs, sizes=options.sizes, cost=options.cost, depth=options.depth, **own)
    score = function(options.score, "--score") if options.score else None
    found = made.measured(score, latency=options.latency)
    lines = [f"{size:g}: {proof.status}, {proof.detail}" for size, proof in made.proofs.items()] + made.notes
    if options.plot:
        found.plot(options.plot)
        lines.append(f"picture: {options.plot}")
    if options.out:
        save(made, options.out)
        lines.append(f"saved in {options.out}")
    verified = {f"{size:g}": proof.status for size, proof in made.proofs.items()}
    _say(options, found.to_dict() | {"verified": verified, "out": options.out}, str(found), *lines)
    return DONE


def run(options: argparse.Namespace) -> int:
    """A recipe, from its file."""
    result = Recipe.read(options.recipe).run()
    _say(options, {"rows": result.rows}, str(result))
    return DONE


def fuse(options: argparse.Namespace) -> int:
    """Batch norms into the layers before them."""
    model = model_of(options.model)
    return _simplified(
        options, fuse_norms(model.eval(), inputs_of(options.input, model), scales=options.scales)
    )


def mask(options: argparse.Namespace) -> int:
    """Zeros among single weights."""
    model = model_of(options.model)
    inputs = inputs_of(options.input, model) if options.input or options.importance in NEED_DATA else None
    pattern = None
    if options.pattern:
        parts = options.pattern.split(":")
        if len(parts) != 2 or not all(p.isdigit() for p in parts):
            raise InputError(f"--pattern must be two numbers, such as 2:4, not {options.pattern!r}")
        pattern = int(parts[0]), int(parts[1])
    result = mask_weights(
        model, inputs, sparsity=options.sparsity, scope=options.scope, importance=options.importance,
        pattern=pattern, ignore=options.ignore, **_data(options),
    )  # fmt: skip
    return _simplified(options, result)


def factorise(options: argparse.Namespace) -> int:
    """Two layers of one."""
    model = model_of(options.model)
    batches = called(options.calibration, "--calibration") if options.calibration else None
    inputs = inputs_of(options.input, model)
    return _simplified(
        options, as_factors(model, inputs, batches, ignore=options.ignore, **_budgets(options))
    )


def compress(options: argparse.Namespace) -> int:
    """Widths, depth or ranks, whichever comes nearest."""
    model = model_of(options.model)
    return _simplified(
        options,
        nearest_of(
            model, inputs_of(options.input, model), kinds=options.kinds, ignore=options.ignore,
            **_data(options), **_budgets(options),
        ),
    )  # fmt: skip


def _data(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "calibration": called(options.calibration, "--calibration") if options.calibration else None,
        "loss": function(options.loss, "--loss") if options.loss else None,
    }


def _simplified(options: argparse.Namespace, result: Simplified) -> int:
    """Save a result where a folder is given, and show its report."""
    if options.out:
        save(result, options.out)
    line = f"saved in {options.out}" if options.out else "not saved: give --out FOLDER"
    _say(options, result.report.to_dict() | {"out": options.out}, str(result.report), line)
    return DONE


def sweep(options: argparse.Namespace) -> int:
    """Several ratios, one trace."""
    if options.plot:
        pictures.check_available()
    model = model_of(options.model)
    found = sweep_model(
        model, inputs_of(options.input, model), ratios=options.ratios, budgets=_budgets(options), score=function(options.score, "--score"),
        file=options.file, **_request(options),
    )  # fmt: skip
    lines = [f"rows: {options.file}"] if options.file else []
    if options.plot:
        found.plot(options.plot)
        lines.append(f"picture: {options.plot}")
    _say(options, found.to_dict(), str(found), *lines)
    return DONE


def _loaded(text: str, folder: str) -> nn.Module:
    """The model in a folder, whose original is `text`; of one with several sizes, the whole."""
    found = load(lambda: model_of(text), folder)
    return found.model if isinstance(found, Elastic) else found


def verify(options: argparse.Namespace) -> int:
    """The saved model against the masked original."""
    model = model_of(options.model)
    small = _loaded(options.model, options.folder)
    *earlier, plan = joined(load_plans(options.folder)) or [Plan()]
    for done in earlier:
        model = apply(model, done)
    try:
        proof = verify_values(model, small, plan, inputs_of(options.input, model))
    except VerificationError as error:
        detail = _other_original(model, small, plan) or str(error)
        _say(options, {"status": "different", "detail": detail}, f"different: {detail}")
        return DIFFERENT
    data = {"status": proof.status, "max_error": proof.max_error, "detail": proof.detail}
    _say(options, data, f"{proof.status}: {proof.detail}; largest deviation {proof.max_error:.1e}")
    return DONE


def _other_original(model: nn.Module, small: nn.Module, plan: Plan) -> str:
    """A sentence about weights that the saved model does not have from this original, or ""."""
    now, moves = model.state_dict(), plan.moves
    saved = {moves.old(n): t for n, t in small.state_dict().items()}
    names = [
        n for n in plan.shapes if n in now and n in saved and now[n].is_floating_point() and n not in plan.entries
        and not torch.equal(now[n] if n not in plan.cuts else plan.cuts[n].slice(now[n]), saved[n])
    ]  # fmt: skip
    if not names:
        return ""
    return (
        f"{len(names)} tensors of this original are not what the saved model kept of its own ({', '.join(names[:3])}): it was "
        "made from other weights, or trained since\n  fix: give the very original; a factory that draws its weights at "
        "random must seed them or load them"
    )


def show(options: argparse.Namespace) -> int:
    """What a folder says of itself; no weight is read."""
    document = open_folder(Path(options.folder))
    plan, *later = joined(document.plans) or [Plan()]
    before, after = (
        sum(prod(s) for s in plan.shapes.values()),
        sum(prod(e.shape) for e in document.whole().tensors.values()),
    )
    data: dict[str, Any] = {
        "provenance": document.provenance, "request": plan.request, "parameters and buffers": after, "before": before,
        "plans": len(document.plans), "repaired attributes": len(plan.repairs),
        "rewritten literals": len(plan.rewrites), "sizes": [1.0, *(s.size for s in document.sizes)],
        "widths": [{"name": n, "before": list(c.shape), "after": list(c.new_shape)} for p in (plan, *later) for n, c in p.cuts.items()],
        "masked weights": sum(len(p.entries) for p in (plan, *later)),
        "fused norms": sum(len(p.fusions) for p in (plan, *later)),
        "layers as two factors": sum(len(p.factors) for p in (plan, *later)),
        "removed modules": [r.path for p in (plan, *later) for r in p.removals],
    }  # fmt: skip
    facts = [f"{k}: {v}" for k, v in document.provenance.items()]
    facts.append(f"request: {', '.join(f'{k}={v}' for k, v in plan.request.items()) or '-'}")
    facts.append(f"parameters and buffers: {after:,} of {before:,} ({after / max(before, 1):.1%})")
    facts += [
        f"{k}: {data[k]}"
        for k in (
            "plans",
            "repaired attributes",
            "rewritten literals",
            "masked weights",
            "fused norms",
            "layers as two factors",
            "sizes",
        )
    ]
    if data["removed modules"]:
        facts.append(f"removed modules: {', '.join(data['removed modules'][:12])}")
    _say(options, data, *_shapes(str(options.folder), data["widths"], "before", "after"), *facts)
    return DONE


def compare(options: argparse.Namespace) -> int:
    """Two models side by side."""
    first = model_of(options.first)
    saved = (Path(options.second) / FILE_NAME).exists()
    second = _loaded(options.first, options.second) if saved else model_of(options.second)
    inputs = inputs_of(options.input, first)
    figures: dict[str, list[float]] = {
        name: [measure(m) for m in (first, second)]
        for name, measure in (
            ("parameters", cost.parameter_count),
            ("bytes", cost.byte_count),
            ("MACs", lambda m: cost.count_macs(m, inputs)),
        )
    }
    seconds = latencies((first, second), inputs)
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (first, second)]
    widths: list[dict[str, Any]] = [
        {"name": n, "first": shapes[0].get(n), "second": shapes[1].get(n)}
        for n in dict.fromkeys([*shapes[0], *shapes[1]])
        if shapes[0].get(n) != shapes[1].get(n)
    ]
    shown = table("", "", "first", "second", "ratio")
    for name, (a, b) in figures.items():
        shown.add_row(name, f"{a:,}", f"{b:,}", f"{b / a:.1%}" if a else "-")
    a, b = seconds
    shown.add_row("latency [ms]", f"{a * 1e3:.3g}", f"{b * 1e3:.3g}", f"{b / a:.1%}")
    parts = (
        _shapes("parameters that differ", widths, "first", "second")
        if widths
        else ("all shapes are the same",)
    )
    _say(options, {**figures, "latency [s]": seconds, "widths": widths}, shown, *parts)
    return DONE
