"""The consumers of the original and of the smaller model side by side: which rows and columns are left of each.

A weight operand is a parameter, or is moved out of one (views, slices, casts). Carrying the positions of entries through
the same moves says where each entry of the operand lies in its parameter, in both models; the plan says which position of
the original became which of the smaller one. Nothing else is assumed, so a pair is right or is not a pair.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from ..axes.nodes import GATES, base_name, is_convolution, op_name
from ..axes.op_call import DimFacts, Product
from ..data.consumers import Consumer, Step, at, consumers, path_to
from ..data.layout import Layout, layout_of
from ..data.states import reads_states
from ..plan.plan import Plan
from ..tracing.recorder import Node, record_of

Tensor = torch.Tensor
LARGEST = 1 << 29  # entries of a parameter whose positions are carried along
ROWS_OF = 1 << 18  # entries whose positions are compared at a time
MOVES = {"view", "reshape", "_unsafe_view", "_reshape_alias", "expand", "t", "transpose", "permute", "numpy_T", "mT",
         "select", "slice", "narrow", "unsqueeze", "squeeze", "split", "split_with_sizes", "chunk", "unbind", "movedim",
         "flatten", "unflatten"}  # fmt: skip
COPIES = {"_to_copy", "clone", "contiguous", "detach", "alias", "lift_fresh"}


@dataclass(frozen=True)
class Shift:
    """Where a constant can be added to the rows of a product: a tensor of the smaller model.

    Attributes:
        name: a bias, or the running mean of a batch norm that follows.
        at: its positions for [stacks, rows].
        sign: -1 for a running mean.
        argument: where it stands among the arguments of the call; None where it comes behind.
    """

    name: str
    at: Tensor
    sign: int
    argument: tuple[Step, ...] | None


@dataclass(frozen=True, eq=False)
class Pair:
    """A consumer of the original and what is left of it.

    Attributes:
        dense, small: the consumers.
        shape: (stacks, rows, columns) of the original.
        stacks: [stacks] which of the original's are left; rows, columns: [stacks, n] likewise, of each.
        size: the shape of the smaller parameter.
        shift: where a constant can be added to the result, if anywhere.
        joins: whether the result goes nowhere but into a sum with another activation (a residual stream).
    """

    dense: Consumer
    small: Consumer
    shape: tuple[int, int, int]
    stacks: Tensor
    rows: Tensor
    columns: Tensor
    size: tuple[int, ...]
    shift: Shift | None
    joins: bool

    @property
    def name(self) -> str:
        """Name of the weight."""
        return self.dense.name

    @property
    def inside(self) -> bool:
        """Whether its inputs are made inside a recurrent layer, which is given none of them."""
        return self.dense.calls[0].activation is None

    @property
    def loses(self) -> bool:
        """Whether some of its inputs were removed."""
        return self.columns.shape[1] < self.shape[2]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(stacks, rows, columns) that are left."""
        return len(self.stacks), self.rows.shape[1], self.columns.shape[1]

    @property
    def at(self) -> Tensor:
        """[stacks, rows, columns]: the positions of its entries in the smaller parameter, which take more than it does."""
        return self._positions()[1].long()

    @property
    def operand(self) -> Tensor:
        """The same in the shape of the smaller operand."""
        return self._positions()[0].long()

    def _positions(self) -> tuple[Tensor, Tensor]:
        found = _matrices(self.small.calls[0], _numbered(self.size))
        assert found is not None  # noqa: S101  else it were no pair
        return found

    @property
    def gone(self) -> Tensor:
        """[stacks, n]: the columns that were removed."""
        stays = torch.zeros(len(self.stacks), self.shape[2], dtype=torch.bool)
        stays.scatter_(1, self.columns, True)
        return (~stays).nonzero()[:, 1].view(len(self.stacks), -1)


def pairs(dense: DimFacts, small: DimFacts, plan: Plan) -> tuple[list[Pair], list[tuple[str, str]]]:
    """The consumers of both models in pairs, in the order of execution; the weights in none, each with the reason."""
    skipped: list[tuple[str, str]] = []
    others: dict[str, list[Consumer]] = {}
    for consumer in map(_seen, consumers(small)):
        others.setdefault(consumer.name, []).append(consumer)
    found: list[Pair] = []
    moves = plan.moves
    for consumer in map(_seen, consumers(dense)):
        if moves.holds(consumer.name):
            continue
        reason = consumer.reason or _shared(dense, consumer) or _scaled(consumer)
        if not reason:
            made = [p for o in others.get(consumer.name, []) if (p := _pair(consumer, o, dense, small, plan))]
            if made:
                found.append(made[0])
                continue
            reason = "its operand is computed, not moved, from the parameter, or differs in the smaller model"
        if consumer.name not in plan.shapes or not consumer.reason or _cut(plan, consumer):
            skipped.append((consumer.name, reason))
    return _apart(found, skipped), list(dict.fromkeys(skipped))


def _seen(consumer: Consumer) -> Consumer:
    """A consumer inside a recurrent layer can be seen where the states that it reads can be told."""
    told = all(reads_states(call) for call in consumer.calls) and not record_of(consumer.node).training
    return replace(consumer, reason="") if told else consumer


def _cut(plan: Plan, consumer: Consumer) -> bool:
    cut = plan.cuts.get(consumer.name)
    return cut is not None and (
        consumer.dim is None or cut.blocks is not None or cut.keep[consumer.dim] is not None
    )


def _apart(found: list[Pair], skipped: list[tuple[str, str]]) -> list[Pair]:
    """Without those that share entries of one parameter: no two solutions can be written there."""
    count = Counter(p.name for p in found)
    for name in [n for n, k in count.items() if k > 1]:
        entries = torch.cat([p.at.flatten() for p in found if p.name == name])
        if entries.unique().numel() < entries.numel():
            count[name] = 0
            skipped.append((name, "is used in several ways"))
    return [p for p in found if count[p.name]]


def _shared(state: DimFacts, consumer: Consumer) -> str:
    """What else uses the parameter of a consumer, which a change of it would change, too."""
    leaves = state.leaves_of(consumer.calls[0].weight)
    if len(leaves) != 1:
        return "its operand is computed from several parameters"
    products = {(p.node, p.weight) for p in state.products if leaves[0] in state.leaves_of(p.weight)}
    seen, ahead = {leaves[0]}, [leaves[0]]
    while ahead:
        node = ahead.pop()
        for user in node.users:
            if user.op == "output":
                return "is returned by the model"
            if (user, node) in products:
                continue
            if not _moves(user):
                return f"is also used by {user.target}"
            if user not in seen:
                seen.add(user)
                ahead.append(user)
    return ""


def _scaled(consumer: Consumer) -> str:
    options = consumer.node.kwargs
    return "its call scales the product" if any(options.get(k, 1) != 1 for k in ("alpha", "beta")) else ""


def _moves(node: Node) -> bool:
    return node.target is operator.getitem or op_name(node.target) in MOVES | COPIES


def moved(node: Node, positions: Tensor) -> Tensor | None:
    """`positions` of the entries of a parameter, carried to `node`; None where that is not just moved out of one."""
    if node.op == "get_attr":
        return positions
    if not _moves(node) or not node.args or not isinstance(node.args[0], Node):
        return None
    before = moved(node.args[0], positions)
    if before is None or any(isinstance(a, Node) for a in (*node.args[1:], *node.kwargs.values())):
        return None
    if node.target is operator.getitem:
        return before[node.args[1]]  # type: ignore[index]
    if op_name(node.target) in COPIES:
        return before
    return node.target(before, *node.args[1:], **node.kwargs)  # type: ignore[operator]


def _layout(product: Product, operand: Tensor) -> Layout:
    activation = product.activation
    shape = (1, operand.shape[-1]) if activation is None else record_of(activation).shape
    return layout_of(product.node.target, product.node.args, shape, operand, product.letters)


def _numbered(shape: tuple[int, ...]) -> Tensor:
    """A tensor in which each entry is its own position."""
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.int32 if count < 1 << 31 else torch.int64).view(shape)


def _matrices(product: Product, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    """Positions as the operand has them, and as [stacks, rows, columns]."""
    operand = moved(product.weight, positions)
    return None if operand is None else (operand, _layout(product, operand).matrices(operand))


def _pair(consumer: Consumer, other: Consumer, dense: DimFacts, small: DimFacts, plan: Plan) -> Pair | None:
    product, rest = consumer.calls[0], other.calls[0]
    name = consumer.name
    shape, smaller = plan.shapes[name], plan.new_shape(name)
    count = torch.Size(shape).numel()
    same = product.node.target is rest.node.target and product.letters == rest.letters
    if other.reason or count > LARGEST or not same:
        return None
    before, after = _numbered(shape), _numbered(smaller)
    cut = plan.cuts.get(name)
    whole, part = _matrices(product, before), _matrices(rest, before if cut is None else cut.slice(before))
    places = _matrices(rest, after)
    if whole is None or part is None or places is None or not part[1].numel():
        return None
    at, (_, rows, columns) = part[1], whole[1].shape
    as_it_is = whole[1].is_contiguous() and whole[1].data_ptr() == before.data_ptr()
    if not (as_it_is and whole[1].numel() == count):
        inverse = torch.full((count,), -1, dtype=before.dtype)
        inverse[whole[1].flatten().long()] = torch.arange(whole[1].numel(), dtype=before.dtype)
        at = inverse[at.long()]
    stack, row, column = (t.long() for t in (at[:, 0, 0], at[:, :, 0], at[:, 0, :]))
    stack, row, column = stack // (rows * columns), row // columns % rows, column % columns
    step = max(1, ROWS_OF // at.shape[2])
    for first in range(0, at.shape[1], step):
        some = slice(first, first + step)
        wanted = (stack[:, None, None] * rows + row[:, some, None]) * columns + column[:, None, :]
        if bool((at[:, some] < 0).any()) or not torch.equal(wanted, at[:, some].long()):
            return None
    sizes = (whole[1].shape[0], rows, columns)
    return Pair(
        consumer,
        other,
        sizes,
        stack,
        row,
        column,
        smaller,
        _shift(small, other.calls, places[1]),
        _joins(dense, product.node) and _joins(small, rest.node),
    )


def _joins(state: DimFacts, node: Node) -> bool:
    """Whether the result of a call goes into one sum with an activation of its shape, and nowhere else.

    Of two products that are added to each other the later one makes up for what both have lost.
    """
    if len(node.users) != 1 or op_name(node.target) in GATES:
        return False
    (user,) = node.users
    both = [a for a in user.args if isinstance(a, Node)]
    if base_name(user.target) != "add" or len(both) != 2 or user.kwargs.get("alpha", 1) != 1:
        return False
    other = both[1] if both[0] is node else both[0]
    if other is node or (other in state.multiplying and node < other):
        return False
    return record_of(other).shapes == record_of(node).shapes and not state.leaves_of(other)


# ------------------------------------------------------------------------------------------------ adding a constant


def _shift(state: DimFacts, products: Sequence[Product], matrices: Tensor) -> Shift | None:
    """Where a constant can be added to what a product gives: its own bias, one added behind it, a norm's running mean.

    In each of its calls it must be the same one, and be used for nothing else.
    """
    product, *further = products
    node, others = product.node, [p for p in further if not record_of(p.node).training]
    wide = record_of(node).shape
    if op_name(node.target) in GATES:
        before = (1,) if product.activation is None else record_of(product.activation).shape[:-1]
        wide = (*before, record_of(product.weight).shape[0])
    for candidate, sign, spread, argument in _constants(product):
        leaves = state.leaves_of(candidate)
        if len(leaves) != 1 or not _only_for(leaves[0], [p.node for p in products]):
            continue
        if not all(
            any(
                state.leaves_of(c) == leaves and rest == [sign, spread, argument]
                for c, *rest in _constants(p)
            )
            for p in others
        ):
            continue
        shape = record_of(leaves[0]).shape
        ids = moved(candidate, torch.arange(torch.Size(shape).numel()).view(shape))
        weight = record_of(state.leaves_of(product.weight)[0]).shape
        operand = moved(product.weight, torch.zeros(weight, dtype=torch.int8))
        if ids is None or operand is None or ids.dim() != 1:
            continue
        full = ids.view(-1, *[1] * spread).expand(wide)
        rows = _layout(product, operand).outputs(node.args, full, slice(None), slice(None))
        at = rows[:, 0]
        if at.shape == matrices.shape[:2] and torch.equal(rows, at[:, None].expand_as(rows)):
            if at.unique().numel() == at.numel():
                return Shift(str(leaves[0].target), at.contiguous(), sign, argument)
    return None


Constant = tuple[Node, int, int, tuple[Step, ...] | None]


def _constants(product: Product) -> Iterable[Constant]:
    """(bias, sign, dims of the result behind its last one, where among the arguments) of a call, and of what stands behind it."""
    if op_name(product.node.target) in GATES:
        yield from _of_gates(product)
    else:
        yield from _own_bias(product.node)
        yield from _behind(product.node)


def _of_gates(product: Product) -> Iterable[Constant]:
    """That of a product in a recurrent op: behind the weights of inputs and states stand their biases, in the same order."""
    args = product.node.args
    *around, last = path_to(args, product.weight) or ()
    place = int(last) + 2
    path = (*around, place)
    there = (
        args[int(around[0]) + 1] is True if around else len(args) > place
    )  # a layer says whether it has them
    bias = at(args, path) if there else None
    if isinstance(bias, Node):
        yield bias, 1, 0, path


def rows_without_constant(state: DimFacts, consumer: Consumer) -> int:
    """How many rows the product of a consumer has, where there is no place to add a constant to them; 0 where there is."""
    product = consumer.calls[0]
    shape = record_of(state.leaves_of(product.weight)[0]).shape
    found = None if torch.Size(shape).numel() > LARGEST else _matrices(product, _numbered(shape))
    if found is None or _shift(state, consumer.calls, found[1]) is not None:
        return 0
    return found[1].shape[0] * found[1].shape[1]


def _own_bias(node: Node) -> Iterable[Constant]:
    """Those among the arguments of a call."""
    name = op_name(node.target)
    if name == "linear" and len(node.args) > 2 and isinstance(node.args[2], Node):
        yield node.args[2], 1, 0, (2,)
    elif is_convolution(node.target) and isinstance(node.args[2], Node):
        yield node.args[2], 1, len(record_of(node.args[1]).shape) - 2, (2,)  # type: ignore[arg-type]
    elif name in ("addmm", "baddbmm", "addmv") and isinstance(node.args[0], Node):
        yield node.args[0], 1, 0, (0,)


def _behind(node: Node) -> Iterable[Constant]:
    """Those behind the call, where its result goes into nothing else."""
    if len(node.users) != 1:
        return
    (user,) = node.users
    rank = len(record_of(node).shape)
    if op_name(user.target) == "batch_norm" and user.args[0] is node and isinstance(user.args[3], Node):
        if not user.args[5]:
            yield user.args[3], -1, rank - 2, None
    elif base_name(user.target) == "add" and user.kwargs.get("alpha", 1) == 1:
        other = user.args[1] if user.args[0] is node else user.args[0]
        if isinstance(other, Node) and len(record_of(other).shape) == 1:
            yield other, 1, 0, None


def _only_for(leaf: Node, calls: list[Node]) -> bool:
    """Whether a vector is used for the results of `calls` alone."""
    after = {user for node in calls for user in (node, *node.users)}
    return all(user in after or (_moves(user) and set(user.users) <= after) for user in leaf.users)
