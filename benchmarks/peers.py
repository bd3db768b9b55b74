"""Other tools, called as their documentation says and with nothing said about the model.

python -m benchmarks.peers --suite timm --out peer_timm.jsonl      # an hour; goes on where it stopped
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from outputs import call, shapes
from torch import nn

from benchmarks.isolate import Row, isolated
from benchmarks.rows import append, read
from benchmarks.suites import SUITES, suite

LIMIT = 90.0  # seconds of processor time


def torch_pruning(suite_name: str, name: str, limit: float = LIMIT, ratio: float = 0.5) -> Row:
    """One call of Torch-Pruning with no hints on one model, in a process of its own.

    No layer is named to be left alone, so the tool is free to prune the layers that make the outputs; `outputs_kept`
    says whether it did. Nothing checks its values: a pruned model that runs may still be a wrong one.

    Returns:
        `suite`, `name`, `ran` (the call returned), `params` (fraction left), `runs` (the pruned model takes the
        inputs), `outputs_kept` (its outputs have the original shapes but for the first dim: batch, or number of
        detections), `seconds`, `error`.
    """
    outcome = isolated(_prune, suite_name, name, ratio, limit=limit)
    nothing: Row = {
        "suite": suite_name,
        "name": name,
        "ran": False,
        "params": None,
        "runs": False,
        "outputs_kept": False,
        "error": "",
    }
    row = {**nothing, **outcome.row, "seconds": round(outcome.seconds, 2)}
    return {**row, "error": outcome.error} if outcome.error else row


def _prune(started: Callable[[], None], suite_name: str, name: str, ratio: float) -> Row:
    """Body of `torch_pruning`."""
    import torch_pruning as tp

    case = suite(suite_name)[name]
    model, inputs = case.build(), case.inputs()
    with torch.no_grad():
        wanted = [shape[1:] for shape in shapes(call(model, inputs))]
    before = _count(model)
    started()
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=inputs[0] if isinstance(inputs, tuple) and len(inputs) == 1 else inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=ratio,
    )
    pruner.step()
    row: Row = {"ran": True, "params": _count(model) / before}
    try:
        with torch.no_grad():
            found = [shape[1:] for shape in shapes(call(model, inputs))]
    except Exception as error:
        return {
            **row,
            "error": f"pruned model fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
        }
    return {**row, "runs": True, "outputs_kept": found == wanted}


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    """Command line: one row a model, those that the file holds already are not run again."""
    parser = argparse.ArgumentParser(
        description="Call Torch-Pruning once, with no hints, on every model of a suite."
    )
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--models", help="names, separated by commas (default: all)")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="seconds of processor time a model (default: %(default)g)"
    )
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines to add to")
    options = parser.parse_args()
    done = read([options.out], options.suite)
    for name in options.models.split(",") if options.models else suite(options.suite):
        if name not in done:
            row = torch_pruning(options.suite, name, options.limit)
            append(options.out, row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
