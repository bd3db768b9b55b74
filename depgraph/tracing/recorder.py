"""What is written down while a model runs: the graph, and beside it sizes, scalars, comparisons and escapes."""

from __future__ import annotations

import itertools
import math
import operator
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch

from ..base.values import tensor_leaves
from . import sizes
from .size_uses import ScalarUse, SizeUse

Node = torch.fx.Node
Shape = tuple[int, ...]
Comparison = tuple[str, sizes.Expr, sizes.Expr, bool]  # operator, left, right, outcome

SLOT = "depgraph"  # where in a node's `meta` its record lies


@dataclass(frozen=True)
class NodeRecord:
    """What was seen of the call that a node of the graph stands for, or of the tensor: ``node.meta["depgraph"]``.

    Attributes:
        shapes: of the tensors that the call returned.
        dtypes: their types.
        kind: an input of the model; a parameter or buffer; a tensor that modules hold as a plain attribute; a constant that
            no module has; or a call.
        module: path of the module that was being called.
        source: the line of the user's code, ``file:line in function``.
        function: the torch function by which the user's code called it.
        training: whether that was in a run in train mode, behind the one in eval mode.
        several: the tensors came in a tuple or list: each has a node of its own (`operator.getitem`).
    """

    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]
    kind: Literal["input", "tensor", "attribute", "constant", "call"] = "call"
    module: str = ""
    source: str = ""
    function: str = ""
    training: bool = False
    several: bool = False

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
    made = NodeRecord(tuple(tuple(t.shape) for t in tensors), tuple(t.dtype for t in tensors), **known)
    node.meta[SLOT] = made
    return made


FAKE_CALL = 0.5e-3  # seconds that a call on fake tensors takes, about

_TORCH_ROOT = os.path.dirname(torch.__file__) + os.sep


_OWN_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


_user_code: dict[Any, bool] = {}
_runs = itertools.count(1)


def source_line() -> str:
    """``file:line function`` of the innermost frame that is neither torch's nor ours."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        ours = _user_code.get(code)
        if ours is None:
            name = code.co_filename
            ours = _user_code[code] = not (
                name.startswith((_TORCH_ROOT, _OWN_ROOT, "<")) or "contextlib" in name
            )
        if ours:
            return f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"
        frame = frame.f_back
    return ""


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
        self.names = names
        self.tensors: dict[str, Node] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.size_uses: list[SizeUse] = []
        self.scalar_uses: list[ScalarUse] = []
        self.comparisons: list[Comparison] = []
        self.reads: set[sizes.Expr] = set()
        self.parametrized: list[tuple[str, Node]] = []
        self.escapes: list[tuple[Node, str, str, str]] = []
        self.stack: list[tuple[str, dict[str, int]]] = [("", {})]
        self.paused = 0
        self.function = ""  # the torch function that the user's code is in
        self.training = False
        self.patience = math.inf  # seconds of arithmetic, beyond what calls on fake tensors would take

    def remember(self, tensor: torch.Tensor, node: Node) -> None:
        """`tensor` is the result of `node` from now on."""
        self.node_of[id(tensor)] = node
        self.alive.append(tensor)

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
        known = self.node_of.get(id(tensor))
        if known is not None:
            return known
        name = self.names.get(id(tensor))
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
            return all(node.graph is self.graph for node in sizes.nodes_in(expr)) and all(
                getattr(key[1], "run", 0) == self.run for key in sizes.attributes_in(expr)
            )

        self.reads = {expr for expr in self.reads if own(expr)}
        self.comparisons = [c for c in self.comparisons if own(c[1]) and own(c[2])]
        self.size_uses = [u if own(u.expr) else replace(u, expr=u.value) for u in self.size_uses]
        self.scalar_uses = [u if own(u.expr) else replace(u, expr=u.value) for u in self.scalar_uses]

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
