"""What every method of recovery works on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from ..base.progress import track
from ..data.calibration import Batch
from .changes import Changes
from .result import Recovery


@dataclass
class Task:
    """The original, the changes of the smaller model, the calibration batches, and what was done so far."""

    model: nn.Module
    changes: Changes
    batches: list[Batch]
    recovery: Recovery = field(default_factory=Recovery)
    progress: bool | None = None

    @property
    def held_out(self) -> list[bool]:
        """Which batches are held out: the last fifth, at least one where there are two."""
        count = len(self.batches)
        held_out = max(1, count // 5) if count > 1 else 0
        return [i >= count - held_out for i in range(count)]

    def each(self, text: str) -> Iterator[tuple[Batch, bool]]:
        """A copy of each batch, and whether it is held out; `text` is what a progress bar calls it."""
        pairs = list(zip(self.batches, self.held_out, strict=True))
        for batch, held_out in track(pairs, text, self.progress):
            yield batch.copy(), held_out
