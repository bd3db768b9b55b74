"""What a pruned model keeps of the original: hooks, types, flags, ties, attributes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract_models import Tied, assert_replays, assert_same_function, images, randomised, residual, snapshot
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import depgraph


def tokens() -> Tensor:
    return torch.randint(23, (2, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_hooks_still_run(inplace: bool) -> None:
    model = residual()
    calls: list[tuple[int, ...]] = []
    model.block[0].register_forward_hook(lambda _m, _x, y: calls.append(tuple(y.shape)))
    result = depgraph.prune(model, images(), inplace=inplace)
    calls.clear()
    result.model(images())
    assert calls == [(2, 24, 9, 11)]


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_requires_grad_is_kept(inplace: bool) -> None:
    model = residual()
    model.stem.requires_grad_(requires_grad=False)
    model.block[1].weight.requires_grad_(requires_grad=False)
    expected = {name: p.requires_grad for name, p in model.named_parameters()}
    result = depgraph.prune(model, images(), inplace=inplace)
    assert {name: p.requires_grad for name, p in result.model.named_parameters()} == expected
    result.model(images()).sum().backward()
    for name, p in result.model.named_parameters():
        assert (p.grad is not None) == expected[name], name
        assert isinstance(p, nn.Parameter)
        assert p.is_leaf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    model = residual().to(dtype)
    result = depgraph.prune(model, images().to(dtype))
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert result.model.block[1].num_batches_tracked.dtype == torch.int64
    assert result.model.block[0].out_channels == 24
    assert_replays(result.model, model, result.plan)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_training_flags_are_kept(training: bool) -> None:
    model = residual().train(training)
    model.block[1].eval()
    flags = [m.training for m in model.modules()]
    before = snapshot(model)
    result = depgraph.prune(model, images())
    assert [m.training for m in result.model.modules()] == flags
    assert snapshot(model) == before
    assert_same_function(result.model, model, result.plan, images(3))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(mode: Callable[[], Any]) -> None:
    model = residual()
    with mode():
        result = depgraph.prune(model, images())
    assert all(p.requires_grad for p in result.model.parameters())
    assert result.model.block[0].out_channels == 24


def test_frozen_model_is_pruned_all_the_same() -> None:
    model = residual().requires_grad_(requires_grad=False)
    result = depgraph.prune(model, images())
    assert not any(p.requires_grad for p in result.model.parameters())
    assert result.model.block[0].out_channels == 24


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_ties_are_kept(inplace: bool) -> None:
    model = randomised(Tied()).eval()
    reference = copy.deepcopy(model)
    result = depgraph.prune(model, tokens(), inplace=inplace)
    assert result.model.out.weight is result.model.embed.weight
    assert result.model.embed.weight.shape == (23, 8)
    assert result.model.up.weight.shape == (20, 8)
    assert len(list(result.model.parameters())) == len(list(reference.parameters()))
    assert_replays(result.model, reference, result.plan)
    assert_same_function(result.model, reference, result.plan, tokens())


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_parametrizations_are_kept(inplace: bool) -> None:
    model = residual()
    parametrizations.weight_norm(model.block[0])
    parametrizations.weight_norm(model.block[3])
    reference = copy.deepcopy(model)
    result = depgraph.prune(model, images(), inplace=inplace)
    assert parametrize.is_parametrized(result.model.block[0], "weight")
    assert result.model.block[0].weight.shape == (24, 16, 3, 3)
    assert list(result.model.state_dict()) == list(reference.state_dict())
    assert_replays(result.model, reference, result.plan)
    # Magnitudes are norms over the kept entries; the directions follow from them, so the smaller model trains on.
    result.model(images()).sum().backward()
    assert all(p.grad is not None for p in result.model.parameters())


def test_other_attributes_and_subclasses_are_kept() -> None:
    class Special(nn.Linear):
        pass

    model = residual()
    model.head = randomised(Special(32, 10))
    model.colour = "green"
    result = depgraph.prune(model, images())
    assert result.model.colour == "green"
    assert result.model.note == ("a tuple", 3)
    assert type(result.model.head) is Special
    assert type(result.model.head.weight) is nn.Parameter


def test_result_trains_and_copies_and_reloads() -> None:
    result = depgraph.prune(residual(), images())
    again = copy.deepcopy(result.model)
    again.load_state_dict(result.model.state_dict(), strict=True)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    again.train()(images()).square().mean().backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in again.parameters())
    assert all(p.is_contiguous() for p in again.parameters())


def test_a_result_can_be_pruned_again() -> None:
    first = depgraph.prune(residual(), images())
    second = depgraph.prune(first.model, images())
    assert second.model.block[0].out_channels == 12
    assert_same_function(second.model, first.model, second.plan, images(3))
