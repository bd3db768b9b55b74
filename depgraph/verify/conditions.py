"""What a proof is repeated under: the same random draws, inputs drawn anew, and inputs of other sizes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..base.inputs import Arguments
from ..base.values import map_tensors, tensor_leaves
from ..plan.plan import Plan

Tensor = torch.Tensor
BATCH_LIMIT = 64  # up to which a batch size between a width and what is left of it is tried
SMALL, SMALL_INPUT = (
    1_000_000,
    20_000,
)  # parameters, and entries of an input, of models whose runs cost next to nothing


@contextmanager
def same_draws(seed: int = 0) -> Iterator[None]:
    """What forward draws at random (by torch, numpy or random) is the same in every run; afterwards all are as before."""
    plain, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(arrays)


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


def other_sizes(arguments: Arguments, plan: Plan, weights: int) -> Iterator[Arguments]:
    """The same arguments with another batch and other lengths or image sizes, the largest change first.

    A model need not accept them. Sizes are chosen to lie between a width and what the plan leaves of it: where forward
    compares the two, that is where the outcome would change.

    Args:
        arguments: as a model is called with.
        plan: what is removed.
        weights: the number of the model's parameters; large models and large inputs grow by little.
    """
    tensors = [t for t in tensor_leaves(arguments) if t.layout is torch.strided]
    first = next((t for t in tensors if t.dim()), None)
    if first is None:
        return
    batch = first.shape[0]
    pairs = {
        (new, old)
        for cut in plan.cuts.values()
        for new, old in zip(cut.new_shape, cut.shape, strict=True)
        if new < old
    }

    def between(candidates: list[int]) -> int:
        hits = [sum(new <= n < old for new, old in pairs) for n in candidates]
        best = [n for n, k in zip(candidates, hits, strict=True) if k == max(hits)]
        return max(best) if max(hits) else candidates[0]

    small = weights <= SMALL and max(t.numel() for t in tensors) <= SMALL_INPUT
    batches = [2 * batch + 1, *range(batch + 1, min(BATCH_LIMIT, 8 * batch + 16))] if small else [batch + 1]
    other = between(batches)
    tried: set[tuple[Any, ...]] = set()
    for dims, with_batch in (((2, 3, 4, -1), True), ((2,), True), ((), True), ((2, 3, 4, -1), False)):
        longer: dict[int, int] = {}
        for t in tensors:
            for d in _lengths(t, batch, dims):
                n = t.shape[d]
                near = [] if t.is_floating_point() and t.dim() > 3 else [n + 1]
                far = [n // 2] if n % 2 == 0 and n >= 64 else [2 * n, 3 * n]
                longer.setdefault(n, between([*near, *far]) if small or not near else n + 1)
        change = tuple(sorted(longer.items())), with_batch
        if change in tried or not (longer or with_batch):
            continue
        tried.add(change)

        def resized(
            t: Tensor, dims: Any = dims, with_batch: Any = with_batch, longer: Any = longer
        ) -> Tensor:
            if t.layout is not torch.strided:
                return t.clone()
            for d in _lengths(t, batch, dims):
                t = _repeated(t, d, longer[t.shape[d]])
            if with_batch and t.dim() and t.shape[0] == batch:
                t = _repeated(t, 0, other)
            return t.clone()

        arranged: Arguments = map_tensors(arguments, resized)
        yield arranged


def _lengths(t: Tensor, batch: int, dims: tuple[int, ...]) -> list[int]:
    """The dims of an input that may count positions: of images all but the first two, of sequences the second, or the third."""
    if not dims or t.dim() < 2 or t.shape[0] != batch:
        return []
    if t.dim() > 3:
        return list(range(2, t.dim()))
    if t.dim() == 3:
        return [2] if dims == (2,) else [1]
    return [] if t.is_floating_point() else [1]


def _repeated(t: Tensor, dim: int, size: int) -> Tensor:
    """`t` with `size` entries along `dim`: those there are, over again."""
    if t.shape[dim] == size:
        return t
    if not t.shape[dim]:
        shape = list(t.shape)
        shape[dim] = size
        return torch.zeros(shape, dtype=t.dtype, device=t.device)
    return t.index_select(dim, torch.arange(size, device=t.device) % t.shape[dim])
