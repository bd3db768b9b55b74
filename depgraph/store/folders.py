"""Folders that are replaced as a whole, and files that are opened with care."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..base.errors import StoreError

if sys.platform != "win32":
    import fcntl

EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
HERE = -100  # AT_FDCWD
# What a disk says late, when it is asked whether it has the bytes.
LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
LOCKLESS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # what file systems say that know no locks
LONGEST = 200  # bytes of a name that something can be appended to


@contextmanager
def replacing(folder: Path, mark: str) -> Iterator[Path]:
    """A folder beside `folder`; what was written into it takes its place at the end, all of it or nothing.

    Files of others in `folder` (a tokenizer, a README) are in it already. Of several that write to one folder each waits
    for the one before it; what killed processes have left beside it is removed. A folder that has files but not `mark` is
    a `StoreError`, as is one that can't be written to.
    """
    try:
        _check_replaceable(folder, mark)
        folder.parent.mkdir(parents=True, exist_ok=True)
        stem = f".{folder.name}"
        if len(os.fsencode(stem)) > LONGEST:
            stem = f".{hashlib.sha256(os.fsencode(stem)).hexdigest()}"
        with _alone(folder.with_name(f"{stem}.lock")) as alone:
            if alone:
                _sweep(folder, stem)
            before = _others(folder, mark)
            new = folder.with_name(f"{stem}.{uuid.uuid4().hex}.part")
            new.mkdir()
            try:
                for name in before:
                    _copy(folder / name, new / name)
                yield new
                for path in new.iterdir():
                    _flush(path)
                _flush(new)
                old = _put(new, folder)
                for name, changed in _others(old, mark).items():  # somebody wrote there meanwhile
                    if before.get(name) != changed:
                        _move(old / name, folder / name)
                _flush(folder.parent)
            finally:
                for left in (new, new.with_suffix(".old")):
                    shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise StoreError(f"{folder} can't be written: {error}") from error


@contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Wait until nobody else is in here with the same `lock`, a file; yields False where the system can't tell."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _lock(handle)
            if not locked or (lock.exists() and os.path.samestat(os.fstat(handle), lock.stat())):
                try:
                    yield locked
                finally:
                    lock.unlink(missing_ok=True)
                return
        finally:  # whoever was here before has removed the file: make another
            os.close(handle)


def _lock(handle: int) -> bool:
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in LOCKLESS:
            raise
        return False
    return True


def _sweep(folder: Path, stem: str) -> None:
    """Remove what killed processes have left beside `folder`; one that had moved it away has not come to put another there."""
    left = re.compile(re.escape(stem) + r"\.[0-9a-f]{32}\.(part|old)")
    for path in sorted(folder.parent.iterdir()):
        if left.fullmatch(path.name) and not path.is_symlink():
            if path.suffix == ".old" and not folder.exists():
                path.rename(folder)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _check_replaceable(folder: Path, mark: str) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise StoreError(f"{folder} exists and is not a folder")
    if not folder.exists():
        return
    if any(folder.iterdir()) and not (folder / mark).is_file():
        raise StoreError(
            f"{folder} has files but no {mark}, so depgraph did not write it\n  fix: save into a new folder"
        )
    here = Path.cwd()
    if any(folder.samefile(p) for p in (here, *here.parents)):
        raise StoreError(
            f"{folder} is replaced as a whole, and the working directory of this process is in it\n"
            "  fix: save into a folder below it, or beside it"
        )


def _others(folder: Path, mark: str) -> dict[str, tuple[int, int, int]]:
    """The names of what is in a folder and is not ours, with what tells whether it changes."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if path.name != mark and not _is_weights(path.name):
            state = path.lstat()
            found[path.name] = state.st_ino, state.st_size, state.st_mtime_ns
    return found


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def _copy(path: Path, to: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, to, symlinks=True)
    else:
        shutil.copy2(path, to, follow_symlinks=False)


def _flush(path: Path) -> None:
    """Have what was written on the disk before it counts; where a file system can't promise that, continue."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in LOST:
            raise


def _put(new: Path, folder: Path) -> Path:
    """Let `new` be `folder`; where the one that was there is now."""
    if not folder.exists():
        new.rename(folder)
        return new
    if _exchange(new, folder):
        return new
    old = new.with_suffix(".old")
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    return old


def _move(path: Path, to: Path) -> None:
    if to.is_dir() and not to.is_symlink():
        shutil.rmtree(to)
    path.replace(to)


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders change names in one step, where the system can do that."""
    call = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    return call is not None and call(HERE, os.fsencode(a), HERE, os.fsencode(b), ctypes.c_uint(EXCHANGE)) == 0


def checked(folder: Path, name: str) -> Path:
    """The path of file `name` in `folder`; a link, which may lead anywhere, or a pipe, which may never end, is a ValueError."""
    path = folder / name
    try:
        mode = path.lstat().st_mode
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} can't be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name} is {'a link' if stat.S_ISLNK(mode) else 'no file'}")
    return path
