"""Propagation -> DependencyGraph: groups of units that can only be removed together, and what is frozen and why."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ..axes import axes, polynomials
from ..axes.axes import AtomMasks, Axis, Reason
from ..axes.op_call import DimFacts, Dims
from ..axes.polynomials import Polynomial
from ..axes.ragged import is_ragged, kept_by_block, pieces
from ..base.checks import whole_number
from ..base.errors import InputError, suggestions
from ..base.weights import InMemory, Weights
from ..config.arguments import Rebuilt
from ..config.origin import Origins, origins
from ..plan.plan import Cut
from ..surgery.on_demand import Recent, standing_in
from ..tracing.trace import Node, Trace
from .given import Place, axis_at, checked_indices, checked_masks, first_name
from .members import Group, Indices, Member, Role, named_groups, places_of, roles_of
from .naming import NAMING, Name, given_names, name_in, named
from .ranks import update_ranks
from .siblings import follow_siblings
from .sizes import SizeSystem, is_constant
from .unread import unread_sizes

if TYPE_CHECKING:
    import networkx as nx

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
    """Groups, constraints and locks of one model. Nothing changes in it once it is made.

    Attributes:
        trace: the recorded run.
        groups: what can be removed, a `Group` each, in the order of the model.
        by_axis: the same by their axes.
        named: name -> every group that was found, those that were frozen afterwards, too.
        tensors: name -> `torch.Tensor`, every parameter, buffer and plain tensor attribute, the user's own.
        weights: where their values come from.
        constraints: polynomials in the counts of group axes that must stay 0.
        granularity: "coarse" or "fine": which factor of a product is cut (see `select/factors.py`); None: coarse, and fine
            where a budget can't be met otherwise.
        multiples: what `multiple_of` was told, and forward tests: the place, its axis, and the number.
        meets_literals: whether numbers of unknown origin repeat a size, or are compared with one, which could change.
        followed: members of module lists that no run called, with the executed sibling whose axes they have.
    """

    def __init__(
        self, state: DimFacts, model: torch.nn.Module, ignore: Name | Sequence[Name] = (), granularity: str | None = None,
    ) -> None:  # fmt: skip
        """Read the atoms off `state`.

        Args:
            state: what the rules said.
            model: the model that was traced.
            ignore: names or globs of modules, parameters or buffers to leave alone.
            granularity: as for `analyze`.
        """
        self.state = state
        self.trace: Trace = state.trace
        self.tensors = {n: t for n, t in self.trace.values.items() if n not in self.trace.constants}
        self.model = model
        self.weights: Weights = InMemory(self.tensors)
        self.granularity = granularity
        self.multiples: list[tuple[str, Axis, int]] = []
        self.followed = follow_siblings(state, model)
        self._dims: dict[str, Dims] = {n: state.dims[node][0] for n, node in self.trace.tensors.items()}
        _ignore(self, ignore)
        _hold_parametrized(self)
        _mark_channels(state)
        self.sizes = SizeSystem(state, model)
        for sibling in self.followed:
            self.sizes.follow(sibling.path, sibling.executed)
        self.rebuilt: dict[Any, Rebuilt | None] = {}  # see `unread.py`
        self._finished = False
        self._frozen: dict[Axis, Reason] = {}  # since the groups are known
        self.groups = self._find_groups()
        self.named = {g.name: g for g in self.groups}
        self.by_axis = {g.axis: g for g in self.groups}
        self.multiples += [
            (self.by_axis[axis].name, axis, number)
            for axis, number in self.sizes.multiples
            if axis in self.by_axis
        ]
        self._freeze_determined()
        self.meets_literals = self._freeze_open_literals() or self.sizes.meets_literals

    # ------------------------------------------------------------------------------------------------- reading

    def dims(self, name: str) -> Dims:
        """The axes of the parameter or buffer `name`; empty for one that no trace reached."""
        return self._dims.get(self.trace.aliases.get(name, name), [])

    @cached_property
    def running(self) -> torch.nn.Module:
        """`model`; where its parameters are elsewhere a copy, which makes each of `weights` when it is used."""
        if self.elsewhere is None:
            return self.model
        return standing_in(self.model, self.elsewhere, Recent(self.elsewhere.room))

    @property
    def elsewhere(self) -> Weights | None:
        """`weights`, where they are not what the model's tensors hold."""
        return None if isinstance(self.weights, InMemory) else self.weights

    @cached_property
    def _roles(self) -> dict[tuple[Axis, Node, int], Role]:
        return roles_of(self.state)

    def output_dim(self, name: str) -> int:
        """The dim of parameter `name` that it produces: its layer's width. 0 for one that only scales."""
        node = self.trace.tensors.get(self.trace.aliases.get(name, name))
        for d, axis in enumerate(self.dims(name)):
            leaves = axes.atoms(axis) if axis is not None else []
            if node is not None and any(self._roles.get((a, node, d)) == "produces" for a in leaves):
                return d
        return 0

    @cached_property
    def origins(self) -> Origins:
        """What the numbers in the model were computed from, where it keeps what it was built from."""
        return origins(self.model)

    @cached_property
    def update_ranks(self) -> frozenset[Axis]:
        """The axes that are ranks of low-rank updates: see `ranks.py`."""
        return update_ranks(self)

    @cached_property
    def unread(self) -> dict[tuple[Any, ...], list[Polynomial]]:
        """Attributes that repeat sizes and that forward does not read: see `unread.py`."""
        return unread_sizes(self)

    @property
    def constraints(self) -> list[tuple[Polynomial, Reason]]:
        """Polynomials in the counts of group axes that must stay zero, each with the reason."""
        found = [(self.sizes.reduce(p, self.by_axis), why) for p, why in self.sizes.constraints]
        for parts, why in self.state.equal_counts:
            counts = [polynomials.count(p, self.by_axis) for p in parts]
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
                    if (why := self.reason(atom)) is not None:
                        found.append(Frozen(name, d, atom.size, why))
        for name in self.trace.unreached:
            for d, n in enumerate(self.tensors[name].shape):
                found.append(Frozen(name, d, n, Reason("belongs to a tensor that no traced run used")))
        return found

    def group(self, name: str) -> Group:
        """The group `name`.

        Raises:
            InputError: there is no such group.
        """
        if not isinstance(name, str) or name not in self.named:
            raise InputError(
                f"{name!r} is not a group of this graph, which has {suggestions(name, self.named)}"
            )
        return self.named[name]

    def reason(self, atom: Axis) -> Reason | None:
        """Why no index of `atom` may go; None where it is free."""
        return self._frozen.get(atom) or atom.frozen

    def without(self, groups: Iterable[str], reason: Reason) -> DependencyGraph:
        """The graph in which `groups` (by name) are frozen, too, for `reason`; this one stays as it is.

        Raises:
            InputError: there is no such group.
        """
        view = copy.copy(self)
        view._frozen = dict(self._frozen)
        view._freeze([self.group(name).axis for name in groups], reason)
        return view

    def rounded(self, groups: Iterable[str], number: int) -> DependencyGraph:
        """The graph in which as many units of each of `groups` (by name) stay as are a multiple of `number`.

        Raises:
            InputError: there is no such group.
        """
        view = copy.copy(self)
        view.multiples = [*self.multiples, *((name, self.group(name).axis, number) for name in groups)]
        return view

    # ------------------------------------------------------------------------------------------------- stating

    def finish(self, constraints: Iterable[Callable[[DependencyGraph], Any]]) -> DependencyGraph:
        """This graph, in which the functions `constraints` have stated what else must hold: nothing changes any more."""
        for constraint in constraints:
            constraint(self)
        self._finished = True
        return self

    def lock(self, place: Place, why: str = "is locked by a constraint") -> None:
        """No index at `place` may go. Like the next three, for the functions that `analyze` takes as `constraints`.

        Args:
            place: a group or its name, or a dim as ``"tensor:dim"``, with all dims that it is coupled with.
            why: the reason that reports give, after "... stays whole: it".

        Raises:
            InputError: there is no such place; or the graph is finished.
        """
        self._take("lock", why)
        self._freeze([axis_at(self, place)], Reason(why))
        self._freeze_determined()

    def at_least(self, place: Place, count: int) -> None:
        """`count` indices at `place` must stay.

        Raises:
            InputError: there is no such place, or it has fewer; or the graph is finished.
        """
        self._take("at_least")
        axis = axis_at(self, place)
        self.state.at_least.append((axis, whole_number(f"at_least of {place!r}", count, 1, axis.size)))

    def multiple_of(self, place: Place, number: int) -> None:
        """As many indices stay at `place` as are a multiple of `number`, unless all stay.

        Raises:
            InputError: there is no such place, or `number` is none; or the graph is finished.
        """
        self._take("multiple_of")
        axis = axis_at(self, place)
        name = place.name if isinstance(place, Group) else place
        self.multiples.append((name, axis, whole_number(f"multiple_of {place!r}", number, 1, axis.size)))

    def equal_counts(
        self, places: Sequence[Place], why: str = "keeps as many indices as others, by a constraint"
    ) -> None:
        """Equally many indices stay at all of `places`, though not the same ones.

        Args:
            places: two or more groups, or dims as ``"tensor:dim"``.
            why: the reason that reports give.

        Raises:
            InputError: there is no such place, or they have different sizes already; or the graph is finished.
        """
        self._take("equal_counts", why)
        if isinstance(places, (str, Group)) or not isinstance(places, Sequence) or len(places) < 2:
            raise InputError(f"equal_counts needs a list of at least two places, not {places!r}")
        found = [axis_at(self, place) for place in places]
        if len({axis.size for axis in found}) > 1:
            sizes = ", ".join(f"{place} {axis.size}" for place, axis in zip(places, found, strict=True))
            raise InputError(f"equal_counts of places with different sizes: {sizes}")
        self.state.equal_counts.append((found, Reason(why)))
        self._freeze_determined()

    def _take(self, name: str, why: object = "") -> None:
        """Refuse a statement about a finished graph."""
        if self._finished:
            raise InputError(
                f"this graph is finished and can't be changed: {name} was called too late\n"
                f"  fix: analyze(model, example_inputs, constraints=lambda graph: graph.{name}(...))"
            )
        if not isinstance(why, str):
            raise InputError(f"the reason for {name} must be a text, not {why!r}")

    def _freeze(self, found: Iterable[Axis], reason: Reason) -> None:
        """Freeze axes whose groups are known, and drop these."""
        for axis in found:
            for atom in axes.atoms(axis):
                if self.reason(atom) is None:
                    self._frozen[atom] = reason
        self.groups = tuple(g for g in self.groups if g.axis not in self._frozen)
        self.by_axis = {g.axis: g for g in self.groups}

    def _freeze_determined(self) -> None:
        """Freeze the axes whose count a constraint on nothing else determines, and what then follows."""
        while alone := [
            (atoms, why) for p, why in self.constraints if len(atoms := {a for t in p for a in t}) == 1
        ]:
            for atoms, why in alone:
                self._freeze(atoms, why)

    def _freeze_open_literals(self) -> bool:
        """Freeze the axes whose size a number of unknown origin repeats; whether there are any."""
        found = False
        for literal in self.sizes.literals:
            target = self.sizes.reduce(literal.target, self.by_axis)
            if not is_constant(target):
                use, found = literal.use, True
                text = f"is repeated by the number {use.value}, which stands in no method of a module that a plan can change"
                self._freeze(
                    (a for t in target for a in t), Reason(text, use.function, use.module, use.source)
                )
        return found

    # ------------------------------------------------------------------------------------------------ what goes

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
        given = checked_indices(self, name, dim, indices)
        axis = self.dims(name)[dim]
        wanted = np.zeros(1 if axis is None else axis.size, dtype=bool)
        wanted[given] = True
        masks: dict[Axis, npt.NDArray[np.bool_]] = {}
        atoms = list(dict.fromkeys(axes.atoms(axis))) if axis is not None else []
        candidates = sorted((a for a in atoms if self.reason(a) is None), key=lambda a: -a.size)
        for whole in (True, False):
            for atom in candidates:
                at = axes.positions(axis, atom) if axis is not None else np.zeros((0, 0), dtype=np.int64)
                hit = wanted[at].all(1) if whole else wanted[at].any(1)
                if at.shape[1] and hit.any():
                    masks[atom] = masks.get(atom, np.ones(atom.size, dtype=bool)) & ~hit
                    wanted[at[hit].reshape(-1)] = False
        if wanted.any():
            reasons = {str(why) for a in atoms if (why := self.reason(a))}
            raise InputError(
                f"{name!r} dim {dim} can't lose these indices: {'; '.join(sorted(reasons)) or 'size 1'}"
            )
        gone = {}
        for other in self._dims:
            cut = self.cut(other, masks)
            if cut is not None:
                gone[other] = ~cut.mask()
        return gone

    def keeps(self, name: str, masks: Mapping[str, Any]) -> tuple[list[Indices | None], list[Indices] | None]:
        """What stays of a tensor.

        Args:
            name: a parameter or buffer.
            masks: group name -> [units] bool, True where a unit stays, as `choose` gives them.

        Returns:
            the kept indices of each dim, None for all of them; and None, or the kept indices of dim 1 for each block of dim 0
            (grouped convolutions).

        Raises:
            InputError: there is no such tensor, or `masks` do not fit this graph.
        """
        name = first_name(self, name)
        cut = self.cut(name, checked_masks(self, masks))
        return ([None] * self.tensors[name].dim(), None) if cut is None else (list(cut.keep), cut.blocks)

    def mask(self, name: str, masks: Mapping[str, Any]) -> torch.Tensor | None:
        """Bool tensor of the shape of tensor `name`, True where kept; None where nothing goes. `masks` as for `keeps`."""
        cut = self.cut(first_name(self, name), checked_masks(self, masks))
        return None if cut is None else cut.mask()

    def cut(
        self, name: str, masks: AtomMasks, orders: Mapping[Axis, Indices] = MappingProxyType({})
    ) -> Cut | None:
        """What stays of tensor `name` (its first name) under checked `masks`, its units in the `orders` of their axes.

        None where all stays as it is.
        """
        per_dim: list[Indices | None] = []
        blocks: list[Indices] | None = None
        for axis in self._dims.get(name, ()):
            if axis is None:
                per_dim.append(None)
                continue
            if is_ragged(axis):
                blocks = kept_by_block(axis, masks)
                per_dim.append(None)
                continue
            mask = axes.kept(axis, masks)
            if orders and any(atom in orders for atom in axes.atoms(axis)):
                order = axes.ordered(axis, orders)
                per_dim.append(order[mask[order]])
            else:
                per_dim.append(None if mask.all() else np.flatnonzero(mask))
        if blocks is None and all(k is None for k in per_dim):
            return None
        numbered = self.state.renumbered.get(name)
        numbers = None if numbered is None else np.flatnonzero(axes.kept(numbered, masks))
        return Cut(tuple(self.tensors[name].shape), tuple(per_dim), blocks, numbers)

    @cached_property
    def in_order(self) -> set[Axis]:
        """The atoms whose units must stand as they do: those of blocks of a convolution, and those that buffers number."""
        held = [a for dims in self._dims.values() if any(map(is_ragged, dims)) for a in dims]
        held += self.state.renumbered.values()
        return {atom for a in held if a is not None for atom in axes.atoms(a)}

    def to_networkx(self) -> nx.MultiGraph:
        """A graph whose nodes are tensor dims (``"conv.weight:0"``) and groups, an edge where a group holds a dim."""
        import networkx as nx  # noqa: PLC0415  nothing else needs it, and it takes long to import

        graph = nx.MultiGraph()
        for name, dims in self._dims.items():
            for d, axis in enumerate(dims):
                atoms_ = axes.atoms(axis) if axis is not None else []
                why = next((str(r) for a in atoms_ if (r := self.reason(a))), None)
                graph.add_node(f"{name}:{d}", kind="dim", size=1 if axis is None else axis.size, frozen=why)
        for i, group in enumerate(self.groups):
            node = f"group {i}"
            graph.add_node(node, kind="group", units=group.units, name=group.name)
            for m in group.members:
                graph.add_edge(node, f"{m.name}:{m.dim}", role=m.role)
        return graph

    def lock_summary(self) -> Counter[Reason]:
        """Reason -> number of parameters whose every dim is frozen and that it locks.

        Of several dims it is what an equation between sizes fixes that counts, which says most, else the largest.
        """
        total: Counter[Reason] = Counter()
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in self.tensors.items():
            if name not in parameters:
                continue
            dims = self._dims.get(name)
            if dims is None:
                total[Reason("belongs to a tensor that no traced run used")] += tensor.numel()
                continue
            leaves = [a for axis in dims if axis is not None for a in axes.atoms(axis)]
            if leaves and all(self.reason(a) for a in leaves):
                largest = max(leaves, key=lambda a: (a.find() in self.sizes.pinned, a.size))
                total[self.reason(largest) or Reason("")] += tensor.numel()
        return total

    # ------------------------------------------------------------------------------------------------ building

    def _find_groups(self) -> tuple[Group, ...]:
        members: dict[Axis, list[Member]] = {}
        places: dict[Axis, list[tuple[Axis, Indices]]] = {}  # many tensors share an axis
        roles = self._roles
        for name, dims in self._dims.items():
            node = self.trace.tensors[name]
            for d, axis in enumerate(dims):
                if axis is None:
                    continue
                for piece, bounds in pieces(axis, 1 if dims[0] is None else dims[0].size):
                    found = places.get(piece)
                    if found is None:
                        found = places[piece] = places_of(piece)
                    for atom, indices in found:
                        if atom.frozen is None:
                            role = roles.get((atom, node, d), "scales")
                            members.setdefault(atom, []).append(Member(name, d, indices, role, bounds))
        return named_groups(members.items())


def _mark_channels(state: DimFacts) -> None:
    """Only an axis that some weight produces or consumes is a channel; other free axes are left alone."""
    for operand, produced, consumed in state.weights:
        if state.leaves_of(operand):
            for axis in (*produced, *consumed):
                for atom in axes.atoms(axis) if axis is not None else ():
                    atom.channel = True
    reason = Reason(
        "is not a channel: no weight produces or consumes it (learned tokens, positions, buffers)"
    )
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
        known = {a for dims in originals for axis in dims if axis is not None for a in axes.atoms(axis)}
        reason = Reason(
            "is not an axis of the original from which a parametrization computes this weight", "", path
        )
        for axis in graph.state.dims[node][0]:
            for atom in axes.atoms(axis) if axis is not None else ():
                if atom not in known:
                    atom.frozen = atom.frozen or reason


def _ignore(graph: DependencyGraph, patterns: Name | Sequence[Name]) -> None:
    """Freeze every dim of the tensors that `patterns` name: modules, tensors, or globs of either."""
    unknown = []
    for pattern in (name_in(graph, given) for given in given_names("ignore", patterns)):
        hit, known = named(graph, pattern)
        if not known:
            unknown.append(pattern)
        reason = Reason(f"is ignored ({pattern!r})")
        for name in hit:
            for axis in graph.dims(name):
                for atom in axes.atoms(axis) if axis is not None else ():
                    atom.frozen = atom.frozen or reason
    if unknown:
        raise InputError(f"ignore matches nothing in this model: {', '.join(map(repr, unknown))}\n{NAMING}")
