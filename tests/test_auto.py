"""The default call: what it chooses by its rule, with and without data, here and in what calls it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_equal_to_masked
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
from depgraph import InputError
from depgraph.importance import L1, KfacInTurn, Random


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 32),
        nn.ReLU(),
        nn.Linear(32, 24),
        nn.ReLU(),
        nn.Linear(24, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    ).eval()


@pytest.fixture
def data() -> list[Any]:
    torch.manual_seed(1)
    return [(torch.randn(64, 3), torch.randint(0, 5, (64,))) for _ in range(5)]


def kept(net: nn.Module, x: Tensor, **how: Any) -> depgraph.PruneResult:
    return depgraph.prune(net, x, progress=False, **how)


def same(a: depgraph.PruneResult, b: depgraph.PruneResult) -> bool:
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    return ours.keys() == theirs.keys() and all(
        t.shape == theirs[n].shape and torch.equal(t, theirs[n]) for n, t in ours.items()
    )


def same_cuts(a: depgraph.PruneResult, b: depgraph.PruneResult) -> bool:
    return all(torch.equal(a.plan.mask(n), b.plan.mask(n)) for n in a.plan.shapes)


def test_a_ratio_without_data_takes_the_least_sums(net: nn.Module, data: list[Any]) -> None:
    x = data[0][0]
    found = kept(net, x, pruning_ratio=0.5)
    assert same(found, kept(net, x, pruning_ratio=0.5, importance="l1"))
    assert found.report.recovery is None
    assert_equal_to_masked(net, found, x, 1e-5)


@pytest.mark.parametrize(
    "how", [{"max_params": 0.5}, {"max_macs": 0.5}, {"scope": "global", "pruning_ratio": 0.5}]
)
def test_where_groups_compete_without_data_their_shares_are_compared(
    net: nn.Module, data: list[Any], how: Any
) -> None:
    found = kept(net, data[0][0], **how)
    assert same(found, kept(net, data[0][0], **how, importance="lamp"))
    assert not same_cuts(found, kept(net, data[0][0], **how, importance="l1"))
    assert_equal_to_masked(net, found, data[0][0], 1e-5)


def test_with_a_loss(net: nn.Module, data: list[Any]) -> None:
    how: dict[str, Any] = {"max_params": 0.5, "calibration": data, "loss": F.cross_entropy}
    found = kept(net, data[0][0], **how)
    named = kept(net, data[0][0], **how, importance="kfac_in_turn", recover="auto")
    assert same(
        named,
        kept(
            net, data[0][0], **how, importance=KfacInTurn(), normalise="none", per_cost=True, recover="auto"
        ),
    )
    tighter = {**how, "max_params": 0.2}
    by_cost, by_score = (kept(net, data[0][0], **tighter, per_cost=how) for how in (None, False))
    assert not same_cuts(by_cost, by_score)
    assert found.report.recovery is not None
    assert found.report.recovery.layers
    assert not any("signs" in note for note in named.report.notes)
    assert found.plan.request["importance"] == "auto"
    x = data[0][0]
    plain = kept(net, x, max_params=0.5, importance="l1")
    wanted = net(x)
    assert (found.model(x) - wanted).square().mean() < 0.2 * (plain.model(x) - wanted).square().mean()


def held_out_loss(model: nn.Module, data: list[Any], loss: Any) -> float:
    with torch.no_grad():
        return float(loss(model(data[-1][0]), data[-1][1]))


@pytest.mark.parametrize("misleading", [False, True])
def test_scores_by_the_loss_and_by_signs_are_compared_by_the_loss_on_held_out_data(
    net: nn.Module, data: list[Any], misleading: bool
) -> None:
    """A loss may have the gradients of one output alone, or of a target that only it knows."""

    def loss(out: Tensor, target: Tensor) -> Tensor:
        value = (out - target).square().mean()
        return value.detach() + 1e3 * (out[:, 0] - out[:, 0].detach()).mean() if misleading else value

    with torch.no_grad():
        pairs = [
            (x, net(x) * torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0 if misleading else 30.0])) for x, _ in data
        ]
    how: dict[str, Any] = {"max_params": 0.3, "calibration": pairs, "loss": loss}
    x = data[0][0]
    found = kept(net, x, **how)
    by_loss, by_signs = (
        kept(net, x, **how, importance=KfacInTurn(use_loss=use), recover="auto") for use in (True, False)
    )
    lost = [held_out_loss(r.model, pairs, loss) for r in (by_loss, by_signs)]
    assert lost[0] != lost[1]
    assert same(found, (by_loss, by_signs)[lost[1] < lost[0]])
    assert lost[1] < lost[0] or not misleading
    (note,) = (n for n in found.report.notes if "held-out calibration data the loss is" in n)
    assert f"{min(lost):.4g} then, and {max(lost):.4g} with" in note
    assert note.startswith(
        f"importance: units were scored by {'signs at the outputs' if lost[1] < lost[0] else 'the loss'}"
    )
    assert_equal_to_masked(net, kept(net, x, **how, recover="none"), x, 1e-5)


def test_what_can_not_be_compared_is_scored_by_the_loss(
    net: nn.Module, data: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(output: Any, seed: int) -> Tensor:
        raise InputError("no signs here")

    monkeypatch.setattr("depgraph.importance.kfac.signed", none)
    how: dict[str, Any] = {"max_params": 0.5, "calibration": data, "loss": F.cross_entropy}
    found = kept(net, data[0][0], **how)
    assert any("no signs here" in note for note in found.report.notes)
    assert same(found, kept(net, data[0][0], **how, importance="kfac_in_turn", recover="auto"))
    with pytest.raises(InputError, match="no signs here"):
        kept(net, data[0][0], max_params=0.5, calibration=[x for x, _ in data])


def test_batches_that_come_in_another_order_each_time_are_read_once(net: nn.Module, data: list[Any]) -> None:
    class Shuffled:
        reads = 0

        def __iter__(self) -> Any:
            Shuffled.reads += 1
            yield from data[Shuffled.reads % 5 :] + data[: Shuffled.reads % 5]

    kept(net, data[0][0], max_params=0.5, calibration=Shuffled(), loss=F.cross_entropy)
    assert Shuffled.reads == 1


def test_a_function_that_recovers_is_called_once(net: nn.Module, data: list[Any]) -> None:
    calls = []
    kept(
        net, data[0][0], max_params=0.5, calibration=data, loss=F.cross_entropy,
        recover=lambda model, small, plan, graph, calibration: calls.append(small),
    )  # fmt: skip
    assert len(calls) == 1


def test_with_inputs_alone_the_report_says_what_stood_for_the_loss(net: nn.Module, data: list[Any]) -> None:
    inputs = [x for x, _ in data]
    found = kept(net, inputs[0], max_params=0.5, calibration=inputs)
    assert any("random signs at the outputs" in note for note in found.report.notes)
    assert found.report.recovery is not None
    few = kept(net, inputs[0], max_params=0.5, calibration=[inputs[0][:6]])
    assert any(
        "of more inputs than there are calibration samples" in note and "0.01 of their mean" in note
        for note in few.report.notes
    )


def test_recovery_comes_with_the_rule_alone(net: nn.Module, data: list[Any]) -> None:
    how: dict[str, Any] = {"max_params": 0.5, "calibration": data, "loss": F.cross_entropy}
    x = data[0][0]
    assert kept(net, x, **how, importance="taylor").report.recovery is None
    bare = kept(net, x, **how, recover="none")
    assert bare.report.recovery is None
    assert same_cuts(bare, kept(net, x, **how))
    assert_equal_to_masked(net, bare, x, 1e-5)
    with pytest.raises(InputError, match="needs calibration data"):
        kept(net, x, recover="auto")


def test_what_is_said_of_cost_and_scale_goes_before_the_rule(net: nn.Module, data: list[Any]) -> None:
    how: dict[str, Any] = {"max_params": 0.5, "calibration": data, "loss": F.cross_entropy}
    standard = kept(net, data[0][0], **how, normalise="standard")
    assert standard.plan.request["normalise"] == "standard"
    assert "per_cost" not in standard.plan.request
    with pytest.raises(InputError, match="per_cost divides scores"):
        kept(net, data[0][0], **how, normalise="standard", per_cost=True)
    with pytest.raises(InputError, match="True or False"):
        kept(net, data[0][0], per_cost=1)


def test_scores_sweeps_and_scans_go_by_the_same_rule(net: nn.Module, data: list[Any]) -> None:
    x = data[0][0]
    graph = depgraph.analyze(net, x)
    for name, scores in depgraph.scores_of(graph).items():
        assert scores.tolist() == depgraph.scores_of(graph, L1())[name].tolist()

    @torch.no_grad()
    def score(model: nn.Module) -> float:
        return -float((model(x) - net(x)).square().mean())

    how: dict[str, Any] = {"calibration": data, "loss": F.cross_entropy}
    table = depgraph.sweep(
        net, x, budgets={"max_params": [0.5]}, score=score, latency=False, progress=False, **how
    )
    assert table.rows[0].score == pytest.approx(score(kept(net, x, max_params=0.5, **how).model))
    bare = depgraph.sweep(net, x, budgets={"max_params": [0.5]}, score=score, latency=False, progress=False)
    assert bare.rows[0].score == pytest.approx(score(kept(net, x, max_params=0.5).model))
    ratios = depgraph.sweep(net, x, [0.5], score=score, latency=False, progress=False)
    assert ratios.rows[0].score == pytest.approx(score(kept(net, x, pruning_ratio=0.5).model))


def test_without_a_floating_point_output_there_is_nothing_to_go_by(data: list[Any]) -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x))).argmax(1)

    net = Classes().eval()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(InputError, match="returns no floating-point tensor"):
        kept(net, data[0][0], calibration=[x for x, _ in data])
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert kept(net, data[0][0]).model.one.out_features == 4


def test_units_chosen_without_data_lose_less_than_random_ones() -> None:
    """A net of which the first layer has units to spare and the others have none."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)).double()
    with torch.no_grad():
        net[0].weight[8:] *= 0.01
        net[0].bias[8:] *= 0.01
        net[2].weight[:, 8:] *= 0.01
    x = torch.randn(128, 7).double()

    @torch.no_grad()
    def lost(**how: Any) -> float:
        return float((kept(net, x, max_params=0.4, **how).model(x) - net(x)).square().mean())

    chance = min(lost(importance=Random(seed)) for seed in range(3))
    assert lost() < 0.1 * chance


def test_a_model_whose_loss_is_not_finite_is_the_worse_one(net: nn.Module, data: list[Any]) -> None:
    """The loss of what is scored by itself, and of nothing else, is infinite on held-out data."""
    seen: list[Tensor] = []

    def loss(out: Tensor, target: Tensor) -> Tensor:
        value = F.cross_entropy(out, target)
        held_out = not out.requires_grad
        seen.extend([value] if held_out else [])
        return value * float("inf") if held_out and len(seen) == 1 else value

    how: dict[str, Any] = {"max_params": 0.5, "calibration": data, "loss": loss}
    found = kept(net, data[0][0], **how)
    assert len(seen) == 2  # each model on the one held-out batch
    named = kept(net, data[0][0], **how, importance=KfacInTurn(use_loss=False), recover="auto")
    assert same(found, named)
    assert any(
        "the loss is" in note and "and inf with scores by the loss" in note for note in found.report.notes
    )
