"""A model without memory for its parameters, from its owner's own code; buffers have their values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..base.errors import InputError, listed
from ..base.switches import replaced, same_random_state, without_warnings
from ..store.files import Checkpoint
from ..store.layout import Laid
from ..surgery.apply import assign
from ..tracing.fakes import Shapes
from ..tracing.tensors import attribute_tensors, named_tensors

Tensor = torch.Tensor


def shell_of(factory: Callable[[], Any], what: str = "factory") -> nn.Module:
    """What `factory` builds, in eval mode, with all parameters on the meta device. The random state is as it was.

    Parameters go there when a module takes them, so no more than one at a time has memory. What code makes beside them, such as
    tables and masks, has values, which may depend on shapes and places of parameters; what it computes from their values is
    on the meta device, too.

    Raises:
        InputError: it fails, or returns no module.
    """
    try:
        with same_random_state(), without_warnings(), _parameters_on_meta() as lost:
            model = factory()
    except Exception as error:
        raise InputError(
            f"{what} does not build the model: {type(error).__name__}: {' '.join(str(error).split())[:300]} (a model is built "
            "without the values of its parameters here)"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{what} must return a torch.nn.Module, not {type(model).__name__}")
    held = [*model.parameters(), *(b for b in model.buffers() if lost(b))]
    tensors = {str(i): t for i, t in enumerate(held) if not t.is_meta}
    assign(model, tensors, {name: _on_meta(t) for name, t in tensors.items()})
    return model.eval()


def _on_meta(tensor: Tensor) -> Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        vars(made).update(vars(tensor))
    return made


@contextmanager
def _parameters_on_meta() -> Iterator[Callable[[Tensor], bool]]:
    """A parameter that a module registers goes to the meta device; what is drawn to fill one there is not drawn.

    Tells of a tensor whether values were written into it that depend on parameters.
    """
    moved: dict[int, tuple[weakref.ref[Any], Tensor]] = {}

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
        stack.enter_context(replaced(nn.Module, "register_parameter", registered))
        for name in dir(nn.init):
            if name.endswith("_") and not name.startswith("_"):
                stack.enter_context(replaced(nn.init, name, filled))
        stack.enter_context(_SeenHere())
        yield stack.enter_context(Shapes()).lost_values


class _SeenHere(TorchFunctionMode):
    """Code that asks a tensor on the meta device where it is hears: where tensors are made."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = getattr(func, "__self__", None)
        if asked is torch.Tensor.device and args[0].is_meta:
            return torch.get_default_device()
        if asked is torch.Tensor.data and len(args) > 1 and args[0].is_meta:
            args = args[0], _on_meta(args[1])
        return func(*args, **(kwargs or {}))


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
    for name, held in attribute_tensors(model).items():
        if held.tensor.is_meta:
            problems.append(
                f"{name!r} has values of its own, which depend on parameters when the model is built, and is in none of its files: "
                "compute it in forward, or register it as a buffer"
            )
    if problems:
        raise InputError(listed(f"{checkpoint.folder} does not fit its model:", problems))


def fill_buffers(model: nn.Module, laid: Mapping[str, Laid], read: Callable[[str], Tensor]) -> None:
    """Buffers that are in the files take their values from there."""
    found = {name: buffer for name, buffer in model.named_buffers() if name in laid}
    empty = {name: buffer for name, buffer in found.items() if buffer.is_meta}
    assign(model, empty, {name: read(name).to(buffer.dtype, copy=True) for name, buffer in empty.items()})
    with torch.no_grad():
        for name in found.keys() - empty:
            found[name].copy_(read(name))
