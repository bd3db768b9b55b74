"""What rules state: `OpCall`, one call of an op as its rule sees it, and `DimFacts`, where all that is said is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from ..tracing.recorder import Comparison, Node, Shape, record_of
from ..tracing.size_uses import NOTES, Where
from ..tracing.trace import Trace
from .axes import ATOM, CONCAT, Algebra, Axis, Reason, concat, product
from .nodes import argument_of, is_function, is_view, op_name, writes, written

DIFFERENTIATING = ("grad", "backward")  # functions of torch that run autograd
Dims = list[Axis | None]  # one entry per dim; None stands for a dim of size 1, which relates nothing


@dataclass(frozen=True, eq=False)
class Product:
    """A call in which a weight meets an activation, dims of which it consumes.

    Attributes:
        node: the call.
        weight: its weight operand.
        consumed: the axes that are summed over, in the order of the weight's dims.
        activation: the operand that they are dims of, too; None where no argument of the call is it.
        letters: the einsum of (activation, weight, result); None where the op is not an einsum of the two.
    """

    node: Node
    weight: Node
    consumed: Dims
    activation: Node | None
    letters: tuple[str, str, str] | None


@dataclass(repr=False)
class DimFacts:
    """Everything the rules said.

    Attributes:
        trace: the recorded run.
        dims: node -> dims of each of its tensors.
        equal_counts: axes that keep equally many indices, and why.
        work: node, factors of its multiply-accumulates.
        contracted: node -> the axes that it sums over.
        statistics: node -> the axes that it takes a mean, norm or maximum over.
        counted: (node, argument) -> the axis whose count that number repeats.
        weights: operand, produced dims, consumed dims.
        products: what `weights` has that consumes, with the call.
        filled: nodes whose entries are all one value.
        comparisons: of sizes, by the user's code or inside an op: they must come out as they did.
        unknown: op without a rule -> its calls.
        sized: dims whose size the user's own call gives.
        renumbered: index buffer -> the axis that its values number.
        numbers: (node, which of its tensors) -> the axis whose indices its values are.
        at_least: axis, how many of its indices must stay.
        multiplying: calls that take multiply-accumulates.
    """

    trace: Trace
    dims: dict[Node, list[Dims]] = field(default_factory=dict)
    equal_counts: list[tuple[list[Axis], Reason]] = field(default_factory=list)
    work: list[tuple[Node, list[Axis | int | None]]] = field(default_factory=list)
    contracted: dict[Node, list[Axis]] = field(default_factory=dict)
    statistics: dict[Node, list[Axis]] = field(default_factory=dict)
    counted: dict[tuple[Node, Where], Axis] = field(default_factory=dict)
    weights: list[tuple[Node, Dims, Dims]] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    filled: set[Node] = field(default_factory=set)
    comparisons: list[Comparison] = field(default_factory=list)
    unknown: dict[str, list[Node]] = field(default_factory=dict)
    sized: set[tuple[Node, int | None]] = field(default_factory=set)
    renumbered: dict[str, Axis] = field(default_factory=dict)
    numbers: dict[tuple[Node, int], Axis] = field(default_factory=dict)
    at_least: list[tuple[Axis, int]] = field(default_factory=list)
    multiplying: set[Node] = field(default_factory=set)
    _leaves: dict[Node, list[Node]] = field(default_factory=dict, repr=False)
    _constants: dict[Node, torch.Tensor | None] = field(default_factory=dict, repr=False)

    def leaves_of(self, node: Node, depth: int = 0) -> list[Node]:
        """The parameters that `node` is made of without any other input or product, else []; an index is no input.

        Args:
            node: a node of the trace.
            depth: how many ops lie between it and the node that was asked about; beyond 30 nothing is looked for.
        """
        if node not in self._leaves:
            found: list[Node] = []
            if node.op == "get_attr":
                found = [node] if record_of(node).kind == "tensor" else []
            elif node.op != "placeholder" and depth <= 30 and node not in self.multiplying:
                given = [n for n in node.all_input_nodes if n.op == "get_attr" or _may_hold_values(n)]
                parts = [self.leaves_of(n, depth + 1) for n in given]
                if all(p or n.op == "get_attr" for n, p in zip(given, parts, strict=True)):
                    found = [leaf for p in parts for leaf in p]
            self._leaves[node] = found
        return self._leaves[node]

    def constant(self, node: Any, depth: int = 0) -> torch.Tensor | None:
        """The value of a tensor that depends on no input and no parameter, or None.

        Args:
            node: a node of the trace, or a plain argument, which has none.
            depth: how many ops lie between it and the node that was asked about; beyond 40 nothing is evaluated.
        """
        if not isinstance(node, Node) or depth > 40:
            return None
        if node not in self._constants:
            self._constants[node] = self._evaluated(node, depth)
        return self._constants[node]

    def _evaluated(self, node: Node, depth: int) -> torch.Tensor | None:
        if node.op == "get_attr":
            value = self.trace.values.get(str(node.target))
            own = value is not None and not (value.is_floating_point() or value.is_meta or written(node))
            return value if own else None
        if node.op != "call_function" or not is_function(node.target) or written(node):
            return None
        shapes = record_of(node).shapes
        if not shapes or prod(shapes[0]) >= 1 << 20:
            return None
        inputs = {n: self.constant(n, depth + 1) for n in node.all_input_nodes}
        if any(v is None for v in inputs.values()):
            return None
        args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: inputs[n])
        try:
            result = node.target(*args, **{k: v for k, v in kwargs.items() if k != "device"})  # type: ignore[operator]
        except Exception:  # noqa: BLE001  what can't be evaluated is not a constant
            return None
        return result if isinstance(result, torch.Tensor) else None


def _may_hold_values(node: Node) -> bool:
    record = record_of(node)
    return not record.one_tensor or record.holds_values


class OpCall:
    """One call of an op, as its rule sees it: the dims of its arguments and the relations it may state.

    Attributes:
        node: the call.
        args, kwargs: its arguments; tensors are nodes, to be given to `dims` and `shape_of`.
        shapes: the shape of each result.
        algebra: `cut` and `factor` take an axis apart.
        state: what all rules said so far.
    """

    def __init__(self, state: DimFacts, algebra: Algebra, node: Node) -> None:
        """The call `node`."""
        self.state, self.algebra, self.node = state, algebra, node
        self.args, self.kwargs = node.args, node.kwargs
        self.shapes = list(record_of(node).shapes)
        self.understood: set[Node] = set()  # arguments whose values the rule reads as indices of an axis

    @property
    def name(self) -> str:
        """The op's name, without torch's own namespace and its overload: ``view`` of aten.view.default."""
        return op_name(self.node.target)

    @property
    def shape(self) -> Shape:
        """Shape of the (first) result."""
        return self.shapes[0]

    def arg(self, index: int, name: str = "", default: Any = None) -> Any:
        """Positional argument `index`, or keyword `name`, or `default`."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def given(self, name: str, default: Any = None) -> Any:
        """The argument that the op's schema calls `name`, or its default there; `default` where that is None."""
        return argument_of(self.node, name, default)

    def named(self, names: str) -> list[Any]:
        """The arguments of these names, separated by spaces, in the schema of an op of whatever library.

        Raises:
            ValueError: the schema has no such argument: it is another op of the same name.
        """
        known = {a.name for a in self.node.target._schema.arguments}  # type: ignore[union-attr]
        for name in names.split():
            if name not in known:
                raise ValueError(f"it has no argument {name!r}")
        return [self.given(name) for name in names.split()]

    def dims(self, argument: Any) -> Dims:
        """The axes of a tensor argument, a copy."""
        return list(self.state.dims[argument][0])

    def shape_of(self, argument: Any) -> Shape:
        """The traced shape of a tensor argument."""
        return record_of(argument).shape

    def fresh(self, size: int) -> Axis | None:
        """A new axis of `size` indices, or None for size 1."""
        return Axis(size) if size != 1 else None

    def new(self, dim: int) -> Axis | None:
        """The axis of a dim of the result that only a number in the code makes.

        It may shrink where the user's own call gives that number, as only then it can be repaired.
        """
        size = self.shape[dim]
        if (self.node, dim) in self.state.sized or self._differentiates:
            return self.fresh(size)
        return self.fixed(size, f"has its size from inside {self.node.target}")

    @property
    def _differentiates(self) -> bool:
        """Whether autograd made the call: it takes the sizes in it from the tensors of the forward pass."""
        return record_of(self.node).function in DIFFERENTIATING

    def fixed(self, size: int, text: str) -> Axis | None:
        """A new axis of `size` indices that may not shrink, because of `text`; None for size 1."""
        axis = self.fresh(size)
        self.algebra.freeze(axis, text)
        return axis

    def same(self, a: Axis | None, b: Axis | None) -> None:
        """`a` and `b` lose the same positions."""
        if a is not None and b is not None:
            self.algebra.unify(a, b)

    def lock(self, axis: Axis | None, text: str) -> None:
        """`axis` may not shrink, because of `text`."""
        self.algebra.freeze(axis, text)

    def equal_counts(self, axes: Sequence[Axis], text: str) -> None:
        """All of `axes` keep equally many indices, though not the same positions, because of `text`."""
        place = self.algebra.place
        self.state.equal_counts.append((list(axes), Reason(text, place.op, place.module, place.source)))

    def narrower(self, argument: Any, small: int, large: int) -> None:
        """Dim `small` of a tensor argument keeps fewer indices than its dim `large`."""
        self.state.comparisons.append(("lt", ("dim", argument, small), ("dim", argument, large), True))

    def uniform(self, argument: Any) -> bool:
        """Whether all entries of a tensor argument are one value: filled so, then only moved or copied."""
        node = argument
        while not written(node):
            name = op_name(node.target)
            if node in self.state.filled or name in ("zeros_like", "ones_like", "full_like"):
                return True
            if name not in ("index_select", "clone", "_to_copy") and not is_view(node):
                return False
            node = node.args[0]
        return False

    def reaches_result(self, node: Node) -> bool:
        """Whether a model output, a number in Python or what is written into another tensor depends on `node`."""
        seen, ahead = {node}, [node]
        while ahead:
            for user in ahead.pop().users:
                if user.op == "output" or not record_of(user).shapes or writes(user):
                    return True
                if user not in seen:
                    seen.add(user)
                    ahead.append(user)
        return any(node in seen for node, *_ in self.state.trace.escapes)

    def argument_is_size_of(self, axis: Axis | None, argument: int | str, index: int | None = None) -> None:
        """The number at `argument` (position, or name where the call names it) is the size of `axis`: it is repaired.

        `index` is the position inside an argument that is a list. A number that no rule says this of stays as it is.
        """
        where = (argument,) if index is None else (argument, index)
        if axis is not None:
            self.state.counted[self.node, where] = axis

    def contract(self, *axes: Axis | None) -> None:
        """The op sums over `axes`."""
        self.state.contracted.setdefault(self.node, []).extend(a for a in axes if a is not None)

    def statistic(self, *axes: Axis | None) -> None:
        """The op takes a mean, a norm, a maximum ... over `axes`: it is taken over the kept entries."""
        self.state.statistics.setdefault(self.node, []).extend(a for a in axes if a is not None)

    def numbers(self, argument: Any) -> Axis | None:
        """The axis that the values of an integer tensor `argument` are indices of, as a maximum or topk over it returns them.

        A rule that asks says what becomes of the axis; where none does, the axis may not shrink.
        """
        self.understood.add(argument)
        return self.state.numbers.get((argument, 0))

    def number(self, axis: Axis | None, result: int = 0) -> None:
        """The values of a result are indices of `axis`: they are counted anew when some of it go."""
        if axis is not None:
            self.state.numbers[self.node, result] = axis

    def looked_up(self, axis: Axis | None, index: Any, text: str) -> None:
        """`axis` is read or written at the values of `index`: they number it, or else it may not shrink, because of `text`."""
        numbered = self.numbers(index)
        if axis is not None and numbered is not None and numbered.size == axis.size:
            self.same(axis, numbered)
        else:
            self.lock(numbered, text)
            self.lock(axis, text)

    def at_least(self, axis: Axis | None, count: int) -> None:
        """`count` indices of `axis` must stay."""
        if axis is not None:
            self.state.at_least.append((axis, count))

    def weight(
        self,
        operand: Any,
        produced: Sequence[Axis | None],
        consumed: Sequence[Axis | None],
        activation: Any = None,
        letters: tuple[str, str, str] | None = None,
    ) -> None:
        """`operand` is a weight: dims `produced` of it are in the result, dims `consumed` are summed over.

        `activation` is the argument that it consumes them of, `letters` the einsum of (activation, weight, result) where
        the op is one: with them the inputs of the weight can be observed (`data/watch.py`).
        """
        self.state.weights.append((operand, list(produced), list(consumed)))
        if consumed:
            self.state.products.append(Product(self.node, operand, list(consumed), activation, letters))

    def macs(self, *factors: Axis | int | None) -> None:
        """The op takes as many multiply-accumulates as the product of `factors` (axes count their indices)."""
        self.state.multiplying.add(self.node)
        if not record_of(self.node).training:  # what a second run in train mode does is not part of inference
            self.state.work.append((self.node, list(factors)))

    def constant(self, argument: Any) -> torch.Tensor | None:
        """The value of a tensor `argument` that depends on no input and no parameter, or None."""
        return self.state.constant(argument)

    def broadcast(self, *operands: Dims, size: Sequence[int] | None = None) -> Dims:
        """Align `operands` at the last dim and unify what is not of size 1; the dims of the result."""
        shape = self.shape if size is None else size
        out: Dims = [None] * len(shape)
        for dims in operands:
            for i, axis in enumerate(reversed(dims), start=1):
                if axis is None or i > len(out) or axis.size != shape[-i]:
                    continue
                if out[-i] is None:
                    out[-i] = axis
                else:
                    self.same(out[-i], axis)
        return [a if a is not None else self.fresh(n) for a, n in zip(out, shape, strict=True)]

    def regroup(self, dims: Dims, shape: Sequence[int]) -> Dims:
        """What `dims` become in a reshape to `shape`.

        Smallest runs of equal product are matched, each a product split into factors.
        """
        axes = [a for a in dims if a is not None]
        wanted = [n for n in shape if n != 1]
        found: list[Axis] = []
        i = j = 0
        while i < len(axes):
            i0, j0, left, right = i, j, axes[i].size, wanted[j]
            i, j = i + 1, j + 1
            while left != right:
                if left < right:
                    left, i = left * axes[i].size, i + 1
                else:
                    right, j = right * wanted[j], j + 1
            whole = product(axes[i0:i])
            found.extend(self.algebra.factors(whole, wanted[j0:j]) if j - j0 > 1 else [whole])
        rest = iter(found)
        return [next(rest) if n != 1 else None for n in shape]

    def slice(self, axis: Axis | None, start: int, stop: int) -> Axis | None:
        """The axis of indices start..stop of `axis`; a single one becomes a dim of size 1 and can't go."""
        if axis is None:
            return None
        piece = axis
        if stop < axis.size:
            piece, _ = self.algebra.cut(piece, stop)
        if start > 0:
            _, piece = self.algebra.cut(piece, start)
        if piece.size == 1:
            self.lock(piece, "is cut out as a dim of size 1")
            return None
        return piece

    def reorder(self, axis: Axis, order: Sequence[int]) -> Axis | None:
        """The axis of ``axis[order]`` for an order without repetitions: `axis` is taken apart unit by unit.

        None where `axis` is frozen or not an atom or a concatenation of atoms.
        """
        pieces = concat([axis])
        leaves = pieces.parts if pieces.kind == CONCAT else (pieces,)
        if any(p.find().kind != ATOM for p in leaves) or len(set(order)) != len(order):
            return None
        if all(p.find().frozen is not None for p in leaves):
            return None
        units = self.algebra.segments(axis, [1] * axis.size)
        return concat([units[i] for i in order])

    def join(self, axes: Sequence[Axis | None], sizes: Sequence[int]) -> Axis:
        """The concatenation of `axes`, of `sizes`; a dim of size 1 (None) is a fixed segment."""
        parts = [a or self.fixed_segment(n) for a, n in zip(axes, sizes, strict=True) if n]
        return concat(parts)

    def fixed_segment(self, size: int) -> Axis:
        """A segment of `size` indices that always stays."""
        axis = Axis(size)
        self.algebra.freeze(
            axis, "is a dim of size 1 joined with others" if size == 1 else "is filled in by the op"
        )
        return axis

    def repaired(self, *found: Axis | None) -> None:
        """The op is given numbers that repeat sizes of `found`: these are fixed where no repair reaches the numbers.

        That is where a call of the user's, of a function whose size arguments are not known (`size_uses.NOTES`), makes
        the op inside torch.
        """
        function = record_of(self.node).function
        if function and function not in NOTES and not self._differentiates:
            for axis in found:
                self.lock(axis, f"has its size repeated inside {function}")

    def lock_all(self, text: str) -> list[Dims]:
        """Freeze every axis of every argument, because of `text`; the results get fixed axes."""
        for argument in self.node.all_input_nodes:
            for dims in self.state.dims.get(argument, []):
                for axis in dims:
                    self.lock(axis, text)
        return [[self.fixed(n, text) for n in shape] for shape in self.shapes]
