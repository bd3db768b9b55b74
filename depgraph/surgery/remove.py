"""Modules that go: what stands in their place, and children of containers that move up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..plan.plan import Removal
from ..tracing.attributes import INTERNALS, held_at, put

CONTAINERS = (nn.Sequential, nn.ModuleList)
# Attributes that say how many channels a module puts out -> the dim they are in.
CHANNELS = {"out_features": -1, "out_channels": 1}


class StandIn(nn.Module):
    """In the place of a module that was removed: returns the first tensor that it is given, or zeros."""

    def __init__(self, module: nn.Module, leaves: str, returns: tuple[int, int] | None) -> None:
        """`leaves` and `returns` as in a `Removal`.

        It has what `module` had: its numbers and names, which code around it may ask for, and its mode; its parameters are None.
        """
        super().__init__()
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, type(None)))}
        vars(self).update({k: v for k, v in plain.items() if k not in INTERNALS})
        for name in module._parameters:
            self.register_parameter(name, None)
        self.leaves, self.returns, self.training = leaves, returns, module.training
        # What computes with the weights of its parts instead of calling them looks for hooks first.
        self.register_forward_pre_hook(_called)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first tensor among the arguments, or zeros in its place, in a tuple where the module returned one."""
        given = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
        out = given
        if self.leaves == "zeros":
            out = torch.zeros_like(given)
        elif self.leaves == "zero":
            out = given.new_zeros([1] * given.dim())
        elif self.leaves == "channels":
            sizes = list(given.shape)
            for name, dim in CHANNELS.items():
                sizes[dim] = getattr(self, name, sizes[dim])
            out = given.new_zeros(sizes)
        if self.returns is None:
            return out
        length, place = self.returns
        return tuple(out if i == place else None for i in range(length))


def _called(module: nn.Module, args: Any) -> None:
    """A hook that does nothing: a module with a hook is called."""


def put_stand_ins(model: nn.Module, removals: Iterable[Removal]) -> None:
    """Put a stand-in for each removed module, in place; those that leave nothing stay."""
    for removal in sorted(removals, key=lambda r: -r.path.count(".")):  # what is inside another first
        if removal.leaves != "nothing":
            parent, _, child = removal.path.rpartition(".")
            owner = model.get_submodule(parent)
            stand_in = StandIn(owner.get_submodule(child), removal.leaves, removal.returns)
            owner._modules[child] = stand_in


def take_out(model: nn.Module, removals: Iterable[Removal]) -> None:
    """Take children out of their containers, in place, and number the rest anew where they have numbers."""
    gone: dict[str, set[str]] = {}
    shorter: dict[tuple[Any, ...], set[int]] = {}
    for removal in removals:
        if removal.leaves == "nothing":
            parent, _, child = removal.path.rpartition(".")
            gone.setdefault(parent, set()).add(child)
            for at, _ in removal.entries:
                shorter.setdefault(at, set()).add(list(model.get_submodule(parent)._modules).index(child))
    for (path, *steps), places in shorter.items():
        entries = held_at(model, (path, *steps))
        left = type(entries)(e for i, e in enumerate(entries) if i not in places)
        put(vars(model.get_submodule(path)), list(steps), left)
    for parent in sorted(
        gone, key=len, reverse=True
    ):  # the inner ones first: names of what is around them still hold
        owner = model.get_submodule(parent)
        kept = [(name, child) for name, child in owner._modules.items() if name not in gone[parent]]
        numbered = all(name.isdigit() for name in owner._modules)
        owner._modules.clear()
        owner._modules.update({str(i) if numbered else name: child for i, (name, child) in enumerate(kept)})


def misfits(model: nn.Module, removals: Sequence[Removal]) -> list[str]:
    """Why `removals` do not fit `model`, one line for each that does not."""
    modules = dict(model.named_modules(remove_duplicate=False))
    wrong = []
    for removal in removals:
        parent, _, child = removal.path.rpartition(".")
        if removal.path not in modules:
            wrong.append(f"module {removal.path!r}, which the plan removes, is not in this model")
        elif removal.leaves == "nothing":
            names = list(modules[parent]._modules)
            wrong += [
                f"{'.'.join(map(str, filter(None, at)))} is not a list with one entry for each child of {parent!r}"
                for at, _ in removal.entries
                if not isinstance(entries := held_at(model, at), (list, tuple)) or len(entries) != len(names)
            ]
            if not isinstance(modules[parent], CONTAINERS):
                wrong.append(
                    f"module {removal.path!r}, which the plan takes out, is no child of a Sequential or ModuleList"
                )
            elif child.isdigit() and names != [str(i) for i in range(len(names))]:
                wrong.append(
                    f"the children of {parent!r} are not numbered from 0 on, so those behind {child} can't move up"
                )
    return wrong
