"""The values of a model that is in files, read when they are asked for; and what was computed of them, kept beside them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..base.errors import InputError
from ..base.values import all_finite
from ..store.files import Checkpoint
from ..store.layout import Laid, Part, Span

Tensor = torch.Tensor
BLOCK = 1 << 20  # entries that are looked at together where a value that is not finite is searched for


class FromFiles:
    """A `Weights`: tensors on the meta device have their values in files, the others their own."""

    def __init__(
        self, checkpoint: Checkpoint, laid: Mapping[str, Laid], tensors: Mapping[str, Tensor], memory: Notes
    ) -> None:
        """Read from `checkpoint`, where the model's `tensors` lie as `laid` says; `memory` has what was computed before."""
        self.checkpoint, self.laid, self.tensors, self.memory = checkpoint, laid, tensors, memory
        self.room = 1 << 26
        self.check: Callable[[str], Any] = lambda name: None  # is told what is read next, and may refuse it
        self.seen: Callable[[int], Any] = lambda count: None  # is told how many bytes were read

    def whole(self, name: str) -> Tensor:
        """All values of tensor `name`."""
        self.check(name)
        return self.stored(name) if self._is_read(name) else self.tensors[name].detach()

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Some entries along dim 0; of a tensor of no dims the only one."""
        self.check(name)
        if not self._is_read(name):
            held = self.tensors[name].detach()
            return held[first:last] if held.dim() else held
        return self._assembled(self.laid[name], first, last)

    def _assembled(self, laid: Laid, first: int, last: int) -> Tensor:
        if len(laid.parts) == 1 and is_plain(laid.parts[0], laid):
            found = self.checkpoint.rows(laid.parts[0].name, first, last)
            self.seen(found.numel() * found.element_size())
            return found
        out = torch.empty(last - first, *laid.shape[1:], dtype=laid.dtype)
        for part in laid.parts:
            here = part.narrowed(0, first, last - first)
            if here is not None:
                self._put(out, here)
        return out

    def _put(self, out: Tensor, part: Part) -> None:
        """Copy what a stored tensor gives into its place in `out`."""
        shape = self.checkpoint.stored[part.name].shape
        spans = {at.source: at for at in part.dims if isinstance(at, Span)}
        fixed = dict(part.fixed)
        at = [
            spans[d].entries if d in spans else slice(i := fixed.get(d, 0), i + 1) for d in range(len(shape))
        ]
        value = self.checkpoint.rows(part.name, at[0].start if at else 0, at[0].stop if at else 1)
        self.seen(value.numel() * value.element_size())
        if at:
            value = value[(slice(None, None, at[0].step), *at[1:])]
        for d in sorted(set(range(len(shape))) - spans.keys(), reverse=True):
            value = value.squeeze(d)
        left = sorted(spans)  # the dims of the stored tensor that are left, in order
        order = [left.index(at.source) for at in part.dims if isinstance(at, Span)]
        key = tuple(slice(at.place, at.place + at.size) if isinstance(at, Span) else at for at in part.dims)
        out[key] = value.permute(order)

    def at(self, name: str, index: Tensor) -> Tensor:
        """The entries `index` [n] along dim 0."""
        if not self._is_read(name):
            return self.tensors[name].detach().index_select(0, index)
        first = self.laid[name]
        out = torch.empty(len(index), *first.shape[1:], dtype=first.dtype)
        for i, row in enumerate(index.tolist()):
            out[i] = self._assembled(first, row, row + 1)[0]
        return out

    def stored(self, name: str) -> Tensor:
        """All of a tensor as it is in the files, also of one that has values of its own."""
        laid = self.laid[name]
        return self._assembled(laid, 0, laid.shape[0] if laid.shape else 1)

    def kept(self, key: str, compute: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """What is in the notes, or else is computed now and goes into them.

        Raises:
            InputError: values are NaN or infinite: tensor, index and offset.
        """

        def computed() -> Sequence[Any]:
            found = compute()
            told = key.endswith(" finite")
            if not (bool(found[0]) if told else all(np.isfinite(v).all() for v in found)):
                where = self.not_finite(key.partition(" ")[0])
                if where:
                    raise InputError(f"NaN or infinite values: {where}: nothing was written")
            return found

        return self.memory.recalled(key, computed)

    def _is_read(self, name: str) -> bool:
        return name in self.laid and self.tensors[name].is_meta

    def not_finite(self, name: str) -> str:
        """Where the first value of tensor `name` that is NaN or infinite stands, or ""."""
        shape = self.tensors[name].shape
        rows = shape[0] if shape else 1
        step = max(1, BLOCK // max(1, self.tensors[name].numel() // max(1, rows)))
        for first in range(0, rows, step):
            block = self.rows(name, first, min(first + step, rows)).reshape(-1)
            if not all_finite(block):
                bad = (~torch.isfinite(block)).nonzero()
                at = first * (self.tensors[name].numel() // max(1, rows)) + int(bad[0])
                index = [int(i) for i in np.unravel_index(at, tuple(shape))] if shape else []
                where = ", ".join(
                    dict.fromkeys(
                        f"{p.name} in {self.checkpoint.stored[p.name].file}" for p in self.laid[name].parts
                    )
                )
                return f"{name}{index} is {float(block[int(bad[0])])}, offset {at} ({where})"
        return ""


class Unshared(Exception):
    """A criterion compares values with each other: no process can do a part of it."""


class Share:
    """A `Weights` of one of several processes: it computes what is kept of its own tensors, the others compute the rest."""

    def __init__(self, weights: FromFiles, names: Container[str]) -> None:
        """Read the tensors in `names` from `weights`."""
        self.weights, self.names, self.room = weights, names, weights.room
        self.computing = False

    def _source(self) -> FromFiles:
        if not self.computing:
            raise Unshared
        return self.weights

    def whole(self, name: str) -> Tensor:
        """As `FromFiles`, and so are the following, while something that is kept is computed."""
        return self._source().whole(name)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Likewise."""
        return self._source().rows(name, first, last)

    def at(self, name: str, index: Tensor) -> Tensor:
        """Likewise."""
        return self._source().at(name, index)

    def kept(self, key: str, compute: Callable[[], Sequence[Any]]) -> Sequence[Any] | None:
        """Of its own tensors, and what is in the notes; else None."""
        if key.partition(" ")[0] not in self.names and key not in self.weights.memory.known:
            return None
        self.computing = True
        try:
            return self.weights.kept(key, compute)
        finally:
            self.computing = False


def is_plain(part: Part, laid: Laid) -> bool:
    """Whether a part is the whole of a tensor as it is stored, so that its rows are read without a copy."""
    return part == Laid.stored(part.name, laid.shape).parts[0]


class Notes:
    """What was computed of the values in files, in a small file beside their folder: another ratio needs no second reading."""

    def __init__(self, checkpoint: Checkpoint, laid: Mapping[str, Laid]) -> None:
        """Read the notes on `checkpoint`, where there are any, and files and layout are as they were then."""
        folder = checkpoint.folder
        self.path = folder.with_name(f".{folder.name}.sums")
        state = json.dumps([str(folder), checkpoint.state(), {n: repr(one.parts) for n, one in laid.items()}])
        self.state = hashlib.sha256(state.encode()).hexdigest()
        self.known: dict[str, list[Any]] = {}
        self.fresh: set[str] = set()  # what no file has yet
        try:
            with safe_open(self.path, framework="numpy") as held:
                if (held.metadata() or {}).get("state") == self.state:
                    for key in held.keys():  # noqa: SIM118  it is no dict
                        name, _, place = key.rpartition(" ")
                        self.known.setdefault(name, []).append((int(place), held.get_tensor(key)))
        except (SafetensorError, OSError, ValueError):
            self.known = {}
        self.known = {
            n: [_wide(v) for _, v in sorted(parts, key=lambda p: p[0])] for n, parts in self.known.items()
        }

    def recalled(self, key: str, compute: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """What is known by `key`, or else what `compute` gives."""
        if key not in self.known:
            self.known[key] = [np.asarray(v) for v in compute()]
            self.fresh.add(key)
        return self.known[key]

    def news(self) -> dict[str, list[Any]]:
        """What no file has yet."""
        return {key: [_narrow(v) for v in self.known[key]] for key in self.fresh}

    def add(self, news: Mapping[str, list[Any]]) -> None:
        """Take over what another process has found."""
        self.known |= {key: [_wide(v) for v in parts] for key, parts in news.items()}
        self.fresh |= news.keys()

    def save(self) -> None:
        """Write them; a place that can't be written to is left as it is."""
        if not self.fresh:
            return
        table = {f"{key} {i}": _narrow(v) for key, parts in self.known.items() for i, v in enumerate(parts)}
        new = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            save_file(table, new, metadata={"state": self.state})
            new.replace(self.path)
        except (SafetensorError, OSError):
            Path(new).unlink(missing_ok=True)


def _narrow(value: Any) -> Any:
    """float32 where that holds the same numbers."""
    value = np.atleast_1d(np.ascontiguousarray(value))
    if value.dtype != np.float64:
        return value
    with np.errstate(over="ignore"):
        small = value.astype(np.float32)
    return small if np.array_equal(small.astype(np.float64), value) else value


def _wide(value: Any) -> Any:
    return value.astype(np.float64) if value.dtype == np.float32 else value
