"""Trace -> the axes of every tensor: each node's dims, by the rule of its op.

`propagate` walks the graph once. Relations do not depend on the order in which they are found, so views, in-place ops
and repeated use need no special care. An op without a rule, or one whose rule fails, freezes every axis it touches.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from ..errors import UnknownOpError
from ..tracing.record import Comparison, Node, own_namespace
from ..tracing.size_uses import NOTES, Where
from ..tracing.trace import Trace
from .axes import ATOM, CONCAT, PRODUCT, RAGGED, Algebra, Axis, Reason, concat, product

Dims = list[Axis | None]  # one entry per dim; None stands for a dim of size 1, which relates nothing


@dataclass(frozen=True, eq=False)
class Product:
    """A call in which a weight meets an activation, dims of which it consumes.

    Attributes:
        node: the call.
        weight: its weight operand.
        consumed: the axes that are summed over, in the order of the weight's dims.
        activation: the operand that they are dims of, too; None where no argument of the call is it.
        letters: the einsum of (activation, weight, result); None where the op is no einsum of the two.
    """

    node: Node
    weight: Node
    consumed: Dims
    activation: Node | None
    letters: tuple[str, str, str] | None


@dataclass
class Propagation:
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


class Site:
    """One call of an op, as its rule sees it: the dims of its arguments and the relations it may state.

    Attributes:
        node: the call.
        args, kwargs: its arguments; tensors are nodes, to be given to `dims` and `shape_of`.
        shapes: the shape of each result.
        algebra: `cut` and `factor` take an axis apart.
        state: what all rules said so far.
    """

    def __init__(self, state: Propagation, algebra: Algebra, node: Node) -> None:
        """The call `node`."""
        self.state, self.algebra, self.node = state, algebra, node
        self.args, self.kwargs = node.args, node.kwargs
        self.shapes: list[tuple[int, ...]] = node.meta["shapes"]
        self.understood: set[Node] = set()  # arguments whose values the rule reads as indices of an axis

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) result."""
        return self.shapes[0]

    def arg(self, index: int, name: str = "", default: Any = None) -> Any:
        """Positional argument `index`, or keyword `name`, or `default`."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def given(self, name: str, default: Any = None) -> Any:
        """The argument that the op's schema calls `name`, or its default there; `default` where that is None."""
        for position, a in enumerate(self.node.target._schema.arguments):  # type: ignore[union-attr]
            if a.name == name:
                value = self.arg(position, name, a.default_value)
                return default if value is None else value
        return default

    def dims(self, argument: Any) -> Dims:
        """The axes of a tensor argument, a copy."""
        return list(self.state.dims[argument][0])

    def shape_of(self, argument: Any) -> tuple[int, ...]:
        """The traced shape of a tensor argument."""
        return tuple(argument.meta["shapes"][0])

    def fresh(self, size: int) -> Axis | None:
        """A new axis of `size` indices, or None for size 1."""
        return Axis(size) if size != 1 else None

    def new(self, dim: int) -> Axis | None:
        """The axis of a dim of the result that only a number in the code makes.

        It may shrink where the user's own call gives that number, as only then it can be repaired.
        """
        size = self.shape[dim]
        if (self.node, dim) in self.state.sized:
            return self.fresh(size)
        return self.fixed(size, f"has its size from inside {self.node.target}")

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
        while not _written(node):
            if node in self.state.filled or _name(node) in ("zeros_like", "ones_like", "full_like"):
                return True
            if _name(node) not in ("index_select", "clone", "_to_copy") and not _is_view(node):
                return False
            node = node.args[0]
        return False

    def reaches_result(self, node: Node) -> bool:
        """Whether a model output, a number in Python or what is written into another tensor depends on `node`."""
        seen, ahead = {node}, [node]
        while ahead:
            for user in ahead.pop().users:
                if user.op == "output" or not user.meta["shapes"] or _writes(user):
                    return True
                if user not in seen:
                    seen.add(user)
                    ahead.append(user)
        return any(node in seen for node, *_ in self.state.trace.escapes)

    def counts(self, axis: Axis | None, argument: int | str, index: int | None = None) -> None:
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
        the op is one: with them the inputs of the weight can be observed (`data/observe.py`).
        """
        self.state.weights.append((operand, list(produced), list(consumed)))
        if consumed:
            self.state.products.append(Product(self.node, operand, list(consumed), activation, letters))

    def macs(self, *factors: Axis | int | None) -> None:
        """The op takes as many multiply-accumulates as the product of `factors` (axes count their indices)."""
        self.node.meta["contracts"] = True
        if not self.node.meta.get("training"):  # what a second run in train mode does is no work of inference
            self.state.work.append((self.node, list(factors)))

    def constant(self, argument: Any) -> torch.Tensor | None:
        """The value of a tensor `argument` that depends on no input and no parameter, or None."""
        return _constant(self.state.trace, argument)

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
            self.lock(piece, "is taken out by itself as a dim of size 1")
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
        function = self.node.meta.get("function", "")
        if function and function not in NOTES:
            for axis in found:
                self.lock(axis, f"has its size repeated inside {function}")

    def lock_all(self, text: str) -> list[Dims]:
        """Freeze every axis of every argument, because of `text`; the results get fixed axes."""
        for argument in self.node.all_input_nodes:
            for dims in self.state.dims.get(argument, []):
                for axis in dims:
                    self.lock(axis, text)
        return [[self.fixed(n, text) for n in shape] for shape in self.shapes]


def _name(node: Node) -> str:
    """``view`` of aten.view.default; of a node that is no op, nothing."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).removeprefix("aten::")


def _aliases(node: Node, write: bool) -> bool:
    """Whether an op's schema says that it writes into an argument, or that its result shares memory with one."""
    schema = getattr(node.target, "_schema", None)
    infos = [a.alias_info for a in schema.arguments] if schema is not None else []
    return any(info is not None and info.is_write == write for info in infos)


def _writes(node: Node) -> bool:
    return _aliases(node, write=True)


def _is_view(node: Node) -> bool:
    return node.target is operator.getitem or _aliases(node, write=False)


def _written(node: Node) -> bool:
    """Whether something is written into the memory of `node`, itself or through a view of it."""
    return any(_writes(user) or (_is_view(user) and _written(user)) for user in node.users)


def leaves_of(node: Node, depth: int = 0) -> list[Node]:
    """The parameters that `node` is made of without any other input or contraction, else []; an index is no input."""
    if "leaves" in node.meta:
        found: list[Node] = node.meta["leaves"]
        return found
    if node.op == "get_attr":
        found = [node] if node.meta["kind"] == "tensor" else []
    elif node.op == "placeholder" or depth > 30 or node.meta.get("contracts"):
        found = []
    else:
        given = [n for n in node.all_input_nodes if n.op == "get_attr" or _holds_values(n)]
        parts = [leaves_of(n, depth + 1) for n in given]
        fine = all(p or n.op == "get_attr" for n, p in zip(given, parts, strict=True))
        found = [leaf for p in parts for leaf in p] if fine else []
    node.meta["leaves"] = found
    return found


def _holds_values(node: Node) -> bool:
    dtype = node.meta.get("dtype")
    return dtype is None or dtype.is_floating_point or dtype.is_complex


def _constant(trace: Trace, node: Any, depth: int = 0) -> torch.Tensor | None:
    """Evaluate a node that rests on constants, index buffers and factory ops alone."""
    if not isinstance(node, Node) or depth > 40:
        return None
    if "constant" in node.meta:
        value: torch.Tensor | None = node.meta["constant"]
        return value
    value = None
    if node.op == "get_attr":
        value = trace.values.get(str(node.target))
        if value is not None and (value.is_floating_point() or value.device.type == "meta"):
            value = None
    elif node.op == "call_function" and node.target is not operator.getitem:
        inputs = {n: _constant(trace, n, depth + 1) for n in node.all_input_nodes}
        name = str(node.target)
        if all(v is not None for v in inputs.values()) and "rand" not in name and "_." not in name:
            size = prod(node.meta["shapes"][0]) if node.meta["shapes"] else 1 << 30
            if size < 1 << 20:
                try:
                    args = torch.fx.map_arg(node.args, lambda n: inputs[n])
                    kwargs = torch.fx.map_arg(node.kwargs, lambda n: inputs[n])
                    kwargs = {k: v for k, v in kwargs.items() if k != "device"}
                    value = node.target(*args, **kwargs)  # type: ignore[operator]
                except Exception:  # noqa: BLE001  what can't be evaluated is not a constant
                    value = None
    node.meta["constant"] = value if isinstance(value, torch.Tensor) else None
    return node.meta["constant"]


def propagate(trace: Trace, strict: bool = False) -> Propagation:
    """Give every dim of every tensor of `trace` an axis.

    Args:
        trace: what `trace()` recorded.
        strict: raise at an op that no rule covers, instead of freezing its axes.

    Raises:
        UnknownOpError: with `strict`, naming the op, the module and the user's line.
    """
    from ..rules import rule_for  # noqa: PLC0415  the rules are written in terms of Site

    state, algebra = Propagation(trace, comparisons=list(trace.comparisons)), Algebra()
    for use in trace.size_uses:
        made: Any = use.node
        state.sized.add((made, use.dim))
        while made.target is torch.ops.aten.detach.default:  # factories detach what they made
            made = made.args[0]
            state.sized.add((made, use.dim))
    for node in trace.graph.nodes:
        meta = node.meta
        algebra.place = Reason("", str(node.target), meta.get("module", ""), meta.get("source", ""))
        if node.op == "output":
            continue
        if node.op == "placeholder":
            state.dims[node] = [
                _fixed(algebra, shape, "ranges over a model input") for shape in meta["shapes"]
            ]
        elif node.op == "get_attr":
            dims: Dims = [Axis(n) if n != 1 else None for n in meta["shapes"][0]]
            state.dims[node] = [dims]
            if not (
                meta["dtype"].is_floating_point or meta["dtype"].is_complex or meta["dtype"] is torch.bool
            ):
                for axis in dims:
                    algebra.freeze(axis, "ranges over a table of integers")
            elif meta["kind"] == "constant":
                for axis in dims:
                    algebra.freeze(axis, "ranges over a constant that is neither parameter nor buffer")
        elif node.target is operator.getitem:
            source, index = node.args
            state.dims[node] = [state.dims[source][index]]
            if (source, index) in state.numbers:
                state.numbers[node, 0] = state.numbers[source, index]
        else:
            state.dims[node] = _apply(state, algebra, node, rule_for(node.target), strict)
    for node, text, module, source in trace.escapes:
        algebra.place = Reason("", str(node.target), module, source)
        for axis in state.dims[node][0]:
            algebra.freeze(axis, text)
    for node in trace.outputs:
        meta = node.meta
        algebra.place = Reason("", str(node.target), meta.get("module", ""), meta.get("source", ""))
        for axis in state.dims[node][0]:
            algebra.freeze(axis, "is a dim of a model output")
        algebra.freeze(state.numbers.get((node, 0)), "is numbered by a model output")
    _settle(state, algebra)
    return state


def _fixed(algebra: Algebra, shape: Sequence[int], text: str) -> Dims:
    dims: Dims = [Axis(n) if n != 1 else None for n in shape]
    for axis in dims:
        algebra.freeze(axis, text)
    return dims


def _apply(state: Propagation, algebra: Algebra, node: Node, rule: Any, strict: bool) -> list[Dims]:
    site = Site(state, algebra, node)
    foreign = own_namespace(node.target)
    silent = not site.shapes and not foreign and not node.target._schema.is_mutable  # type: ignore[union-attr]
    if rule is None and silent:
        return []  # such as an assertion
    if rule is None:
        state.unknown.setdefault(str(node.target), []).append(node)
        if strict:
            raise UnknownOpError(
                f"no rule says what {node.target} does to the dims of its arguments\n"
                f"  in module {node.meta['module'] or '(root)'}, {node.meta['source']}\n"
                "  fix: call without strict=True (its axes are then frozen), or state a rule (depgraph.op_rule)"
            )
        remedy = ": depgraph.op_rule can state one" if foreign else ""
        return site.lock_all(f"goes through {node.target}, for which there is no rule{remedy}")
    if foreign and node.target._schema.is_mutable:  # type: ignore[union-attr]
        return site.lock_all(f"goes through {node.target}, which changes its arguments")
    try:
        out = rule(site)
        out = [] if out is None else out
        results: list[Dims] = [out] if site.shapes and (not out or not isinstance(out[0], list)) else out
        if len(results) != len(site.shapes):
            raise ValueError(f"{len(results)} results for {len(site.shapes)} tensors")
        for i, (dims, shape) in enumerate(zip(results, site.shapes, strict=True)):
            sizes = tuple(1 if a is None else a.size for a in dims)
            if sizes != shape:
                raise ValueError(f"the rule says {sizes} where the result {i} is {shape}")
    except Exception as error:  # noqa: BLE001  a rule that fails must freeze, not crash
        state.unknown.setdefault(str(node.target), []).append(node)
        return site.lock_all(f"goes through {node.target}, whose rule does not cover this call ({error})")
    _pass_numbers(site)
    return results


# Ops whose results hold values of their first argument, moved or chosen; and those that only compare its values.
VALUES_KEPT = {"view", "reshape", "_unsafe_view", "flatten", "transpose", "permute", "t", "squeeze", "unsqueeze", "expand",
               "clone", "_to_copy", "contiguous", "detach", "alias", "slice", "select", "index", "index_select", "gather",
               "unbind", "split", "chunk", "sort", "repeat", "repeat_interleave", "view_as", "expand_as"}  # fmt: skip
ORDER_ONLY = {"sort", "argsort", "empty_like", "zeros_like", "ones_like", "new_zeros"}


def _pass_numbers(site: Site) -> None:
    """Tensors that hold indices of an axis: moved they still do; what else an op makes of them is not followed."""
    node, state = site.node, site.state
    name = str(node.target).split(".")[1]
    for argument in node.all_input_nodes:
        axis = state.numbers.get((argument, 0))
        if axis is None or argument in site.understood:
            continue
        if name in VALUES_KEPT and argument is site.args[0]:
            for i in range(1 if name == "sort" else len(site.shapes)):
                site.number(axis, i)
        elif name not in ORDER_ONLY:
            site.lock(axis, f"is numbered by values that go into {node.target}")


def _settle(state: Propagation, algebra: Algebra) -> None:
    """What can be said only when every op has been seen: which ragged dims stand beside their blocks."""
    for node, results in state.dims.items():
        for dims in results:
            for axis in [a for a in dims if a is not None]:
                for ragged in _ragged(axis):
                    if not _beside_its_blocks(node, dims, axis, ragged):
                        algebra.place = Reason("", str(node.target), node.meta.get("module", ""), "")
                        algebra.collapse(axis)
    algebra.place = Reason("")
    seen: set[int] = set()
    for results in state.dims.values():
        for dims in results:
            for whole in dims:
                if whole is not None and id(whole.find()) not in seen:
                    seen.add(id(whole.find()))
                    for atom in _lone_units(whole):
                        algebra.freeze(atom, "is the only index of a dim")


def _beside_its_blocks(node: Node, dims: Dims, axis: Axis, ragged: Axis) -> bool:
    over = ragged.over.find() if ragged.over is not None else None
    if node.op == "get_attr":  # a parameter: dim 0 holds the blocks, and the ragged dim is a whole dim
        return axis.find() is ragged and dims[0] is not None and dims[0].find() is over
    return any(a is not None and a.find() is over for a in dims)


def _ragged(axis: Axis) -> list[Axis]:
    axis = axis.find()
    if axis.kind == RAGGED:
        return [axis]
    return [] if axis.kind != PRODUCT else [r for p in axis.parts for r in _ragged(p)]


def _lone_units(axis: Axis) -> list[Axis]:
    """Atoms of size 1 that are a whole dim, or a factor of one."""
    axis = axis.find()
    if axis.kind == ATOM:
        return [axis] if axis.size == 1 and axis.frozen is None else []
    if axis.kind == PRODUCT:
        return [u for p in axis.parts for u in _lone_units(p)]
    return []


__all__ = ["Dims", "Propagation", "Site", "leaves_of", "propagate"]
