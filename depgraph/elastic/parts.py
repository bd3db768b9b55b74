"""A sub-model whose weights are views of the whole's: nothing is copied, and gradients land on the whole's parameters."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..plan.plan import Cut, Plan
from ..surgery.apply import apply
from ..tracing.tensors import named_tensors

Holder = tuple[Any, Any]  # a table or list of a module, and a key of it


class Link:
    """Keeps the parameters of a smaller model views of those of the whole, from call to call.

    Where gradients are wanted they are views with a history, made anew for each call. Otherwise they are parameters on
    the whole's memory; where what stays does not come first in each dim, that is not possible, and they are copied for each call.
    Buffers are the smaller model's own: statistics differ from size to size.
    """

    def __init__(self, whole: nn.Module, part: nn.Module, plan: Plan) -> None:
        """`part` is what `plan` makes of `whole`."""
        mine, theirs = named_tensors(part)[0], named_tensors(whole)[0]
        places, sources = _places(part, mine), _places(whole, theirs)
        old = plan.moves.old  # where branches went, others have moved up
        rows = [
            (places[n], sources[old(n)][0], plan.cuts.get(old(n)), isinstance(theirs[old(n)], nn.Parameter))
            for n in mine
        ]
        self.rows = [(mine, base, cut) for mine, base, cut, parameter in rows if parameter]
        self.buffers = [(mine, base) for mine, base, _, parameter in rows if not parameter]
        self.modes = [(vars(m), vars(whole.get_submodule(old(path)))) for path, m in part.named_modules()]
        self.was = [(path, m, dict(m._modules), set(m._parameters)) for path, m in whole.named_modules()]
        self.fresh: list[tuple[Any, ...]] | None = None
        self.refresh(history=False)

    def changed(self) -> str:
        """The first module of the whole whose children are others than they were, or the names of its parameters; or nothing."""
        for path, m, children, names in self.was:
            if m._modules != children or m._parameters.keys() != names:
                return repr(path) if path else "the outermost module"
        return ""

    def refresh(self, history: bool) -> None:
        """Look whether the views are still what they should be; make them anew where they are not."""
        if not history and self.fresh is not None and _are_fresh(self.fresh):
            return
        with torch.inference_mode(False), torch.set_grad_enabled(history):
            for mine, (table, key), cut in self.rows:
                base, held = table[key], mine[0][0][mine[0][1]]
                if cut is None or not (base.requires_grad or not history):
                    view = base if cut is None else _parameter(cut, base)
                elif history:
                    view = cut.part(base)
                elif held.is_leaf and cut.leads and _is_view(held, base):
                    continue
                else:
                    view = _parameter(cut, base)
                _put(mine, held, view)
            for mine, (table, key) in self.buffers:
                base, held = table[key], mine[0][0][mine[0][1]]
                _put(mine, held, held.to(base.device, base.dtype))
        copied = any(cut is not None and not cut.leads for *_, cut in self.rows)
        sparse = any(
            table[key].layout is not torch.strided for _, (table, key), *_ in self.rows + self.buffers
        )
        self.fresh = None if history or copied or sparse else self._state()

    def _state(self) -> list[tuple[Any, ...]]:
        """What tells that nothing has changed since: each tensor of the whole, its view, and how both were."""
        found = []
        tensors = [*((mine, base) for mine, base, _ in self.rows), *self.buffers]
        for mine, (table, key) in tensors:
            holder, name = mine[0]
            base, held = table[key], holder[name]
            how = base.data_ptr(), base.stride(), base.requires_grad, base.dtype, base.device
            found.append((table, key, base, holder, name, held, *how))
        return found

    def take_modes(self) -> None:
        """Each module is in the mode of the whole's."""
        for mine, theirs in self.modes:
            if mine["training"] != theirs["training"]:
                mine["training"] = theirs["training"]


_links: WeakKeyDictionary[nn.Module, Link] = (
    WeakKeyDictionary()
)  # a copy of a part has none: it is a plain module


def linked(whole: nn.Module, plan: Plan) -> tuple[nn.Module, Link]:
    """What `plan` makes of `whole`, on its weights."""
    part = apply(whole, plan)
    link = _links[part] = Link(whole, part, plan)
    part.register_forward_pre_hook(_before, prepend=True)
    return part, link


def _before(module: nn.Module, args: Any) -> None:
    link = _links.get(module)
    if link is not None:
        link.refresh(torch.is_grad_enabled() and not torch.jit.is_tracing())  # a trace takes parameters alone


def _parameter(cut: Cut, base: Tensor) -> nn.Parameter:
    return nn.Parameter(cut.part(base.detach()), requires_grad=base.requires_grad)


def _is_view(held: Tensor, base: Tensor) -> bool:
    """Whether a leaf still is what `_parameter` would make of `base` anew."""
    same = held.data_ptr() == base.data_ptr() and held.stride() == base.stride()
    return same and (held.dtype, held.device, held.requires_grad) == (
        base.dtype,
        base.device,
        base.requires_grad,
    )


def _are_fresh(state: list[tuple[Any, ...]]) -> bool:
    """Whether every tensor is the one it was, on the same memory: data that was exchanged under it is elsewhere."""
    return all(
        table[key] is base
        and holder[name] is held
        and base.data_ptr() == pointer
        and base.stride() == stride
        and base.requires_grad == graded
        and base.dtype == dtype
        and base.device == device
        for table, key, base, holder, name, held, pointer, stride, graded, dtype, device in state
    )


def _put(places: list[Holder], held: Tensor, new: Tensor) -> None:
    if new is not held:
        for where, key in places:
            where[key] = new


def _places(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, list[Holder]]:
    """Name of a tensor -> everywhere in the modules' tables, attributes and lists where it is."""
    names = {id(t): n for n, t in tensors.items()}
    found: dict[str, list[Holder]] = {}
    for module in model.modules():
        tables: list[Any] = [module._parameters, module._buffers, vars(module)]
        rows = [(table, *pair) for table in tables for pair in table.items()]
        rows += [(v, *pair) for v in vars(module).values() if isinstance(v, list) for pair in enumerate(v)]
        for holder, key, value in rows:
            if isinstance(value, Tensor) and id(value) in names:
                found.setdefault(names[id(value)], []).append((holder, key))
    return found
