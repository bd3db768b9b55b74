"""What recovery costs: `python -m benchmarks.recovery_cost`, `--small` for digits alone, which need no download.

Time is told in forward passes of the dense model over the calibration data, processor time of one thread beside that in
the same run; memory in MB beyond what is resident when recovery begins, both models among that. What is removed is chosen
by `l2`, at the budget of the case (`python -m benchmarks.quality` has them).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table

import depgraph
from benchmarks.real import cases
from benchmarks.real.case import Case, run
from benchmarks.store import peak_beyond

CASES = ("minilm", "resnet20-0.5", "crepe", "efficientnet")
AIM = "at most 4 passes, 1000 MB"


def seconds(work: Callable[[], object]) -> float:
    """Processor time of a call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(case: Case, batches: int | None, seed: int) -> list[str]:
    """A row of the table: the least of three runs of the model on all data, and one recovery."""
    model, example, data = case.build(), case.example(), case.calibration(seed)[:batches]
    budget = case.budget.arguments(model)
    graph = depgraph.analyze(model, example, ignore=budget.pop("ignore", ()))
    found = depgraph.prune(
        model, example, graph=graph, importance="l2", scope="local", verify=False, progress=False, **budget
    )
    calibration = [inputs for inputs, _ in data]

    @torch.no_grad()
    def forward() -> None:
        for inputs in calibration:
            run(model, inputs)

    def recover() -> None:
        depgraph.recover(
            model, found.model, found.plan, graph, calibration, example_inputs=example, progress=False
        )

    one = min(seconds(forward) for _ in range(3))
    spent: list[float] = []
    peak = peak_beyond(lambda: spent.append(seconds(recover)))
    return [
        case.name,
        str(len(data)),
        f"{one:.1f}",
        f"{spent[0]:.1f}",
        f"{spent[0] / one:.1f}",
        f"{peak:.0f}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="digits alone, nothing is downloaded")
    parser.add_argument(
        "--case", action="append", choices=cases.names(), help="only this case (may be repeated)"
    )
    parser.add_argument("--batches", type=int, help="only so many batches of the calibration data")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = [cases.small()] if options.small else [cases.case(name) for name in options.case or CASES]
    table = Table(title=f"Recovery ({AIM})")
    for column in ("case", "batches", "one pass, s", "recovery, s", "passes", "MB beyond"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for case in chosen:
        table.add_row(*measure(case, options.batches, options.seed))
    Console().print(table)


if __name__ == "__main__":
    main()
