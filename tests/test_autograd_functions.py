"""Autograd functions, and what leaves torch: followed where they fit smaller tensors, frozen otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import prune_and_check
from oracle import assert_equal_to_masked
from small_models import between, frozen_texts, vectors
from torch import Tensor

import depgraph

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


class Rounded(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx, x):
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return gradient * s * (1 + x * (1 - s))


class Product(torch.autograd.Function):
    """Written with setup_context, with a number among its arguments."""

    @staticmethod
    def forward(x, weight, scale):
        return x @ weight.T * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, ctx.scale = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight * ctx.scale, gradient.T @ x * ctx.scale, None


class BackwardOfElevenPlusOne(torch.autograd.Function):
    """The forward fits every size, the backward does not."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient.view(-1, 12) * 2


class Accumulating(torch.autograd.Function):
    """The forward keeps every channel to itself, the backward does not."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient.cumsum(1)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("not written yet")


class ThroughNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy() * 2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


@pytest.mark.parametrize(
    "function",
    [
        lambda _, x: Rounded.apply(x),
        lambda _, x: Swish.apply(x),
        lambda net, x: Product.apply(x, net.extra, 0.5) + x,
    ],
    ids=["straight through", "saves its input", "product"],
)
def test_autograd_functions_are_followed_forward_and_backward(function: Callable[..., Tensor]) -> None:
    net = between(function)
    result = prune_and_check(net, (vectors(5),), check_inputs=(vectors(5, seed=1),), pruning_ratio=0.5)
    assert result.model.a.weight.shape == (6, 5)
    assert depgraph.count_macs(net, vectors(5)) == 2 * depgraph.count_macs(net, vectors(5, 1))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (BackwardOfElevenPlusOne, "repeated by the number 12"),
        (Accumulating, "in order by aten.cumsum"),
        (NoBackward, "NoBackward, whose backward can't be traced"),
        (ThroughNumpy, "constant"),
    ],
)
def test_autograd_functions_that_do_not_fit_smaller_tensors_are_frozen(function: Any, reason: str) -> None:
    """With the reason, and also where nothing is verified: only gradients would tell."""
    net = between(lambda _, x: function.apply(x))
    result = depgraph.prune(net, vectors(5), verify=False)
    assert result.model.a.weight.shape == (12, 5)
    assert result.model.b.weight.shape == (7, 12)
    assert reason in frozen_texts(net, vectors(5), "a.weight")
    if function is not NoBackward:
        prune_and_check(net, (vectors(5),), pruning_ratio=0.5)


@pytest.mark.parametrize(
    "leave",
    [
        lambda x: torch.as_tensor(x.detach().numpy()[:, ::-1].copy()),
        lambda x: torch.tensor(x.tolist(), dtype=x.dtype),
        lambda x: copy.deepcopy(x.detach()),
    ],
    ids=["numpy", "tolist", "deepcopy"],
)
def test_what_leaves_torch_is_frozen(leave: Callable[[Tensor], Tensor]) -> None:
    net = between(lambda net, x: x @ net.extra + leave(x).abs().sum() * 0)
    result = depgraph.prune(net, vectors(5), verify=False)
    assert result.model.a.weight.shape == (12, 5)
    assert_equal_to_masked(net, result, vectors(5))
    assert "leaves torch through" in frozen_texts(net, vectors(5), "a.weight")
