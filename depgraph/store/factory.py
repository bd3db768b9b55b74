"""The original model, from its owner's own code: on the meta device first, where weights take no memory and no time."""

from __future__ import annotations

import inspect
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..base.checks import named_object
from ..base.errors import InputError, StoreError
from ..base.switches import replaced, same_random_state, without_warnings
from ..tracing.copying import inside

Factory = Callable[..., nn.Module]


def resolved(factory: Any) -> Factory:
    """The function that `factory` is or names (``"package.module:function"``), or an `InputError`."""
    if isinstance(factory, nn.Module):
        raise InputError(
            "factory is a model: give a function that builds the original, or call apply(model, plan)"
        )
    if isinstance(factory, str):
        factory = named_object("factory", factory)
    if not callable(factory):
        raise InputError(f"factory must be a function that builds the original model, not {factory!r:.80}")
    return factory


def takes_config(factory: Factory) -> bool:
    """Whether a factory must be given one argument: the config that was saved beside the model."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.default is p.empty and p.kind in positional for p in parameters) == 1


def build(factory: Callable[[], nn.Module], device: str) -> tuple[nn.Module, bool]:
    """What `factory` builds on `device`, and whether nobody else can have hold of it, so that it may be changed.

    The random state is left as it was. A factory that fails, or returns no module, is a `StoreError`.
    """
    meta = device == "meta"
    try:
        with same_random_state(), _without_work() if meta else nullcontext(None) as made:
            model = factory()
    except Exception as error:
        raise StoreError(f"the factory failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise StoreError(f"the factory must return a module, not {model!r:.80}")
    return model, made is not None and all(m in made for m in model.modules())


@contextmanager
def _without_work() -> Iterator[weakref.WeakSet[nn.Module]]:
    """New tensors are on the meta device, and nothing is drawn to fill them; yields the modules that are made."""
    made: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def noted(before: Callable[..., None], module: nn.Module, *args: Any, **kwargs: Any) -> None:
        made.add(module)
        before(module, *args, **kwargs)

    def filled(fill: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return tensor if tensor.is_meta else fill(tensor, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(without_warnings())  # a copy into a meta tensor does nothing, and says so
        stack.enter_context(replaced(nn.Module, "__init__", noted))
        for name in dir(nn.init):
            if name.endswith("_") and not name.startswith("_"):
                stack.enter_context(replaced(nn.init, name, filled))
        stack.enter_context(torch.device("meta"))
        yield made


def left_on_meta(model: nn.Module) -> list[str]:
    """Where a model still has a tensor without values, or remembers the meta device: also in objects and closures."""
    found: list[str] = []
    seen: set[int] = set()
    ahead: list[tuple[tuple[Any, ...], Any]] = [((), model)]
    while ahead:
        place, value = ahead.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            without = value.is_meta
        else:
            without = type(value) is torch.device and value.type == "meta"
        if without:
            found.append(".".join(map(str, place)))
            continue
        for key, inner in inside(value):
            kind = type(inner)
            if kind not in _PLAIN and (kind not in _TABLES or inner):
                ahead.append(((*place, key), inner))
    return found


_TABLES = frozenset((dict, OrderedDict, list, tuple, set, frozenset, deque))
_PLAIN = frozenset((int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.Size))
