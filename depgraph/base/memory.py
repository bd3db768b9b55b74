"""The memory of this process."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LARGE = 1 << 21  # bytes of a block that goes back at once
LARGEST = 1 << 25  # bytes up to which glibc comes to keep blocks by itself
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def trim() -> None:
    """Let the allocator return what is free to the system, where it can be told.

    It keeps what each thread has freed for that thread, so many that work in turns hold several times what they use.
    """
    _told("malloc_trim", 0)


@contextmanager
def returned_at_once() -> Iterator[None]:
    """Blocks of two megabytes and more go back to the system when they are freed, where it can be told.

    Otherwise the allocator comes to keep those of up to 32 megabytes, and what is small and lasts settles between them, so that the
    process holds more and more. Afterwards it keeps them.
    """
    threshold = -3  # M_MMAP_THRESHOLD of glibc
    _told("mallopt", threshold, LARGE)
    try:
        yield
    finally:
        _told("mallopt", threshold, LARGEST)


def _told(name: str, *values: int) -> None:
    found = getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
    if found is not None:
        found(*values)


def held() -> int:
    """Bytes that this process has resident now; 0 where the system does not say it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, LookupError, AttributeError):
        return 0


def available() -> int | None:
    """Bytes that this process may take beside what it has, of the machine and of its container; None where the system does not say it."""
    found = []
    with suppress(OSError, ValueError, LookupError):
        said = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(1024 * int(said["MemAvailable"].split()[0]))
    for path in LIMITS:
        with suppress(OSError, ValueError):  # there is none, or it is "max"
            found.append(max(0, int(Path(path).read_text()) - held()))
    return min(found, default=None)
