"""`round_to="auto"`, the default: channels of convolutions in multiples of 4, ratios and budgets as near as with free widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import prune_and_check
from small_models import fresh
from torch import nn

import depgraph

WIDTHS = (64, 96, 80)


class Net(nn.Module):
    """Convolutions of `widths`, a depthwise one and a residual sum among them, and two linear layers."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS, hidden: int = 46) -> None:
        super().__init__()
        a, b, c = widths
        self.stem, self.depthwise = nn.Conv2d(3, a, 3), nn.Conv2d(a, a, 3, groups=a)
        self.wide, self.back, self.third = nn.Conv2d(a, b, 1), nn.Conv2d(b, a, 1), nn.Conv2d(a, c, 1)
        self.first, self.last = nn.Linear(c, hidden), nn.Linear(hidden, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.stem(x).relu()).relu()
        x = x + self.back(self.wide(x).relu())
        return self.last(self.first(self.third(x).relu().mean((2, 3))).relu())


def x() -> torch.Tensor:
    return torch.randn(2, 3, 9, 7, dtype=torch.float64)


def widths(model: nn.Module) -> list[int]:
    return [m.weight.shape[0] for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][:-1]


@pytest.mark.parametrize(
    ("budget", "share", "uniform"),
    [
        ("max_macs", 0.5, False),
        ("max_params", 0.7, False),
        ("max_params", 0.3, False),
        ("max_macs", 0.5, True),
    ],
)
def test_budgets(budget: str, share: float, uniform: bool) -> None:
    result = prune_and_check(fresh(Net), x(), uniform=uniform, **{budget: share})
    *channels, _ = widths(result.model)
    assert all(n % 4 == 0 for n in channels)
    figures = result.report.to_dict()
    found = figures["macs" if budget == "max_macs" else "params"]
    assert 0.99 * share <= found["after"] / found["before"] <= share
    assert figures["channels"]["shrunk"] == figures["channels"]["multiples"] > 0
    assert "run slower" not in str(result.report)


@pytest.mark.parametrize("options", [{}, {"pruning_ratio": 0.5}, {"uniform": True}])
def test_half_is_half(options: dict[str, Any]) -> None:
    result = prune_and_check(fresh(lambda: Net((36, 20, 22))), x(), **options)
    assert widths(result.model) == [18, 18, 10, 18, 11, 23]
    assert result.report.to_dict()["channels"] == {"shrunk": 3, "multiples": 0}
    assert "multiples of 4 among the widths of convolutions that shrank: 0 of 3" in str(result.report)
    assert "run slower" in str(result.report)


def test_a_ratio_is_met_to_one_unit() -> None:
    result = prune_and_check(fresh(lambda: Net((64, 52, 12))), x(), pruning_ratio=0.3)
    assert widths(result.model) == [
        44,
        44,
        36,
        44,
        9,
        33,
    ]  # of 45, 37; 12 is too narrow, a linear layer no convolution


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.37, 0.8, 0.99])
def test_no_ratio_empties_a_layer_or_does_nothing(ratio: float) -> None:
    model = fresh(lambda: Net((16, 20, 24)))
    result = prune_and_check(model, x(), pruning_ratio=ratio, max_ratio=None)
    free = depgraph.prune(model, x(), pruning_ratio=ratio, round_to=1, verify=False)
    for now, exact in zip(widths(result.model), widths(free.model), strict=True):
        assert now >= 1
        assert abs(now - exact) <= 1


@pytest.mark.parametrize("share", [0.5, 0.05])
def test_a_budget_that_steps_would_miss_is_met_with_free_widths(share: float) -> None:
    model = fresh(lambda: Net((16, 20, 16), 7))
    result = prune_and_check(model, x(), max_params=share)
    free = depgraph.prune(model, x(), max_params=share, round_to=1, verify=False)
    left = [sum(p.numel() for p in m.parameters()) for m in (model, result.model, free.model)]
    assert left[1] <= share * left[0]
    assert left[1] >= min(left[2], 0.99 * share * left[0])


def test_units_that_compete_for_a_ratio() -> None:
    model = fresh(Net)
    result = prune_and_check(model, x(), pruning_ratio=0.4, scope="global")
    assert all(n % 4 == 0 for n in widths(result.model)[:-1])
    free = depgraph.prune(model, x(), pruning_ratio=0.4, scope="global", round_to=1, verify=False)
    assert abs(sum(widths(result.model)) - sum(widths(free.model))) <= 8


def test_a_threshold_is_taken_at_its_word() -> None:
    model = fresh(Net)
    with torch.no_grad():
        model.wide.weight[:7] *= 1e-9
        model.wide.bias[:7] *= 1e-9
        model.back.weight[:, :7] *= 1e-9
    result = prune_and_check(model, x(), threshold=0.01)
    assert model.wide.out_channels - result.model.wide.out_channels == 7


def test_in_several_steps_as_in_one() -> None:
    model = fresh(Net)
    for steps in ((0.5,), (0.1, 0.3, 0.5)):
        small, plan = model, None
        for ratio in steps:
            result = depgraph.prune(small, x(), pruning_ratio=ratio, already_pruned=plan)
            plan = result.plan if plan is None else plan.then(result.plan)
            small = result.model
        assert widths(small) == [n // 2 for n in widths(model)], steps


@pytest.mark.parametrize("wrong", ["Auto", "4", "", 0, -4, 2.0, True, None, ["auto"]])
def test_anything_else_is_refused(wrong: Any) -> None:
    with pytest.raises(depgraph.InputError, match="round_to"):
        depgraph.prune(fresh(Net), x(), round_to=wrong)
