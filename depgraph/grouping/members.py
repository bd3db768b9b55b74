"""Groups and their members: where units stand in each tensor, and what the tensor does with them."""

from __future__ import annotations

from dataclasses import dataclass, field
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


@dataclass(eq=False)
class Group:
    """A maximal set of dims related through one axis; its units are the smallest removable sets of indices.

    Attributes:
        axis: what the dims have in common.
        members: the dims, a `Member` each.
    """

    axis: Axis
    members: list[Member] = field(default_factory=list)

    @property
    def units(self) -> int:
        """How many units the group has."""
        return self.axis.size

    @property
    def key(self) -> int:
        """What scores and masks have it by: the id of its axis, valid as long as the graph lives."""
        return id(self.axis)

    @property
    def name(self) -> str:
        """``tensor:dim`` of its first producing member."""
        first = next((m for m in self.members if m.role == "produces"), self.members[0])
        return f"{first.name}:{first.dim}"

    def __repr__(self) -> str:
        return f"Group({self.name}, units={self.units}, members={len(self.members)})"


def places_of(axis: Axis) -> list[tuple[Axis, Indices]]:
    """Each atom of `axis` with the positions of its units; linear in the size of `axis` for concatenations of atoms."""
    if axis.kind == ATOM:
        return [(axis, np.arange(axis.size, dtype=np.int64)[:, None])]
    if axis.kind == CONCAT:
        found: dict[int, tuple[Axis, list[Indices]]] = {}
        offset = 0
        for part in axis.parts:
            for atom, at in places_of(part.find()):
                found.setdefault(id(atom), (atom, []))[1].append(at + offset)
            offset += part.find().size
        return [(a, ats[0] if len(ats) == 1 else np.concatenate(ats, axis=1)) for a, ats in found.values()]
    return [(a, axes.positions(axis, a)) for a in dict.fromkeys(axes.atoms(axis))]


def roles_of(state: DimFacts) -> dict[tuple[int, Node, int], Role]:
    """(atom id, get_attr node, dim) -> role, from the contractions that each tensor takes part in."""
    roles: dict[tuple[int, Node, int], Role] = {}
    dims = {
        node: [{id(a) for a in axes.atoms(axis)} if axis is not None else set() for axis in results[0]]
        for node, results in state.dims.items()
        if node.op == "get_attr"
    }
    for operand, produced, consumed in state.weights:
        for leaf in state.leaves_of(operand):
            for axis_list, role in ((consumed, "consumes"), (produced, "produces")):
                found = {id(a) for axis in axis_list if axis is not None for a in axes.atoms(axis)}
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
