"""Rows of a long measurement, kept in a file as they come, so that an interrupted run resumes where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..base.checks import a_path
from ..base.errors import InputError
from ..base.inputs import Examples
from ..tracing.tensors import named_tensors

FORMAT = 1
PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)


class Records:
    """Rows in JSON lines: a header that says what they belong to, then one object a row, each written at once.

    Attributes:
        rows: those of earlier runs and of this one, in the order in which they came.
    """

    def __init__(self, file: str | os.PathLike[str] | None, subject: Mapping[str, Any]) -> None:
        """Open `file`, or begin it; None: rows are kept nowhere. Each entry of `subject`, what they belong to, becomes a digest.

        Raises:
            InputError: the file has rows of another subject, or is not a file of rows.
        """
        self.rows: list[dict[str, Any]] = []
        self.path = None if file is None else a_path("file", file)
        if self.path is None:
            return
        digests = {name: digest(value) for name, value in subject.items()}
        if self.path.exists() and self.path.stat().st_size:
            self.rows = _read(self.path, digests)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.path, {"depgraph_rows": FORMAT, "subject": digests})

    def add(self, row: dict[str, Any]) -> None:
        """One more row, on the disk before this returns."""
        self.rows.append(row)
        if self.path is not None:
            _append(self.path, row)


def _append(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(entry, allow_nan=False) + "\n")
        out.flush()
        os.fsync(out.fileno())


def _read(path: Path, subject: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of an earlier run; a last line that was cut short is taken off the file."""
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    found = []
    for number, line in enumerate(whole.decode("utf-8", errors="replace").splitlines(), start=1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}, line {number}: not a JSON object\n  fix: give another file") from error
    if not found or found[0].get("depgraph_rows") != FORMAT:
        raise InputError(f"{path} is not a file of such rows\n  fix: give another file")
    there = found[0]["subject"]
    other = [name for name in {**subject, **there} if subject.get(name) != there.get(name)]
    if other:
        raise InputError(
            f"the rows in {path} belong to another run: {', '.join(other)} differ\n"
            "  fix: give another file, or delete this one"
        )
    if len(whole) < len(raw):
        os.truncate(path, len(whole))
    return found[1:]


def digest(value: Any) -> str:
    """A short hash that is the same in every process: tensors and arrays by their values, functions by their name.

    Objects of other classes count with their class and with those of their attributes that are plain values: neither
    what a `DataLoader` yields nor the code of a function is looked at.
    """
    found = hashlib.blake2b(digest_size=12)
    _feed(found, value)
    return found.hexdigest()


def _feed(into: Any, value: Any) -> None:
    def mark(text: str) -> None:
        into.update(f"{len(text)} {text}".encode())

    if isinstance(value, nn.Module):
        mark(name_of(value))
        _feed(into, named_tensors(value)[0])
    elif isinstance(value, torch.Tensor):
        mark(f"{value.dtype} {tuple(value.shape)}")
        if value.layout == torch.strided and value.device.type != "meta":
            flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            into.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        mark(f"{value.dtype} {value.shape}")
        into.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    elif isinstance(value, PLAIN):
        mark(f"{type(value).__name__} {value!r}")
    elif isinstance(value, Mapping):
        mark(f"map {len(value)}")
        for key, item in value.items():
            _feed(into, key)
            _feed(into, item)
    elif isinstance(value, (list, tuple)):
        mark(f"list {len(value)}")
        for item in value:
            _feed(into, item)
    elif isinstance(value, Examples):
        _feed(into, ["examples", *value.examples, value.methods, value.outputs])
    else:
        mark(name_of(value))
        if not hasattr(value, "__qualname__"):
            plain = {k: v for k, v in getattr(value, "__dict__", {}).items() if isinstance(v, PLAIN)}
            _feed(into, dict(sorted(plain.items())))


def name_of(value: Any) -> str:
    """The full name of a function or class, or of an object's class."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
