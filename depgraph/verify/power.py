"""Which tensors move the outputs at all: what a proof could have noticed.

Each weight goes into the run through a function that hands back no gradient, but writes down how large the sum of
|gradient * value| is: by how much the outputs change, relative to their spread, when the weight does. One pass backward from
random cotangents tells for all of them. Weights that exist on demand are not kept for it: what a matrix product owes to a row
of its weight is the gradient of what that row computes, times that.
"""

from __future__ import annotations

from typing import Any

import torch

from .compare import moderate, spread
from .weights import Use, Weight

Tensor = torch.Tensor
MOVES = 1e-4  # of an output's spread: what moves it by less is not told from what does not


class Effects(Use):
    """A use of weights that measures by how much each moves the outputs."""

    def __init__(self) -> None:
        self.sizes: dict[str, float] = {}
        self.root = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def add(self, name: str, size: float) -> None:
        """`name` moves the outputs by `size` more."""
        self.sizes[name] = self.sizes.get(name, 0.0) + size

    def watched(self, value: Tensor, name: str) -> Tensor:
        """`value`, the weight `name` or rows of it, in a form that is watched."""
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
        return self.watched(super().looked_up(rows, weight), weight.name)

    def measure(self, outputs: list[Tensor]) -> None:
        """Go backward from random cotangents of all moderate entries of the outputs."""
        dice = torch.Generator().manual_seed(0)
        total = self.root * 0
        floats = [y for y in outputs if y.is_floating_point() or y.is_complex()]
        for y in floats:
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
        if gradients[0] is not None:
            ctx.effects.add(ctx.name, float((gradients[0] * value).abs().sum()))
        return None, torch.zeros((), dtype=torch.float64), None, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, root: Tensor, effects: Effects, weight: Weight) -> Tensor:
        y = weight.times(x)
        ctx.effects, ctx.weight = effects, weight
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        ctx.effects.add(ctx.weight.name, float((gradients[0] * y).abs().sum()))
        root = torch.zeros((), dtype=torch.float64)
        back = ctx.weight.back(gradients[0]) if ctx.needs_input_grad[0] else None
        return back, root, None, None
