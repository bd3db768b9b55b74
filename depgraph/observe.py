"""What the weights of a model are given to consume, on real data.

`consumers` lists the weights that consume dims of activations, from the recorded graph. `observe` runs the model on
calibration batches and hands over the inputs of each: the matrix X of ``X @ W.T``, whatever op the contraction is
(linear, einsum, convolution ...).

A consumer is found again in a run by its weight: the operand of the call is the parameter, or was made of it by the
same ops as in the trace (a view, a cast, a parametrization). So runs may differ in what they call and how often.
Nothing of a run stays but what `visit` keeps.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import axes
from .axes import Axis
from .calibration import Batch, Calibration
from .errors import InputError
from .graph import DependencyGraph
from .patches import patches
from .propagate import Product, leaves_of
from .record import PACKED, WHOLE, in_order, is_composite, open_python_functions
from .tensors import all_tensors, skeleton
from .trace import Node
from .wrappers import eagerly

Tensor = torch.Tensor
Visit = Callable[["Consumer", Tensor], None]
Step = int | str


@dataclass(frozen=True, eq=False)
class Consumer:
    """A weight that consumes a dim of an activation, in one call or in several.

    Attributes:
        name: its tensor.
        dim: the consumed dim of that tensor; None where it stands in several.
        axis: the consumed axis: column j of the inputs is its index j; None for a single column.
        calls: the recorded calls.
        contracted: dims of the activation that are summed over.
        reason: why its inputs can't be observed; empty where they can.
    """

    name: str
    dim: int | None
    axis: Axis | None
    calls: tuple[Product, ...]
    contracted: tuple[int, ...] = ()
    reason: str = ""

    @property
    def node(self) -> Node:
        """The first call."""
        return self.calls[0].node

    @property
    def activation(self) -> Node | None:
        """What it consumes a dim of, in the first call."""
        return self.calls[0].activation

    @property
    def width(self) -> int:
        """Columns of its inputs."""
        return 1 if self.axis is None else self.axis.size

    def __repr__(self) -> str:
        return (
            f"Consumer({self.name}:{self.dim}, width={self.width}{', ' + self.reason if self.reason else ''})"
        )


def consumers(graph: DependencyGraph) -> list[Consumer]:
    """The weights of a model that consume dims of activations, in the order in which they are first called."""
    order = {node: i for i, node in enumerate(graph.trace.graph.nodes)}
    keys = _Keys()
    found: dict[Any, Consumer] = {}
    for product in sorted(graph.state.products, key=lambda p: order[p.node]):
        if not leaves_of(product.weight):
            continue
        consumer, key = _consumer(graph, product), _slot(product, keys)
        place: Any = (key, consumer.name) if key is not None else product
        if place in found:
            found[place] = replace(found[place], calls=(*found[place].calls, product))
        else:
            found[place] = consumer
    return list(found.values())


def observe(
    model: nn.Module,
    what: DependencyGraph | Iterable[Consumer],
    calibration: Calibration,
    visit: Visit,
    *,
    windows: bool = True,
    text: str = "observing",
) -> None:
    """Run `model` on calibration batches in eval mode without gradients, and hand over the inputs of consumers.

    Args:
        model: the model that `what` was recorded of, or one with the same calls; it is not touched.
        what: a graph, for all its consumers, or some of them; those with a `reason` are left out.
        calibration: the batches.
        visit: ``visit(consumer, inputs)``, called for each call of each consumer, maybe in several pieces. `inputs` are
            [samples, width] in the model's type, on its device; for a convolution [samples, width, kernel positions], a
            sample being an output position. They may share memory with activations: to be read, not kept. Of a grouped
            convolution the width is that of all groups; the inputs of stacked matrices (experts) come one after another.
        windows: False: convolutions hand over [input positions, width] instead, which is far less.
        text: what a progress bar calls it.

    Raises:
        InputError: the calibration data is bad, or the model can't be run on it. What `visit` raises passes through.
    """
    wanted = consumers(what) if isinstance(what, DependencyGraph) else list(what)

    def each(call: Call) -> None:
        for _, inputs in call.inputs(windows):
            visit(call.consumer, inputs)

    watch = Watch(model, wanted, each)
    for batch in calibration.batches(text):
        watch.run(batch)


def _consumer(graph: DependencyGraph, product: Product) -> Consumer:
    present = [a for a in product.consumed if a is not None]
    axis = axes.product(present) if present else None
    atoms = {id(a) for a in axes.atoms(axis)} if axis is not None else set()
    places = [
        (leaf, d)
        for leaf in leaves_of(product.weight)
        for d, dim in enumerate(graph.state.dims[leaf][0])
        if dim is not None and atoms & {id(a) for a in axes.atoms(dim)}
    ]
    leaves = [leaf for leaf, _ in places] or leaves_of(product.weight)
    leaf = max(leaves, key=lambda n: graph.tensors[str(n.target)].numel())
    dims = [d for n, d in places if n is leaf]
    contracted = _contracted(product)
    return Consumer(
        str(leaf.target),
        dims[0] if len(dims) == 1 else None,
        axis,
        (product,),
        contracted or (),
        _problem(product, contracted),
    )


def _problem(product: Product, contracted: tuple[int, ...] | None) -> str:
    """Why the inputs of a product can't be handed over, or nothing."""
    if product.activation is None:
        return f"{product.node.target} makes what it consumes inside, or of several arguments"
    if product.node.meta.get("training"):
        return "it is called in train mode only"
    if _slot(product, _Keys()) is None:
        return "data decides which of its entries are used"
    if contracted is None:
        return f"{product.node.target} is no product of two matrices here"
    return ""


# ------------------------------------------------------------------------------------------------- finding it again

# Ops that give a tensor another shape: the sizes in the call may depend on the batch.
RESHAPES = {"view", "reshape", "_unsafe_view", "expand", "expand_as", "view_as", "_reshape_alias"}


class _Keys:
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
            named = node.meta["kind"] != "constant"
            return self.intern(str(node.target)) if named else None
        if node.op != "call_function" or node.meta.get("contracts"):
            return None
        if node.target is operator.getitem:
            source = self.of(node.args[0])  # type: ignore[arg-type]
            return None if source is None else self.intern(("item", source, node.args[1]))
        form = _form(node.target, node.args, node.kwargs, Node, self.of)
        return None if form is None else self.intern(form)


def _form(op: Any, args: Any, kwargs: Any, kind: type, number: Callable[[Any], int | None]) -> Any:
    """A hashable name for a call whose tensors (instances of `kind`) have numbers; None where one has none."""
    missing = False
    tensors_only = op._schema.name.removeprefix("aten::") in RESHAPES

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


def _path(args: Any, wanted: Node) -> tuple[Step, ...] | None:
    """Where `wanted` stands in nested arguments."""
    for step, value in enumerate(args):
        if value is wanted:
            return (step,)
        if isinstance(value, (list, tuple)):
            below = _path(value, wanted)
            if below is not None:
                return (step, *below)
    return None


def _at(args: Any, path: tuple[Step, ...]) -> Any:
    for step in path:
        args = args[step]
    return args


def _slot(product: Product, keys: _Keys) -> Any:
    """What tells a product from others in a run: op, equation, where its weight stands, and the weight's number."""
    number, path = keys.of(product.weight), _path(product.node.args, product.weight)
    if number is None or path is None or product.activation is None:
        return None
    return (*_signature(product.node.target, product.node.args), path, number)


def _signature(op: Any, args: Any) -> tuple[str, str]:
    return str(op), args[0] if args and isinstance(args[0], str) else ""


# -------------------------------------------------------------------------------------------------------- the inputs


def _tokens(letters: str, rank: int) -> list[str]:
    """A letter for each dim; leading dims that broadcast are numbered from the last one."""
    head, dots, tail = letters.partition("...")
    middle = rank - len(head) - len(tail) if dots else 0
    return [*head, *(f".{i}" for i in range(middle, 0, -1)), *tail]


def _is_convolution(op: Any) -> bool:
    return "convolution" in op._schema.name


def _is_grouped(op: Any) -> bool:
    return op._schema.name == "aten::_grouped_mm"


def _contracted(product: Product) -> tuple[int, ...] | None:
    """Which dims of the activation are summed over; None where the call is no product of two matrices."""
    if product.activation is None:
        return None
    rank = len(product.activation.meta["shapes"][0])
    op = product.node.target
    if _is_convolution(op):
        return (1 if rank == len(product.weight.meta["shapes"][0]) else 0,)
    if _is_grouped(op):
        return (1,)
    if product.letters is None:
        return None
    wide = len(product.weight.meta["shapes"][0])
    x, w = _tokens(product.letters[0], rank), _tokens(product.letters[1], wide)
    result = product.letters[2]
    if len(set(x)) < len(x) or len(set(w)) < len(w) or ("..." not in result and any("." in t for t in x + w)):
        return None
    consumed = [t for t in w if t not in result and "." not in t]
    return tuple(x.index(t) for t in consumed) if set(consumed) <= set(x) else None


@dataclass(frozen=True)
class Arranged:
    """An einsum of an activation and a weight as matrix products, one for each of `stacks`.

    Attributes:
        x: [stacks, samples, width].
        stacked: dims of the weight that tell matrices apart, which the activation has too.
        rows: its dims that are in the result alone.
        columns: its dims that are summed over.
        repeated: its other dims: every index of them holds the same entries.
    """

    x: Tensor
    stacked: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    repeated: tuple[int, ...]

    def matrices(self, weight: Tensor) -> Tensor:
        """The weight as [stacks, rows, width]; a view of it where strides allow."""
        for d in self.repeated:
            weight = weight.narrow(d, 0, 1)
        sizes = [_prod(weight.shape[d] for d in dims) for dims in (self.stacked, self.rows, self.columns)]
        return weight.permute(*self.stacked, *self.rows, *self.columns, *self.repeated).reshape(sizes)


def arrange(x: Tensor, weight: Tensor, letters: tuple[str, str, str]) -> Arranged:
    """Bring the activation of an einsum into the form ``x[s] @ weight[s].T``."""
    in_x, in_w = _tokens(letters[0], x.dim()), _tokens(letters[1], weight.dim())
    result = letters[2]
    size_x, size_w = dict(zip(in_x, x.shape, strict=True)), dict(zip(in_w, weight.shape, strict=True))
    repeated = {
        t for t, n, step in zip(in_w, weight.shape, weight.stride(), strict=True) if n == 1 or step == 0
    }
    kept = [t for t in in_w if t in size_x]
    stay = {t for t in kept if t in result or ("." in t and "..." in result)}
    stacked = [t for t in kept if t in stay and t not in repeated and size_x[t] == size_w[t]]
    columns = [t for t in kept if t not in stay]
    rows = [t for t in in_w if t not in size_x]
    alone = [t for t in in_x if t not in size_w and t not in result and not ("." in t and "..." in result)]
    for d in sorted(map(in_x.index, alone), reverse=True):
        x = x.sum(d)
    in_x = [t for t in in_x if t not in alone]
    for t in columns:  # an entry of size 1 that meets all of a weight's
        if size_x[t] != size_w[t]:
            sizes = [-1] * x.dim()
            sizes[in_x.index(t)] = size_w[t]
            x = x.expand(sizes)
    samples = [t for t in in_x if t not in stacked and t not in columns]
    x = x.permute([in_x.index(t) for t in (*stacked, *samples, *columns)])
    stacks, width = _prod(size_w[t] for t in stacked), _prod(size_w[t] for t in columns)
    dims = [tuple(map(in_w.index, part)) for part in (stacked, rows, columns)]
    rest = tuple(d for d in range(weight.dim()) if not any(d in part for part in dims))
    return Arranged(x.reshape(stacks, -1, width), dims[0], dims[1], dims[2], rest)


def _prod(sizes: Iterable[int]) -> int:
    total = 1
    for n in sizes:
        total *= n
    return total


@dataclass(frozen=True)
class Call:
    """One call of a consumer in a run.

    Attributes:
        consumer: whose call it is.
        args: the arguments, in the order of the op's schema.
        out: the result.
    """

    consumer: Consumer
    args: Any
    out: Any

    @property
    def product(self) -> Product:
        """The first recorded call of the consumer."""
        return self.consumer.calls[0]

    @property
    def x(self) -> Tensor:
        """The activation."""
        found: Tensor = _at(self.args, _path(self.product.node.args, self.product.activation) or ())  # type: ignore[arg-type]
        return found

    @property
    def weight(self) -> Tensor:
        """The weight operand."""
        found: Tensor = _at(self.args, _path(self.product.node.args, self.product.weight) or ())
        return found

    def inputs(self, windows: bool = True) -> Iterator[tuple[int, Tensor]]:
        """Pairs (which of the stacked matrices, its inputs [samples, width] or [samples, width, positions])."""
        op = self.product.node.target
        if _is_convolution(op):
            if windows:
                yield from ((0, piece) for piece in patches(self.args))
            else:
                spatial = self.weight.dim() - 2
                x = self.x if self.x.dim() > spatial + 1 else self.x[None]
                yield 0, x.transpose(0, 1).flatten(1).T
        elif _is_grouped(op):
            start = 0
            for e, stop in enumerate(self.args[2].tolist()):
                yield e, self.x[start:stop]
                start = stop
        else:
            letters = self.product.letters
            assert letters is not None  # noqa: S101  else the consumer had a reason
            yield from enumerate(arrange(self.x, self.weight, letters).x)


# ----------------------------------------------------------------------------------------------------------- the run


class Enough(BaseException):
    """Raised by what watches a run to end it early."""


class Watch:
    """Runs a model, and sees the calls of consumers in it."""

    def __init__(self, model: nn.Module, wanted: Iterable[Consumer], see: Callable[[Call], None]) -> None:
        """`see` is called after each call of a consumer in `wanted`; it may raise `Enough`."""
        self.see = see
        keys = _Keys()
        self.table: dict[Any, Consumer] = {}
        self.paths: dict[tuple[str, str], list[tuple[Step, ...]]] = {}
        for consumer in wanted:
            for product in () if consumer.reason else consumer.calls:
                slot = _slot(product, keys)
                self.table[slot] = consumer
                paths = self.paths.setdefault(slot[:2], [])
                if slot[2] not in paths:
                    paths.append(slot[2])
        self.keys = keys.known
        self.makers = {form[0] for form in self.keys if isinstance(form, tuple)}
        every, parameters = all_tensors(model), {id(p) for p in model.parameters()}
        stand_in = {id(t): t if id(t) in parameters else t.clone() for t in every.values()}
        self.twin = skeleton(model, stand_in).eval()
        self.named = {id(stand_in[id(t)]): self.keys[name] for name, t in every.items() if name in self.keys}
        self.held = list(stand_in.values())
        self.made: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.paused = 0
        self.failure: BaseException | None = None

    def run(self, batch: Batch) -> Any:
        """Run the model on a batch; what it returns, or None where `see` had enough.

        Raises:
            InputError: the model fails on the batch.
        """
        self.made.clear()
        self.failure = None
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
                stack.enter_context(open_python_functions())
                stack.enter_context(eagerly())
                stack.enter_context(_Aten(self))
                stack.enter_context(_Python(self))
                out = self.twin(*batch.args, **batch.kwargs)
        except Enough:
            return None
        except Exception as error:
            if self.failure is not None:
                raise self.failure from None
            raise InputError(
                f"the model could not be run on a calibration batch: {type(error).__name__}: {error}"
            ) from error
        finally:
            self.made.clear()
        if self.failure is not None:  # the model's own code caught it
            raise self.failure
        return out

    def number(self, tensor: Tensor) -> int | None:
        """The number of a tensor that is, or is made of, parameters alone."""
        named = self.named.get(id(tensor))
        if named is not None:
            return named
        made = self.made.get(id(tensor))
        return made[1] if made is not None and made[0]() is tensor else None

    def saw(self, op: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Look at one call: is it a consumer's, does it make another tensor of weights?"""
        for path in self.paths.get(_signature(op, args), ()):
            try:
                weight = _at(args, path)
            except (IndexError, TypeError):
                continue
            number = self.number(weight) if isinstance(weight, Tensor) else None
            consumer = self.table.get((*_signature(op, args), path, number))
            if consumer is not None:
                self._tell(Call(consumer, args, out))
        if str(op) in self.makers:
            form = _form(op, args, kwargs, Tensor, self.number)
            number = None if form is None else self.keys.get(form)
            if number is not None:
                self._made(out, number)

    def _tell(self, call: Call) -> None:
        self.paused += 1
        try:
            self.see(call)
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self.paused -= 1

    def _made(self, out: Any, number: int) -> None:
        if isinstance(out, Tensor):
            self.made[id(out)] = weakref.ref(out), number
            return
        for i, tensor in enumerate(t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)):
            item = self.keys.get(("item", number, i))
            if item is not None:
                self.made[id(tensor)] = weakref.ref(tensor), item


class _Aten(TorchDispatchMode):
    """Sees each ATen call."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.watch.paused or func.namespace == "prim":
            return func(*args, **kwargs)
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        self.watch.saw(func, args, kwargs, out)
        return out


class _Python(TorchFunctionMode):
    """Sees the composite ops that a trace records whole."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        whole = WHOLE.get(func) if func.__hash__ is not None else None
        if whole is None or self.watch.paused:
            return func(*args, **kwargs)
        self.watch.paused += 1
        try:
            out = func(*args, **kwargs)
        finally:
            self.watch.paused -= 1
        if whole in PACKED and isinstance(args[3], (list, tuple)):
            whole = PACKED[whole]
        ordered, rest = in_order(whole, args, kwargs)
        self.watch.saw(whole, ordered, rest, out)
        return out


__all__ = ["Call", "Consumer", "Enough", "Watch", "arrange", "consumers", "observe"]
