"""Widths, depth, ranks, masks and mixes at one budget: the figures of docs/which-to-take.md.

    python -m benchmarks.kinds --small                       # a tiny vision transformer on digits at half its parameters
    python -m benchmarks.kinds --case vit --case demo        # curves at 0.7, 0.5 and 0.3 of the parameters
    python -m benchmarks.kinds --case demo --macs            # the same of the MACs
    python -m benchmarks.kinds --case minilm --share 0.7
    python -m benchmarks.kinds --case vit --alone 0.8        # depth alone: so much of the branches' parameters, by each criterion
    python -m benchmarks.kinds --case smollm --alone 0.8 --by loss --few 2 --divergence   # by two batches and the dense model's answers
    python -m benchmarks.kinds --case vgg-0.5 --latency 0.6  # half of the MACs, and at most so much of the latency

Every row is pruned on the same calibration batches, recovered without training, and scored. Latency is that of batch 1, the
dense model and the smaller one in turns, as a factor.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import benchmarks.suites  # noqa: F401  # makes torchvision importable
import depgraph
from benchmarks.default_call import the_demo
from benchmarks.real import cases
from benchmarks.real.case import Budget, Case, Hints
from benchmarks.real.case import run as case_run
from depgraph.costs.latency import pairs_of
from depgraph.depth.request import CRITERIA
from examples import demo

SHARES = (0.7, 0.5, 0.3)
WAYS = {"width": ["width"], "depth": ["depth"], "rank": ["rank"], "all": ["width", "depth", "rank"]}


class Block(nn.Module):
    """A layer of a vision transformer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    """A vision transformer of 8 x 8 images, in patches of 2 x 2."""

    def __init__(self, width: int = 48, depth: int = 6):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.places = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.patches(x).flatten(2).transpose(1, 2) + self.places)
        return self.head(self.norm(h).mean(1))


def vit(width: int = 48, depth: int = 6, epochs: int = 30) -> Case:
    """A vision transformer trained here, on the digits of the demo."""
    plain = the_demo()

    @cache
    def trained() -> nn.Module:
        data = demo.load_data()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Transformer(width, depth)
            batches = list(zip(data.train_x.split(64), data.train_y.split(64), strict=True))
            depgraph.finetune(model, batches, F.cross_entropy, epochs=epochs, lr=1e-3, progress=False)
        return model.eval()

    return replace(
        plain, name="vit", title=f"digits, a vision transformer of {depth} layers", build=trained,
        hints=Hints(lambda model: {}),
    )  # fmt: skip


NAMED = {"demo": the_demo, "vit": vit, "digits": cases.small}


def masked(model: nn.Module, example: Any, calibration: Any, share: float) -> nn.Module:
    """`model` with zeros for weights, as many as leave `share` of its parameters."""
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    whole = sum(p.numel() for p in model.parameters())
    sparsity = min(0.999, (1 - share) * whole / weights)
    return depgraph.mask(model, example, sparsity=sparsity, importance="wanda", calibration=calibration).model


def run(
    case: Case, shares: Sequence[float], what: str, seed: int, console: Console, only: Sequence[str] = (*WAYS, "mask")
) -> bool:  # fmt: skip
    """A table of the ways `only`; whether the mix was no worse on held-out batches than the best single kind."""
    dense = case.build()
    calibration = case.calibration(seed)
    score = case.score(dense)
    first = next(iter(score))
    table = Table(
        "left", "way", first, "off on held out", "parameters", "faster", "seconds",
        title=f"{case.title}: dense {first} {score[first]:.4g}",
    )  # fmt: skip
    good = True
    for share in shares:
        budget = Budget(what, share, case.budget.kept).arguments(dense)
        singles = []
        for way, kinds in WAYS.items():
            if way not in only:
                continue
            began = time.perf_counter()
            try:
                found = depgraph.compress(
                    dense, case.example(), calibration=calibration, loss=case.loss, kinds=kinds, progress=False,
                    **budget,
                )  # fmt: skip
            except depgraph.DepgraphError as error:
                table.add_row(f"{share:g}", way, "-", str(error).splitlines()[0][:60], "", "", "")
                continue
            seconds = time.perf_counter() - began
            off = min(row["off"] for row in found.report.rows if row["off"] != "-")
            if way == "all":
                way = f"all: {found.report.figures['taken']}"
                good = good and off <= min(singles, default=off) * (1 + 1e-6)
            singles.append(off)
            print(
                share,
                way,
                case.score(found.model),
                f"{off:.4g}",
                f"{seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            _row(table, share, way, case, found.model, f"{off:.4g}", seconds)
        if what == "params" and "mask" in only:
            began = time.perf_counter()
            zeros = masked(dense, case.example(), calibration, share)
            _row(table, share, "mask", case, zeros, "", time.perf_counter() - began)
    console.print(table)
    return good


def answered(dense: nn.Module, batches: Sequence[Any]) -> list[Any]:
    """`batches` with the original's answers for targets, as log-probabilities."""
    with torch.no_grad():
        return [(x, case_run(dense, x).log_softmax(-1)) for x, _ in batches]


def divergence(out: Tensor, target: Tensor) -> Tensor:
    """Of the answers from the original's: the mean over positions."""
    classes = out.shape[-1]
    found, wanted = out.log_softmax(-1).reshape(-1, classes), target.reshape(-1, classes)
    return F.kl_div(found, wanted, log_target=True, reduction="batchmean")


def deep(case: Case, options: argparse.Namespace, console: Console) -> None:
    """Lines for depth alone, by each criterion, as pruned and recovered.

    `keep` branches stay, or the share `alone` of the parameters of all branches; the first `few` calibration batches rank them.
    """
    keep, share, few = options.keep, options.alone, options.few
    dense, example = case.build(), case.example()
    calibration = case.calibration(options.seed)
    console.print(f"{case.title}: dense {case.score(dense)}")
    whole = sum(p.numel() for p in dense.parameters())
    branches = depgraph.branches(dense, example)
    inside = sum(b.parameters for b in branches)
    given = {} if share is None else {"max_params": whole - int((1 - share) * inside)}
    ranking, loss = calibration[:few], case.loss
    if options.divergence:
        ranking, loss = answered(dense, ranking), divergence
    for by in options.by or CRITERIA:
        began = time.perf_counter()
        found = depgraph.prune(
            dense, example, depth=depgraph.Depth(keep=keep, by=by, contiguous=options.contiguous, alone=keep is None),
            calibration=ranking,
            loss=loss, recover="none", verify=False, progress=False, **given,
        )  # fmt: skip
        gone = found.report.removed
        left = 1 - (whole - found.report.parameters[1]) / inside
        console.print(
            f"{by}: {case.score(found.model)}, {left:.2%} of the branches' parameters, "
            f"{time.perf_counter() - began:.0f} s\n  without {', '.join(gone)}"
        )
        recovered = depgraph.prune(
            dense, example, depth=depgraph.Depth(keep=len(branches) - len(gone), by="magnitude"), within=found.plan,
            calibration=calibration, loss=case.loss, recover="auto", verify=False, progress=False,
        )  # fmt: skip
        assert recovered.report.removed == gone
        console.print(
            f"  recovered: {case.score(recovered.model)}, {time.perf_counter() - began:.0f} s in all"
        )


def fast(case: Case, latency: float, seed: int, console: Console) -> None:
    """Lines for half of the MACs at so much of the latency of one input: widths alone, with the latency, and with branches, too."""
    dense, example = case.build(), case.example()
    first = next(iter(case.score(dense)))
    console.print(f"{case.title}: dense {case.score(dense)}")
    for text, how in (
        ("widths", {}), ("widths, latency", {"max_latency": latency}), ("and branches", {"max_latency": latency, "depth": True})
    ):  # fmt: skip
        try:
            small = depgraph.prune(
                dense, example, max_macs=0.5, calibration=case.calibration(seed), loss=case.loss, verify=False, progress=False,
                **how,
            ).model  # fmt: skip
        except depgraph.DepgraphError as error:
            console.print(f"{text}: {str(error).splitlines()[0]}")
            continue
        scores = [case.score(small)[first]]
        if case.tune is not None:
            case.tune(small, seed)
            scores.append(case.score(small)[first])
        macs = depgraph.count_macs(small, example) / depgraph.count_macs(dense, example)
        faster = 1 / pairs_of(dense, small, example).ratio
        console.print(
            f"{text}: {first} {', trained '.join(f'{s:.4f}' for s in scores)}, {macs:.2f} of the MACs, {faster:.2f} times faster"
        )


def _row(
    table: Table, share: float, way: str, case: Case, small: nn.Module, off: str, seconds: float
) -> None:
    score = case.score(small)
    faster = 1 / pairs_of(case.build(), small, case.example()).ratio
    left = sum(int((p != 0).sum()) for p in small.parameters()) / sum(
        p.numel() for p in case.build().parameters()
    )
    table.add_row(
        f"{share:g}", way, f"{next(iter(score.values())):.4g}", off, f"{left:.1%}", f"{faster:.2f}", f"{seconds:.0f}"
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="one budget, nothing is downloaded")
    parser.add_argument("--case", action="append", choices=[*NAMED, *cases.names()])
    parser.add_argument("--share", type=float, action="append", help="what is left")
    parser.add_argument("--way", action="append", choices=[*WAYS, "mask"], help="only these ways")
    parser.add_argument("--macs", action="store_true", help="budgets in MACs, not in parameters")
    parser.add_argument("--keep", type=int, help="depth alone: how many branches stay")
    parser.add_argument(
        "--alone", type=float, help="depth alone: what is left of the parameters of all branches"
    )
    parser.add_argument("--by", action="append", help="of --keep and --alone: only these criteria")
    parser.add_argument(
        "--few", type=int, help="of these: rank branches on so many of the calibration batches"
    )
    parser.add_argument("--contiguous", action="store_true", help="of these: neighbours go")
    parser.add_argument(
        "--divergence", action="store_true", help="of these: the loss is the divergence from the dense model"
    )
    parser.add_argument("--latency", type=float, help="at half the MACs: what is left of the latency, too")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.keep is not None or options.alone is not None:
        for name in options.case or ["vit"]:
            case = NAMED[name]() if name in NAMED else cases.case(name)
            deep(case, options, Console(width=160))
        return 0
    if options.latency is not None:
        for name in options.case or ["vit"]:
            case = NAMED[name]() if name in NAMED else cases.case(name)
            fast(case, options.latency, options.seed, Console(width=160))
        return 0
    shares = [0.5] if options.small else options.share or SHARES
    console, good = Console(), True
    for name in options.case or ["vit"]:
        case = vit(16, 2, 3) if options.small else NAMED[name]() if name in NAMED else cases.case(name)
        only = options.way or [*WAYS, "mask"]
        good = run(case, shares, "macs" if options.macs else "params", options.seed, console, only) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
