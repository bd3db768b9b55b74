"""Runs of a model without its weights: what depends on them has shapes alone, the rest has its values.

A mask that forward makes of the inputs, positions, a test whether a token is there: none of it depends on a weight, and what
forward decides by it comes out as it does with weights. Only inputs and whole numbers that modules hold are computed
with; an op that is also given something without values gives something without values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..base.running import tensors_in
from ..base.values import map_tensors
from .tensors import is_elsewhere, place_of

LARGEST = 1 << 22  # entries of a tensor that is made of nothing and has values


class Fakes(FakeTensorMode):
    """Ops on what has values are computed, those on fake tensors are not."""

    def __init__(self) -> None:
        """Constants that the user's code holds are allowed."""
        super().__init__(allow_non_fake_inputs=True)
        self.lost: dict[int, Any] = {}  # memory whose values were overwritten by what has none, kept alive

    def stand_ins(
        self, tensors: Iterable[torch.Tensor], inputs: Iterable[torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """id of each of a model's `tensors` -> what is in its place: a fake one, or for whole numbers in a buffer a copy.

        Those whose values are elsewhere are faked where a run with such `inputs` has them.
        """
        tensors = list(tensors)
        here = is_elsewhere(tensors, inputs)
        return {id(t): self._stand_in(t, here) for t in tensors}

    def _stand_in(self, tensor: torch.Tensor, here: bool) -> torch.Tensor:
        if tensor.is_meta and here:
            meta = tensor.detach()
            made = self.fake_tensor_converter.from_meta_and_device(self, meta, place_of(tensor))
            return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        numbers = tensor.dtype.is_floating_point or tensor.dtype.is_complex
        return self.from_tensor(tensor) if numbers or isinstance(tensor, nn.Parameter) else self.given(tensor)

    def given(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a run is given in the place of `tensor`, an input: a copy."""
        return self.from_tensor(tensor) if tensor.is_meta else tensor.clone()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tensors_in(args, kwargs)
        if leaves and all(isinstance(t, FakeTensor) for t in leaves):
            return super().__torch_dispatch__(func, types, args, kwargs)
        if not any(map(self._is_fake, leaves)):
            if leaves or _entries(args) <= LARGEST:
                return func(*args, **kwargs)
            return super().__torch_dispatch__(func, types, args, kwargs)
        written = _written(func, args, kwargs)
        for one in written.values():
            if not isinstance(one, FakeTensor):
                self.lost[_memory(one)] = one.untyped_storage()
        faked = map_tensors((args, kwargs), self._faked)
        return _returned(func, written, super().__torch_dispatch__(func, types, *faked))

    def _is_fake(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, FakeTensor) or tensor.is_meta or _memory(tensor) in self.lost

    def _faked(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.from_tensor(tensor)


class Shapes(TorchDispatchMode):
    """Ops given a tensor on the meta device give one there, but for those that ask for its shape alone, such as ``zeros_like``.

    A copy of values to where such a tensor is keeps them.
    """

    def __init__(self) -> None:
        """Nothing is lost yet."""
        super().__init__()
        self.lost: dict[int, Any] = {}  # as in `Fakes`

    def lost_values(self, tensor: torch.Tensor) -> bool:
        """Whether values on the meta device were written into it."""
        return _memory(tensor) in self.lost

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tensors_in(args, kwargs)
        without = [t.is_meta or self.lost_values(t) for t in leaves]
        place = kwargs.get("device")
        if not any(without):
            if leaves and place is not None and place.type == "meta":
                kwargs["device"] = leaves[0].device
            return func(*args, **kwargs)
        if func.overloadpacket in _OF_SHAPES:
            if place is None or place.type == "meta":
                kwargs["device"] = torch.get_default_device()
            return func(*args, **kwargs)
        if place is not None:
            kwargs["device"] = torch.device("meta")
        written = _written(func, args, kwargs)
        for one in written.values():
            if not one.is_meta:
                self.lost[_memory(one)] = one.untyped_storage()
        args, kwargs = map_tensors((args, kwargs), lambda t: t if t.is_meta else t.to("meta"))
        return _returned(func, written, func(*args, **kwargs))


_OF_SHAPES = {
    getattr(torch.ops.aten, name)
    for base in ("zeros", "ones", "full", "empty")
    for name in (f"new_{base}", f"{base}_like")
}


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _entries(args: Any) -> int:
    """The entries of a tensor that is made of the sizes among `args`."""
    sizes = args[0] if args and isinstance(args[0], (list, tuple)) else ()
    return torch.Size(sizes).numel() if all(isinstance(n, int) for n in sizes) else 0


def _place(argument: Any) -> Any:
    """What is written in the place of an argument, or returned from it."""
    info = argument.alias_info
    return frozenset(info.before_set) if info is not None and info.is_write else None


def _returned(func: Any, written: dict[Any, torch.Tensor], out: Any) -> Any:
    """What a call that gave `out` for stand-ins returns: what it writes into is what it was given."""
    returns = func._schema.returns
    if not written or not returns:
        return out
    if len(returns) == 1:
        return written.get(_place(returns[0]), out)
    return tuple(written.get(_place(r), o) for r, o in zip(returns, out, strict=True))


def _written(func: Any, args: Any, kwargs: Any) -> dict[Any, torch.Tensor]:
    """What a call writes into, by the name that the schema has for it."""
    if not func._schema.is_mutable:
        return {}
    given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    named = {_place(a): given.get(a.name) for a in func._schema.arguments}
    return {place: t for place, t in named.items() if place is not None and isinstance(t, torch.Tensor)}
