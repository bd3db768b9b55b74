"""A norm over batches into the layer before it: the weights of one layer that computes what both did."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..plan.plan import Fusion, Scale

Tensor = torch.Tensor
LAYERS = (
    _ConvNd,
    nn.Linear,
)  # one weight, whose rows (or columns, transposed) are the channels of the result


def misfit(model: nn.Module, fusion: Fusion) -> str:
    """Why `fusion` does not fit `model`, or ""."""
    try:
        layer, norm = model.get_submodule(fusion.layer), model.get_submodule(fusion.norm)
    except AttributeError as error:
        return f"{fusion.norm!r} can't go into {fusion.layer!r}: {error}"
    if not isinstance(layer, LAYERS) or not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        return f"{fusion.norm!r} can't go into {fusion.layer!r}: they are {type(norm).__name__} and {type(layer).__name__}"
    if (layer.bias is None) != fusion.bias:
        return (
            f"{fusion.layer!r} has {'no' if layer.bias is None else 'a'} bias, the plan is for another layer"
        )
    return ""


def fold(model: nn.Module, fusion: Fusion) -> None:
    """Put the norm's scale and shift into the layer's weight and bias, computed in float64, and in its place an identity, or what it does besides.

    ``scale = weight / sqrt(running_var + eps)``, by channel of the layer's result; its weight becomes ``weight * scale``, its
    bias ``(bias - running_mean) * scale + shift``.
    """
    layer: Any = model.get_submodule(fusion.layer)
    norm: Any = model.get_submodule(fusion.norm)
    with torch.no_grad():
        mean, scale = norm.running_mean.double(), (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = 0.0 if norm.bias is None else norm.bias.double()
        bias = 0.0 if layer.bias is None else layer.bias.double()
        new = _scaled(layer, scale), (bias - mean) * scale + shift
    trains = layer.weight.requires_grad
    for name, value in zip(("weight", "bias"), new, strict=True):
        setattr(layer, name, nn.Parameter(value.to(layer.weight.dtype), requires_grad=trains))
    rest: nn.Module = nn.Sequential(OrderedDict(norm.named_children())) if norm._modules else nn.Identity()
    rest.training = norm.training
    for module in model.modules():
        for key, child in module._modules.items():
            if child is norm:
                module._modules[key] = rest


def _scaled(layer: Any, scale: Tensor) -> Tensor:
    """The weight [out, in, ...], or transposed [groups * in, out of a group, ...], times the `scale` [out] of its channels."""
    weight = layer.weight.double()
    if not getattr(layer, "transposed", False):
        return weight * scale.view(-1, *[1] * (weight.dim() - 1))
    blocks = weight.unflatten(0, (layer.groups, -1))  # [groups, in, out, ...]
    by_group = scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
    return (blocks * by_group).flatten(0, 1)


def misfit_scale(model: nn.Module, moved: Scale) -> str:
    """Why `moved` does not fit `model`, or ""."""
    try:
        tensors = [model.get_parameter(name) for name in (moved.scale, moved.shift) if name is not None]
        layers: list[Any] = [model.get_submodule(path) for path in moved.layers]
    except AttributeError as error:
        return f"{moved.scale!r} can't go into the layers behind it: {error}"
    wrong = [p for p, m in zip(moved.layers, layers, strict=True) if not isinstance(m, nn.Linear)]
    if wrong or any(tuple(t.shape) != (m.in_features,) for t in tensors for m in layers):
        return f"{moved.scale!r} can't go into {', '.join(wrong or moved.layers)}: these are no linear layers of its size"
    return ""


def move(model: nn.Module, moved: Scale) -> None:
    """``W(s·x + b) + c = (W·s)x + (Wb + c)``, computed in float64; s becomes ones, b zeros."""
    scale = model.get_parameter(moved.scale)
    shift = None if moved.shift is None else model.get_parameter(moved.shift)
    for path in moved.layers:
        layer: Any = model.get_submodule(path)
        weight = layer.weight.detach().double()
        trains, kind = layer.weight.requires_grad, layer.weight.dtype
        if shift is not None:
            bias = 0.0 if layer.bias is None else layer.bias.detach().double()
            layer.bias = nn.Parameter(
                (weight @ shift.detach().double() + bias).to(kind), requires_grad=trains
            )
        layer.weight = nn.Parameter((weight * scale.detach().double()).to(kind), requires_grad=trains)
    for name, make in ((moved.scale, torch.ones_like), (moved.shift, torch.zeros_like)):
        if name is not None:
            path, _, own = name.rpartition(".")
            old = model.get_parameter(name)
            setattr(
                model.get_submodule(path),
                own,
                nn.Parameter(make(old.detach()), requires_grad=old.requires_grad),
            )
