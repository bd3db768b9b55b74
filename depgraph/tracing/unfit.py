"""Models that can't be pruned as they are: each kind is refused before a run, with what to do instead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..base.errors import InputError
from ..base.inputs import Arguments, each_example
from ..base.values import tensor_leaves
from .tensors import named_tensors
from .wrappers import check_unsharded


def check_fit(model: nn.Module, example_inputs: Any, elsewhere: bool = False) -> None:
    """Refuse what can't be traced and cut: no module, compiled or packed code and weights, weights that are elsewhere, unless that is known.

    Raises:
        InputError: naming the first parts that are unfit, and the remedy.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model must be a torch.nn.Module, a GraphModule or an ExportedProgram, not {type(model).__name__}"
        )
    for path, module in model.named_modules():  # modules of our own say so themselves
        if isinstance(why := getattr(type(module), "depgraph_unfit", None), str):
            raise InputError(f"{path or 'the model'}: {why}")
    scripted = {path: m for path, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)}
    if scripted:
        inner = {id(m) for whole in scripted.values() for m in list(whole.modules())[1:]}
        names = [path or "the model" for path, m in scripted.items() if id(m) not in inner]
        raise InputError(
            f"{_some(['the model'] if 'the model' in names else names)}: TorchScript, which is compiled and can be neither traced nor "
            "changed\n  fix: prune the nn.Module that it was made of, and call torch.jit.script or torch.jit.trace on the result"
        )
    tensors = named_tensors(model)[0]
    check_unsharded(model, list(tensors.values()))
    if packed := _packed(model, tensors):
        raise InputError(
            f"{_some(packed)}: quantised or packed weights, whose entries can't be taken away one by one\n"
            "  fix: prune the model in floating point first, then quantise the smaller one"
        )
    lazy = [n for n, t in tensors.items() if is_lazy(t)]
    if lazy:
        raise InputError(
            f"{_some(lazy)} have no shape yet: lazy modules get them in their first call\n"
            "  fix: call model(*example_inputs) once, then prune it"
        )
    inputs = tensor_leaves(each_example(example_inputs))
    _check_devices(model, {} if elsewhere else tensors, inputs)


def _packed(model: nn.Module, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that stand for others, and of objects of torch's kernels that hold weights."""
    found = [
        f"{n} ({type(t).__name__})"
        for n, t in tensors.items()
        if any((t.is_quantized, is_traceable_wrapper_subclass(t)))
    ]
    for path, module in model.named_modules():
        held = [name for name, value in vars(module).items() if isinstance(value, torch.ScriptObject)]
        found += [f"{path}.{name}" if path else name for name in held]
    return found


def _check_devices(model: nn.Module, tensors: dict[str, torch.Tensor], inputs: list[torch.Tensor]) -> None:
    there = {p.device for p in model.parameters() if p.device.type != "meta"}
    given = {t.device for t in inputs}
    empty = [n for n, t in tensors.items() if t.is_meta]
    if empty and any(d.type != "meta" for d in given):
        raise InputError(
            f"{_some(empty)}: on the meta device, so without values: the model was made without memory, or its weights are "
            "offloaded and come only while it runs\n  fix: load the model whole, without offloading, prune it, and offload "
            "the smaller one; or, for a graph without values, give example inputs on the meta device, too"
        )
    if len(there) == 1 and given and not given <= there:
        raise InputError(
            f"the model is on {next(iter(there))}, the example inputs on {', '.join(map(str, given))}: move one of them"
        )
    if there and torch.get_default_device().type == "meta":
        raise InputError(
            "the default device is meta, so tensors that are made while the model runs have no values\n"
            "  fix: leave the `with torch.device('meta')`, or call torch.set_default_device(None), before pruning"
        )


def types_that_differ(model: nn.Module, examples: list[Arguments]) -> str:
    """A sentence about floating-point types of parameters and inputs that have none in common, or ""."""
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    given = {t.dtype for t in tensor_leaves(examples) if t.is_floating_point()}
    if not own or not given or own & given:
        return ""
    (mine, *_), (theirs, *_) = sorted(map(str, own)), sorted(map(str, given))
    return f"the model is in {mine}, the example inputs are in {theirs}: convert one of them, inputs.to({mine}) or model.to({theirs})"


def _some(names: Iterable[str]) -> str:
    found = list(names)
    return f"{', '.join(found[:4])}{' ...' if len(found) > 4 else ''}"
