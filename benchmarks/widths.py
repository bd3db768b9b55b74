"""Which multiples of widths run fast on this machine: seconds of a layer at each width, on one thread.

    python -m benchmarks.widths            # a few minutes
    python -m benchmarks.widths --small    # half a minute
    python -m benchmarks.widths --runtimes # a few layers in a row in ONNX Runtime, OpenVINO and eager torch, some minutes

For convolutions and linear layers whose in- and out-width are both w, seconds are measured for every w in a range, the
widths in turns. For each multiple m the table has the mean of seconds per multiply-accumulate over the widths that are
multiples of m and of no larger one in the list, against those of all widths. `round_to=m` takes from a width up to m - 1
units more than a budget asks for: it pays where the gain is above that loss.
"""

from __future__ import annotations

import argparse
import time
from statistics import fmean, median

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.export_seconds import RUNS

MULTIPLES = (1, 2, 4, 8, 16, 32)
LAYERS = {
    "conv 3x3, 28 x 28, batch 1": (lambda w: nn.Conv2d(w, w, 3, padding=1), lambda w: (1, w, 28, 28), range(33, 161)),
    "conv 1x1, 28 x 28, batch 1": (lambda w: nn.Conv2d(w, w, 1), lambda w: (1, w, 28, 28), range(65, 257)),
    "conv 3x3, 14 x 14, batch 8": (lambda w: nn.Conv2d(w, w, 3, padding=1), lambda w: (8, w, 14, 14), range(33, 161)),
    "linear, 197 rows": (lambda w: nn.Linear(w, w), lambda w: (197, w), range(129, 513)),
    "linear, 1 row": (lambda w: nn.Linear(w, w), lambda w: (1, w), range(257, 1025)),
}  # fmt: skip
WIDTHS = (16, 24, 40, 44, 46, 47, 48, 52, 56, 60, 62, 63, 64, 128)  # with --runtimes
TURNS = 25


class Depthwise(nn.Module):
    """A depthwise convolution, a norm over channels and two linear layers, beside a sum."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(w, w, 7, padding=3, groups=w), nn.LayerNorm(w)
        self.up, self.down = nn.Linear(w, 4 * w), nn.Linear(4 * w, w)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.down(nn.functional.gelu(self.up(y))).permute(0, 3, 1, 2)


def chain(layers: list[nn.Module]) -> nn.Module:
    """`layers` with a ReLU behind each."""
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))


def convolutions(w: int, *middle: nn.Module) -> nn.Module:
    """`middle` between two 1 x 1 convolutions from and to 16 channels."""
    return chain([nn.Conv2d(16, w, 1), *middle, nn.Conv2d(w, 16, 1)])


CHAINS = {
    "four 3 x 3 convolutions": (
        lambda w: convolutions(w, *(nn.Conv2d(w, w, 3, padding=1) for _ in range(4))), lambda w: (1, 16, 28, 28)),
    "four 1 x 1 convolutions": (lambda w: convolutions(w, *(nn.Conv2d(w, w, 1) for _ in range(4))), lambda w: (1, 16, 28, 28)),
    "depthwise between two 1 x 1": (
        lambda w: convolutions(w, nn.Conv2d(w, w, 3, padding=1, groups=w)), lambda w: (1, 16, 28, 28)),
    "depthwise, norm, two linear": (Depthwise, lambda w: (1, w, 14, 14)),
    "four linear layers, 197 rows": (lambda w: chain([nn.Linear(w, w) for _ in range(4)]), lambda w: (1, 197, w)),
}  # fmt: skip


def in_runtimes() -> None:
    """Microseconds of processor time of each of `CHAINS` at each of `WIDTHS`, the widths in turns."""
    for name, (make, shape) in CHAINS.items():
        for way in list(RUNS)[:3]:
            runs = [RUNS[way](make(w).eval(), torch.randn(shape(w))) for w in WIDTHS]
            times: list[list[float]] = [[] for _ in runs]
            for _ in range(TURNS):
                for run, found in zip(runs, times, strict=True):
                    start = time.process_time()
                    run()
                    found.append(time.process_time() - start)
            cells = (f"{w}: {np.median(t) * 1e6:.0f}" for w, t in zip(WIDTHS, times, strict=True))
            print(f"{name}, {way}:", *cells, sep="  ", flush=True)


def seconds(make, shape, widths: list[int], rounds: int) -> dict[int, float]:
    """Median seconds at each width; all widths take a turn in every round."""
    layers = {w: (make(w).eval(), torch.randn(shape(w))) for w in widths}
    times: dict[int, list[float]] = {w: [] for w in widths}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for w, (layer, x) in layers.items():
                layer(x)
                start = time.perf_counter()
                layer(x)
                if turn:
                    times[w].append(time.perf_counter() - start)
    return {w: median(t) for w, t in times.items()}


def relative(found: dict[int, float]) -> dict[int, float]:
    """Largest multiple -> mean seconds per w**2 of such widths, against the mean of all."""
    per_work = {w: t / w**2 for w, t in found.items()}
    trend = fmean(per_work.values())
    largest = {w: max(m for m in MULTIPLES if w % m == 0) for w in found}
    return {m: fmean(per_work[w] for w in found if largest[w] == m) / trend for m in MULTIPLES}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="two layers, fewer rounds")
    parser.add_argument(
        "--runtimes", action="store_true", help="a few layers in a row where models are exported to"
    )
    options = parser.parse_args()
    small = options.small
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.runtimes:
        in_runtimes()
        return
    heading = "".join(f"{f'x {m}':>8}" for m in MULTIPLES)
    print(f"{'layer':30}{heading}   (seconds per MAC, 1 = mean of all widths)")
    for name in list(LAYERS)[: 2 if small else None]:
        make, shape, widths = LAYERS[name]
        chosen = list(widths)[-64:] if small else list(widths)
        found = relative(seconds(make, shape, chosen, 7 if small else 15))
        print(f"{name:30}" + "".join(f"{found[m]:8.2f}" for m in MULTIPLES), flush=True)


if __name__ == "__main__":
    main()
