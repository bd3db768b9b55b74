"""Where the values of a model's parameters and buffers come from: one protocol behind scores, slices, checks and proofs.

A model can be traced, grouped, planned for and cut without a value, on the meta device. Whoever needs values asks for
them here, by name, whole or by rows, so that nobody has to hold more than one tensor, or of a matrix more than a few rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

Tensor = torch.Tensor


class Weights(Protocol):
    """A source of values. What it gives is not to be written into, and valid until the next call.

    Attributes:
        room: bytes of values that a run of the model may keep between uses, where they are not in memory anyhow.
    """

    room: int

    def whole(self, name: str) -> Tensor:
        """All values of tensor `name`."""

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """The entries `first` to `last` (exclusive) along dim 0 of tensor `name`."""

    def at(self, name: str, index: Tensor) -> Tensor:
        """The entries `index` [n] along dim 0 of tensor `name`."""

    def kept(self, key: str, compute: Callable[[], Sequence[Any]]) -> Sequence[Any] | None:
        """What `compute`, a function of values alone, gives; a source whose values never change may remember it by `key`.

        None: another process computes it.
        """


class InMemory:
    """The values that tensors hold."""

    room = 0

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """`tensors` by name."""
        self.tensors = tensors

    def whole(self, name: str) -> Tensor:
        """The tensor, detached."""
        return self.tensors[name].detach()

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """A view."""
        return self.whole(name)[first:last]

    def at(self, name: str, index: Tensor) -> Tensor:
        """A copy of these entries."""
        return self.whole(name).index_select(0, index)

    def kept(self, key: str, compute: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """Computed anew: a model may be trained meanwhile."""
        return compute()
