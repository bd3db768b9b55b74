"""Pipelines as plain data: the guide's own, taken up where it ended, taken back, and refused."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import in_float64
from oracle import assert_equal_to_masked, assert_state_matches_plan
from torch import nn

import depgraph
from depgraph.cli import main

GUIDE = (Path(__file__).parent.parent / "docs/guides/a-recipe.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the guide's two files, where the process is."""
    monkeypatch.chdir(tmp_path)
    Path("job.py").write_text(BLOCKS[0][1])
    Path("recipe.toml").write_text(BLOCKS[1][1])
    yield tmp_path
    sys.modules.pop("job", None)
    sys.path[:] = [p for p in sys.path if p != str(tmp_path)]


@pytest.mark.slow
def test_the_guide(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert main(["run", "recipe.toml", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["step"] for row in rows] == [
        "as it was",
        "train",
        "prune",
        "distill",
        "mask",
        "fuse",
        "export",
    ]
    assert rows[2]["macs"] <= rows[1]["macs"] / 2
    assert rows[1]["score"] > 0.8
    assert rows[3]["score"] > rows[1]["score"] - 0.1
    assert (folder / "run" / "net.pt2").exists()
    program = torch.export.load(folder / "run" / "net.pt2").module()
    result = depgraph.Recipe.read("recipe.toml").run()  # all but the export is done
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(program(x), result.model.eval()(x), rtol=1e-4, atol=1e-5)
    assert "taken back" in str(result) or all(row["kept"] for row in result.rows)


JOB = """
import torch
from torch import nn

calls = []


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def score(model):
    return float(sum(p.numel() for p in model.parameters()))


def touched(model):
    calls.append(1)
    with torch.no_grad():
        model[0].bias.add_(1)
    return model


def batches(model):
    calls.append(model)
    return [(torch.randn(2, 6), torch.randn(2, 3))]


def two(model, more):
    return []


def fails(model):
    raise RuntimeError("out of disk")
"""


def recipe(steps: list[dict[str, Any]], **more: Any) -> depgraph.Recipe:
    return depgraph.Recipe(**{"model": "task:net", "inputs": "2x6", "out": "out", "steps": steps} | more)


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text(JOB)
    yield tmp_path
    sys.modules.pop("task", None)
    sys.path[:] = [p for p in sys.path if p != str(tmp_path)]


def test_data_may_ask_for_the_model_that_is_trained(task: Path) -> None:
    steps = [{"do": "prune", "max_params": 0.6}, {"do": "finetune"}]
    result = recipe(steps, data="task:batches", loss="torch.nn.functional:mse_loss").run()
    assert sys.modules["task"].calls[0] is result.model
    assert sum(p.numel() for p in result.model.parameters()) == result.rows[1]["parameters"]
    with pytest.raises(depgraph.InputError, match=r"called as data\(model\)"):
        recipe(steps[1:], out="other", data="task:two", loss="torch.nn.functional:mse_loss").run()


def test_what_loses_too_much_is_taken_back(task: Path) -> None:
    steps = [{"do": "prune", "max_params": 0.9}, {"do": "prune", "max_params": 0.3, "drop": 10.0}]
    result = recipe(steps, score="task:score").run()
    assert [row["kept"] for row in result.rows] == [True, True, False]
    count = sum(p.numel() for p in result.model.parameters())
    assert count == result.rows[1]["parameters"] < result.rows[0]["parameters"]
    original = sys.modules["task"].net().eval()
    kept = SimpleNamespace(model=result.model, plan=depgraph.load_plans("out/1-prune")[0])
    assert_state_matches_plan(original, kept.model, kept.plan)
    assert_equal_to_masked(
        original.double(),
        SimpleNamespace(model=in_float64(kept.model), plan=kept.plan),
        torch.rand(2, 6).double(),
    )
    again = recipe(steps, score="task:score").run()
    assert again.rows[1:] == result.rows[1:]
    for a, b in zip(again.model.parameters(), result.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_that_ended_goes_on(task: Path) -> None:
    steps = [{"do": "prune", "pruning_ratio": 0.5}, {"do": "task:touched"}, {"do": "task:fails"}]
    with pytest.raises(RuntimeError, match="out of disk"):
        recipe(steps).run()
    steps[2] = {"do": "fuse"}
    result = recipe(steps).run()
    assert sys.modules["task"].calls == [1]
    assert result.model[0].out_features == 8
    assert float(result.model[0].bias.detach().abs().min()) > 0.1
    with pytest.raises(depgraph.InputError, match="the steps of another recipe"):
        recipe([{"do": "fuse"}]).run()


def test_what_is_wrong_is_said_at_once() -> None:
    steps: list[Any] = [
        {"do": "prune", "max_parms": 0.5}, {"do": "squeeze"}, {"do": "export"}, {"do": "mask", "drop": 0.1},
    ]  # fmt: skip
    with pytest.raises(depgraph.InputError) as error:
        depgraph.Recipe(model="task:net", steps=steps, output="x", loss=3)
    text = str(error.value)
    for said in ("unknown key 'output'", "inputs is missing", "out is missing", "loss must be a text", "'max_parms'",
                 "not 'squeeze'", "drop needs a score", "come last"):  # fmt: skip
        assert said in text, text


def test_names_that_lead_nowhere(task: Path) -> None:
    with pytest.raises(depgraph.InputError, match="task:gone"):
        recipe([{"do": "fuse"}], score="task:gone").run()
    with pytest.raises(depgraph.InputError, match="training needs data"):
        recipe([{"do": "finetune"}]).run()
    Path("broken.toml").write_text("model = ")
    with pytest.raises(depgraph.InputError, match="can't be read as TOML"):
        depgraph.Recipe.read("broken.toml")


@pytest.mark.slow
def test_quantised_at_the_end(task: Path) -> None:
    pytest.importorskip("torchao")
    result = recipe([{"do": "prune", "pruning_ratio": 0.5}, {"do": "quantise"}]).run()
    assert isinstance(result.model, nn.Module)
    assert result.rows[-1]["step"] == "quantise"
