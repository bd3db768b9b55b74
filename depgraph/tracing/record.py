"""Two torch modes that write each call of a run into a torch.fx graph.

The dispatch mode sees every ATen call and becomes a node of the graph. The function mode sees every call as the user's
Python made it, one level above: it hands out sizes that remember their origin (`sizes.py`), keeps the arguments that
repeat a size (`SizeUse`), and records some composite ops whole, because their parts would say less than their name
(attention, recurrent layers, matmul, einsum ...).
"""

from __future__ import annotations

import functools
import math
import operator
import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..base.running import CallMode, WriteGuard
from . import sizes
from .recorder import LENGTH, Recorder, inner_dim, inside, source_line
from .size_uses import DIVIDING, NOTES, VALUED, Call, ScalarUse, SizeUse
from .whole import MOVING, PACKED, WHOLE, in_order, is_composite, own_namespace

aten = torch.ops.aten

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


DECIDES = ("__bool__", "is_nonzero", "equal", "allclose")  # calls whose results Python mostly branches on


class AtenMode(CallMode):
    """Records each ATen call; what it writes into `kept` can be undone."""

    def __init__(self, recorder: Recorder, kept: WriteGuard) -> None:
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
        mapped = torch._C._functorch.maybe_current_level() is not None
        if mapped or (torch.is_grad_enabled() and func not in MOVING):  # derivatives are of their parts
            whole = None
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
                    made = (sizes.Size(n, dim) for n, dim in zip(out, _dims(r, args[0]), strict=True))
                    return torch.Size(list(made))
                return out
            if type(out) is int:
                return self._size(func, args, kwargs, out)
            if type(out) is tuple and func is torch.Tensor.stride:
                return tuple(self._stride(args[0], d, n) for d, n in enumerate(out))
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
            if type(out) is bool and name in DECIDES:
                out = r.decided(sys._getframe(1), out, ())
            if name in ESCAPES:
                r.escape(args[:1], f"leaves torch through {name}()")
            if own_namespace(func):
                self._note_numbers(func, args, kwargs, before)
                return out
            if name in VALUED:
                self._note_scalars(pytree.tree_leaves(args[VALUED[name] :]), out)
            if name in NOTES:
                known = _note_sizes(r, name, args, kwargs, out)
                given = pytree.tree_leaves((args, kwargs))
                self._note_scalars(
                    [a for a in given if type(a) is not sizes.Size or a.expr not in known], out, args
                )
            elif before != len(r.graph.nodes):
                self._note_scalars(pytree.tree_leaves((args, kwargs)), out, args)
            if name in DIVIDING:
                _note_sizes(r, name, args, kwargs, out)
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
        tensor, name = args[0] if args else None, getattr(func, "__name__", "")
        if self.recorder.paused or not isinstance(tensor, torch.Tensor) or not tensor.dim():
            return out
        factors = _dims(self.recorder, tensor)
        if func is torch.Tensor.size:
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return sizes.Size(out, factors[dim]) if isinstance(dim, int) else out
        if func is torch.Tensor.__len__:
            self.recorder.lost(factors[0], LENGTH)
        elif name == "numel" or func in (torch.Tensor.nelement, torch.numel):
            return sizes.Size(out, _product(factors))
        elif func is torch.Tensor.nbytes.__get__:  # type: ignore[attr-defined]
            return sizes.Size(out, ("mul", _product(factors), tensor.element_size()))
        elif name == "stride":
            return self._stride(tensor, args[1] if len(args) > 1 else kwargs["dim"], out)
        elif name == "storage_offset" and out:
            self.recorder.lost(_product(factors), f"{name}()")
        return out

    def _stride(self, tensor: torch.Tensor, dim: int, step: int) -> int:
        """The stride of a dim: of a contiguous tensor, tracked."""
        if self.recorder.paused:
            return step
        factors = _dims(self.recorder, tensor)
        dim %= len(factors)
        if tensor.is_contiguous() and factors[dim + 1 :] and step == math.prod(tensor.shape[dim + 1 :]):
            return sizes.Size(step, _product(factors[dim + 1 :]))
        if step > 1:
            self.recorder.lost(_product(factors), "stride()")
        return step

    def _note_scalars(self, given: Any, *changed: Any) -> None:
        """The numbers among what an op is `given` to compute with; the first tensor that it `changed` or gave stands for it."""
        numbers = [
            (i, v)
            for i, v in enumerate(given)
            if isinstance(v, (sizes.Size, sizes.Scalar)) or type(v) is float
        ]
        leaves = pytree.tree_leaves(changed) if numbers else []
        made = next((t for t in leaves if isinstance(t, torch.Tensor)), None)
        if made is None:
            return
        node = self.recorder.node(made)
        for i, value in numbers:
            if type(value) is sizes.Size:
                self.recorder.computed_with(value.expr)
            self.recorder.scalar_uses.append(
                ScalarUse(float(value), sizes.expression(value), node, source_line(), i)
            )


def _dims(r: Recorder, tensor: torch.Tensor) -> list[Any]:
    """The expressions of the sizes of a tensor."""
    node = r.node(tensor)
    return [("dim", node, inner_dim(tensor, d)) for d in range(tensor.dim())]


def _product(factors: list[Any]) -> Any:
    return functools.reduce(lambda a, b: ("mul", a, b), factors)


def _note_sizes(r: Recorder, name: str, args: Any, kwargs: Any, out: Any) -> set[sizes.Expr]:
    """Keep the numbers in this call that repeat a size of a tensor; returns what they are made of."""
    path, counts = r.stack[-1]
    occurrence = counts[name] = counts.get(name, -1) + 1
    call = Call(name, args, kwargs, out)
    (NOTES.get(name) or DIVIDING[name])(call)
    source = source_line() if call.found else ""
    for value, expr, tensor, dim, extent, where, negative, minus in call.found:
        node = r.node_of.get(id(inside(tensor)))
        if node is not None:
            dim = None if dim is None else inner_dim(tensor, dim)
            use = SizeUse(
                name, value, expr, node, dim, extent, path, source, occurrence, where, negative, minus
            )
            r.size_uses.append(use)
    return call.limits.union(found[1] for found in call.found if isinstance(found[1], tuple))
