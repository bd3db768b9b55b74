"""Whether a latency budget holds beside a busy core: `max_latency`, and what a fresh measurement says of the result.

    python -m benchmarks.latency_budget            # ten tries beside one busy loop, some minutes
    python -m benchmarks.latency_budget --small    # two

A try prunes a convolutional network to a share of its latency. Then pairs of passes of both models are timed anew, by this
file's own loop, on one thread. The exit status is 1 where a share found is off by more than a twentieth of what was asked, or a try is refused, but for
`--small`, which continuous integration runs on machines whose noise nobody knows: there the figures are printed alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time

import numpy as np
import torch
from torch import nn

import depgraph

NEAR = 0.05
SHARES = (0.6, 0.5, 0.7, 0.4, 0.5, 0.6, 0.3, 0.8, 0.5, 0.6)
PAIRS = 100


def network() -> nn.Module:
    """Nine convolutions, three of them with a stride."""
    layers: list[nn.Module] = []
    for a, b, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 128, 1)):  # fmt: skip
        layers += [nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)).eval()


def busy() -> None:
    """What another job does on its core."""
    while True:
        sum(range(10000))


def fresh(model: nn.Module, small: nn.Module, x: torch.Tensor) -> float:
    """The share of its seconds that is left, the median over pairs of passes."""
    found = []
    with torch.inference_mode():
        for turn in range(PAIRS + 3):
            seconds = []
            for one in (model, small):
                start = time.thread_time()
                one(x)
                seconds.append(time.thread_time() - start)
            if turn >= 3:
                found.append(seconds[1] / seconds[0])
    return float(np.median(found))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="two tries")
    parser.add_argument("--idle", action="store_true", help="without the busy loop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    other = multiprocessing.get_context("spawn").Process(target=busy, daemon=True)
    if not options.idle:
        other.start()
    bad = 0
    try:
        for i, share in enumerate(SHARES[: 2 if options.small else None]):
            torch.manual_seed(i)
            model, x = network(), torch.randn(1, 3, 112, 112)
            begin = time.process_time()
            try:
                result = depgraph.prune(model, x, max_latency=share, verify=False)
            except depgraph.BudgetError as e:
                bad += 1
                print(f"asked {share}: refused, {e} NO", flush=True)
                continue
            took = time.process_time() - begin
            found, report = fresh(model, result.model, x), result.report
            before, after = report.latency or (1.0, 1.0)
            fine = (1 - NEAR) * share <= found <= (1 + NEAR) * share
            bad += not fine
            print(f"asked {share}: {found:.3f} measured anew ({found / share - 1:+.1%}), {after / before:.3f} in the report, "
                  f"which may be off by {report.latency_spread:.1%}; {took:.0f} s of the processor{'' if fine else ' NO'}", flush=True)  # fmt: skip
    finally:
        if other.is_alive():
            other.terminate()
    print(f"{bad} of the tries are off by more than {NEAR:.0%}")
    sys.exit(bool(bad) and not options.small)


if __name__ == "__main__":
    main()
