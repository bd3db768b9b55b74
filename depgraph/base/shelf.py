"""Tensors that are put aside in a file while others are worked on."""

from __future__ import annotations

import ctypes
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from .errors import StoreError

Tensor = torch.Tensor


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a shelf's file.

    Attributes:
        begin: its first byte.
        shape: its shape.
        dtype: its type.
        crc32: the checksum of its bytes.
    """

    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    crc32: int


class Shelf:
    """A file of tensors. What is on it can't be changed; what is put there comes behind."""

    def __init__(self, path: Path) -> None:
        """The file at `path`, in a folder that exists, is made when the first tensor comes."""
        self.path = path
        self.end = 0

    def clear(self) -> None:
        """Nothing that is on it is needed any more; the next tensor comes in its place."""
        self.end = 0

    def put(self, tensor: Tensor) -> Place:
        """Write a copy of `tensor`, which is on the CPU.

        Raises:
            StoreError: the file can't be written, as where the disk is full.
        """
        plain = tensor.detach().contiguous()
        octets = _octets(plain)
        place = Place(self.end, tuple(tensor.shape), tensor.dtype, zlib.crc32(octets))
        try:
            with self.path.open("r+b" if self.end else "wb", buffering=0) as stream:
                stream.seek(self.end)
                left = octets
                while left:
                    left = left[stream.write(left) :]
        except OSError as error:
            raise StoreError(f"{self.path} can't be written: {error}") from error
        self.end += len(octets)
        return place

    def get(self, place: Place) -> Tensor:
        """The tensor at a place, in memory of its own."""
        return self.rows(place, 0, place.shape[0]) if place.shape else self._read(place, 0, ())

    def rows(self, place: Place, first: int, last: int) -> Tensor:
        """Its entries from one to another (exclusive) along dim 0."""
        row = prod(place.shape[1:]) * place.dtype.itemsize
        return self._read(place, first * row, (last - first, *place.shape[1:]))

    def fill(self, tensor: Tensor, place: Place) -> None:
        """Read what is at a place into a contiguous tensor of its shape and type."""
        self._fill(tensor, place, 0)

    def _read(self, place: Place, offset: int, shape: tuple[int, ...]) -> Tensor:
        found = torch.empty(shape, dtype=place.dtype)
        self._fill(found, place, offset)
        return found

    def _fill(self, tensor: Tensor, place: Place, offset: int) -> None:
        try:
            with self.path.open("rb", buffering=0) as stream:
                whole = filled(stream, place.begin + offset, _octets(tensor))
        except OSError as error:
            raise StoreError(f"{self.path} can't be read: {error}") from error
        if not whole:
            raise StoreError(f"{self.path} was changed while it was used")


def filled(stream: Any, begin: int, room: memoryview) -> bool:
    """Read a file that is open without a buffer from byte `begin` on into `room`; whether it holds so many."""
    stream.seek(begin)
    while room and (n := stream.readinto(room)):
        room = room[n:]
    return not room


def _octets(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, which lives longer; as numpy's array its storage could not be resized any more."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
