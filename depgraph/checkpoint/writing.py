"""Writing safetensors files as a stream: the header first, which a plan knows, then tensor by tensor, block by block.

A thread writes one block while the next one is read and cut.

A folder is written under another name and gets its own at the end; so does each file in it. A journal says which tensors
of a file are on the disk, so that a run that was killed continues where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..base.errors import InputError, StoreError
from ..base.processes import Processes
from ..plan.plan import Cut
from ..store.weights import CODES, DTYPES

if sys.platform != "win32":
    import fcntl

Tensor = torch.Tensor
BLOCK = 1 << 24  # bytes of the original that are cut at a time
SYNC = 1 << 28  # bytes after which what was written is made to last, and noted
JOURNAL = "journal.jsonl"
PARTIAL = ".partial"
# The order in which safetensors writes types: descending.
ORDER = (
    "BOOL",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "F64",
    "I64",
    "U64",
)


@dataclass
class Written:
    """A tensor that a file will have.

    Attributes:
        name: its name there.
        code: its type, as safetensors names it.
        shape: its shape.
        blocks: gives its values in the order of memory, in tensors, each valid until the next one.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def bytes(self) -> int:
        """Its bytes."""
        return prod(self.shape) * DTYPES[CODES[self.code]].itemsize


def header_of(tensors: Sequence[Written], metadata: Mapping[str, str]) -> tuple[list[Written], bytes]:
    """The tensors in the order in which safetensors writes them, and the header that it writes."""
    ordered = sorted(tensors, key=lambda t: (-ORDER.index(t.code), t.name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for one in ordered:
        entries[one.name] = {
            "dtype": one.code,
            "shape": list(one.shape),
            "data_offsets": [begin, begin + one.bytes],
        }
        begin += one.bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return ordered, len(text).to_bytes(8, "little") + text


def cut_blocks(
    rows: Callable[[int, int], Tensor],
    whole: Callable[[], Tensor],
    shape: Sequence[int],
    size: int,
    cut: Cut | None,
) -> Iterator[Tensor]:
    """What `cut` leaves of a tensor of `shape`, whose entries have `size` bytes, block by block."""
    if not shape or (cut is not None and (cut.blocks is not None or cut.numbers is not None)):
        yield whole() if cut is None else cut.slice(whole())
        return
    step = max(1, BLOCK // max(1, prod(shape[1:]) * size))
    kept = None if cut is None else cut.keep[0]
    others = (
        []
        if cut is None
        else [(d, torch.from_numpy(k)) for d, k in enumerate(cut.keep) if d and k is not None]
    )
    for first in range(0, shape[0], step):
        last = min(first + step, shape[0])
        if kept is not None:
            a, b = np.searchsorted(kept, (first, last))
            if a == b:
                continue
            last = int(kept[b - 1]) + 1
            begin = int(kept[a])
            block = rows(begin, last)
            if b - a < last - begin:
                block = block.index_select(0, torch.from_numpy(kept[a:b] - begin))
        else:
            block = rows(first, last)
        for d, index in others:
            block = block.index_select(d, index)
        yield block


@dataclass
class Folder:
    """A folder that is being written.

    Attributes:
        out: where it will be.
        work: where it is meanwhile.
        done: file -> name of a tensor in it -> the checksum of its bytes; of those that are on the disk.
        journal: the name of the file in it that says what is done.
    """

    out: Path
    work: Path
    done: dict[str, dict[str, int]] = field(default_factory=dict)
    journal: str = JOURNAL

    def write(
        self, file: str, tensors: Sequence[Written], metadata: Mapping[str, str], seen: Callable[[int], Any]
    ) -> dict[str, int]:
        """Write one file, or what is missing of it; name of each tensor -> the checksum of its bytes."""
        ordered, header = header_of(tensors, metadata)
        target, partial = self.work / file, self.work / (file + PARTIAL)
        known = self.done.setdefault(file, {})
        if target.exists() and known.keys() == {t.name for t in tensors}:
            return known
        here = 0
        ends = len(header)
        size = partial.stat().st_size if partial.exists() else 0
        for one in ordered:
            if one.name not in known or ends + one.bytes > size:
                break
            ends += one.bytes
            here += 1
        for one in ordered[here:]:
            known.pop(one.name, None)
        with (
            partial.open("r+b" if size else "w+b", buffering=0) as stream,
            _alone(partial),
            ThreadPoolExecutor(1) as thread,
        ):
            if not here:
                _put(stream.fileno(), header)
            stream.truncate(ends if here else len(header))
            stream.seek(0, os.SEEK_END)
            behind = _Behind(thread)
            fresh: dict[str, int] = {}
            waiting = 0
            for one in ordered[here:]:
                _stream(stream.fileno(), one, fresh, behind, seen)
                waiting += one.bytes
                if waiting >= SYNC:
                    behind.do(self._note, stream.fileno(), file, fresh)
                    fresh, waiting = {}, 0
            behind.do(self._note, stream.fileno(), file, fresh)
            behind.wait()
        partial.replace(target)
        return known

    def _note(self, handle: int, file: str, fresh: Mapping[str, int]) -> None:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):  # what is on the disk takes no memory from what is read
            with suppress(OSError):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        if fresh:
            with (self.work / self.journal).open("a", encoding="utf-8") as journal:
                journal.write(json.dumps({"file": file, "tensors": fresh}) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
            self.done[file].update(fresh)

    def finish(self) -> None:
        """Give the folder its name."""
        for journal in self.work.glob(f"{JOURNAL}*"):
            journal.unlink()
        if self.out.exists():
            self.out.rmdir()  # it was empty
        self.work.rename(self.out)
        _last(self.out.parent)


class _Behind:
    """What a thread does, one thing behind the other; who gives it the next waits for the last."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self.thread = thread
        self.last: Future[None] | None = None
        self.rooms = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)

    def do(self, task: Callable[..., None], *given: Any) -> None:
        """Have `task` done, when what was given before is; what that raised is raised."""
        self.wait()
        self.last = self.thread.submit(task, *given)

    def wait(self) -> None:
        """Until all is done."""
        if self.last is not None:
            self.last.result()

    def octets(self, block: Tensor) -> Any:
        """A copy of the bytes of `block`, in the order of its entries, until the next but one."""
        if len(self.rooms[0]) < block.nbytes:
            self.rooms = torch.empty(block.nbytes, dtype=torch.uint8), self.rooms[1]
        room = self.rooms[0][: block.nbytes]
        room.view(block.dtype).view(block.shape).copy_(block)
        self.rooms = self.rooms[1], self.rooms[0]
        return room.numpy()


def _stream(
    handle: int, one: Written, sums: dict[str, int], behind: _Behind, seen: Callable[[int], Any]
) -> None:
    """Have a tensor written, and the checksum of its bytes in `sums`."""
    sums[one.name] = count = 0
    for block in one.blocks():
        octets = behind.octets(block)
        behind.do(_append, handle, octets, one.name, sums)
        count += len(octets)
        seen(len(octets))
    if count != one.bytes:
        raise StoreError(f"{one.name!r} has {count} bytes, {one.bytes} were planned")


def _append(handle: int, octets: Any, name: str, sums: dict[str, int]) -> None:
    sums[name] = zlib.crc32(octets, sums[name])
    _put(handle, octets)


def _put(handle: int, octets: Any) -> None:
    left = memoryview(octets)
    while left:
        left = left[os.write(handle, left) :]


def _last(path: Path) -> None:
    """Have the names in a folder on the disk; where a file system can't promise that, continue."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def check_out(out: Path, source: Path) -> None:
    """`out` must be new, or an empty folder, and not in the source.

    Raises:
        InputError: it is not.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists: give a new folder, or remove it")
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise InputError(f"out={out} lies in the checkpoint that is pruned: give a folder elsewhere")


@contextmanager
def folder_for(out: Path, fingerprint: str, size: int, ranks: Processes) -> Iterator[Folder]:
    """The folder in which `out` is written; one that a killed run with the same `fingerprint` left is continued.

    Of several processes the first makes it, and looks at what is in it; each has a journal of its own.

    Args:
        out: where it will be.
        fingerprint: tells what is written, and of what.
        size: bytes that it will have.
        ranks: the processes that write it.

    Raises:
        InputError: another run writes there, or the disk has not enough space, or is not the same for all processes.
        StoreError: it can't be written; what was written is kept for the next run.
    """
    work = out.with_name(out.name + PARTIAL)
    done: dict[str, dict[str, int]]
    try:
        if ranks.rank:
            fingerprint, done = ranks.of_first(None)
            if not _is_of(work / JOURNAL, fingerprint):
                raise InputError(f"{out} must be on a disk that all processes share: there is no {work} here")
            own = Folder(out, work, done, f"{JOURNAL}.{ranks.rank}")
            (work / own.journal).write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
            yield own
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(exist_ok=True)
        with _alone(work):
            done = _journals(work, fingerprint)
            there = sum(p.stat().st_size for p in work.iterdir() if p.is_file())
            free = shutil.disk_usage(work).free
            if size - there > free:
                raise InputError(
                    f"{out} needs {(size - there) / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB left: nothing was written"
                )
            ranks.of_first((fingerprint, done))
            yield Folder(out, work, done)
    except OSError as error:
        raise StoreError(
            f"{out} can't be written: {error}\n  what was written is in {work}: the same call continues there"
        ) from error


@contextmanager
def scratch_for(out: Path) -> Iterator[Path]:
    """A folder beside `out` for what is put aside meanwhile; it is gone at the end.

    Raises:
        StoreError: it can't be made.
    """
    folder = out.with_name(f".{out.name}.aside")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder} can't be made: {error}") from error
    with _alone(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    handle = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process is writing {work}") from error
        yield
    finally:
        os.close(handle)


def _is_of(journal: Path, fingerprint: str) -> bool:
    """Whether a journal is about what has this fingerprint."""
    try:
        with journal.open(encoding="utf-8") as lines:
            return bool(json.loads(next(lines))["fingerprint"] == fingerprint)
    except (OSError, ValueError, LookupError, TypeError, StopIteration):
        return False


def _journals(work: Path, fingerprint: str) -> dict[str, dict[str, int]]:
    """What is on the disk already, now in one journal; all of it is removed where it is of something else."""
    old = [path for path in sorted(work.glob(f"{JOURNAL}*")) if _is_of(path, fingerprint)]
    done: dict[str, dict[str, int]] = {}
    for path in old:
        whole = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last one may have been cut short
        for line in whole[1:]:
            try:
                entry = json.loads(line)
                done.setdefault(entry["file"], {}).update(entry["tensors"])
            except (ValueError, LookupError, TypeError):
                break
    if not old:
        for left in work.iterdir():
            if left.is_file():
                left.unlink()
    entries = [{"fingerprint": fingerprint}, *({"file": f, "tensors": t} for f, t in done.items())]
    new = work / (JOURNAL + PARTIAL)
    new.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    new.replace(work / JOURNAL)
    for path in old:
        if path.name != JOURNAL:
            path.unlink(missing_ok=True)
    return done
