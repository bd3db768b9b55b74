"""Which single entries of a tensor stay, one bit each."""

from __future__ import annotations

import base64
import binascii
import zlib
from dataclasses import dataclass
from math import prod

import numpy as np
import torch


@dataclass(frozen=True)
class Bits:
    """True or False for each entry of a tensor.

    Attributes:
        shape: of the tensor.
        packed: eight entries a byte, the first in the highest bit.
    """

    shape: tuple[int, ...]
    packed: bytes

    @classmethod
    def of(cls, mask: torch.Tensor) -> Bits:
        """The bits of a bool tensor."""
        return cls(tuple(mask.shape), np.packbits(mask.detach().cpu().numpy()).tobytes())

    def mask(self) -> torch.Tensor:
        """Bool tensor of `shape`, on the CPU."""
        flat = np.unpackbits(np.frombuffer(self.packed, np.uint8), count=prod(self.shape))
        return torch.from_numpy(flat.view(np.bool_)).view(self.shape)

    @property
    def gone(self) -> int:
        """How many entries are False."""
        return prod(self.shape) - int(np.unpackbits(np.frombuffer(self.packed, np.uint8)).sum())

    def to_text(self) -> str:
        """The bits as text, compressed."""
        return base64.b64encode(zlib.compress(self.packed, 1)).decode()

    @classmethod
    def from_text(cls, shape: tuple[int, ...], text: str) -> Bits:
        """What `to_text` wrote of bits of `shape`.

        Raises:
            ValueError: it did not write this, or not for that shape.
        """
        size = -(-prod(shape) // 8)
        try:
            inflate = zlib.decompressobj()
            packed = inflate.decompress(base64.b64decode(text, validate=True), size + 1)
        except (binascii.Error, zlib.error, TypeError, ValueError) as error:
            raise ValueError(f"they can't be unpacked: {error}") from error
        spare = 8 * size - prod(shape)
        if len(packed) != size or (packed and packed[-1] & ((1 << spare) - 1)):
            raise ValueError(f"they are not those of a tensor of shape {shape}")
        return cls(shape, packed)
