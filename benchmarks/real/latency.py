"""Milliseconds of forward passes of several models side by side, so that a busy machine is unkind to all alike.

On one thread it is the processor time of the pass, which other work on the machine hardly changes; on several it is
the clock, which wants a machine with nothing else to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

BATCHES = (1, 32)
THREADS = (1, 2)
ROUNDS = 15
LONGEST = 4.0
"""Seconds after which the rounds of one setting end, once there were three."""
SHORTEST = 0.02
"""Seconds that one timing lasts at least: small nets run several times in it."""


@torch.no_grad()
def milliseconds(models: Mapping[str, nn.Module], shape: Sequence[int]) -> dict[str, dict[str, float]]:
    """For each model, ``"batch x threads"`` -> milliseconds of a forward pass: the least of 3 to 15 timings, in turn."""
    before = torch.get_num_threads()
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            for batch in BATCHES:
                inputs = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
                clock = time.process_time if threads == 1 else time.perf_counter
                repeats = {name: _repeats(model, inputs) for name, model in models.items()}
                times: dict[str, list[float]] = {name: [] for name in models}
                started = time.perf_counter()
                for done in range(ROUNDS):
                    if done >= 3 and time.perf_counter() - started > LONGEST:
                        break
                    for name, model in models.items():
                        times[name].append(_seconds(model, inputs, repeats[name], clock) / repeats[name])
                for name in models:
                    found[name][f"{batch}x{threads}"] = 1000 * min(times[name])
    finally:
        torch.set_num_threads(before)
    return found


def _repeats(model: nn.Module, inputs: torch.Tensor) -> int:
    model.eval()
    _seconds(model, inputs, 2, time.perf_counter)
    return max(1, round(SHORTEST / max(_seconds(model, inputs, 1, time.perf_counter), 1e-6)))


def _seconds(model: nn.Module, inputs: torch.Tensor, repeats: int, clock: Callable[[], float]) -> float:
    started = clock()
    for _ in range(repeats):
        model(inputs)
    return clock() - started
