"""What every method of recovery works on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from ..base.errors import StoreError
from ..base.memory import available
from ..base.progress import track
from ..base.shelf import Place, Shelf
from ..data.aside import Waiting
from ..data.calibration import Batch, held_out
from .changes import Changes
from .result import Recovery

Tensor = torch.Tensor
SHARE = 4  # one part in so many of the memory that is free is for runs that wait


@dataclass
class Aside:
    """Tensors that wait, in memory or on a shelf."""

    held: list[Tensor]
    places: list[Place] = field(default_factory=list)
    shelf: Shelf | None = None

    def taken(self) -> list[Tensor]:
        """The tensors."""
        return self.held if self.shelf is None else [self.shelf.get(p) for p in self.places]


@dataclass
class Task:
    """The original, the changes of the smaller model, the calibration batches, and what was done so far.

    Attributes:
        room: how many numbers new biases may have; None: no layer gets one.
        memory: bytes that a layer's solution may take; None: no bound.
        folder: for files in which waits what there is no room for; None: it waits in memory.
    """

    model: nn.Module
    changes: Changes
    batches: list[Batch]
    recovery: Recovery = field(default_factory=Recovery)
    progress: bool | None = None
    room: float | None = None
    memory: int | None = None
    folder: Path | None = None
    shelf: Shelf | None = None

    def aside(self, tensors: list[Tensor]) -> Aside:
        """`tensors`, until they are needed."""
        if self.folder is None:
            return Aside(tensors)
        self.shelf = self.shelf or Shelf(self.folder / "outputs")
        return Aside([], [self.shelf.put(t) for t in tensors], self.shelf)

    @contextmanager
    def waiting(self) -> Iterator[Waiting | None]:
        """Where the activations of runs that wait are: a quarter of the memory there is may hold them, files the rest.

        None: all of them are in memory, as nobody says how much there is, or no file can be made.
        """
        if self.folder is not None and self.memory is not None:
            yield Waiting(self.folder, self.memory // SHARE)
            return
        free, folder = available(), None
        if free is not None:
            with suppress(OSError):
                folder = TemporaryDirectory(prefix="depgraph-", ignore_cleanup_errors=True)
        if free is None or folder is None:
            yield None
            return
        with folder:
            try:
                yield Waiting(Path(folder.name), free // SHARE)
            except StoreError as error:
                raise StoreError(
                    f"the activations of {len(self.batches)} calibration batches do not fit into memory, and {error}\n  fix: give fewer "
                    "batches, or TMPDIR=... in the environment, a folder with more room"
                ) from error

    @property
    def held_out(self) -> list[bool]:
        """Which batches are held out."""
        return held_out(len(self.batches))

    def each(self, text: str) -> Iterator[tuple[Batch, bool]]:
        """A copy of each batch, and whether it is held out; `text` is what a progress bar calls it."""
        pairs = list(zip(self.batches, self.held_out, strict=True))
        for batch, held in track(pairs, text, self.progress):
            yield batch.copy(), held
