"""The safetensors files of a checkpoint: what is in them, checked before a value is read, and their values by rows."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..base.errors import InputError, StoreError, listed
from ..base.shelf import filled
from .weights import CODES, DTYPES

Tensor = torch.Tensor
LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself has it
KEPT = 1 << 26  # bytes of the buffer that is read into again and again; what is larger gets one of its own
INDEX = ".safetensors.index.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
PIECES = ".distcp"  # what torch.distributed.checkpoint calls its own files
SAVED_BY_MANY = (
    "DCP_SHARDING_INFO"  # in a header: where the pieces of tensors begin that processes saved, each its own
)
CONVERTED = (  # one tensor at a time
    "import os, torch, torch.distributed.checkpoint as d; from safetensors.torch import save_file; "
    'p = ""; r, o = d.{reader}({folder}), {out}; os.mkdir(o); '
    't = [(n, m) for n, m in r.read_metadata().state_dict_metadata.items() if hasattr(m, "size") and n.startswith(p)]; '
    "[(d.load(v := {{n: torch.empty(m.size, dtype=m.properties.dtype)}}, storage_reader=r), "
    'save_file({{n[len(p):]: v[n]}}, f"{{o}}/model-{{i:05}}-of-{{len(t):05}}.safetensors")) for i, (n, m) in enumerate(t, 1)]'
)
PREFERRED = "model"  # the stem of the weights where a folder has several


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        name: its name there.
        code: its type, as safetensors names it.
        shape: its shape.
        file: the name of the file.
        begin: where its bytes begin in the file.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    file: str
    begin: int

    @property
    def dtype(self) -> torch.dtype:
        """Its type in torch."""
        return DTYPES[CODES[self.code]]

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry along dim 0."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Its bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass
class Checkpoint:
    """The tensors in a folder of safetensors files.

    Attributes:
        folder: where it is.
        stored: name -> tensor, in the order of the files and of the bytes in each.
        metadata: file -> what its header says beside tensors.
        index: the name of the index, and what it says beside files; None where there is none.
    """

    folder: Path
    stored: dict[str, Stored]
    metadata: dict[str, dict[str, str]]
    index: tuple[str, dict[str, Any]] | None = None
    _handles: dict[str, FileIO] = field(default_factory=dict)
    _room: Tensor | None = None

    @property
    def files(self) -> list[str]:
        """The names of the files that have the tensors."""
        return list(self.metadata)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(s.bytes for s in self.stored.values())

    @property
    def sizes(self) -> dict[str, int]:
        """File -> bytes of its tensors."""
        found = dict.fromkeys(self.metadata, 0)
        for one in self.stored.values():
            found[one.file] += one.bytes
        return found

    def state(self) -> list[tuple[str, int, int]]:
        """What tells whether files have changed: name, size, time of the last change."""
        seen = [(name, (self.folder / name).stat()) for name in self.files]
        return [(name, s.st_size, s.st_mtime_ns) for name, s in seen]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Some entries along dim 0, valid until the next call."""
        one = self.stored[name]
        if not one.shape:
            return self.whole(name)
        shape = (last - first, *one.shape[1:])
        return self._read(one, first * one.row_bytes, (last - first) * one.row_bytes).view(shape)

    def whole(self, name: str) -> Tensor:
        """All of a tensor, valid until the next call."""
        one = self.stored[name]
        return self._read(one, 0, one.bytes).view(one.shape)

    def at(self, name: str, index: Tensor) -> Tensor:
        """The entries `index` [n] along dim 0."""
        out = torch.empty(len(index), *self.stored[name].shape[1:], dtype=self.stored[name].dtype)
        for i, row in enumerate(index.tolist()):
            out[i] = self.rows(name, row, row + 1)[0]
        return out

    def _read(self, one: Stored, offset: int, count: int) -> Tensor:
        room = self._buffer(count)
        octets: Any = room.numpy()
        try:
            whole = filled(self._handle(one.file), one.begin + offset, memoryview(octets)[:count])
        except OSError as error:
            raise StoreError(f"{self.folder / one.file} can't be read: {error}") from error
        if not whole:
            raise StoreError(f"{self.folder / one.file} ends within {one.name!r}")
        return room[:count].view(one.dtype)

    def _buffer(self, count: int) -> Tensor:
        if count > KEPT:
            return torch.empty(count, dtype=torch.uint8)
        if self._room is None or len(self._room) < count:
            self._room = torch.empty(max(count, 1 << 20), dtype=torch.uint8)
        return self._room

    def _handle(self, file: str) -> FileIO:
        if file not in self._handles:
            self._handles[file] = FileIO(self.folder / file)
        return self._handles[file]

    def close(self) -> None:
        """Close the files, and let go of the buffer; a later read opens them again."""
        self._room = None
        while self._handles:
            self._handles.popitem()[1].close()


def opened(folder: Path) -> Checkpoint:
    """The checkpoint in a folder; headers alone are read, and no pickle is opened.

    Raises:
        InputError: everything that is wrong with it: a file that is missing or damaged, a tensor in two of them, an index that
            says something else, values in a form whose entries can't be taken away one by one.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    names, index, problems = _files_of(folder)
    stored: dict[str, Stored] = {}
    metadata: dict[str, dict[str, str]] = {}
    for file in names:
        if not (folder / file).is_file():
            problems.append(f"{file} is missing")
            continue
        try:
            tensors, said = _header(folder / file)
        except (OSError, ValueError) as error:
            problems.append(f"{file}: {error}")
            continue
        if _is_piece(said.pop(SAVED_BY_MANY, "{}")):
            raise InputError(
                f"{folder} has pieces of tensors, each process's own ({file})\n"
                f"  fix: {_conversion(folder, 'HuggingFaceStorageReader')}"
            )
        metadata[file] = said
        for one in tensors:
            if one.name in stored:
                problems.append(f"{one.name!r} is in {stored[one.name].file} and in {file}")
            stored.setdefault(one.name, one)
    if index is not None and not problems:
        problems += _disagreements(index[0], index[1], stored)
    problems += [_unreadable(one) for one in stored.values() if one.code not in CODES or _is_scaled(one.code)]
    if problems:
        raise InputError(listed(f"{folder} can't be pruned:", problems))
    if index is None:
        return Checkpoint(folder, stored, metadata)
    rest = {k: v for k, v in index[1].items() if k != "weight_map"}
    return Checkpoint(folder, stored, metadata, (index[0], rest))


def _files_of(folder: Path) -> tuple[list[str], tuple[str, dict[str, Any]] | None, list[str]]:
    """The names of the files that have the weights, the index with its name, and what is wrong with either."""
    there = sorted(p.name for p in folder.iterdir())
    indices = [n for n in there if n.endswith(INDEX)]
    files = [n for n in there if n.endswith(".safetensors")]
    if not files and not indices:
        if any(n.endswith(PIECES) for n in there):
            raise InputError(
                f"{folder} is a checkpoint of torch.distributed.checkpoint: what is where in it says a pickle, which may run code when it "
                f"is opened: it never is\n  fix: where you trust it, {_conversion(folder, 'FileSystemReader')}"
            )
        pickles = [n for n in there if n.endswith(PICKLES)]
        if pickles:
            raise InputError(
                f"{folder} has its weights in {', '.join(pickles[:3])}, which may run code when they are opened: they never are\n"
                "  fix: convert them to safetensors first, where you trust them (load the model, and save it with "
                "safetensors.torch.save_file or save_pretrained)"
            )
        raise InputError(f"{folder} has no .safetensors files")
    if len(indices) > 1:
        indices = [n for n in indices if n == PREFERRED + INDEX] or indices
    if len(indices) > 1:
        return [], None, [f"it has several indices: {', '.join(indices)}"]
    if indices:
        try:
            index = json.loads((folder / indices[0]).read_text(encoding="utf-8"))
            table = index["weight_map"]
            files = list(dict.fromkeys(table.values()))
            plain = all(isinstance(n, str) and Path(n).name == n for n in files)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            return [], None, [f"{indices[0]} is damaged: {type(error).__name__}: {error}"]
        if not plain:
            return [], None, [f"{indices[0]} names files that are not in the folder"]
        stem = indices[0].removesuffix(INDEX)
        shards = [n for n in there if (m := SHARD.fullmatch(n)) and m["stem"] == stem and n not in files]
        return files, (indices[0], index), [f"{n} is not in {indices[0]}" for n in shards]
    numbered = [m for n in files if (m := SHARD.fullmatch(n))]
    if len(numbered) == len(files):
        count = int(numbered[0]["count"])
        missing = set(range(1, count + 1)) - {int(m["number"]) for m in numbered}
        return files, None, [f"file {i} of {count} is missing" for i in sorted(missing)]
    if len(files) > 1:
        files = [n for n in files if n == PREFERRED + ".safetensors"] or files
    if len(files) > 1:
        return [], None, [f"it has several files and no index: {', '.join(files)}"]
    return files, None, []


def _is_piece(saved: str) -> bool:
    """Whether a header says that tensors in the file begin within larger ones."""
    try:
        return any(any(one["saved_offsets"]) for one in json.loads(saved).values())
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


def _conversion(folder: Path, reader: str) -> str:
    """The line that makes safetensors files of what torch.distributed.checkpoint has written."""
    folder = folder.resolve()
    out = folder.with_name(f"{folder.name}-safetensors")
    code = CONVERTED.format(reader=reader, folder=json.dumps(str(folder)), out=json.dumps(str(out)))
    return (
        'this writes its tensors beside it (where the model is a part of what was saved, set p to the key, such as p = "model."): '
        f"python -c {shlex.quote(code)}"
    )


def _header(path: Path) -> tuple[list[Stored], dict[str, str]]:
    """The tensors of a file in the order of their bytes, and its metadata, or a ValueError."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise ValueError("it is no safetensors file, or was cut short")
        try:
            data = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its header is damaged: {error}") from error
    if not isinstance(data, dict):
        raise ValueError("its header is damaged")  # noqa: TRY004  a file that is wrong, not an argument
    metadata = data.pop("__metadata__", {})
    found: list[tuple[Stored, int]] = []
    begin = 8 + length
    try:
        for name, entry in sorted(data.items(), key=lambda pair: pair[1]["data_offsets"]):
            code, shape = str(entry["dtype"]), tuple(map(int, entry["shape"]))
            first, last = map(int, entry["data_offsets"])
            if begin + first != (found[-1][1] if found else begin):
                raise ValueError(f"its header leaves a gap before {name!r}, or tensors overlap")
            if code in CODES and last - first != prod(shape) * DTYPES[CODES[code]].itemsize:
                raise ValueError(
                    f"{name!r} has {last - first} bytes, which is not what {code} {list(shape)} takes"
                )
            found.append((Stored(name, code, shape, path.name, begin + first), begin + last))
    except (LookupError, TypeError) as error:
        raise ValueError(f"its header is damaged: {type(error).__name__}: {error}") from error
    end = found[-1][1] if found else begin
    if end != size:
        raise ValueError(f"it has {size} bytes, its header says {end}: it was cut short, or changed")
    return [one for one, _ in found], {str(k): str(v) for k, v in dict(metadata).items()}


def _disagreements(name: str, index: Mapping[str, Any], stored: Mapping[str, Stored]) -> Iterator[str]:
    table = index["weight_map"]
    for tensor, file in table.items():
        if tensor not in stored:
            yield f"{name} says that {tensor!r} is in {file}, and it is not"
        elif stored[tensor].file != file:
            yield f"{name} says that {tensor!r} is in {file}, and it is in {stored[tensor].file}"
    yield from (
        f"{one.name!r} in {one.file} is not in {name}" for one in stored.values() if one.name not in table
    )


def _is_scaled(code: str) -> bool:
    return code.startswith(("F8_", "F6_", "F4"))


def _unreadable(one: Stored) -> str:
    why = (
        "which stands for a number only with a scale" if _is_scaled(one.code) else "which torch does not have"
    )
    return f"{one.name!r} in {one.file} is {one.code}, {why}: convert the checkpoint to bfloat16 first"
