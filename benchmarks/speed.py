"""How long pruning takes: against Torch-Pruning, against the floor, when models grow, and how much memory.

    python -m benchmarks.speed                 # about twenty minutes
    python -m benchmarks.speed --small         # a few small models, under a minute
    python -m benchmarks.speed --json out.json

Every figure is processor time on one thread, the median over fresh processes in which the tools take turns; each tool
first prunes a tiny network, so that neither pays for lazy imports. What is timed is the whole way from the model in
memory to the smaller model: trace, group, rank, plan, apply. Building the models and checking the results are outside.

* **Against Torch-Pruning**: half of each dim, L1, on the same model and inputs, the first call in a process and a
  later one, both told to leave the outputs alone (Torch-Pruning by naming the last layer). Where it fails without more
  hints it gets those that the remarks name. The mean is over models that both can do. For Torch-Pruning that means
  that the pruned model runs and its outputs have their shapes; depgraph's result is compared with the masked original.
* **The floor**: reading every weight once for L1 (`vector_norm`), writing the kept ones once (`index_select`). Beside
  it stands what depgraph takes without the trace, in later calls, as are the figures of growth.
* **Growth**: twice the layers, twice the width; the factor is of the time beyond the floor.
* **Memory**: the peak of resident memory of the first call, less what was resident before.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from outputs import shapes
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.isolate import Outcome, Row, isolated
from benchmarks.suites import Case, suite

RATIO = 0.5
LIMIT = 120.0  # seconds of processor time for one call of one tool
CHECKED = 150_000_000  # parameters up to which the result is compared with the masked original
MEGABYTE = 2**20

# ------------------------------------------------------------------------------------------------ the models


@dataclass(frozen=True)
class Subject:
    """A model to time, and what Torch-Pruning has to be told about it.

    Attributes:
        case: builds the model and its inputs.
        hints: model -> further keyword arguments for Torch-Pruning's pruner.
        mend: what has to be done by hand to the model that Torch-Pruning leaves.
        hint: both in words; empty where neither is needed.
    """

    case: Case
    hints: Callable[[nn.Module], dict[str, Any]] = lambda _: {}
    mend: Callable[[nn.Module], None] = lambda _: None
    hint: str = ""


def llama(width: int, layers: int, inner: int, heads: int, kv_heads: int, vocabulary: int) -> Case:
    """A Llama with random weights; inputs are token ids [1, 17]."""

    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            tie_word_embeddings=False,
            use_cache=False,
        )
        return _seeded(partial(LlamaForCausalLM, config))

    return Case(f"llama {width} x {layers}", build, partial(_tokens, vocabulary))


def bert(width: int, layers: int) -> Case:
    """A BERT classifier with random weights; inputs are token ids [1, 17]."""

    def build() -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            vocab_size=1000,
        )
        return _seeded(partial(BertForSequenceClassification, config))

    return Case(f"bert {width} x {layers}", build, partial(_tokens, 1000))


def vit() -> Case:
    """A ViT-Tiny of timm, for images of 64 x 64 pixels."""

    def build() -> nn.Module:
        import timm

        return _seeded(partial(timm.create_model, "vit_tiny_patch16_224", img_size=64))

    return Case("timm vit_tiny", build, lambda: (torch.randn(2, 3, 64, 64),))


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def _tokens(vocabulary: int) -> tuple[Tensor]:
    return (torch.randint(vocabulary, (1, 17), generator=torch.Generator().manual_seed(1)),)


def _vit_heads(model: nn.Module) -> dict[str, Any]:
    return {"num_heads": {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv")}}


def _mend_vit(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "qkv"):
            module.attn_dim = module.qkv.out_features // 3
            module.head_dim = module.attn_dim // module.num_heads


VIT = Subject(
    vit(), _vit_heads, _mend_vit, "num_heads of each block; head_dim and attn_dim set by hand afterwards"
)

# What both tools prune. Llamas: width, layers, MLP width, heads, KV heads, vocabulary. The first has 86 M parameters;
# in the last each KV head serves two query heads, and Torch-Pruning's groups never end.
LLAMA_86M = llama(2048, 8, 256, 32, 2, 512)
LLAMA_PAIRED = llama(512, 4, 1024, 8, 4, 1000)
VISION = (
    "resnet18",
    "resnet50",
    "densenet121",
    "vgg16_bn",
    "mobilenet_v2",
    "efficientnet_b0",
    "regnet_y_400mf",
    "resnext50_32x4d",
    "convnext_tiny",
)
# Base, twice the layers, twice the width.
GROWTH = (
    (LLAMA_86M, llama(2048, 16, 256, 32, 2, 512), llama(4096, 8, 512, 64, 4, 512)),
    (llama(256, 16, 512, 4, 4, 1000), llama(256, 32, 512, 4, 4, 1000), llama(512, 16, 1024, 8, 8, 1000)),
)
GROWTH_SMALL = (
    (llama(256, 4, 512, 4, 4, 500), llama(256, 8, 512, 4, 4, 500), llama(512, 4, 1024, 8, 8, 500)),
)


def subjects(small: bool) -> dict[str, Subject]:
    """What the tools are compared on, by name."""
    vision = suite("torchvision")
    if small:
        cases = [vision["resnet18"], vision["mobilenet_v2"], GROWTH_SMALL[0][0]]
        return {case.name: Subject(case) for case in cases}
    cases = [
        LLAMA_86M,
        *(vision[name] for name in VISION if name in vision),
        bert(512, 4),
        GROWTH[1][1],
    ]
    paired = Subject(LLAMA_PAIRED, hint="none; two query heads to each KV head")
    return {case.name: Subject(case) for case in cases} | {
        VIT.case.name: VIT,
        "llama 512 x 4, GQA in pairs": paired,
    }


def growth(small: bool) -> dict[str, Subject]:
    """What growth is measured on, by name: base, twice the layers, twice the width, for each base."""
    return {case.name: Subject(case) for row in (GROWTH_SMALL if small else GROWTH) for case in row}


def _find(name: str, small: bool) -> Subject:
    return (growth(small) | subjects(small))[name]


# ------------------------------------------------------------------------------------------- the measurements


def _clocked(call: Callable[[], Any]) -> tuple[Any, float]:
    """What `call` returns and the seconds of processor time that it takes."""
    gc.collect()
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def _split(prune: Callable[[], Any]) -> tuple[float, float]:
    """The seconds of a call of `depgraph.prune`, and of the trace in it."""
    module = importlib.import_module("depgraph.prune")
    record, inside = module.trace, 0.0

    def trace(*args: Any, **ways: Any) -> Any:
        nonlocal inside
        start = time.process_time()
        try:
            return record(*args, **ways)
        finally:
            inside += time.process_time() - start

    with mock.patch.object(module, "trace", trace):
        return _clocked(prune)[1], inside


def _tiny() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 6)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def _resident() -> int:
    """Bytes of resident memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak() -> int:
    """Bytes of resident memory at the most so far (Linux counts in kilobytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def time_depgraph(started: Callable[[], None], name: str, small: bool) -> Row:
    """Body of a process: depgraph's stages, the floor and the peak of memory on one model.

    Returns:
        seconds of the first call as `prune` (all but verification); of later ones as `all`, of which `trace`, and
        `floor`; `parameters`, `left` (fraction of them); bytes as `model_bytes`, `peak_bytes`; `check` and
        `error_size` of the verification.
    """
    import depgraph

    case = _find(name, small).case
    model, inputs = case.build(), case.inputs()
    tiny, x = _tiny()
    depgraph.prune(tiny, x, verify=False)
    gc.collect()
    resident = _resident()
    started()
    prune = partial(depgraph.prune, model, inputs, pruning_ratio=RATIO, verify=False)
    result, seconds = _clocked(prune)
    row: Row = {
        "prune": seconds,
        "peak_bytes": _peak() - resident,
        "model_bytes": _bytes(model),
        "parameters": _count(model),
        "left": _count(result.model) / _count(model),
    }
    weights = [(weight.detach(), _kept(result.plan.mask(name))) for name, weight in model.named_parameters()]
    later = [(*_split(prune), _clocked(partial(_floor, weights))[1]) for _ in range(5 if small else 3)]
    row |= {
        name: statistics.median(times)
        for name, times in zip(("all", "trace", "floor"), zip(*later, strict=True), strict=True)
    }
    if row["parameters"] <= CHECKED:
        proof = depgraph.verify(model, result.model, result.plan, inputs)
        row |= {"check": proof.status, "error_size": proof.max_error}
    return row


def _floor(weights: list[tuple[Tensor, list[tuple[int, Tensor]]]]) -> list[Tensor]:
    """Read every weight once for its L1 norm and write the kept ones once: the smaller model's weights."""
    small = []
    for weight, kept in weights:
        torch.linalg.vector_norm(weight, 1)
        left = weight
        for dim, indices in kept:
            left = left.index_select(dim, indices)
        small.append(left if kept else left.clone())
    return small


def _kept(mask: Tensor) -> list[tuple[int, Tensor]]:
    """(dim, indices that stay) of every dim that a mask shrinks."""
    found = []
    for dim in range(mask.ndim):
        lines = mask.movedim(dim, 0).flatten(1).any(1) if mask.ndim > 1 else mask
        if not lines.all():
            found.append((dim, lines.nonzero().flatten()))
    return found


def time_torch_pruning(started: Callable[[], None], name: str, small: bool) -> Row:
    """Body of a process: Torch-Pruning on one model.

    Returns:
        seconds of the first call as `prune`, of a second on a copy as `all`; `left` (fraction of parameters); `works` (the pruned model runs and keeps its outputs'
        shapes), else `problem`.
    """
    import torch_pruning as tp

    subject = _find(name, small)
    model, inputs = subject.case.build(), subject.case.inputs()
    before, wanted = _count(model), shapes(model(*inputs))
    magnitude = tp.importance.GroupMagnitudeImportance(p=1)

    def prune(net: nn.Module, example: Any, **options: Any) -> None:
        last = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
        tp.pruner.BasePruner(
            net,
            example,
            importance=magnitude,
            pruning_ratio=RATIO,
            ignored_layers=[last],
            output_transform=lambda out: out.logits if hasattr(out, "logits") else out,
            **options,
        ).step()

    prune(*_tiny())
    example = inputs[0] if len(inputs) == 1 else inputs
    copied = copy.deepcopy(model)
    started()
    _, seconds = _clocked(lambda: prune(model, example, **subject.hints(model)))
    _, again = _clocked(lambda: prune(copied, example, **subject.hints(copied)))
    subject.mend(model)
    row: Row = {"prune": seconds, "all": again, "left": _count(model) / before, "works": False, "problem": ""}
    try:
        with torch.no_grad():
            found = shapes(model(*inputs))
    except Exception as error:
        return {
            **row,
            "problem": f"its result fails: {type(error).__name__}: {' '.join(str(error).split())[:120]}",
        }
    return {**row, "works": found == wanted, "problem": "" if found == wanted else "outputs changed shape"}


def median(outcomes: Sequence[Outcome]) -> Row:
    """The median of every figure over repeats; the first failure instead, where there is one, as `error`."""
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        return {"error": failed[0].error}
    rows = [outcome.row for outcome in outcomes]
    return {
        key: statistics.median(row[key] for row in rows) if isinstance(value, float) else value
        for key, value in rows[0].items()
    } | {"error": ""}


def measure(name: str, small: bool, repeats: int, limit: float, peer: bool) -> tuple[Row, Row]:
    """Both tools on one model, taking turns: (depgraph's row, Torch-Pruning's, empty without `peer`)."""
    ours, theirs = [], []
    for turn in range(repeats):
        ours.append(isolated(time_depgraph, name, small, limit=limit))
        if peer and (turn == 0 or not theirs[-1].error):
            theirs.append(isolated(time_torch_pruning, name, small, limit=2 * limit))
    return median(ours), median(theirs) if peer else {}


# -------------------------------------------------------------------------------------------------- the tables


def comparison(rows: dict[str, tuple[Row, Row]], names: dict[str, Subject]) -> Table:
    table = Table(title="seconds to prune half of each dim")
    for column in (
        "model",
        "parameters",
        "depgraph",
        "Torch-Pruning",
        "ratio",
        "later: depgraph",
        "T-P",
        "ratio",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    for column in ("left: depgraph", "T-P"):
        table.add_column(column, justify="right")
    table.add_column("deviation", justify="right")
    table.add_column("remarks")
    for name, (ours, theirs) in rows.items():
        remarks = [text for text in (names[name].hint, ours["error"], _problem(theirs)) if text]
        if ours["error"]:
            table.add_row(name, *[""] * 10, "; ".join(remarks))
            continue
        ratio, later = speedup(ours, theirs, "prune"), speedup(ours, theirs, "all")
        table.add_row(
            name,
            f"{ours['parameters'] / 1e6:.1f} M",
            f"{ours['prune']:.3f}",
            f"{theirs['prune']:.2f}" if "prune" in theirs else "",
            "" if ratio is None else f"{ratio:.1f}",
            f"{ours['all']:.3f}",
            f"{theirs['all']:.2f}" if "all" in theirs else "",
            "" if later is None else f"{later:.1f}",
            f"{ours['left']:.2f}",
            f"{theirs['left']:.2f}" if "left" in theirs else "",
            f"{ours['error_size']:.0e}"
            if ours.get("check") == "equal"
            else str(ours.get("check", "not run")),
            "; ".join(remarks),
        )
    return table


def _problem(theirs: Row) -> str:
    text = theirs.get("error") or theirs.get("problem") or ""
    return f"Torch-Pruning: {text}" if text else ""


def speedup(ours: Row, theirs: Row, figure: str) -> float | None:
    """Torch-Pruning's seconds over depgraph's, where both can do the model; `figure`: "prune" (first call) or "all"."""
    both = not ours["error"] and theirs.get("works", False)
    return theirs[figure] / ours[figure] if both else None


def floors(rows: dict[str, Row]) -> Table:
    table = Table(title="group + rank + plan + apply against the floor (seconds), and memory (MB)")
    for column in (
        "model",
        "parameters",
        "trace",
        "the rest",
        "floor",
        "ratio",
        "model",
        "peak",
        "beyond a copy",
    ):
        table.add_column(column, justify="left" if column == "model" and not table.columns else "right")
    for name, row in rows.items():
        if row["error"]:
            table.add_row(name, row["error"])
            continue
        rest = row["all"] - row["trace"]
        table.add_row(
            name,
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['trace']:.3f}",
            f"{rest:.3f}",
            f"{row['floor']:.3f}",
            f"{rest / row['floor']:.1f}",
            f"{row['model_bytes'] / MEGABYTE:,.0f}",
            f"{row['peak_bytes'] / MEGABYTE:,.0f}",
            f"{(row['peak_bytes'] - row['model_bytes']) / MEGABYTE:,.0f}",
        )
    return table


def growth_lines(rows: dict[str, Row], families: Sequence[Sequence[Case]]) -> list[str]:
    """A sentence for each doubling."""
    lines = []
    for base, *doubled in families:
        for what, case in zip(("layers", "width"), doubled, strict=True):
            one, two = rows[base.name], rows[case.name]
            if one["error"] or two["error"]:
                lines.append(f"{base.name}, twice the {what}: not measured")
                continue
            beyond = (two["all"] - two["floor"]) / (one["all"] - one["floor"])
            whole = two["all"] / one["all"]
            lines.append(
                f"{base.name}, twice the {what}: {beyond:.2f} times the time beyond the floor (aim: at most 2.2), "
                f"{whole:.2f} times the whole"
            )
    return lines


def summary(rows: dict[str, tuple[Row, Row]], small: bool) -> list[str]:
    lines = []
    for figure, call in (("prune", "first call in a process"), ("all", "later calls")):
        ratios = {n: ratio for n, pair in rows.items() if (ratio := speedup(*pair, figure)) is not None}
        if not ratios:
            continue
        mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios.values()))
        line = (
            f"{call}: Torch-Pruning 1.6.1 takes {mean:.2f} times as long as depgraph, the geometric mean over "
            f"{len(ratios)} models that both can do, {min(ratios.values()):.1f} to {max(ratios.values()):.1f} (aim: 10)"
        )
        if not small and LLAMA_86M.name in ratios:
            line += f"; {ratios[LLAMA_86M.name]:.1f} times on the Llama of 86 M parameters (aim: 25)"
        lines.append(line)
    return lines


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time depgraph and Torch-Pruning.")
    parser.add_argument("--small", action="store_true", help="a few small models, once each")
    parser.add_argument("--models", help="names, separated by commas (default: all)")
    parser.add_argument("--repeats", type=int, help="processes for each figure (default: 3, with --small 1)")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="seconds for one call (default: %(default)g)"
    )
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="leave Torch-Pruning out")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    return parser.parse_args(words)


def main() -> int:
    options = arguments()
    repeats = options.repeats or (1 if options.small else 3)
    console = Console(width=None if sys.stdout.isatty() else 190)
    compared, grown = subjects(options.small), growth(options.small)
    if options.models:
        wanted = options.models.split(",")
        unknown = [name for name in wanted if name not in compared | grown]
        if unknown:
            console.print(f"no such models: {', '.join(unknown)}; there are: {', '.join(compared | grown)}")
            return 2
        compared, grown = ({n: s for n, s in part.items() if n in wanted} for part in (compared, grown))

    pairs: dict[str, tuple[Row, Row]] = {}
    for name in compared:
        pairs[name] = measure(name, options.small, repeats, options.limit, options.peer)
        console.print(f"[dim]{name}: {pairs[name][0].get('prune', pairs[name][0]['error'])}[/dim]")
    single = {name: pairs[name][0] for name in grown if name in pairs}
    for name in grown:
        if name not in single:
            single[name], _ = measure(name, options.small, repeats, options.limit, peer=False)
    single = {name: single[name] for name in grown}

    if pairs:
        console.print(comparison(pairs, compared))
    if single:
        console.print(floors(single))
    families = [f for f in (GROWTH_SMALL if options.small else GROWTH) if all(c.name in single for c in f)]
    lines = summary(pairs, options.small) + growth_lines(single, families)
    for line in lines:
        console.print(line, highlight=False)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(as_data(pairs, single, lines), indent=1) + "\n")
    everything = {**{name: pair[0] for name, pair in pairs.items()}, **single}
    broken = [name for name, row in everything.items() if row["error"]]
    if broken:
        console.print(f"[red]depgraph failed on: {', '.join(broken)}[/red]")
    return 1 if broken else 0


def as_data(pairs: dict[str, tuple[Row, Row]], single: dict[str, Row], lines: list[str]) -> dict[str, Any]:
    """All figures: seconds of processor time, bytes, fractions."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processors": os.cpu_count(),
        "compared": {
            name: {"depgraph": ours, "torch_pruning": theirs} for name, (ours, theirs) in pairs.items()
        },
        "grown": single,
        "summary": lines,
    }


if __name__ == "__main__":
    sys.exit(main())
