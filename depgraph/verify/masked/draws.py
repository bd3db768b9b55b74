"""What a run draws at random, so that another run of other sizes can draw the same, cut."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

Tensor = torch.Tensor


def is_random(func: Any) -> bool:
    """Whether an op draws at random."""
    return torch.Tag.nondeterministic_seeded in func.tags


class _Draw:
    """One call: the op, what it drew, and which entries are alive."""

    def __init__(self, name: str, value: Tensor, mask: Tensor | None) -> None:
        self.name, self.value, self.mask = name, value, mask

    def cut(self, shape: Sequence[int]) -> Tensor | None:
        """The entries alive, in `shape`; None where they do not fill it."""
        if self.value.shape == torch.Size(shape):
            return self.value
        if self.mask is None or self.mask.shape != self.value.shape:
            return None
        alive = self.mask > 0
        return self.value[alive].view(*shape) if int(alive.sum()) == prod(shape) else None


class Draws:
    """The calls of the masked original that draw at random, in order."""

    def __init__(self) -> None:
        self.calls: list[_Draw] = []
        self.done = 0
        self.open: dict[int, tuple[weakref.ref[Tensor], _Draw]] = {}  # those of which nothing is dead, yet

    def note(self, func: Any, out: Any, run: Any) -> None:
        """A call that gave `out` in the masked `run`; of dropout, what counts is the second result, the noise."""
        result = out[-1] if isinstance(out, (tuple, list)) else out
        if not isinstance(result, Tensor):
            return
        mask = run.mask(out[0] if isinstance(out, (tuple, list)) else out)
        draw = _Draw(func._schema.name, result.detach().clone(), mask if mask is None else mask.clone())
        self.calls.append(draw)
        if mask is None or bool(mask.all()):
            key = id(result)
            self.open[key] = (weakref.ref(result, lambda _: self.open.pop(key, None)), draw)

    def met(self, operands: Sequence[Tensor], mask: Tensor) -> None:
        """An op takes `operands` together and its result has `mask`: what they drew is alive where that is."""
        if not self.open:
            return
        for a in operands:
            known = self.open.get(id(a))
            if known is not None and a.dim() <= mask.dim() and not bool(mask.all()):
                lead = mask.amax(tuple(range(mask.dim() - a.dim()))) if mask.dim() > a.dim() else mask
                over = [d for d, n in enumerate(a.shape) if n == 1 and lead.shape[d] > 1]
                known[1].mask = (lead.amax(over, keepdim=True) if over else lead).clone()
                self.open.pop(id(a))

    def again(self, func: Any, args: Any, kwargs: Any, call: Callable[..., Any]) -> Any:
        """The result of a random op in the run of the smaller model: what the same call drew before, cut."""
        out = call(func, args, kwargs)
        name = func._schema.name
        if self.done >= len(self.calls) or self.calls[self.done].name != name:
            return out
        draw = self.calls[self.done]
        self.done += 1
        result = out[-1] if isinstance(out, (tuple, list)) else out
        value = draw.cut(result.shape) if isinstance(result, Tensor) else None
        if value is None:
            return out
        if name == "aten::native_dropout":
            keep = 1 - float(args[1])
            kept = value.to(args[0].dtype)
            return (args[0] * kept / keep if keep else args[0] * 0), value
        if isinstance(out, (tuple, list)):
            return out
        if func._schema.is_mutable:
            return out.copy_(value)
        return value.to(out.dtype).clone()
