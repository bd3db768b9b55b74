"""Folders of torch.distributed.checkpoint: its safetensors files are read and written, the rest is refused with the line that converts."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks_worker import Net, words
from test_checkpoint import made
from test_checkpoint_ranks import run
from versions import on_new_torch

import depgraph

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {n: t for n, t in model.state_dict().items() if n != "head.weight"}  # which is tied


def pruned(folder: Path, out: Path) -> Any:
    return depgraph.checkpoint.prune(folder, words(), out=out, factory=Net, pruning_ratio=0.5, verify=False)


def assert_as_in_memory(found: Any) -> None:
    """The plan and the values of `depgraph.prune`, as torch reads them."""
    wanted = depgraph.prune(made(Net), words(), pruning_ratio=0.5, verify=False)
    assert found.plan.to_json() == wanted.plan.to_json()
    state = {n: torch.zeros_like(t) for n, t in state_of(wanted.model).items()}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(found.folder)))
    for name, tensor in state_of(wanted.model).items():
        assert torch.equal(state[name], tensor), name


@on_new_torch
@pytest.mark.parametrize("files", [1, 3])
def test_safetensors_are_read_and_written(tmp_path: Path, files: int) -> None:
    state = state_of(made(Net))
    table = {name: 1 + i % files for i, name in enumerate(state)}
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "source"), fqn_to_index_mapping=table)
    dcp.save(state, storage_writer=writer)
    assert_as_in_memory(pruned(tmp_path / "source", tmp_path / "out"))


@on_new_torch
def test_own_files_are_refused(tmp_path: Path) -> None:
    dcp.save(state_of(made(Net)), storage_writer=dcp.FileSystemWriter(tmp_path / "source"))
    with pytest.raises(depgraph.InputError, match=r"what is where in it says a pickle.*\n.*python -c"):
        pruned(tmp_path / "source", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@on_new_torch
def test_the_model_is_a_part_of_what_was_saved(tmp_path: Path) -> None:
    """Names begin with its key; the state of an optimizer, and what is no tensor, stay behind."""
    model = made(Net)
    optimizer = torch.optim.AdamW(model.parameters())
    model(words()).sum().backward()
    before = state_of(made(Net))
    optimizer.step()
    saved = {"model": before, "optimizer": optimizer.state_dict(), "epoch": 3}
    dcp.save(saved, storage_writer=dcp.FileSystemWriter(tmp_path / "source"))
    with pytest.raises(depgraph.InputError, match=r'p = "model."') as raised:
        pruned(tmp_path / "source", tmp_path / "out")
    code = shlex.split(str(raised.value)[str(raised.value).index("python -c") :])[2]
    exec(code, {})
    whole = tmp_path / "source-safetensors"
    with pytest.raises(depgraph.InputError, match=r"in none of its files, which have 'model.embed.weight'"):
        pruned(whole, tmp_path / "out")
    whole.rename(tmp_path / "all")
    exec(code.replace('p = ""', 'p = "model."'), {})
    assert_as_in_memory(pruned(whole, tmp_path / "out"))


@pytest.mark.slow
def test_shards_are_filled_from_what_is_written(tmp_path: Path) -> None:
    dcp.save(state_of(made(Net)), storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path / "source")))
    found = pruned(tmp_path / "source", tmp_path / "small")
    (tmp_path / "small.json").write_text(found.plan.to_json())
    assert run("loads", 2, tmp_path) == [0, 0]
    model = depgraph.prune(made(Net), words(), pruning_ratio=0.5, verify=False).model
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"out-{rank}.pt")["out"], model(words()))
    wanted = state_of(model)
    state = {"model": {n: torch.zeros_like(t) for n, t in wanted.items()}}
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "own-small"))
    for name, tensor in wanted.items():
        assert torch.equal(state["model"][name], tensor), name


@pytest.mark.slow
def test_what_processes_have_saved(tmp_path: Path) -> None:
    """Whole tensors are read; pieces, and torch's own files, after the line that the error says."""
    assert run("saves", 2, tmp_path) == [0, 0]
    assert_as_in_memory(pruned(tmp_path / "whole", tmp_path / "out-whole"))
    for name, text in (("own", "is a checkpoint of torch"), ("pieces", "has pieces of tensors")):
        with pytest.raises(depgraph.InputError, match=text) as raised:
            pruned(tmp_path / name, tmp_path / f"out-{name}")
        line = str(raised.value)[str(raised.value).index("python -c") :].replace("python", sys.executable, 1)
        subprocess.run(line, shell=True, check=True, capture_output=True)
        assert_as_in_memory(pruned(tmp_path / f"{name}-safetensors", tmp_path / f"out-{name}"))
