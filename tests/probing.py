"""Rules on trial, each op by itself: what a rule states against what the op does to numbers.

A `Row` is one ATen call with concrete arguments. `Claim` runs depgraph's propagation over a graph of this one call in
which every tensor is a parameter, so nothing is frozen but by the rule itself. Three questions follow:

* `unequal`: units of what the rule leaves free are dropped from the inputs (and numbers that repeat a size repaired);
  the smaller call must give what the original gives with those entries zeroed, as `oracle.py` understands it.
* `dependent`: inputs are perturbed one index at a time. If an axis stands in the result, and the rule names no
  sum or statistic over it, then a unit may only reach entries at its own positions.
* `too_strict`: for what the rule freezes, perturbations and permutations say what the op really does to the dim.
  Only a dim whose positions are mixed has to stay.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from itertools import combinations
from typing import Any

import numpy as np
import torch
from oracle import is_inexact, live_elements_only, mark_live_, true_zeros
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from depgraph.axes import axes
from depgraph.axes.axes import ATOM, RAGGED, Axis
from depgraph.axes.op_call import Dims
from depgraph.grouping.propagate import propagate
from depgraph.plan.plan import Cut
from depgraph.tracing.recorder import write_record
from depgraph.tracing.size_uses import SizeUse
from depgraph.tracing.trace import Trace

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Size:
    """A number among the arguments that repeats a size, as `depgraph.tracing.size_uses.SizeUse` says it of traced calls.

    It counts the indices of a dim of result `out`, or those of argument `of` that stand before its value (from the end,
    where it is negative). `partly`: it counts so in a result too. With `dim` None it repeats what the rule says that it
    counts (the groups of a convolution).
    """

    value: int
    dim: int | None = None
    of: int | None = None
    out: int = 0
    partly: bool = False
    minus: bool = False  # minus the number of indices of argument `of` that stand before minus its value


size = Size


@dataclass(frozen=True, eq=False)
class Row:
    """One call of an op.

    `run` stands in for an op that this machine has no kernel for; `random`: no two calls agree; `buffers`: tensors of
    integers are buffers, and not computed from something whose axes are free; `held`: (argument, dim) whose indices
    go only together with values of other arguments, which one call can't show.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    run: Callable[..., Any] | None = None
    random: bool = False
    buffers: bool = False
    held: tuple[tuple[int, int], ...] = ()

    @property
    def rule(self) -> str:
        return self.op._schema.name

    @cached_property
    def plain(self) -> tuple[Any, Any]:
        """Its arguments with numbers as numbers."""
        return tree_map(lambda v: v.value if isinstance(v, Size) else v, (self.args, self.kwargs))

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Its tensor arguments."""
        return [t for t in tree_leaves(self.plain) if isinstance(t, Tensor)]

    @cached_property
    def results(self) -> list[Tensor]:
        """What the call returns."""
        return self.call(*self.plain)

    def with_tensors(self, other: dict[int, Tensor]) -> list[Tensor]:
        """The results with some tensor arguments replaced."""
        number = iter(range(len(self.tensors)))
        return self.call(*tree_map_only(Tensor, lambda v: other.get(next(number), v), self.plain))

    def call(self, args: Any, kwargs: Any) -> list[Tensor]:
        """The tensors that the op returns for copies of these arguments."""
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        with torch.no_grad():
            out = (self.run or self.op)(*args, **kwargs)
        return [t for t in tree_leaves(out) if isinstance(t, Tensor)]


class Claim:
    """What the rule of a row's op states about its arguments and results."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.tensors, self.results = row.tensors, row.results
        self.trace, self.node = self._graph()
        self.state = propagate(self.trace)
        self.inputs: list[Dims] = [self.state.dims[n][0] for n in self.trace.tensors.values()]
        self.outputs: list[Dims] = self.state.dims[self.node]
        self.refused = bool(self.state.unknown)

    def _graph(self) -> tuple[Trace, torch.fx.Node]:
        graph, nodes = torch.fx.Graph(), {}
        values: dict[str, Tensor] = {}

        def argument(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            name = f"t{len(nodes)}"
            node = nodes[name] = graph.create_node("get_attr", name)
            write_record(node, [value], kind="tensor")
            values[name] = value
            if is_inexact(value) or self.row.buffers:
                return node
            write_record(node, [value.double()], kind="tensor")
            cast = graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": value.dtype})
            write_record(cast, [value])
            return cast

        args, kwargs = tree_map(argument, self.row.plain)
        node = graph.create_node("call_function", self.row.op, args, kwargs)
        write_record(node, self.results, several=len(self.results) != 1)
        if len(self.results) == 1:
            graph.output(node)
        else:
            items = [graph.call_function(operator.getitem, (node, i)) for i in range(len(self.results))]
            for item, result in zip(items, self.results, strict=True):
                write_record(item, [result])
            graph.output(tuple(items))
        uses = [
            SizeUse("", s.value, s.value, node, s.dim % self.results[0].dim(), s.value, "", "", 0, ())
            for s in tree_leaves((self.row.args, self.row.kwargs))
            if isinstance(s, Size) and s.of is None and s.dim is not None and s.out == 0
        ]
        empty: dict[str, Any] = {f.name: [] for f in fields(Trace)}
        empty.update(aliases={}, constants={}, tensors=nodes, values=values, size_uses=uses, graph=graph)
        return Trace(**empty), node

    @cached_property
    def free(self) -> list[Axis]:
        """The atoms that the rule leaves free, in the order in which they are met."""
        found: dict[Axis, None] = {}
        held = {
            a
            for t, d in self.row.held
            for axis in self.inputs[t][d : d + 1]
            if axis
            for a in axes.atoms(axis)
        }
        for dims in (*self.inputs, *self.outputs):
            for axis in dims:
                for atom in axes.atoms(axis) if axis is not None else ():
                    if atom.frozen is None and atom not in held:
                        found[atom] = None
        return list(found)

    @cached_property
    def statistics(self) -> set[Axis]:
        """The atoms over which the rule says that the op takes a statistic."""
        return {a for axis in self.state.statistics.get(self.node, []) for a in axes.atoms(axis)}

    @cached_property
    def mixed(self) -> set[Axis]:
        """These, and those over which it says that the op sums."""
        summed = self.state.contracted.get(self.node, [])
        return self.statistics | {a for axis in summed for a in axes.atoms(axis)}

    # ------------------------------------------------------------------------------------------------ smaller calls

    def choices(self, generator: np.random.Generator) -> Iterator[dict[Axis, np.ndarray]]:
        """Masks to try: every free atom by itself, then all at once; counts that must be equal are."""
        for lone in [*([a] for a in self.free), self.free, self.free]:
            tied = self._tied(lone)
            for _ in range(30):
                masks = {a: _half(a.size, generator) for a in tied}
                if self._allowed(masks):
                    yield masks
                    break

    def _tied(self, lone: list[Axis]) -> list[Axis]:
        """`lone` with the atoms whose counts must follow."""
        chosen = dict.fromkeys(lone)
        for parts, _ in self.state.equal_counts:
            found = dict.fromkeys(a for p in parts for a in axes.atoms(p) if a.frozen is None)
            if found.keys() & chosen.keys():
                chosen.update(found)
        return list(chosen)

    def _allowed(self, masks: dict[Axis, np.ndarray]) -> bool:
        for parts, _ in self.state.equal_counts:
            if len({int(axes.kept(p, masks).sum()) for p in parts}) > 1:
                return False
        if any(axes.kept(axis, masks).sum() < n for axis, n in self.state.at_least):
            return False
        for _, (_, small, d), (_, large, e), _ in self.state.comparisons:  # rules state only what is narrower
            narrow, wide = (axes.kept(self.state.dims[n][0][i], masks) for n, i in ((small, d), (large, e)))
            if narrow.sum() >= wide.sum():
                return False
        alive = (
            axes.kept(p, masks).any()
            for dims in (*self.inputs, *self.outputs)
            for a in dims
            if a
            for p in _whole(a)
        )
        return all(alive)

    def cut(self, t: int, masks: dict[Axis, np.ndarray]) -> Cut:
        """What stays of tensor argument `t`."""
        numbered = self.state.renumbered.get(f"t{t}")
        numbers = None if numbered is None else np.flatnonzero(axes.kept(numbered, masks))
        return _cut(self.inputs[t], tuple(self.tensors[t].shape), masks, numbers)

    def smaller(self, masks: dict[Axis, np.ndarray]) -> tuple[Any, Any]:
        """The arguments with indices dropped and sizes repaired."""
        cuts = iter([self.cut(t, masks) for t in range(len(self.tensors))])

        def shrink(value: Any) -> Any:
            if isinstance(value, Tensor):
                return next(cuts).slice(value)
            return self._repaired(value, masks) if isinstance(value, Size) else value

        return tree_map(shrink, (self.row.args, self.row.kwargs))

    def _repaired(self, number: Size, masks: dict[Axis, np.ndarray]) -> int:
        if number.dim is None:
            counted = next(iter(self.state.counted.values()), None)
            return number.value if counted is None else int(axes.kept(counted, masks).sum())
        dims = self.outputs[number.out] if number.of is None else self.inputs[number.of]
        kept = axes.kept(dims[number.dim], masks)
        if number.of is None and not number.partly:
            return int(kept.sum())
        if number.minus:
            return -int(kept[: -number.value].sum())
        return -int(kept[number.value :].sum()) if number.value < 0 else int(kept[: number.value].sum())

    def zeroed(self, masks: dict[Axis, np.ndarray]) -> tuple[Any, Any]:
        """The arguments with the same entries zeroed, and live zeros marked."""
        cuts = iter([self.cut(t, masks).mask() for t in range(len(self.tensors))])

        def zero(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            mask = next(cuts)
            return mark_live_(value.masked_fill(~mask, 0), mask) if is_inexact(value) else value

        return tree_map(zero, self.row.plain)

    def unequal(self, seed: int = 0) -> str:
        """What a smaller call gives that the original with the same entries masked does not, or nothing."""
        generator = np.random.default_rng(seed)
        for masks in self.choices(generator):
            lost = {f"{a!r}": np.flatnonzero(~masks[a]).tolist() for a in self.free if a in masks}
            try:
                got = self.row.call(*self.smaller(masks))
            except Exception as error:  # noqa: BLE001
                return f"without {lost} the smaller call fails: {error}".splitlines()[0]
            zeroed = self.zeroed(masks)
            plain = self.row.call(*zeroed) if len(masks) == 1 else []
            with live_elements_only():
                expected = self.row.call(*zeroed)
            for i, (g, e) in enumerate(zip(got, expected, strict=True)):
                numbered = self.state.numbers.get((self.node, i))
                e = _cut(self.outputs[i], tuple(e.shape), masks).slice(e)
                if numbered is not None:
                    e = torch.searchsorted(torch.from_numpy(np.flatnonzero(axes.kept(numbered, masks))), e)
                if g.shape != e.shape:
                    return f"without {lost} result {i} is {tuple(g.shape)}, the rule says {tuple(e.shape)}"
                if self.row.random:
                    continue
                if not _close(g, e):
                    return f"without {lost} result {i} is not the original's with these masked"
                for p in plain[i : i + 1]:
                    if numbered is not None:
                        continue
                    p = _cut(self.outputs[i], tuple(p.shape), masks).slice(p)
                    if not _close(g, p) and not masks.keys() & self.statistics:
                        return f"a statistic over {lost} is not stated"
        return ""

    def dependent(self) -> str:
        """A unit that reaches entries beyond its own positions in a result, though the rule says that it can't."""
        for t, dims in enumerate(self.inputs):
            for d, axis in enumerate(dims):
                if axis is not None and axis.find().kind != RAGGED:
                    for atom in dict.fromkeys(axes.atoms(axis)):
                        if atom.frozen is None and atom not in self.mixed:
                            found = self._beyond(t, d, axis, atom)
                            if found:
                                return found
        return ""

    def _beyond(self, t: int, d: int, axis: Axis, atom: Axis) -> str:
        for k, dims in enumerate(self.outputs):
            at = [(e, axes.positions(a, atom)) for e, a in enumerate(dims) if a is not None]
            at = [(e, p) for e, p in at if p.shape[1]]
            reached = reach(self.row, t, d) if at else []
            for unit, places in enumerate(axes.positions(axis, atom) if reached else ()):
                beyond = torch.stack([reached[p][k] for p in places.tolist()]).any(0)
                for e, p in at:
                    beyond.index_fill_(e, torch.from_numpy(p[unit]), False)
                if beyond.any():
                    return f"index {unit} of dim {d} of argument {t} reaches entries of others in result {k}"
        return ""

    def too_strict(self) -> dict[str, str]:
        """``argument.dim`` -> what the op does to it and why the rule froze it, for dims frozen (in part) without need."""
        found = {}
        for t, dims in enumerate(self.inputs if self.results else ()):
            for d, axis in enumerate(dims):
                reasons = {a.frozen.text for a in axes.atoms(axis) if a.frozen} if axis is not None else set()
                if reasons - {"ranges over a table of integers"} and reach(self.row, t, d):
                    what = relation(self.row, t, d)
                    if what != "mixed":
                        found[f"{t}.{d}"] = f"{what}: {min(reasons)}"
        return found

    def facts(self) -> Any:
        """All that the rule said, in a form that can be compared."""
        number: dict[int, int] = {}

        def say(axis: Axis | None) -> Any:
            if axis is None:
                return None
            axis = axis.find()
            label = number.setdefault(axis, len(number)), axis.size
            return (*label, bool(axis.frozen)) if axis.kind == ATOM else (axis.kind, *map(say, axis.parts))

        state = self.state
        said = [[[say(a) for a in dims] for dims in results] for results in (self.inputs, self.outputs)]
        counts = [[say(a) for a in parts] for parts, _ in state.equal_counts]
        work = [[f if isinstance(f, int) else say(f) for f in factors] for _, factors in state.work]
        rest = [[say(a) for a in found.get(self.node, [])] for found in (state.contracted, state.statistics)]
        weights = [[say(a) for a in (*made, *used)] for _, made, used in state.weights]
        numbers = [(i, say(a)) for (n, i), a in state.numbers.items() if n is self.node]
        floors = [(say(a), count) for a, count in state.at_least]
        other = (
            [say(a) for a in state.counted.values()],
            [say(a) for a in state.renumbered.values()],
            self.node in state.filled,
        )
        return repr((said, counts, work, rest, weights, numbers, floors, other))


# ------------------------------------------------------------------------------------------------ what an op does, by numbers


@cache
def reach(row: Row, t: int, d: int) -> list[list[Tensor]]:
    """For every index of dim `d` of argument `t`, which entries of each result it reaches; [] if none can be told."""
    tensor = row.tensors[t]
    if row.random or not is_inexact(tensor) or not tensor.numel():
        return []
    generator = torch.Generator().manual_seed(0)
    return [_reached(row, t, d, i, generator) for i in range(tensor.shape[d])]


def _reached(row: Row, t: int, d: int, i: int, generator: torch.Generator) -> list[Tensor]:
    changed = [torch.zeros(r.shape, dtype=torch.bool) for r in row.results]
    for _ in range(3):
        other = row.tensors[t].clone()
        part = other.select(d, i)
        part.mul_(torch.rand(part.shape, generator=generator, dtype=torch.float64).to(other.dtype) * 3 + 0.01)
        for k, (new, old) in enumerate(zip(row.with_tensors({t: other}), row.results, strict=True)):
            changed[k] |= ~_same(new, old) if new.shape == old.shape else True
    return changed


@cache
def relation(row: Row, t: int, d: int) -> str:
    """What the op does to a dim of an argument: "kept", "summed", "mixed" ..."""
    reached = reach(row, t, d)
    if not any(r.any() for result in reached for r in result):
        return "unused"
    for k, result in enumerate(row.results):
        for e in range(result.dim()):
            rest = tuple(x for x in range(result.dim()) if x != e)
            hits = [r[k].any(dim=rest) if rest else r[k] for r in reached]
            sets = [frozenset(hit.nonzero().flatten().tolist()) for hit in hits]
            if sum(map(len, sets)) == len(frozenset().union(*sets)) and any(sets):
                return _shape_of(sets, result.shape[e])
    return "summed" if _symmetric(row, t, d) else "mixed"


def _symmetric(row: Row, t: int, d: int) -> bool:
    """Whether the order of the dim's indices is of no account, if some other dims are put into the same order."""
    tensors, results = row.tensors, row.results
    n = tensors[t].shape[d]
    order = torch.roll(torch.randperm(n, generator=torch.Generator().manual_seed(1)), 1)
    order = order.flip(0) if torch.equal(order, torch.arange(n)) else order
    others = [
        (u, e) for u, x in enumerate(tensors) for e in range(x.dim()) if x.shape[e] == n and (u, e) != (t, d)
    ]
    places = [(k, e) for k, r in enumerate(results) for e in range(r.dim()) if r.shape[e] == n]
    for partners in _subsets(others, 4):
        moved = {u: tensors[u] for u, _ in ((t, d), *partners)}
        for u, e in ((t, d), *partners):
            moved[u] = moved[u].index_select(e, order)
        try:
            new = row.with_tensors(moved)
        except Exception:  # noqa: BLE001  an index that is out of range now
            continue
        for where in _subsets(places, 3):
            old = list(results)
            for k, e in where:
                old[k] = old[k].index_select(e, order)
            if all(_close(a, b) for a, b in zip(new, old, strict=True)):
                return True
    return False


def _subsets(items: list[Any], most: int) -> Iterator[tuple[Any, ...]]:
    for count in range(min(len(items), most) + 1):
        yield from combinations(items, count)


def _half(n: int, generator: np.random.Generator) -> np.ndarray:
    """A mask of `n` units that keeps about half of them; a lone unit goes or stays."""
    mask = np.zeros(n, dtype=bool)
    mask[generator.permutation(n)[: (n + 1) // 2 if n > 1 else generator.integers(2)]] = True
    return mask


def _whole(axis: Axis) -> list[Axis]:
    return list(axis.find().parts) if axis.find().kind == RAGGED else [axis]


def _cut(dims: Dims, shape: tuple[int, ...], masks: dict[Axis, np.ndarray], numbers: Any = None) -> Cut:
    keep: list[Any] = []
    blocks = None
    for axis in dims:
        if axis is not None and axis.find().kind == RAGGED:
            blocks = [np.flatnonzero(axes.kept(p, masks)) for p in axis.find().parts]
            keep.append(None)
        else:
            keep.append(None if axis is None else np.flatnonzero(axes.kept(axis, masks)))
    return Cut(shape, tuple(keep), blocks, numbers)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not is_inexact(b):
        return torch.equal(a, b)
    a, b = true_zeros(a.clone()), true_zeros(b.clone())
    tolerance = TOLERANCE if a.dtype in (torch.float64, torch.complex128) else 2e-2
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def _same(a: Tensor, b: Tensor) -> Tensor:
    if not is_inexact(b):
        return a == b
    return torch.isclose(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


def _shape_of(sets: list[frozenset[int]], n: int) -> str:
    """What kind of map leads from an index to the indices that it reaches: sets are disjoint."""
    used = [(i, s) for i, s in enumerate(sets) if s]
    if any(len(s) > 1 for _, s in used):
        runs = all(max(s) - min(s) + 1 == len(s) for _, s in used)
        return "outer factor" if runs else "inner factor"
    steps = {min(s) - i for i, s in used}
    if len(steps) == 1:
        return "kept" if len(used) == n else "a segment"
    return "permuted"
