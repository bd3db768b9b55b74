"""Pruned models leave eager torch on every way that dense ones do, and come out with the same values."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from checks import prune_and_check
from export_models import MODELS
from export_ways import WAYS, Sent, other_batch
from literals import Halves, Literals
from outputs import deviation, shapes
from versions import NEW_TORCH
from zoo_entry import ready

import depgraph

# What `make test` does not install is measured by `python -m benchmarks.exports`; compiled code takes half a minute each.
QUICK = [name for name in WAYS if not name.startswith("torchao") and not name.endswith("inductor")]


@cache
def pruned(kind: str) -> tuple[Any, depgraph.PruneResult, Any]:
    """The network of a kind, pruned to half and checked against the masked original, and float32 inputs."""
    torch.manual_seed(5)
    make, inputs = MODELS[kind]
    model, given = ready(make()).float(), inputs()
    return model, prune_and_check(model, given, pruning_ratio=0.5, tol=1e-9), given


def send(kind: str, way: str) -> None:
    original, result, inputs = pruned(kind)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of exporters, about themselves
        pairs = WAYS[way].send(Sent(result.model, original, result.plan, inputs, other_batch(inputs)))
    torch.compiler.reset()
    assert len(pairs) == 2
    for expected, output in pairs:
        assert shapes(expected) == shapes(output)
        found = deviation(expected, output)
        assert found is not None
        assert found <= WAYS[way].tolerance


@pytest.mark.parametrize("way", QUICK)
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k in ("bert", "vit") else k for k in MODELS]
)
def test_ways_out(kind: str, way: str) -> None:
    if "ONNX" in way and not NEW_TORCH:
        pytest.skip("the exporter of torch 2.6 and today's onnxscript do not fit")
    send(kind, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", [name for name in WAYS if name.endswith("inductor")])
def test_compiled_code(way: str) -> None:
    """Where there is a C++ compiler."""
    send("literals", way)


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_got_smaller_throughout(kind: str) -> None:
    original, result, _ = pruned(kind)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (original, result.model)]
    assert sizes[1] < 0.6 * sizes[0]


def literals() -> tuple[Literals, Any]:
    original, result, _ = pruned("literals")
    assert sorted(result.report.rewritten) == ["", "inner"]
    return original, result.model


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_rewritten_module_is_whole(again: Any) -> None:
    """Children that forward does not call, attributes that it does not read, modes and hooks."""
    _, model = literals()
    model = copy.deepcopy(model)
    model.inner.spare.train()
    model.inner.register_forward_hook(doubled)
    twin = again(again(model))
    assert twin.labels == ["one", "two"]
    assert twin.inner.spare.training
    assert not twin.inner.training
    assert list(dict(twin.named_modules())) == list(dict(model.named_modules()))
    assert type(twin).__name__ == "Literals"
    x = torch.randn(3, 3, 8, 6)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        before = model(x)
        twin.last.weight.zero_()
    assert torch.equal(model(x), before) != (again is copy.copy)


def doubled(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


def test_a_rewritten_module_reads_its_training_flag() -> None:
    """Dropout by `self.training` in forward, whatever the mode in which the model was pruned."""
    x = torch.randn(2, 3, 8, 6)
    for training in (True, False):
        model = ready(Literals()).float().train(training)
        model.norm.eval()
        small = depgraph.prune(model, x).model
        assert small.training == training
        assert not small.norm.training  # each part keeps its own mode
        small.train()
        small.norm.eval()
        assert not torch.equal(small(x), small(x))
        small.eval()
        assert torch.equal(small(x), small(x))


class Branch(torch.nn.Module):
    """What depends on the mode, or makes a tensor, in each call."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.one, self.two, self.scale = torch.nn.Linear(5, 14), torch.nn.Linear(14, 3), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (self.one(x) + torch.arange(2).view(2, 1)).reshape(-1, 14)
        if self.training:
            x = x * self.scale
        return self.two(x)


def test_a_branch_on_the_training_flag_is_not_baked_in() -> None:
    x = torch.randn(2, 11)
    small = depgraph.prune(torch.nn.Sequential(torch.nn.Linear(11, 5), Branch(3.0)).eval(), x).model
    assert small[1].one.weight.shape[0] == 7
    small[1].scale = 1.0
    one = small(x)
    assert torch.equal(small.train()(x), one)
    small[1].scale = 3.0
    assert not torch.equal(small(x), one)


def test_halves_are_rewritten_with_what_is_in_place() -> None:
    """The in-place operations stay ones, on the views that they were on."""
    original, model = literals()
    assert isinstance(model.inner, Halves)
    assert "half += self.scale" in inspect.getsource(model.inner.forward)
    assert "y[:, :13]" not in inspect.getsource(model.inner.forward)
    assert "y[:, :13]" in inspect.getsource(original.inner.forward)
