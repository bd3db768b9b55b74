"""plan.json: what made the model, and what its tensors are. It is written here and read with suspicion."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..base.checks import is_number
from ..base.errors import PlanError, StoreError, listed
from ..plan.plan import Plan
from ..plan.plan_json import are_sizes, as_data, field, is_whole, parse, read
from .folders import checked
from .weights import DTYPES, FILE, NAMES, Entry, differences, is_dense

FILE_NAME = "plan.json"
FORMAT = 1
MOST_BYTES = 1 << 28  # of plan.json
FIELDS = {"format", "provenance", "plans", "tensors", "ties", "views", "held", "frozen", "training",
          "extra_state", "config", "sizes"}  # fmt: skip
UNWRITABLE = "$float"  # the key beside which a float stands in words
FLOATS = {str(value): value for value in (math.inf, -math.inf, math.nan)}


@dataclasses.dataclass
class Size:
    """A size of a model that has several.

    Attributes:
        size: which share of the whole it is.
        plan: from the whole, which the folder has, to it.
        crc32: name -> the checksum of what the size has of that tensor.
        own: name of a buffer that differs from the whole's -> the name that it has in `Document.tensors`.
    """

    size: float
    plan: Plan
    crc32: dict[str, int]
    own: dict[str, str]


@dataclasses.dataclass
class Document:
    """What plan.json says.

    Attributes:
        provenance: who made it, when and of what; for the reader only.
        config: what the model was built from, where that can be written out, as it was before anything was removed.
        plans: what made the model, in the order in which it is applied.
        tensors: name -> `Entry`, for parameters, buffers and attribute tensors; tied ones once.
        ties: further name of a tied tensor -> its name in `tensors`.
        views: name of a tensor that is an object of its own with the memory of another one -> the name of that.
        attribute_tensors: name of a tensor in a plain attribute -> (module path, keys from its attributes on), the places.
        frozen: parameters that do not require grad.
        training: module paths that are in train mode where the model is in eval mode, or the other way round; the
            model itself is "".
        extra_state: module path -> what its `get_extra_state` returns.
        sizes: the smaller sizes, where the model has several.
    """

    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] | None = None
    plans: list[Plan] = dataclasses.field(default_factory=list)
    tensors: dict[str, Entry] = dataclasses.field(default_factory=dict)
    ties: dict[str, str] = dataclasses.field(default_factory=dict)
    views: dict[str, str] = dataclasses.field(default_factory=dict)
    attribute_tensors: dict[str, list[tuple[str, tuple[int | str, ...]]]] = dataclasses.field(
        default_factory=dict
    )
    frozen: list[str] = dataclasses.field(default_factory=list)
    training: list[str] = dataclasses.field(default_factory=list)
    extra_state: dict[str, Any] = dataclasses.field(default_factory=dict)
    sizes: list[Size] = dataclasses.field(default_factory=list)

    def whole(self) -> Document:
        """The same without what sizes have of their own."""
        own = {stored for size in self.sizes for stored in size.own.values()}
        return dataclasses.replace(self, tensors={n: e for n, e in self.tensors.items() if n not in own})

    def at(self, size: float) -> Document:
        """What a folder of that size alone would say; its tensors are parts of those in the files."""
        found = next(s for s in self.sizes if s.size == size)
        moves, whole = found.plan.moves, self.whole().tensors
        tensors = {
            moves.new(name): dataclasses.replace(self.tensors[found.own[name]], name=found.own[name])
            if name in found.own
            else dataclasses.replace(entry.part(found.plan.cuts.get(name), found.crc32[name]), name=name)
            for name, entry in whole.items()
            if not moves.holds(name)
        }

        def left(names: Iterable[str]) -> list[str]:
            """The new names of those that do not go."""
            return [moves.new(n) for n in names if not moves.holds(n)]

        def pairs(table: dict[str, str]) -> dict[str, str]:
            return {moves.new(n): moves.new(first) for n, first in table.items() if not moves.holds(n)}

        held = {
            moves.new(n): [(moves.new(path), keys) for path, keys in places]
            for n, places in self.attribute_tensors.items()
            if not moves.holds(n)
        }
        return dataclasses.replace(
            self, tensors=tensors, plans=[*self.plans, found.plan], ties=pairs(self.ties), views=pairs(self.views),
            attribute_tensors=held, frozen=left(self.frozen), training=left(self.training),
            extra_state={moves.new(p): s for p, s in self.extra_state.items() if not moves.holds(p)},
        )  # fmt: skip

    def files(self) -> list[str]:
        """The weight files, each once."""
        return list(dict.fromkeys(entry.file for entry in self.tensors.values()))

    def to_text(self) -> str:
        """The text of plan.json; its first line has the checksum of the others."""
        data = {"format": FORMAT, **vars(self)}
        data["plans"] = [as_data(plan) for plan in self.plans]
        data["tensors"] = {name: _row(entry) for name, entry in self.tensors.items()}
        data["held"] = data.pop("attribute_tensors")
        data["sizes"] = [vars(size) | {"plan": as_data(size.plan)} for size in self.sizes]
        if not self.sizes:
            del data["sizes"]
        rest = json.dumps(data, allow_nan=False)[1:]
        return f"{_first_line(rest)}\n{rest}\n"


def in_words(value: Any) -> Any:
    """`value` with floats for which JSON has no number, such as infinity, as ``{"$float": "inf"}``."""
    if isinstance(value, float) and not math.isfinite(value):
        return {UNWRITABLE: str(value)}
    if isinstance(value, dict):
        return {k: in_words(v) for k, v in value.items()}
    return [in_words(v) for v in value] if isinstance(value, (list, tuple)) else value


def from_words(value: Any) -> Any:
    """What `in_words` was given, tuples as lists."""
    if isinstance(value, dict):
        for word, number in FLOATS.items():
            if value == {UNWRITABLE: word}:
                return number
        return {k: from_words(v) for k, v in value.items()}
    return [from_words(v) for v in value] if isinstance(value, list) else value


def _first_line(rest: str) -> str:
    return f'{{"sha256": "{hashlib.sha256(rest.strip().encode()).hexdigest()}",'


def _row(entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {
        "dtype": NAMES[entry.dtype],
        "shape": list(entry.shape),
        "file": entry.file,
        "crc32": entry.crc32,
    }
    return row if entry.stride is None else {**row, "stride": list(entry.stride)}


def open_folder(folder: Path) -> Document:
    """What the folder says of itself, held against the files in it, no weights read; a `StoreError` lists what is wrong."""
    title = f"{folder} can't be loaded:"
    try:
        path = checked(folder, FILE_NAME)
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{FILE_NAME} has {path.stat().st_size:,} bytes, too large for a plan")
        text = path.read_bytes().decode("utf-8")
        first, _, rest = text.partition("\n")
        data = parse(text)
    except (OSError, ValueError, PlanError) as error:
        raise StoreError(listed(title, [str(error)])) from error
    problems: list[str] = []
    if first != _first_line(rest):
        problems.append(f"{FILE_NAME} was changed after it was written: checksum mismatch")
    document = _document(data, problems)
    problems += differences(folder, document.tensors, document.files())
    if problems:
        raise StoreError(listed(title, problems))
    return document


def _document(data: Any, problems: list[str]) -> Document:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else None
        problems.append(f"{FILE_NAME} has format {found!r:.40}, this version reads {FORMAT}")
        return Document()
    problems.extend(f"{FILE_NAME} has an unknown field {n!r:.60}" for n in data.keys() - FIELDS - {"sha256"})
    document = Document(
        provenance=field(data, "provenance", dict, problems),
        config=None if data.get("config") is None else field(data, "config", dict, problems),
        plans=[read(plan, problems) for plan in field(data, "plans", list, problems)],
        ties=field(data, "ties", dict, problems, of_names=True),
        views=field(data, "views", dict, problems, of_names=True),
        frozen=field(data, "frozen", list, problems, of_names=True),
        training=field(data, "training", list, problems, of_names=True),
        extra_state=field(data, "extra_state", dict, problems),
    )
    for name, row in field(data, "tensors", dict, problems).items():
        entry = _entry(row)
        if entry is None:
            problems.append(f"{FILE_NAME}: {name!r:.60} has an invalid description, {row!r:.80}")
        else:
            document.tensors[name] = entry
    for row in field(data, "sizes", list, problems) if "sizes" in data else ():
        size = _size(row, document, problems)
        document.sizes += [] if size is None else [size]
        if size is None:
            problems.append(f"{FILE_NAME} has an invalid size, {row!r:.80}")
    whole = document.whole().tensors
    problems += [
        f"{FILE_NAME}: size {size.size:g} is not one of its tensors"
        for size in document.sizes
        if not _fits(size, document, whole)
    ]
    for name, places in field(data, "held", dict, problems).items():
        if name in document.tensors and _are_places(places):
            document.attribute_tensors[name] = [(path, tuple(keys)) for path, keys in places]
        else:
            problems.append(f"{FILE_NAME}: {name!r:.60} can't be held at {places!r:.80}")
    for what, table in (("tied to", document.ties), ("a view of", document.views)):
        problems += [
            f"{FILE_NAME}: {name!r:.60} can't be {what} {first!r:.60}"
            for name, first in table.items()
            if first not in document.tensors or name in document.tensors
        ]
    return document


def _size(row: Any, document: Document, problems: list[str]) -> Size | None:
    if not isinstance(row, dict) or row.keys() != {"size", "plan", "crc32", "own"}:
        return None
    size, sums, own = row["size"], row["crc32"], row["own"]
    if not (is_number(size) and 0 < size < 1 and isinstance(sums, dict) and isinstance(own, dict)):
        return None
    stored = [v for v in own.values() if isinstance(v, str) and v in document.tensors]
    if len(stored) < len(own) or not all(map(is_whole, sums.values())):
        return None
    return Size(float(size), read(row["plan"], problems), sums, own)


def _fits(size: Size, document: Document, whole: dict[str, Entry]) -> bool:
    """Whether each tensor of `whole` is known in that size."""
    moves = size.plan.moves
    cuts = [(whole[n], cut) for n, cut in size.plan.cuts.items() if n in whole]
    own = [
        (size.plan.new_shape(n), document.tensors[stored])
        for n, stored in size.own.items()
        if n in size.plan.shapes
    ]
    return (
        all(entry.shape == cut.shape for entry, cut in cuts)
        and all(shape == entry.shape for shape, entry in own)
        and len(own) == len(size.own)
        and {n for n in whole if not moves.holds(n)} <= size.crc32.keys() | size.own.keys()
    )


def _are_places(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, list)
        and len(v) == 2
        and isinstance(v[0], str)
        and isinstance(v[1], list)
        and v[1]
        and isinstance(v[1][0], str)
        and all(isinstance(k, str) or is_whole(k) for k in v[1])
        for v in value
    )


def _entry(row: Any) -> Entry | None:
    if (
        not isinstance(row, dict)
        or row.keys() - {"stride"} != {"dtype", "shape", "file", "crc32"}
        or not isinstance(row["dtype"], str)
        or row["dtype"] not in DTYPES
        or not are_sizes(row["shape"])
        or not isinstance(row["file"], str)
        or not FILE.fullmatch(row["file"])
        or not is_whole(row["crc32"])
    ):
        return None
    stride = row.get("stride")
    shape = tuple(row["shape"])
    if stride is not None and not (
        are_sizes(stride) and len(stride) == len(shape) and is_dense(shape, tuple(stride))
    ):
        return None
    return Entry(
        DTYPES[row["dtype"]], shape, row["file"], row["crc32"], None if stride is None else tuple(stride)
    )
