"""What zeros among single weights are worth on this machine: time of sparse products, and of finding a global threshold.

``python -m benchmarks.masks`` (``--small``: a smaller matrix, fewer weights, seconds). One thread.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import depgraph
from depgraph.simplify.threshold import lowest

SHARES = (0.5, 0.8, 0.9, 0.95)


def seconds(run: Callable[[], Any], least: float = 0.3) -> float:
    """The quickest of several runs."""
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < least:
        before = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - before)
    return best


@torch.no_grad()
def products(size: int) -> Iterator[dict[str, float]]:
    """A linear layer of `size` x `size` at batch 1: masked, in CSR, and cut to the same share of its weights."""
    torch.manual_seed(0)
    x = torch.randn(1, size)
    for share in SHARES:
        result = depgraph.mask(nn.Linear(size, size, bias=False), sparsity=share)
        weight = result.model.weight
        side = round(size * (1 - share) ** 0.5)
        cut, narrow, csr, column = (
            nn.Linear(side, side, bias=False),
            torch.randn(1, side),
            weight.to_sparse_csr(),
            x.T,
        )
        dense = seconds(lambda w=weight: nn.functional.linear(x, w))
        yield {
            "zeros": share,
            "masked_ms": dense * 1e3,
            "csr": dense / seconds(lambda a=csr, b=column: a @ b),
            "cut": dense / seconds(lambda layer=cut, given=narrow: layer(given)),
        }


def thresholds(count: int, tensor: int = 1 << 24) -> dict[str, float]:
    """Finding the mask of `count` bfloat16 weights, against reading them twice."""
    dice = torch.Generator().manual_seed(0)
    parts = [torch.randn(tensor, generator=dice).bfloat16() for _ in range(max(count // tensor, 1))]

    def scores() -> Iterator[tuple[str, Tensor]]:
        return ((str(i), part.float().abs()) for i, part in enumerate(parts))

    def masks() -> int:
        return sum(int(gone.sum()) for _, gone in lowest(scores, total // 2))

    total = sum(p.numel() for p in parts)
    start = time.perf_counter()
    found = masks()
    taken = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(2):
        for _, given in scores():
            given.sum()
    return {"weights": total, "zeros": found, "seconds": taken, "reading_twice": time.perf_counter() - start}


def main() -> None:
    """Print one JSON line for each row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a few seconds")
    small = parser.parse_args().small
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # sparse tensors are in beta
    for row in (*products(256 if small else 1024), thresholds(1 << 24 if small else 1 << 30)):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
