"""How far two runs are apart, measured against the spread of what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..base.errors import VerificationError
from ..base.values import output_leaves

Tensor = torch.Tensor
MODERATE = (
    1e4  # entries so many times larger than the median of those that are not zero are compared by themselves
)


def spread(y: Tensor) -> float:
    """How far the moderate entries of `y` lie apart: their standard deviation, or their size where all are the same.

    Fillers (``-1e9`` in logits) are no measure for the others, and neither is a constant that all share.
    """
    y = y.detach().abs() if y.is_complex() else y.detach()
    y = y[torch.isfinite(y)].double()
    if not y.numel():
        return 1.0
    y = y[moderate(y)]
    size = float(y.abs().max())
    apart = float(y.std(correction=0)) if y.numel() > 1 else 0.0
    return apart if apart > 1e-9 * size else size


def moderate(y: Tensor) -> Tensor:
    """Which of the finite entries `y` [n] are not out of all proportion to the others."""
    sizes = y.abs()
    there = sizes[sizes > 0]
    return sizes <= MODERATE * there.median() if there.numel() else torch.ones_like(sizes, dtype=torch.bool)


def deviation(got: Any, wanted: Any) -> float:
    """Largest |got - wanted| of any pair of output tensors, relative to the `spread` of the pair's second.

    Entries out of proportion are compared by themselves, relative to their own size.

    Args:
        got: an output of a model, or a list of tensors.
        wanted: what it should be.

    Raises:
        VerificationError: the outputs differ in number, shape or where they are not finite.
    """
    return apart(output_leaves(got), output_leaves(wanted))


def apart(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """`deviation` of two lists of tensors."""
    if len(a) != len(b):
        raise VerificationError(f"the smaller model returns {len(a)} tensors, the original {len(b)}")
    return max((_pair(x, y) for x, y in zip(a, b, strict=True)), default=0.0)


def _pair(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape:
        raise VerificationError(f"an output has shape {tuple(x.shape)}, the original's {tuple(y.shape)}")
    if x.layout is not torch.strided or y.layout is not torch.strided:
        x, y = (t.to_dense() if t.layout is not torch.strided else t for t in (x, y))
    if not x.numel() or not (y.is_floating_point() or y.is_complex()):
        if x.numel() and not torch.equal(x, y):
            raise VerificationError("an output of integers differs")
        return 0.0
    x, y = x.detach(), y.detach()
    fine = torch.isfinite(y)
    if not torch.equal(torch.isfinite(x), fine):
        raise VerificationError("outputs are not finite in different places")
    if not bool(fine.any()):
        return 0.0
    a, b = x[fine], y[fine]
    plain = moderate(b)
    difference = (a - b).abs()
    scale = torch.where(plain, spread(b), b.abs()).clamp(min=1e-30)
    return float((difference / scale).max())
