"""What forward draws at random: the numbers are independent, so any of them may go, in whatever way they are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_equal_to_masked
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import depgraph

DRAWN = {"bernoulli": 1.0, "native_dropout": 1.0, "poisson": 2.0}


class OneNumber(TorchDispatchMode):
    """Each call that draws at random draws one number for all entries, so models of other sizes draw alike."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            name = func._schema.name.removeprefix("aten::").removesuffix("_")
            with torch.no_grad():
                out.fill_(DRAWN.get(name, 0.3))
        return out


class Net(nn.Module):
    """A wide layer, noise that a test makes beside it, and a last one."""

    def __init__(self, noisy: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.width, self.noisy = nn.Linear(10, 16), nn.Linear(16, 5), 16, noisy
        self.gate, self.table = nn.Linear(16, 8), nn.Embedding(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.noisy(self, self.first(x)))


NOISY: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scaled": lambda net, y: y + torch.randn(y.shape) * 0.1,
    "by an attribute": lambda net, y: y + torch.randn(len(y), net.width) * net.last.weight.abs().max(),
    "per channel": lambda net, y: y * torch.rand(y.shape[-1]).mul(0.5).add(1),
    "flat": lambda net, y: y + torch.randn(y.numel()).view_as(y).sigmoid(),
    "a mask of chances": lambda net, y: y * torch.bernoulli(torch.full_like(y, 0.7)) / 0.7,
    "gumbel": lambda net, y: F.gumbel_softmax(net.gate(y), tau=1.0) @ net.table.weight,
    "normal": lambda net, y: torch.normal(y, torch.ones_like(y)) + torch.normal(0.0, 1.0, y.shape),
    "a distribution": lambda net, y: torch.distributions.Normal(y, 1.0).rsample(),
    "poisson": lambda net, y: torch.poisson(F.softplus(y)),
    "filled": lambda net, y: y + y.new_empty(y.shape).uniform_(-0.1, 0.1) * 2,
    "dropout": lambda net, y: F.dropout(y, 0.3, training=True),
}


@pytest.mark.parametrize("name", NOISY)
def test_noise_of_any_shape_is_cut(name: str) -> None:
    torch.manual_seed(0)
    model, x = Net(NOISY[name]).double().eval(), torch.randn(3, 10, dtype=torch.float64)
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    assert result.model.first.weight.shape == (8, 10)
    assert result.report.verification.status == "equal"
    assert not result.report.notes
    with OneNumber():
        assert_equal_to_masked(model, result, x)


def test_wrong_weights_beside_noise_are_noticed() -> None:
    torch.manual_seed(0)
    model, x = Net(NOISY["scaled"]).eval(), torch.randn(3, 10)
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    with torch.no_grad():
        result.model.last.weight[2, 3] += 0.1
    with pytest.raises(depgraph.VerificationError, match="deviates"):
        depgraph.verify(model, result.model, result.plan, x)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 16) for _ in range(3))
        self.out = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_what_attention_returns_is_no_draw() -> None:
    """Its kernel may draw, and returns tensors that shrink with the heads: they are not lined up with anything."""
    model, x = Heads().double().eval(), torch.randn(2, 5, 12).double()
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    assert_equal_to_masked(model, result, x)
    assert result.plan.new_shape("q.weight") == (8, 12)
    assert result.report.verification.status == "equal"
    assert "float64" in result.report.verification.detail
    assert "can't run" not in result.report.verification.detail
