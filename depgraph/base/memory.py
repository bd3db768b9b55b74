"""The memory of this process."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path


def trim() -> None:
    """Let the allocator return what is free to the system, where it can be told.

    It keeps what each thread has freed for that thread, so many that work in turns hold several times what they use.
    """
    found = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if found is not None:
        found(0)


def held() -> int:
    """Bytes that this process has resident now; 0 where the system does not say it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, LookupError, AttributeError):
        return 0
