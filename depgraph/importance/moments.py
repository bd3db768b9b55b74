"""Second moments of what consumers are given, X'X, at bounded memory: a few consumers at a time, wide ones in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch

from ..base.errors import InputError
from ..data.calibration import Calibration
from ..data.consumers import Consumer
from ..data.gradients import GradientWatch, Objective, Reached
from ..data.watch import Call, Watch
from ..grouping.graph import DependencyGraph, Indices
from ..tracing.recorder import record_of
from .positions import Together, pieces
from .readers import Reader, blocks, matrices

Tensor = torch.Tensor
Entries = tuple[Indices, Indices]  # units [n], and where the columns of each lie in a matrix [n, k]
STILL = 1e-12  # a variance of so much of the mean square is rounding


@dataclass(frozen=True)
class Use:
    """Units of a group, and their columns ([units, k], numbered as in the `Moments` that it is a use of)."""

    consumer: Consumer
    group: str
    units: Indices
    columns: Indices


@dataclass(eq=False)
class Moments:
    """Second moments of (some columns of) the inputs of consumers that are given the same.

    Attributes:
        consumers: they; the first stands for all.
        columns: which columns; None for all.
        uses: what is to be scored by them.
        positions: kernel positions of a convolution whose windows are taken, else 1.
        blocks: groups of a grouped convolution, which sees each alone, else 1.
        block: the group in which `columns` lie, where they are given.
        centred: moments are about the mean. Sums are then of x less the mean of the first samples, which costs no precision.
        count: samples by stacked matrix.
        shift: what is taken off x, by stacked matrix, [blocks, 1, m], m the columns of a block times the positions.
        total: sum of x by stacked matrix, [blocks, m] float64.
        product: sum of x x' by stacked matrix, [blocks, m, m] float64.
        weight: of each consumer, [blocks or stacks, rows, columns of a block, positions].
        squares: with gradients g at the results of each consumer, by block or stacked matrix: the sum of g g' [rows, rows], or
            where that is larger than [m, m] (and for recurrent layers) of W'g g'W, float64.
        together: of each consumer: what positions of a sample have in common.
        solved: (stacked matrix, block) -> the inverse of the mean of x x', while gradients are looked at.
        last_of: the groups that no later moments have a use of.
    """

    consumers: list[Consumer]
    columns: Indices | None
    uses: list[Use] = field(default_factory=list)
    positions: int = 1
    blocks: int = 1
    block: int = 0
    centred: bool = False
    count: dict[int, int] = field(default_factory=dict)
    shift: dict[int, Tensor] = field(default_factory=dict)
    total: dict[int, Tensor] = field(default_factory=dict)
    product: dict[int, Tensor] = field(default_factory=dict)
    weight: dict[Consumer, Tensor] = field(default_factory=dict)
    squares: dict[tuple[Consumer, int], Tensor] = field(default_factory=dict)
    together: dict[Consumer, Together] = field(default_factory=dict)
    solved: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    differentiated: bool = False
    last_of: list[str] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Columns of a block times kernel positions."""
        columns = self.consumers[0].width if self.columns is None else len(self.columns)
        return columns // self.blocks * self.positions

    @property
    def bytes(self) -> int:
        """What the matrices take."""
        matrices = 8 * self.blocks * _stacks(self.consumers[0])
        found = matrices * self.width**2
        if self.differentiated:
            found += sum(matrices * min(self.width, _rows(c) // self.blocks) ** 2 for c in self.consumers)
        return found

    @property
    def held(self) -> int:
        """The same, with the inverses that are there while gradients are looked at."""
        inverses = 8 * self.blocks * _stacks(self.consumers[0]) * self.width**2
        return self.bytes + self.differentiated * inverses

    def add(self, stack: int, x: Tensor) -> None:
        """Inputs [samples, width] or [samples, width, positions] of one of the stacked matrices."""
        if not len(x):
            return
        if self.columns is not None:
            x = x[:, self._columns(x)]
        x = x if x.dtype == torch.float64 else x.float()
        x = x.reshape(len(x), self.blocks, self.width).transpose(0, 1)  # [blocks, samples, m]
        if self.centred:
            x = x - self.shift.setdefault(stack, x.mean(1, keepdim=True))
        total, product = x.sum(1).double(), (x.transpose(1, 2) @ x).double()
        if stack in self.count:
            self.count[stack] += x.shape[1]
            self.total[stack] += total
            self.product[stack] += product
        else:
            self.count[stack], self.total[stack], self.product[stack] = x.shape[1], total, product

    def add_gradient(self, reached: Reached, gradient: Tensor) -> None:
        """The gradient at a call of one of the consumers, for every stacked matrix or block."""
        call = reached.call
        self._add_positions(reached, gradient)
        if reached.at_input:  # of the input x it is W'g already
            x = gradient.flatten(0, -2)
            self._add_squares(
                call.consumer, 0, x if self.columns is None else x[:, self._columns(x)], 1 / reached.shared
            )
        elif call.consumer.is_convolution:
            g = call.layout.outputs(call.args, gradient, slice(None), slice(None))
            for block in range(len(g)):
                if self.columns is None or block == self.block:
                    self._add_results(call.consumer, block, g[block])
        else:
            for stacks, samples, _ in call.layout.inputs(call.args, call.x, slice(None)):
                g = call.layout.outputs(call.args, gradient, stacks, samples)
                for stack, part in enumerate(g, stacks.start or 0):
                    self._add_results(call.consumer, stack, part)

    def _add_positions(self, reached: Reached, gradient: Tensor) -> None:
        """What positions have in common at a call."""
        consumer = reached.call.consumer
        together = self.together.setdefault(consumer, Together())
        for part, x, g, owner in pieces(reached, gradient):
            stack, block = (0, part) if consumer.is_convolution else (part, 0)
            if self.columns is not None:
                if block != self.block:
                    continue
                width = x.shape[1] // self.positions  # of a group of a convolution
                own = self._columns(x) - block * width
                x, block = x.unflatten(1, (-1, self.positions))[:, own].flatten(1), 0
            inverse = self.solved.get((stack, block))
            if inverse is None:
                continue
            if reached.at_input:
                lost = g if self.columns is None else g[:, self._columns(g)]
            else:
                lost = g.to(torch.promote_types(g.dtype, torch.float32))
                lost = lost @ self.matrix(consumer, stack, block).to(lost)
            together.add(x, lost, inverse, owner)

    def _add_results(self, consumer: Consumer, part: int, g: Tensor) -> None:
        if g.shape[1] > self.width:
            stack, block = (0, part) if consumer.is_convolution else (part, 0)
            weight = self.matrix(consumer, stack, block)
            g = g.to(torch.promote_types(g.dtype, torch.float32)) @ weight.to(
                torch.promote_types(g.dtype, torch.float32)
            )
        self._add_squares(consumer, part, g)

    def _add_squares(self, consumer: Consumer, part: int, g: Tensor, share: float = 1.0) -> None:
        g = g if g.dtype == torch.float64 else g.float()
        found = (g.T @ g).double() * share
        if not bool(torch.isfinite(found.diagonal()).all()):
            raise InputError(
                f"gradients at {consumer.name} are NaN or infinite on the calibration data: "
                "where the model is in half precision, give a copy in float32, or a loss that is smaller"
            )
        known = self.squares.get((consumer, part))
        self.squares[consumer, part] = found if known is None else known.add_(found)

    def curvature(self, consumer: Consumer, stack: int, block: int) -> Tensor | None:
        """[m, m] float64: the sum of W'g g'W over the samples of a matrix, W its weight and g the gradients of its results.

        It is scaled by what positions of a sample have in common (`Together`). None where no gradient came.
        """
        found = self.squares.get((consumer, max(stack, block, self.block)))
        if found is None:
            return None
        weight, factor = self.matrix(consumer, stack, block), self.together[consumer].factor
        if consumer.is_recurrent or len(weight) > self.width:
            return found * factor
        return weight.T @ found @ weight * factor

    def _columns(self, like: Tensor) -> Tensor:
        return torch.from_numpy(self.columns).to(like.device)

    @property
    def shares(self) -> dict[int, float]:
        """How many samples each of the stacked matrices was given, relative to the one that was given most."""
        return {stack: n / max(self.count.values()) for stack, n in self.count.items()}

    def means(self) -> Iterator[tuple[int, int, Tensor]]:
        """(stacked matrix, block, mean of x x' [m, m]), if `centred` of x - mean x: 0 for what does not vary."""
        for stack, count in self.count.items():
            for block in range(self.blocks):
                found = self.product[stack][block] / count
                if self.centred:
                    mean = self.total[stack][block] / count
                    found = found.addr_(mean, mean, alpha=-1)
                    square = (mean + self.shift[stack][block, 0]).square() + found.diagonal()
                    still = found.diagonal() <= STILL * square
                    found[still], found[:, still] = 0, 0
                yield stack, block, found

    def matrix(self, consumer: Consumer, stack: int, block: int) -> Tensor:
        """[rows, m] float64: the weights of `consumer` that meet these columns."""
        weight = self.weight[consumer][max(stack, block, self.block)]  # there are blocks or stacks, not both
        if self.columns is not None:
            own = self.columns - self.block * weight.shape[1]
            weight = weight[:, torch.from_numpy(own).to(weight.device)]
        return weight.double().flatten(1)

    def entries(self, use: Use, block: int) -> Iterator[Entries]:
        """Pairs (units [n], their entries in a block [n, k * positions]), of units with equally many there."""
        size = self.width // self.positions
        here = use.columns // size == block if self.blocks > 1 else np.ones(use.columns.shape, dtype=bool)
        counts = here.sum(1)
        for k in np.unique(counts[counts > 0]):
            rows = np.flatnonzero(counts == k)
            local = use.columns[rows][here[rows]].reshape(len(rows), k) % size
            spread = local[:, :, None] * self.positions + np.arange(self.positions)
            yield use.units[rows], spread.reshape(len(rows), -1)


def observed(
    graph: DependencyGraph,
    readers: Mapping[str, list[Reader]],
    data: Calibration,
    *,
    windows: bool,
    centred: bool,
    widest: int,
    memory: int,
    objective: Objective | None = None,
    solve: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Moments]:
    """The moments for every use of every consumer in `readers` (by group), those first whose data came first.

    The model is run on all of `data` as often as matrices of `memory` bytes at a time ask for. No matrix has more than
    `widest` columns, unless one unit has: a wider consumer is taken apart into runs of whole units, which are scored
    without looking at the others. With `windows` every kernel position of a convolution is a column of its own. With an
    `objective` the model is run once more, also back, and sums of its gradients are there; `solve` inverts the mean of x x'.
    """
    planned = _plan(readers, windows, widest)
    for moments in planned:
        moments.differentiated = objective is not None
    if data.memory is not None:
        memory = min(memory, data.memory // 2)
        _check_room(planned, data.memory)
    last = {use.group: moments for moments in planned for use in moments.uses}
    for group, its_last in last.items():
        its_last.last_of.append(group)
    for lot in _lots(planned, memory):
        by_consumer: dict[Consumer, list[Moments]] = {}
        for moments in lot:
            moments.centred = centred
            for consumer in moments.consumers:
                by_consumer.setdefault(consumer, []).append(moments)

        def see(call: Call, table: dict[Consumer, list[Moments]] = by_consumer) -> None:
            mine = table[call.consumer]
            for moments in mine:
                if call.consumer not in moments.weight:
                    moments.weight[call.consumer] = matrices(call)
            first = [m for m in mine if m.consumers[0] is call.consumer]
            for stack, x in call.inputs(windows) if first else ():
                for moments in first:
                    moments.add(stack, x)

        def see_gradient(
            reached: Reached, gradient: Tensor, table: dict[Consumer, list[Moments]] = by_consumer
        ) -> None:
            for moments in table[reached.call.consumer]:
                moments.add_gradient(reached, gradient)

        Watch(graph.running, by_consumer, see).run_all(data, "observing inputs")
        if objective is not None and solve is not None:
            for moments in lot:
                for stack, block, matrix in moments.means():
                    moments.solved[stack, block] = solve(matrix)
            # what is made in inference mode can't be differentiated
            with torch.inference_mode(False), closing(data.batches("observing gradients")) as batches:
                watch = GradientWatch(graph.running, by_consumer, lambda call: None, see_gradient, objective)
                for batch in batches:
                    watch.run_back(batch)
        while lot:
            yield lot.pop(0)  # so that what was used can go
        by_consumer.clear()


def _plan(readers: Mapping[str, list[Reader]], windows: bool, widest: int) -> list[Moments]:
    """What is to be observed, consumers with one input together."""
    together: dict[Any, Moments] = {}
    parts: list[Moments] = []
    for group, own in readers.items():
        for reader in own:
            consumer = reader.consumer
            positions = _positions(consumer) if windows else 1
            split = blocks(consumer)
            if consumer.width // split * positions <= widest:
                found = together.setdefault(
                    _source(consumer), Moments([], None, positions=positions, blocks=split)
                )
                if consumer not in found.consumers:
                    found.consumers.append(consumer)
                units = np.arange(len(reader.columns))
                found.uses.append(Use(consumer, group, units, reader.columns))
                continue
            parts += _parts(reader, group, positions, widest)
    return [*together.values(), *parts]


def _parts(reader: Reader, group: str, positions: int, widest: int) -> Iterator[Moments]:
    """Runs of whole units, of each block of a grouped convolution by themselves."""
    consumer = reader.consumer
    whole = Moments([consumer], None, positions=positions, blocks=blocks(consumer))
    every = Use(consumer, group, np.arange(len(reader.columns)), reader.columns)
    for block in range(whole.blocks):
        first = block * whole.width // positions
        for units, entries in whole.entries(every, block):
            taken = first + entries[:, ::positions] // positions
            step = max(1, widest // entries.shape[1])
            for start in range(0, len(units), step):
                some = slice(start, start + step)
                columns = np.unique(taken[some])
                use = Use(consumer, group, units[some], np.searchsorted(columns, taken[some]))
                yield Moments([consumer], columns, [use], positions, block=block)


def _check_room(every: Iterable[Moments], room: int) -> None:
    """Refuse matrices that can't be solved in `room` bytes: one is held beside three that are made of it."""
    for moments in every:
        if (needed := 4 * moments.bytes) > room:
            raise InputError(
                f"the second moments of what {moments.consumers[0].name} is given take about {needed / 1e9:.2g} GB, and there is room "
                f"for {room / 1e9:.2g} GB\n  fix: give more memory, or an importance that looks at each column alone, such as "
                "'wanda' or 'flap'"
            )


def _lots(every: Iterable[Moments], memory: int) -> Iterator[list[Moments]]:
    lot: list[Moments] = []
    for moments in every:
        if lot and sum(m.held for m in lot) + moments.held > memory:
            yield lot
            lot = []
        lot.append(moments)
    if lot:
        yield lot


def _source(consumer: Consumer) -> Any:
    """The same for consumers that are given the same tensors in the same way."""
    letters = {c.letters for c in consumer.calls}
    if consumer.is_convolution or None in letters or _stacks(consumer) > 1:
        return consumer
    return tuple((c.activation, c.letters, consumer.axis.find()) for c in consumer.calls if consumer.axis)


def _stacks(consumer: Consumer) -> int:
    """How many stacked matrices share the columns of a consumer."""
    call = consumer.calls[0]
    shape = record_of(call.weight).shape
    if consumer.is_convolution:
        return 1
    if call.letters is None:
        return int(shape[0])
    x, w, result = call.letters
    tail = w.partition("...")[2] if "..." in w else w
    return prod(n for t, n in zip(tail, shape[-len(tail) :], strict=True) if t in x and t in result)


def _rows(consumer: Consumer) -> int:
    """Rows of all blocks of its weight, or of one of the stacked matrices."""
    whole = prod(record_of(consumer.calls[0].weight).shape)
    return whole // max(1, consumer.width // blocks(consumer) * _positions(consumer) * _stacks(consumer))


def _positions(consumer: Consumer) -> int:
    shape = record_of(consumer.calls[0].weight).shape
    return prod(shape[2:]) if consumer.is_convolution else 1
