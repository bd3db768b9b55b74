"""Random networks against the oracle: `python -m benchmarks.never_wrong --count 2000 --start 0`.

Each seed gives a network, a pruning ratio, random scores and sometimes parameters to leave alone; nothing is verified by
the library. The result must equal the masked original in float64, its state must be what the plan keeps, and it must train.
It must equal it in train mode, too, on another batch, and with all weights and inputs drawn anew. Prints a table by kind
of block and every failing seed; exit status 1 if there is one.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections import Counter
from typing import NamedTuple

import torch
from checks import as_float64, in_float64, prune_and_check, random_importance
from oracle import is_inexact, largest_deviation, runs
from random_networks import random_network, random_options
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import depgraph

TOLERANCE = 1e-8


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Pair(NamedTuple):
    """A smaller model and its plan, as the oracle takes them."""

    model: nn.Module
    plan: depgraph.Plan


def other_conditions(
    original: nn.Module, result: depgraph.PruneResult, inputs: tuple[Tensor, ...], seed: int
) -> str:
    """Where the result is off its masked original elsewhere than on the example, or nothing.

    In eval and in train mode; on another batch, if the original takes it; with weights drawn anew in both.
    """
    dice = torch.Generator().manual_seed(seed)
    wide, pair = in_float64(original), Pair(in_float64(result.model), result.plan)
    drawn = copy.deepcopy(wide)
    with torch.no_grad():
        for tensor in (*drawn.parameters(), *(b for b in drawn.buffers() if is_inexact(b))):
            tensor.mul_(
                1 + 0.5 * torch.rand(tensor.shape, generator=dice, dtype=torch.float64).to(tensor.dtype)
            )
    state = {name: tensor[result.plan.mask(name)] for name, tensor in drawn.state_dict().items()}
    redrawn = Pair(copy.deepcopy(pair.model), result.plan)
    with torch.no_grad():
        for name, tensor in redrawn.model.state_dict().items():
            if is_inexact(tensor):
                tensor.copy_(state[name].view(tensor.shape))
    for batch in (0, 2):
        given = tuple(
            torch.randn(len(t) + batch, *t.shape[1:], generator=dice, dtype=torch.float64)
            if is_inexact(t)
            else t
            for t in as_float64(inputs)
        )
        if runs(wide, given):
            continue
        for training in (False, True):
            for name, before, after in (("the same", wide, pair), ("new", drawn, redrawn)):
                before, after = before.train(training), Pair(after.model.train(training), after.plan)
                torch.manual_seed(0)
                if training and runs(before, given):
                    continue
                gap = largest_deviation(before, after, given)
                if not gap <= TOLERANCE:
                    mode = "train" if training else "eval"
                    return f"off by {gap:.1e} in {mode} mode, {batch} more in the batch, {name} weights"
    return ""


def check(seed: int) -> tuple[list[str], float, str | None]:
    """Kinds of block of that seed's network, the part of its parameters that is left, and what went wrong."""
    model, inputs = random_network(seed)
    try:
        options = random_options(seed, model)
        result = prune_and_check(model, inputs, importance=random_importance(seed), tol=TOLERANCE, **options)
        elsewhere = other_conditions(model, result, inputs, seed)
    except depgraph.NothingToPruneError as error:
        if "is ignored" in str(error):  # the drawn `ignore` leaves nothing: a refusal is the right answer
            return model.kinds, 1.0, None
        return model.kinds, 1.0, f"{type(error).__name__}: {error}"
    except Exception as error:
        return model.kinds, 1.0, f"{type(error).__name__}: {error}"
    return model.kinds, parameters(result.model) / parameters(model), elsewhere or None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="how many networks")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console, began = Console(), time.perf_counter()
    uses, wrong, left, failures = Counter(), Counter(), Counter(), []
    seeds = range(arguments.start, arguments.start + arguments.count)
    for seed in track(seeds, "random networks", console=console):
        kinds, part, failure = check(seed)
        for kind in set(kinds):
            uses[kind] += 1
            wrong[kind] += failure is not None
            left[kind] += part
        if failure is not None:
            failures.append(seed)
            console.print(f"seed {seed}, {' -> '.join(kinds)}: {failure}", style="red", markup=False)
    table = Table("kind of block", "networks", "wrong or crashed", "parameters left")
    for kind in sorted(uses):
        table.add_row(kind, str(uses[kind]), str(wrong[kind]), f"{left[kind] / uses[kind]:.2f}")
    console.print(table)
    seconds = time.perf_counter() - began
    console.print(
        f"{len(seeds)} networks, {len(failures)} wrong or crashed, {seconds:.0f} s; failing: {failures}"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
