"""Ratios and budgets: how much goes."""

from __future__ import annotations

import pytest
import torch
from contract_models import (
    Residual,
    assert_replays,
    assert_same_function,
    images,
    parameters,
    residual,
    shapes,
    snapshot,
)
from torch import nn

import depgraph


def test_default_is_half_of_each_dim() -> None:
    model = residual()
    before = snapshot(model)
    result = depgraph.prune(model, images())
    assert snapshot(model) == before
    assert type(result.model) is Residual
    assert result.model is not model
    assert shapes(result.model) == {
        name: tuple({32: 16, 48: 24, 20: 10}.get(size, size) for size in shape)
        for name, shape in shapes(model).items()
    }
    assert result.model.stem.out_channels == 16
    assert result.model.block[1].num_features == 24
    assert result.model.head.in_features == 16
    assert_replays(result.model, model, result.plan)
    assert_same_function(result.model, model, result.plan, images(3))


@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_ratio(ratio: float) -> None:
    model = residual()
    result = depgraph.prune(model, images(), pruning_ratio=ratio)
    assert result.model.block[0].out_channels == round(48 * (1 - ratio))
    assert result.model.stem.out_channels == round(32 * (1 - ratio))
    assert_same_function(result.model, model, result.plan, images(3))


def test_l1_keeps_the_large() -> None:
    """The units whose weights were made tiny everywhere are the ones that go."""
    model = residual()
    small = torch.arange(48) % 2 == 0
    with torch.no_grad():
        model.block[0].weight[small] *= 1e-3
        model.block[3].weight[:, small] *= 1e-3
        model.block[1].weight[small] *= 1e-3
        model.block[1].bias[small] *= 1e-3
    plan = depgraph.prune(model, images()).plan
    assert torch.equal(plan.mask("block.1.weight"), ~small)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_max_params_is_met_from_below(budget: float) -> None:
    model = residual()
    result = depgraph.prune(model, images(), max_params=budget)
    left = parameters(result.model) / parameters(model)
    assert budget - 0.04 <= left <= budget
    assert_replays(result.model, model, result.plan)
    assert_same_function(result.model, model, result.plan, images(3))


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_max_macs_is_met_from_below(budget: float) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images())
        return counter.get_total_flops()

    model = residual()
    result = depgraph.prune(model, images(), max_macs=budget)
    left = flops(result.model) / flops(model)
    assert budget - 0.04 <= left <= budget
    assert_same_function(result.model, model, result.plan, images(3))


def test_both_budgets_hold() -> None:
    model = residual()
    result = depgraph.prune(model, images(), max_params=0.6, max_macs=0.4)
    after = result.report.to_dict()
    assert parameters(result.model) <= 0.6 * parameters(model)
    assert "macs" in after


@pytest.mark.parametrize("multiple", [4, 8])
def test_round_to(multiple: int) -> None:
    model = residual(stream=40, middle=56)
    for options in ({"pruning_ratio": 0.4}, {"max_params": 0.5}):
        result = depgraph.prune(model, images(), round_to=multiple, **options)
        assert result.model.stem.out_channels % multiple == 0
        assert result.model.block[0].out_channels % multiple == 0
        assert parameters(result.model) < parameters(model)
        assert_same_function(result.model, model, result.plan, images(3))


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (("block.0",), {"block.0.weight"}),
        (("block.0.weight",), {"block.0.weight"}),
        (("block.1.bias",), {"block.1.bias", "block.1.weight", "block.1.running_mean"}),
        (("block.*",), {"block.0.weight", "block.1.weight", "block.3.weight", "stem.weight", "head.weight"}),
        (("block.?.bias", "stem"), {"stem.bias", "block.1.bias", "block.3.bias", "head.bias"}),
        (("head",), {"head.weight", "stem.bias", "second.2.bias"}),
    ],
    ids=["module", "parameter", "coupled", "glob", "glob and module", "through the sums"],
)
def test_ignore(names: tuple[str, ...], kept: set[str]) -> None:
    """What is ignored keeps its shape, and so does all that must agree with it."""
    model = residual()
    result = depgraph.prune(model, images(), ignore=names)
    for name in kept:
        assert result.plan.mask(name).all(), name
    assert parameters(result.model) < parameters(model)
    assert_same_function(result.model, model, result.plan, images(3))


def test_ignore_takes_one_name_too() -> None:
    result = depgraph.prune(residual(), images(), ignore="stem")
    assert result.model.stem.out_channels == 32
    assert result.model.block[0].out_channels == 24
