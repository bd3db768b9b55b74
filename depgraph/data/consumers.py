"""The weights that consume dims of activations, and what each is known by in a run.

A consumer is found again by its weight: the operand of a call is the parameter, or was made of it by the same ops as in
the trace (a view, a cast, a parametrization). So runs may differ in what they call and how often.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any

import torch

from ..axes import axes
from ..axes.axes import Axis
from ..axes.nodes import GATES, is_convolution, is_grouped, op_name, tokens
from ..axes.op_call import DimFacts, Product
from ..grouping.graph import DependencyGraph
from ..tracing.recorder import Node, record_of

Step = int | str


@dataclass(frozen=True, eq=False)
class Consumer:
    """A weight that consumes a dim of an activation, in one call or in several.

    Attributes:
        name: its tensor.
        dim: the consumed dim of that tensor; None where it stands in several.
        axis: the consumed axis: column j of the inputs is its index j; None for a single column.
        calls: the recorded calls.
        reason: why its inputs can't be observed; empty where they can.
    """

    name: str
    dim: int | None
    axis: Axis | None
    calls: tuple[Product, ...]
    reason: str = ""

    @property
    def node(self) -> Node:
        """The first call."""
        return self.calls[0].node

    @property
    def width(self) -> int:
        """Columns of its inputs."""
        return 1 if self.axis is None else self.axis.size

    @property
    def is_convolution(self) -> bool:
        """Whether it is called in a convolution."""
        return is_convolution(self.node.target)

    @property
    def is_recurrent(self) -> bool:
        """Whether it is called in a recurrent layer, which makes more of its result before it gives that."""
        return op_name(self.node.target) in GATES


def consumers(graph: DependencyGraph | DimFacts) -> list[Consumer]:
    """The weights of a model that consume dims of activations, in the order in which they are first called."""
    state = graph if isinstance(graph, DimFacts) else graph.state
    order = {node: i for i, node in enumerate(state.trace.graph.nodes)}
    keys = Keys()
    found: dict[Any, Consumer] = {}
    for product in sorted(state.products, key=lambda p: order[p.node]):
        if not state.leaves_of(product.weight):
            continue
        consumer, key = _consumer(state, product), slot(product, keys)
        place: Any = (key, consumer.name) if key is not None else product
        if place in found:
            found[place] = replace(found[place], calls=(*found[place].calls, product))
        else:
            found[place] = consumer
    return list(found.values())


def _consumer(state: DimFacts, product: Product) -> Consumer:
    present = [a for a in product.consumed if a is not None]
    axis = axes.product(present) if present else None
    atoms = set(axes.atoms(axis)) if axis is not None else set()
    places = [
        (leaf, d)
        for leaf in state.leaves_of(product.weight)
        for d, dim in enumerate(state.dims[leaf][0])
        if dim is not None and not atoms.isdisjoint(axes.atoms(dim))
    ]
    leaves = [leaf for leaf, _ in places] or state.leaves_of(product.weight)
    leaf = max(leaves, key=lambda n: prod(record_of(n).shape))
    dims = [d for n, d in places if n is leaf]
    dim = dims[0] if len(dims) == 1 else None
    sparse = state.trace.values[str(leaf.target)].layout is not torch.strided
    reason = "it is a sparse tensor" if sparse else _problem(product)
    return Consumer(str(leaf.target), dim, axis, (product,), reason)


def _problem(product: Product) -> str:
    """Why the inputs of a product can't be handed over, or nothing."""
    if product.activation is None:
        return f"{product.node.target} computes its operand inside, or from several arguments"
    if record_of(product.node).training:
        return "it is called only in train mode"
    if any(record_of(node).dtype.is_complex for node in (product.activation, product.weight)):
        return "its inputs are complex"
    if slot(product, Keys()) is None:
        return "data decides which of its entries are used"
    if not _is_matrix_product(product, product.activation):
        return f"{product.node.target} is not a product of two matrices here"
    return ""


def _is_matrix_product(product: Product, activation: Node) -> bool:
    if is_convolution(product.node.target) or is_grouped(product.node.target):
        return True
    if product.letters is None:
        return False
    x, w = (
        tokens(letters, len(record_of(node).shape))
        for letters, node in zip(product.letters, (activation, product.weight), strict=False)
    )
    result = product.letters[2]
    if len(set(x)) < len(x) or len(set(w)) < len(w) or ("..." not in result and any("." in t for t in x + w)):
        return False
    return all(t in x for t in w if t not in result and "." not in t)


# ------------------------------------------------------------------------------------------------- finding it again

# Ops that give a tensor another shape: the sizes in the call may depend on the batch.
RESHAPES = {"view", "reshape", "_unsafe_view", "expand", "expand_as", "view_as", "_reshape_alias"}


class Keys:
    """Numbers for what is made of parameters alone: the same for the same ops on the same tensors."""

    def __init__(self) -> None:
        self.known: dict[Any, int] = {}
        self.seen: dict[Node, int | None] = {}

    def intern(self, form: Any) -> int:
        """The number of a form, a new one at first sight."""
        return self.known.setdefault(form, len(self.known))

    def of(self, node: Node) -> int | None:
        """The number of a recorded node; None where it depends on an input."""
        if node not in self.seen:
            self.seen[node] = None
            self.seen[node] = self._of(node)
        return self.seen[node]

    def _of(self, node: Node) -> int | None:
        if node.op == "get_attr":
            named = record_of(node).kind != "constant"
            return self.intern(str(node.target)) if named else None
        if node.op != "call_function":
            return None
        if node.target is operator.getitem:
            source = self.of(node.args[0])  # type: ignore[arg-type]
            return None if source is None else self.intern(("item", source, node.args[1]))
        form = form_of(node.target, node.args, node.kwargs, Node, self.of)
        return None if form is None else self.intern(form)


def form_of(op: Any, args: Any, kwargs: Any, kind: type, number: Callable[[Any], int | None]) -> Any:
    """A hashable name for a call whose tensors (instances of `kind`) have numbers; None where one has none."""
    missing = False
    tensors_only = op_name(op) in RESHAPES

    def name(value: Any) -> Any:
        nonlocal missing
        if isinstance(value, kind):
            found = number(value)
            missing = missing or found is None
            return ("tensor", found)
        if isinstance(value, (list, tuple)):
            return tuple(map(name, value))
        if isinstance(value, dict):
            return tuple((k, name(v)) for k, v in sorted(value.items()))
        return str(value)

    form = (str(op), name(args[:1] if tensors_only else args), () if tensors_only else name(dict(kwargs)))
    return None if missing else form


def path_to(args: Any, wanted: Node) -> tuple[Step, ...] | None:
    """Where `wanted` stands in nested arguments."""
    for step, value in enumerate(args):
        if value is wanted:
            return (step,)
        if isinstance(value, (list, tuple)):
            below = path_to(value, wanted)
            if below is not None:
                return (step, *below)
    return None


def at(args: Any, path: tuple[Step, ...]) -> Any:
    """What stands at `path` in nested arguments."""
    return reduce(operator.getitem, path, args)


def slot(product: Product, keys: Keys) -> Any:
    """What tells a product from others in a run: op, equation, where its weight stands, and the weight's number."""
    number, path = keys.of(product.weight), path_to(product.node.args, product.weight)
    if number is None or path is None:
        return None
    return (*signature(product.node.target, product.node.args), path, number)


def signature(op: Any, args: Any) -> tuple[str, str]:
    """The op and, where it takes one, its equation."""
    return str(op), args[0] if args and isinstance(args[0], str) else ""
