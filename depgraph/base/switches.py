"""What is switched in torch and in Python while something runs: here, and nowhere else.

Two kinds. A function that is **replaced** is so in the thread that asked for it; other threads go on calling the one it was,
and when the last thread has left, the original function is back in place (`replaced`). What a process has but once (the states
of random generators, flags of libraries, the stance of the compiler) is switched by one thread at a time (`alone`): another
that wants to waits. All of them nest.
"""

from __future__ import annotations

import logging
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.backends.opt_einsum  # older versions of torch do not
import torch.nn.functional
from torch import nn

alone = threading.RLock()  # held while something is switched that a process has but once
_installing = threading.Lock()


class _Replacement:
    """A function in a class, a module or an object, and what stands in its place, thread by thread."""

    def __init__(self, owner: Any, name: str) -> None:
        """What stands there now is the original."""
        self.owner, self.name, self.users = owner, name, 0
        self.entry = vars(owner).get(name)  # None: it is inherited
        self.of_class = isinstance(self.entry, classmethod)
        self.original = self.entry.__func__ if self.of_class else getattr(owner, name)
        self.threads = threading.local()

    @property
    def stack(self) -> list[Callable[..., Any]]:
        """What this thread has put in its place, the last one on top."""
        found: list[Callable[..., Any]] = self.threads.__dict__.setdefault("stack", [])
        return found

    @classmethod
    def of(cls, owner: Any, name: str) -> _Replacement:
        """The one that stands there, or a new one in its place."""
        standing = vars(owner).get(name)
        known = getattr(getattr(standing, "__func__", standing), "replacement", None)
        if isinstance(known, cls):
            return known
        made = cls(owner, name)

        def dispatch(*args: Any, **kwargs: Any) -> Any:
            stack = made.threads.__dict__.get("stack")
            return (stack[-1] if stack else made.original)(*args, **kwargs)

        dispatch.__name__ = getattr(made.original, "__name__", name)
        dispatch.__doc__ = made.original.__doc__
        dispatch.replacement = made  # type: ignore[attr-defined]
        setattr(owner, name, classmethod(dispatch) if made.of_class else dispatch)
        return made

    def leave(self) -> None:
        """One fewer needs it: the last one puts the original back, unless somebody else has replaced it meanwhile."""
        self.users -= 1
        standing = vars(self.owner).get(self.name)
        mine = getattr(getattr(standing, "__func__", standing), "replacement", None) is self
        if not self.users and mine:
            if self.entry is None:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, self.entry)


@contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """In this thread ``owner.name(*args)`` is ``function(before, *args)``, where `before` is what it was until now."""
    with _installing:
        replacement = _Replacement.of(owner, name)
        replacement.users += 1
    stack = replacement.stack
    stack.append(partial(function, stack[-1] if stack else replacement.original))
    try:
        yield
    finally:
        stack.pop()
        with _installing:
            replacement.leave()


class ModuleCall(NamedTuple):
    """One call of a module, to be made."""

    function: Callable[..., Any]
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        """Make it."""
        return self.function(self.module, *self.args, **self.kwargs)


def around_calls(
    model: nn.Module, around: Callable[[str, nn.Module, ModuleCall], Any]
) -> AbstractContextManager[None]:
    """Each call of a module in `model` is ``around(path, module, run)``, where ``run()`` makes the call itself."""
    paths = {id(m): path for path, m in model.named_modules()}

    def call(before: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        path = paths.get(id(module))
        if path is None:
            return before(module, *args, **kwargs)
        return around(path, module, ModuleCall(before, module, args, kwargs))

    return replaced(nn.Module, "__call__", call)


def without_fast_attention() -> AbstractContextManager[None]:
    """Attention and encoder layers run as the ops that they are made of, not as one kernel."""
    return replaced(torch.backends.mha, "get_fastpath_enabled", lambda before: False)


@contextmanager
def open_functions() -> Iterator[None]:
    """Let modes see the torch functions that ``torch.nn.functional`` is written in, instead of its own names.

    Nor does einsum look for a path, as it does with opt_einsum installed: what compares sizes there isn't the user's code.
    """
    with ExitStack() as stack:
        for module in (torch.nn.functional, torch.functional):
            for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
                if hasattr(module, name):
                    stack.enter_context(replaced(module, name, lambda before, *_: False))
        stack.enter_context(replaced(torch.backends.opt_einsum, "is_available", lambda before: False))
        stack.enter_context(without_fast_attention())
        yield


def quiet_fakes() -> AbstractContextManager[None]:
    """Torch logs a traceback for each op that fails on fake tensors; here a failure only means the next way to run."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    return replaced(logger, "isEnabledFor", lambda before, level: False)


@contextmanager
def without_library_kernels() -> Iterator[None]:
    """Recurrent and encoder layers run as the products that they are made of, not as one kernel of a library."""
    with without_mkldnn(), without_cudnn(), without_fast_attention():
        yield


@contextmanager
def without_mkldnn() -> Iterator[None]:
    """Nothing runs as a kernel of oneDNN; ``torch.backends.mkldnn.flags`` takes other arguments in each version of torch."""
    with alone:
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(before)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Nothing runs as a kernel of cuDNN."""
    with alone, torch.backends.cudnn.flags(enabled=False):
        yield


class _Room:
    """How many ask for a deeper stack now, and how deep it was before the first."""

    lock = threading.Lock()
    asked = 0
    before = 0


@contextmanager
def deeper_stack() -> Iterator[None]:
    """Let Python nest calls three times as deep: what watches or copies a model needs more frames for each module in a module.

    So a model that runs by itself runs here, too. The last one that leaves, in whichever thread, gives the limit back.
    """
    with _Room.lock:
        if not _Room.asked:
            _Room.before = sys.getrecursionlimit()
            sys.setrecursionlimit(3 * _Room.before + 500)
        _Room.asked += 1
    try:
        yield
    finally:
        with _Room.lock:
            _Room.asked -= 1
            if not _Room.asked:
                sys.setrecursionlimit(_Room.before)


def source_of(function: Any) -> Callable[..., Any] | None:
    """The Python function that a scripted one was compiled from; None of one that was traced or loaded, which holds sizes for good."""
    held = vars(function)
    scripted = held.get("__qualname__") == "torch.jit.ScriptFunction"
    return held.get("_torchdynamo_inline") if scripted else None


def _from_source(before: Callable[..., Any], function: Any, *args: Any, **kwargs: Any) -> Any:
    source = source_of(function)
    return before(function, *args, **kwargs) if source is None else source(*args, **kwargs)


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled and scripted functions as the Python that they are made of: compiled code shows neither modules nor lines.

    There is room on the stack for those who watch.
    """
    with ExitStack() as stack:
        stack.enter_context(deeper_stack())
        stack.enter_context(replaced(torch.jit.ScriptFunction, "__call__", _from_source))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(alone)
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def without_warnings() -> Iterator[None]:
    """Warnings are not shown."""
    with alone, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def same_random_state() -> Iterator[None]:
    """What is drawn at random meanwhile leaves the generators of torch, numpy and Python as they were."""
    with alone:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        states = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
