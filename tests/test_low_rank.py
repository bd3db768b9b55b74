"""Layers as two factors: exact at full rank, as far off as is said below it, and put back where that is no gain."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import check_result
from oracle import assert_untouched, snapshot
from torch import Tensor, nn

import depgraph

DICE = torch.Generator().manual_seed(0)
X = torch.randn(4, 3, 8, 8, generator=DICE)
BATCHES = [torch.randn(32, 3, 8, 8, generator=DICE) for _ in range(3)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1, padding_mode="reflect"), nn.ReLU(),
        nn.Flatten(), nn.Linear(384, 64), nn.ReLU(), nn.Linear(64, 48, bias=False), nn.ReLU(), nn.Linear(48, 4),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("calibration", [None, BATCHES], ids=["plain", "whitened"])
def test_full_rank_is_exact(calibration: Any) -> None:
    model = net().double()
    before = snapshot(model)
    batches = None if calibration is None else [b.double() for b in calibration]
    result = depgraph.factorise(model, X.double(), batches)
    assert_untouched(model, before)
    torch.testing.assert_close(result.model(X.double()), model(X.double()), rtol=1e-10, atol=1e-10)
    assert [f.rank for f in result.plan.factors] == [16, 24, 64, 48, 4]
    assert result.report.verification.status == "equal"
    assert result.report.verification.max_error < 1e-9
    assert all(row["measured_error"] < 1e-18 for row in result.report.rows)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_other_convolutions(kind: Any) -> None:
    model = nn.Sequential(kind(3, 8, 3, stride=2, padding=1, dilation=2), nn.ReLU(), kind(8, 5, 2)).double()
    x = torch.randn(2, 3, *[9] * (1 if kind is nn.Conv1d else 3), dtype=torch.float64)
    result = depgraph.factorise(model, x, [x])
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-10, atol=1e-10)
    assert len(result.plan.factors) == 2


def test_a_budget_is_of_the_original() -> None:
    model = net()
    for share in (0.3, 0.6):
        result = depgraph.factorise(model, X, BATCHES, max_params=share)
        before, after = result.report.parameters
        assert 0.9 * share * before < after <= share * before
        assert sum(p.numel() for p in result.model.parameters()) == after
        ranks = {f.layer: f.rank for f in result.plan.factors}
        for i in (0, 2, 5, 7, 9):
            own, now = model[i], result.model[i]
            if str(i) in ranks:
                assert now[0].weight.shape[0] == ranks[str(i)]
                assert now[0].weight.numel() + now[1].weight.numel() < own.weight.numel()
            else:  # put back as it was
                assert type(now) is type(own)
                assert torch.equal(now.weight, own.weight)
                assert any(n.startswith(f"{i} is as it was") for n in result.report.notes)
        assert result.report.verification.status == "equal"


def test_the_error_is_as_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 40)).double()
    x = torch.randn(500, 40, dtype=torch.float64) * torch.linspace(0.01, 3, 40)
    result = depgraph.factorise(model, x[:4], [x], max_params=0.6)
    result.model.requires_grad_(False)
    given = x
    model.requires_grad_(False)
    for i, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            row = next(r for r in result.report.rows if r["layer"] == str(i))
            off = (result.model[i](given) - layer(given)).square().sum() / (
                layer(given) - layer.bias
            ).square().sum()
            assert row["predicted_error"] == pytest.approx(float(off), rel=1e-6)
            assert row["measured_error"] == pytest.approx(float(off), rel=1e-6)
            _, values, _ = torch.linalg.svd(layer.weight @ torch.linalg.cholesky(given.T @ given))
            least = values[row["rank"] :].square().sum() / values.square().sum()
            assert float(off) == pytest.approx(
                float(least), rel=1e-5
            )  # no other matrix of that rank is closer
        given = layer(given)
    plain = depgraph.factorise(model, x[:4], max_params=0.6)
    plain.model.requires_grad_(False)
    for row in plain.report.rows:
        values = torch.linalg.svdvals(model[int(row["layer"])].weight)
        assert row["measured_error"] == pytest.approx(
            float(values[row["rank"] :].square().sum() / values.square().sum())
        )
    assert (plain.model(x) - model(x)).square().mean() > 2 * (result.model(x) - model(x)).square().mean()


def test_ranks_are_groups_like_others() -> None:
    model = net().double()
    wide = depgraph.factorise(model, X.double(), [b.double() for b in BATCHES]).model
    graph = depgraph.analyze(wide, X.double())
    names = {m.name for g in graph.groups for m in g.members}
    assert {"0.0.weight", "5.0.weight", "9.1.weight"} <= names
    scores = depgraph.scores_of(graph, "spectrum")
    for group in graph.groups:
        if any(m.name == "5.0.weight" and m.dim == 0 for m in group.members):
            assert scores[group.name] == pytest.approx(wide[5][1].weight.detach().square().sum(0).numpy())
    pruned = depgraph.prune(wide, X.double(), importance="spectrum", max_params=0.4)
    check_result(wide, pruned, X.double())


def test_what_stays_as_it_is() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.plain, self.spare = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 9)
            self.tied, self.other, self.hooked = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 9)
            self.other.weight = self.tied.weight
            self.hooked.register_forward_hook(lambda module, args, out: None)
            self.attention = nn.MultiheadAttention(9, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.hooked(self.other(self.tied(self.plain(self.plain(x)))))
            return self.attention(x, x, x)[0] + nn.functional.linear(x, self.read.weight)

    model, x = Net().double().eval(), torch.randn(5, 2, 9, dtype=torch.float64)
    result = depgraph.factorise(model, x, [x])
    assert [f.layer for f in result.plan.factors] == ["plain"]  # called twice
    torch.testing.assert_close(result.model(x), model(x))
    notes = str(result.report.notes)
    for name, why in {
        "read": "is read otherwise",
        "spare": "no run",
        "tied": "is tied",
        "hooked": "it has hooks",
        "attention.out_proj": "is read otherwise",
    }.items():
        assert any(n.startswith(f"{name} is as it was") and why in n for n in result.report.notes), (
            name,
            notes,
        )


def test_code_that_reads_the_type_of_a_weight() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(9, 20), nn.Linear(20, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.to(self.a.weight.dtype)).relu()) / self.a.weight.shape[0]

    model, x = Net(), torch.randn(4, 9)
    result = depgraph.factorise(model, x)
    torch.testing.assert_close(result.model(x), model(x))
    assert result.model.a.weight.shape == (20, 9)
    torch.testing.assert_close(result.model.a.weight, model.a.weight)
    assert torch.equal(result.model.a.bias, model.a.bias)


def test_a_plan_replays_and_is_saved(tmp_path: Path) -> None:
    model = net()
    result = depgraph.factorise(model, X, BATCHES, max_params=0.6)
    plan = depgraph.Plan.from_json(result.plan.to_json())
    other = depgraph.apply(copy.deepcopy(model), plan)
    assert {n: p.shape for n, p in other.named_parameters()} == {
        n: p.shape for n, p in result.model.named_parameters()
    }
    again = depgraph.load(net, depgraph.save(result, tmp_path / "factors"))
    assert torch.equal(again(X), result.model(X))
    layer = plan.factors[0].layer
    assert not result.plan.mask(f"{layer}.weight").any()
    with pytest.raises(depgraph.PlanError, match="can't become two factors"):
        depgraph.apply(result.model, plan)
    with pytest.raises(depgraph.PlanError, match="makes two layers of one"):
        plan.then(plan)
    with pytest.raises(depgraph.PlanError, match="invalid factor"):
        depgraph.Plan.from_json(result.plan.to_json().replace(f'["{layer}", ', f'["{layer}", -'))


WRONG: list[tuple[dict, str]] = [
    ({"max_params": 2.0}, "max_params"),
    ({"max_params": 0.0001}, "can't be reached"),
    ({"nonsense": 1}, "nonsense"),
    ({"inplace": True}, "factorise does not take inplace"),
    ({"ignore": "nothing"}, "'nothing' is no module or parameter"),
    ({"ignore": "*"}, "no layer of this model can become two factors"),
    ({"calibration": X}, "calibration must be an iterable of batches"),
]


@pytest.mark.parametrize(("options", "text"), WRONG, ids=[str(list(o)) for o, _ in WRONG])
def test_bad_input(options: dict, text: str) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(depgraph.DepgraphError, match=text):
        depgraph.factorise(model, X, **options)
    assert_untouched(model, before)
