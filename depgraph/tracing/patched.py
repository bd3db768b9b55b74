"""What is changed in torch while a trace runs, so that its modes see modules, autograd functions and Python's own calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from . import sizes
from .recorder import Recorder


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
    for (module, name), function in sizes.FUNCTIONS.items():
        saved.append((module, name, function))
        setattr(module, name, sizes.tracked_function(module, name))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, name, value in saved:
            setattr(module, name, value)
