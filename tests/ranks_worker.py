"""Several processes that prune one checkpoint: `python ranks_worker.py CASE WORLD FOLDER GROUP`; prints their exit statuses."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

import depgraph
from depgraph.checkpoint import outcome, pruning, writing
from depgraph.store.files import Checkpoint

PATIENCE = 600.0
SHARD_BYTES = 4000  # of files that are written


class Net(nn.Module):
    """Ties, buffers in the files and out of them, and tensors of very different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16)) for _ in range(3)
        )
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((16,), 3.0))
        self.register_buffer("own", torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x) * self.scale
        for block in self.blocks:
            y = y + block(y)
        return self.head(y * self.own)


class Other(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 51, bias=False)


def words() -> torch.Tensor:
    return torch.arange(12).reshape(2, 6)


def inputs_of(case: str) -> Any:
    return {"input_ids": words(), "use_cache": False} if case == "llama" else words()


def options(case: str) -> dict[str, Any]:
    """What the call of a case asks for."""
    known: dict[str, Any] = {
        "fpgm": {"importance": "fpgm"},
        "llama": {"ignore": ["*self_attn*", "*embed*"], "uniform": True},
        "written": {"verify": False, "importance": depgraph.importance.L2(reduce="max"), "max_params": 0.6},
        "own": {"verify": False, "importance": lambda group: torch.arange(group.units) % 7},
        "data": {"calibration": [words()], "importance": "wanda"},
        "budget": {"max_params": 0.001},
        "depth": {"depth": depgraph.Depth(keep=2), "importance": "l2"},
    }
    asked = known.get(case, {})
    return asked if "max_params" in asked else {"pruning_ratio": 0.5, **asked}


def ends(how: str) -> Any:
    """Writes a tensor, and ends with the next."""
    real, done = writing._append, []

    def append(handle: int, octets: Any, name: str, sums: dict[str, int]) -> None:
        if done:
            os.write(handle, b"half of it")
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")
        done.append(name)
        real(handle, octets, name, sums)

    return append


def saved(folder: Path) -> None:
    """A sharded model, written by torch in three ways."""
    import torch.distributed.checkpoint as dcp

    torch.manual_seed(0)
    state = sharded(Net())
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "own"))
    dcp.save(
        state, storage_writer=dcp.HuggingFaceStorageWriter(str(folder / "pieces"), save_distributed=True)
    )
    whole = {"save_distributed": True, "enable_consolidation": True}
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(folder / "whole"), **whole))


def sharded(model: nn.Module) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    return {n: t for n, t in model.state_dict().items() if n != "head.weight"}  # which is tied


def loaded(folder: Path) -> None:
    """Shards of a smaller model filled from its files, and written by torch in its own way."""
    import torch.distributed.checkpoint as dcp

    plan = depgraph.Plan.from_json((folder / "small.json").read_text())
    small = depgraph.apply(depgraph.checkpoint.shell(folder / "source", Net), plan)
    state = {n: torch.empty_like(t, device="cpu") for n, t in sharded(small).items()}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder / "small")))
    dcp.save({"model": state}, storage_writer=dcp.FileSystemWriter(folder / "own-small"))
    small.load_state_dict({**state, "head.weight": state["embed.weight"]}, assign=True)
    torch.save({"out": small(words())}, folder / f"out-{torch.distributed.get_rank()}.pt")


def work(case: str, rank: int, folder: Path) -> None:
    if case in ("saves", "loads"):
        {"saves": saved, "loads": loaded}[case](folder)
        return
    source = folder / "source"
    read: list[str] = []
    streamed: list[str] = []
    together, append, reads = pruning._read_together, writing._append, Checkpoint._read

    def watched(*args: Any) -> None:
        def noted(self: Any, one: Any, offset: int, count: int) -> Any:
            read.append(one.file)
            return reads(self, one, offset, count)

        Checkpoint._read = noted
        together(*args)
        Checkpoint._read = reads

    def counted(handle: int, octets: Any, name: str, sums: dict[str, int]) -> None:
        streamed.append(name)
        append(handle, octets, name, sums)

    pruning._read_together, writing._append = watched, counted
    writing.SYNC, outcome.SHARD_BYTES = 1, SHARD_BYTES
    factory: Any = Net
    out = folder / "out"
    if case == "copied" and rank == 1:
        source = folder / "copied"
    if case == "elsewhere" and rank == 1:
        out = folder / "elsewhere" / "out"
    if case in ("killed", "raises") and rank == 1:
        writing._append = ends(case)
    if case == "other" and rank == 1:
        factory = Other
    if case == "llama":
        import vision_ops  # noqa: F401  # makes torchvision importable, which transformers imports

        factory = None
    found = depgraph.checkpoint.prune(
        source, inputs_of(case), out=out, factory=factory, timeout=PATIENCE, **options(case)
    )
    torch.save(
        {"plan": found.plan.to_json(), "report": str(found.report), "load": found.load, "read": read, "streamed": streamed},
        folder / f"{rank}.pt",
    )  # fmt: skip


def one_of(world: int, rank: int, case: str, folder: Path, group: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / group}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=PATIENCE),
    )
    try:
        work(case, rank, folder)
    except depgraph.DepgraphError as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    finally:
        torch.distributed.destroy_process_group()


def main(case: str, world: int, folder: Path, group: str) -> None:
    """What takes long to import is imported once, before the processes part."""
    children = []
    for rank in range(world):
        if not (child := os.fork()):
            status = 1
            try:
                one_of(world, rank, case, folder, group)
                status = 0
            except Exception:  # noqa: BLE001  it ends as its parent does not
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
