"""The k lowest of many scores, exactly, ties by index, in passes over the scores that hold no more than one tensor of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

Scores = Iterable[tuple[str, torch.Tensor]]
DIGIT = 16  # bits of a key that one pass counts
HALF, LOW = 1 << DIGIT - 1, (1 << DIGIT) - 1


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
        if threshold is None:
            yield name, torch.zeros(given.shape, dtype=torch.bool)
            continue
        keys = _keys(given, kind)
        gone = keys < threshold
        if equal:
            same = (keys == threshold).nonzero().view(-1)[:equal]
            gone[same] = True
            equal -= len(same)
        yield name, gone.view(given.shape)


def _threshold(scores: Callable[[], Scores], count: int, kind: torch.dtype) -> tuple[int | None, int]:
    """The key of the count-th lowest score, and how many that are equal to it go; None where none does."""
    if count <= 0:
        return None, 0
    prefix, left = 0, count
    first = torch.finfo(kind).bits - DIGIT
    for shift in range(first, -1, -DIGIT):
        totals = torch.zeros(1 << DIGIT, dtype=torch.int64)
        for _, given in scores():
            keys = _keys(given, kind)
            if shift < first:
                keys = keys[(keys >> (shift + DIGIT)) == prefix]
                digits = (keys >> shift) & LOW
            else:
                digits = (keys >> shift) + HALF  # of signed numbers
            totals += torch.bincount(digits, minlength=1 << DIGIT)
        before = totals.cumsum(0)
        digit = int(torch.searchsorted(before, left))
        left -= int(before[digit] - totals[digit])
        prefix = prefix << DIGIT | digit if shift < first else digit - HALF
    return prefix, left


def _keys(scores: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Whole numbers in the order of the scores, flat: the bits of floats, those of negative ones below the sign inverted."""
    given = scores.detach().to("cpu", kind).contiguous().view(-1)
    whole = torch.int32 if kind is torch.float32 else torch.int64
    keys = given.view(whole)
    if not len(keys) or int(keys.amin()) >= 0:
        return keys
    keys = (given + 0.0).view(whole)  # there is one zero
    return keys ^ ((keys >> (torch.finfo(kind).bits - 1)) & torch.iinfo(whole).max)
