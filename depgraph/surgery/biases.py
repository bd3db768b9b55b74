"""A bias for a layer that has none: a parameter in the place that its module keeps empty."""

from __future__ import annotations

import torch
from torch import nn

from ..plan.plan import Bias


def empty_places(model: nn.Module, weight: str) -> list[str]:
    """What the module of parameter `weight` calls the parameters that it has a place for and lacks."""
    module = model.get_submodule(weight.rpartition(".")[0])
    return [name for name, there in module._parameters.items() if there is None]


def misfit(model: nn.Module, bias: Bias) -> str:
    """Why `bias` does not fit `model`, which has its weight, or ""."""
    fits = bias.parameter in empty_places(model, bias.weight)
    return "" if fits else f"{bias.name!r}, which the plan adds, has no empty place in this model"


def add(model: nn.Module, bias: Bias) -> nn.Parameter:
    """Put zeros there, of the weight's type, on its device, trained where it is."""
    module = model.get_submodule(bias.weight.rpartition(".")[0])
    weight = model.get_parameter(bias.weight)
    zeros = torch.zeros(bias.shape, dtype=weight.dtype, device=weight.device)
    made = module._parameters[bias.parameter] = nn.Parameter(zeros, requires_grad=weight.requires_grad)
    return made


def take(model: nn.Module, bias: Bias) -> None:
    """Leave the place empty again."""
    model.get_submodule(bias.weight.rpartition(".")[0])._parameters[bias.parameter] = None
