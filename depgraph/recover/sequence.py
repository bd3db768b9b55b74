"""Reconstruction of a whole model in the order of execution, so that later layers are fitted to what earlier ones give."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from ..data.calibration import Batch
from ..data.watch import Call, Watch, prepared
from ..progress import track
from .changes import Changes
from .lockstep import Run
from .pairs import Pair
from .reconstruction import (
    COLUMNS,
    ENTRIES,
    Grams,
    Member,
    NotFinite,
    Reconstruction,
    choose,
    taken,
)
from .result import NOT_FINITE, UNREACHED, LayerRecovery, Recovery
from .solve import Sums, wide

Tensor = torch.Tensor


def held_out(count: int) -> list[bool]:
    """Which of so many batches are held out: the last fifth, at least one where there are two."""
    held = max(1, count // 5) if count > 1 else 0
    return [i >= count - held for i in range(count)]


def reconstruct(
    model: nn.Module,
    found: list[Pair],
    batches: list[Batch],
    changes: Changes,
    settings: Reconstruction,
    told: Recovery,
    runs_of: int = 1,
    progress: bool | None = None,
) -> None:
    """Solve the weights of the smaller model, layer by layer.

    Layers that are called several times in a run, and those of which the two models are given other samples (a router
    decides otherwise), are solved on the original's inputs without the removed ones: their error is that of the removal.

    Args:
        model: the original.
        found: the pairs of consumers.
        batches: calibration.
        changes: of the smaller model.
        settings: damping and the like.
        told: what was done is added here.
        runs_of: how many runs the trace holds.
        progress: as for `track`.
    """
    often = [p for p in found if len([c for c in p.dense.calls if not c.node.meta.get("training")]) > runs_of]
    from_original(model, often, batches, changes, settings, told, progress)
    once = [p for p in found if p not in often]
    rest = _in_lockstep(model, once, batches, changes, settings, told, progress)
    from_original(model, rest, batches, changes, settings, told, progress)


def _in_lockstep(
    model: nn.Module,
    found: list[Pair],
    batches: list[Batch],
    changes: Changes,
    settings: Reconstruction,
    told: Recovery,
    progress: bool | None,
) -> list[Pair]:
    """Solve each pair when all batches have come to it; the pairs whose samples do not match."""
    if not settings.everywhere:
        found = [p for p in found if p.loses]
    place = {p.small: i for i, p in enumerate(found)}
    held, grams = held_out(len(batches)), Grams()
    solved: set[int] = set()
    unmatched: list[Pair] = []
    runs: list[tuple[Run, Run]] = []
    with prepared():
        try:
            for batch in batches:
                joins = [p for p in found if p.joins and settings.streams]
                dense = Run(model, [p.dense for p in found], batch.copy(), False, [p.dense for p in joins])
                small = Run(
                    changes.model, [p.small for p in found], batch.copy(), True, [p.small for p in joins]
                )
                runs.append((dense, small))
            steps = iter(track(found, "reconstructing layers", progress))
            waiting = [run for _, run in runs if run.advance() is not None]
            while waiting and len(solved) < len(found):
                now = min(place[run.call.consumer] for run in waiting if run.call is not None)
                here = [
                    i
                    for i, (_, run) in enumerate(runs)
                    if run.call is not None and place[run.call.consumer] == now
                ]
                if now not in solved:
                    next(steps, None)
                    solved.add(now)
                    _solve(
                        found[now],
                        [(*runs[i], held[i]) for i in here],
                        changes,
                        settings,
                        told,
                        grams,
                        unmatched,
                        runs,
                    )
                for i in here:
                    runs[i][1].advance()
                waiting = [run for _, run in runs if run.call is not None]
            for _ in steps:
                pass
        finally:
            for pair in runs:
                for run in pair:
                    run.close()
    told.skipped += [(p.name, UNREACHED) for i, p in enumerate(found) if i not in solved and p.loses]
    return unmatched


def _solve(
    pair: Pair,
    here: list[tuple[Run, Run, bool]],
    changes: Changes,
    settings: Reconstruction,
    told: Recovery,
    grams: Grams,
    unmatched: list[Pair],
    runs: list[tuple[Run, Run]],
) -> None:
    members = []
    for dense, small, held in here:
        call = dense.to(pair.dense)
        if call is not None and small.call is not None:
            members.append(Member(call, small.call, held))
    if len(members) < len(here) or not all(m.matches() for m in members):
        unmatched.append(pair)
        return
    members = [m for m in members if m.small.x.numel()]
    if all(m.held for m in members):
        members = [replace(m, held=False) for m in members]
    if not members:
        return
    try:
        change, said = settings.solve(pair, members, grams)
    except NotFinite:
        told.skipped.append((pair.name, NOT_FINITE))
        return
    if said is not None:
        told.layers.append(said)
    if change is not None:
        changes.add(pair, change.weight, change.constant)
        for _, small in runs:
            changes.hand_to(small, pair)
        for _, small, _ in here:
            changes.repeat(small)


def from_original(
    model: nn.Module,
    found: Iterable[Pair],
    batches: list[Batch],
    changes: Changes,
    settings: Reconstruction,
    told: Recovery,
    progress: bool | None = None,
) -> None:
    """Solve pairs that lose inputs on the original's own inputs: what the kept ones say of the removed ones."""
    wanted = []
    for pair in found:
        if pair.loses and len(pair.stacks) * pair.columns.shape[1] ** 2 > 4 * max(COLUMNS**2, ENTRIES):
            told.skipped.append((pair.name, "is too wide to be solved from the original's inputs"))
        elif pair.loses:
            wanted.append(pair)
    while wanted:  # as many at once as memory has room for
        now: list[Pair] = []
        entries = 0
        while wanted and (
            not now or entries + wanted[0].at[:, 0].numel() * wanted[0].columns.shape[1] <= 4 * ENTRIES
        ):
            entries += wanted[0].at[:, 0].numel() * wanted[0].columns.shape[1]
            now.append(wanted.pop(0))
        _wave(model, now, batches, changes, settings, told, progress)


def _wave(
    model: nn.Module,
    found: list[Pair],
    batches: list[Batch],
    changes: Changes,
    settings: Reconstruction,
    told: Recovery,
    progress: bool | None,
) -> None:
    by_consumer = {p.dense: p for p in found}
    sums: dict[Pair, list[Sums]] = {}
    whole = {pair: [0.0, 0.0] for pair in found}  # of what is fitted, of what is held out
    held = held_out(len(batches))
    current = [False]

    def see(call: Call) -> None:
        pair = by_consumer[call.consumer]
        device = call.x.device
        if pair not in sums:
            stacks, rows, columns = pair.at.shape
            sums[pair] = [Sums.zero(stacks, columns, rows, device) for _ in range(2)]
        for part, x, missing in without_removed(call, pair):
            sums[pair][current[0]].add(part, x.to(wide(device)), missing.to(wide(device)))
        whole[pair][current[0]] += float(call.out.double().square().sum())

    watch = Watch(model, list(by_consumer), see)
    for batch, current[0] in track(list(zip(batches, held, strict=True)), "original's inputs", progress):
        watch.run(batch.copy())
    for pair in found:
        if pair not in sums:
            told.skipped.append((pair.name, UNREACHED))
            continue
        judged = bool(sums[pair][1].count.sum()) and bool(sums[pair][0].count.sum())
        fit, other = sums[pair] if judged else [sums[pair][0].plus(sums[pair][1])] * 2
        try:
            step = choose(fit, other, pair.shift is not None, settings.damping)
        except NotFinite:
            told.skipped.append((pair.name, NOT_FINITE))
            continue
        total = max(whole[pair][1] if judged else sum(whole[pair]), 1e-300)
        kept = step.change is not None
        detail = f"damping {step.change.damping:g}, from the original's inputs" if step.change else ""
        told.layers.append(
            LayerRecovery(pair.name, "reconstruction", step.before / total, step.after / total, kept, detail)
        )
        if step.change is not None:
            changes.add(pair, step.change.weight, step.change.constant)


def without_removed(call: Call, pair: Pair) -> Iterable[tuple[slice, Tensor, Tensor]]:
    """Of a call of the original: (stacks, kept inputs [stacks, n, columns], what the removed ones added [stacks, n, rows])."""
    weight = call.layout.matrices(call.weight)
    for part, _, x in call.layout.inputs(call.args, call.x, slice(None)):
        stacks = torch.arange(pair.shape[0])[part]
        mine = (pair.stacks[:, None] == stacks).nonzero()  # [n, 2]: stack of the pair, place in the piece
        if not len(mine):
            continue
        own, there = mine[:, 0], mine[:, 1]
        x = x[there.to(x.device)]
        w = weight[part][there.to(x.device)]
        gone = pair.gone[own]
        lost = taken(w, gone).gather(1, pair.rows[own].to(w.device)[:, :, None].expand(-1, -1, gone.shape[1]))
        missing = taken(x, gone) @ lost.mT
        where = slice(int(own[0]), int(own[-1]) + 1)
        yield where, taken(x, pair.columns[own]), missing
