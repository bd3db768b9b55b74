"""The blocks of a graph under its constraints and under a request, and the choice among their units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ..axes import polynomials
from ..axes.axes import Axis
from ..axes.polynomials import Polynomial
from ..base.errors import BudgetError, InputError
from ..costs.size_table import Floats, Integers
from ..grouping.graph import DependencyGraph
from ..grouping.ranks import WHY
from ..importance import Scores
from ..plan.plan import Masks
from .aligned import AUTO, COARSE, STEP, channels, nearest, parameter_dims
from .blocks import Block, Sequencer, find_blocks
from .budget import Budget, meet
from .factors import Tie, choose_groups
from .floors import Floors
from .nested import Bools
from .normalise import normalised
from .scope import CompetitionGroup, competition_groups, rules_of, structure


class Rounding(NamedTuple):
    """A dim that must be a multiple of `of` once it shrinks.

    Attributes:
        size: how large it is, in the counts of axes.
        of: the number.
        whole: whether all of the dim counts, or only what one block has of it.
        soft: whether it may be another number, where it was before or where steps would be coarse.
    """

    size: Polynomial
    of: int
    whole: bool
    soft: bool = False


class Selection:
    """The blocks of a graph, their steps in order, and who competes with whom.

    Attributes:
        blocks: groups that are chosen together.
        locked: group name -> why it can't be cut, as a constraint can't be met otherwise.
        rules: what was requested of each group.
        full: [groups] their sizes, in the order of `graph.groups`.
    """

    def __init__(
        self, graph: DependencyGraph, scores: Mapping[str, Scores], round_to: int | str = 1, *, ratio: Any = None,
        scope: Any = None, max_ratio: float | None = None, normalise: str = "mean", ties: Sequence[Tie] = (),
        lost: Mapping[Axis, int] = MappingProxyType({}), threshold: float | None = None, granularity: str | None = None,
        within: Mapping[Axis, Bools] = MappingProxyType({}), around: Mapping[Axis, Bools] | None = None,
    ) -> None:  # fmt: skip
        """Order the moves of every block by `scores`.

        Args:
            graph: the dependency graph.
            scores: group name -> [units], the lowest go first.
            round_to: every parameter dim that shrinks keeps a multiple of this; or "auto" (see `aligned.py`).
            ratio: as `pruning_ratio` in `choose`, checked.
            scope: as there.
            max_ratio: the largest share of any group that may go.
            normalise: as there.
            ties: further constraints on counts.
            threshold: take the units whose normalised score is below this, instead of a ratio.
            lost: original axis -> units that an earlier plan took: ratios, caps and floors count them, too.
            granularity: which factor of a product is cut, "coarse" or "fine"; None: as the graph says.
            within: axis -> [units] what a larger plan takes: it goes here, too.
            around: axis -> [units] what a smaller plan takes: nothing else goes here.
        """
        self.graph, self.round_to, self.ratio, self.scope = graph, round_to, ratio, scope
        self.lost, self.threshold, self.within, self.around = lost, threshold, within, around
        groups, relations, locked = choose_groups(graph, ties, granularity)
        self.locked = {graph.by_axis[a].name: why for a, why in locked.items()}
        self._names = {g.axis: g.name for g in groups}
        relations = [r for r in relations if all(a in self._names for t in r for a in t)]
        alike: dict[tuple[Any, ...], list[str]] = {}
        for g in groups:
            fragment = g.axis.original_axis is not g.axis
            key = (g.axis.original_axis, structure(graph, g) if fragment else ())
            alike.setdefault(key, []).append(g.name)
        ranked = normalised(scores, list(alike.values()), normalise)
        levels = {g.axis: self._levels(g.axis) for g in groups}
        self.order = {g.axis: np.lexsort((scores[g.name], levels[g.axis])) for g in groups}
        if within:  # what goes anyway costs less than anything else
            low = min(float(s.min()) for s in ranked.values()) - 1
            ranked.update({g.name: np.where(levels[g.axis] < 0, low, ranked[g.name]) for g in groups})
        found = find_blocks(groups, relations)
        self.blocks = [b for b, _ in found]
        floors = Floors(graph, self._names)
        floors.spread({g.axis: i for i, b in enumerate(self.blocks) for g in b.groups})
        self.rules = rules_of(graph, groups, scope, ratio, max_ratio, lost)
        self._keep_ranks(graph)
        self._sequencer = Sequencer({a: ranked[self._names[a]][o] for a, o in self.order.items()}, floors)
        self._sums = self._dim_sums()
        self._check_multiples()
        for block, rules in found:
            self._sequencer.moves(block, rules)
            self._arrange(block, {})
        self._position = {a: i for i, a in enumerate(graph.by_axis)}
        self.full: Integers = np.array([g.units for g in graph.groups], dtype=np.int64)
        self._index()

    def _keep_ranks(self, graph: DependencyGraph) -> None:
        """Hold the ranks of updates that nobody asked for."""
        for axis in (
            graph.update_ranks & self._names.keys() - self.rules.ratios.keys() - self.rules.owner.keys()
        ):
            self.locked[self._names[axis]] = WHY
            self.rules.caps[axis.original_axis] = 0

    def _arrange(self, block: Block, caps: Mapping[Axis, int], soft: bool = True) -> None:
        """Put the moves of `block` in order, under `caps` (original axis -> units that may go) and the request.

        With `soft`, sizes that are best multiples are such at each of its allowed steps.
        """
        both = dict(self.rules.caps)
        both.update({p: min(n, both.get(p, n)) for p, n in caps.items()})
        self._sequencer.order(block, both)
        if self.around is not None:
            none = np.zeros(1, dtype=bool)
            most = min(
                int(np.searchsorted(gone, self.around.get(a, none).sum(), side="right")) - 1
                for a, gone in block.gone.items()
            )
            block.scores, block.taken = block.scores[:most], block.taken[:most]
            block.gone = {a: gone[: most + 1] for a, gone in block.gone.items()}
        block.allowed = self._allowed(block, soft)

    def _levels(self, axis: Axis) -> Integers:
        """[units] -1 for what goes in any case, 1 for what stays in any case, 0 for the others."""
        levels = np.zeros(axis.size, dtype=np.int64)
        if self.around is not None:
            levels[~self.around.get(axis, np.zeros(axis.size, dtype=bool))] = 1
        levels[self.within.get(axis, np.zeros(0, dtype=np.int64))] = -1
        return levels

    def _least(self) -> Integers:
        """[blocks] the steps after which all that `within` takes is gone.

        Raises:
            BudgetError: a block can't lose so much, as is asked for otherwise.
        """
        steps = np.zeros(len(self.blocks), dtype=np.int64)
        for i, block in enumerate(self.blocks):
            wanted = {a: self.within[a].sum() for a in block.gone if a in self.within}
            first = max((int(np.searchsorted(block.gone[a], n)) for a, n in wanted.items()), default=0)
            steps[i] = block.at_least(first)
            if steps[i] < first:
                raise BudgetError(
                    f"within takes more of {', '.join(block.names[:3])} than a ratio, a floor or a cap leaves to be taken"
                )
        return steps

    def _dim_sums(self) -> dict[Axis, dict[object, Rounding]]:
        """axis -> what dims that the axis is part of must be multiples of, each under a key."""
        sums: dict[Axis, dict[object, Rounding]] = {a: {} for a in self._names}

        def note(key: object, rounding: Rounding) -> None:
            for a in {a for t in rounding.size for a in t}:
                sums[a][key] = rounding

        if self.round_to == AUTO:
            for axis in channels(self.graph):
                note(axis, Rounding(polynomials.count(axis, self._names), STEP, False, soft=True))
        elif self.round_to != 1:
            for axis in parameter_dims(self.graph):
                note(axis, Rounding(polynomials.count(axis, self._names), int(self.round_to), False))
        for i, (_, axis, number) in enumerate(self.graph.multiples):
            note(i, Rounding(polynomials.count(axis, self._names), number, True))
        return sums

    def _check_multiples(self) -> None:
        """Refuse multiples that blocks would have to agree on."""
        block_of = {g.axis: i for i, b in enumerate(self.blocks) for g in b.groups}
        for place, axis, number in self.graph.multiples:
            terms = [{block_of[a] for a in t} for t in polynomials.count(axis, self._names)]
            apart = len(set().union(*terms)) > 1
            if any(len(t) > 1 for t in terms) or (apart and axis.find().size % number):
                raise InputError(
                    f"the {axis.find().size} indices of {place} belong to independently pruned groups: they can't be "
                    f"kept at a multiple of {number}\n  fix: state it for each of these groups"
                )

    def _allowed(self, block: Block, softly: bool) -> Integers:
        """Numbers of steps after which each dim of this block that must be a multiple is one."""
        steps = np.arange(len(block.scores) + 1)
        fine, soft = np.ones(len(steps), dtype=bool), np.ones(len(steps), dtype=bool)
        for rounding in {k: r for a in block.gone for k, r in self._sums[a].items()}.values():
            total, full = np.zeros(len(steps), dtype=np.int64), 0
            for term, n in rounding.size.items():
                if rounding.whole or any(a in block.gone for a in term):
                    part = np.full(len(steps), n)
                    for a in term:
                        part = part * (a.size - block.gone.get(a, 0))
                    total += part
                    full += n * prod(a.size + self.lost.get(a, 0) for a in term)
            if not rounding.soft:
                fine &= total % rounding.of == 0
            elif softly and full % rounding.of == 0:
                soft &= total % rounding.of == 0
        fine[0] = soft[0] = True
        gone = np.concatenate([[0], np.cumsum(block.taken)])
        even = np.diff(gone[fine & soft], append=gone[fine][-1])
        units = block.units + sum(self.lost.get(p, 0) for p in block.original_axes)
        return steps[fine & soft] if even.max() <= COARSE * units else steps[fine]

    # ------------------------------------------------------------------------------------------- states as arrays

    def _index(self) -> None:
        """Lay `gone` of all blocks out in one array, so that the counts at any steps are one look-up."""
        rows = [(self._position[a], i, gone) for i, b in enumerate(self.blocks) for a, gone in b.gone.items()]
        self._at = np.array([r[0] for r in rows], dtype=np.int64)
        self._block = np.array([r[1] for r in rows], dtype=np.int64)
        lengths = [len(r[2]) for r in rows]
        self._offset = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        self._gone = np.concatenate([r[2] for r in rows]) if rows else np.zeros(0, dtype=np.int64)

    def counts(self, steps: Integers) -> Integers:
        """[groups] units left after `steps` ([blocks])."""
        out = self.full.copy()
        out[self._at] -= self._gone[self._offset + steps[self._block]]
        return out

    def rounded_up(self, steps: Integers) -> Integers:
        """The first allowed numbers of steps from `steps` on."""
        if not any(self._sums.values()):
            return steps
        return np.array([b.at_least(int(n)) for b, n in zip(self.blocks, steps, strict=True)], dtype=np.int64)

    def density(self, block: Block, prices: Floats) -> Scores:
        """[steps] score per saved cost of each step of `block`, made non-decreasing; `prices`: [groups]."""
        saved = np.zeros(len(block.scores))
        for a, gone in block.gone.items():
            saved += prices[self._position[a]] * np.diff(gone)
        loss = block.scores * block.taken
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.where(saved > 0, loss / saved, np.inf)
        return np.maximum.accumulate(found) if len(found) else found

    # ------------------------------------------------------------------------------------------------- choosing

    def choose(self, budgets: Sequence[Budget] = (), per_cost: bool = False) -> Masks:
        """Which units stay; see `depgraph.choose`.

        Raises:
            BudgetError: the budgets can't be met.
        """
        if self.threshold is not None:
            below = [b.at_most(int(np.searchsorted(b.scores, self.threshold))) for b in self.blocks]
            return self.masks(np.maximum(np.array(below, dtype=np.int64), self._least()))
        steps = np.zeros(len(self.blocks), dtype=np.int64)
        competitions = competition_groups(
            self.graph, self.blocks, self.scope, self.ratio, self.rules, bool(budgets)
        )
        for competition in competitions:
            if competition.ratio is not None:
                self._cut(competition, competition.ratio, steps)
        self._index()
        steps = np.maximum(steps, self._least())
        if budgets:
            steps = meet(self, [f for f in competitions if f.ratio is None], steps, budgets, per_cost)
        return self.masks(steps)

    def _cut(self, competition: CompetitionGroup, ratio: float, steps: Integers) -> None:
        """Take `ratio` of the units of a competition group: of each original dim where nothing competes."""
        if len(competition.blocks) == 1:
            (i,) = competition.blocks
            block = self.blocks[i]
            caps = {
                p: self._aligned(p, self._to_go(ratio, sum(g.units for g in gs), self.lost.get(p, 0)))
                for p, gs in block.original_axes.items()
            }
            self._arrange(block, caps, soft=False)
            steps[i] = block.allowed[-1]
            return
        blocks = [self.blocks[i] for i in competition.blocks]
        owner = np.repeat(np.array(competition.blocks), [len(b.scores) for b in blocks])
        order = np.argsort(np.concatenate([b.scores for b in blocks]), kind="stable")
        taken = np.cumsum(np.concatenate([b.taken for b in blocks])[order])
        gone = sum(self.lost.get(p, 0) for b in blocks for p in b.original_axes)
        wanted = self._to_go(ratio, sum(b.units for b in blocks), gone)
        n = int(np.searchsorted(taken, wanted, side="right"))
        reached = np.bincount(owner[order[:n]], minlength=len(steps))
        for i, b in zip(competition.blocks, blocks, strict=True):
            steps[i] = b.nearest(int(reached[i])) if self.round_to == AUTO else b.at_most(int(reached[i]))

    def _to_go(self, ratio: float, units: int, lost: int) -> int:
        """How many of `units` go, where `lost` went before, for `ratio` of all to be gone."""
        return max(0, int(ratio * (units + lost) + 1e-9) - lost)

    def _aligned(self, axis: Axis, gone: int) -> int:
        """How many units of `axis` go where `gone` are asked for: one more or less where that leaves a multiple that runs faster."""
        best = any(r.soft and r.size == {(axis,): 1} for r in self._sums.get(axis, {}).values())
        whole = axis.size + self.lost.get(axis, 0)
        wide = whole % STEP == 0 and COARSE * whole >= STEP
        return nearest(axis.size, gone) if best and wide else gone

    def masks(self, steps: Integers) -> Masks:
        """group name -> bool array of the kept units, for the groups that lose some."""
        masks: Masks = {}
        for block, n in zip(self.blocks, steps, strict=True):
            for a, gone in block.gone.items():
                if gone[n]:
                    mask = np.ones(a.size, dtype=bool)
                    mask[self.order[a][: gone[n]]] = False
                    masks[self._names[a]] = mask
        return masks
