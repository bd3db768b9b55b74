"""Which kept entries move the outputs at all: what a proof could have noticed.

Each weight goes into the run through a function that hands back no gradient, but writes down, for each index along the dims
that were cut, how large the sum of |gradient * value| is: by how much the outputs change, relative to their spread, when the
entries there do. One pass backward from random cotangents tells for all of them. Weights that exist on demand are not kept
for it: what a matrix product owes to a row of its weight is the gradient of what that row computes, times that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..plan.plan import Cut
from ..surgery.on_demand import Use, Weight
from .compare import moderate, spread

Tensor = torch.Tensor
MOVES = 1e-5  # of an output's spread: what moves it by less is not told from what does not
Place = tuple[str, int]  # the name of a tensor, and a dim of it


def places(name: str, cut: Cut) -> list[Place]:
    """The dims of a tensor that get smaller."""
    return [(name, d) for d, (n, old) in enumerate(zip(cut.new_shape, cut.shape, strict=True)) if n < old]


class Effects(Use):
    """A use of weights that measures by how much each kept index moves the outputs."""

    def __init__(self, cuts: Mapping[str, Cut]) -> None:
        """`cuts`: what was removed, by the names of tensors."""
        self.cuts = cuts
        self.sizes: dict[Place, Tensor] = {}
        self.root = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def add(self, name: str, dim: int, sizes: Tensor) -> None:
        """The indices of tensor `name` along `dim` move the outputs by `sizes` more."""
        sizes = sizes.double().cpu()
        self.sizes[name, dim] = self.sizes[name, dim] + sizes if (name, dim) in self.sizes else sizes

    def watched(self, value: Tensor, name: str) -> Tensor:
        """`value`, the weight `name`, in a form that is watched."""
        made: Tensor = _Watched.apply(value, self.root, self, name)
        return made

    def made(self, weight: Weight) -> Tensor:
        """As `Use` does, and watched."""
        return self.watched(weight.whole(), weight.name)

    def product(self, x: Tensor, weight: Weight) -> Tensor:
        """As `Use` does, and watched."""
        made: Tensor = _Product.apply(x, self.root, self, weight)
        return made

    def looked_up(self, rows: Tensor, weight: Weight) -> Tensor:
        """As `Use` does, and watched."""
        made: Tensor = _LookedUp.apply(rows, self.root, self, weight, super().looked_up(rows, weight))
        return made

    def measure(self, outputs: list[Tensor]) -> None:
        """Go backward from random cotangents of all moderate entries of the outputs."""
        dice = torch.Generator().manual_seed(0)
        total = self.root * 0
        for y in outputs:
            y = torch.view_as_real(y) if y.is_complex() else y
            if not y.requires_grad or not y.numel() or y.layout is not torch.strided:
                continue
            fine = torch.isfinite(y.detach())
            if not bool(fine.any()):
                continue
            part = y[fine].double()
            scale = spread(y)
            part = part[moderate(part.detach())]
            if scale:
                weights = torch.randn(part.shape, generator=dice, dtype=torch.float64).to(part.device)
                total = total + ((part * weights).sum() / (scale * max(part.numel(), 1) ** 0.5)).cpu()
        total.backward()


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, root: Tensor, effects: Effects, name: str) -> Tensor:
        ctx.effects, ctx.name = effects, name
        ctx.save_for_backward(value)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (value,) = ctx.saved_tensors
        effects: Effects = ctx.effects
        if gradients[0] is not None:
            moved = (gradients[0] * value).abs()
            for _, d in places(ctx.name, effects.cuts[ctx.name]) if ctx.name in effects.cuts else ():
                effects.add(ctx.name, d, moved.sum([e for e in range(moved.dim()) if e != d]))
        return None, torch.zeros((), dtype=torch.float64), None, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, root: Tensor, effects: Effects, weight: Weight) -> Tensor:
        y = weight.times(x)
        ctx.effects, ctx.weight = effects, weight
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, y = ctx.saved_tensors
        back = ctx.weight.back(gradients[0])
        for value, gradient, d in ((y, gradients[0], 0), (x, back, 1)):
            moved = (gradient * value).abs()
            ctx.effects.add(ctx.weight.name, d, moved.flatten(0, -2).sum(0) if moved.dim() > 1 else moved)
        root = torch.zeros((), dtype=torch.float64)
        return back if ctx.needs_input_grad[0] else None, root, None, None


class _LookedUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, root: Tensor, effects: Effects, weight: Weight, value: Tensor
    ) -> Tensor:
        ctx.effects, ctx.weight = effects, weight
        ctx.save_for_backward(rows, value)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, value = ctx.saved_tensors
        moved = (gradients[0] * value).abs().reshape(-1, value.shape[-1])
        size = torch.zeros(ctx.weight.shape[0], dtype=moved.dtype, device=moved.device)
        ctx.effects.add(ctx.weight.name, 0, size.index_add_(0, rows.flatten(), moved.sum(1)))
        ctx.effects.add(ctx.weight.name, 1, moved.sum(0))
        return None, torch.zeros((), dtype=torch.float64), None, None, None
