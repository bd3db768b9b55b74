"""Groups and their members: where units stand in each tensor, and what the tensor does with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..axes import axes
from ..axes.axes import ATOM, CONCAT, Axis
from ..axes.nodes import is_convolution, is_grouped, tokens
from ..axes.op_call import DimFacts, Product
from ..tracing.recorder import Node, record_of

Role = Literal["produces", "consumes", "scales"]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Member:
    """One dim of a parameter or buffer that loses indices when units of a group go.

    Attributes:
        name: the parameter or buffer, by its first name.
        dim: which of its dims.
        indices: [units, k] int64: the positions on that dim that go with each unit.
        role: what the tensor does with the units: "produces" (a layer's rows), "consumes" (its columns), or "scales" (all
            else: biases, norms, statistics).
        rows: None, or the block of dim 0 that the entries lie in (grouped convolutions).
    """

    name: str
    dim: int
    indices: Indices
    role: Role
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """A maximal set of dims related through one axis; its units are the smallest removable sets of indices.

    Attributes:
        name: what scores and masks have it by: unique in its graph, and the same whenever the model is analyzed alike.
            ``tensor:dim`` of its first producing member, such as ``"conv.weight:0"``. Where that dim holds the units of
            several groups, the slice at which its own begin follows: ``"qkv.weight:0[64:128]"`` for the second of several
            pieces, ``"query.weight:0[0:768:64]"`` for 12 heads of width 64 and ``"query.weight:0[0:64]"`` for their width.
        axis: what the dims have in common.
        members: the dims, a `Member` each.
    """

    name: str
    axis: Axis
    members: tuple[Member, ...]

    @property
    def units(self) -> int:
        """How many units the group has."""
        return self.axis.size

    @property
    def first(self) -> Member:
        """The member that the group is named after."""
        return _first(self.members)

    def __repr__(self) -> str:
        return f"Group({self.name}, units={self.units}, members={len(self.members)})"


def named_groups(found: Iterable[tuple[Axis, list[Member]]]) -> tuple[Group, ...]:
    """A group for each axis and its members; see `Group` for the names."""
    found = list(found)
    named = [_first(members) for _, members in found]
    plain = Counter((m.name, m.dim) for m in named)
    times: Counter[str] = Counter()
    groups = []
    for m, (axis, members) in zip(named, found, strict=True):
        name = f"{m.name}:{m.dim}" + (_slice(m.indices[:, 0]) if plain[m.name, m.dim] > 1 else "")
        times[name] += 1
        if times[name] > 1:  # blocks of a grouped convolution have units at the same indices
            name = f"{name}#{times[name]}"
        groups.append(Group(name, axis, tuple(members)))
    return tuple(groups)


def _first(members: Sequence[Member]) -> Member:
    return next((m for m in members if m.role == "produces"), members[0])


def _slice(starts: Indices) -> str:
    """``[first:end]`` or ``[first:end:step]`` of evenly spaced positions; the first one of others."""
    first, step = int(starts[0]), int(starts[1] - starts[0]) if len(starts) > 1 else 1
    if (np.diff(starts) != step).any() or step < 1:
        return f"[{first}]"
    return f"[{first}:{first + len(starts) * step}" + (f":{step}]" if step > 1 else "]")


def places_of(axis: Axis) -> list[tuple[Axis, Indices]]:
    """Each atom of `axis` with the positions of its units; linear in the size of `axis` for concatenations of atoms."""
    if axis.kind == ATOM:
        return [(axis, np.arange(axis.size, dtype=np.int64)[:, None])]
    if axis.kind == CONCAT:
        found: dict[Axis, list[Indices]] = {}
        offset = 0
        for part in axis.parts:
            for atom, at in places_of(part.find()):
                found.setdefault(atom, []).append(at + offset)
            offset += part.find().size
        return [(a, ats[0] if len(ats) == 1 else np.concatenate(ats, axis=1)) for a, ats in found.items()]
    return [(a, axes.positions(axis, a)) for a in dict.fromkeys(axes.atoms(axis))]


def roles_of(state: DimFacts) -> dict[tuple[Axis, Node, int], Role]:
    """(atom, get_attr node, dim) -> role, from the contractions that each tensor takes part in."""
    roles: dict[tuple[Axis, Node, int], Role] = {}
    dims = {
        node: [set(axes.atoms(axis)) if axis is not None else set() for axis in results[0]]
        for node, results in state.dims.items()
        if node.op == "get_attr"
    }
    for operand, produced, consumed in state.weights:
        for leaf in state.leaves_of(operand):
            for axis_list, role in ((consumed, "consumes"), (produced, "produces")):
                found = {a for axis in axis_list if axis is not None for a in axes.atoms(axis)}
                for d, own in enumerate(dims[leaf]):
                    roles.update(dict.fromkeys([(a, leaf, d) for a in found & own], role))  # type: ignore[arg-type]
    for product in state.products:  # a square weight on a stream has one axis on both sides
        for d in _consumed_dims(product) if product.weight in dims else ():
            others = set().union(*(own for e, own in enumerate(dims[product.weight]) if e != d))
            for a in dims[product.weight][d] & others:
                roles[a, product.weight, d] = "consumes"
    return roles


def _consumed_dims(product: Product) -> list[int]:
    """Which dims of the weight operand are summed over."""
    op, rank = product.node.target, len(record_of(product.weight).shape)
    if is_convolution(op):
        return [0 if product.node.args[6] else 1]
    if product.letters is None:
        return [1] if is_grouped(op) else []
    return [
        d
        for d, t in enumerate(tokens(product.letters[1], rank))
        if t not in product.letters[2] and "." not in t
    ]
