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
    """Two models and the data.

    Attributes:
        model: the original.
        changes: of the smaller model.
        batches: calibration.
        told: what was done.
        progress: as for `track`.
    """

    model: nn.Module
    changes: Changes
    batches: list[Batch]
    told: Recovery = field(default_factory=Recovery)
    progress: bool | None = None

    @property
    def held(self) -> list[bool]:
        """Which batches are held out: the last fifth, at least one where there are two."""
        count = len(self.batches)
        held = max(1, count // 5) if count > 1 else 0
        return [i >= count - held for i in range(count)]

    def each(self, text: str) -> Iterator[tuple[Batch, bool]]:
        """A copy of each batch, and whether it is held out; `text` is what a progress bar calls it."""
        for batch, held in track(list(zip(self.batches, self.held, strict=True)), text, self.progress):
            yield batch.copy(), held
