"""Tensors in safetensors files: written in shards, checked before and while they are read."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..plan.plan import Cut
from .folders import checked

Tensor = torch.Tensor
MODEL, OTHER = "model", "other"  # what a state_dict has, and buffers and tables that it has not
FILE = re.compile(r"(?:model|other)(?:-\d{5}-of-\d{5})?\.safetensors")
# Types by the names that safetensors and we have for them. Complex numbers are written as pairs of real ones.
CODES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
PAIRS = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}
DTYPES: dict[str, torch.dtype] = {n: getattr(torch, n) for n in (*CODES.values(), *PAIRS)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor in a folder.

    Attributes:
        dtype: its type.
        shape: its shape.
        file: the file that has it.
        crc32: the checksum of its bytes.
        stride: None, or the stride of a tensor that is dense in another order of its dims (channels last).
        cut: what of the tensor that the file has belongs to it; None: all.
        name: the name that the file has for it, where that is another than its own.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    crc32: int
    stride: tuple[int, ...] | None = None
    cut: Cut | None = None
    name: str | None = None

    def part(self, cut: Cut | None, crc32: int) -> Entry:
        """What `cut` leaves of this tensor, with the checksum of that."""
        if cut is None:
            return replace(self, crc32=crc32)
        shape, stride, step = cut.new_shape, self.stride, 1
        if stride is not None:  # dims lie in the order in which they did
            dense = dict.fromkeys(range(len(shape)), 1)
            for d in sorted(dense, key=stride.__getitem__):
                dense[d], step = step, step * shape[d]
            stride = tuple(dense.values())
        return replace(self, shape=shape, crc32=crc32, stride=stride, cut=cut)

    def runs(self) -> list[tuple[int, int]]:
        """Where its bytes lie in those of the tensor that the file has: (first, behind the last), rising."""
        size = self.dtype.itemsize
        if self.cut is None:
            return [(0, math.prod(self.shape) * size)]
        mask = self.cut.mask().flatten().to(torch.int8).numpy()
        edges = np.flatnonzero(np.diff(mask, prepend=0, append=0)) * size
        return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))

    @property
    def written_shape(self) -> tuple[int, ...]:
        """The shape that the file says."""
        return (*self.shape, 2) if self.dtype.is_complex else self.shape

    @property
    def written_dtype(self) -> str:
        """The name of the type that the file has."""
        name = NAMES[self.dtype]
        return PAIRS.get(name, name)


def write(tensors: Mapping[str, Tensor], folder: Path, stem: str, most: int) -> dict[str, Entry]:
    """Write tensors into ``<stem>.safetensors``, or into shards with an index where they have more than `most` bytes."""
    shards: list[dict[str, Tensor]] = []
    room = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if not shards or size > room:
            shards.append({})
            room = most
        shards[-1][name] = tensor
        room -= size
    entries: dict[str, Entry] = {}
    for i, shard in enumerate(shards):
        file = (
            f"{stem}.safetensors"
            if len(shards) == 1
            else f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors"
        )
        plain = {name: _plain(tensor) for name, tensor in shard.items()}
        owners = Counter(t.untyped_storage().data_ptr() for t in plain.values())
        plain = {n: t.clone() if owners[t.untyped_storage().data_ptr()] > 1 else t for n, t in plain.items()}
        for name, tensor in shard.items():
            entries[name] = Entry(
                tensor.dtype, tuple(tensor.shape), file, _crc32(plain[name]), _stride(tensor)
            )
        save_file(plain, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
            "weight_map": {name: entry.file for name, entry in entries.items()},
        }
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return entries


def differences(folder: Path, entries: Mapping[str, Entry], files: Iterable[str]) -> list[str]:
    """Where the files of a folder have other tensors than `entries` say; no values are read."""
    problems: list[str] = []
    for file in files:
        expected = {name: entry for name, entry in entries.items() if entry.file == file}
        try:
            # not as torch: that would map all of the file as memory of its own, whatever the file says of its size
            with safe_open(checked(folder, file), framework="numpy") as held:
                there = set(held.keys())
                problems += [f"{name!r} is missing in {file}" for name in expected.keys() - there]
                problems += [f"{name!r} in {file} is not in plan.json" for name in there - expected.keys()]
                for name in expected.keys() & there:
                    part, entry = held.get_slice(name), expected[name]
                    shape, dtype = tuple(part.get_shape()), CODES.get(part.get_dtype(), part.get_dtype())
                    if shape != entry.written_shape:
                        problems.append(
                            f"{name!r} has shape {shape} in {file}, {entry.written_shape} in plan.json"
                        )
                    if dtype != entry.written_dtype:
                        problems.append(f"{name!r} is {dtype} in {file}, {entry.written_dtype} in plan.json")
        except (SafetensorError, OSError, ValueError) as error:
            problems.append(f"{file}: {error}")
    return problems


def read(folder: Path, entries: Mapping[str, Entry], problems: list[str]) -> dict[str, Tensor]:
    """The tensors of a folder, each in memory of its own; those whose bytes have changed are added to `problems`."""
    tensors: dict[str, Tensor] = {}
    for file in dict.fromkeys(entry.file for entry in entries.values()):
        mine = {name: entry for name, entry in entries.items() if entry.file == file}
        for name, tensor in _in_file(folder, file, mine, problems):
            entry = mine[name]
            if _crc32(tensor) != entry.crc32:
                problems.append(f"{name!r} in {file} was changed after it was written: checksum mismatch")
                continue
            whole = torch.view_as_complex(tensor) if entry.dtype.is_complex else tensor
            if entry.cut is not None:
                whole = entry.cut.renumbered(whole)
            if entry.stride is not None:
                whole = torch.empty_strided(entry.shape, entry.stride, dtype=entry.dtype).copy_(whole)
            tensors[name] = whole
    return tensors


def _in_file(
    folder: Path, file: str, entries: Mapping[str, Entry], problems: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file, in the order in which they lie there, without a gap, behind the header."""
    try:
        path = checked(folder, file)
        with safe_open(path, framework="numpy"):  # what its header says is true
            pass
        with path.open("rb", buffering=0) as stream:
            text = bytearray(int.from_bytes(stream.read(8), "little"))
            _fill(stream, memoryview(text), "header")
            header = json.loads(text)
            places = {n: header[e.name or n]["data_offsets"][0] + 8 + len(text) for n, e in entries.items()}
            for name in sorted(places, key=places.__getitem__):
                entry = entries[name]
                tensor = torch.empty(entry.written_shape, dtype=DTYPES[entry.written_dtype])
                left = memoryview(_octets(tensor))
                for first, last in entry.runs():
                    stream.seek(places[name] + first)
                    _fill(stream, left[: last - first], name)
                    left = left[last - first :]
                yield name, tensor
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError, KeyError) as error:
        problems.append(f"{file}: {error}")


def _fill(stream: Any, view: memoryview, name: str) -> None:
    """Read as many bytes as `view` has room for."""
    while view and (count := stream.readinto(view)):
        view = view[count:]
    if view:
        raise ValueError(f"it ends within {name!r}")


def checksum(tensor: Tensor, cut: Cut | None) -> int:
    """The checksum of the bytes that `cut` leaves of `tensor`."""
    return _crc32(_plain(tensor if cut is None else replace(cut, numbers=None).slice(tensor.detach())))


def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether a tensor of that stride has each place of its memory once, in some order of its dims."""
    expected = 1
    for step, size in sorted((s, n) for s, n in zip(stride, shape, strict=True) if n != 1):
        if step != expected:
            return False
        expected *= size
    return math.prod(shape) > 0


def _stride(tensor: Tensor) -> tuple[int, ...] | None:
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    usual = torch.empty(shape, device="meta").stride()
    return stride if stride != usual and is_dense(shape, stride) else None


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous, on the CPU, of real numbers."""
    data = tensor.detach().resolve_conj().resolve_neg().cpu()
    data = torch.view_as_real(data) if data.is_complex() else data
    return data.contiguous()


def _octets(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor, as they lie in memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(_octets(tensor))
