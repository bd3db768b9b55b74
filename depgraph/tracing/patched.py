"""What is changed in torch while a trace runs, so that its modes see modules, autograd functions and Python's own calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ..base.switches import ModuleCall, around_calls, open_functions, replaced, source_of
from ..base.values import map_tensors
from . import sizes
from .code_reads import other_forwards
from .recorder import Recorder


def watch_modules(model: nn.Module, recorder: Recorder) -> AbstractContextManager[None]:
    """Tell `recorder` which module of `model` is being called."""

    def around(path: str, module: nn.Module, run: ModuleCall) -> Any:
        recorder.stack.append((path, {}))
        try:
            out = run()
            recorder.note_returned(path, out)
            kind: type = type(module)
            for name in other_forwards(kind):
                arguments, keywords = map_tensors((run.args, run.kwargs), torch.clone)
                recorder.aside(partial(getattr(module, name), *arguments, **keywords))
            if isinstance(module, ParametrizationList) and id(out) in recorder.node_of:
                recorder.parametrized.append((path, recorder.node_of[id(out)]))
            recorder.called(path, out)
            return out
        finally:
            recorder.stack.pop()

    return around_calls(model, around)


def watch_functions(recorder: Recorder) -> AbstractContextManager[None]:
    """Record the backward of the user's autograd functions, too: it must fit the smaller tensors like the forward."""

    def apply(before: Callable[..., Any], cls: Any, *args: Any, **kwargs: Any) -> Any:
        run = partial(before, cls)
        if recorder.paused or cls.__module__.partition(".")[0] == "torch":
            return run(*args, **kwargs)
        inputs = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
        out = run(*args, **kwargs)
        training, backward = recorder.training, recorder.backward
        recorder.training = True  # a second forward is not part of inference
        try:
            _backward(recorder, cls, run, inputs, kwargs)
        except Exception as error:  # noqa: BLE001  whatever the user's backward raises here
            why = f"{type(error).__name__}: {error}"
            recorder.escape(
                (args, out), f"goes through {cls.__name__}, whose backward can't be traced ({why})"
            )
        finally:
            recorder.training, recorder.backward = training, backward
        return out

    return replaced(torch.autograd.Function, "apply", apply)


def _backward(recorder: Recorder, cls: Any, run: Any, inputs: list[Any], kwargs: dict[str, Any]) -> None:
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
    recorder.backward = True
    gradients = cls.backward(context, *ones)
    gradients = gradients if isinstance(gradients, (tuple, list)) else (gradients,)
    for a, gradient in zip(inputs, gradients, strict=False):
        if isinstance(a, torch.Tensor) and isinstance(gradient, torch.Tensor):
            torch.add(a.detach(), gradient)


def watch_scripts(recorder: Recorder) -> AbstractContextManager[None]:
    """What goes through compiled code without a source can't be followed: nobody sees where its numbers come from."""

    def call(before: Callable[..., Any], function: Any, *args: Any, **kwargs: Any) -> Any:
        if source_of(function) is not None:
            return before(function, *args, **kwargs)
        with torch._C.DisableTorchFunction():
            out = before(function, *args, **kwargs)
        if not recorder.paused:
            recorder.escape(
                (args, kwargs, out), f"goes through {function.name}(), TorchScript without a source"
            )
        return out

    return replaced(torch.jit.ScriptFunction, "__call__", call)


@contextmanager
def open_python_functions() -> Iterator[None]:
    """Modes see the calls inside ``torch.nn.functional``, and functions of tracked numbers are tracked."""
    with open_functions(), ExitStack() as stack:
        for module, name in sizes.FUNCTIONS:
            stack.enter_context(replaced(module, name, sizes.tracked_function(module, name)))
        yield
