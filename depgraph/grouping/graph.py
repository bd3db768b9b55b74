"""Propagation -> DependencyGraph: groups of units that can only be removed together, and what is frozen and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
import numpy.typing as npt
import torch

from ..axes import axes, polynomials
from ..axes.axes import RAGGED, Axis, Reason
from ..axes.nodes import leaves_of
from ..axes.op_call import DimFacts, Dims
from ..axes.polynomials import Polynomial
from ..base.errors import InputError
from ..config.origin import Origins, origins
from ..tracing.trace import Node, Trace
from .members import Group, Indices, Member, Role, places_of, roles_of
from .naming import NAMING, Place, axis_at, named
from .siblings import follow_siblings
from .sizes import SizeSystem

GRANULARITIES = ("coarse", "fine")


@dataclass(frozen=True)
class Frozen:
    """Indices of a tensor dim that can't be removed, and why.

    Attributes:
        name: the parameter or buffer.
        dim: which of its dims.
        count: how many of its indices.
        reason: why.
    """

    name: str
    dim: int
    count: int
    reason: Reason


class DependencyGraph:
    """Groups, constraints and locks of one model.

    Attributes:
        trace: the recorded run.
        groups: what can be removed, a `Group` each, largest first in the order of the model.
        tensors: name -> `torch.Tensor`, every parameter, buffer and plain tensor attribute, the user's own.
        constraints: polynomials in the counts of group axes that must stay 0.
        granularity: "coarse" or "fine": which factor of a product is cut (see `select/factors.py`); None: coarse, and fine
            where a budget can't be met otherwise.
        multiples: what `multiple_of` was told: the place, its axis, and the number.
        followed: members of module lists that no run called, with the executed sibling whose axes they have.
    """

    def __init__(self, state: DimFacts, model: torch.nn.Module, ignore: Sequence[str] = ()) -> None:
        """Read the atoms off `state`; `ignore`: names or globs of modules, parameters or buffers to leave alone."""
        self.state = state
        self.trace: Trace = state.trace
        self.tensors = {n: t for n, t in self.trace.values.items() if n not in self.trace.constants}
        self.model = model
        self.granularity: str | None = None
        self.multiples: list[tuple[str, Axis, int]] = []
        self.followed = follow_siblings(state, model)
        self._dims: dict[str, Dims] = {n: state.dims[node][0] for n, node in self.trace.tensors.items()}
        _ignore(self, ignore)
        _hold_parametrized(self)
        _mark_channels(state)
        self.sizes = SizeSystem(state, model)
        for sibling in self.followed:
            self.sizes.follow(sibling.path, sibling.executed)
        self.groups = self._find_groups()
        self.by_axis = {id(g.axis): g for g in self.groups}
        self.multiples += [
            (self.by_axis[id(axis)].name, axis, number)
            for axis, number in self.sizes.multiples
            if id(axis) in self.by_axis
        ]
        self._freeze_determined()

    # ------------------------------------------------------------------------------------------------- reading

    def dims(self, name: str) -> Dims:
        """The axes of the parameter or buffer `name`; empty for one that no trace reached."""
        return self._dims.get(self.trace.aliases.get(name, name), [])

    @cached_property
    def _roles(self) -> dict[tuple[int, Node, int], Role]:
        return roles_of(self.state)

    def output_dim(self, name: str) -> int:
        """The dim of parameter `name` that it produces: its layer's width. 0 for one that only scales."""
        node = self.trace.tensors.get(self.trace.aliases.get(name, name))
        for d, axis in enumerate(self.dims(name)):
            leaves = axes.atoms(axis) if axis is not None else []
            if node is not None and any(self._roles.get((id(a), node, d)) == "produces" for a in leaves):
                return d
        return 0

    @cached_property
    def origins(self) -> Origins:
        """What the numbers in the model were computed from, where it keeps what it was built from."""
        return origins(self.model)

    @property
    def free(self) -> dict[int, Axis]:
        """The axes of all groups by id."""
        return {id(g.axis): g.axis for g in self.groups}

    @property
    def constraints(self) -> list[tuple[Polynomial, Reason]]:
        """Polynomials in the counts of group axes that must stay zero, each with the reason."""
        free = self.free
        found = [(self.sizes.reduce(p, free), why) for p, why in self.sizes.constraints]
        for parts, why in self.state.equal_counts:
            counts = [polynomials.count(p, free) for p in parts]
            found.extend((polynomials.minus(c, counts[0]), why) for c in counts[1:])
        unique = {tuple(sorted(p.items())): (p, why) for p, why in found if p}
        return list(unique.values())

    @property
    def frozen(self) -> list[Frozen]:
        """Every frozen part of every parameter and buffer dim, with its reason."""
        found = []
        for name, dims in self._dims.items():
            for d, axis in enumerate(dims):
                for atom in dict.fromkeys(axes.atoms(axis)) if axis is not None else ():
                    if atom.frozen is not None:
                        found.append(Frozen(name, d, atom.size, atom.frozen))
        for name in self.trace.unreached:
            for d, n in enumerate(self.tensors[name].shape):
                found.append(
                    Frozen(name, d, n, Reason("belongs to a tensor that the traced run did not use"))
                )
        return found

    def freeze(self, found: Iterable[Axis], reason: Reason) -> None:
        """Freeze axes after the fact (verification does) and drop their groups.

        Args:
            found: the axes; of a group, its `axis`.
            reason: what `frozen` and reports say.
        """
        for axis in found:
            for atom in axes.atoms(axis):
                atom.frozen = atom.frozen or reason
        self.groups = [g for g in self.groups if g.axis.frozen is None]
        self.by_axis = {id(g.axis): g for g in self.groups}

    @contextmanager
    def unfreezing(self) -> Iterator[None]:
        """What `freeze` freezes in the meantime is free again afterwards: several plans start from one graph."""
        groups = list(self.groups)
        try:
            yield
        finally:
            for group in groups:
                group.axis.frozen = None
            self.groups = groups
            self.by_axis = {id(g.axis): g for g in groups}

    # ------------------------------------------------------------------------------------------------- stating

    def lock(self, place: Place, why: str = "is locked as asked") -> None:
        """No index at `place` may go.

        Args:
            place: a group, or a dim as ``"tensor:dim"``, with all dims that it is coupled with.
            why: the reason that reports give, after "... stays whole: it".

        Raises:
            InputError: there is no such place.
        """
        self.freeze([axis_at(self, place)], Reason(why))
        self._freeze_determined()

    def at_least(self, place: Place, count: int) -> None:
        """`count` indices at `place` must stay.

        Raises:
            InputError: there is no such place, or it has fewer.
        """
        axis = axis_at(self, place)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= axis.size:
            raise InputError(
                f"at_least must be a whole number from 1 to the {axis.size} of {place!r}, not {count!r}"
            )
        self.state.at_least.append((axis, count))

    def multiple_of(self, place: Place, number: int) -> None:
        """As many indices stay at `place` as are a multiple of `number`, unless all stay.

        Raises:
            InputError: there is no such place, or `number` is none.
        """
        axis = axis_at(self, place)
        if isinstance(number, bool) or not isinstance(number, int) or not 0 < number <= axis.size:
            raise InputError(
                f"multiple_of must be a whole number from 1 to the {axis.size} of {place!r}, not {number!r}"
            )
        self.multiples.append((place.name if isinstance(place, Group) else place, axis, number))

    def equal_counts(
        self, places: Sequence[Place], why: str = "keeps as many indices as others, as asked"
    ) -> None:
        """Equally many indices stay at all of `places`, though not the same ones.

        Args:
            places: groups, or dims as ``"tensor:dim"``.
            why: the reason that reports give.

        Raises:
            InputError: there is no such place, or they have different sizes already.
        """
        found = [axis_at(self, place) for place in places]
        if len({axis.size for axis in found}) > 1:
            sizes = ", ".join(f"{place} {axis.size}" for place, axis in zip(places, found, strict=True))
            raise InputError(f"equal_counts of places that have different sizes: {sizes}")
        self.state.equal_counts.append((found, Reason(why)))
        self._freeze_determined()

    def _freeze_determined(self) -> None:
        """Freeze the axes whose count a constraint on nothing else determines, and what then follows."""
        while True:
            alone = [
                (atoms, why) for p, why in self.constraints if len(atoms := {a for t in p for a in t}) == 1
            ]
            if not alone:
                return
            free = self.free
            for atoms, why in alone:
                self.freeze([free[a] for a in atoms], why)

    def coupled(self, name: str, dim: int, indices: Iterable[int]) -> dict[str, torch.Tensor]:
        """Everything that must go with `indices` of dim `dim` of tensor `name`.

        Where an index is a combination of two axes (head, position in the head), the one is removed whose indices are
        all given, else the one with the most units.

        Args:
            name: a parameter or buffer.
            dim: which dim.
            indices: positions on it.

        Returns:
            tensor name -> bool tensor of its shape, True where an entry must go.

        Raises:
            InputError: the tensor is unknown, an index is out of range, or frozen (the reason is given).
        """
        dims = self.dims(name)
        if not dims or not -len(dims) <= dim < len(dims):
            raise InputError(f"{name!r} has no dim {dim}, or no traced run used it")
        axis = dims[dim]
        size = 1 if axis is None else axis.size
        wanted = np.zeros(size, dtype=bool)
        given = np.asarray(list(indices), dtype=np.int64)
        if given.size and (given.max() >= size or given.min() < -size):
            raise InputError(f"indices of {name!r} dim {dim} must be below {size}")
        wanted[given] = True
        masks: dict[int, npt.NDArray[np.bool_]] = {}
        candidates = sorted(
            (a for a in dict.fromkeys(axes.atoms(axis)) if a.frozen is None) if axis else [],
            key=lambda a: -a.size,
        )
        for whole in (True, False):
            for atom in candidates:
                at = axes.positions(axis, atom) if axis is not None else np.zeros((0, 0), dtype=np.int64)
                hit = wanted[at].all(1) if whole else wanted[at].any(1)
                if at.shape[1] and hit.any():
                    masks[id(atom)] = masks.get(id(atom), np.ones(atom.size, dtype=bool)) & ~hit
                    wanted[at[hit].reshape(-1)] = False
        if wanted.any():
            reasons = {str(a.frozen) for a in (axes.atoms(axis) if axis is not None else []) if a.frozen}
            raise InputError(
                f"{name!r} dim {dim} can't lose these indices: {'; '.join(sorted(reasons)) or 'size 1'}"
            )
        gone = {}
        for other in self._dims:
            mask = self.mask(other, masks)
            if mask is not None:
                gone[other] = ~mask
        return gone

    def keeps(
        self, name: str, masks: dict[int, npt.NDArray[np.bool_]]
    ) -> tuple[list[Indices | None], list[Indices] | None]:
        """What stays of a tensor.

        Args:
            name: a parameter or buffer, by its first name.
            masks: group key -> bool array of the kept units, as `choose` gives them.

        Returns:
            the kept indices of each dim, None for all of them; and None, or the kept indices of dim 1 for each block of dim 0
            (grouped convolutions).
        """
        per_dim: list[Indices | None] = []
        blocks: list[Indices] | None = None
        for axis in self._dims[name]:
            if axis is None:
                per_dim.append(None)
                continue
            root = axis.find()
            if root.kind == RAGGED:
                kept = [axes.kept(p, masks) for p in root.parts]
                if not all(k.all() for k in kept):
                    blocks = [np.flatnonzero(k) for k in kept]
                per_dim.append(None)
                continue
            mask = axes.kept(root, masks)
            per_dim.append(None if mask.all() else np.flatnonzero(mask))
        return per_dim, blocks

    def mask(self, name: str, masks: dict[int, npt.NDArray[np.bool_]]) -> torch.Tensor | None:
        """Bool tensor of the shape of tensor `name`, True where kept; None where nothing goes. `masks` as for `keeps`."""
        from ..plan.plan import Cut  # noqa: PLC0415

        per_dim, blocks = self.keeps(name, masks)
        if blocks is None and all(k is None for k in per_dim):
            return None
        return Cut(tuple(self.tensors[name].shape), tuple(per_dim), blocks).mask()

    def to_networkx(self) -> nx.MultiGraph:
        """A graph whose nodes are tensor dims (``"conv.weight:0"``) and groups, an edge where a group holds a dim."""
        graph = nx.MultiGraph()
        for name, dims in self._dims.items():
            for d, axis in enumerate(dims):
                atoms_ = axes.atoms(axis) if axis is not None else []
                why = next((str(a.frozen) for a in atoms_ if a.frozen), None)
                graph.add_node(f"{name}:{d}", kind="dim", size=1 if axis is None else axis.size, frozen=why)
        for i, group in enumerate(self.groups):
            node = f"group {i}"
            graph.add_node(node, kind="group", units=group.units, name=group.name)
            for m in group.members:
                graph.add_edge(node, f"{m.name}:{m.dim}", role=m.role)
        return graph

    def lock_summary(self) -> Counter[Reason]:
        """Reason -> number of parameters whose every dim is frozen and that it locks (by its largest locked dim)."""
        total: Counter[Reason] = Counter()
        for name, tensor in self.tensors.items():
            if not tensor.is_floating_point() or name in self.trace.held:
                continue
            dims = self._dims.get(name)
            if dims is None:
                total[Reason("belongs to a tensor that the traced run did not use")] += tensor.numel()
                continue
            leaves = [a for axis in dims if axis is not None for a in axes.atoms(axis)]
            if leaves and all(a.frozen for a in leaves):
                largest = max(leaves, key=lambda a: a.size)
                total[largest.frozen or Reason("")] += tensor.numel()
        return total

    # ------------------------------------------------------------------------------------------------ building

    def _find_groups(self) -> list[Group]:
        groups: dict[int, Group] = {}
        places: dict[int, list[tuple[Axis, Indices]]] = {}  # many tensors share an axis
        roles = self._roles
        for name, dims in self._dims.items():
            node = self.trace.tensors[name]
            for d, axis in enumerate(dims):
                if axis is None:
                    continue
                root = axis.find()
                whole = root.kind == RAGGED
                pieces = enumerate(root.parts) if whole else [(0, root)]
                rows = (1 if dims[0] is None else dims[0].size) // len(root.parts) if whole else 0
                for b, piece in pieces:
                    found = places.get(id(piece.find()))
                    if found is None:
                        found = places[id(piece.find())] = places_of(piece.find())
                    for atom, indices in found:
                        if atom.frozen is not None:
                            continue
                        group = groups.setdefault(id(atom), Group(atom))
                        role = roles.get((id(atom), node, d), "scales")
                        bounds = (b * rows, (b + 1) * rows) if whole else None
                        group.members.append(Member(name, d, indices, role, bounds))
        return list(groups.values())


def _mark_channels(state: DimFacts) -> None:
    """Only an axis that some weight produces or consumes is a channel; other free axes are left alone."""
    for operand, produced, consumed in state.weights:
        if leaves_of(operand):
            for axis in (*produced, *consumed):
                for atom in axes.atoms(axis) if axis is not None else ():
                    atom.channel = True
    reason = Reason("is no channel: no weight produces or consumes it (learned tokens, positions, buffers)")
    for results in state.dims.values():
        for dims in results:
            for axis in dims:
                for atom in axes.atoms(axis) if axis is not None else ():
                    if not atom.channel and atom.frozen is None:
                        atom.frozen = reason


def _hold_parametrized(graph: DependencyGraph) -> None:
    """Freeze the axes of a parametrized weight that its originals lack.

    They come from a tensor of the parametrization's own (the base of an orthogonal matrix, say): the weight would
    shrink and its original would not, and whatever the parametrization promises would no longer hold.
    """
    names = [*graph.tensors, *graph.trace.aliases]
    for path, node in graph.trace.parametrized:
        originals = [graph.dims(n) for n in names if n.startswith(f"{path}.original")]
        known = {id(a) for dims in originals for axis in dims if axis is not None for a in axes.atoms(axis)}
        reason = Reason("is no axis of the original that a parametrization makes this weight of", "", path)
        for axis in graph.state.dims[node][0]:
            for atom in axes.atoms(axis) if axis is not None else ():
                if id(atom) not in known:
                    atom.frozen = atom.frozen or reason


def _ignore(graph: DependencyGraph, patterns: Sequence[str]) -> None:
    """Freeze every dim of the tensors that `patterns` name: a module path, a tensor name, or a glob of either."""
    unknown = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hit, known = named(graph, pattern)
        if not known:
            unknown.append(pattern)
        reason = Reason(f"is ignored as asked ({pattern!r})")
        for name in hit:
            for axis in graph.dims(name):
                for atom in axes.atoms(axis) if axis is not None else ():
                    atom.frozen = atom.frozen or reason
    if unknown:
        raise InputError(f"ignore names nothing in this model: {', '.join(map(repr, unknown))}\n{NAMING}")
