"""Random networks against the oracle: `python -m benchmarks.never_wrong --count 2000 --start 0`.

Each seed gives a network, a pruning ratio, random scores and sometimes parameters to leave alone. The result must equal
the masked original in float64, its state must be what the plan keeps, and it must train. Prints a table by kind of
block and every failing seed; exit status 1 if there is one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

import torch
from checks import prune_and_check, random_importance
from random_networks import random_network, random_options
from rich.console import Console
from rich.progress import track
from rich.table import Table

import depgraph

TOLERANCE = 1e-8


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def check(seed: int) -> tuple[list[str], float, str | None]:
    """Kinds of block of that seed's network, the part of its parameters that is left, and what went wrong."""
    model, inputs = random_network(seed)
    try:
        options = random_options(seed, model)
        result = prune_and_check(model, inputs, importance=random_importance(seed), tol=TOLERANCE, **options)
    except depgraph.NothingToPruneError as error:
        if "is ignored as asked" in str(
            error
        ):  # the drawn `ignore` leaves nothing: a refusal is the right answer
            return model.kinds, 1.0, None
        return model.kinds, 1.0, f"{type(error).__name__}: {error}"
    except Exception as error:
        return model.kinds, 1.0, f"{type(error).__name__}: {error}"
    return model.kinds, parameters(result.model) / parameters(model), None


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
