"""Groups that are chosen together, and the order in which their units go.

Groups that a constraint ties, or that are fragments of one original dim, form a block. A block is a sequence of steps,
cheapest first; a plan is how far each sequence is followed.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..axes.axes import ATOM, Axis
from ..axes.polynomials import Polynomial
from ..base.unions import Unions
from ..grouping.graph import Group
from ..importance import Scores
from .floors import Floors
from .moves import Move, least_moves

Integers = npt.NDArray[np.int64]


@dataclass
class Block:
    """Groups that are chosen together.

    Attributes:
        groups: the groups.
        moves: the least numbers of units that may go together.
        scores: [steps] average score of the units that each step takes, non-decreasing.
        taken: [steps] how many units it takes.
        gone: axis -> [steps + 1], how many of its units the first n steps take.
        allowed: the numbers of steps at which every dim is a multiple of `round_to`, ascending from 0.
    """

    groups: list[Group]
    moves: list[Move] = field(default_factory=list)
    scores: Scores = field(default_factory=lambda: np.zeros(0))
    taken: Integers = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    gone: dict[Axis, Integers] = field(default_factory=dict)
    allowed: Integers = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    @property
    def names(self) -> list[str]:
        """Those of its groups."""
        return [g.name for g in self.groups]

    @property
    def original_axes(self) -> dict[Axis, list[Group]]:
        """Axis of an original dim -> the groups that are fragments of it."""
        found: dict[Axis, list[Group]] = {}
        for g in self.groups:
            found.setdefault(g.axis.original_axis, []).append(g)
        return found

    @property
    def units(self) -> int:
        """How many units its groups have."""
        return sum(g.units for g in self.groups)

    def at_most(self, steps: int) -> int:
        """The last allowed number of steps up to `steps`."""
        return int(self.allowed[np.searchsorted(self.allowed, steps, side="right") - 1])

    def nearest(self, steps: int) -> int:
        """The allowed number of steps that is nearest to `steps`, the smaller of two."""
        low, high = self.at_most(steps), self.at_least(steps)
        return high if high - steps < steps - low else low

    def at_least(self, steps: int) -> int:
        """The first allowed number of steps from `steps` on, or the last of all."""
        return int(self.allowed[min(int(np.searchsorted(self.allowed, steps)), len(self.allowed) - 1)])


def find_blocks(
    groups: Sequence[Group], relations: Sequence[Polynomial]
) -> list[tuple[Block, list[Polynomial]]]:
    """The blocks of `groups`, each with the relations (linear polynomials that stay zero) over it."""
    together = Unions(g.axis for g in groups)
    for p in relations:
        together.join(*(a for t in p for a in t))
    originals: dict[Axis, Axis] = {}
    for axis in (g.axis for g in groups):
        if axis.original_axis is not axis:
            whole = axis.original_axis.find()
            together.join(
                originals.setdefault(whole if whole.kind == ATOM else axis.original_axis, axis), axis
            )
    by_axis = {g.axis: g for g in groups}
    rules: dict[Axis, list[Polynomial]] = {}
    for p in relations:
        rules.setdefault(together.root(next(a for t in p for a in t)), []).append(p)
    return [
        (Block([by_axis[a] for a in found]), rules.get(together.root(found[0]), []))
        for found in together.sets()
    ]


class Sequencer:
    """Puts the moves of a block in order: always the cheapest that leaves every floor and keeps every cap."""

    def __init__(self, ranked: Mapping[Axis, Scores], floors: Floors) -> None:
        """`ranked`: axis -> its scores, ascending."""
        self.floors = floors
        self.sums = {a: np.concatenate([[0.0], np.cumsum(s)]) for a, s in ranked.items()}

    def moves(self, block: Block, relations: Sequence[Polynomial]) -> None:
        """Find the moves of `block`."""
        block.moves = least_moves([g.axis for g in block.groups], relations)

    def order(self, block: Block, caps: Mapping[Axis, int]) -> None:
        """Fill in the steps of `block`; `caps`: original axis -> how many of its units may go, where fewer than all."""
        left = {p: caps[p] for p in block.original_axes if p in caps}
        chosen, costs = self._repeat(block, left) if len(block.moves) == 1 else self._interleave(block, left)
        block.gone = {}
        for g in block.groups:
            per_move = np.array([m.get(g.axis, 0) for m in block.moves], dtype=np.int64)
            block.gone[g.axis] = np.concatenate([[0], np.cumsum(per_move[chosen])])
        sizes = np.array([sum(m.values()) for m in block.moves], dtype=np.int64)
        block.taken = sizes[chosen]
        block.scores = np.maximum.accumulate(costs) if len(costs) else costs

    def _repeat(self, block: Block, left: dict[Axis, int]) -> tuple[Integers, Scores]:
        """The one move of a block as often as it can be taken."""
        (move,) = block.moves
        times = min((a.size - max(self.floors.least[a], 1)) // n for a, n in move.items())
        times = min([times, *(left[p] // n for p, n in _by_original_axis(move).items() if p in left)])
        total = np.zeros(times)
        for a, n in move.items():
            total += np.diff(self.sums[a][: times * n + 1 : n])
        return np.zeros(times, dtype=np.int64), total / sum(move.values())

    def _interleave(self, block: Block, left: dict[Axis, int]) -> tuple[Integers, Scores]:
        """The cheapest of several moves again and again. What one costs changes with those that share an axis with it."""
        moves, gone = block.moves, dict.fromkeys((g.axis for g in block.groups), 0)
        originals = [_by_original_axis(m) for m in moves]
        needs = [[n for n in self.floors.needs if any(a in m for a in n)] for m in moves]
        users: dict[Axis, list[int]] = {a: [] for a in gone}
        for i, move in enumerate(moves):
            for a in move:
                users[a].append(i)
        version = [0] * len(moves)

        def fits(i: int) -> bool:
            move = moves[i]
            if any(left[p] < n for p, n in originals[i].items() if p in left):
                return False
            if any(a.size - gone[a] - n < self.floors.least[a] for a, n in move.items()):
                return False
            return all(sum(a.size - gone.get(a, 0) - move.get(a, 0) for a in n) > 0 for n in needs[i])

        def price(i: int) -> float:
            sums, move = self.sums, moves[i]
            return float(sum(sums[a][gone[a] + n] - sums[a][gone[a]] for a, n in move.items())) / sum(
                move.values()
            )

        heap = [(price(i), i, 0) for i in range(len(moves)) if fits(i)]
        heapq.heapify(heap)
        chosen, costs = [], []
        while heap:
            cost, i, seen = heapq.heappop(heap)
            if seen != version[i] or not fits(i):
                continue
            chosen.append(i)
            costs.append(cost)
            for a, n in moves[i].items():
                gone[a] += n
            for p, n in originals[i].items():
                if p in left:
                    left[p] -= n
            for j in {j for a in moves[i] for j in users[a]}:
                version[j] += 1
                if fits(j):
                    heapq.heappush(heap, (price(j), j, version[j]))
        return np.array(chosen, dtype=np.int64), np.array(costs)


def _by_original_axis(move: Move) -> dict[Axis, int]:
    """Axis of an original dim -> how many of its units a move takes."""
    out: dict[Axis, int] = {}
    for a, n in move.items():
        out[a.original_axis] = out.get(a.original_axis, 0) + n
    return out
