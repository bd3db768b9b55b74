"""A layer as two: the first makes `rank` numbers of what it is given, the second the result of these."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..plan.plan import Factor

Tensor = torch.Tensor
CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Factors(nn.Sequential):
    """Two layers in the place of one, whose weight is the product of theirs."""

    @property
    def weight(self) -> Tensor:
        """The weight of the layer that they stand for: code reads its type and shape."""
        first: Any = self[0].weight
        second: Any = self[1].weight
        product: Tensor = second.flatten(1) @ first.flatten(1)
        return product.view(len(second), *first.shape[1:])

    @property
    def bias(self) -> Any:
        """Its bias."""
        return self[1].bias


def can_be_two(layer: nn.Module) -> bool:
    """Whether `layer` is one matrix: linear, or a convolution of one group that is not transposed."""
    kinds = (nn.Linear, *CONVOLUTIONS.values())
    return isinstance(layer, kinds) and getattr(layer, "groups", 1) == 1


def full_rank(layer: Any) -> int:
    """The largest rank that the weight can have."""
    rows = len(layer.weight)
    return min(rows, layer.weight.numel() // max(rows, 1))


def misfit(model: nn.Module, factor: Factor) -> str:
    """Why `factor` does not fit `model`, or ""."""
    try:
        layer = model.get_submodule(factor.layer)
    except AttributeError as error:
        return f"{factor.layer!r} can't become two factors: {error}"
    if not can_be_two(layer):
        return f"{factor.layer!r} can't become two factors: it is a {type(layer).__name__}"
    if not 1 <= factor.rank <= full_rank(layer):
        return f"{factor.layer!r} has a rank of at most {full_rank(layer)}, the plan wants {factor.rank}"
    return ""


def replace(model: nn.Module, factor: Factor, values: tuple[Tensor, Tensor] | None = None) -> None:
    """Put two layers in the place of one, with the `values` (down [rank, inputs], up [out, rank]), or its own singular ones."""
    layer: Any = model.get_submodule(factor.layer)
    down, up = best(layer, factor.rank) if values is None else values
    made = _two(layer, factor.rank)
    trains, kind = layer.weight.requires_grad, layer.weight.dtype
    for module, value in zip(made, (down, up), strict=True):
        shape = module.weight.shape
        module.weight = nn.Parameter(value.to(kind).reshape(shape), requires_grad=trains)  # type: ignore[arg-type]
    made[1].bias = layer.bias
    made.train(layer.training)
    for module in model.modules():
        for key, child in module._modules.items():
            if child is layer:
                module._modules[key] = made


def best(layer: Any, rank: int) -> tuple[Tensor, Tensor]:
    """The two factors of that rank whose product is closest to the weight."""
    weight = layer.weight.detach().flatten(1)
    if weight.is_meta:
        return weight.new_empty(rank, weight.shape[1]), weight.new_empty(len(weight), rank)
    up, values, down = torch.linalg.svd(weight.double(), full_matrices=False)
    return down[:rank], up[:, :rank] * values[:rank]


def _two(layer: Any, rank: int) -> Factors:
    if isinstance(layer, nn.Linear):
        first: Any = nn.Linear(layer.in_features, rank, bias=False, device="meta")
        return Factors(first, nn.Linear(rank, layer.out_features, bias=False, device="meta"))
    kind = CONVOLUTIONS[layer.weight.dim() - 2]
    how = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    first = kind(layer.in_channels, rank, layer.kernel_size, bias=False, device="meta", **how)
    return Factors(first, kind(rank, layer.out_channels, 1, bias=False, device="meta"))
