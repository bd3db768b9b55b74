"""Plan <-> JSON: sets of indices written once, and read with suspicion, as the text may come from anywhere."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from ..base.errors import PlanError, listed
from .bits import Bits
from .plan import FORMAT, LEAVES, Bias, Cut, Factor, Fusion, Indices, Plan, Removal, Repair, Rewrite, Scale

LARGEST = 2**63 - 1
MOST_DIMS = 64  # of a tensor; NumPy has no more
MOST_RETURNED = 64  # entries of a tuple that a module returns


def as_data(plan: Plan) -> dict[str, Any]:
    """The plan as what JSON can hold. Cuts name their sets of indices by number, as coupled tensors share them."""
    sets: list[list[int]] = []
    numbers: dict[bytes, int] = {}

    def number(kept: Indices | None) -> int | None:
        if kept is None:
            return None
        key = np.ascontiguousarray(kept, dtype=np.int64).tobytes()
        if key not in numbers:
            numbers[key] = len(sets)
            sets.append([int(i) for i in kept])
        return numbers[key]

    cuts: dict[str, dict[str, Any]] = {}
    for name, cut in plan.cuts.items():
        cuts[name] = {"keep": [number(k) for k in cut.keep]}
        if cut.blocks is not None:
            cuts[name]["blocks"] = [number(k) for k in cut.blocks]
        if cut.numbers is not None:
            cuts[name]["numbers"] = number(cut.numbers)
    further: dict[
        str, Any
    ] = {}  # written where there are some: other plans stay as earlier versions read them
    if plan.entries:
        further["entries"] = {name: bits.to_text() for name, bits in plan.entries.items()}
    if plan.fusions:
        further["fusions"] = [[f.layer, f.norm, f.bias] for f in plan.fusions]
    if plan.scales:
        further["scales"] = [[s.scale, s.shift, list(s.layers)] for s in plan.scales]
    if plan.removals:
        further["removals"] = [
            [r.path, r.leaves, r.returns and list(r.returns), [[list(at), e] for at, e in r.entries]]
            for r in plan.removals
        ]
    if plan.factors:
        further["factors"] = [[f.layer, f.rank] for f in plan.factors]
    if plan.biases:
        further["biases"] = [[b.weight, b.parameter, list(b.shape)] for b in plan.biases]
    return {
        "format": FORMAT,
        "request": plan.request,
        "shapes": {n: list(s) for n, s in plan.shapes.items()},
        "aliases": plan.aliases,
        "sets": sets,
        "cuts": cuts,
        "repairs": [[r.path, r.name, list(r.keys), r.value, r.old] for r in plan.repairs],
        "rewrites": [[r.path, r.function, r.number, r.old, r.value] for r in plan.rewrites],
        **further,
    }  # fmt: skip


def parse(text: str) -> Any:
    """JSON text as data; a field given twice and numbers that are none are refused.

    Raises:
        PlanError: it is no JSON.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a field is given twice")
        return table

    def refused(word: str) -> Any:
        raise ValueError(f"{word} is not a number")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refused)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"this text is not a depgraph plan: {error}") from error


def from_text(text: str) -> Plan:
    """The plan in a JSON text.

    Raises:
        PlanError: the text is not a plan; everything that is wrong with it is listed.
    """
    problems: list[str] = []
    plan = read(parse(text), problems)
    if problems:
        raise PlanError(listed("this text is not a depgraph plan:", problems))
    return plan


def read(data: Any, problems: list[str]) -> Plan:
    """The plan in `data`, what `as_data` made; what is wrong is added to `problems`, and the plan is then of no use."""
    if (
        isinstance(data, dict) and data.get("format") == 2 and "request" not in data
    ):  # it called the request otherwise
        data = {"request" if k == "asked" else k: v for k, v in data.items()} | {"format": FORMAT}
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else data
        problems.append(f"plan format {_short(found)} is not supported: this version reads {FORMAT}")
        return Plan()
    known = {
        "format",
        "request",
        "shapes",
        "aliases",
        "sets",
        "cuts",
        "repairs",
        "rewrites",
        "entries",
        "fusions",
        "scales",
        "factors",
        "removals",
        "biases",
    }
    problems.extend(f"unknown field {_short(name)}" for name in data.keys() - known)
    reader = _Reader(data, problems)
    plan = Plan(request=field(data, "request", dict, problems))
    plan.shapes = reader.shapes()
    plan.aliases = reader.aliases(plan.shapes)
    sets = reader.sets()
    for name, row in field(data, "cuts", dict, problems).items():
        cut = reader.cut(name, row, plan.shapes.get(name), sets)
        if cut is not None:
            plan.cuts[name] = cut
    repairs, rewrites = (field(data, name, list, problems) for name in ("repairs", "rewrites"))
    plan.repairs = [r for row in repairs if (r := reader.repair(row)) is not None]
    plan.rewrites = [w for row in rewrites if (w := reader.rewrite(row)) is not None]
    if "entries" in data:
        for name, text in field(data, "entries", dict, problems).items():
            try:
                plan.entries[name] = Bits.from_text(plan.shapes[name], text)
            except (KeyError, ValueError) as error:
                problems.append(f"{_short(name)} has invalid entries: {error}")
    if "fusions" in data:
        rows = field(data, "fusions", list, problems)
        plan.fusions = [f for row in rows if (f := reader.fusion(row, plan.shapes)) is not None]
    if "scales" in data:
        rows = field(data, "scales", list, problems)
        plan.scales = [one for row in rows if (one := reader.scale(row, plan.shapes)) is not None]
    removals = field({"removals": [], **data}, "removals", list, problems)
    plan.removals = [gone for row in removals if (gone := reader.removal(row)) is not None]
    if "factors" in data:
        rows = field(data, "factors", list, problems)
        plan.factors = [two for row in rows if (two := reader.factor(row, plan.shapes)) is not None]
    biases = field({"biases": [], **data}, "biases", list, problems)
    plan.biases = [new for row in biases if (new := reader.bias(row, plan.shapes)) is not None]
    return plan


def field(data: dict[str, Any], name: str, kind: type, problems: list[str], of_names: bool = False) -> Any:
    """Field `name` of `data`, a dict or list (`of_names`: of texts); an empty one and a problem where it is none."""
    found = data.get(name)
    if isinstance(found, kind):
        entries: Any = found.values() if isinstance(found, dict) else found
        if not of_names or all(isinstance(v, str) for v in entries):
            return found
    what = "table" if kind is dict else "list"
    problems.append(f"field {name!r} is not a {what}{' of names' if of_names else ''}: {_short(found)}")
    return kind()


def is_whole(value: Any, low: int = 0) -> bool:
    """Whether `value` is an int (no bool) from `low` on that fits into 64 bits."""
    return type(value) is int and low <= value <= LARGEST


def are_sizes(value: Any) -> bool:
    """Whether `value` can be the shape of a tensor: a short list of sizes whose product fits into 64 bits."""
    return (
        isinstance(value, list)
        and len(value) <= MOST_DIMS
        and all(map(is_whole, value))
        and math.prod(value) <= LARGEST
    )


class _Reader:
    def __init__(self, data: dict[str, Any], problems: list[str]) -> None:
        self.data, self.problems = data, problems

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found = {}
        for name, shape in field(self.data, "shapes", dict, self.problems).items():
            if not are_sizes(shape):
                self.problems.append(f"{_short(name)} has an invalid shape: {_short(shape)}")
            else:
                found[name] = tuple(shape)
        return found

    def aliases(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
        found: dict[str, str] = field(self.data, "aliases", dict, self.problems)
        for name, first in found.items():
            if not isinstance(first, str) or first not in shapes or name in shapes:
                self.problems.append(f"{_short(name)} can't be tied to {_short(first)}")
        return found

    def sets(self) -> list[Indices]:
        found: list[Indices] = []
        for i, row in enumerate(field(self.data, "sets", list, self.problems)):
            try:
                kept = np.asarray(row)
            except (ValueError, TypeError):
                kept = np.empty(0)
            if kept.dtype != np.int64 or kept.ndim != 1 or kept.min() < 0 or len(np.unique(kept)) < len(kept):
                self.problems.append(f"set {i} is not a list of indices, each once: {_short(row)}")
                kept = np.full(1, LARGEST)
            found.append(kept)
        return found

    def cut(self, name: str, row: Any, shape: tuple[int, ...] | None, sets: list[Indices]) -> Cut | None:
        def pick(given: Any, size: int, ascending: bool = True) -> Indices:
            if not is_whole(given) or given >= len(sets) or sets[given].max() >= size:
                raise ValueError(f"{_short(given)} is not a set of indices below {size}")
            if ascending and (np.diff(sets[given]) < 0).any():
                raise ValueError(f"set {given} is not ascending")
            return sets[given]

        try:
            if shape is None:
                raise ValueError("it has no shape")
            if not isinstance(row, dict) or row.keys() - {"keep", "blocks", "numbers"}:
                raise ValueError(_short(row))
            keep = row.get("keep")
            if not isinstance(keep, list) or len(keep) != len(shape):
                raise ValueError(f"{_short(keep)} kept of {len(shape)} dims")
            pairs = zip(keep, shape, strict=True)
            blocks = row.get("blocks")
            kept = tuple(None if k is None else pick(k, n, blocks is not None) for k, n in pairs)
            if blocks is not None:
                if len(shape) < 2 or kept[1] is not None or not isinstance(blocks, list) or not blocks:
                    raise ValueError(f"blocks {_short(blocks)}")
                blocks = [pick(b, shape[1]) for b in blocks]
                if shape[0] % len(blocks) or len({len(b) for b in blocks}) > 1:
                    raise ValueError(f"{len(blocks)} blocks are not equal parts of {shape[0]}")
            numbers = row.get("numbers")
            return Cut(shape, kept, blocks, None if numbers is None else pick(numbers, LARGEST))
        except ValueError as why:
            self.problems.append(f"{_short(name)} has an invalid cut: {why}")
            return None

    def repair(self, row: Any) -> Repair | None:
        if (
            isinstance(row, list)
            and len(row) == 5
            and isinstance(row[0], str)
            and isinstance(row[1], str)
            and _is_steps(row[2])
            and is_whole(row[3], -LARGEST)
            and (row[4] is None or is_whole(row[4], -LARGEST))
        ):
            return Repair(row[0], row[1], tuple(row[2]), row[3], row[4])
        self.problems.append(f"invalid repair: {_short(row)}")
        return None

    def rewrite(self, row: Any) -> Rewrite | None:
        if (
            isinstance(row, list)
            and len(row) == 5
            and isinstance(row[0], str)
            and isinstance(row[1], str)
            and is_whole(row[2])
            and all(is_whole(n, -LARGEST) for n in row[3:])
        ):
            return Rewrite(*row)
        self.problems.append(f"invalid rewrite: {_short(row)}")
        return None

    def fusion(self, row: Any, shapes: dict[str, tuple[int, ...]]) -> Fusion | None:
        if (
            isinstance(row, list)
            and len(row) == 3
            and isinstance(row[0], str)
            and isinstance(row[1], str)
            and isinstance(row[2], bool)
            and f"{row[1]}.running_mean" in shapes
        ):
            return Fusion(*row)
        self.problems.append(f"invalid fusion: {_short(row)}")
        return None

    def scale(self, row: Any, shapes: dict[str, tuple[int, ...]]) -> Scale | None:
        if (
            isinstance(row, list)
            and len(row) == 3
            and row[0] in shapes
            and (row[1] is None or row[1] in shapes)
            and isinstance(row[2], list)
            and all(isinstance(p, str) and len(shapes.get(f"{p}.weight", ())) == 2 for p in row[2])
        ):
            return Scale(row[0], row[1], tuple(row[2]))
        self.problems.append(f"invalid scale: {_short(row)}")
        return None

    def factor(self, row: Any, shapes: dict[str, tuple[int, ...]]) -> Factor | None:
        if (
            isinstance(row, list)
            and len(row) == 2
            and isinstance(row[0], str)
            and is_whole(row[1], 1)
            and len(shapes.get(f"{row[0]}.weight", ())) > 1
        ):
            return Factor(*row)
        self.problems.append(f"invalid factor: {_short(row)}")
        return None

    def bias(self, row: Any, shapes: dict[str, tuple[int, ...]]) -> Bias | None:
        if (
            isinstance(row, list)
            and len(row) == 3
            and isinstance(row[0], str)
            and row[0] in shapes
            and isinstance(row[1], str)
            and row[1]
            and "." not in row[1]
            and are_sizes(row[2])
        ):
            return Bias(row[0], row[1], tuple(row[2]))
        self.problems.append(f"invalid bias: {_short(row)}")
        return None

    def removal(self, row: Any) -> Removal | None:
        if (
            isinstance(row, list)
            and len(row) == 4
            and isinstance(row[0], str)
            and row[0]
            and row[1] in LEAVES
            and (row[2] is None or _is_place_in_tuple(row[2]))
            and isinstance(row[3], list)
            and all(map(_is_entry, row[3]))
        ):
            returns = None if row[2] is None else (row[2][0], row[2][1])
            return Removal(row[0], row[1], returns, tuple((tuple(at), entry) for at, entry in row[3]))
        self.problems.append(f"invalid removal: {_short(row)}")
        return None


def _is_place_in_tuple(value: Any) -> bool:
    whole = isinstance(value, list) and len(value) == 2 and all(map(is_whole, value))
    return whole and value[1] < value[0] <= MOST_RETURNED


def _is_entry(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not _is_steps(value[0]) or len(value[0]) < 2:
        return False
    path, name, *_ = value[0]
    return isinstance(path, str) and isinstance(name, str) and not isinstance(value[1], (list, dict))


def _is_steps(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) or is_whole(v, -LARGEST) for v in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
