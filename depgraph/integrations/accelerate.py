"""Models that Hugging Face accelerate has offloaded or dispatched: their parameters are empty, and its hooks have the values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..base.checks import a_module, function
from ..base.errors import DepgraphError, InputError
from ..base.values import map_tensors
from ..prune import PruneResult
from ..prune import prune as prune_in_memory
from ..tracing.tensors import all_tensors, memory_of, skeleton
from ..tracing.wrappers import wrapped

try:
    from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, remove_hook_from_module
    from accelerate.utils import named_module_tensors
except ImportError as missing:
    raise DepgraphError(
        "depgraph.integrations.accelerate needs accelerate\n  fix: pip install accelerate"
    ) from missing


def prune(
    model: nn.Module, example_inputs: Any, *, place: Callable[[nn.Module], Any] | None = None, **options: Any
) -> PruneResult:
    """As `depgraph.prune`, for a model whose weights accelerate keeps in memory, on disk or on several devices.

    All of the model is in memory meanwhile, see `in_memory`. What does not fit there is pruned in its folder:
    `depgraph.checkpoint.prune`.

    Args:
        model: with accelerate's hooks; it stays as it is, offloaded and ready to run.
        example_inputs: as for `depgraph.prune`; tensors that are elsewhere are copied to the CPU.
        place: puts the smaller model where it is to run, in place or returning it, such as
            ``lambda m: accelerate.dispatch_model(m, device_map, offload_dir=folder)``. By default it stays on the CPU.
        **options: those of `depgraph.prune`, without ``inplace`` and ``graph``. Names say what to ignore, and calibration
            batches are on the CPU.

    Returns:
        as `depgraph.prune`; its model is the one that was placed.

    Raises:
        InputError: as for `in_memory`; `place` is not a function, or an option can't be used here.
    """
    if place is not None:
        function("place", place, "model")
    for name in ("inplace", "graph"):
        if options.get(name):
            raise InputError(
                f"{name} can't be given here, where a copy of the model is pruned\n"
                "  fix: leave it away; `place` says where the smaller model goes"
            )
    whole = in_memory(model)
    inputs = map_tensors(example_inputs, lambda t: t if t.is_meta else t.cpu())
    result = prune_in_memory(whole, inputs, **options)
    placed = None if place is None else place(result.model)
    return dataclasses.replace(result, model=placed) if isinstance(placed, nn.Module) else result


@torch.inference_mode(False)
def in_memory(model: nn.Module) -> nn.Module:
    """A copy of `model` on the CPU, with all values and without accelerate's hooks.

    What is in the CPU's memory is shared with `model`, not copied. Parameters that accelerate has untied are tied again: where
    state dict or hooks say so, and where ``tie_weights`` of the model does and they are equal.

    Args:
        model: with accelerate's hooks; it stays as it is.

    Raises:
        InputError: accelerate has no hook on `model`, offloaded weights are quantised, or it can't be copied.
    """
    a_module("model", model)
    hooks = [m._hf_hook for m in model.modules() if hasattr(m, "_hf_hook")]
    if not hooks:
        raise InputError(
            f"accelerate has no hook on this {type(model).__name__}\n  fix: depgraph.prune takes it as it is"
        )
    replace = {**_values(model), **{id(hook): ModelHook() for hook in hooks}}
    try:
        whole = wrapped(skeleton(model, replace))
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} can't be copied: {type(error).__name__}: {error}\n"
            "  fix: load it without offloading, and call depgraph.prune"
        ) from error
    remove_hook_from_module(whole, recurse=True)
    for module in whole.modules():
        own = vars(module)
        own.pop("hf_device_map", None)
        if getattr(own.get("forward"), "__func__", None) is type(module).forward:  # the hook put it there
            del own["forward"]
    _tie(whole)
    return whole


def _aligning(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """The hooks that bring weights, each with its module and the path of that."""
    for path, module in model.named_modules():
        ahead = [getattr(module, "_hf_hook", None)]
        while ahead:
            hook = ahead.pop()
            ahead += hook.hooks if isinstance(hook, SequentialHook) else ()
            if isinstance(hook, AlignDevicesHook):
                yield path, module, hook


def _values(model: nn.Module) -> dict[int, torch.Tensor]:
    """id of each tensor of `model` that has values -> one on the CPU that holds them."""
    found = {id(t): _like(t, t) for t in all_tensors(model).values() if not t.is_meta}
    by_memory: dict[Any, torch.Tensor] = {}  # tied parameters are in a state dict twice
    for path, module, hook in _aligning(model):
        for name, tensor in named_module_tensors(module, recurse=hook.place_submodules):
            if id(tensor) in found or not hook.offload or (value := hook.weights_map.get(name)) is None:
                continue
            if type(tensor) not in (torch.Tensor, nn.Parameter):
                raise InputError(
                    f"{path}.{name} ({type(tensor).__name__}): quantised weights, which are offloaded\n"
                    "  fix: prune the model in floating point first, then quantise the smaller one"
                )
            new = _like(value, tensor)
            new = by_memory.setdefault((type(tensor), memory_of(new) or id(tensor)), new)
            if name in hook.tied_params_names:  # in files they are two
                new = next((t for t in found.values() if _equal(t, new)), new)
            found[id(tensor)] = new
    return found


def _like(value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """`value` on the CPU, of the type of `tensor`; in the same memory where it can be."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu":
        return tensor
    here = torch.as_tensor(value.detach(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(here, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else here


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two hold the same values, and not one number alone, as untrained norms and biases do."""
    same = (type(a), a.dtype, a.shape) == (type(b), b.dtype, b.shape) and torch.equal(a, b)
    return same and bool((a != a.flatten()[:1]).any())


def _tie(model: nn.Module) -> None:
    """Let `model` tie its parameters, but for those that differ."""
    before = dict(model.named_parameters(remove_duplicate=False))
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()
    for name, tensor in list(model.named_parameters(remove_duplicate=False)):
        if tensor is not before[name] and not torch.equal(tensor, before[name]):
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, before[name])


__all__ = ["in_memory", "prune"]
