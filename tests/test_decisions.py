"""Sizes that only decide: the number may change, the decision may not."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import assert_equal_to_masked
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


def test_sizes_that_are_computed_with_stay_what_they_were():
    model, x = Net(3.0, True).double(), torch.randn(2, 5).double()
    result = depgraph.prune(model, x, pruning_ratio=0.5, verify=False)
    assert result.model.a.out_features == 4
    assert_equal_to_masked(model, result, x)


class Base(nn.Module):
    """A hidden width of 16 that a decision in forward is about."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.c = (
            nn.Linear(6, 12),
            nn.Linear(12, 16),
            nn.Linear(16, 5),
            nn.Linear(12, 5),
        )

    def forward(self, x):
        x = self.first(x)
        return self.b(self.use(self.a(x), x)) + self.c(x)


class Compared(Base):
    def use(self, h, x):
        return h * 2 if h.shape[1] > x.shape[0] else h


class Smallest(Base):
    def use(self, h, x):
        n = min(h.shape[1], len(x))
        return torch.cat([h[:, :n] * 2, h[:, n:]], 1)


class Unequal(Base):
    def use(self, h, x):
        return h * 2 if h.shape[1] != x.shape[0] else h


class Values(Base):
    def use(self, h, x):
        return h * h.shape[1] if x.sum() > 1e6 else h


class Batch(Base):
    def use(self, h, x):
        return h.reshape(-1, 4, 4).transpose(1, 2).reshape(-1, 16) if x.shape[0] > 4 else h


class AllBelow(Base):
    def use(self, h, x):
        if torch.all(x < 1e6):
            return h
        return h / h.shape[1]


class RaisesElse(Base):
    """The way that is not taken leads to an error: it holds nothing."""

    def use(self, h, x):
        if x.shape[0] > 100:
            raise ValueError("too many")
        if x.isnan().any():
            raise ValueError("not a number")
        return h


@pytest.mark.parametrize("kind", [Compared, Smallest, Unequal, Values, Batch, AllBelow])
@pytest.mark.parametrize("verify", [True, False])
def test_other_inputs_may_decide_otherwise(kind, verify: bool):
    model, inputs = kind().eval(), [torch.randn(n, 6) for n in (2, 5, 12, 20)]
    inputs.append(torch.full((3, 6), 1e7))
    with torch.no_grad():
        model.first.weight.abs_()
    result = depgraph.prune(model, inputs[0], verify=verify)
    assert result.model.first.out_features < 12
    for x in inputs:
        masked = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in masked.named_parameters():
                p.mul_(result.plan.mask(name))
            torch.testing.assert_close(result.model(x), masked(x), rtol=1e-4, atol=1e-5)
    if kind in (Values, Batch, AllBelow):
        assert any("test_decisions.py" in note and "Examples" in note for note in result.report.notes)
    else:
        reasons = {f.reason for f in result.report.frozen if f.name == "a.weight" and f.dim == 0}
        assert any("ranges over an input" in r.text and "test_decisions.py" in r.source for r in reasons)


def test_a_way_that_raises_holds_nothing():
    result = depgraph.prune(RaisesElse().eval(), torch.randn(2, 6))
    assert result.model.a.out_features == 8
