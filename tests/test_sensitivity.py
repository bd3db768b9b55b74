"""The scan of one group at a time, against plans made by hand; what it suggests; what an interrupted one leaves."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_untouched, snapshot
from test_sweep import Tall
from torch import Tensor, nn
from two_blocks import Agreement

import depgraph
from depgraph.exploring.sweep import ScoredOnce
from depgraph.importance import CRITERIA

GROUPS = ["stem.weight:0", "up.weight:0", "wide.weight:0"]


def cut_alone(net: nn.Module, x: Tensor, tensor: str, ratio: float) -> nn.Module:
    """The model with the units that `tensor` produces cut to `ratio`, and nothing else."""
    graph = depgraph.analyze(net, x)
    masks = depgraph.choose(graph, depgraph.scores_of(graph), pruning_ratio={tensor: ratio})
    return depgraph.apply(net, depgraph.build_plan(graph, masks)).eval()


def test_each_score_is_that_of_one_group_cut_alone(net: nn.Module, x: Tensor) -> None:
    score, before = Agreement(net, x), snapshot(net)
    found = depgraph.sensitivity(net, x, score, ratios=(0.6, 0.2))
    assert_untouched(net, before)
    assert score.calls == 1 + 3 * 2
    assert found.groups == GROUPS
    assert found.ratios == (0.2, 0.6)
    wanted = [[score(cut_alone(net, x, g[:-2], r)) for r in (0.2, 0.6)] for g in GROUPS]
    assert np.array_equal(found.scores, np.array(wanted))
    assert len(np.unique(found.scores)) == 6
    assert np.array_equal(found.losses(), found.dense - found.scores)
    assert found.to_dict()["groups"][1] == {"name": "up.weight:0", "scores": list(found.scores[1])}
    assert all(cell in str(found) for cell in (*GROUPS, f"{found.scores[2, 1]:.4g}"))


def test_units_go_by_the_criterion_that_is_asked_for(net: nn.Module, x: Tensor) -> None:
    score, batches = Agreement(net, x), [torch.randn(5, 3, 7, 13)]
    found = depgraph.sensitivity(
        net, x, score, (0.4,), importance="activation_variance", calibration=iter(batches), ignore=["up"]
    )
    assert found.groups == ["wide.weight:0"]  # the stream is a dim of what is ignored
    options = {"importance": "activation_variance", "calibration": batches}
    wanted = depgraph.prune(net, x, pruning_ratio={"wide.weight": 0.4}, **options)
    assert found.scores[0, 0] == score(wanted.model.eval()) != score(cut_alone(net, x, "wide.weight", 0.4))


def test_groups_by_name(net: nn.Module, x: Tensor) -> None:
    def names(*patterns: str) -> list[str]:
        return depgraph.sensitivity(net, x, lambda _: 0.0, (0.5,), groups=patterns).groups

    assert names("up") == names("up.weight") == names("up.weight:0") == names("u*") == ["up.weight:0"]
    assert names("wide", "stem") == ["stem.weight:0", "wide.weight:0"]
    assert names("down") == ["stem.weight:0"]  # it writes to the stream
    with pytest.raises(depgraph.InputError, match=r"'head'.*there are stem\.weight:0"):
        names("up", "head")


def test_only_the_first_plan_of_each_group_is_verified(
    net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("depgraph.exploring.sensitivity")
    verified, verify = [], module.verify_values

    def counted(model: nn.Module, small: nn.Module, plan: depgraph.Plan, inputs: Any) -> Any:
        verified.append(tuple(plan.new_shape(n)[0] for n in ("stem.weight", "up.weight", "wide.weight")))
        return verify(model, small, plan, inputs)

    monkeypatch.setattr(module, "verify_values", counted)
    depgraph.sensitivity(net, x, lambda _: 0.0, (0.3, 0.6))
    assert verified == [(8, 19, 29), (11, 14, 29), (11, 19, 21)]
    depgraph.sensitivity(net, x, lambda _: 0.0, (0.3, 0.6), verify=False)
    assert len(verified) == 3


def test_a_plan_that_does_not_verify_is_no_score(
    net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("depgraph.exploring.sensitivity")

    def refuse(model: nn.Module, small: nn.Module, plan: depgraph.Plan, inputs: Any) -> Any:
        if "up.bias" in plan.cuts:
            raise depgraph.VerificationError("not equal")

    monkeypatch.setattr(module, "verify_values", refuse)
    found = depgraph.sensitivity(net, x, lambda _: 1.0, (0.3, 0.6))
    assert np.isnan(found.scores[1]).all()
    assert np.array_equal(found.scores[[0, 2]], np.ones((2, 2)))
    assert found.errors["up.weight:0", 0.6] == "VerificationError: not equal"
    assert "failed" in str(found)
    assert "not equal" in str(found)
    assert found.suggest(1.0)["up.weight"] == 0.0


def test_a_comparison_that_would_come_out_differently_is_no_score() -> None:
    net, x = Tall().eval(), torch.randn(2, 5)
    found = depgraph.sensitivity(net, x, lambda _: 1.0, (0.3, 0.8))
    assert [list(np.isnan(row)) for row in found.scores] == [[False, True], [False, False], [False, False]]
    assert "a comparison of sizes in forward" in found.errors["a.weight:0", 0.8]


def test_too_few_units_for_a_ratio_cost_nothing(net: nn.Module, x: Tensor) -> None:
    score = Agreement(net, x)
    found = depgraph.sensitivity(net, x, score, (0.05,), groups=["stem", "wide"])
    assert score.calls == 2
    assert found.scores[0, 0] == found.dense
    assert found.scores[1, 0] < found.dense


def test_what_is_suggested_is_what_prune_takes(net: nn.Module, x: Tensor) -> None:
    found = depgraph.Sensitivity(
        0.9, GROUPS, ["stem.weight", "up.weight", "wide.weight"], (0.2, 0.4, 0.6),
        np.array([[0.8, 0.89, 0.89], [0.89, 0.889, 0.5], [0.91, np.nan, 0.9]]),
    )  # fmt: skip
    assert found.suggest(0.02) == {"stem.weight": 0.0, "up.weight": 0.4, "wide.weight": 0.2}
    assert found.suggest(0.4) == {"stem.weight": 0.6, "up.weight": 0.6, "wide.weight": 0.2}
    found.tensors[2] = "up.weight"  # one tensor produces the units of both
    assert found.suggest(0.02) == {"stem.weight": 0.0, "up.weight": 0.2}
    found.tensors[2] = "wide.weight"
    with pytest.raises(depgraph.InputError, match="drop"):
        found.suggest(float("nan"))
    small = depgraph.prune(net, x, pruning_ratio=found.suggest(0.02)).model
    assert [m.out_channels for m in (small.stem, small.up, small.wide)] == [11, 19 - 7, 29 - 5]


class Packed(nn.Module):
    """q and k share their width, v has its own, and all three come from one weight: that names two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(7, 3 * 11), nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.transpose(1, 2) * 0.3).softmax(-1) @ v)


def test_groups_that_one_tensor_produces() -> None:
    net, x = Packed().eval(), torch.randn(2, 4, 7)
    found = depgraph.sensitivity(net, x, Agreement(net, x), (0.3, 0.6))
    assert len(set(found.groups)) == len(found.groups) == len(found.tensors)
    suggested = found.suggest(float(found.losses().max()))
    assert suggested == dict.fromkeys(found.tensors, 0.6)
    small = depgraph.prune(net, x, pruning_ratio=suggested).model
    assert small.qkv.out_features == 2 * (11 - 6) + (11 - 6)


def test_ctrl_c_leaves_the_model_and_the_scan_goes_on(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    file, before = tmp_path / "rows.jsonl", snapshot(net)
    interrupted = Agreement(net, x, fails_at=5, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        depgraph.sensitivity(net, x, interrupted, (0.3, 0.6), file=file)
    assert_untouched(net, before)
    score = Agreement(net, x)
    found = depgraph.sensitivity(net, x, score, (0.3, 0.6), file=file)
    assert score.calls == 3
    whole = depgraph.sensitivity(net, x, Agreement(net, x), (0.3, 0.6))
    assert np.array_equal(found.scores, whole.scores)
    more = depgraph.sensitivity(net, x, score, (0.3, 0.5, 0.6), groups=["up"], file=file)
    assert score.calls == 4
    assert np.array_equal(more.scores[0, [0, 2]], whole.scores[1])
    rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert [(r["group"], r["ratio"]) for r in rows[:3]] == [("dense", 0), (GROUPS[0], 0.3), (GROUPS[0], 0.6)]


def test_rows_of_a_sweep_are_not_those_of_a_scan(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    depgraph.sweep(net, x, (0.5,), score=Agreement(net, x), file=file, latency=False)
    with pytest.raises(depgraph.InputError, match="kind"):
        depgraph.sensitivity(net, x, Agreement(net, x), file=file)


@pytest.mark.parametrize("ratios", [(), (0.0,), (1.0,), (0.5, float("nan")), ("a",)])
def test_bad_ratios(net: nn.Module, x: Tensor, ratios: tuple[Any, ...]) -> None:
    with pytest.raises(depgraph.InputError, match="ratios"):
        depgraph.sensitivity(net, x, lambda _: 0.0, ratios)


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_compare_as_their_criterion_says(name: str) -> None:
    wanted = getattr(CRITERIA[name], "normalise", "mean")
    assert ScoredOnce(name).normalise == ScoredOnce(CRITERIA[name]()).normalise == wanted
