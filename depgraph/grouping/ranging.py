"""Which sizes other inputs have larger or smaller, and which the model gives: its tensors, and numbers in its code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils import _pytree as pytree

from ..axes import axes
from ..axes.axes import Axis
from ..axes.nodes import op_name
from ..axes.op_call import DimFacts, Dims
from ..tracing.recorder import RETURNED, Node, record_of
from ..tracing.size_uses import MAKING
from ..tracing.sizes import Expr, sources_in

COPYING = frozenset(("repeat", "repeat_interleave"))  # ops


class Ranging:
    """Which sizes range over inputs, as one trace tells.

    Attributes:
        dims_of_tensors: the axes of the model's tensors.
        of_tensors: their atoms.
        stated: atoms of new dims, and of copies of old ones, whose number the code gives and no input changes.
        lost_lengths: values of sizes of inputs that became plain numbers, whose origin is lost.
    """

    def __init__(self, state: DimFacts, value: Callable[[Expr], Any]) -> None:
        """`value` is what an expression was in the traced run."""
        self.state = state
        self.dims_of_tensors = [
            axis for node in state.trace.tensors.values() for axis in state.dims[node][0] if axis is not None
        ]
        self.of_tensors = {a for axis in self.dims_of_tensors for a in axes.atoms(axis)}
        self.stated: set[Axis] = set()
        self.lost_lengths = {
            value(expr)
            for expr, how, *_ in state.trace.losses
            if how != RETURNED and isinstance(expr, tuple) and self.ranges(expr)
        }
        self._find_stated()

    def ranges(self, expr: Expr) -> bool:
        """Whether `expr` is made of a dim that other inputs may have larger or smaller.

        A plain number is taken for one that was made of such a dim (by ``len``) where it has the same value.
        """
        if not isinstance(expr, tuple):
            return expr in self.lost_lengths
        return any(source[0] == "dim" and not self.is_fixed(source) for source in sources_in(expr))

    def is_fixed(self, source: Expr) -> bool:
        """Whether the dim that `source` names has the same size for all inputs."""
        axis = self.state.dims[source[1]][0][source[2]]
        if axis is None:
            return _is_one(source[1], source[2])
        return all(a in self.of_tensors or a in self.stated for a in axes.atoms(axis))

    def of_model(self, axis: Axis) -> bool:
        """Whether an axis is made of those of the model's tensors alone."""
        return all(a in self.of_tensors for a in axes.atoms(axis))

    def _find_stated(self) -> None:
        ranging: set[Node] = set()  # what is copied as often as an input says
        for use in self.state.trace.size_uses:
            if use.function not in MAKING or use.node not in self.state.dims:
                continue
            axis = None if use.dim is None else self.state.dims[use.node][0][use.dim]
            if self.ranges(use.expr):
                ranging.add(use.node)
            elif axis is not None and use.extent == axis.size:
                self.stated.update(axes.atoms(axis))
        for node in self.state.trace.graph.nodes:
            if node.op != "call_function" or op_name(node.target) not in COPYING:
                continue
            x, copies = node.args[0], node.args[1:2]
            if not {x, node} & ranging and self.lost_lengths.isdisjoint(pytree.tree_leaves(copies)):
                self.stated |= _atoms(self.state.dims[node][0]) - _atoms(self.state.dims[x][0])


def _is_one(node: Node, dim: int) -> bool:
    """Whether a dim of size 1 has that size for all inputs: it is a parameter's, or was put in."""
    while node.op == "call_function":
        name, x = op_name(node.target), node.args[0] if node.args else None
        if not isinstance(x, Node):
            return False
        size = len(record_of(node).shape)
        if name == "unsqueeze":
            return int(node.args[1]) % size == dim  # type: ignore[arg-type]
        if name in ("transpose", "permute"):
            order = list(range(size))
            if name == "permute":
                order = [int(d) % size for d in node.args[1]]  # type: ignore[arg-type, union-attr]
            else:
                a, b = (int(d) % size for d in node.args[1:3])  # type: ignore[arg-type]
                order[a], order[b] = b, a
            dim = order[dim]
        else:
            return False
        node = x
    return node.op == "get_attr"


def _atoms(dims: Dims) -> set[Axis]:
    return {a for axis in dims if axis is not None for a in axes.atoms(axis)}
