"""Ranks of low-rank updates: ``W x + B A x``, of which A and B meet in nothing but their rank.

Such an update is made and kept apart from the weight that it updates (an adapter): its rank is a number of whoever made it, who
builds it anew with that rank to load it. So it stays, unless it is asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..axes.axes import Axis
from ..axes.nodes import op_name
from ..axes.op_call import Product
from ..tracing.recorder import Node

if TYPE_CHECKING:
    from .graph import DependencyGraph

WHY = "is the rank of an update beside another weight: it stays unless pruning_ratio or a Scope names it"
LINEAR = frozenset(  # between the factors, and around the sum: nothing that bends
    "view _unsafe_view reshape mul div _to_copy clone alias detach t transpose permute expand unsqueeze squeeze dropout native_dropout getitem".split()  # noqa: SIM905
)
SUMS = frozenset(("add", "sub"))


def update_ranks(graph: DependencyGraph) -> frozenset[Axis]:
    """The axes that are ranks of updates."""
    by_weight: dict[str, list[Product]] = {}
    for product in graph.state.products:
        leaves = graph.state.leaves_of(product.weight)
        if len(leaves) == 1:
            by_weight.setdefault(str(leaves[0].target), []).append(product)
    products = {p.node: p for p in graph.state.products}
    found = set()
    for group in graph.groups:
        names = {m.role: m.name for m in group.members}
        if len(group.members) != 2 or names.keys() != {"produces", "consumes"}:
            continue
        down, up = (by_weight.get(names[role], []) for role in ("produces", "consumes"))
        if any(_updates(one, down, products) for one in up):
            found.add(group.axis)
    return frozenset(found)


def _updates(up: Product, down: list[Product], products: dict[Node, Product]) -> bool:
    """Whether `up` works on what one of `down` gives, and is added to the product of another weight with the same input."""
    first = next((p for p in down if up.activation is not None and p.node in _sources(up.activation)), None)
    if first is None:
        return False
    return any(
        node in products and node not in (up.node, first.node) and _same_input(products[node], first)
        for total in _sums(up.node)
        for operand in total.all_input_nodes
        for node in _sources(operand)
    )


def _same_input(one: Product, other: Product) -> bool:
    """Whether two weights are given the same features."""
    if one.activation is not None and one.activation is other.activation:
        return True
    a, b = ([None if x is None else x.find() for x in p.consumed] for p in (one, other))
    return a == b


def _sources(node: Node) -> Iterator[Node]:
    """`node`, and what it is made of by ops that are linear in one tensor, or sums."""
    ahead, seen = [node], {node}
    while ahead:
        one = ahead.pop()
        yield one
        if one.op == "call_function" and op_name(one.target) in LINEAR | SUMS:
            further = [n for n in one.all_input_nodes if n not in seen]
            seen.update(further)
            ahead += further


def _sums(node: Node) -> Iterator[Node]:
    """The sums that `node` goes into, by ops that are linear in one tensor."""
    ahead, seen = list(node.users), set(node.users)
    while ahead:
        one = ahead.pop()
        if one.op != "call_function":
            continue
        if op_name(one.target) in SUMS:
            yield one
        elif op_name(one.target) in LINEAR:
            ahead += [n for n in one.users if n not in seen]
            seen.update(one.users)
