"""Reconstruction of a whole model in the order of execution, so that later layers are fitted to what earlier ones give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import accumulate

import torch

from ..base.memory import held, trim
from ..base.progress import track
from ..data.aside import Waiting
from ..data.watch import Call, Watch, prepared
from ..tracing.recorder import record_of
from .lockstep import Run
from .pairs import Pair
from .reconstruction import COLUMNS, ENTRIES, Grams, Member, NotFinite, Reconstruction, choose, taken
from .result import NOT_FINITE, UNREACHED, LayerRecovery
from .solve import Sums, summed_in
from .task import Task

Tensor = torch.Tensor
UNUSED = 1 << 28  # bytes by which the process may grow before what is free is given back


def reconstruct(task: Task, found: list[Pair], settings: Reconstruction, runs_of: int = 1) -> None:
    """Solve the weights of the smaller model, layer by layer.

    Layers that are called several times in a run, those inside a recurrent layer, and those of which the two models are given other
    samples (a router decides otherwise), are solved on the original's inputs without the removed ones: their error is that of the removal.
    `runs_of` is how many runs the trace of the smaller model holds (that of the original may hold more: tests in forward
    that came out the other way).
    """
    often = [
        p
        for p in found
        if p.inside or len([c for c in p.small.calls if not record_of(c.node).training]) > runs_of
    ]
    from_original(task, often, settings)
    once = [p for p in found if p not in often and (settings.everywhere or p.loses)]
    steps = _Lockstep(task, once, settings)
    steps.solve()
    from_original(task, steps.unmatched, settings)


class _Lockstep:
    """All batches side by side through both models: each pair is solved when all of them have come to it."""

    def __init__(self, task: Task, found: list[Pair], settings: Reconstruction) -> None:
        self.task, self.found, self.settings, self.grams = task, found, settings, Grams()
        self.runs: list[tuple[Run, Run]] = []  # of the original and of the smaller model, for each batch
        self.solved: set[int] = set()  # places of the pairs that were come to
        self.unmatched: list[Pair] = []  # their samples do not match
        self.held = held()  # bytes, when memory was last tidied

    def solve(self) -> None:
        """Run, and solve each pair on the way."""
        recovery = self.task.recovery
        with (
            prepared(),
            self.task.waiting() as room,
            closing(track(self.found, "reconstructing layers", self.task.progress)) as steps,
        ):
            try:
                self._start(room)
                waiting = [run for _, run in self.runs if run.advance() is not None]
                while waiting and len(self.solved) < len(self.found):
                    self._next(waiting, steps)
                    waiting = [run for _, run in self.runs if run.call is not None]
                for _ in steps:
                    pass
            finally:
                for pair in self.runs:
                    for run in pair:
                        run.close()
                self.runs = []
        missed = [p for i, p in enumerate(self.found) if i not in self.solved and p.loses]
        recovery.skipped += [(p.name, UNREACHED) for p in missed]

    def _start(self, waiting: Waiting | None) -> None:
        dense, small = [p.dense for p in self.found], [p.small for p in self.found]
        joins = [p for p in self.found if p.joins and self.settings.streams]
        for batch in self.task.batches:
            first = Run(self.task.model, dense, batch.copy(), False, [p.dense for p in joins], waiting)
            second = Run(
                self.task.changes.model, small, batch.copy(), True, [p.small for p in joins], waiting
            )
            self.runs.append((first, second))

    def _next(self, waiting: list[Run], steps: Iterator[Pair]) -> None:
        """Solve the first pair that some runs wait at, and let them continue."""
        place = {p.small: i for i, p in enumerate(self.found)}
        now = min(place[run.call.consumer] for run in waiting if run.call is not None)
        calls = [run.call for _, run in self.runs]
        here = [i for i, call in enumerate(calls) if call is not None and place[call.consumer] == now]
        if now not in self.solved:
            next(steps, None)
            self.solved.add(now)
            self._tidy()
            self._solve(self.found[now], here)
            self._tidy()
        for i in here:
            self.runs[i][1].advance()

    def _tidy(self) -> None:
        """Give back what the runs have freed, each in a thread of its own, where that may be much."""
        if held() - self.held > UNUSED:
            trim()
            self.held = held()

    def _solve(self, pair: Pair, here: list[int]) -> None:
        """Solve a pair that the runs `here` wait at."""
        members = []
        for i in here:
            dense, small = self.runs[i]
            call = dense.to(pair.dense)
            if call is not None and small.call is not None:
                members.append(Member(call, small.call, self.task.held_out[i], (dense, small)))
        if len(members) < len(here) or not all(m.matches() for m in members):
            self.unmatched.append(pair)
            return
        members = [m for m in members if m.small.x.numel()]
        if all(m.held_out for m in members):
            members = [replace(m, held_out=False) for m in members]
        if not members:
            return
        try:
            change, said = self.settings.solve(pair, members, self.grams)
        except NotFinite:
            self.task.recovery.skipped.append((pair.name, NOT_FINITE))
            return
        if said is not None:
            self.task.recovery.layers.append(said)
        if change is not None:
            self.task.changes.add(pair, change.weight, change.constant)
            for i, (_, small) in enumerate(self.runs):
                with small.there(changed=True):
                    self.task.changes.hand_to(small, pair)
                    if i in here:
                        self.task.changes.repeat(small)


def from_original(task: Task, found: Iterable[Pair], settings: Reconstruction) -> None:
    """Solve pairs that lose inputs on the original's own inputs: what the kept ones say of the removed ones."""
    wanted = []
    for pair in found:
        if pair.loses and len(pair.stacks) * pair.columns.shape[1] ** 2 > 4 * max(COLUMNS**2, ENTRIES):
            task.recovery.skipped.append((pair.name, "is too wide to be solved from the original's inputs"))
        elif pair.loses:
            wanted.append(pair)
    while wanted:  # as many at once as memory has room for
        grams = accumulate(p.columns.numel() * p.columns.shape[1] for p in wanted)
        count = max(1, sum(entries <= 4 * ENTRIES for entries in grams))
        _solve_at_once(task, wanted[:count], settings)
        wanted = wanted[count:]


def _solve_at_once(task: Task, found: list[Pair], settings: Reconstruction) -> None:
    for pair, fit, held_out, whole in sums_of_removed(task, found, "original's inputs"):
        try:
            step = choose(fit, held_out, pair.shift is not None, settings.damping)
        except NotFinite:
            task.recovery.skipped.append((pair.name, NOT_FINITE))
            continue
        before, after = step.before / whole, step.after / whole
        kept = step.change is not None
        detail = f"damping {step.change.damping:g}, from the original's inputs" if step.change else ""
        task.recovery.layers.append(LayerRecovery(pair.name, "reconstruction", before, after, kept, detail))
        if step.change is not None:
            task.changes.add(pair, step.change.weight, step.change.constant)


def sums_of_removed(
    task: Task, found: list[Pair], text: str, *, kept: bool = True
) -> Iterator[tuple[Pair, Sums, Sums, float]]:
    """Sums of what the removed inputs of each pair added in the original, by the kept ones (or with `kept` False by none).

    Yields:
        a pair, its sums to fit, its sums to judge by (all of both where either has none), and the squares of the
        results there. Pairs that no batch reached are noted in the task.
    """
    sizes = {p: (p.sizes[0], p.sizes[2] if kept else 0, p.sizes[1]) for p in found}
    sums = {
        p: [Sums.zero(*n, task.changes.tensors[p.name].device) for _ in range(2)] for p, n in sizes.items()
    }
    squares = {p: [0.0, 0.0] for p in found}
    by_consumer = {p.dense: p for p in found}
    held_now = False

    def see(call: Call) -> None:
        pair = by_consumer[call.consumer]
        mine = sums[pair][held_now]
        for part, x, missing in _without_removed(call, pair):
            mine.add(part, summed_in(x if kept else x[:, :, :0]), summed_in(missing))
        squares[pair][held_now] += float(summed_in(call.result).square().sum(dtype=torch.float64))

    watch = Watch(task.model, list(by_consumer), see)
    for batch, held_now in task.each(text) if found else ():  # noqa: B007  `see` reads it
        watch.run(batch)
    for pair, (fit, held_out) in sums.items():
        whole = squares[pair][1]
        if not (bool(fit.count.any()) and bool(held_out.count.any())):
            fit = held_out = fit.plus(held_out)
            whole = sum(squares[pair])
        if bool(fit.count.any()):
            yield pair, fit, held_out, max(whole, 1e-300)
        else:
            task.recovery.skipped.append((pair.name, UNREACHED))


def _without_removed(call: Call, pair: Pair) -> Iterable[tuple[slice, Tensor, Tensor]]:
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
