"""Sweeps and sensitivity scans against direct calls of `prune`; scores in reports; what an interrupted run leaves."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph


class Net(nn.Module):
    """Two blocks of prime widths on one stream, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 11, 3, padding=1)
        self.norm = nn.BatchNorm2d(11)
        self.up, self.down = nn.Conv2d(11, 19, 3, padding=1), nn.Conv2d(19, 11, 1)
        self.wide, self.narrow = nn.Conv2d(11, 29, 1), nn.Conv2d(29, 11, 1)
        self.head = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.down(F.relu(self.up(x)))
        x = x + self.narrow(F.relu(self.wide(x)))
        return self.head(x.mean((2, 3)))


class Agreement:
    """Minus the distance from the dense model's outputs; counts its calls and can fail at one of them."""

    def __init__(self, model: nn.Module, x: Tensor, fails_at: int = -1, error: BaseException | None = None):
        with torch.no_grad():
            self.x, self.wanted = x, model.eval()(x)
        self.calls, self.fails_at, self.error = 0, fails_at, error

    def __call__(self, model: nn.Module) -> float:
        assert not any(m.training for m in model.modules())
        self.calls += 1
        if self.calls == self.fails_at and self.error is not None:
            raise self.error
        with torch.no_grad():
            return -float((model(self.x) - self.wanted).norm())


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 7, 13, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------ score and graph


def test_scores_before_and_after_are_in_the_report(net: nn.Module, x: Tensor) -> None:
    score = Agreement(net, x)
    net.train()
    net.norm.eval()
    modes = [m.training for m in net.modules()]
    result = depgraph.prune(net, x, pruning_ratio=0.3, score=score)
    assert [m.training for m in net.modules()] == modes == [m.training for m in result.model.modules()]
    assert score.calls == 2
    wanted = {"before": score(net.eval()), "after": score(result.model.eval())}
    assert result.report.to_dict()["score"] == wanted
    assert wanted["after"] < -0.01 < wanted["before"] == 0
    assert f"{wanted['after']:.4g}" in str(result.report)


@pytest.mark.parametrize("given", [float("nan"), "high", torch.zeros(2)], ids=["nan", "text", "two numbers"])
def test_a_score_that_is_no_number_is_refused(net: nn.Module, x: Tensor, given: object) -> None:
    with pytest.raises(depgraph.InputError, match="score"):
        depgraph.prune(net, x, score=lambda _: given, inplace=True)
    assert net.up.weight.shape == (19, 11, 3, 3)


def test_prune_goes_on_from_a_graph(net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = depgraph.analyze(net, x, ignore=["wide"])
    wanted = depgraph.prune(net, x, pruning_ratio=0.4, ignore=["wide"]).plan.to_json()
    monkeypatch.setattr(
        importlib.import_module("depgraph.prune"), "analyze", lambda *_, **__: pytest.fail("traced again")
    )
    assert depgraph.prune(net, x, pruning_ratio=0.4, graph=graph).plan.to_json() == wanted


def test_a_graph_of_another_model_is_refused(net: nn.Module, x: Tensor) -> None:
    graph = depgraph.analyze(net, x)
    with pytest.raises(depgraph.InputError, match="another model"):
        depgraph.prune(Net().eval(), x, graph=graph)
    with pytest.raises(depgraph.InputError, match="analyze"):
        depgraph.prune(net, x, graph=graph, ignore=["stem"])


def test_what_is_frozen_meanwhile_is_free_again(net: nn.Module, x: Tensor) -> None:
    graph = depgraph.analyze(net, x)
    groups = list(graph.groups)
    with graph.unfreezing():
        graph.freeze([groups[0].axis], depgraph.axes.Reason("is frozen for a while"))
        assert groups[0].axis.frozen is not None
        assert len(graph.groups) == len(groups) - 1
    assert graph.groups == groups
    assert graph.by_axis == {id(g.axis): g for g in groups}
    assert all(g.axis.frozen is None for g in groups)
