"""A model whose parameters are spread over processes: the plan and the weights of one process that has all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_worker import PATIENCE, net, state_of, trained, x

import depgraph
from depgraph import distributed

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def run(case: str, world: int, folder: Path) -> list[int]:
    """The exit statuses of all processes of a case."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(HERE / "sharded_worker.py"), case]
    started = [
        subprocess.Popen(
            [*words, str(rank), str(world), str(folder)], env=environment, stderr=subprocess.PIPE
        )
        for rank in range(world)
    ]
    for process in started:
        try:
            _, text = process.communicate(timeout=PATIENCE + 60)
        finally:
            process.kill()
        if process.returncode:
            print(text.decode())
    return [process.returncode for process in started]


@pytest.mark.parametrize(("case", "world"), [("whole", 2), ("whole", 3), ("columns", 2)])
def test_shards_are_pruned_as_the_whole(tmp_path: Path, case: str, world: int) -> None:
    assert run(case, world, tmp_path) == [0] * world
    wanted = depgraph.prune(net(), x(), pruning_ratio=0.5)
    for rank in range(world):
        found: dict[str, Any] = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found["plan"] == wanted.plan.to_json()
        expected = wanted.model.state_dict()
        assert found["state"].keys() == expected.keys()
        assert all(torch.equal(found["state"][n], t) for n, t in expected.items())
        assert any(found["spread"])
        assert all(found["spread"]) == (case == "whole")
        assert found["training"]
        if found["out"] is not None:
            assert torch.equal(found["out"], wanted.model(x()))
        assert ("verified: equals the masked original" in found["report"]) == (rank == 0)


def test_the_state_of_an_optimizer_follows(tmp_path: Path) -> None:
    assert run("optimizer", 2, tmp_path) == [0, 0]
    model = net()
    optimizer = trained(model, 2)
    wanted = depgraph.prune(model, x(), pruning_ratio=0.5)
    wanted.plan.apply_to_optimizer(optimizer, model, wanted.model)
    states = [state_of(optimizer)]
    trained(wanted.model, 1, optimizer)
    states.append(state_of(optimizer))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert json.loads(found["plan"])["cuts"] == json.loads(wanted.plan.to_json())["cuts"]
        for got, expected in zip(found["states"], states, strict=True):
            torch.testing.assert_close(got, expected)
        torch.testing.assert_close(found["state"], dict(wanted.model.state_dict()))


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("nan", "NaN or infinite values in b.weight"),
        ("factory", "factory builds another model than the one that is sharded: b.weight"),
        ("missing", "give factory, which builds it unsharded, and shard"),
    ],
)
def test_what_is_wrong_is_an_error_in_all(tmp_path: Path, case: str, text: str) -> None:
    assert run(case, 2, tmp_path) == [0, 0]
    assert all(text in (tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))


def test_a_process_that_dies_ends_the_others_with_an_error(tmp_path: Path) -> None:
    statuses = run("dies", 2, tmp_path)
    assert statuses[1] == -9
    text = (tmp_path / "0.txt").read_text()
    assert "another process exited or did not respond" in text


def test_factory_and_shard_are_for_sharded_models() -> None:
    with pytest.raises(
        depgraph.InputError, match="factory and shard are for a model whose parameters are sharded"
    ):
        distributed.prune(net(), x(), factory=net, shard=lambda m: m)
