"""The inputs of a convolution as a matrix: for each output position the entries that its kernel meets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
PIECE = 1 << 23  # entries of one piece
# Samples of a piece, number of its first -> those to take; None: all.
Choice = Callable[[int, int], Tensor | None]


def patches(args: Any, chosen: Choice | None = None) -> Iterator[Tensor]:
    """The windows of a convolution's input, in pieces of at most about `PIECE` entries.

    `args` are those of ``aten.convolution``; samples that are not `chosen` are never copied.

    Yields:
        [samples, channels of the input, kernel positions]: with the weight as ``w[o, i, positions]``, and one group, the
        output at a sample is ``(piece[s] * w[o]).sum()``. A transposed convolution is the plain one of an input with
        zeros between its entries and of a kernel turned round: its windows come in the order of the weight as it is.
    """
    x, weight, _, *numbers = args[:8]
    rank = weight.dim() - 2
    stride, padding, dilation = (_each(n, rank) for n in numbers[:3])
    transposed, extra = bool(numbers[3]), _each(numbers[4], rank)
    kernel = list(weight.shape[2:])
    x = x if x.dim() > rank + 1 else x[None]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if transposed:
        x = _spread(x, stride)
        pads = [(r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True)]
        stride = [1] * rank
    else:
        pads = [(p, p) for p in padding]
    x = F.pad(x, [n for pair in reversed(pads) for n in pair])
    for d in range(rank):
        x = x.unfold(2 + d, reach[d] + 1, stride[d])
    x = x[_every(dilation)]
    x = x.permute(0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank))  # [n, *out, channels, *kernel]
    done = 0
    for piece in _pieces(x, rank):
        count = prod(piece.shape[: rank + 1])
        some = None if chosen is None else chosen(count, done)
        done += count
        if some is None:
            flat = piece.reshape(-1, piece.shape[rank + 1], *kernel)
        else:
            flat = piece[torch.unravel_index(some, piece.shape[: rank + 1])]
        flat = flat.flip(list(range(2, 2 + rank))) if transposed else flat
        yield flat.flatten(2)


def _each(given: Any, rank: int) -> list[int]:
    """One number for each spatial dim; a single one stands for all."""
    numbers = [int(n) for n in given]
    return numbers * rank if len(numbers) == 1 else numbers


def _spread(x: Tensor, stride: list[int]) -> Tensor:
    """`x` with ``stride - 1`` zeros between its entries."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    out = x.new_zeros(*x.shape[:2], *sizes)
    out[_every(stride)] = x
    return out


def _every(steps: list[int]) -> tuple[Any, ...]:
    """An index that takes every n-th entry of the last dims."""
    return (..., *(slice(None, None, n) for n in steps))


def _pieces(x: Tensor, rank: int) -> Iterator[Tensor]:
    """Pieces of `x` along its first dims of at most `PIECE` entries, where those dims allow."""
    whole = x.numel()
    if whole <= PIECE or rank < 0:
        yield x
        return
    rows = max(1, PIECE * x.shape[0] // whole)
    for piece in x.split(rows, 0):
        if rank and piece.numel() > PIECE and piece.shape[1] > 1:
            lines = max(1, PIECE * piece.shape[1] // piece.numel())
            yield from piece.split(lines, 1)
        else:
            yield piece
