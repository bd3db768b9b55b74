"""A model without memory for its parameters, from its owner's own code; buffers have their values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..base.errors import InputError, listed
from ..base.switches import replaced, same_random_state, without_warnings
from ..store.files import Checkpoint
from ..store.layout import Laid
from ..surgery.apply import assign
from ..tracing.tensors import named_tensors

Tensor = torch.Tensor


def shell_of(factory: Callable[[], Any], what: str = "factory") -> nn.Module:
    """What `factory` builds, in eval mode, each parameter on the meta device from the moment a module takes it.

    The random state is as it was. So no more than one parameter at a time has memory, and buffers, which code may look at,
    are what that code makes them.

    Raises:
        InputError: it fails, or returns no module.
    """
    try:
        with same_random_state(), _parameters_on_meta():
            model = factory()
    except Exception as error:
        raise InputError(
            f"{what} does not build the model: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{what} must return a torch.nn.Module, not {type(model).__name__}")
    tensors = {n: p for n, p in model.named_parameters() if not p.is_meta}
    assign(model, tensors, {n: _on_meta(p) for n, p in tensors.items()})
    return model.eval()


def _on_meta(parameter: Any) -> nn.Parameter:
    made = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """A parameter that a module registers goes to the meta device; what is drawn to fill one there is not drawn."""
    moved: dict[int, tuple[weakref.ref[Any], nn.Parameter]] = {}

    def registered(before: Callable[..., None], module: nn.Module, name: str, parameter: Any) -> None:
        if type(parameter) is nn.Parameter and not parameter.is_meta:
            known = moved.get(id(parameter))
            if known is None or known[0]() is not parameter:
                known = moved[id(parameter)] = weakref.ref(parameter), _on_meta(parameter)
            parameter = known[1]
        before(module, name, parameter)

    def filled(fill: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return tensor if tensor.is_meta else fill(tensor, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(without_warnings())
        stack.enter_context(replaced(nn.Module, "register_parameter", registered))
        for name in dir(nn.init):
            if name.endswith("_") and not name.startswith("_"):
                stack.enter_context(replaced(nn.init, name, filled))
        yield


def laid_by_name(model: nn.Module, checkpoint: Checkpoint) -> tuple[dict[str, Laid], dict[str, str]]:
    """The model's tensors as they lie in a checkpoint that has the names of its ``state_dict``; what else is in there."""
    ties = named_tensors(model)[1]
    laid: dict[str, Laid] = {}
    known = set(model.state_dict())
    for name, one in checkpoint.stored.items():
        if name in known:
            laid.setdefault(ties.get(name, name), Laid.stored(name, one.shape, one.dtype))
    return laid, {name: name for name in checkpoint.stored if name not in known}


def check_laid(model: nn.Module, laid: Mapping[str, Laid], checkpoint: Checkpoint) -> None:
    """The files must have a value of a fitting kind for every parameter.

    Raises:
        InputError: naming what is missing, or has another shape or kind.
    """
    problems = []
    for name, tensor in named_tensors(model)[0].items():
        if name not in laid:
            if tensor.is_meta:
                there = next((n for n in checkpoint.stored if n.endswith(f".{name}")), None)
                but = f", which have {there!r}" if there else ""
                problems.append(f"{name!r} of the model is in none of its files{but}")
            continue
        found = laid[name]
        if tuple(found.shape) != tuple(tensor.shape):
            problems.append(
                f"{name!r} has shape {tuple(found.shape)} in the files, {tuple(tensor.shape)} in the model"
            )
        elif (
            found.dtype.is_floating_point != tensor.dtype.is_floating_point
            or found.dtype.is_complex != tensor.dtype.is_complex
        ):
            problems.append(
                f"{name!r} is {found.dtype} in the files and {tensor.dtype} in the model: packed or quantised values can't be cut, "
                "convert the checkpoint first"
            )
    if problems:
        raise InputError(listed(f"{checkpoint.folder} does not fit its model:", problems))


def fill_buffers(model: nn.Module, laid: Mapping[str, Laid], read: Callable[[str], Tensor]) -> None:
    """Buffers that are in the files take their values from there."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in laid and not buffer.is_meta:
                buffer.copy_(read(name))
