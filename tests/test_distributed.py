"""Two processes train and prune one model; held against one process that does the work of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed_worker import PATIENCE, STEPS, TIMEOUT, Loop, batches, net, train_elastic

import depgraph
from depgraph import distributed

HERE = Path(__file__).parent
LIMIT = PATIENCE + 60  # seconds until a process counts as hanging


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], list[Any]]]:
    """Starts both processes of a case; ends what is left of them."""
    running: list[subprocess.Popen[str]] = []

    def both(case: str) -> list[Any]:
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
        for rank in (0, 1):
            words = [sys.executable, str(HERE / "distributed_worker.py"), case, str(rank), str(tmp_path)]
            running.append(
                subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
            )  # fmt: skip
        return running

    yield both
    for process in running:
        process.kill()
        process.communicate()


def error_of(process: Any) -> str:
    """The last exception of a process that has to end by itself."""
    _, text = process.communicate(timeout=LIMIT)
    assert process.returncode == 1, text
    return text


def assert_close(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_close(found[i], value, f"{where}.{i}")
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=lambda m: f"{where}: {m}")
    elif isinstance(expected, float):
        assert abs(found - expected) <= 1e-9 * abs(expected), where
    else:
        assert found == expected, where


@pytest.mark.slow
def test_two_processes_do_what_one_does(start: Callable[[str], list[Any]], tmp_path: Path) -> None:
    """The plan of averaged scores; optimizer, schedule, average of weights and gradient scaler go on."""
    for process in start("same"):
        _, text = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, text
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert one["plan"] == two["plan"]
    assert one["wrapped"]
    assert "equals the masked original" in one["report"]
    assert two["report"] == "None"
    for key in ("before", "carried", "after"):
        assert_close(one[key], two[key], key)

    def together(start: int) -> list[Any]:  # both processes' batches as one: gradients of means are averaged
        pairs = zip(batches(0, start, STEPS), batches(1, start, STEPS), strict=True)
        return [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in pairs]

    loop = Loop(net(3))
    loop.train(together(0))
    assert_close(one["before"], loop.state(), "before")

    model, x = loop.model, torch.randn(2, 5)
    graph = depgraph.analyze(model, x)
    data = [depgraph.Calibration(batches(rank, 50, 2), x, F.cross_entropy) for rank in (0, 1)]
    own = [depgraph.scores_of(graph, "taylor_squared", calibration=d) for d in data]
    mean = {key: (own[0][key] + own[1][key]) / 2 for key in own[0]}

    def plan_of(scores: dict[int, Any]) -> depgraph.Plan:
        return depgraph.prune(
            model, x, graph=graph, pruning_ratio=0.5, importance=lambda g: scores[g.name]
        ).plan

    plan = plan_of(mean)
    found = depgraph.Plan.from_json(one["plan"])
    for name in plan.cuts:
        assert torch.equal(found.mask(name), plan.mask(name)), name
    assert plan.cuts.keys() == found.cuts.keys()
    for scores in own:  # neither process's own data would have led there
        assert any(not torch.equal(plan_of(scores).mask(n), plan.mask(n)) for n in plan.cuts)

    loop.shrink(depgraph.apply(model, plan), plan)
    assert_close(one["carried"], loop.state(), "carried")
    moment = one["carried"]["optimizer"]["state"][0]["exp_avg"]
    whole = one["before"]["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moment.flatten(), whole[plan.mask("0.weight")])
    loop.train(together(10))
    assert_close(one["after"], loop.state(), "after")
    assert one["after"]["scaler"]["scale"] == 16.0  # grown after four steps, two of them before pruning
    assert one["after"]["average"]["n_averaged"] == 2 * STEPS


@pytest.mark.slow
@pytest.mark.parametrize("unlucky", [0, 1])
def test_a_process_that_is_killed_ends_the_other(start: Callable[[str], list[Any]], unlucky: int) -> None:
    processes = start(f"killed-{unlucky}")
    text = error_of(processes[1 - unlucky])
    assert "DepgraphError: another process exited or did not respond" in text
    assert processes[unlucky].wait(LIMIT) == -9


@pytest.mark.slow
def test_a_process_that_does_not_answer_ends_the_other(start: Callable[[str], list[Any]]) -> None:
    processes = start("stopped-1")
    begun = time.monotonic()
    text = error_of(processes[0])
    assert f"did not respond within {TIMEOUT:g} s" in text
    assert time.monotonic() - begun >= TIMEOUT
    assert processes[1].poll() is None


@pytest.mark.slow
def test_what_fails_in_one_process_is_raised_in_both(start: Callable[[str], list[Any]]) -> None:
    processes = start("nan-1")
    assert "process 1: InputError" in error_of(processes[0])
    assert "NaN" in error_of(processes[1])


@pytest.mark.slow
def test_models_of_different_shapes_are_refused(start: Callable[[str], list[Any]]) -> None:
    for process in start("shapes"):
        assert "different shapes" in error_of(process)


def test_bad_input() -> None:
    with pytest.raises(depgraph.InputError, match="process group"):
        distributed.prune(net(), torch.randn(2, 5))


def test_one_process(tmp_path: Path) -> None:
    """A group of one: what `depgraph.prune` gives, with options refused that can't be."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model, x = net(), torch.randn(2, 5)
        found = distributed.prune(model, x, max_params=0.5)
        wanted = depgraph.prune(model, x, max_params=0.5)
        assert json.loads(found.plan.to_json()) == json.loads(wanted.plan.to_json())
        assert torch.equal(found.model(x), wanted.model(x))
        batches = [torch.randn(7, 5) for _ in range(3)]
        options = {"importance": "activation_variance", "recover": "reconstruction", "pruning_ratio": 0.5}
        found = distributed.prune(model, x, calibration=iter(batches), **options)  # read twice
        wanted = depgraph.prune(model, x, calibration=batches, **options)
        for name, tensor in wanted.model.state_dict().items():
            assert torch.equal(found.model.state_dict()[name], tensor), name
        assert len(torch.distributed.distributed_c10d._world.pg_map) == 1, "no group is left behind"
        for bad in ({"inplace": True}, {"timeout": 0}, {"graph": None}):
            with pytest.raises(depgraph.InputError, match=next(iter(bad))):
                distributed.prune(model, x, **bad)
        with pytest.raises(depgraph.InputError, match="importance"):
            distributed.prune(model, x, importance="nothing")
        assert len(torch.distributed.distributed_c10d._world.pg_map) == 1, "nor after an error"
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrong", ["values", "torch"])
def test_an_error_that_is_kept_does_not_keep_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """Threads of a group that last until the interpreter ends may abort it."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    made, torch_makes = [], torch.distributed.new_group

    def new_group(*words: Any, **options: Any) -> Any:
        made.append(weakref.ref(group := torch_makes(*words, **options)))
        return group

    def breaks(*_: Any, group: Any, **__: Any) -> None:
        raise RuntimeError(f"{group} is gone")

    monkeypatch.setattr(torch.distributed, "new_group", new_group)
    model = net()
    if wrong == "values":
        with torch.no_grad():
            next(model.parameters())[0, 0] = float("nan")
    else:
        monkeypatch.setattr(torch.distributed, "all_gather_object", breaks)
    try:
        with pytest.raises(depgraph.DepgraphError, match=r"NaN|is gone") as kept:
            distributed.prune(model, torch.randn(2, 5), pruning_ratio=0.5)
        assert [group() for group in made] == [None]
        assert kept.value.__traceback__ is not None
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_sizes_train_in_two_processes_as_in_one(
    start: Callable[[str], list[Any]], tmp_path: Path
) -> None:
    for process in start("elastic"):
        _, text = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, text
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    pairs = zip(batches(0, 0, STEPS), batches(1, 0, STEPS), strict=True)
    alone = depgraph.Elastic(net(3), torch.zeros(2, 5))
    train_elastic(alone, [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in pairs])
    for name, tensor in alone.model.state_dict().items():
        assert torch.equal(one[name], two[name]), name
        torch.testing.assert_close(one[name], tensor, rtol=1e-4, atol=1e-6)
