"""The k lowest of many scores, exactly, ties by index, in passes over the scores that hold no more than one tensor of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Scores = Iterable[tuple[str, torch.Tensor]]
Keys = npt.NDArray[Any]
DIGIT = 16  # bits of a key that one pass counts


def lowest(
    scores: Callable[[], Scores], count: int, kind: torch.dtype = torch.float32
) -> Iterator[tuple[str, torch.Tensor]]:
    """Bool tensors, True for the `count` lowest scores of all tensors together; of equal ones, those that come first.

    A radix selection: each pass counts the next 16 bits of the scores that the passes before left open, so two passes find the
    threshold of float32 scores, and the third hands out the masks.

    Args:
        scores: called for each pass: the name and the scores (not NaN) of each tensor, in the same order.
        count: how many.
        kind: float32 or float64, in which scores are compared.

    Yields:
        the name of each tensor, and its mask in the same shape.
    """
    threshold, equal = _threshold(scores, count, kind)
    for name, given in scores():
        keys = _keys(given, kind)
        if threshold is None:
            yield name, torch.zeros(given.shape, dtype=torch.bool)
            continue
        limit = keys.dtype.type(threshold)
        gone = keys < limit
        if equal:
            same = np.flatnonzero(keys == limit)[:equal]
            gone[same] = True
            equal -= len(same)
        yield name, torch.from_numpy(gone).view(given.shape)


def _threshold(scores: Callable[[], Scores], count: int, kind: torch.dtype) -> tuple[int | None, int]:
    """The key of the count-th lowest score, and how many that are equal to it go; None where none does."""
    if count <= 0:
        return None, 0
    prefix, left = 0, count
    bits = torch.finfo(kind).bits
    for shift in range(bits - DIGIT, -1, -DIGIT):
        totals = np.zeros(1 << DIGIT, dtype=np.int64)
        for _, given in scores():
            keys = _keys(given, kind)
            if shift + DIGIT < bits:
                keys = keys[keys >> (shift + DIGIT) == prefix]
            digits = (keys >> shift) & (2**DIGIT - 1)
            totals += np.bincount(digits.astype(np.int64), minlength=1 << DIGIT)
        digit = int(np.searchsorted(np.cumsum(totals), left))
        left -= int(totals[:digit].sum())
        prefix = prefix << DIGIT | digit
    return prefix, left


def _keys(scores: torch.Tensor, dtype: torch.dtype) -> Keys:
    """Unsigned numbers in the order of the scores, flat: the bits of floats, those of negative ones inverted."""
    given = scores.detach().to("cpu", dtype).contiguous().view(-1).numpy()
    kind, sign = (np.uint32, 1 << 31) if given.dtype == np.float32 else (np.uint64, 1 << 63)
    keys: Keys = (given + 0.0).view(kind)  # + 0.0: there is one zero
    return np.where(keys & kind(sign), ~keys, keys | kind(sign))
