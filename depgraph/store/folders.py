"""Folders that are replaced as a whole, and files that are opened with care."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..base.errors import StoreError

EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
HERE = -100  # AT_FDCWD
# What a disk says late, when it is asked whether it has the bytes.
LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(folder: Path, mark: str) -> Iterator[Path]:
    """A folder beside `folder`; what was written into it takes its place at the end, all of it or nothing.

    Files of others in `folder` (a tokenizer, a README) are in it already.

    Args:
        folder: where the files are to be; its parent is made if it is missing.
        mark: the file that a folder has which may be replaced.

    Raises:
        StoreError: there is something else in that place, or it can't be written to.
    """
    kept = _kept(folder, mark)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.part"
        new.mkdir()
    except OSError as error:
        raise StoreError(f"{folder} can't be written: {error}") from error
    try:
        for path in kept:
            _copy(path, new / path.name)
        yield new
        for path in new.iterdir():
            _flush(path)
        _flush(new)
        _put(new, folder)
        _flush(folder.parent)
    except OSError as error:
        raise StoreError(f"{folder} can't be written: {error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _kept(folder: Path, mark: str) -> list[Path]:
    """What is in the folder and is not ours."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise StoreError(f"{folder} exists and is not a folder")
    there = sorted(folder.iterdir()) if folder.exists() else []
    if there and not (folder / mark).is_file():
        raise StoreError(
            f"{folder} has files but no {mark}, so depgraph did not write it\n  fix: save into a new folder"
        )
    return [p for p in there if p.name != mark and not _is_weights(p.name)]


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def _copy(path: Path, to: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, to, symlinks=True)
    else:
        shutil.copy2(path, to, follow_symlinks=False)


def _flush(path: Path) -> None:
    """Have what was written on the disk before it counts; where a file system can't say so, go on.

    Raises:
        OSError: the disk has not taken it.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in LOST:
            raise


def _put(new: Path, folder: Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    if _exchange(new, folder):  # the old one is now where the new one was written, and goes
        return
    old = new.with_suffix(".old")
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders change names in one step, where the system can do that."""
    call = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    return call is not None and call(HERE, os.fsencode(a), HERE, os.fsencode(b), ctypes.c_uint(EXCHANGE)) == 0


def checked(folder: Path, name: str) -> Path:
    """The path of file `name` in `folder`.

    Raises:
        ValueError: it is missing, or no file of its own: a link may lead anywhere, a pipe may never end.
    """
    path = folder / name
    try:
        mode = path.lstat().st_mode
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} can't be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name} is {'a link' if stat.S_ISLNK(mode) else 'no file'}")
    return path
