"""How many units must stay: in each axis, and in each dim that several axes make up together."""

from __future__ import annotations

from collections.abc import Iterable

from ..axes.axes import ATOM, CONCAT, Axis, atoms
from ..grouping.graph import DependencyGraph


class Floors:
    """The least that stays.

    Attributes:
        least: axis -> units (0 for fragments that are no dim by themselves).
        needs: sets of axes of which one unit must stay, as together they are a dim.
    """

    def __init__(self, graph: DependencyGraph, chosen: Iterable[Axis]) -> None:
        """For the axes in `chosen`."""
        self.least = dict.fromkeys(chosen, 0)
        needs: dict[tuple[Axis, ...], None] = {}
        seen: set[Axis] = set()
        for results in graph.state.dims.values():
            for dims in results:
                for axis in dims:
                    if axis is not None:
                        self._look(axis, seen, needs)
        for axis in self.least:
            if axis.original_axis.find() is axis:
                self.least[axis] = 1
        for axis, count in graph.state.at_least:
            self._hold(axis.find(), count)
        self.needs = [list(n) for n in needs if not any(self.least[a] for a in n)]

    def _look(self, axis: Axis, seen: set[Axis], needs: dict[tuple[Axis, ...], None]) -> None:
        """Note what a dim that ranges over `axis` needs."""
        axis = axis.find()
        if axis in seen:
            return
        seen.add(axis)
        if axis.kind == ATOM:
            if axis in self.least:
                self.least[axis] = 1
        elif axis.kind == CONCAT:
            parts = [p.find() for p in axis.parts]
            if all(p.kind == ATOM and p in self.least for p in parts):
                needs[tuple(dict.fromkeys(parts))] = None
            else:
                for p in parts:
                    if p.kind != ATOM:
                        self._look(p, seen, needs)
        else:
            for p in axis.parts:
                self._look(p, seen, needs)

    def _hold(self, axis: Axis, count: int) -> None:
        """`axis` keeps `count` indices: a factor its share of them, a piece of a whole all it has."""
        free = [a for a in dict.fromkeys(atoms(axis)) if a in self.least]
        for atom in free:
            shared = axis.kind == CONCAT or len(free) > 1
            least = atom.size if shared else -(-count * atom.size // axis.size)
            self.least[atom] = max(self.least[atom], least)

    def spread(self, block_of: dict[Axis, int]) -> None:
        """Where a dim is made of several blocks, which do not know of each other, its largest part keeps a unit."""
        for need in self.needs:
            if len({block_of[a] for a in need}) > 1:
                self.least[max(need, key=lambda a: a.size)] = 1
        self.needs = [n for n in self.needs if not any(self.least[a] for a in n)]
