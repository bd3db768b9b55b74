"""One of two processes that train and prune one model: `python distributed_worker.py CASE RANK FOLDER`."""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import depgraph
from depgraph import distributed

WORLD, STEPS = 2, 3
TIMEOUT = 20.0  # seconds that a process waits for one that was stopped
PATIENCE = 600.0  # seconds that a process waits for one that works, on a machine with much else to do


def net(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 22), nn.ReLU(), nn.Linear(22, 13), nn.Tanh(), nn.Linear(13, 3))


def batches(rank: int, start: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Other data for each process, of other scales on other features."""
    dice = torch.Generator().manual_seed(100 * rank + start)
    scale = torch.tensor([4.0, 0.1, 0.1, 1.0, 1.0]) if rank else torch.tensor([0.1, 0.1, 4.0, 1.0, 1.0])
    x = [torch.randn(7, 5, generator=dice) * scale for _ in range(count)]
    return [(v, v[:, :3].argmax(1)) for v in x]


class Loop:
    """A plain loop with all that must be carried over."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.average = torch.optim.swa_utils.AveragedModel(
            getattr(model, "module", model), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=4)

    def train(self, data: list[tuple[Tensor, Tensor]]) -> None:
        for x, y in data:
            self.optimizer.zero_grad()
            self.scaler.scale(F.cross_entropy(self.model(x), y)).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            self.average.update_parameters(getattr(self.model, "module", self.model))

    def shrink(self, model: nn.Module, plan: depgraph.Plan) -> None:
        """Go on with a smaller model: the recipe of docs/training-integrations.md."""
        old, new = (getattr(m, "module", m) for m in (self.model, model))
        plan.apply_to_optimizer(self.optimizer, old, new)
        self.average.module = depgraph.apply(self.average.module, plan)
        self.model = model

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "model": getattr(self.model, "module", self.model).state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "average": self.average.state_dict(),
                "scaler": self.scaler.state_dict(),
            }
        )


def ending(data: list[Any], how: signal.Signals) -> Iterator[Any]:
    """Batches, among which this process ends, or stops."""
    yield data[0]
    os.kill(os.getpid(), how)
    yield from data


def train_elastic(elastic: depgraph.Elastic, data: list[tuple[Tensor, Tensor]], largest: Any = None) -> None:
    """Steps of the sandwich rule."""
    optimizer = torch.optim.SGD(elastic.parameters(), lr=0.1)
    for batch in data:
        optimizer.zero_grad()
        elastic.sandwich(batch, F.cross_entropy, largest=largest).backward()
        optimizer.step()


class Once:
    """An iterable over `ending`."""

    def __init__(self, data: list[Any], how: signal.Signals) -> None:
        self.data, self.how = data, how

    def __iter__(self) -> Iterator[Any]:
        return ending(self.data, self.how)


def calibration_of(case: str, rank: int) -> Any:
    data = batches(rank, 50, 2)
    unlucky = case.split("-")
    if len(unlucky) == 2 and int(unlucky[1]) == rank:
        if unlucky[0] == "nan":
            return [(x * float("nan"), y) for x, y in data]
        return Once(data, signal.SIGKILL if unlucky[0] == "killed" else signal.SIGSTOP)
    return data


def main(case: str, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=PATIENCE),
    )
    try:
        work(case, rank, folder)
    finally:  # threads of a group that outlives its process abort it
        torch.distributed.destroy_process_group()


def work(case: str, rank: int, folder: Path) -> None:
    timeout = TIMEOUT if case.startswith("stopped") else PATIENCE
    if case == "elastic":
        elastic = depgraph.Elastic(net(3), torch.zeros(2, 5))
        whole = nn.parallel.DistributedDataParallel(elastic.model)
        train_elastic(elastic, batches(rank, 0, STEPS), whole)
        torch.save(elastic.model.state_dict(), folder / f"{rank}.pt")
        return
    if case == "shapes":
        distributed.prune(nn.Linear(5, 7 + rank), torch.randn(2, 5), timeout=timeout)
    loop = Loop(nn.parallel.DistributedDataParallel(net(3 + rank)))  # it gives all the weights of process 0
    loop.train(batches(rank, 0, STEPS))
    before = loop.state()
    result = distributed.prune(
        loop.model, torch.randn(2, 5), pruning_ratio=0.5, importance="taylor_squared", loss=F.cross_entropy,
        calibration=calibration_of(case, rank), timeout=timeout,
    )  # fmt: skip
    loop.shrink(result.model, result.plan)
    carried = loop.state()
    loop.train(batches(rank, 10, STEPS))
    torch.save(
        {
            "before": before, "plan": result.plan.to_json(), "carried": carried, "after": loop.state(),
            "wrapped": isinstance(result.model, nn.parallel.DistributedDataParallel), "report": str(result.report),
        },
        folder / f"{rank}.pt",
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
