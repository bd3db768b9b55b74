"""The benchmark of trained models: its data handling, its budgets, and its table, held against values by hand."""

from __future__ import annotations

import copy
import json
import math
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import depgraph
from benchmarks import default_call, quality
from benchmarks.real import digits, fashion, fetch, methods, report
from benchmarks.real.case import Budget, Case, Hints


def tiny_case(**changes: object) -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 13), nn.ReLU(), nn.Linear(13, 3)).eval()
    inputs = torch.randn(5, 7)
    settings = {
        "name": "tiny",
        "title": "tiny",
        "budget": Budget("params", 0.6),
        "build": lambda: model,
        "example": lambda: inputs,
        "calibration": lambda seed: [(inputs, torch.arange(5) % 3)],
        "loss": nn.functional.cross_entropy,
        "score": lambda small: {"closeness": -(small(inputs) - model(inputs)).norm().item()},
        "higher": True,
        "hints": Hints(lambda m: {"ignored_layers": [m[4]]}),
    }
    return Case(**(settings | changes))  # type: ignore[arg-type]


def test_shifts_and_mirrors_match_a_loop_over_pixels():
    data = fashion.Images(torch.arange(3 * 7 * 5, dtype=torch.float32).view(3, 1, 7, 5) + 1, torch.arange(3))
    ((images, labels),) = data.training_epoch(3, torch.Generator().manual_seed(4), mirror=True)
    again = torch.Generator().manual_seed(4)
    order = torch.randperm(3, generator=again)
    down, right = torch.randint(0, 5, (2, 3, 1), generator=again).tolist()
    mirrored = (torch.rand(3, 1, generator=again) < 0.5).tolist()
    assert labels.tolist() == order.tolist()
    assert {m[0] for m in mirrored} == {True, False}
    for k, index in enumerate(order.tolist()):
        for y in range(7):
            for x in range(5):
                column = 4 - x if mirrored[k][0] else x
                row, column = y + down[k][0] - 2, column + right[k][0] - 2
                inside = 0 <= row < 7 and 0 <= column < 5
                expected = data.images[index, 0, row, column].item() if inside else 1.0
                assert images[k, 0, y, x].item() == expected


def test_a_sample_depends_on_its_seed_alone():
    data = digits.training()
    first, again, other = data.sample(20, 1), data.sample(20, 1), data.sample(20, 2)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert len(first.images.flatten(1).unique(dim=0)) == 20


def test_training_afterwards_is_that_of_distill(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fashion, "TUNING_IMAGES", 200)
    torch.manual_seed(0)
    teacher, data = digits.net().eval(), digits.training()
    student = depgraph.prune(teacher, torch.zeros(1, 1, 8, 8), max_macs=0.5).model
    other = copy.deepcopy(student)
    before = [p.clone() for p in student.parameters()]
    batches = fashion.answered(teacher, data, seed=7)
    assert [len(images) for images, _ in batches] == [64, 64, 64]
    drawn = data.sample(200, 7).training_epoch(64, torch.Generator().manual_seed(7), mirror=True)
    for (images, logits), (expected, _) in zip(batches, drawn, strict=True):
        assert torch.equal(images, expected)
        assert torch.allclose(logits, teacher(expected), atol=1e-5)
    fashion.distil(student, batches, seed=0)
    optimizer = torch.optim.SGD(other.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
    rise = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.01, total_steps=3, pct_start=0.2, cycle_momentum=False
    )
    images_alone = [images for images, _ in batches]
    depgraph.distill(
        other, teacher, images_alone, optimizer=optimizer, scheduler=rise, alpha=1.0, progress=False
    )
    assert not any(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    for (name, got), expected in zip(student.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(got, expected, atol=1e-5), name


def test_a_part_and_the_rest_share_nothing():
    data = digits.training()
    first, rest = data.part(0, 1000), data.part(1000, len(data))
    assert torch.equal(torch.cat([first.images, rest.images]), data.images)
    assert torch.equal(torch.cat([first.labels, rest.labels]), data.labels)


def test_methods_without_recovery_are_chosen_with_batch_norms_re_estimated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 11), nn.BatchNorm1d(11), nn.ReLU(), nn.Linear(11, 3)).eval()
    inputs = torch.randn(29, 7) * 5 + 3
    case = tiny_case(
        build=lambda: model,
        example=lambda: inputs,
        calibration=lambda seed: [(inputs, torch.arange(29) % 3)],
        score=lambda small: {"mean": small[1].running_mean.abs().sum().item()},
        held_out=lambda small, seed: small[1].running_mean.abs().sum().item(),
    )
    results = quality.Results(None)
    small = methods.prune(methods.MAGNITUDE, case, 0).model
    quality.measure(case, methods.MAGNITUDE, 0, False, results)
    quality.measure(case, methods.MAGNITUDE, 1, True, results)
    first, second = results.rows
    wanted = small[0](inputs).mean(0).abs().sum().item()
    for row in results.rows:
        assert row["score"]["mean"] == small[1].running_mean.abs().sum().item()
        assert row["renormed"]["mean"] == pytest.approx(wanted, rel=1e-5)
    assert first["held_out"] == pytest.approx(wanted, rel=1e-5)
    assert "held_out" not in second


def test_a_budget_leaves_out_what_is_kept():
    model = nn.Sequential(nn.Embedding(17, 5), nn.Linear(5, 11), nn.Linear(11, 5))
    budget = Budget("params", 0.5, ("0",))
    left = 5 * 11 + 11 + 11 * 5 + 5
    assert budget.cost(model, torch.zeros(1, 3, dtype=torch.long)) == left
    assert budget.arguments(model) == {"max_params": 17 * 5 + left // 2, "ignore": ["0.*"]}


@pytest.mark.parametrize("what", ["params", "macs"])
def test_all_methods_keep_to_the_budget(what: str):
    pytest.importorskip("torch_pruning")
    case = tiny_case(budget=Budget(what, 0.6))
    dense = case.budget.cost(case.build(), case.example())
    for method in [methods.MAGNITUDE, *methods.rivals(case)]:
        small = methods.prune(method, case, seed=0).model
        share = case.budget.cost(small, case.example()) / dense
        assert 0.4 < share <= 0.6, method
        assert small(case.example()).shape == (5, 3)
    assert case.budget.cost(case.build(), case.example()) == dense


def test_random_units_follow_from_the_seed():
    case = tiny_case()
    first, again, other = (methods.prune(methods.RANDOM, case, seed).model for seed in (1, 1, 2))
    kept = [small[2].weight for small in (first, again, other)]
    assert torch.equal(kept[0], kept[1])
    assert kept[0].shape != kept[2].shape or not torch.equal(kept[0], kept[2])


def test_gradients_are_those_of_the_summed_loss():
    case = tiny_case()
    model, batches = case.build(), [*case.calibration(0), (torch.ones(2, 7), torch.tensor([2, 0]))]
    found = methods._gradients(model, case.loss, batches)
    total = sum(case.loss(model(inputs), target) for inputs, target in batches)
    for (name, parameter), gradient in zip(
        model.named_parameters(), torch.autograd.grad(total, list(model.parameters())), strict=True
    ):
        assert torch.allclose(found[name], gradient, atol=1e-6), name
        assert parameter.grad is None


def test_rows_are_not_measured_twice_and_the_best_is_found(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    results = quality.Results(path)
    case = tiny_case()
    for name, score in (("a", 0.5), ("b", 0.75), ("c", 0.25)):
        row = {"case": "tiny", "method": name, "tool": "depgraph", "seed": 0, "trained": False}
        results.add(row | {"score": {"closeness": score}})
    again = quality.Results(path)
    assert again.rows == results.rows == [json.loads(line) for line in path.read_text().splitlines()]
    assert again.best(case, "depgraph") == "b"
    assert again.best(tiny_case(higher=False), "depgraph") == "c"
    assert again.best(case, "Torch-Pruning") is None
    quality.measure(case, methods.Method("depgraph", "x", {"importance": "no such"}), 0, False, again)
    assert "importance must be" in again.rows[-1]["error"]
    before = len(again.rows)
    quality.measure(case, methods.Method("depgraph", "x", {"importance": "no such"}), 0, False, again)
    assert len(again.rows) == before


def test_what_is_chosen_on_held_out_data_and_pruned_once(tmp_path: Path):
    seen = []

    def held_out(small: nn.Module, seed: int) -> float:
        seen.append((small[0].out_features, seed))
        return -float(len(seen))

    case, results = tiny_case(held_out=held_out), quality.Results(None)
    for name, importance in (("a", "l1"), ("b", "l2")):
        quality.measure(
            case, methods.Method("depgraph", name, {"importance": importance}), 0, False, results, tmp_path
        )
    assert [r["held_out"] for r in results.rows] == [-1.0, -2.0]
    assert seen[0][0] < 11
    results.rows[1]["score"]["closeness"] = 1e9  # what is evaluated chooses nothing
    assert results.best(case, "depgraph") == "depgraph: a"
    assert results.best(tiny_case(held_out=held_out, higher=False), "depgraph") == "depgraph: b"
    method = methods.Method("depgraph", "a", {"importance": "no such"})  # would fail if it were pruned again
    quality.measure(case, method, 0, True, results, tmp_path)
    assert results.rows[2]["score"] == results.rows[0]["score"]
    quality.measure(case, method, 1, True, results, tmp_path)
    assert "importance must be" in results.rows[3]["error"]


def test_the_page_keeps_its_prose_and_shows_each_seed_once(tmp_path: Path):
    case = tiny_case(higher=False)
    rows = [
        {"case": "tiny", "method": name, "seed": seed, "trained": trained, "share": 0.5, "seconds": 2, "date": "2020-01-02"}
        | {"score": {"loss": score}} | ({"tuned": {"loss": score / 2}} if trained else {})
        for name, seed, trained, score in [("a", 0, False, 3.0), ("b", 0, False, 2.0), ("b", 0, True, 2.0), ("b", 1, True, 4.0)]
    ]  # fmt: skip
    path = tmp_path / "page.md"
    path.write_text(
        f"Prose.\n\n{report.MARKER}\n\nold versions\n\n## other\n\nkept\n\n## tiny\n\nold figures\n\n## last\n\nx\n"
    )
    report.write(path, report.page([case], rows, {"torch": "1"}))
    text = path.read_text()
    assert text.startswith("Prose.\n\n" + report.MARKER)
    assert "old" not in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## other",
        "## tiny",
        "## last",
    ]
    assert "## other\n\nkept\n\n## tiny\n\nFigure: loss.\n\n|" in text
    assert "| a | 0.500 | 3 |  |  | 2 |" in text
    assert "| b | 0.500 | 3 (2 to 4, 2 seeds) |  | 1.5 (1 to 2, 2 seeds) | 2 |" in text


def test_a_failed_download_says_what_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(fetch.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(fetch.sys, "executable", "/bin/false")
    with pytest.raises(fetch.FetchError, match=r"PyPI's gguf==0\.19\.0 could not be fetched(.|\n)*network"):
        fetch.wheel("gguf")
    assert not list(tmp_path.rglob("gguf*"))


def test_a_relative_cache_counts_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Downloads run in folders of their own; what pip is told has to be the same place from there."""

    def pip(command: list[str], cwd: Path, **_: object) -> SimpleNamespace:
        folder = Path(cwd) / command[command.index("--dest") + 1]
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / "gguf-0.19.0-py3-none-any.whl", "w") as archive:
            archive.writestr("gguf/__init__.py", "")
        return SimpleNamespace(returncode=0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(fetch.CACHE_VARIABLE, "here/below")
    monkeypatch.setattr(fetch.subprocess, "run", pip)
    assert fetch.wheel("gguf") == tmp_path / "here/below/pypi/gguf==0.19.0"
    assert (fetch.wheel("gguf") / "gguf/__init__.py").exists()


def test_a_download_that_leaves_no_file_is_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(fetch.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    with pytest.raises(fetch.FetchError, match=r"has no file \*\.whl(.|\n)*" + re.escape(str(tmp_path))):
        fetch.wheel("gguf")


def test_what_making_a_file_leaves_behind_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(fetch.CACHE_VARIABLE, str(tmp_path))

    def half(path: Path) -> None:
        path.write_text("half")
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fetch.cached("folder/file", half)
    assert not (tmp_path / "folder/file").exists()
    assert (
        fetch.cached("folder/file", lambda path: math.nan if path.write_text("whole") else None).read_text()
        == "whole"
    )


def test_each_way_that_the_default_is_compared_with_makes_a_row(capsys: pytest.CaptureFixture[str]):
    every = [*default_call.WITH_DATA, *default_call.without_data()]
    default_call.rows(tiny_case(), every, 0)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("  ")[1] for row in rows] == [method.name for method in every]
    failed = [row for row in rows if "closeness" not in row]
    assert [row.split("  ")[1] for row in failed] == ["bn_scale, local"], "the tiny net has no norm"
