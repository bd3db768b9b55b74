"""What is written down while a model runs: the graph, and beside it sizes, scalars, comparisons and escapes."""

from __future__ import annotations

import dis
import itertools
import math
import operator
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from types import CodeType, FunctionType, MappingProxyType
from typing import Any, Literal

import torch
from torch._C import _functorch

from ..base.values import tensor_leaves
from . import sizes
from .size_uses import ScalarUse, SizeUse

Node = torch.fx.Node
Shape = tuple[int, ...]
Comparison = tuple[str, sizes.Expr, sizes.Expr, bool]  # operator, left, right, outcome
Loss = tuple[
    sizes.Expr, str, str, str
]  # of an expression: what made a plain number of it, in which module, where

Choice = tuple[str, int]  # a test in a method of a module: its line, and its place in it

LENGTH = "len()"  # what makes one of the first size of a tensor, but in marked code
COUNTED = "range()"  # of a length in marked code, which may go on as a plain number: how often a loop runs
RETURNED = "being returned"  # what makes a plain number of a size that the model gives away

SLOT = "depgraph"  # where in a node's `meta` its record lies


@dataclass(frozen=True)
class NodeRecord:
    """What was seen of the call that a node of the graph stands for, or of the tensor: ``node.meta["depgraph"]``.

    Attributes:
        shapes: of the tensors that the call returned.
        dtypes: their types.
        strides: their strides, () of those that have none (sparse ones).
        kind: an input of the model; a parameter or buffer; a tensor that modules hold as a plain attribute; a constant that
            no module has; or a call.
        module: path of the module that was being called.
        source: the line of the user's code, ``file:line in function``.
        function: the torch function by which the user's code called it.
        training: whether that was in a run in train mode, behind the one in eval mode.
        backward: whether that was in the backward of an autograd function of the user's, which only training runs.
        several: the tensors came in a tuple or list: each has a node of its own (`operator.getitem`).
    """

    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]
    kind: Literal["input", "tensor", "attribute", "constant", "call"] = "call"
    module: str = ""
    source: str = ""
    function: str = ""
    training: bool = False
    backward: bool = False
    several: bool = False
    strides: tuple[Shape, ...] = ()

    @property
    def shape(self) -> Shape:
        """Shape of the (first) tensor."""
        return self.shapes[0]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the (first) tensor."""
        return self.dtypes[0]

    @property
    def one_tensor(self) -> bool:
        """Whether the result is a tensor, and nothing around it."""
        return len(self.shapes) == 1 and not self.several

    @property
    def holds_values(self) -> bool:
        """Whether the tensor holds real or complex numbers: neither whole ones nor truth values."""
        return self.dtype.is_floating_point or self.dtype.is_complex


def record_of(node: Node) -> NodeRecord:
    """What was seen of a node of a recorded graph (of any but the output)."""
    found: NodeRecord = node.meta[SLOT]
    return found


def write_record(node: Node, tensors: Sequence[torch.Tensor], **known: Any) -> NodeRecord:
    """Give `node` a record: of the `tensors` that it stands for, and what else is `known` (fields of `NodeRecord`)."""
    made = NodeRecord(
        tuple(tuple(t.shape) for t in tensors),
        tuple(t.dtype for t in tensors),
        strides=tuple(t.stride() if t.layout is torch.strided else () for t in tensors),
        **known,
    )
    node.meta[SLOT] = made
    return made


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module.

    Attributes:
        node: of the tensor that it returned; None where it returned no tensor, or several.
        returns: of a tuple, its length and the place of that tensor in it; None where a tensor was returned.
        training: whether that was in a run in train mode.
    """

    node: Node | None
    returns: tuple[int, int] | None
    training: bool


FAKE_CALL = 0.5e-3  # seconds that a call on fake tensors takes, about

_TORCH_ROOT = os.path.dirname(torch.__file__) + os.sep


_OWN_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


_runs = itertools.count(1)


@lru_cache(maxsize=4096)
def is_written_by_user(code: CodeType) -> bool:
    """Whether code is neither torch's nor ours."""
    name = code.co_filename
    return not (name.startswith((_TORCH_ROOT, _OWN_ROOT, "<")) or "contextlib" in name)


def is_told(code: CodeType) -> bool:
    """Whether code tells what it loads, by functions among its constants (see `literals.py`)."""
    return any(isinstance(constant, FunctionType) for constant in code.co_consts)


@lru_cache(maxsize=4096)
def has_ways(code: CodeType) -> bool:
    """Whether some of the code may not run where the rest does."""
    return any("JUMP" in op.opname and "IF" in op.opname for op in dis.get_instructions(code))


def source_line() -> str:
    """``file:line function`` of the innermost frame that is neither torch's nor ours."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if is_written_by_user(code):
            return f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"
        frame = frame.f_back
    return ""


@lru_cache(maxsize=4096)
def _column(code: CodeType, instruction: int) -> int:
    """Where in its line an instruction stands, also where marks stand in the code (see `literals.py`)."""
    if not hasattr(code, "co_positions"):  # before Python 3.11
        return 0
    *_, column, _ = list(code.co_positions())[instruction // 2]
    return column or 0


def inside(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the wrappers that ``torch.func`` puts around it."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def inner_dim(tensor: torch.Tensor, dim: int) -> int:
    """Which dim of the tensor inside is dim `dim` of `tensor`, to which ``torch.vmap`` shows fewer."""
    if not _functorch.is_functorch_wrapped_tensor(tensor):
        return dim
    mapped = _functorch.maybe_get_bdim(tensor) if _functorch.is_batchedtensor(tensor) else -1
    return inner_dim(_functorch.get_unwrapped(tensor), dim + 1 if 0 <= mapped <= dim else dim)


def _memory(tensor: torch.Tensor) -> Any:
    """What tensors have in common that are one view of one memory; None of those that have none."""
    if tensor.layout is not torch.strided or _functorch.is_functorch_wrapped_tensor(tensor):
        return None
    if not tensor.numel():
        return None
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


class Recorder:
    """Collects nodes; the two modes and the module wrapper write into it."""

    def __init__(
        self,
        names: dict[int, str],
        attribute_tensors: set[str],
        outside: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        """`names`: id of a skeleton's tensor -> its name; those in `attribute_tensors` are neither parameters nor buffers.

        `outside`: likewise for the tensors of the model itself, which nothing in a skeleton may lead to.
        """
        self.attribute_tensors, self.outside = attribute_tensors, outside
        self.run = next(_runs)
        self.outside_reads: dict[str, str] = {}  # name -> where it was read
        self.graph = torch.fx.Graph()
        self.node_of: dict[int, Node] = {}
        self.alive: list[Any] = []
        self.by_memory: dict[
            Any, Node
        ] = {}  # autograd keeps what it needs as other objects on the same memory
        self.names = names
        self.tensors: dict[str, Node] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.size_uses: list[SizeUse] = []
        self.scalar_uses: list[ScalarUse] = []
        self.comparisons: list[Comparison] = []
        self.reads: set[sizes.Expr] = set()
        self.losses: list[Loss] = []
        self.sizes_read: dict[
            sizes.Place, set[sizes.Expr]
        ] = {}  # what was loaded where, in code that can be changed
        self.not_run: frozenset[str] = frozenset()  # attributes that are named there and nowhere where it ran
        self.places: dict[Comparison, tuple[str, str]] = {}
        self.choices: dict[Choice, tuple[sizes.Expr, ...]] = {}
        self.other_way: Choice | None = None  # the test in forward that shall come out as it did not, once
        self.parametrized: list[tuple[str, Node]] = []
        self.calls: dict[str, list[ModuleCall]] = {}
        self.escapes: list[tuple[Node, str, str, str]] = []
        self.returned: dict[str, list[Node]] = {}
        self.stack: list[tuple[str, dict[str, int]]] = [("", {})]
        self.paused = 0
        self.function = ""  # the torch function that the user's code is in
        self.training = self.backward = False
        self.patience = math.inf  # seconds of arithmetic, beyond what calls on fake tensors would take

    def remember(self, tensor: torch.Tensor, node: Node) -> None:
        """`tensor` is the result of `node` from now on."""
        self.node_of[id(tensor)] = node
        self.alive.append(tensor)
        if (memory := _memory(tensor)) is not None:
            self.by_memory[memory] = node

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """What runs inside is not the model's: it is not recorded."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """What is recorded inside is forgotten if it ends in an error, which ends here."""
        before = len(self.graph.nodes)
        tables: tuple[dict[Any, Any], ...] = (
            self.node_of,
            self.by_memory,
            self.tensors,
            self.constants,
            self.places,
            self.choices,
        )
        lists: tuple[list[Any], ...] = (
            self.size_uses,
            self.scalar_uses,
            self.comparisons,
            self.losses,
            self.parametrized,
            self.escapes,
        )
        kept = [dict(t) for t in tables], [len(found) for found in lists], set(self.reads)
        try:
            yield
        except Exception:  # noqa: BLE001  whatever forward raises on a way that these inputs do not take
            for node in list(self.graph.nodes)[: before - 1 : -1] if before else ():
                self.graph.erase_node(node)
            for table, entries in zip(tables, kept[0], strict=True):
                table.clear()
                table.update(entries)
            for found, length in zip(lists, kept[1], strict=True):
                del found[length:]
            self.reads, self.stack[1:] = kept[2], []

    def aside(self, run: Callable[[], Any]) -> None:
        """Record what `run` does although no inference does it; forgotten if it ends in an error, which ends here."""
        stack, training, self.training = self.stack, self.training, True
        self.stack = list(stack)
        try:
            with self.attempt():
                run()
        finally:
            self.stack, self.training = stack, training

    def note_returned(self, path: str, out: Any) -> None:
        """Module `path` returned several tensors in a tuple, list or dict."""
        if type(out) in (list, tuple, dict) and path not in self.returned:
            found = [self.node_of.get(id(inside(t))) for t in tensor_leaves(out)]
            if len(found) > 1 and all(found):
                self.returned[path] = [node for node in found if node is not None]

    def computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of a call, unless arithmetic has become more expensive than the same calls on fake tensors are."""
        if self.patience == math.inf:
            return func(*args, **kwargs)
        if self.patience < 0:
            raise TimeoutError("real tensors take long: fake ones will be faster")
        start = time.thread_time()
        out = func(*args, **kwargs)
        self.patience -= time.thread_time() - start - FAKE_CALL
        return out

    def all_reads(self) -> set[sizes.Expr]:
        """What was read from objects, and the attributes of modules that numbers in calls and comparisons come from."""
        used = [u.expr for u in self.size_uses] + [u.expr for u in self.scalar_uses]
        used += [side for _, left, right, _ in self.comparisons for side in (left, right)]
        return self.reads.union(*map(sizes.attributes_in, used))

    def node(self, tensor: torch.Tensor) -> Node:
        """The node that produced `tensor`; one that nothing recorded is a parameter, a buffer or a constant."""
        tensor = inside(tensor)
        known = self.node_of.get(id(tensor))
        if known is not None:
            return known
        name = self.names.get(id(tensor))
        if name is None and (known := self.by_memory.get(_memory(tensor))) is not None:
            return known
        if name is None:
            if id(tensor) in self.outside:
                path = self.stack[-1][0] or "the model"
                self.outside_reads[self.outside[id(tensor)]] = f"forward of {path}, {source_line()}"
            name = f"constant_{len(self.constants)}"
            self.constants[name] = tensor.detach().clone() if tensor.numel() < 1 << 20 else tensor
            kind = "constant"
        else:
            kind = "attribute" if name in self.attribute_tensors else "tensor"
        node = self.graph.create_node("get_attr", name.replace(".", "_"), (), {}, name=None)
        node.target = name
        write_record(node, [tensor], kind=kind, module=self.stack[-1][0], source=source_line())
        if kind != "constant":
            self.tensors[name] = node
        self.remember(tensor, node)
        return node

    def forget_other_runs(self) -> None:
        """Numbers that a cache of the user's code kept from an earlier run are plain numbers in this one."""

        def own(expr: sizes.Expr) -> bool:
            return all(
                source[1].graph is self.graph
                if source[0] == "dim"
                else getattr(source[1], "run", 0) == self.run
                for source in sizes.sources_in(expr)
            )

        self.reads = {expr for expr in self.reads if own(expr)}
        self.comparisons = [c for c in self.comparisons if own(c[1]) and own(c[2])]
        self.losses = [loss for loss in self.losses if own(loss[0])]
        self.size_uses = [u if own(u.expr) else replace(u, expr=u.value) for u in self.size_uses]
        self.scalar_uses = [u if own(u.expr) else replace(u, expr=u.value) for u in self.scalar_uses]

    def called(self, path: str, out: Any) -> None:
        """Module `path` was called and returned `out`."""
        if self.paused:
            return
        several = isinstance(out, (tuple, list))
        places = [i for i, t in enumerate(out if several else (out,)) if isinstance(t, torch.Tensor)]
        whole = isinstance(out, torch.Tensor) or (type(out) is tuple and len(places) > 0)
        tensor = (out[places[0]] if several else out) if whole else None
        node = None if tensor is None else self.node_of.get(id(inside(tensor)))
        returns = (len(out), places[0]) if several and whole else None
        self.calls.setdefault(path, []).append(ModuleCall(node, returns, self.training))

    def compared(self, name: str, left: sizes.Expr, right: sizes.Expr, outcome: bool, frame: Any) -> bool:
        """A test of two numbers came out so in `frame`; returns what the code shall see (as a `sizes.Listener`)."""
        seen = self.decided(frame, outcome, (left, right))
        test = name, left, right, outcome
        if test not in self.places and seen == outcome:
            self.comparisons.append(test)
            self.places[test] = self.stack[-1][0], source_line()
        return seen

    def decided(self, frame: Any, outcome: bool, by: tuple[sizes.Expr, ...]) -> bool:
        """Code in `frame` got `outcome` of a test of the sizes `by`, or of values; returns what it shall see."""
        code = frame.f_code
        if not code.co_argcount or not is_written_by_user(code):
            return outcome
        if not isinstance(frame.f_locals.get(code.co_varnames[0]), torch.nn.Module):
            return outcome
        choice = f"{code.co_filename}:{frame.f_lineno} in {code.co_name}", _column(code, frame.f_lasti)
        self.choices.setdefault(choice, by)
        if choice != self.other_way:
            return outcome
        self.other_way = None
        return not outcome

    def read(self, value: Any) -> None:
        """An object that a module holds was asked for `value`."""
        self.reads.update(sizes.expressions_in(value))

    def size_read(self, place: sizes.Place, expr: sizes.Expr | None) -> None:
        """The dim `expr` was loaded at `place`, or something else."""
        self.sizes_read.setdefault(place, set()).add(expr)

    def computed_with(self, expr: sizes.Expr) -> None:
        """Code computes with `expr`; where that is other code than loaded it, it may use it otherwise on other ways."""
        places = sizes.places_in(expr)
        frame: Any = sys._getframe(1) if places else None
        while frame is not None and not is_told(frame.f_code):
            if is_written_by_user(frame.f_code) and has_ways(frame.f_code):
                for place in places:
                    self.size_read(place, None)
                return
            frame = frame.f_back

    def lost(self, expr: sizes.Expr, how: str) -> None:
        """A number became something that carries no expression."""
        if not self.paused:
            self.computed_with(expr)
            self.losses.append((expr, how, self.stack[-1][0], source_line()))

    def escape(self, values: Any, text: str) -> None:
        """The tensors in `values` go where they can't be followed: every axis of theirs stays, because of `text`."""
        for tensor in tensor_leaves(values):
            self.escapes.append((self.node(tensor), text, self.stack[-1][0], source_line()))

    def argument(self, value: Any) -> Any:
        """`value` as an fx argument: tensors become nodes, tracked numbers plain ones."""
        if isinstance(value, torch.Tensor):
            return self.node(value)
        if isinstance(value, (list, tuple)):
            return (
                [self.argument(v) for v in value]
                if isinstance(value, list)
                else tuple(map(self.argument, value))
            )
        if isinstance(value, dict):
            return {k: self.argument(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*map(self.argument, (value.start, value.stop, value.step)))
        return sizes.plain(value)

    def record(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Node | None:
        """Append the call `op(*args, **kwargs) -> out` and map its tensors to it."""
        results = [out] if isinstance(out, torch.Tensor) else out if isinstance(out, (tuple, list)) else []
        flat = [t for t in results if isinstance(t, torch.Tensor)]
        nested = [
            u for t in results if isinstance(t, (tuple, list)) for u in t if isinstance(u, torch.Tensor)
        ]
        given = tuple(map(self.argument, args)), {k: self.argument(v) for k, v in kwargs.items()}
        node = self.graph.create_node("call_function", op)
        node.args, node.kwargs = given  # given to create_node, each would be searched for symbolic numbers
        several = not isinstance(out, torch.Tensor)
        known = {
            "module": self.stack[-1][0],
            "source": source_line(),
            "function": self.function,
            "training": self.training,
            "backward": self.backward,
        }
        write_record(node, flat + nested, several=several, **known)
        if not several:
            self.remember(out, node)
        for i, tensor in enumerate(flat + nested if several else ()):
            item = self.graph.create_node("call_function", operator.getitem)
            item.args = (node, i)
            write_record(item, [tensor], **known)
            self.remember(tensor, item)
        return node
