"""Models that keep what they were built from: after surgery the fields say what the weights are."""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.config.arguments import rebuilt
from depgraph.config.valid import refusals


@dataclass
class Shape:
    """Fields of a small transformer; `inner` is a config within the config."""

    width: int = 24
    heads: int = 4
    head_width: int = 5
    experts: int = 3
    hidden: list[int] = field(default_factory=lambda: [14, 22])
    classes: int = 3
    depth: int = 2


@dataclass
class Nested:
    inner: Shape = field(default_factory=Shape)
    name: str = "a text"


class Layer(nn.Module):
    def __init__(self, config: Shape, i: int) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.width, 3 * config.heads * config.head_width)
        self.out = nn.Linear(config.heads * config.head_width, config.width)
        self.up = nn.Parameter(torch.randn(config.hidden[i], config.width) / 5)
        self.down = nn.Linear(config.hidden[i], config.width)
        self.all_heads = config.heads * config.head_width  # forward never reads it

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, self.config.head_width)) for t in self.qkv(x).chunk(3, -1))
        y = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
        x = x + self.out(torch.einsum("bhnm,bmhd->bnhd", y, v).flatten(2))
        return x + self.down(torch.relu(x @ self.up.T))


class Small(nn.Module):
    built = 0

    def __init__(self, config: Shape) -> None:
        super().__init__()
        type(self).built += 1
        self.config = config
        self.stem = nn.Linear(7, config.width)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.depth))
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Wrapped(nn.Module):
    """A module that is not built from a config, around one that is, whose config lies in another."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Deep(Nested())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).tanh()


class Deep(Small):
    def __init__(self, config: Nested) -> None:
        super().__init__(config.inner)
        self.config = config


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def test_config_describes_the_smaller_model() -> None:
    """Bare fields, products, entries of lists, raw parameters: a model built from the config has the same shapes."""
    torch.manual_seed(0)
    model, x = Small(Shape()), torch.randn(2, 6, 7)
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    assert model.config == Shape()
    small = result.model.config
    assert (small.width, small.hidden, small.classes) == (12, [7, 11], 3)
    assert small.heads * small.head_width < 20
    assert result.model.layers[0].all_heads == small.heads * small.head_width
    assert shapes(Small(small)) == shapes(result.model)
    assert result.model.layers[1].config is small
    assert result.report.to_dict()["config_mismatches"] == []


def test_fields_are_part_of_the_plan() -> None:
    torch.manual_seed(0)
    model, x = Small(Shape()), torch.randn(2, 6, 7)
    plan = depgraph.prune(model, x, pruning_ratio=0.5).plan
    again = depgraph.apply(copy.deepcopy(model), depgraph.Plan.from_json(plan.to_json()))
    assert shapes(Small(again.config)) == shapes(again)


def test_config_inside_a_config_of_a_part() -> None:
    torch.manual_seed(0)
    result = depgraph.prune(Wrapped(), torch.randn(2, 6, 7), pruning_ratio=0.5)
    assert result.model.body.config.inner.width == 12
    assert shapes(Deep(result.model.body.config)) == shapes(result.model.body)


def test_a_field_on_which_layers_disagree_stays() -> None:
    torch.manual_seed(0)
    model, x = Small(Shape(hidden=[14, 14])), torch.randn(2, 6, 7)
    shared = model.layers[1].down.in_features
    result = depgraph.prune(model, x, pruning_ratio=0.5, ignore=["layers.0.qkv", "layers.0.out"])
    assert result.model.config.heads * result.model.config.head_width == 20
    assert result.model.config.width == 24  # kept whole by layers.0.qkv
    assert result.model.config.hidden == [shared // 2] * 2
    assert "layers.1.qkv.weight" in result.report.to_dict()["config_mismatches"]
    assert "config cannot express" in str(result.report)


@pytest.mark.parametrize("fault", ["raises", "another model"])
def test_classes_that_do_not_build_again_are_left_alone(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Small(Shape()), torch.randn(2, 6, 7)
    honest = Small.__init__

    def init(self: Small, config: Shape) -> None:
        if fault == "raises":
            raise RuntimeError("no weights here")
        honest(self, Shape(width=30))

    monkeypatch.setattr(Small, "__init__", init)
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    assert result.model.stem.out_features == 12
    assert result.model.config.width == 24


class Scaled(Small):
    """Forward computes with one field, and with an attribute made of another."""

    def __init__(self, config: Shape) -> None:
        super().__init__(config)
        self.divisor = config.hidden[0]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.config.width**-0.5 / self.divisor


def test_a_number_that_forward_computes_with_stays() -> None:
    """Also where nothing is verified: the smaller model computes with the same numbers as the original."""
    torch.manual_seed(0)
    model, x = Scaled(Shape()).eval(), torch.randn(2, 6, 7)
    result = depgraph.prune(model, x, pruning_ratio=0.5, verify=False)
    assert result.model.stem.out_features == 12
    assert (result.model.config.width, result.model.divisor) == (24, 14)
    assert depgraph.verify(model, result.model, result.plan, x).status == "equal"


def test_a_number_that_changed_after_the_model_was_built() -> None:
    torch.manual_seed(0)
    model, x = Small(Shape()), torch.randn(2, 6, 7)
    del model.layers[0].all_heads
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    assert result.model.config.width == 12
    assert not hasattr(result.model.layers[0], "all_heads")


class Ranked(nn.Module):
    """A size that the constructor computes without leaving a trace, joined with one of the config's."""

    def __init__(self, config: Shape) -> None:
        super().__init__()
        self.config, self.rank = config, int(config.width // 4)
        self.stem = nn.Linear(7, self.rank + 2 * config.experts)
        self.state = nn.Parameter(torch.randn(config.experts))
        self.last = nn.Linear(self.rank + config.experts, 2)

    def forward(self, x: Tensor) -> Tensor:
        rank, a, b = self.stem(x).split([self.rank, self.state.shape[0], self.state.shape[0]], -1)
        return self.last(torch.cat([rank, a * b * self.state], -1))


def test_a_field_that_is_a_size_by_itself_is_believed_first() -> None:
    torch.manual_seed(0)
    result = depgraph.prune(Ranked(Shape(experts=6)), torch.randn(2, 6, 7), pruning_ratio=0.5)
    assert result.model.rank < 6
    assert result.model.config.experts == len(result.model.state) < 6


class Named(nn.Module):
    """Its config is a SimpleNamespace; forward reads one number of it."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.enter = nn.Linear(7, config.pieces * config.width)
        self.last = nn.Linear(config.width, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:  # torch.fx can't record this
            return x
        return self.last(self.enter(x).view(-1, self.config.pieces, self.config.width).amax(1))


def test_a_simple_namespace_is_a_config() -> None:
    model = Named(SimpleNamespace(width=11, pieces=5)).eval()
    result = depgraph.prune(model, torch.randn(2, 7), pruning_ratio=0.5)
    assert result.report.verification.status == "equal"
    assert model.config == SimpleNamespace(width=11, pieces=5)
    again = Named(result.model.config)
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in result.model.named_parameters()
    }
    assert result.model.config.width < 11


class Rounded(Small):
    """A number that was rounded when it was computed from the config; forward never reads it."""

    def __init__(self, config: Shape) -> None:
        super().__init__(config)
        self.tiles = math.ceil(config.width / 5)
        self.inner = nn.Linear(config.classes, -(-config.classes // 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(super().forward(x))


def test_a_rounded_number_follows() -> None:
    torch.manual_seed(0)
    result = depgraph.prune(Rounded(Shape()), torch.randn(2, 6, 7), pruning_ratio=0.5)
    width = result.model.config.width
    assert width < 24
    assert result.model.tiles == math.ceil(width / 5)
    assert result.model.inner.out_features == 2  # an output: what the config says of it now is 1


class Squares(nn.Module):
    """A table over all pairs of a number, which it does not keep: tried with a width, it would be made for minutes."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.a = nn.Linear(width, 3000)
        pairs = [
            (abs(i - j), abs(k - m))
            for i in range(side)
            for j in range(side)
            for k in range(side)
            for m in range(side)
        ]
        self.pairs = len(pairs)


def test_a_constructor_that_takes_long_is_given_up() -> None:
    start = time.thread_time()
    assert rebuilt(Squares(2, 5)) is None
    assert time.thread_time() - start < 5
    assert sys.getprofile() is None


class Fours:
    """A config that takes widths of four alone."""

    def __init__(self, width: int) -> None:
        if width % 4:
            raise ValueError(f"{width} is no multiple of 4")
        self.width = width


class Around:
    def __init__(self, inner: Fours) -> None:
        self.inner = inner


def test_a_config_in_a_config_that_refuses_a_number_is_found() -> None:
    class Net(nn.Module):
        def __init__(self, config: Around) -> None:
            super().__init__()
            self.config, self.layer = config, nn.Linear(config.inner.width, 3)

    before, after = Net(Around(Fours(16))), Net(Around(Fours(16)))
    assert refusals(before, after) == []
    after.config.inner.width = 10
    (found,) = refusals(before, after)
    assert (found.key, found.old, found.multiple) == (("attr", "", "config", "inner", "width"), 16, 4)
    assert "10 is no multiple of 4" in found.error
    assert refusals(after, before) == []
    before.config.inner.width = 6  # what was refused before is no fault of the smaller model's
    assert refusals(before, after) == []
