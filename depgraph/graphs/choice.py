"""How many edges stay, and which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..base.checks import is_number, is_whole, number, shown, whole_number
from ..base.errors import InputError
from ..training.ramps import ramp_of
from .data import Kind

Kept = dict[Kind, npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Threshold:
    """``keep=Threshold(0.1)``: the edges whose score is at least this stay."""

    score: float


@dataclass(frozen=True)
class Ramp:
    """``keep=Ramp(0.5, steps=5)``: in steps, scored anew after each, on a ramp of gradual pruning, down to this share."""

    keep: float
    steps: int = 5
    ramp: Any = "cubic"


def shares_of(keep: Any, total: int) -> list[Any]:
    """How many edges stay after each step, or the threshold of one."""
    if isinstance(keep, Threshold):
        number("keep=Threshold(...)", keep.score)
        return [keep]
    if isinstance(keep, Ramp):
        whole_number("steps", keep.steps, 1)
        last, removed = _count(keep.keep, total), ramp_of(keep.ramp)
        gone = 1 - last / max(total, 1)
        return [
            max(last, round(total * (1 - removed((i + 1) / keep.steps, gone)))) for i in range(keep.steps - 1)
        ] + [last]
    return [_count(keep, total)]


def _count(keep: Any, total: int) -> int:
    if is_whole(keep):
        if not 0 <= keep <= total:
            raise InputError(
                f"keep={keep}, and there are {total} edges (without loops): give at most that, or a share such as 0.5"
            )
        return int(keep)
    if not is_number(keep) or not 0 <= keep <= 1:
        raise InputError(
            f"keep must be a share from 0 to 1, a number of edges, Threshold(...) or Ramp(...), not {shown(keep)}: 0.5 keeps half"
        )
    return round(keep * total)


def chosen(kept: Kept, together: Any, scores: Any, share: Any, total: int) -> Kept:
    """Which edges stay: whole sets go, those with the lowest mean score first, of equal ones those that come first."""
    here = {k: np.flatnonzero(v) for k, v in kept.items()}
    numbers = np.concatenate([together[k][here[k]] for k in kept])
    flat = np.concatenate([scores[k] for k in kept])
    size = 1 + max(
        int(together[k].max(initial=-1)) for k in kept
    )  # sets that are gone already keep their numbers
    real = numbers >= 0
    sizes = np.bincount(numbers[real], minlength=size)
    sums = np.bincount(numbers[real], weights=flat[real], minlength=size)
    means = np.where(sizes > 0, sums / np.maximum(sizes, 1), np.inf)
    first = np.full(size, len(numbers))
    np.minimum.at(first, numbers[real], np.flatnonzero(real))
    if isinstance(share, Threshold):
        gone = means < share.score
    else:
        order = np.lexsort((first, means))
        excess = int(sizes.sum()) - share
        gone = np.zeros(size, dtype=bool)
        gone[order] = np.cumsum(sizes[order]) <= excess
    made = {}
    for kind, before in kept.items():
        made[kind] = before & ((together[kind] < 0) | ~gone[together[kind]])
    return made
