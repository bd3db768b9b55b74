"""Two plans, one after the other, as one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..base.errors import PlanError, listed
from .bits import Bits
from .names import renamed
from .plan import Cut, Indices, Plan, Repair, Rewrite


def composed(first: Plan, second: Plan) -> Plan:
    """The plan that does what `first` and then `second` do (see `Plan.then`)."""
    if first.removals:  # the second one in the names from before those went
        moves = first.moves
        second = renamed(second, moves.old, moves.old)
    problems = _differences(first, second)
    if problems:
        raise PlanError(listed("these plans can't be composed: apply them one after the other", problems))
    plan = Plan(dict(first.cuts), dict(first.shapes), dict(first.aliases))
    *earlier, last = [*_steps(first), *_steps(second)] or [{}]
    plan.request = {**last, "earlier": earlier} if earlier else last
    added = {b.name for b in first.biases}
    for name, cut in second.cuts.items():
        if name in added:
            continue
        plan.shapes.setdefault(name, cut.shape)  # a table that only the second plan cuts
        plan.cuts[name] = _cut(first.cuts[name], cut) if name in first.cuts else cut
    plan.entries = _entries(first, second)
    plan.repairs = _repairs(first.repairs, second.repairs)
    plan.rewrites = _rewrites(first.rewrites, second.rewrites)
    plan.removals = [*first.removals, *second.removals]
    left = [b for b in first.biases if not second.moves.holds(b.weight)]
    plan.biases = [*(replace(b, shape=second.new_shape(b.name)) for b in left), *second.biases]
    return plan


def _entries(first: Plan, second: Plan) -> dict[str, Bits]:
    """Which entries stay by both plans, in the original's shape."""
    found = dict(first.entries)
    for name, bits in second.entries.items():
        mask = first.mask(name)
        cut = first.cuts.get(name)
        mask[torch.ones_like(mask) if cut is None else cut.mask()] = bits.mask().flatten()
        found[name] = Bits.of(mask & first.entries[name].mask() if name in first.entries else mask)
    return found


def joined(plans: list[Plan]) -> list[Plan]:
    """The plans, in order, with those that can be composed as one."""
    found: list[Plan] = []
    for plan in plans:
        if found and not _differences(found[-1], plan):
            found[-1] = composed(found[-1], plan)
        else:
            found.append(plan)
    return found


def _steps(plan: Plan) -> list[dict[str, Any]]:
    """What was asked for, step by step."""
    earlier = plan.request.get("earlier")
    last = {k: v for k, v in plan.request.items() if k != "earlier"}
    return [*(earlier if isinstance(earlier, list) else ()), *([last] if last else ())]


def _differences(first: Plan, second: Plan) -> list[str]:
    """Where the second plan is for another model than the first one makes."""
    problems = []
    added = {b.name: b.shape for b in first.biases}
    for name in {**first.shapes, **added, **second.shapes}:
        if first.removals and name in first.shapes and first.new_name(name) is None:
            continue
        if name in added:
            if second.shapes.get(name) != added[name]:
                problems.append(
                    f"the first plan adds {name!r} of shape {added[name]}, the second is for {second.shapes.get(name)}"
                )
            if name in second.entries:
                problems.append(f"the first plan adds {name!r}, of which the second keeps single entries")
        elif name not in second.shapes and name not in first.cuts:
            problems.append(f"{name!r} is in the first plan only")
        elif name not in first.shapes and name not in second.cuts:
            problems.append(f"{name!r} is in the second plan only")
        elif name in first.shapes and name in second.shapes:
            made, wanted = first.new_shape(name), second.shapes[name]
            if made != wanted:
                problems.append(f"the first plan gives {name!r} the shape {made}, the second is for {wanted}")
    if any(p.fusions or p.scales or p.factors for p in (first, second)):
        problems.append(
            "one of them fuses norms or makes two layers of one, whose values then are in other tensors"
        )
    ties = {n: t for n, t in first.aliases.items() if first.new_name(n) is not None}
    if ties != second.aliases:
        problems.append("the second plan ties other tensors")
    return problems


def _repairs(first: list[Repair], second: list[Repair]) -> list[Repair]:
    old = {(r.path, r.name, r.keys): r.old for r in second} | {(r.path, r.name, r.keys): r.old for r in first}
    last = {(r.path, r.name, r.keys): r.value for r in [*first, *second]}
    return [Repair(*key, value, old[key]) for key, value in last.items()]


def _rewrites(first: list[Rewrite], second: list[Rewrite]) -> list[Rewrite]:
    old = {(r.path, r.function, r.number): r.old for r in [*second, *first]}
    last = {(r.path, r.function, r.number): r.value for r in [*first, *second]}
    return [Rewrite(*key, old[key], value) for key, value in last.items()]


def _cut(first: Cut, second: Cut) -> Cut:
    keep = tuple(_within(a, b) for a, b in zip(first.keep, second.keep, strict=True))
    numbers = _within(first.numbers, second.numbers)
    if first.blocks is None and second.blocks is None:
        return Cut(first.shape, keep, None, numbers)
    height = first.shape[0]
    rows = np.arange(height) if first.keep[0] is None else first.keep[0]
    columns = _by_rows(first, rows, second)
    counts = (n for n in range(1, height + 1) if height % n == 0)  # one block for each row always fits
    blocks = next(b for n in counts if (b := _blocks(rows // (height // n), columns, n)) is not None)
    return Cut(first.shape, (keep[0], None, *keep[2:]), blocks, numbers)


def _blocks(owner: Indices, columns: list[Indices], count: int) -> list[Indices] | None:
    """The columns of each of `count` blocks, where all rows of a block (`owner`, of each row) keep the same ones."""
    found: dict[int, Indices] = {}
    for block, kept in zip(owner.tolist(), columns, strict=True):
        if not np.array_equal(found.setdefault(block, kept), kept):
            return None
    return [
        found.get(block, columns[0]) for block in range(count)
    ]  # of a block without rows anything may stay


def _by_rows(first: Cut, rows: Indices, second: Cut) -> list[Indices]:
    """For each row that the first cut keeps, the columns that both keep."""
    width = np.arange(first.shape[1]) if first.keep[1] is None else first.keep[1]
    if first.blocks is None:
        mine = [width] * len(rows)
    else:
        mine = [first.blocks[r // (first.shape[0] // len(first.blocks))] for r in rows]
    if second.blocks is None:
        return mine if second.keep[1] is None else [m[second.keep[1]] for m in mine]
    size = len(rows) // len(second.blocks)
    return [m[second.blocks[i // size]] for i, m in enumerate(mine)]


def _within(first: Indices | None, second: Indices | None) -> Indices | None:
    """The indices of what `second` keeps of what `first` keeps."""
    return second if first is None else first if second is None else first[second]
