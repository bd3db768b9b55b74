"""What a run draws at random, so that another run of other sizes can draw the same, cut."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch

Tensor = torch.Tensor


def is_random(func: Any) -> bool:
    """Whether an op draws at random."""
    return torch.Tag.nondeterministic_seeded in func.tags


class _Draw:
    """One call: the op, what it drew, and which entries are alive; of a dim of which all entries are alike, one entry."""

    def __init__(self, name: str, value: Tensor, mask: Tensor | None, alike: Sequence[int]) -> None:
        self.name, self.mask, self.alike = name, mask, alike
        self.value = value.amax(list(alike), keepdim=True) if alike else value

    def cut(self, shape: Sequence[int]) -> Tensor | None:
        """The entries alive, in `shape`; None where they do not fill it."""
        if self.alike:
            return self.value.expand(shape)
        if self.value.shape == torch.Size(shape):
            return self.value
        if self.mask is None or self.mask.shape != self.value.shape:
            return None
        alive = self.mask > 0
        return self.value[alive].view(*shape) if int(alive.sum()) == prod(shape) else None


class Draws:
    """The calls of the masked original that draw at random, in order.

    Which entries of a draw are alive shows where it meets a tensor with a mask. Where it does not, the smaller run finds out
    along which dims it draws fewer (`short`), and a run with draws whose entries are `alike` along these can be compared.
    """

    def __init__(self, alike: Mapping[int, tuple[int, ...]] | None = None) -> None:
        self.calls: list[_Draw] = []
        self.done = 0
        self.alike, self.short = alike or {}, dict[int, tuple[int, ...]]()
        self.open: dict[int, tuple[weakref.ref[Tensor], _Draw]] = {}  # those of which nothing is dead, yet

    def note(self, func: Any, args: Any, out: Any, run: Any) -> None:
        """A call that gave `out` in the masked `run`; of dropout, what counts is the second result, the noise."""
        result = out[-1] if isinstance(out, (tuple, list)) else out
        if not isinstance(result, Tensor):
            return
        mask = run.mask(out[0] if isinstance(out, (tuple, list)) else out)
        alike = self.alike.get(len(self.calls), ())
        if alike:
            _make_alike(result, mask, alike)
            if func._schema.name == "aten::native_dropout":
                out[0].copy_(_dropped(args, result))
        draw = _Draw(
            func._schema.name, result.detach().clone(), mask if mask is None else mask.clone(), alike
        )
        self.calls.append(draw)
        if alike:
            return
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
        drawn = name == "aten::native_dropout" or not isinstance(
            out, (tuple, list)
        )  # attention's results are none
        if value is None:
            if (
                drawn and isinstance(result, Tensor) and result.dim() == draw.value.dim() and not result.is_complex()
            ):  # fmt: skip
                sizes = enumerate(zip(result.shape, draw.value.shape, strict=True))
                self.short[self.done - 1] = tuple(d for d, (now, before) in sizes if now != before)
            return out
        if name == "aten::native_dropout":
            return _dropped(args, value), value
        if not drawn:
            return out
        if func._schema.is_mutable:
            return out.copy_(value)
        return value.to(out.dtype).clone()


def _make_alike(result: Tensor, mask: Tensor | None, dims: Sequence[int]) -> None:
    """Give all entries of `result` that are alive the largest value along `dims`."""
    dead = None if mask is None else mask == 0
    known = result
    if dead is not None and result.dtype != torch.bool:
        info = torch.finfo if result.is_floating_point() else torch.iinfo
        known = result.masked_fill(dead, info(result.dtype).min)
    result.copy_(known.amax(list(dims), keepdim=True).expand_as(result))
    if dead is not None:
        result.masked_fill_(dead, 0)


def _dropped(args: Any, kept: Tensor) -> Tensor:
    keep = 1 - float(args[1])
    return args[0] * kept.to(args[0].dtype) / keep if keep else args[0] * 0
