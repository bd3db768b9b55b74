"""Folders: what is saved comes back, bit for bit, on every network of the zoo and whatever the factory does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import random_importance
from torch import nn
from zoo import ZOO

import depgraph

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def leaves(value: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def run(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    torch.manual_seed(7)
    return leaves(copy.deepcopy(model)(*copy.deepcopy(inputs)))


def octets(t: torch.Tensor) -> bytes:
    t = t.detach().contiguous().reshape(-1)
    return (torch.view_as_real(t).contiguous() if t.is_complex() else t).view(torch.uint8).numpy().tobytes()


def assert_same(got: nn.Module, wanted: nn.Module) -> None:
    """The same classes, modes, names, ties, strides, flags and bytes."""
    assert [(n, type(m).__name__, m.training) for n, m in got.named_modules()] == [
        (n, type(m).__name__, m.training) for n, m in wanted.named_modules()
    ]
    for pairs in ("named_parameters", "named_buffers"):
        first, second = (list(getattr(m, pairs)(remove_duplicate=False)) for m in (got, wanted))
        assert [n for n, _ in first] == [n for n, _ in second]
        for (name, a), (_, b) in zip(first, second, strict=True):
            assert (a.dtype, a.shape, a.stride(), a.requires_grad, type(a)) == (
                b.dtype, b.shape, b.stride(), b.requires_grad, type(b)), name  # fmt: skip
            assert octets(a) == octets(b), name
        for one in range(len(first)):
            for two in range(one):
                assert (first[one][1] is first[two][1]) == (second[one][1] is second[two][1])
    assert list(got.state_dict()) == list(wanted.state_dict())


@pytest.mark.parametrize("name", ZOO)
def test_round_trip(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    model, inputs = entry.model(), entry.example()
    result = depgraph.prune(model, inputs, pruning_ratio=0.5, importance=random_importance(3), verify=False)
    depgraph.save(result, tmp_path / "saved")
    wanted = run(result.model, inputs)
    for factory in (entry.make, lambda: entry.model(seed=5)):  # on the meta device; and with random values
        loaded = depgraph.load(factory, tmp_path / "saved")
        assert_same(loaded, result.model)
        got = run(loaded, inputs)
        assert len(got) == len(wanted)
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
