"""What a proof is repeated under: the same random draws, inputs drawn anew, and inputs of other sizes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch

from ..base.inputs import Arguments
from ..base.values import map_tensors, tensor_leaves

Tensor = torch.Tensor


def seed_all() -> None:
    """What forward draws at random from now on (by torch, numpy or random) is the same in every run."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
    random.seed(0)
    np.random.seed(0)


def drawn_inputs(arguments: Arguments, seed: int, free: bool) -> Arguments:
    """`arguments` with float tensors drawn anew; integers, which may be indices, stay.

    Args:
        arguments: as a model is called with.
        seed: decides the values.
        free: normal, of the other sign in the sum than the example; else between the example's bounds.
    """
    dice = torch.Generator().manual_seed(seed)

    def drawn(t: Tensor) -> Tensor:
        if not t.is_floating_point() or not t.numel() or t.layout is not torch.strided:
            return t.clone()
        value = t.detach().double()
        fine = value[torch.isfinite(value)]
        if fine.numel() < t.numel() and fine.numel():  # a mask of fillers
            return t.clone()
        if free:
            new = torch.randn(t.shape, generator=dice, dtype=torch.float64)
            if fine.numel() and float(new.sum()) * float(fine.sum()) > 0:
                new = -new
        else:
            low, high = (float(fine.min()), float(fine.max())) if fine.numel() else (0.0, 1.0)
            if low == high:
                low, high = (0.5 * low, 1.5 * low) if low else (0.0, 1.0)
            new = low + (high - low) * torch.rand(t.shape, generator=dice, dtype=torch.float64)
        return new.to(t.device, t.dtype)

    arranged: Arguments = map_tensors(arguments, drawn)
    return arranged


def other_sizes(arguments: Arguments) -> Iterator[Arguments]:
    """The same arguments with another batch and other lengths or image sizes, the largest change first.

    A model need not accept them.
    """
    tensors = [t for t in tensor_leaves(arguments) if t.layout is torch.strided]
    first = next((t for t in tensors if t.dim()), None)
    if first is None:
        return
    batch = first.shape[0]
    tried: set[tuple[tuple[int, ...], ...]] = set()
    for kinds in (("image", "sequence"), ("series",), ()):

        def resized(t: Tensor, kinds: tuple[str, ...] = kinds) -> Tensor:
            if t.layout is not torch.strided or not t.dim() or t.shape[0] != batch:
                return t.clone()
            for d, size in _lengths(t, kinds):
                t = _repeated(t, d, size)
            return _repeated(t, 0, batch + 1).clone()

        arranged: Arguments = map_tensors(arguments, resized)
        shapes = tuple(tuple(t.shape) for t in tensor_leaves(arranged))
        if shapes not in tried:
            tried.add(shapes)
            yield arranged


def _lengths(t: Tensor, kinds: tuple[str, ...]) -> list[tuple[int, int]]:
    """The dims of an input that may count positions, and other sizes for them."""
    if t.dim() > 3:
        sizes = [(d, t.shape[d]) for d in range(2, t.dim())] if "image" in kinds else []
        return [(d, n // 2 if n >= 16 else n + n // 2) for d, n in sizes]
    d = 2 if "series" in kinds and t.dim() == 3 else 1
    counts = t.dim() == 3 or (t.dim() == 2 and not t.is_floating_point())
    return [(d, t.shape[d] + 1)] if counts and {"series", "sequence"} & {*kinds} else []


def _repeated(t: Tensor, dim: int, size: int) -> Tensor:
    """`t` with `size` entries along `dim`: those there are, over again."""
    if t.shape[dim] == size:
        return t
    if not t.shape[dim]:
        shape = list(t.shape)
        shape[dim] = size
        return torch.zeros(shape, dtype=t.dtype, device=t.device)
    return t.index_select(dim, torch.arange(size, device=t.device) % t.shape[dim])
