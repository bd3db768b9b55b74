"""Numbers in a configuration follow the weights, also those that forward never reads."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import depgraph


@dataclass
class Part:
    width: int = 12
    heads: int = 2


@dataclass
class Config:
    hidden: int = 14
    wide: int = 22
    layers: int = 2
    rates: list[int] = field(default_factory=lambda: [10, 6])
    part: Part = field(default_factory=Part)


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.up, self.down = nn.Linear(config.hidden, config.wide), nn.Linear(config.wide, config.hidden)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.part = copy.deepcopy(config.part)
        self.width = self.part.width // self.part.heads
        self.qkv = nn.Linear(config.hidden, 3 * self.part.width)
        self.out = nn.Linear(self.part.width, config.hidden)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.width)).permute(2, 0, 3, 1, 4)
        return x + self.out(((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self, config: Config, scale: float = 1.0):
        super().__init__()
        self.config, self.scale = config, scale
        self.stem = nn.Linear(5, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.attention = Attention(config)
        self.neck = nn.Sequential(nn.Linear(config.hidden, config.rates[0]), nn.Linear(*config.rates))
        self.last = nn.Linear(config.rates[1], 3)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(self.neck(self.attention(x)) * self.scale)


class Scaled(Net):
    def forward(self, x):
        return super().forward(x) * self.config.wide**-0.5


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def small(kind: type[nn.Module], **options) -> nn.Module:
    torch.manual_seed(0)
    return depgraph.prune(kind(Config()).eval(), torch.randn(2, 7, 5), pruning_ratio=0.5, **options).model


def test_the_pruned_model_can_be_built_again_from_its_configuration():
    model = small(Net)
    assert model.config == Config(7, 11, 2, [5, 3], Part(6, 2))
    assert model.attention.part == Part(6, 2)  # a copy that a part of the model holds
    assert shapes(Net(model.config)) == shapes(model)


def test_the_configuration_of_a_part_of_a_model_follows_too():
    model = small(lambda config: nn.Sequential(nn.Linear(5, 5), Net(config)))
    assert model[1].config == Config(7, 11, 2, [5, 3], Part(6, 2))


def test_a_number_that_layers_disagree_about_stays_and_the_others_follow():
    model = small(Net, ignore="layers.0.up.bias")
    assert model.config.wide == 22
    assert model.config.hidden == 7


def test_a_number_that_forward_computes_with_stays():
    model = small(Scaled)
    assert model.layers[0].up.out_features == 11
    assert model.config.wide == 22
    assert model.config.hidden == 7


def test_the_configuration_of_the_original_stays():
    model = Net(Config()).eval()
    depgraph.prune(model, torch.randn(2, 7, 5))
    assert model.config == Config()
    assert type(model.config) is Config


def test_a_plan_repairs_the_configuration_wherever_it_is_replayed():
    model = Net(Config()).eval()
    plan = depgraph.prune(model, torch.randn(2, 7, 5)).plan
    with torch.device("meta"):
        other = depgraph.apply(Net(Config()), depgraph.Plan.from_json(plan.to_json()))
    assert other.config == Config(7, 11, 2, [5, 3], Part(6, 2))


@pytest.mark.parametrize("wide", [22, 23])
def test_a_configuration_that_says_something_else_than_the_weights_is_left_alone(wide):
    model = Net(Config()).eval()
    model.config = Config(wide=wide, layers=3)
    pruned = depgraph.prune(model, torch.randn(2, 7, 5)).model
    assert pruned.config == Config(wide=wide, layers=3)
