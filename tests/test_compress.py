"""Widths, depth and ranks at one budget: the nearest model is returned, and no single kind is nearer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_untouched, snapshot
from torch import Tensor, nn

import depgraph

DICE = torch.Generator().manual_seed(0)
BATCHES = [torch.randn(32, 12, generator=DICE) for _ in range(4)]
X = BATCHES[0][:3]


class Branch(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, width), nn.Linear(width, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def net(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*map(Branch, widths), nn.Linear(12, 5)).eval()


def off(model: nn.Module, small: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        errors = [
            ((small(b) - model(b)).double().square().sum() / model(b).double().square().sum()).item()
            for b in batches
        ]
    return sum(errors) / len(errors)


def test_the_nearest_is_taken() -> None:
    model = net(16, 16)
    before = snapshot(model)
    result = depgraph.compress(model, X, calibration=BATCHES, max_params=0.6, progress=False)
    assert_untouched(model, before)
    tried = {row["way"]: row["off"] for row in result.report.rows if row["off"] != "-"}
    assert {"width", "depth", "rank", "width and depth"} <= tried.keys()
    taken = result.report.figures["taken"]
    assert tried[taken] == min(tried.values())
    assert off(model, result.model, BATCHES[3::4]) == pytest.approx(tried[taken], rel=1e-5)
    assert result.report.parameters[1] <= 0.6 * result.report.parameters[0]
    assert sum(p.numel() for p in result.model.parameters()) == result.report.parameters[1]
    assert result.report.verification.status == "equal"
    assert str(result).startswith(taken)


def test_a_single_kind_is_what_prune_gives() -> None:
    model = net(24, 24)
    seen = [b for i, b in enumerate(BATCHES) if i % 4 != 3]
    result = depgraph.compress(model, X, calibration=BATCHES, kinds=["width"], max_params=0.5, progress=False)
    alone = depgraph.prune(model, X, calibration=seen, max_params=depgraph.parameter_count(model) // 2)
    for name in result.plan.cuts | alone.plan.cuts:
        assert torch.equal(result.plan.mask(name), alone.plan.mask(name))
    torch.testing.assert_close(result.model(X), alone.model(X))
    assert [row["way"] for row in result.report.rows] == ["width"]


def test_low_rank_where_that_is_what_there_is(tmp_path: Any) -> None:
    """A layer of rank 3 loses nothing as two factors, and much without units."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 5)).eval()
    with torch.no_grad():
        model[2].weight.copy_(torch.randn(40, 3) @ torch.randn(3, 40) / 6)
    result = depgraph.compress(model, X, calibration=BATCHES, max_params=0.5, progress=False)
    assert result.report.figures["taken"] == "rank"
    assert not any(row["way"].startswith("depth, then") for row in result.report.rows)
    depgraph.save(result, tmp_path / "small")
    torch.testing.assert_close(
        depgraph.load(lambda: nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 5)), tmp_path / "small").eval()(X),
        result.model(X),
    )  # fmt: skip


def test_two_steps_are_saved_and_loaded(tmp_path: Any) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(12, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 5)
        ).eval()

    torch.manual_seed(0)
    model = make()
    with torch.no_grad():  # half of the units are dead, the rest of low rank
        model[2].weight.copy_(torch.randn(128, 12) @ torch.randn(12, 128) / 30)
        for layer in (model[0], model[2]):
            layer.weight[::2] = 0
            layer.bias[::2] = -1
    result = depgraph.compress(model, X, calibration=BATCHES, max_params=0.23, progress=False)
    tried = {row["way"]: row["off"] for row in result.report.rows if row["off"] != "-"}
    assert "width, then rank" in tried
    assert result.report.figures["taken"] == "width, then rank"
    assert len(result.before) == 1
    depgraph.save(result, tmp_path / "small")
    torch.testing.assert_close(depgraph.load(make, tmp_path / "small").eval()(X), result.model(X))


@pytest.mark.slow
def test_targets_and_a_loss_decide() -> None:
    model = net(24, 24)
    pairs = [(b, torch.randint(0, 5, (len(b),), generator=DICE)) for b in BATCHES]
    result = depgraph.compress(
        model, X, calibration=pairs, loss=nn.functional.cross_entropy, max_macs=0.7, progress=False
    )
    tried = [row["off"] for row in result.report.rows if row["off"] != "-"]
    with torch.no_grad():
        losses = [float(nn.functional.cross_entropy(result.model(b), y)) for b, y in pairs[3::4]]
    assert min(tried) == pytest.approx(losses[0], rel=1e-5)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "give a budget, such as max_params"),
    ({"max_params": 0.5, "kinds": "width"}, "kinds must be some of width, depth, rank"),
    ({"max_params": 0.5, "kinds": ["with"]}, "unknown kind 'with': 'width'"),
    ({"max_params": 0.5, "kinds": []}, "kinds must be some of"),
    ({"max_param": 0.5}, "no argument 'max_param': 'max_params'"),
    ({"pruning_ratio": 0.5}, "no argument 'pruning_ratio'"),
    ({"max_params": 1.5}, "max_params"),
    ({"max_params": 0.5, "calibration": BATCHES[:1]}, "at least two, not 1"),
    ({"max_params": 0.5, "calibration": X}, "calibration must be an iterable of batches"),
    ({"max_params": 0.5, "ignore": "nothing"}, "'nothing'"),
    ({"max_params": 0.0001}, "can't be reached"),
]


@pytest.mark.parametrize(("options", "text"), WRONG, ids=[str(list(o.items()))[:60] for o, _ in WRONG])
def test_bad_input(options: dict[str, Any], text: str) -> None:
    model = net(8)
    before = snapshot(model)
    with pytest.raises(depgraph.DepgraphError, match=text):
        depgraph.compress(model, X, **{"calibration": BATCHES, **options})
    assert_untouched(model, before)
