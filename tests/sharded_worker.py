"""One of several processes that have one model in shards: `python sharded_worker.py CASE RANK WORLD FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import depgraph
from depgraph import distributed

PATIENCE = 300.0


class Net(nn.Module):
    """Sizes that no number of processes divides; of the last layer most processes have no row."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = (
            nn.Linear(5, 22),
            nn.LayerNorm(22),
            nn.Linear(22, 13),
            nn.Linear(13, 1),
        )
        self.register_buffer("scale", torch.full((22,), 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.norm(self.a(x)) * self.scale).relu())


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.c = nn.Linear(22, 14), nn.Linear(14, 1)


def net() -> nn.Module:
    torch.manual_seed(3)
    return Net()


def ending() -> nn.Module:
    os.kill(os.getpid(), signal.SIGKILL)
    return net()


def x() -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


def by_columns(mesh: Any) -> Any:
    """Matrices spread by columns, as tensor parallelism does; the rest as it is."""

    def shard(model: nn.Module) -> None:
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.dim() == 2:
                    spread = distribute_tensor(parameter.detach(), mesh, [Shard(1)])
                    module._parameters[name] = nn.Parameter(spread)

    return shard


def trained(model: nn.Module, steps: int, optimizer: Any = None) -> torch.optim.Optimizer:
    """Steps on data that all processes share."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01) if optimizer is None else optimizer
    for _ in range(steps):
        optimizer.zero_grad()
        model(x()).square().mean().backward()
        optimizer.step()
    return optimizer


def state_of(optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    """The state of each parameter, gathered."""
    return [
        {k: getattr(t, "full_tensor", lambda t=t: t)().clone() for k, t in s.items()}
        for s in optimizer.state.values()
    ]


def work(case: str, rank: int, world: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (world,))
    shard = by_columns(mesh) if case == "columns" else lambda m: fully_shard(m, mesh=mesh)
    model = net()
    shard(model)
    factory: Any = Wider if case == "factory" else ending if case == "dies" and rank == 1 else Net
    if case == "nan" and rank == 1:
        with torch.no_grad():
            model.b.weight.to_local()[0, 0] = float("nan")
    optimizer = trained(model, 2) if case == "optimizer" else None
    options: dict[str, Any] = {} if case == "missing" else {"factory": factory, "shard": shard}
    result = distributed.prune(model, x(), pruning_ratio=0.5, timeout=PATIENCE, **options)
    states = []
    if optimizer is not None:
        result.plan.apply_to_optimizer(optimizer, model, result.model)
        states = [state_of(optimizer)]
        trained(result.model, 1, optimizer)
        states.append(state_of(optimizer))
    whole = {
        n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in result.model.state_dict().items()
    }
    spread = [hasattr(p, "full_tensor") for p in result.model.parameters()]
    out = None if case == "columns" else result.model(x()).detach()
    torch.save(
        {"plan": result.plan.to_json(), "state": whole, "out": out, "spread": spread, "report": str(result.report),
         "training": result.model.training, "states": states},
        folder / f"{rank}.pt",
    )  # fmt: skip


def main(case: str, rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=PATIENCE),
    )
    try:
        work(case, rank, world, folder)
    except depgraph.DepgraphError as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
