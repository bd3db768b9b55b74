"""Pruned models leave eager torch on every way that dense ones do, and come out with the same values."""

from __future__ import annotations

import copy
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


class Long(torch.nn.Module):
    """Hundreds of operations, and a size as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Linear(5, 14), torch.nn.Linear(14, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        for _ in range(700):
            x = x * 0.999
        return self.two(x.reshape(-1, 14))


def test_a_module_with_many_nodes_can_be_pickled() -> None:
    """Nodes are a chain: pickled as it is, it would be as deep a recursion as it is long."""
    x = torch.randn(2, 5)
    result = depgraph.prune(Long().eval(), x)
    assert result.report.rewritten == [""]
    assert torch.equal(pickle.loads(pickle.dumps(result.model))(x), result.model(x))


def test_a_rewritten_module_reads_its_training_flag() -> None:
    """Dropout by `self.training` in forward, whatever the mode in which the model was pruned."""
    x = torch.randn(2, 3, 8, 6)
    for training in (True, False):
        model = ready(Literals()).float().train(training)
        model.norm.eval()
        small = depgraph.prune(model, x).model
        assert isinstance(small, torch.fx.GraphModule)
        assert small.training == training
        assert not small.norm.training  # each part keeps its own mode
        small.train()
        small.norm.eval()
        assert not torch.equal(small(x), small(x))
        small.eval()
        assert torch.equal(small(x), small(x))


@pytest.mark.parametrize(("branch", "width"), [("changes", 14), ("is nothing", 7)])
def test_a_branch_on_the_training_flag_is_not_baked_in(branch: str, width: int) -> None:
    """Recorded code would take one side for good: the literal then stays, and with it the axis."""

    class Branch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(5, 14), torch.nn.Linear(14, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.one(x).reshape(-1, 14)
            if self.training:
                x = x * 2 if branch == "changes" else x
            return self.two(x)

    # The first layer alone can't go where its width is written down.
    model = torch.nn.Sequential(torch.nn.Linear(11, 5), Branch()).eval()
    assert depgraph.prune(model, torch.randn(2, 11)).model[1].one.weight.shape[0] == width


def test_a_tensor_made_in_forward_is_not_baked_in() -> None:
    class Made(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(5, 14), torch.nn.Linear(14, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two((self.one(x) + torch.arange(2).view(2, 1)).reshape(-1, 14))

    model, x = torch.nn.Sequential(torch.nn.Linear(11, 5), Made()).eval(), torch.randn(2, 11)
    result = depgraph.prune(model, x)
    assert result.report.rewritten == []
    assert result.model[1].one.weight.shape == (14, 3)
    reasons = [str(f.reason) for f in result.report.frozen if f.name == "1.one.weight"]
    assert any("literal 14" in reason for reason in reasons)


def test_halves_are_rewritten_with_what_is_in_place() -> None:
    """The in-place operations stay ones: a copy that records the code once more would make sums of them."""
    _, model = literals()
    assert isinstance(model.inner, torch.fx.GraphModule)
    assert "+=" in model.inner.code
    assert Halves.__name__ == type(model.inner).__name__
