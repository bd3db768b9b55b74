"""`max_latency` and `latency=`: timers of one's own, pairs in turn, and budgets that hold though measurements vary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_models import fresh
from torch import nn

import depgraph
from depgraph.costs.latency import pairs_of


def chain() -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in ((16, 61), (61, 67), (67, 71), (71, 5)):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def x() -> torch.Tensor:
    return torch.randn(3, 16, dtype=torch.float64)


class Phone:
    """Seconds that are a function of the widths, with noise, a slow hour now and then, and a count of the calls."""

    def __init__(self, noise: float = 0.0, floor: float = 0.0) -> None:
        self.dice, self.noise, self.floor = np.random.default_rng(0), noise, floor
        self.calls: list[int] = []

    def exact(self, model: nn.Module) -> float:
        return self.floor + 1e-6 * sum(p.numel() for p in model.parameters()) ** 0.8

    def __call__(self, model: nn.Module, inputs: Any) -> float:
        self.calls.append(sum(p.numel() for p in model.parameters()))
        slow = 3.0 if len(self.calls) % 40 > 30 else 1.0  # slows both of a pair
        return self.exact(model) * slow * (1 + self.noise * abs(self.dice.standard_normal()))


@pytest.mark.parametrize("share", [0.6, 0.3])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_timer_of_ones_own(share: float, noise: float) -> None:
    model, phone = fresh(chain), Phone(noise)
    result = depgraph.prune(model, x(), max_latency=share, latency=phone)
    left = phone.exact(result.model) / phone.exact(model)
    assert 0.9 * share <= left <= 1.05 * share
    assert result.report.latency is not None
    before, after = result.report.latency
    assert 0 < after < before
    assert (result.report.latency_spread or 0) < 0.2
    assert "measured in turns" in str(result.report)
    assert result.report.to_dict()["latency"]["spread"] == result.report.latency_spread
    dense = sum(p.numel() for p in model.parameters())
    turns = phone.calls[-6:]
    assert turns[::2] == [dense] * 3  # A B A B
    assert dense not in turns[1::2]


def test_what_can_not_be_reached_is_refused() -> None:
    phone = Phone(floor=1.0)  # seconds that no plan saves
    with pytest.raises(depgraph.BudgetError, match="max_latency"):
        depgraph.prune(fresh(chain), x(), max_latency=0.5, latency=phone)


def test_figures_alone() -> None:
    phone = Phone()
    report = depgraph.prune(fresh(chain), x(), pruning_ratio=0.5, latency=phone).report
    assert report.ratios["latency"] == pytest.approx(report.latency[0] / report.latency[1])  # type: ignore[index]
    assert depgraph.prune(fresh(chain), x(), pruning_ratio=0.5).report.latency is None


def test_the_ratio_is_that_of_pairs_in_turn() -> None:
    model = fresh(chain)
    small = depgraph.prune(model, x(), pruning_ratio=0.5).model
    phone = Phone(0.02)
    found = pairs_of(model, small, x(), phone)
    exact = phone.exact(small) / phone.exact(model)
    assert found.ratio == pytest.approx(exact, rel=max(0.03, found.spread))
    assert found.count % 3 == 0


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), None, "soon"])
def test_no_seconds(value: Any) -> None:
    with pytest.raises(depgraph.InputError, match="latency must return seconds above 0"):
        depgraph.prune(fresh(chain), x(), max_latency=0.5, latency=lambda model, inputs: value)


@pytest.mark.parametrize("wrong", [3, "fast", lambda: 1.0])
def test_no_timer(wrong: Any) -> None:
    with pytest.raises(depgraph.InputError, match="latency"):
        depgraph.prune(fresh(chain), x(), latency=wrong)


@pytest.mark.slow
def test_onnx_runtime() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from depgraph.integrations import onnx_runtime

    model = fresh(chain).float()
    result = depgraph.prune(model, x().float(), pruning_ratio=0.5, latency=onnx_runtime.latency)
    assert 0 < (result.report.latency or (0, 0))[1] < 1
    with pytest.raises(depgraph.InputError, match="ONNX Runtime can't time this model"):
        onnx_runtime.latency(fresh(chain).float(), torch.zeros(3, 2))
