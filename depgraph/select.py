"""Scores, budget and constraints -> which units of which groups go.

Each product dim (heads x width) loses indices of one factor only, the one with the most units. Groups that a
constraint ties, or that are fragments of one original dim, form a *block*. A block has *moves*: the least numbers of
units that may go together. Moves are ordered by the scores of the units they take, so a block is a sequence, and a
plan is how far each sequence is followed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, lcm
from typing import Any

import numpy as np
import numpy.typing as npt

from . import axes
from .axes import ATOM, CONCAT, PRODUCT, RAGGED, Axis, Polynomial
from .cost import CostModel
from .errors import BudgetError, NothingToPruneError
from .graph import DependencyGraph, Group
from .importance import Scores

Masks = dict[int, npt.NDArray[np.bool_]]
Move = dict[int, int]  # axis id -> how many units it takes


@dataclass
class Block:
    """Groups that are chosen together.

    `scores[i]` is the cost of step i (non-decreasing), `gone[axis id][n]` how many units of the axis n steps take,
    `allowed` the numbers of steps at which every dim is a multiple of `round_to`.
    """

    groups: list[Group]
    moves: list[Move] = field(default_factory=list)
    scores: Scores = field(default_factory=lambda: np.zeros(0))
    gone: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict)
    allowed: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, dtype=np.int64))


def choose_factors(
    graph: DependencyGraph, passed_over: Collection[int] = ()
) -> tuple[list[Group], dict[int, set[int]]]:
    """The groups that a ratio or budget cuts: of each product that a weight produces, the factor with most units.

    Args:
        graph: the dependency graph.
        passed_over: ids of axes that are not to be chosen.

    Returns:
        the groups, and for each axis id the ids of its rivals: axes that are another factor of the same product.
    """
    rivals: dict[int, set[int]] = {}
    seen: set[int] = set()
    for group in graph.groups:
        for m in group.members:
            axis = graph.dims(m.name)[m.dim]
            if m.role == "produces" and axis is not None and id(axis.find()) not in seen:
                seen.add(id(axis.find()))
                _rivals(axis, graph.by_axis, rivals)
    taken: set[int] = set()
    for group in sorted(graph.groups, key=lambda g: -g.units):
        fragment = group.axis.pool is not group.axis
        if id(group.axis) not in passed_over and not rivals.get(id(group.axis), set()) & taken:
            if group.units > 1 or fragment:
                taken.add(id(group.axis))
    return [g for g in graph.groups if id(g.axis) in taken], rivals


def _rivals(axis: Axis, groups: Mapping[int, Group], rivals: dict[int, set[int]]) -> set[int]:
    """Ids of the free atoms in `axis`; atoms in different factors of one product are noted as rivals."""
    axis = axis.find()
    if axis.kind == ATOM:
        return {id(axis)} if id(axis) in groups else set()
    found = [_rivals(p, groups, rivals) for p in axis.parts]
    if axis.kind == PRODUCT:
        for i, a in enumerate(found):
            for j, b in enumerate(found):
                if i != j:
                    for x in a - b:
                        rivals.setdefault(x, set()).update(b - a)
    return set().union(*found)


class Selection:
    """The blocks of a graph under its constraints, and the state of a choice."""

    def __init__(self, graph: DependencyGraph, scores: Mapping[int, Scores], round_to: int = 1) -> None:
        """Order the moves of every block by `scores` (axis id -> score per unit)."""
        self.graph, self.round_to = graph, round_to
        self.groups, relations, self.locked = self._choose()
        self.axis = {id(g.axis): g.axis for g in self.groups}
        relations = [r for r in relations if all(a in self.axis for t in r for a in t)]
        self.order = {a: np.argsort(scores[a], kind="stable") for a in self.axis}
        self.sorted = {a: scores[a][self.order[a]] / max(float(scores[a].mean()), 1e-300) for a in self.axis}
        self.floors, self.needs = self._floors()
        self.sums = self._dim_sums()
        found = self._find_blocks(relations)
        self._spread_floors([b for b, _ in found])
        self.blocks = [self._fill(b, r) for b, r in found]

    # --------------------------------------------------------------------------------------------- constraints

    def _choose(self) -> tuple[list[Group], list[Polynomial], dict[int, str]]:
        """(groups to cut, the constraints over them, locked axes with the reason).

        Where a constraint can't be met with the first choice of factors (it would fix the width of a whole model
        because heads keep their number), the choice that leaves more entries free is taken.
        """
        groups, rivals = choose_factors(self.graph)
        first = self._linear(groups)
        taken = {id(g.axis) for g in groups}
        blamed = taken & {
            r
            for p, _ in self.graph.constraints
            if any(a in first[2] for t in p for a in t)
            for t in p
            for a in t
            for r in rivals.get(a, ())
        }
        if not first[2] or not blamed:
            return first
        second = self._linear(choose_factors(self.graph, blamed)[0])
        return max((first, second), key=lambda c: self._reach(c[0]))

    def _reach(self, groups: list[Group]) -> int:
        names = {m.name for g in groups for m in g.members}
        return sum(self.graph.tensors[n].numel() for n in names)

    def _linear(self, groups: list[Group]) -> tuple[list[Group], list[Polynomial], dict[int, str]]:
        """Constraints over `groups`; those that one can't be met for with integers are locked and left out."""
        locked: dict[int, str] = {}
        constraints = self.graph.constraints
        while True:
            chosen = {id(g.axis): g.axis for g in groups if id(g.axis) not in locked}
            found = [(self.graph.sizes.reduce(p, chosen), why) for p, why in constraints]
            bad = {
                a: str(why)
                for p, why in found
                for t in p
                for a in t
                if len(p) - (() in p) == 1 or any(len(u) > 1 for u in p)
            }
            if not bad:
                return [g for g in groups if id(g.axis) in chosen], [p for p, _ in found if p], locked
            locked.update(bad)

    def _floors(self) -> tuple[dict[int, int], list[list[int]]]:
        """Least units per axis (0 for fragments that are no dim by themselves), and sets of which one must stay."""
        floors = dict.fromkeys(self.axis, 0)
        needs: dict[tuple[int, ...], None] = {}
        seen: set[int] = set()

        def alone(axis: Axis) -> None:
            axis = axis.find()
            if id(axis) in seen:
                return
            seen.add(id(axis))
            if axis.kind == ATOM:
                if id(axis) in floors:
                    floors[id(axis)] = 1
            elif axis.kind == CONCAT:
                parts = [p.find() for p in axis.parts]
                if all(p.kind == ATOM and id(p) in floors for p in parts):
                    needs[tuple(dict.fromkeys(map(id, parts)))] = None
                else:
                    for p in parts:
                        if p.kind != ATOM:
                            alone(p)
            else:
                for p in axis.parts:
                    alone(p)

        for results in self.graph.state.dims.values():
            for dims in results:
                for axis in dims:
                    if axis is not None:
                        alone(axis)
        for a, axis in self.axis.items():
            if axis.pool.find() is axis:
                floors[a] = 1
        for axis, count in self.graph.state.at_least:
            self._hold(axis.find(), count, floors)
        return floors, [list(n) for n in needs if not any(floors[a] for a in n)]

    def _hold(self, axis: Axis, count: int, floors: dict[int, int]) -> None:
        """Raise the floors so that `axis` keeps `count` indices: a factor its share, a piece of a whole all it has."""
        free = [a for a in dict.fromkeys(axes.atoms(axis)) if id(a) in floors]
        for atom in free:
            shared = axis.kind == CONCAT or len(free) > 1
            least = atom.size if shared else -(-count * atom.size // axis.size)
            floors[id(atom)] = max(floors[id(atom)], least)

    def _spread_floors(self, blocks: list[Block]) -> None:
        """Where a dim is made of several blocks, which do not know of each other, its largest part keeps a unit."""
        block_of = {id(g.axis): i for i, b in enumerate(blocks) for g in b.groups}
        for need in self.needs:
            if len({block_of[a] for a in need}) > 1:
                self.floors[max(need, key=lambda a: self.axis[a].size)] = 1
        self.needs = [n for n in self.needs if not any(self.floors[a] for a in n)]

    def _dim_sums(self) -> dict[int, list[tuple[int, Polynomial]]]:
        """axis id -> (key, count polynomial) of each parameter dim that the axis is part of."""
        sums: dict[int, list[tuple[int, Polynomial]]] = {a: [] for a in self.axis}
        seen: set[int] = set()
        for name in self.graph.trace.tensors:
            for axis in self.graph.dims(name):
                if axis is None or id(axis.find()) in seen or axis.find().kind == RAGGED:
                    continue
                seen.add(id(axis.find()))
                p = axes.count(axis, self.axis)
                for a in {a for t in p for a in t}:
                    sums[a].append((id(axis.find()), p))
        return sums

    def _find_blocks(self, relations: list[Polynomial]) -> list[tuple[Block, list[Polynomial]]]:
        parent = {a: a for a in self.axis}

        def root(a: int) -> int:
            while parent[a] != a:
                parent[a] = parent[parent[a]]
                a = parent[a]
            return a

        for p in relations:
            ids = [a for t in p for a in t]
            for a in ids[1:]:
                parent[root(a)] = root(ids[0])
        pools: dict[int, int] = {}
        for a, axis in self.axis.items():
            pool = id(axis.pool.find() if axis.pool.find().kind == ATOM else axis.pool)
            if axis.pool is not axis:
                parent[root(a)] = root(pools.setdefault(pool, a))
        members: dict[int, list[Group]] = {}
        for g in self.groups:
            members.setdefault(root(id(g.axis)), []).append(g)
        rules: dict[int, list[Polynomial]] = {}
        for p in relations:
            rules.setdefault(root(next(a for t in p for a in t)), []).append(p)
        return [(Block(gs), rules.get(r, [])) for r, gs in members.items()]

    # --------------------------------------------------------------------------------------------------- moves

    def _moves(self, block: Block, relations: list[Polynomial]) -> list[Move]:
        """The least moves that keep every relation: see the module docstring."""
        ids = [id(g.axis) for g in block.groups]
        same = {a: a for a in ids}

        def root(a: int) -> int:
            while same[a] != a:
                a = same[a]
            return a

        rest = []
        for p in relations:
            terms = {t: n for t, n in p.items() if t}
            if len(terms) == 2 and sum(terms.values()) == 0 and () not in p:
                (x,), (y,) = terms
                same[root(x)] = root(y)
            else:
                rest.append(p)
        classes: dict[int, list[int]] = {}
        for a in ids:
            classes.setdefault(root(a), []).append(a)
        merged = []
        for p in rest:
            q: dict[int, int] = {}
            for t, n in p.items():
                if t:
                    q[root(t[0])] = q.get(root(t[0]), 0) + n
            q = {a: n for a, n in q.items() if n}
            if q:
                merged.append(q)
        bound = {a for q in merged for a in q}
        directions: list[Move] = [{r: 1} for r in classes if r not in bound]
        directions += _directions(merged, {r: self.axis[r].size for r in bound})
        return [{a: n for r, n in d.items() for a in classes[r]} for d in directions]

    def _fill(self, block: Block, relations: list[Polynomial]) -> Block:
        """Order the moves of `block`: always the cheapest that leaves every floor."""
        block.moves = self._moves(block, relations)
        if len(block.moves) == 1:
            self._repeat(block, block.moves[0])
        else:
            self._interleave(block, {})
        self._finish(block)
        return block

    def _finish(self, block: Block) -> None:
        if len(block.scores):
            block.scores = np.maximum.accumulate(block.scores)
        block.allowed = self._allowed(block)

    def _repeat(self, block: Block, move: Move) -> None:
        times = min((self.axis[a].size - max(self.floors[a], 1)) // n for a, n in move.items())
        total = np.zeros(times)
        for a, n in move.items():
            total += self.sorted[a][: times * n].reshape(times, n).sum(1)
            block.gone[a] = np.arange(times + 1) * n
        block.scores = total / sum(move.values())

    def _interleave(self, block: Block, limits: dict[int, int]) -> None:
        """Take the cheapest move until none is left that keeps floors and `limits` (pool id -> units that may go)."""
        moves = block.moves
        left = dict(limits)
        pool = {id(g.axis): id(g.axis.pool) for g in block.groups}
        gone = dict.fromkeys((id(g.axis) for g in block.groups), 0)
        needs = [n for n in self.needs if any(a in gone for a in n)]
        steps: list[Move] = []
        scores = []
        live = list(range(len(moves)))
        sums = {a: np.concatenate([[0.0], np.cumsum(self.sorted[a])]) for a in gone}
        while live:
            costs = []
            for i in list(live):
                move = moves[i]
                over = left and any(left[p] < n for p, n in _by_pool(move, pool).items())
                below = any(self.axis[a].size - gone[a] - n < self.floors[a] for a, n in move.items())
                if over or below or self._starves(needs, gone, move):
                    live.remove(i)
                    continue
                cost = sum(sums[a][gone[a] + n] - sums[a][gone[a]] for a, n in move.items())
                costs.append((float(cost) / sum(move.values()), i))
            if not costs:
                break
            cost, i = min(costs)
            for a, n in moves[i].items():
                gone[a] += n
                if left:
                    left[pool[a]] -= n
            steps.append(moves[i])
            scores.append(cost)
        block.scores = np.asarray(scores)
        for a in gone:
            block.gone[a] = np.cumsum([0, *(move.get(a, 0) for move in steps)])

    def _starves(self, needs: list[list[int]], gone: dict[int, int], move: Move) -> bool:
        return any(
            sum(self.axis[a].size - gone.get(a, 0) - move.get(a, 0) for a in need) < 1
            for need in needs
            if any(a in move for a in need)
        )

    def _allowed(self, block: Block) -> npt.NDArray[np.int64]:
        """Numbers of steps after which each parameter dim's share in this block is a multiple of `round_to`."""
        steps = np.arange(len(block.scores) + 1)
        if self.round_to == 1:
            return steps
        fine = np.ones(len(steps), dtype=bool)
        for p in {key: p for a in block.gone for key, p in self.sums[a]}.values():
            share = np.zeros(len(steps), dtype=np.int64)
            for term, n in p.items():
                if any(a in block.gone for a in term):
                    part = np.full(len(steps), n)
                    for a in term:
                        part = part * (self.axis[a].size - block.gone.get(a, 0))
                    share += part
            fine &= share % self.round_to == 0
        fine[0] = True
        return steps[fine]

    # ------------------------------------------------------------------------------------------------- choosing

    def by_ratio(self, ratio: float) -> list[int]:
        """Steps per block that remove at most `ratio` of each original dim."""
        chosen = []
        for block in self.blocks:
            pools: dict[int, list[Group]] = {}
            for g in block.groups:
                pools.setdefault(id(g.axis.pool), []).append(g)
            if len(block.moves) > 1:
                self._interleave(
                    block, {p: int(ratio * sum(g.units for g in gs) + 1e-9) for p, gs in pools.items()}
                )
                self._finish(block)
            count = len(block.scores)
            for gs in pools.values():
                gone = np.zeros(len(block.scores) + 1, dtype=np.int64)
                for g in gs:
                    gone = gone + block.gone.get(id(g.axis), 0)
                fits = np.flatnonzero(gone <= int(ratio * sum(g.units for g in gs) + 1e-9))
                count = min(count, int(fits[-1]))
            chosen.append(int(block.allowed[block.allowed <= count].max()))
        return chosen

    def counts_after(self, steps: Sequence[int]) -> dict[int, int]:
        """axis id -> units left after `steps` of each block."""
        counts = {a: axis.size for a, axis in self.graph.free.items()}
        for block, n in zip(self.blocks, steps, strict=True):
            for a, gone in block.gone.items():
                counts[a] -= int(gone[n])
        return counts

    def by_budget(self, cost: Any, budget: int, name: str) -> list[int]:
        """Steps per block, the cheapest across the model first, until ``cost(counts) <= budget``; then as close as fits."""
        scores = np.concatenate([b.scores for b in self.blocks]) if self.blocks else np.zeros(0)
        owner = np.repeat(np.arange(len(self.blocks)), [len(b.scores) for b in self.blocks])
        owner = owner[np.argsort(scores, kind="stable")]

        def steps_after(total: int) -> list[int]:
            taken = np.bincount(owner[:total], minlength=len(self.blocks))
            return [
                int(b.allowed[min(np.searchsorted(b.allowed, n), len(b.allowed) - 1)])
                for b, n in zip(self.blocks, taken, strict=True)
            ]

        counts_after = self.counts_after
        flat = owner
        low, high = 0, len(flat)
        if cost(counts_after(steps_after(high))) > budget:
            least, whole = cost(counts_after(steps_after(high))), cost(counts_after([0] * len(self.blocks)))
            raise BudgetError(
                f"{name}={budget:,} can't be reached: with every removable unit gone {least:,} remain of {whole:,} "
                f"({least / whole:.1%})\n  what locks the rest:\n{lock_lines(self.graph)}"
            )
        while low < high:
            middle = (low + high) // 2
            if cost(counts_after(steps_after(middle))) <= budget:
                high = middle
            else:
                low = middle + 1
        steps = steps_after(low)
        return self._give_back(steps, lambda s: cost(counts_after(s)), budget)

    def _give_back(self, steps: list[int], cost: Any, budget: int) -> list[int]:
        """Undo the dearest steps that the budget has room for, block by block."""
        order = sorted(
            range(len(steps)), key=lambda b: -(self.blocks[b].scores[steps[b] - 1] if steps[b] else 0)
        )
        progress = True
        while progress:
            progress = False
            for b in order:
                allowed = self.blocks[b].allowed
                at = int(np.searchsorted(allowed, steps[b]))
                if at == 0:
                    continue
                trial = [*steps[:b], int(allowed[at - 1]), *steps[b + 1 :]]
                if cost(trial) <= budget:
                    steps, progress = trial, True
        return steps

    def masks(self, steps: Sequence[int]) -> Masks:
        """axis id -> bool array of the kept units, for the axes that lose some."""
        masks: Masks = {}
        for block, n in zip(self.blocks, steps, strict=True):
            for a, gone in block.gone.items():
                if gone[n]:
                    mask = np.ones(self.axis[a].size, dtype=bool)
                    mask[self.order[a][: gone[n]]] = False
                    masks[a] = mask
        return masks


def _by_pool(move: Move, pool: Mapping[int, int]) -> dict[int, int]:
    """pool id -> how many of its units a move takes."""
    out: dict[int, int] = {}
    for a, n in move.items():
        out[pool[a]] = out.get(pool[a], 0) + n
    return out


def _directions(relations: list[dict[int, int]], sizes: dict[int, int]) -> list[Move]:
    """Least integer directions d >= 0 with every relation sum(c * d) = 0.

    One relation alone has the pairs (x on one side, y on the other) as its extreme directions. Several relations are
    met together by removing in proportion to the sizes.
    """
    out: list[Move] = []
    for part in _components(relations):
        ids = {a for q in part for a in q}
        if len(part) == 1:
            (q,) = part
            for x, n in q.items():
                for y, m in q.items():
                    if n > 0 > m:
                        both = lcm(n, -m)
                        out.append({x: both // n, y: both // -m})
            continue
        step = gcd(*(sizes[a] for a in ids))
        proportional = {a: sizes[a] // step for a in ids}
        if all(sum(c * proportional[a] for a, c in q.items()) == 0 for q in part):
            out.append(proportional)
    return out


def _components(relations: list[dict[int, int]]) -> list[list[dict[int, int]]]:
    parts: list[tuple[set[int], list[dict[int, int]]]] = []
    for q in relations:
        ids, mine = set(q), [q]
        rest = []
        for other, rs in parts:
            if other & ids:
                ids |= other
                mine = rs + mine
            else:
                rest.append((other, rs))
        parts = [*rest, (ids, mine)]
    unique = []
    for _, rs in parts:
        seen = {tuple(sorted(q.items())): q for q in rs}
        negated = {tuple(sorted((a, -n) for a, n in q.items())) for q in seen.values()}
        unique.append(
            [
                q
                for k, q in seen.items()
                if k not in negated or k <= tuple(sorted((a, -n) for a, n in q.items()))
            ]
        )
    return unique


def choose(
    graph: DependencyGraph, scores: Mapping[int, Scores], *, pruning_ratio: float | None = None,
    max_params: int | None = None, max_macs: int | None = None, round_to: int = 1,
) -> Masks:  # fmt: skip
    """Which units of which groups stay.

    Args:
        graph: the dependency graph.
        scores: axis id -> [units] scores, the lowest go first.
        pruning_ratio: remove this share of the units of each prunable dim.
        max_params: at most so many parameters.
        max_macs: at most so many multiply-accumulates in the traced pass.
        round_to: every parameter dim that shrinks keeps a multiple of this.

    Returns:
        axis id -> bool array, True where a unit stays; axes that lose nothing are absent.

    Raises:
        NothingToPruneError: no group is free.
        BudgetError: the budget is below what can be reached.
    """
    if not graph.groups:
        raise NothingToPruneError(nothing_text(graph))
    selection = Selection(graph, scores, round_to)
    budgets = [
        (n, m, b)
        for n, m, b in (("max_params", "parameters", max_params), ("max_macs", "macs", max_macs))
        if b is not None
    ]
    if not budgets:
        return selection.masks(selection.by_ratio(0.5 if pruning_ratio is None else pruning_ratio))
    cost = CostModel(graph)
    worst: list[int] = [0] * len(selection.blocks)
    for name, method, budget in budgets:
        steps = selection.by_budget(getattr(cost, method), budget, name)
        worst = [max(a, b) for a, b in zip(worst, steps, strict=True)]
    return selection.masks(worst)


def nothing_text(graph: DependencyGraph) -> str:
    """Why nothing of a model can be removed: its largest locks."""
    return f"no axis of this model can shrink; what locks it:\n{lock_lines(graph)}"


def lock_lines(graph: DependencyGraph) -> str:
    """The largest locks of a model, one a line."""
    locks = "\n".join(f"  {n:,} parameters: {reason}" for reason, n in graph.lock_summary().most_common(5))
    return locks or "  no parameter was used by the traced run"
