"""Whether all values are finite, told by their extremes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import depgraph
from depgraph.base.values import all_finite

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 500, 1000])
def test_one_value_is_found_wherever_it_stands(dtype: torch.dtype, value: float, at: int) -> None:
    tensor = torch.linspace(-3, 3, 1001).to(dtype)
    tensor[7] = torch.finfo(dtype).max  # large, and finite
    tensor[8] = torch.finfo(dtype).min
    assert all_finite(tensor)
    assert all_finite(tensor[::2].view(3, -1).T)
    tensor[at] = value
    assert not all_finite(tensor)


def test_other_tensors() -> None:
    assert all_finite(torch.zeros(0, 3))
    assert all_finite(torch.arange(3))
    assert all_finite(torch.tensor(1.0))
    assert not all_finite(torch.tensor(float("nan")))


def test_models_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).half()
    with torch.no_grad():
        model[0].bias[5] = float("inf")
    with pytest.raises(depgraph.InputError, match=r"0\.bias"):
        depgraph.prune(model, torch.zeros(1, 3).half(), importance=lambda group: range(group.units))
