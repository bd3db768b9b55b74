"""Wrappers around a model or a part of it: data parallel, distributed data parallel, compiled.

While a model is run or cut, what a wrapper does around the module in it (scatter to devices, reduce gradients, compile) is
of no interest and in the way: a `WrapperStandIn` module stands in its place, with the same names below it. The smaller model is
wrapped again by the same class with the same options.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..base.errors import InputError
from ..base.switches import deeper_stack
from .copying import Copies, deep_copy, slots_of

NAMES = ("module", "_orig_mod")  # under which wrappers hold what they wrap
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
         "_forward_hooks_always_called")  # fmt: skip
OPTIONS = ("device_ids", "output_device", "dim", "process_group", "find_unused_parameters",
           "gradient_as_bucket_view", "static_graph")  # fmt: skip


class _Held:
    """Keeps an object from being copied with what holds it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return self


class WrapperStandIn(nn.Module):
    """Calls the one module in it, and stands for the wrapper `held`."""

    def __init__(self, wrapper: nn.Module) -> None:
        """The child, under the name it has in `wrapper`, is added afterwards."""
        super().__init__()
        self.held, self.training = _Held(wrapper), wrapper.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the child returns."""
        (child,) = self._modules.values()
        return child(*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_modules", {}):
            return self.__dict__["_modules"][name]
        (child,) = self.__dict__["_modules"].values() if self.__dict__.get("_modules") else (None,)
        return getattr(child, name)


def _compiled() -> Any:
    return getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)


def is_distributed(module: nn.Module) -> bool:
    """Whether it reduces gradients over processes."""
    kind = getattr(nn.parallel, "DistributedDataParallel", None)
    return kind is not None and isinstance(module, kind)


def inner_name(module: nn.Module) -> str | None:
    """The name under which a wrapper holds the module that it wraps; None for what is not a wrapper."""
    compiled = _compiled()
    if compiled is not None and isinstance(module, compiled):
        return "_orig_mod"
    return "module" if isinstance(module, nn.DataParallel) or is_distributed(module) else None


def core(model: nn.Module) -> nn.Module:
    """`model` without the wrappers around all of it."""
    name = inner_name(model)
    return model if name is None else core(model.get_submodule(name))


def plain_names(model: nn.Module) -> Callable[[str], str]:
    """What makes of a name in `model` (of a tensor, a module) the one that it has without wrappers."""
    inner = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        if (name := inner_name(module)) is not None
    }
    if not inner:
        return str

    def plain(name: str) -> str:
        steps = name.split(".")
        return ".".join(s for i, s in enumerate(steps) if ".".join(steps[: i + 1]) not in inner)

    return plain


@deeper_stack()
def copied(model: nn.Module, replace: dict[int, Any], own: frozenset[int]) -> nn.Module:
    """A deep copy of `model` in which a `WrapperStandIn` stands for each wrapper, and what can't be copied is shared.

    Args:
        model: what is copied.
        replace: id of an object -> what stands in its place.
        own: the ids of the modules and tensors that nothing in the copy leads to.
    """
    memo = Copies(replace)
    memo.own = own
    wrappers = {m: name for m in model.modules() if (name := inner_name(m)) is not None}
    memo.update({id(w): WrapperStandIn(w) for w in wrappers})
    try:
        return _copied(model, _with(memo), wrappers)
    except Exception:  # noqa: BLE001  locks, files, generators, what objects of other libraries raise ...
        return _copied(model, _shared(model, memo), wrappers)


def _with(memo: Copies, more: Mapping[int, Any] = MappingProxyType({})) -> Copies:
    made = Copies({**more, **memo})
    made.own = memo.own
    return made


def _copied(model: nn.Module, memo: Copies, wrappers: dict[nn.Module, str]) -> nn.Module:
    made: nn.Module = deep_copy(model, memo)
    for wrapper, name in wrappers.items():
        stand = memo[id(wrapper)]
        stand.add_module(name, deep_copy(wrapper._modules[name], memo))
        for hooks in HOOKS:
            vars(stand)[hooks] = deep_copy(vars(wrapper)[hooks], memo)
    for module in model.modules():  # the copy protocol of modules forgets slots
        kind: Any = type(module)
        for slot in slots_of(kind):
            if hasattr(module, slot):
                setattr(memo[id(module)], slot, deep_copy(getattr(module, slot), memo))
    return made


def _shared(model: nn.Module, memo: Copies) -> Copies:
    """`memo`, and in it what the attributes of modules hold that deepcopy refuses: taken apart as far as it can be."""
    modules = {id(m): m for m in model.modules()}
    found = _with(memo)
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_modules", "_parameters", "_buffers") and id(value) not in found:
                try:
                    deep_copy(value, _with(memo, modules))
                except Exception:  # noqa: BLE001  as above
                    found[id(value)] = _as_far_as_possible(value, _with(memo, modules))
    return found


def _as_far_as_possible(value: Any, memo: Copies, depth: int = 4) -> Any:
    try:
        return deep_copy(value, _with(memo))
    except Exception:  # noqa: BLE001  as above
        if depth and type(value) in (list, tuple):
            return type(value)(_as_far_as_possible(v, memo, depth - 1) for v in value)
        if depth and type(value) is dict:
            return {k: _as_far_as_possible(v, memo, depth - 1) for k, v in value.items()}
        if depth and hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
            try:
                new = copy.copy(value)
            except Exception:  # noqa: BLE001  as above
                return value
            vars(new).update({k: _as_far_as_possible(v, memo, depth - 1) for k, v in vars(value).items()})
            return new
        return value


def wrapped(model: nn.Module) -> nn.Module:
    """`model` with every `WrapperStandIn` in it turned into a wrapper like the one it stands for."""
    stands = [m for m in model.modules() if isinstance(m, WrapperStandIn)]
    for stand in reversed(stands):  # inner ones first
        real = _like(stand)
        if stand is model:
            return real
        for module in model.modules():
            for key, child in module._modules.items():
                if child is stand:
                    module._modules[key] = real
    return model


def without(model: nn.Module) -> nn.Module:
    """`model` with what is in it in the place of every `WrapperStandIn`."""
    for module in list(model.modules()):
        for key, child in module._modules.items():
            while isinstance(child, WrapperStandIn):
                (child,) = child._modules.values()
            module._modules[key] = child
    return model


def wrapped_like(wrapper: nn.Module, model: nn.Module) -> nn.Module:
    """`model` in a wrapper like `wrapper`, with its options and hooks. Of a distributed one every process must make one."""
    stand = WrapperStandIn(wrapper)
    stand.add_module(inner_name(wrapper) or "module", model)
    for hooks in HOOKS:
        vars(stand)[hooks] = copy.copy(vars(wrapper)[hooks])
    return _like(stand)


def _like(stand: WrapperStandIn) -> nn.Module:
    wrapper, (child,) = stand.held.value, stand._modules.values()
    compiled = _compiled()
    if compiled is not None and isinstance(wrapper, compiled):
        real: nn.Module = type(wrapper)(child, wrapper.dynamo_ctx)
    elif isinstance(wrapper, nn.DataParallel) and not wrapper.device_ids:
        real = type(wrapper)(child)
    else:
        given = {o: getattr(wrapper, o) for o in OPTIONS if hasattr(wrapper, o)}
        if not getattr(wrapper, "broadcast_buffers", True):
            new = "forward_sync_buffers"  # its name in later versions of torch
            given[new if new in signature(type(wrapper)).parameters else "broadcast_buffers"] = False
        real = type(wrapper)(child, **given)
    if inner_name(real) == "module":
        real.training = stand.training
    for hooks in HOOKS:
        vars(real)[hooks] = vars(stand)[hooks]
    return real


def check_unsharded(model: nn.Module, tensors: Sequence[torch.Tensor]) -> None:
    """Refuse models whose parameters are spread over processes."""
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    spread = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if (sharded is not None and any(isinstance(m, sharded) for m in model.modules())) or (
        spread is not None and any(isinstance(t, spread) for t in tensors)
    ):
        raise InputError(
            "the parameters of this model are sharded over processes (FSDP, DTensor): no process has all of their entries\n"
            "  fix: prune the model before it is sharded, or apply the plan to the unsharded checkpoint"
        )


def check_changeable(model: nn.Module) -> None:
    """Refuse to change a model in place where something outside holds on to its parameters."""
    if any(is_distributed(m) for m in model.modules()):
        raise InputError(
            "inplace=True can't change a DistributedDataParallel: it reduces the gradients of the parameters it was created "
            "with\n  fix: prune model.module in place and wrap it again, or use inplace=False"
        )
