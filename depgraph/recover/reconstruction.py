"""Least-squares reconstruction: each consumer's weight anew, so that its result is the original's as far as it can be.

For a consumer with weight W and bias b, inputs X and result Y of the original, and inputs X' of the smaller model (whose
earlier layers are recovered already), over the rows that are kept:

    D, d = argmin |Y - (X' (W' + D)^T + b' + d)|^2 + l |D|^2,    l = damping * mean(diag(X'^T X'))

which is ridge regression of what is missing, Y - X' W'^T - b', on X': it shrinks towards the weights as they were cut. The
damping is chosen for each row on batches that are held out, and a row is changed only if that lowers its error there.

Sources: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017 (eq. 4, section 3.2: whole
model pruned in sequence); Hassibi & Stork, NIPS 1992 (optimal brain surgeon: the same update for fixed inputs).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..axes.nodes import is_convolution, is_grouped
from ..base.errors import InputError
from ..data.layout import Runs, Samples, slices
from ..data.watch import Call
from .lockstep import Run
from .pairs import Pair
from .result import LayerRecovery
from .solve import Sums, summed_in, wide

Tensor = torch.Tensor
# Tried one after another while rows gain, then the stronger ones.
DAMPINGS = (1e-1, 1e-2, 1e-3, 1e-5, 1e-10)
STRONGER = (1.0, 10.0, 100.0)
COLUMNS = 4096  # solved for at once: their Gram matrix is the largest thing held, 128 MiB in float64
ENTRIES = 1 << 24  # of Gram matrices of several stacks held at once
SAMPLES = 1 << 14  # of one layer, or four for each column where that is more
ENOUGH = 0.02  # of the rows must gain by one damping for the next one to be tried
NEGLIGIBLE = 1e-12  # relative error up to which a layer is as it was


class NotFinite(Exception):
    """There is no least-squares solution: see `result.NOT_FINITE`."""


@dataclass
class Member:
    """One batch at one layer: the call in the original (after it) and in the smaller model (before it), and the runs of both."""

    dense: Call
    small: Call
    held_out: bool
    runs: tuple[Run, ...] = ()
    out: Any = None
    target: Any = None

    @contextmanager
    def there(self) -> Iterator[None]:
        """What the runs have is in memory; of what waits in files nothing that is computed inside is kept, either."""
        with ExitStack() as stack:
            brought = [stack.enter_context(run.there()) for run in self.runs]
            yield
            if any(brought):
                self.out = self.target = None

    def result(self) -> Tensor:
        """What the smaller model's call gives with the weight as it is, and the stream that it is added to."""
        if self.out is None:
            with torch.no_grad():
                if self.small.consumer.is_recurrent:
                    self.out = self.small.result
                elif self.small.stream is not None:
                    self.out = self.small.out + self.small.stream
                else:
                    self.out = self.small.product.node.target(*self.small.args)  # type: ignore[operator]
        return self.out

    def wanted(self) -> Tensor:
        """What the original's call gives, and the stream that it is added to."""
        if self.target is None:
            call = self.dense
            self.target = call.result if call.stream is None else call.out + call.stream
        return self.target

    def matches(self) -> bool:
        """Whether the same samples stand at the same places in both: where samples were removed, they do not."""
        same = self.dense.choices == self.small.choices
        if not same or (self.dense.stream is None) != (self.small.stream is None):
            return False
        with self.there():
            return _samples(self.dense, self.wanted()) == _samples(self.small, self.result())


def _samples(call: Call, out: Tensor) -> int:
    return call.layout.outputs(call.args, out, slice(None), slice(None)).shape[1]


def taken(x: Tensor, index: Tensor) -> Tensor:
    """``x[s, :, index[s]]`` for x [stacks, n, m] and index [stacks, k]."""
    if index.shape[1] == x.shape[2]:
        return x
    index = index.to(x.device)
    if bool((index == index[:1]).all()):
        return x.index_select(2, index[0])
    return x.gather(2, index[:, None].expand(-1, x.shape[1], -1))


@dataclass
class Reconstruction:
    """Solves consumers for their weights.

    Attributes:
        damping: relative to the mean of the Gram matrix' diagonal; None: chosen on held-out batches.
        streams: a layer whose result is added to a stream is fitted to the stream behind the sum, so that it makes up for
            what the stream has lost before.
        everywhere: also where nothing of a layer's inputs was removed, but they changed.
        samples: how many samples of one layer are used at most, or four for each column where that is more.
    """

    damping: float | None = None
    everywhere: bool = True
    streams: bool = True
    samples: int = SAMPLES

    def __post_init__(self) -> None:
        """Refuse what is out of range.

        Raises:
            InputError: a damping below 0, or no samples.
        """
        if self.damping is not None and not 0 <= self.damping < math.inf:
            raise InputError(f"damping must be None or a finite number of at least 0, not {self.damping!r}")
        if self.samples < 1:
            raise InputError(f"samples must be at least 1, not {self.samples!r}")

    def solve(
        self, pair: Pair, members: list[Member], grams: Grams
    ) -> tuple[Change | None, LayerRecovery | None]:
        """The change of a pair's weight that the held-out batches confirm, and what to report; None where nothing is missing.

        Args:
            pair: a consumer and its inputs.
            members: what is solved together.
            grams: the Gram matrices of its inputs.

        Raises:
            NotFinite: inputs or results are NaN or infinite.
        """
        before, whole, count = _errors(pair, members)
        if not math.isfinite(before + whole):
            raise NotFinite
        if not (before > NEGLIGIBLE * whole):
            return None, None
        share = max(self.samples, 4 * pair.columns.shape[1]) / max(count, 1)
        work = _Work(pair, members, share, grams)
        weight = torch.zeros(pair.sizes, dtype=wide(work.device), device=work.device)
        change, found = Change(weight, weight.new_zeros(pair.sizes[:2])), False
        totals = [0.0, 0.0]
        blocks = slices(pair.columns.shape[1], 1, COLUMNS)
        for stacks in slices(len(pair.stacks), blocks[0].stop ** 2, ENTRIES):
            errors: list[float] = []
            for block in blocks:
                fit, held_out = work.sums(stacks, block, change)
                step = choose(fit, held_out, pair.shift is not None, self.damping)
                errors += [step.before, step.after]
                if step.change is not None:
                    found = True
                    change.weight[stacks, :, block] += step.change.weight
                    change.constant[stacks] += step.change.constant
                    change.damping = max(change.damping, step.change.damping)
            totals[0] += errors[0]
            totals[1] += errors[-1]
        error = before / whole if whole else 0.0
        ratio = totals[1] / totals[0] if totals[0] else 1.0
        detail = f"damping {change.damping:g}, {count} samples" if found else ""
        layer = LayerRecovery(pair.name, "reconstruction", error, error * min(ratio, 1.0), found, detail)
        return (change if found else None), layer


def work_of(pair: Pair) -> int:
    """Bytes that solving a pair takes, about: Gram matrices, sums, and the positions of what is changed."""
    stacks, rows, columns = pair.sizes
    grams = min(columns, COLUMNS) ** 2
    together = max(1, min(stacks, ENTRIES // max(1, grams)))
    return 8 * (
        5 * together * grams + 6 * together * rows * min(columns, COLUMNS) + 4 * stacks * rows * columns
    )


@dataclass
class Change:
    """What is added to a weight [stacks, rows, columns] and to its constant [stacks, rows]."""

    weight: Tensor
    constant: Tensor
    damping: float = 0.0


@dataclass
class Step:
    """A change, or None, and the held-out error without and with it."""

    change: Change | None
    before: float
    after: float


def choose(fit: Sums, held_out: Sums, affine: bool, damping: float | None) -> Step:
    """For each row the damping, or no change, that leaves the least held-out error; solved anew with all samples.

    Raises:
        NotFinite: a sum is NaN or infinite.
    """
    if not (fit.finite() and held_out.finite()):
        raise NotFinite
    before, least = held_out.rr, held_out.rr.clone()
    best = torch.zeros_like(least)
    for strengths in ((damping,),) if damping is not None else (DAMPINGS, STRONGER):
        for strength in strengths:
            error = held_out.error(*fit.solve(strength, affine))
            better = error < least * (1 - 1e-9)
            least, best = torch.where(better, error, least), best.masked_fill(better, strength)
            if float(better.double().mean()) < ENOUGH:
                break
    if not bool(best.any()):
        return Step(None, float(before.sum()), float(before.sum()))
    change = Change(torch.zeros_like(fit.xr.mT), torch.zeros_like(least), float(best[best > 0].median()))
    for strength in best[best > 0].unique().tolist():
        rows = best == strength  # [stacks, rows]
        some = rows.any(0).nonzero()[:, 0]
        weight, constant = fit.rows(some).solve(strength, affine, held_out.rows(some))
        here = rows[:, some]
        change.weight[rows], change.constant[rows] = weight[here], constant[here]
    return Step(change, float(before.sum()), float(least.sum()))


def _errors(pair: Pair, members: list[Member]) -> tuple[float, float, int]:
    """Squares of what is missing and of the original's result, on held-out batches where there are; samples of all."""
    missing = whole = 0.0
    count = 0
    several = any(m.held_out for m in members)
    for member in members:
        every = slice(None)
        with member.there():
            given = member.small.layout.outputs(member.small.args, member.result(), every, every)
            count += given.shape[1]
            if member.held_out or not several:
                wanted = _wanted(pair, member, every, every)
                missing += _square(wanted - given)
                whole += _square(wanted)
    return missing, whole, count


def _square(x: Tensor) -> float:
    """The sum of squares, of half precision in float32."""
    x = summed_in(x)
    return float(x.square().sum(dtype=wide(x.device)))


def _wanted(pair: Pair, member: Member, stacks: slice, samples: Samples) -> Tensor:
    """The original's result in the rows that are kept: [stacks, samples, rows]."""
    call, layout = member.dense, member.dense.layout
    if isinstance(layout, Runs):
        found = layout.outputs(call.args, member.wanted(), stacks, samples)
        return taken(found, pair.rows[stacks][: found.shape[0]])
    found, own = layout.outputs(call.args, member.wanted(), slice(None), samples), pair.stacks[stacks]
    if len(found) > 1:
        found = found[own.to(found.device)]
    return taken(found, pair.rows[stacks])


class Grams:
    """The Gram matrices of the last inputs seen: several layers may be given one and the same tensors."""

    def __init__(self) -> None:
        self.of: list[tuple[weakref.ref[Tensor], int, Any]] = []
        self.sums: list[Sums] = []

    def known(self, calls: list[Call]) -> list[Sums]:
        """The sums of what these calls are given, if they are the last ones seen, else []."""
        same = len(calls) == len(self.of) and all(
            ref() is call.x and version == call.x._version and form == _form(call)
            for call, (ref, version, form) in zip(calls, self.of, strict=True)
        )
        return self.sums if same else []

    def keep(self, calls: list[Call], sums: list[Sums]) -> None:
        """Remember sums of what `calls` are given."""
        self.of = [(weakref.ref(call.x), call.x._version, _form(call)) for call in calls]
        self.sums = sums


def _form(call: Call) -> Any:
    """How a call makes a matrix of its activation: one tensor has other windows for another stride or dilation."""
    op = call.product.node.target
    if is_convolution(op):
        return call.layout, tuple(call.weight.shape[2:]), str(call.args[3:])
    return call.args[2].tolist() if is_grouped(op) else call.layout


class _Work:
    """One layer's samples, as often as they are needed."""

    def __init__(self, pair: Pair, members: list[Member], share: float, grams: Grams) -> None:
        self.pair, self.members, self.share, self.grams = pair, members, share, grams
        self.alone = not any(m.held_out for m in members)  # one batch: every fifth sample is held out
        self.device = members[0].small.x.device

    def samples(self, stacks: slice) -> Iterator[tuple[slice, Tensor, Tensor, bool]]:
        """(stacks, x [stacks, n, columns], what is missing [stacks, n, rows], held out) in pieces."""
        for i, member in enumerate(self.members):
            with member.there():
                yield from self._of(i, member, stacks)

    def _of(self, place: int, member: Member, stacks: slice) -> Iterator[tuple[slice, Tensor, Tensor, bool]]:
        """The samples of one member."""
        call, layout = member.small, member.small.layout

        def some(count: int, start: int) -> Tensor | None:
            if self.share >= 1:
                return None  # all; else the same random ones for every layer that has as many
            generator = torch.Generator().manual_seed(place * 100_003 + start)
            wanted = max(1, round(count * self.share))
            return torch.randperm(count, generator=generator)[:wanted].sort().values.to(self.device)

        for part, samples, x in layout.inputs(call.args, call.x, stacks, some):
            given = layout.outputs(call.args, member.result(), part, samples)
            missing = _wanted(self.pair, member, part, samples) - given
            x, missing = summed_in(x), summed_in(missing)
            if self.alone:
                held_out = torch.arange(x.shape[1], device=x.device) % 5 == 4
                yield part, x[:, ~held_out], missing[:, ~held_out], False
                yield part, x[:, held_out], missing[:, held_out], True
            else:
                yield part, x, missing, member.held_out

    def sums(self, stacks: slice, block: slice, change: Change) -> list[Sums]:
        """Sums of the fitted and of the held-out samples, for some columns."""
        count, width = stacks.stop - stacks.start, block.stop - block.start
        whole = count == len(self.pair.stacks) and width == self.pair.columns.shape[1]
        calls = [m.small for m in self.members]
        known = self.grams.known(calls) if whole else []
        known = [k for k in known if k.xx.shape == (count, width, width)]
        if not known:
            self.grams.keep([], [])
        rows = change.weight.shape[1]
        made = [Sums.zero(count, width, rows, self.device) for _ in range(2)]
        for mine, old in zip(made, known, strict=False):
            mine.xx, mine.x, mine.count = old.xx, old.x, old.count
        changed = bool(change.damping)
        for part, x, missing, held_out in self.samples(stacks):
            if changed:
                missing = missing - x @ change.weight[part].mT.to(x) - change.constant[part][:, None].to(x)
            own = slice(part.start - stacks.start, part.stop - stacks.start)
            made[held_out].add(own, x[:, :, block], missing, gram=not known)
        if whole:
            self.grams.keep(calls, made)
        return made
