"""What the modes that watch ATen calls have in common, and the one that undoes what a run writes into weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from .checks import function
from .errors import InputError


class CallMode(TorchDispatchMode):
    """A mode that sees ATen calls, without the wrapper around each that only matters under ``torch.compile``."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def tensors_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors among the arguments of an ATen call, which come alone or in lists."""
    found: list[torch.Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(v for v in value if isinstance(v, torch.Tensor))
    return found


class WriteGuard:
    """Tensors of the user's that a run shares: what it writes into their memory is undone by `restore`.

    Some layers write into their own weights (``nn.Embedding(max_norm=...)``). A copy is made at the first such write.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        """Nothing is copied yet."""
        self.owners: dict[int, list[torch.Tensor]] = {}
        for t in tensors:
            memory = _memory(t)
            if memory is not None:
                self.owners.setdefault(memory, []).append(t)
        self.saved: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def before(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Copy what the ATen call `func(*args, **kwargs)` is about to write into."""
        if not self.owners or not func._schema.is_mutable:
            return
        for memory in map(_memory, tensors_in(args, kwargs)):
            if memory in self.owners and memory not in self.saved:
                self.saved[memory] = [(own, own.detach().clone()) for own in self.owners[memory]]

    def restore(self) -> None:
        """Give the tensors their values back."""
        for own, value in (pair for pairs in self.saved.values() for pair in pairs):
            with torch.no_grad(), torch.inference_mode(own.is_inference()):
                own.detach().copy_(value)
        self.saved = {}


def _memory(tensor: Any) -> int | None:
    """What tells the memory of a tensor from that of others; None where it is not one plain piece."""
    if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        return None
    with torch._C.DisableTorchFunctionSubclass():  # one that is made on demand is not asked for its values
        return int(tensor.untyped_storage()._cdata)


class WriteGuardMode(CallMode):
    """What runs inside may write into `tensors`: afterwards they are as they were."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        """`tensors`: what is shared with the user's model."""
        super().__init__()
        self.kept = WriteGuard(tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.kept.before(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.kept.restore()


Score = Callable[[nn.Module], Any]  # a number; higher is better


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """`model` in train or eval mode; afterwards each module is in the mode it was in, also after an exception."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        if any(before != training for _, before in modes):
            model.train(training)
        yield
    finally:
        for module, before in modes:
            if module.training != before:
                module.training = before


def set_mode(model: nn.Module, training: bool) -> None:
    """Train or eval mode for `model`, which is not told where it is in it: its own `train` may drop what it has cached."""
    if any(module.training != training for module in model.modules()):
        model.train(training)


def score_of(score: Score, model: nn.Module) -> float:
    """What `score` says of `model`, which is in eval mode meanwhile.

    Args:
        score: ``score(model)`` -> a number (a float, or a tensor of one entry); higher is better: an accuracy, or the
            negative of a loss.
        model: handed to `score` as it is.

    Raises:
        InputError: `score` is not a function, or gave no finite number.
    """
    function("score", score, "model")
    with in_mode(model, False):
        given = score(model)
    try:
        value = float(given.detach() if isinstance(given, torch.Tensor) else given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"score must return a number, not {given!r}"[:300]) from error
    if not isfinite(value):
        raise InputError(f"score gave {value}: a finite number is needed")
    return value
