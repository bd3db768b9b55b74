"""The command line: arguments in, calls of the library out."""

from __future__ import annotations

from .main import main

__all__ = ["main"]
