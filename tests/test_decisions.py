"""Sizes that only decide: the number may change, the decision may not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import depgraph


class Net(nn.Module):
    """A tensor of sizes is compared with a limit; the test's outcome chooses the sign."""

    def __init__(self, limit: float, also_computes: bool = False):
        super().__init__()
        self.a, self.b, self.last = nn.Linear(5, 8), nn.Linear(5, 12), nn.Linear(12, 3)
        self.limit, self.also_computes = limit, also_computes

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        sizes = torch.tensor([float(a.shape[0]), a.shape[1]])
        sign = 1.0 if bool(sizes[1] > self.limit) else -1.0
        factor = sizes.sum() if self.also_computes else 1.0
        return self.last(b) * a.tanh().sum(1, keepdim=True) * sign * factor


def widths(*arguments: float | bool, verify: bool) -> tuple[int, int]:
    model, x = Net(*arguments), torch.randn(2, 5)
    small = depgraph.prune(model, x, pruning_ratio=0.5, verify=verify).model
    return small.a.out_features, small.b.out_features


@pytest.mark.parametrize("verify", [True, False])
def test_a_decision_stays_what_it_was(verify: bool):
    assert widths(3.0, verify=verify) == (4, 6), "4 > 3 as 8 > 3 was"
    assert widths(5.0, verify=verify) == (8, 6), "4 > 5 would be false"
    assert widths(9.0, verify=verify) == (4, 6)


def test_sizes_that_are_computed_with_stay():
    assert widths(3.0, True, verify=False) == (8, 6)
