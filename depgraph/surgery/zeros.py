"""Entries that stay zero: what a masked model carries, so that no optimizer's step and no copy of it loses a mask.

Each module keeps the masks of its own parameters in a hook, which is copied, pickled and cut with the module. Before an
optimizer steps, the gradients of masked entries are set to zero, and afterwards the entries themselves: whatever momentum,
weight decay or noise the optimizer has. Parameters, names and `state_dict` are those of the plain model.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from ..plan.bits import Bits
from ..plan.plan import Plan

Tensor = torch.Tensor


class KeepZeros:
    """A forward pre-hook that remembers which entries of a module's parameters stay; it computes nothing."""

    def __init__(self, entries: dict[str, Bits]) -> None:
        """`entries`: name of a parameter, from the module on -> which of its entries stay."""
        self.entries = entries

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Copies of the module have parameters of their own, which are met here first."""
        if not torch.compiler.is_compiling():
            self.watch(module)

    def watch(self, module: nn.Module) -> None:
        """Let the optimizers' steps keep the zeros of the parameters that `module` has now."""
        for name, bits in self.entries.items():
            tensor = _at(module, name)
            if isinstance(tensor, nn.Parameter):
                _Watched.add(tensor, bits)


class _Watched:
    """The parameters whose zeros are kept, as long as they are alive; optimizers are hooked while there are some."""

    gone = WeakTensorKeyDictionary()  # parameter -> [its bits, None or a bool tensor, True where zero]
    hooks: ClassVar[list[Any]] = []

    @classmethod
    def add(cls, parameter: nn.Parameter, bits: Bits) -> None:
        known = cls.gone.get(parameter)
        if known is None or known[0] is not bits:
            cls.gone[parameter] = [bits, None]
        if not cls.hooks:
            cls.hooks += [
                register_optimizer_step_pre_hook(cls._before),
                register_optimizer_step_post_hook(cls._after),
            ]

    @classmethod
    def _each(cls, optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
        found = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                known = cls.gone.get(parameter)
                if known is not None and tuple(parameter.shape) == known[0].shape:
                    if known[1] is None or known[1].device != parameter.device:
                        known[1] = known[0].mask().logical_not_().to(parameter.device)
                    found.append((parameter, known[1]))
        return found

    @classmethod
    def _before(cls, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not len(cls.gone):
            for hook in cls.hooks:
                hook.remove()
            cls.hooks = []
        for parameter, gone in cls._each(optimizer):
            gradient = parameter.grad
            if gradient is not None and gradient.layout is torch.strided:
                gradient.detach().masked_fill_(gone, 0)

    @classmethod
    def _after(cls, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, gone in cls._each(optimizer):
            parameter.detach().masked_fill_(gone, 0)


def _at(module: nn.Module, name: str) -> Any:
    value: Any = module
    for step in name.split("."):
        value = getattr(value, step, None)
    return value


def zeroed(tensor: Tensor, bits: Bits | None) -> Tensor:
    """`tensor` with zeros where `bits` are False; itself without any."""
    if bits is None:
        return tensor
    if tensor.is_meta:
        return tensor
    return tensor.detach().masked_fill(bits.mask().logical_not_().to(tensor.device), 0)


def entries_of(model: nn.Module) -> dict[str, Bits]:
    """Name of each masked parameter (the first of a tied one) -> which of its entries stay."""
    first = {id(tensor): name for name, tensor in model.named_parameters()}
    found: dict[str, Bits] = {}
    for path, module in model.named_modules():
        for keeper in _keepers(module):
            for name, bits in keeper.entries.items():
                tensor = _at(module, name)
                known = first.get(id(tensor), f"{path}.{name}" if path else name)
                found[known] = bits
    return found


def _keepers(module: nn.Module) -> list[KeepZeros]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, KeepZeros)]


def keep_zeros(model: nn.Module, entries: Mapping[str, Bits]) -> None:
    """Let `model`, whose entries are zero there, carry these masks instead of those that it had."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, KeepZeros):
                del module._forward_pre_hooks[key]
    bits_of: dict[int, Bits] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if name in entries:
            bits_of[id(tensor)] = entries[name]
    owners: dict[str, dict[str, Bits]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if id(tensor) in bits_of:
            path, own = _owner(model, name)
            owners.setdefault(path, {})[own] = bits_of[id(tensor)]
    for path, own_entries in owners.items():
        keeper, module = KeepZeros(own_entries), model.get_submodule(path)
        module.register_forward_pre_hook(keeper)
        keeper.watch(module)


def _owner(model: nn.Module, name: str) -> tuple[str, str]:
    """The module that is called with parameter `name`, and the parameter's name from there on: lists of parameters are not."""
    path, _, own = name.rpartition(".")
    while path and isinstance(model.get_submodule(path), (nn.ParameterList, nn.ParameterDict)):
        path, _, last = path.rpartition(".")
        own = f"{last}.{own}"
    return path, own


def merged(entries: Mapping[str, Bits], plan: Plan) -> dict[str, Bits]:
    """Which entries of the smaller model's parameters stay, where those of the model and those of `plan` do."""
    found: dict[str, Bits] = {}
    for name in {**entries, **plan.entries}:
        both = [bits[name].mask() for bits in (entries, plan.entries) if name in bits]
        cut = plan.cuts.get(name)
        if len(both) == 1 and cut is None:
            found[name] = entries.get(name) or plan.entries[name]
        else:
            mask = reduce(torch.logical_and, both)
            found[name] = Bits.of(mask if cut is None else cut.slice(mask))
    return {n: b for n, b in found.items() if not plan.drops(n)}
