"""What becomes of pruned models on the ways out of eager torch: exported, compiled, traced, quantised, copied.

    python -m benchmarks.exports --small                  # five models on four of the ways: a minute or two
    python -m benchmarks.exports --markdown exports.md
    python -m benchmarks.exports --seconds                # how much faster ten timm models get: see `export_seconds.py`

Each model is pruned to half, sent each way, and what comes out is compared with the pruned model in eager torch, on the
example inputs and on a batch of another size. The exit status is 1 when a way fails or a value is further off than that
way's arithmetic explains.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from export_ways import WAYS, Sent, other_batch
from literals import Literals
from outputs import Inputs, deviation, shapes
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import depgraph
from benchmarks import export_seconds
from benchmarks.randomise import randomise
from benchmarks.suites import Case, suite
from benchmarks.suites.case import noise, seeded

# Kind of model -> (suite, name).
KINDS = {
    "convolutional: torchvision resnet18": ("torchvision", "resnet18"),
    "ViT: timm test_vit": ("timm", "test_vit"),
    "ViT: transformers": ("transformers", "vit"),
    "BERT: transformers": ("transformers", "bert"),
    "Llama: transformers": ("transformers", "llama"),
    "literals in forward": ("", ""),
    "convolutional: torchvision mobilenet_v3_small": ("torchvision", "mobilenet_v3_small"),
    "convolutional: torchvision shufflenet_v2_x0_5": ("torchvision", "shufflenet_v2_x0_5"),
    "LSTM": ("", "lstm"),
    "mixture of experts: transformers mixtral": ("transformers", "mixtral"),
}
ALIGNED = (
    "mixture of experts: transformers mixtral",
)  # run by a kernel that takes widths of 16 bytes in half precision
SMALL = tuple(KINDS)[:2] + tuple(KINDS)[3:6]
SMALL_WAYS = ("ONNX", "torchao", "state_dict")  # tests/test_export.py has the others


def case(kind: str) -> Case:
    """The model of a kind, and its inputs."""
    suite_name, name = KINDS[kind]
    if suite_name:
        return suite(suite_name)[name]
    if name == "lstm":
        return Case(kind, lambda: seeded(Recurrent), lambda: (noise(2, 6, 5),))
    return Case(kind, lambda: seeded(Literals), lambda: (noise(2, 3, 13, 11),))


class Recurrent(nn.Module):
    """Two layers, both directions, and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(5, 14, 2, batch_first=True, bidirectional=True), nn.Linear(28, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x)[0].mean(1))


def pruned(kind: str) -> tuple[depgraph.PruneResult, nn.Module, Inputs]:
    """A model of `kind` with random values pruned to half, the original, and inputs."""
    made = case(kind)
    inputs = made.inputs()
    model = randomise(made.build(), 0, inputs).eval()
    if hasattr(model, "config"):
        model.config.use_cache = False
    round_to = 8 if kind in ALIGNED else 1
    return depgraph.prune(model, inputs, pruning_ratio=0.5, round_to=round_to), model, inputs


def judge(kind: str, way: str, sent: Sent) -> dict[str, Any]:
    """One row: the largest deviation, relative to the largest entry, and whether that is fine."""
    row: dict[str, Any] = {
        "kind": kind,
        "way": way,
        "deviation": None,
        "ok": False,
        "alike": False,
        "why": "",
    }
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            pairs = WAYS[way].send(sent)
        found = [deviation(expected, output) for expected, output in pairs]
        same = all(shapes(expected) == shapes(output) for expected, output in pairs)
        worst = max((float("nan") if f is None else f for f in found), default=float("nan"))
        row.update(deviation=worst, ok=same and worst <= WAYS[way].tolerance)
        row["why"] = "" if row["ok"] else "values" if same else "shapes"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:300]
        row["why"] = f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"
        row["ok"] = row["alike"] = _fails(way, replace(sent, model=sent.original), type(error))
    row["seconds"] = time.perf_counter() - start
    return row


def _fails(way: str, sent: Sent, kind: type[Exception]) -> bool:
    """Whether `way` fails in this kind of error."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            WAYS[way].send(sent)
    except kind:
        return True
    except Exception:
        return False
    return False


def run(kinds: Sequence[str], ways: Sequence[str], console: Console) -> list[dict[str, Any]]:
    """Every kind on every way."""
    rows = []
    for kind in kinds:
        result, original, inputs = pruned(kind)
        for way in ways:
            sent = Sent(result.model, original, result.plan, inputs, other_batch(inputs))
            rows.append(judge(kind, way, sent))
            torch.compiler.reset()
            row = rows[-1]
            verdict = f"{row['deviation']:.1e}" if row["deviation"] is not None else "failed"
            console.print(f"{kind} | {way} | {verdict} {row['why']} | {row['seconds']:.1f} s", markup=False)
    return rows


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A header and a line for each way: the deviation for each kind."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    cells = {(row["kind"], row["way"]): row for row in rows}
    lines = [["way out", *kinds]]
    for way in dict.fromkeys(row["way"] for row in rows):
        line = [way]
        for kind in kinds:
            row = cells[kind, way]
            if row["alike"]:
                line.append("the dense model fails alike")
            else:
                line.append(f"{row['deviation']:.0e}" if row["ok"] else f"no: {row['why'][:60]}")
        lines.append(line)
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Send pruned models every way out of eager torch.")
    parser.add_argument("--small", action="store_true", help="five models on four of the ways")
    parser.add_argument("--seconds", action="store_true", help="measure how much faster models of timm get")
    parser.add_argument("--kinds", help="parts of the names of kinds (or models), separated by commas")
    parser.add_argument("--ways", help="parts of the names of ways, separated by commas")
    parser.add_argument("--markdown", type=Path, help="file to write the table to")
    options = parser.parse_args()

    def chosen(names: Sequence[str], parts: str | None) -> list[str]:
        return [n for n in names if parts is None or any(p.lower() in n.lower() for p in parts.split(","))]

    torch.set_num_threads(1)
    console = Console(width=200)
    if options.seconds:
        names = export_seconds.SMALL if options.small else export_seconds.MODELS
        ways = export_seconds.WAYS[:1] if options.small else export_seconds.WAYS
        lines, fine = export_seconds.run(chosen(names, options.kinds), chosen(ways, options.ways), console)
    else:
        kinds = chosen(SMALL if options.small else tuple(KINDS), options.kinds)
        ways = tuple(w for w in WAYS if not options.small or w.startswith(SMALL_WAYS))
        rows = run(kinds, chosen(ways, options.ways), console)
        lines, fine = table(rows), all(row["ok"] for row in rows)
        shown = Table(*lines[0])
        for line in lines[1:]:
            shown.add_row(*line)
        console.print(shown)
    if options.markdown:
        text = ["| " + " | ".join(line) + " |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:])]
        options.markdown.write_text("\n".join(text) + "\n")
    sys.exit(not fine)


if __name__ == "__main__":
    main()
