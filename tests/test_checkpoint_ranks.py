"""A checkpoint pruned by several processes: the plan and the bytes of one, also where one of them ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_worker import PATIENCE, SHARD_BYTES, Net, options, words
from test_checkpoint import _equal_folders, contents, made, stored

import depgraph
from depgraph.base.processes import Processes
from depgraph.checkpoint import outcome, writing

HERE = Path(__file__).parent


def run(case: str, world: int, folder: Path) -> list[int]:
    """The exit statuses of all processes of a case."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    group = f"group-{len(list(folder.glob('group-*')))}"
    (folder / group).touch()
    words = [sys.executable, str(HERE / "ranks_worker.py"), case, str(world), str(folder), group]
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as launcher:
        try:
            return list(json.loads(launcher.communicate(timeout=PATIENCE + 60)[0]))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)


def results(folder: Path, world: int) -> list[dict[str, Any]]:
    errors = [path.read_text() for path in folder.glob("[0-9].txt")]
    assert not errors, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What one process makes of it."""

    def pruned(case: str, out: str = "alone", shard: int = SHARD_BYTES) -> Any:
        monkeypatch.setattr(outcome, "SHARD_BYTES", shard)
        where: dict[str, Any] = {"out": tmp_path / out, "factory": Net}
        return depgraph.checkpoint.prune(tmp_path / "source", words(), **where, **options(case))

    return pruned


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "world", "shards"),
    [
        ("same", 2, 3),
        ("same", 3, 5),
        ("same", 3, 1),
        ("written", 2, 5),
        ("fpgm", 2, 3),
        ("own", 2, 3),
        ("depth", 2, 3),
    ],
)
def test_plan_and_bytes_are_those_of_one_process(
    tmp_path: Path, alone: Callable[..., Any], case: str, world: int, shards: int
) -> None:
    source = stored(made(Net), tmp_path / "source", shards)
    before = contents(source)
    assert run(case, world, tmp_path) == [0] * world
    found = results(tmp_path, world)
    notes = tmp_path / ".source.sums"
    sums = notes.rename(tmp_path / "sums").stat().st_size if notes.exists() else 0
    wanted = alone(case)
    assert contents(source) == before
    _equal_folders(tmp_path / "out", tmp_path / "alone")
    assert not list(tmp_path.glob("out.*"))
    for one in found:
        assert one["plan"] == wanted.plan.to_json()
        assert one["report"] == str(wanted.report)
        assert one["load"] == wanted.load.replace("alone", "out")
    files = [set(one["read"]) for one in found]
    wanted_files = {p.name for p in source.glob("*.safetensors")}
    if case == "fpgm":  # compares values with each other
        assert not set().union(*files)
    else:  # each file is read for the scores, or for what is not finite, by one process
        assert sum(map(len, files)) == len(wanted_files)
        assert set().union(*files) == wanted_files
        assert sum(bool(one["streamed"]) for one in found) > 1
        assert sums == notes.stat().st_size or case == "depth"  # one process sums nothing of branches that go


@pytest.mark.slow
@pytest.mark.parametrize(("case", "again"), [("killed", 3), ("raises", 2), ("killed", 1)])
def test_a_process_that_ends_ends_the_others_and_the_next_run_continues(
    tmp_path: Path, alone: Callable[..., Any], case: str, again: int
) -> None:
    stored(made(Net), tmp_path / "source", 4)
    assert run(case, 2, tmp_path) == [0, -9 if case == "killed" else 0]
    text = (tmp_path / "0.txt").read_text()
    if case == "killed":
        assert "another process exited or did not respond" in text
        assert "what was written is kept: the same call continues" in text
    else:
        assert "process 1: StoreError" in text
        assert "No space left" in text
        assert "the same call continues there" in (tmp_path / "1.txt").read_text()
        (tmp_path / "1.txt").unlink()
    (tmp_path / "0.txt").unlink()
    work = tmp_path / "out.partial"
    assert not (tmp_path / "out").exists()
    lines = [json.loads(line) for p in work.glob("journal.jsonl*") for line in p.read_text().splitlines()]
    done = {name for line in lines for name in line.get("tensors", ())}
    assert done
    if again == 1:
        alone("same", "out")
    else:
        assert run("same", again, tmp_path) == [0] * again
        streamed = [name for one in results(tmp_path, again) for name in one["streamed"]]
        assert not done & set(streamed)
        assert len(set(streamed)) == len(streamed)
    alone("same")
    _equal_folders(tmp_path / "out", tmp_path / "alone")
    assert not list(tmp_path.glob("out.*"))


def _spoiled(source: Path) -> None:
    from safetensors.torch import load_file, save_file

    for path in source.glob("*.safetensors"):
        state = load_file(path)
        if "blocks.1.1.weight" in state:
            state["blocks.1.1.weight"][2, 3] = float("nan")
            save_file(state, path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("nan", r"NaN or infinite values: blocks.1.1.weight[2, 3] is nan, offset 35"),
        ("data", "calibration runs the model, which is the work of one process"),
        ("budget", "BudgetError"),
        ("other", "'head.weight'"),
        ("copied", "the checkpoint or its model is another one in another process"),
        ("elsewhere", "out must be on a disk that all processes share"),
    ],
)
def test_what_is_wrong_is_an_error_in_all(tmp_path: Path, case: str, text: str) -> None:
    source = stored(made(Net), tmp_path / "source", 3)
    if case == "nan":
        _spoiled(source)
    if case == "copied":
        stored(made(Net).half().float(), tmp_path / "copied", 3)  # other values, of the same sizes
    assert run(case, 2, tmp_path) == [0, 0]
    assert all(text in (tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    left = ["out.partial"] if case == "elsewhere" else []
    assert [path.name for path in tmp_path.glob("out*")] == left


@pytest.mark.slow
def test_what_torchrun_starts_finds_itself(tmp_path: Path, alone: Callable[..., Any]) -> None:
    """On the command line nobody makes a process group; one process speaks."""
    whole = outcome.SHARD_BYTES
    stored(made(Net), tmp_path / "source", 3)
    words_ = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "depgraph", "prune",
        "--checkpoint", str(tmp_path / "source"), "ranks_worker:Net", "--input", "2x6:int64<50", "--ratio", "0.5", "--out",
        str(tmp_path / "out"), "--json",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words_, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(tmp_path / "out")
    alone("same", shard=whole)
    _equal_folders(tmp_path / "out", tmp_path / "alone")


@pytest.mark.slow
def test_a_script_under_torchrun_calls_it_again(tmp_path: Path) -> None:
    """A forecast, an error, the result, and a process group of the script's own: none meets what an earlier one left."""
    stored(made(Net), tmp_path / "source", 3)
    script = tmp_path / "script.py"
    script.write_text(f"""
import torch, depgraph
from pathlib import Path
from ranks_worker import Net, words

folder = Path({str(tmp_path)!r})
how = dict(out=folder / "out", factory=Net, verify=False)
before = depgraph.checkpoint.prune(folder / "source", words(), pruning_ratio=0.5, dry_run=True, **how)
try:
    depgraph.checkpoint.prune(folder / "source", words(), max_params=0.001, **how)
except depgraph.DepgraphError as error:
    assert "BudgetError" in type(error).__name__ + str(error)
after = depgraph.checkpoint.prune(folder / "source", words(), pruning_ratio=0.5, **how)
torch.distributed.init_process_group("gloo")
every = [None, None]
torch.distributed.all_gather_object(every, after.plan.to_json())
assert every[0] == every[1]
torch.distributed.destroy_process_group()
""")
    words_ = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words_, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").is_dir()


def test_files_are_dealt_by_their_bytes() -> None:
    sizes = {"a": 5, "b": 9, "c": 4, "d": 1}
    assert [Processes(rank=i, count=2).dealt(sizes) for i in range(2)] == [{"b", "d"}, {"a", "c"}]
    assert [Processes(rank=i, count=3).dealt({"a": 5}) for i in range(3)] == [{"a"}, set(), set()]
    assert Processes().dealt(sizes) == set(sizes)


def test_journals_of_several_processes_become_one(tmp_path: Path) -> None:
    def journal(name: str, fingerprint: str, *entries: dict[str, Any], rest: str = "") -> None:
        lines = [{"fingerprint": fingerprint}, *entries]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)

    journal("journal.jsonl", "this", {"file": "a", "tensors": {"x": 1}}, rest='{"file": "a", "tens')
    journal("journal.jsonl.1", "this", {"file": "b", "tensors": {"y": 2}}, {"file": "b", "tensors": {"z": 3}})
    (tmp_path / "journal.jsonl.2").write_text("")  # ended before it wrote a line
    (tmp_path / "a").touch()
    assert writing._journals(tmp_path, "this") == {"a": {"x": 1}, "b": {"y": 2, "z": 3}}
    assert writing._journals(tmp_path, "this") == {"a": {"x": 1}, "b": {"y": 2, "z": 3}}
    assert not (tmp_path / "journal.jsonl.1").exists()
    assert (tmp_path / "a").exists()
    assert writing._journals(tmp_path, "another") == {}
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]
