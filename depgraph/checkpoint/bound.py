"""The bound on memory that a pruning of a checkpoint keeps."""

from __future__ import annotations

import gc
import math

from ..base.errors import InputError
from ..base.memory import held, trim


class Bound:
    """What may be taken beside what is resident now."""

    def __init__(self, most: int) -> None:
        """Up to `most` bytes."""
        self.most, self.before = most, held()
        self.watched = most * 3 // 4  # from where on what is free is given back

    def check(self, what: str) -> None:
        """Raise an `InputError` where more is taken when `what` is read."""
        if held() - self.before <= self.watched:
            return
        give_back()
        taken = held() - self.before
        self.watched = min(self.most, max(self.watched, taken + self.most // 20))
        if taken > self.most:
            raise InputError(
                f"memory={self.most / 1e9:.3g} GB is too little: {taken / 1e9:.3g} GB are taken where {what} is read\n"
                f'  fix: memory="{math.ceil(taken / 8e7) / 10:g}GB", or smaller batches of calibration data'
            )


def give_back() -> None:
    """Let go of what nobody can reach, and let the allocator return what is free to the system, where it can be told."""
    gc.collect()
    trim()
