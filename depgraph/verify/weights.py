"""The weights of a proof: the model's own values in a wider type, or values drawn anew.

Both runs of a proof need weights in float64: the original's with removed entries zeroed, and the smaller model's. Large ones
exist only while an op uses them (`surgery/on_demand.py`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import nn

from ..tracing.tensors import place_of

Tensor = torch.Tensor
ROOM = 1 << 24  # entries of a model that are widened once, for the whole run: its smallest tensors
TABLE = 262_147  # a prime number of values, from which all weights drawn anew are taken in turn


def widened(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy of `tensor` in `dtype` (complex numbers in its complex counterpart), where it is narrower; else a copy."""
    if dtype is not None and tensor.is_complex():
        return tensor.to(dtype.to_complex(), copy=True)
    if dtype is not None and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(dtype, copy=True)
    return tensor.clone()


def too_large(tensors: Mapping[str, Tensor], room: int) -> set[str]:
    """The parameters that are made on demand: those that do not fit into `room` entries, at most `ROOM`, beside all smaller ones."""
    used, found, room = 0, set(), min(room, ROOM)
    for name, tensor in sorted(tensors.items(), key=lambda pair: pair[1].numel()):
        used += tensor.numel()
        if used > room and isinstance(tensor, nn.Parameter) and not tensor.is_complex() and tensor.dim() > 1:
            found.add(name)
    return found


@lru_cache(maxsize=1)
def _tables() -> tuple[Tensor, Tensor]:
    """Normal values, and positive ones."""
    dice = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        normal = torch.randn(TABLE, generator=dice, dtype=torch.float64)
        return normal, 0.6 + 0.8 * torch.rand(TABLE, generator=dice, dtype=torch.float64)


class DrawnValues:
    """Parameters drawn anew: like those of a fresh layer, but no two alike, none zero on purpose, and vectors positive.

    A parameter of several dims is normal with variance 2 / (entries per row), one of up to one dim is uniform in
    [0.6, 1.4]: biases, scales and gates of either sign are as good, and variances must be positive.
    A tensor takes its values from one table of `TABLE` of them, in turn, from an entry on that depends on its name.
    """

    room = 1 << 26

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        names: set[str],
        others: frozenset[str] = frozenset(),
        turn: int = 0,
    ) -> None:
        """`tensors` of the original; those in `names` are drawn, in each `turn` otherwise, the others keep their values.

        Those in `others` are drawn otherwise than they would be without.
        """
        self.tensors, self.names, self.others, self.turn = tensors, names, others, turn

    def whole(self, name: str) -> Tensor:
        """The values of tensor `name`, drawn ones in float64: inside of modes, casts may be none."""
        source = self.tensors[name].detach()
        if name not in self.names:
            return source
        drawn = self._from(name, 0, source.numel())
        return drawn.view(source.shape).to(place_of(source))

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Some entries along dim 0, likewise."""
        source = self.tensors[name].detach()
        if name not in self.names:
            return source[first:last]
        width = prod(source.shape[1:])
        drawn = self._from(name, first * width, (last - first) * width)
        return drawn.view(last - first, *source.shape[1:]).to(place_of(source))

    def at(self, name: str, index: Tensor) -> Tensor:
        """Some entries along dim 0, likewise."""
        source = self.tensors[name].detach()
        if name not in self.names:
            return source.index_select(0, index)
        width = prod(source.shape[1:])
        table, begin, scale = self._table(name)
        places = (begin + index.cpu()[:, None] * width + torch.arange(width)) % TABLE
        return (table[places] * scale).view(len(index), *source.shape[1:]).to(index.device)

    def kept(self, key: str, compute: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """Computed anew."""
        return compute()

    def _table(self, name: str) -> tuple[Tensor, int, float]:
        """From which table the values of a tensor come, from which entry on, and by what they are multiplied."""
        source = self.tensors[name]
        moved = 7919 * (name in self.others) + 104_729 * self.turn
        begin = (zlib.crc32(name.encode()) + moved) % TABLE
        rest = source.shape[1:]
        scale = (2 / max(max(rest) if len(rest) == 2 else prod(rest), 1)) ** 0.5 if source.dim() > 1 else 1.0
        return _tables()[source.dim() < 2], begin, scale

    def _from(self, name: str, first: int, count: int) -> Tensor:
        """`count` values in the order of memory, from the one numbered `first` on."""
        table, begin, scale = self._table(name)
        begin = (begin + first) % TABLE
        drawn = table[begin : begin + count]
        if len(drawn) < count:
            drawn = torch.cat([drawn, table.repeat(1 + count // TABLE)])[:count]
        return drawn * scale if scale != 1.0 else drawn
