"""Two torch modes that write each call of a run into a torch.fx graph.

The dispatch mode sees every ATen call and becomes a node of the graph. The function mode sees every call as the user's
Python made it, one level above: it hands out sizes that remember their origin (`sizes.py`), keeps the arguments that
repeat a size (`SizeUse`), and records some composite ops whole, because their parts would say less than their name
(attention, recurrent layers, matmul, einsum ...).
"""

from __future__ import annotations

import math
import operator
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from . import sizes
from .modes import CallMode, Kept
from .size_uses import NOTES, VALUED, Call, ScalarUse, SizeUse
from .tensors import tensor_leaves

aten = torch.ops.aten
Node = torch.fx.Node
Comparison = tuple[str, sizes.Expr, sizes.Expr, bool]  # operator, left, right, outcome

# Python functions recorded as one ATen call instead of the calls they are made of.
WHOLE: dict[Any, Any] = {
    torch.nn.functional.linear: aten.linear.default,
    torch._C._nn.linear: aten.linear.default,
    torch.nn.functional.scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
    torch._C._nn.scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
    torch.matmul: aten.matmul.default,
    torch.Tensor.matmul: aten.matmul.default,
    torch.Tensor.__matmul__: aten.matmul.default,
    torch.bmm: aten.bmm.default,
    torch.functional.einsum: aten.einsum.default,
    torch._VF.einsum: aten.einsum.default,  # type: ignore[attr-defined]
    torch.instance_norm: aten.instance_norm.default,
    torch.rms_norm: aten.rms_norm.default,
    torch.group_norm: aten.group_norm.default,
    torch.layer_norm: aten.layer_norm.default,
    torch.batch_norm: aten.batch_norm.default,
    torch.lstm: aten.lstm.input,
    torch.gru: aten.gru.input,
    torch.rnn_tanh: aten.rnn_tanh.input,
    torch.rnn_relu: aten.rnn_relu.input,
    torch._VF.lstm: aten.lstm.input,
    torch._VF.gru: aten.gru.input,
    torch._VF.rnn_tanh: aten.rnn_tanh.input,
    torch._VF.rnn_relu: aten.rnn_relu.input,
    torch.lstm_cell: aten.lstm_cell.default,
    torch.gru_cell: aten.gru_cell.default,
    torch.rnn_tanh_cell: aten.rnn_tanh_cell.default,
    torch.rnn_relu_cell: aten.rnn_relu_cell.default,
    torch._VF._pad_packed_sequence: aten._pad_packed_sequence.default,
    torch.cdist: aten.cdist.default,
    torch.repeat_interleave: aten.repeat_interleave.self_int,
    torch.Tensor.repeat_interleave: aten.repeat_interleave.self_int,
    torch.Tensor.expand_as: aten.expand_as.default,
    torch.Tensor.view_as: aten.view_as.default,
    torch.Tensor.reshape_as: aten.reshape_as.default,
    torch.chunk: aten.chunk.default,
    torch.Tensor.chunk: aten.chunk.default,
    torch.tensor_split: aten.tensor_split.sections,
    torch.Tensor.tensor_split: aten.tensor_split.sections,
    torch.hsplit: aten.hsplit.int,
    torch.Tensor.hsplit: aten.hsplit.int,
    torch.vsplit: aten.vsplit.int,
    torch.Tensor.vsplit: aten.vsplit.int,
    torch.dsplit: aten.dsplit.int,
    torch.Tensor.dsplit: aten.dsplit.int,
    torch._VF.broadcast_tensors: aten.broadcast_tensors.default,  # type: ignore[attr-defined]
    torch._VF.meshgrid: aten.meshgrid.default,  # type: ignore[attr-defined]
    torch.channel_shuffle: aten.channel_shuffle.default,
    torch.nn.functional.pad: aten.pad.default,
    torch._C._nn.pad: aten.pad.default,
    torch.pixel_shuffle: aten.pixel_shuffle.default,
    torch.pixel_unshuffle: aten.pixel_unshuffle.default,
    torch.bilinear: aten.bilinear.default,
    torch._C._nn.one_hot: aten.one_hot.default,
}


# Recurrent layers: the overload for a packed sequence, which Python calls by the same name.
PACKED: dict[Any, Any] = {
    aten.lstm.input: aten.lstm.data,
    aten.gru.input: aten.gru.data,
    aten.rnn_tanh.input: aten.rnn_tanh.data,
    aten.rnn_relu.input: aten.rnn_relu.data,
}


FAKE_CALL = 0.5e-3  # seconds that a call on fake tensors takes, about

_TORCH_ROOT = os.path.dirname(torch.__file__) + os.sep


_OWN_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


_user_code: dict[Any, bool] = {}


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

    def __init__(self, names: dict[int, str], held: set[str]) -> None:
        """`names`: id of a skeleton's tensor -> canonical name; those in `held` are neither parameters nor buffers."""
        self.held = held
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
        """The result of a call, unless arithmetic has become dearer than the same calls on fake tensors are."""
        if self.patience == math.inf:
            return func(*args, **kwargs)
        if self.patience < 0:
            raise TimeoutError("the run on real tensors takes long: fake ones will be faster")
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
            name = f"constant_{len(self.constants)}"
            self.constants[name] = tensor.detach().clone() if tensor.numel() < 1 << 20 else tensor
            kind = "constant"
        else:
            kind = "held" if name in self.held else "tensor"
        node = self.graph.create_node("get_attr", name.replace(".", "_"), (), {}, name=None)
        node.target = name
        node.meta.update(
            shapes=[tuple(tensor.shape)], kind=kind, module=self.stack[-1][0], source=source_line()
        )
        node.meta["dtype"] = tensor.dtype
        if kind != "constant":
            self.tensors[name] = node
        self.remember(tensor, node)
        return node

    def forget_other_runs(self) -> None:
        """Sizes that a cache of the user's code kept from an earlier run are plain numbers in this one."""

        def own(expr: sizes.Expr) -> bool:
            return all(node.graph is self.graph for node in sizes.nodes_in(expr))

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
        node.meta.update(shapes=[tuple(t.shape) for t in flat + nested], module=self.stack[-1][0])
        node.meta["source"] = source_line()
        node.meta["training"] = self.training
        node.meta["function"] = self.function
        if isinstance(out, torch.Tensor):
            node.meta["dtype"] = out.dtype
            self.remember(out, node)
        else:
            for i, tensor in enumerate(flat + nested):
                item = self.graph.create_node("call_function", operator.getitem)
                item.args = (node, i)
                item.meta.update(node.meta, shapes=[tuple(tensor.shape)], dtype=tensor.dtype)
                self.remember(tensor, item)
        return node


# Calls after which the values of a tensor go where no mode sees them.
ESCAPES = frozenset(
    {
        "numpy",
        "__array__",
        "tolist",
        "data_ptr",
        "__dlpack__",
        "_to_dlpack",
        "storage",
        "untyped_storage",
        "__deepcopy__",
    }
)


_composite: dict[Any, bool] = {}


def own_namespace(func: Any) -> bool:
    """Whether `func` is an op of a library other than torch's own, called as ``torch.ops.mylib.op``."""
    name = getattr(func, "namespace", None) or getattr(func, "_qualified_op_name", "").partition("::")[0]
    return bool(name) and name not in ("aten", "prim", "prims")


def is_composite(op: Any) -> bool:
    """Whether an op is defined by the ops it calls, and nothing else."""
    if op not in _composite:
        _composite[op] = torch._C._dispatch_has_kernel_for_dispatch_key(
            op.name(), "CompositeImplicitAutograd"
        )
    return _composite[op]


class AtenMode(CallMode):
    """Records each ATen call; what it writes into `kept` can be undone."""

    def __init__(self, recorder: Recorder, kept: Kept) -> None:
        super().__init__()
        self.recorder, self.kept = recorder, kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        r = self.recorder
        self.kept.before(func, args, kwargs)
        if r.paused or func.namespace == "prim" or func is aten.lift_fresh.default:
            return r.computed(func, args, kwargs)
        if is_composite(func):  # not taken apart before it came here, as in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        for leaf in args:  # constants are cloned at first sight: they may be changed in place later
            if isinstance(leaf, torch.Tensor):
                r.node(leaf)
        out = r.computed(func, args, kwargs)
        r.record(func, args, kwargs, out)
        return out


class PythonMode(TorchFunctionMode):
    """Sees each call as the user's Python made it: sizes with their origins, literals, composite ops as one."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        r = self.recorder
        whole = WHOLE.get(func) if func.__hash__ is not None else None
        name = getattr(func, "__name__", "").partition(".")[0]  # an OpOverload is called "view.default"
        if not r.paused:
            r.function = name
        if whole is None:
            before = len(r.graph.nodes)
            out = func(*args, **kwargs)
            if not r.paused:
                r.function = ""
            if type(out) is torch.Size:
                if not r.paused and args and isinstance(args[0], torch.Tensor):
                    node = r.node(args[0])
                    return torch.Size([sizes.Size(n, ("dim", node, d)) for d, n in enumerate(out)])
                return out
            if type(out) is int:
                return self._size(func, args, kwargs, out)
        else:
            before = -1
            r.paused += 1
            try:
                out = func(*args, **kwargs)
            finally:
                r.paused -= 1
            if not r.paused:
                if whole in PACKED and isinstance(args[3], (list, tuple)):
                    whole = PACKED[whole]  # (data, batch_sizes, hx, params, ...)
                r.record(whole, *in_order(whole, args, kwargs), out)
                r.function = ""
        if not r.paused:
            if name in ESCAPES:
                r.escape(args[:1], f"leaves torch through {name}()")
            if own_namespace(func):
                self._note_numbers(func, args, kwargs, before)
                return out
            if name in VALUED:
                self._note_scalars(pytree.tree_leaves(args[VALUED[name] :]), out)
            if name in NOTES:
                _note_sizes(r, name, args, kwargs, out)
            elif before != len(r.graph.nodes):
                self._note_scalars([*args, *kwargs.values()], out)
        return out

    def _note_numbers(self, func: Any, args: Any, kwargs: Any, before: int) -> None:
        """The numbers given to an op of somebody's library: only its rule can say which of them repeat a size."""
        r = self.recorder
        if len(r.graph.nodes) == before:
            return
        node = next(n for n in reversed(r.graph.nodes) if n.target is not operator.getitem)
        name, source = func.__name__.partition(".")[0], source_line()
        path, counts = r.stack[-1]
        occurrence = counts[name] = counts.get(name, -1) + 1
        for key, given in [*enumerate(args), *kwargs.items()]:
            several = isinstance(given, (list, tuple))
            for i, value in enumerate(given if several else [given]):
                where = (key, i) if several else (key,)
                if isinstance(value, int) and not isinstance(value, bool):
                    expr = sizes.expression(value)
                    r.size_uses.append(
                        SizeUse(name, int(value), expr, node, None, 0, path, source, occurrence, where)
                    )
                elif isinstance(value, float):
                    r.scalar_uses.append(ScalarUse(float(value), sizes.expression(value), node, source))

    def _size(self, func: Any, args: Any, kwargs: Any, out: int) -> int:
        """An int that a tensor method returned, tracked where it is a size."""
        if func in (torch.Tensor.numel, torch.Tensor.nelement, torch.numel) and not self.recorder.paused:
            node = self.recorder.node(args[0])
            factors = [("dim", node, d) for d in range(args[0].dim())]
            expr: Any = factors[0] if factors else out
            for factor in factors[1:]:
                expr = ("mul", expr, factor)
            return sizes.Size(out, expr) if factors else out
        if func is torch.Tensor.size and not self.recorder.paused:
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            tensor = args[0]
            if isinstance(dim, int) and isinstance(tensor, torch.Tensor):
                return sizes.Size(out, ("dim", self.recorder.node(tensor), int(dim) % tensor.dim()))
        return out

    def _note_scalars(self, args: Any, out: Any) -> None:
        for i, value in enumerate(args):
            number = isinstance(value, (sizes.Size, sizes.Scalar)) or type(value) is float
            if number and isinstance(out, torch.Tensor):
                node = self.recorder.node(out)
                self.recorder.scalar_uses.append(
                    ScalarUse(float(value), sizes.expression(value), node, source_line(), i)
                )


def in_order(op: Any, args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a Python call in the order of the ATen op's schema: what was given by name joins the others."""
    names = [a.name for a in op._schema.arguments]
    spelled = {"self": "input", "A": "tensor1", "B": "tensor2"}
    ordered, rest = list(args), dict(kwargs)
    for a in op._schema.arguments[len(ordered) :]:
        key = a.name if a.name in rest else spelled.get(a.name, a.name)
        if key in rest:
            ordered.append(rest.pop(key))
        elif any(n in rest or spelled.get(n) in rest for n in names[len(ordered) :]):
            ordered.append(a.default_value)
        else:
            break
    return ordered, rest


def _note_sizes(r: Recorder, name: str, args: Any, kwargs: Any, out: Any) -> None:
    """Keep the numbers in this call that repeat a size of a tensor."""
    path, counts = r.stack[-1]
    occurrence = counts[name] = counts.get(name, -1) + 1
    call = Call(name, args, kwargs, out)
    NOTES[name](call)
    source = source_line() if call.found else ""
    for value, expr, tensor, dim, extent, where, negative, minus in call.found:
        node = r.node_of.get(id(tensor))
        if node is not None:
            use = SizeUse(
                name, value, expr, node, dim, extent, path, source, occurrence, where, negative, minus
            )
            r.size_uses.append(use)


@contextmanager
def watch_modules(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Tell `recorder` which module of `model` is being called."""
    paths = {id(m): path for path, m in model.named_modules()}
    original = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        path = paths.get(id(self))
        if path is None:
            return original(self, *args, **kwargs)
        recorder.stack.append((path, {}))
        try:
            out = original(self, *args, **kwargs)
            if isinstance(self, ParametrizationList) and id(out) in recorder.node_of:
                recorder.parametrized.append((path, recorder.node_of[id(out)]))
            return out
        finally:
            recorder.stack.pop()

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


@contextmanager
def watch_functions(recorder: Recorder) -> Iterator[None]:
    """Record the backward of the user's autograd functions, too: it must fit the smaller tensors like the forward."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        run = original.__get__(None, cls)
        if recorder.paused or cls.__module__.partition(".")[0] == "torch":
            return run(*args, **kwargs)
        before = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
        out = run(*args, **kwargs)
        training, recorder.training = recorder.training, True  # a second forward is no work of inference
        try:
            _backward(cls, run, before, kwargs)
        except Exception as error:  # noqa: BLE001  whatever the user's backward raises here
            why = f"{type(error).__name__}: {error}"
            recorder.escape(
                (args, out), f"goes through {cls.__name__}, whose backward can't be traced ({why})"
            )
        finally:
            recorder.training = training
        return out

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


def _backward(cls: Any, run: Any, inputs: list[Any], kwargs: dict[str, Any]) -> None:
    """Run function `cls` forward and backward; a gradient is added to its input: both have the same axes."""
    floats = [a for a in inputs if isinstance(a, torch.Tensor) and (a.is_floating_point() or a.is_complex())]
    with torch.enable_grad():
        for a in floats:
            a.requires_grad_()
        outputs = run(*(a.view_as(a) if any(a is f for f in floats) else a for a in inputs), **kwargs)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    context: Any = next(
        (o.grad_fn for o in outputs if isinstance(o, torch.Tensor) and o.grad_fn is not None), None
    )
    if context is None:  # nothing to train
        return
    if not isinstance(context, torch.autograd.function.BackwardCFunction):
        raise TypeError("its result is a view or was changed in place")
    ones = [torch.ones_like(o.detach()) if isinstance(o, torch.Tensor) else None for o in outputs]
    gradients = cls.backward(context, *ones)
    gradients = gradients if isinstance(gradients, (tuple, list)) else (gradients,)
    for a, gradient in zip(inputs, gradients, strict=False):
        if isinstance(a, torch.Tensor) and isinstance(gradient, torch.Tensor):
            torch.add(a.detach(), gradient)


@contextmanager
def open_python_functions() -> Iterator[None]:
    """Let the modes see the torch functions that ``torch.nn.functional`` is written in, instead of its own names."""
    saved: list[tuple[Any, str, Any]] = []
    for module in (torch.nn.functional, torch.functional):
        for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
            if hasattr(module, name):
                saved.append((module, name, getattr(module, name)))
                setattr(module, name, lambda *_: False)
    saved.append((math, "sqrt", math.sqrt))
    math.sqrt = sizes.tracked_sqrt  # type: ignore[assignment]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, name, value in saved:
            setattr(module, name, value)
