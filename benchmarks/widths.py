"""Which multiples of widths run fast on this machine: seconds of a layer at each width, on one thread.

    python -m benchmarks.widths            # a few minutes
    python -m benchmarks.widths --small    # half a minute

For convolutions and linear layers whose in- and out-width are both w, seconds are measured for every w in a range, the
widths in turns. For each multiple m the table has the mean of seconds per multiply-accumulate over the widths that are
multiples of m and of no larger one in the list, against those of all widths. `round_to=m` takes from a width up to m - 1
units more than a budget asks for: it pays where the gain is above that loss.
"""

from __future__ import annotations

import argparse
import time
from statistics import fmean, median

import torch
from torch import nn

MULTIPLES = (1, 2, 4, 8, 16, 32)
LAYERS = {
    "conv 3x3, 28 x 28, batch 1": (lambda w: nn.Conv2d(w, w, 3, padding=1), lambda w: (1, w, 28, 28), range(33, 161)),
    "conv 1x1, 28 x 28, batch 1": (lambda w: nn.Conv2d(w, w, 1), lambda w: (1, w, 28, 28), range(65, 257)),
    "conv 3x3, 14 x 14, batch 8": (lambda w: nn.Conv2d(w, w, 3, padding=1), lambda w: (8, w, 14, 14), range(33, 161)),
    "linear, 197 rows": (lambda w: nn.Linear(w, w), lambda w: (197, w), range(129, 513)),
    "linear, 1 row": (lambda w: nn.Linear(w, w), lambda w: (1, w), range(257, 1025)),
}  # fmt: skip


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
    small = parser.parse_args().small
    torch.set_num_threads(1)
    torch.manual_seed(0)
    heading = "".join(f"{f'x {m}':>8}" for m in MULTIPLES)
    print(f"{'layer':30}{heading}   (seconds per MAC, 1 = mean of all widths)")
    for name in list(LAYERS)[: 2 if small else None]:
        make, shape, widths = LAYERS[name]
        chosen = list(widths)[-64:] if small else list(widths)
        found = relative(seconds(make, shape, chosen, 7 if small else 15))
        print(f"{name:30}" + "".join(f"{found[m]:8.2f}" for m in MULTIPLES), flush=True)


if __name__ == "__main__":
    main()
