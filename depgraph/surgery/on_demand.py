"""Weights that exist only while an op uses them: a tensor that knows its shape, and asks for its values when it is called with.

A weight is an `OnDemand` tensor: its shape and type are known, its values are made when a torch function is called with
it, by blocks of rows for matrix products, and are gone afterwards. So the memory of a run is bounded by the largest
tensor, at any size of the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ..base.errors import InputError
from ..base.weights import Weights
from ..plan.plan import Cut
from ..tracing.tensors import all_tensors, place_of, skeleton

Tensor = torch.Tensor
READ = 1 << 22  # entries of a weight that are read at a time
BLOCK = 1 << 17  # entries of the blocks of rows in which large ones are multiplied


@dataclass(eq=False)
class Weight:
    """What one tensor of a run holds: `source` or what `values` makes of it, with the cut zeroed or cut out.

    Attributes:
        name: of the tensor in the original.
        source: the tensor whose shape and type it has: the user's own, or the original's where the smaller model's values are
            cut out of those.
        cut: what goes; None where nothing does.
        zeroed: whether what goes is zeroed (as in the masked original) instead of cut out.
        values: where values come from.
        dtype: of the values.
    """

    name: str
    source: Tensor
    cut: Cut | None
    zeroed: bool
    values: Weights
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where it is in the run."""
        return place_of(self.source)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the run."""
        return tuple(self.source.shape) if self.cut is None or self.zeroed else self.cut.new_shape

    @property
    def bytes(self) -> int:
        """Of all values."""
        return prod(self.shape) * self.dtype.itemsize

    def whole(self) -> Tensor:
        """All values."""
        value = self.values.whole(self.name)
        if self.cut is not None and not self.zeroed:
            value = self.cut.slice(value)
        value = self._typed(value)
        return (
            value
            if self.cut is None or not self.zeroed
            else value.masked_fill_(~self.cut.mask().to(value.device), 0)
        )

    def _typed(self, value: Tensor) -> Tensor:
        """A copy in the type of the run."""
        return value.to(self.dtype.to_complex() if value.is_complex() else self.dtype, copy=True)

    def mask(self) -> Tensor:
        """1 where an entry is alive, 0 where it is dead, in the shape in the run."""
        if self.cut is None or not self.zeroed:
            return torch.ones(self.shape, device=self.device)
        return self.cut.mask().to(self.device).float()

    def kept(self, dim: int) -> Tensor | None:
        """The indices along `dim` of a matrix that stay; None where all do."""
        found = None if self.cut is None else self.cut.keep[dim]
        return None if found is None else torch.from_numpy(found).to(self.device)

    def by_rows(self) -> bool:
        """Whether rows can be made one by one: a matrix, cut in rows and columns alone."""
        return len(self.shape) == 2 and (
            self.cut is None or (self.cut.blocks is None and self.cut.numbers is None)
        )

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """The rows that stay (all where the cut is `zeroed`), with all columns, by blocks: first, last, values.

        A block is valid until the next one is asked for.
        """
        kept = None if self.zeroed else self.kept(0)
        height, width = self.source.shape
        step = max(1, BLOCK // max(width, 1))
        room = torch.empty(min(step, height), width, dtype=self.dtype, device=self.device)
        count = height if kept is None else len(kept)
        for first in range(0, count, step):
            last = min(first + step, count)
            with _disable_current_modes():  # one that widens would widen all of the matrix, for each block
                if kept is None:
                    rows = self.values.rows(self.name, first, last)
                else:
                    rows = self.values.at(self.name, kept[first:last])
            yield first, last, rows if rows.dtype == self.dtype else room[: len(rows)].copy_(rows)

    def times(self, x: Tensor) -> Tensor:
        """x [..., in] times the transposed weight [out, in], one of those `by_rows`."""
        source, columns = self.source, self.kept(1)
        if columns is not None and self.zeroed:
            x = x.index_fill(-1, _others(columns, source.shape[1]), 0)
        elif columns is not None:
            x = x.new_zeros(*x.shape[:-1], source.shape[1]).index_copy_(-1, columns, x)
        out = x.new_empty(*x.shape[:-1], self.shape[0])
        for first, last, rows in self.blocks():
            out[..., first:last] = x @ rows.T
        if self.zeroed and (kept := self.kept(0)) is not None:
            out.index_fill_(-1, _others(kept, self.shape[0]), 0)
        return out

    def back(self, gradient: Tensor) -> Tensor:
        """gradient [..., out] times the weight [out, in], one of those `by_rows` that is not `zeroed`."""
        source, columns = self.source, self.kept(1)
        out = gradient.new_zeros(*gradient.shape[:-1], source.shape[1])
        for first, last, rows in self.blocks():
            out += gradient[..., first:last] @ rows
        return out if columns is None else out.index_select(-1, columns)

    def at(self, rows: Tensor) -> Tensor:
        """The rows that `rows` [n] lists, of a weight `by_rows`."""
        kept, columns = self.kept(0), self.kept(1)
        with _disable_current_modes():
            value = self.values.at(self.name, rows if kept is None or self.zeroed else kept[rows])
        if columns is not None and not self.zeroed:
            value = value.index_select(1, columns)
        value = self._typed(value)
        if self.zeroed and columns is not None:
            value.index_fill_(1, _others(columns, self.shape[1]), 0)
        if self.zeroed and kept is not None:
            value[torch.isin(rows, _others(kept, self.shape[0]))] = 0
        return value


def _others(kept: Tensor, size: int) -> Tensor:
    gone = torch.ones(size, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    return gone.nonzero().flatten()


# What can be asked of a tensor without its values.
FACTS = frozenset((
    "dim", "size", "numel", "nelement", "ndimension", "stride", "is_contiguous", "is_floating_point", "is_complex",
    "get_device", "element_size", "storage_offset", "__len__", "is_signed", "requires_grad_", "is_tensor", "is_same_size",
    "is_inference", "__hash__",
))  # fmt: skip
VALUED_ATTRIBUTES = frozenset(("data", "T", "mT", "H", "mH", "real", "imag"))


class OnDemand(torch.Tensor):
    """A weight whose values are made when a torch function is called with it."""

    weight: Weight
    use: Use
    written: Tensor | None

    @staticmethod
    def __new__(cls, weight: Weight, use: Use) -> OnDemand:
        """The tensor that stands for `weight`, in a run that has that `use` for it."""
        made: OnDemand = torch.Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.device, requires_grad=False
        )
        made.weight, made.use, made.written = weight, use, None
        made._is_param = isinstance(weight.source, nn.Parameter)
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Where a call comes without a torch function: the values are made."""
        return func(*pytree.tree_map(_made, args), **pytree.tree_map(_made, kwargs or {}))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Facts of the tensor itself; products and look-ups by rows; for all else the values are made."""
        kwargs = kwargs or {}
        if is_fact(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        special = SPECIAL.get(func)
        if special is not None:
            out = special(*args, **kwargs)
            if out is not NotImplemented:
                return out
        lazy = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, OnDemand)]
        made = {id(a): _made(a) for a in lazy}
        versions = {key: value._version for key, value in made.items()}
        args, kwargs = pytree.tree_map_only(OnDemand, lambda a: made[id(a)], (args, kwargs))
        out = func(*args, **kwargs)
        for a in lazy:  # forward writes into its own weight: what it wrote stays
            if made[id(a)]._version != versions[id(a)]:
                a.use.wrote(a, made[id(a)].detach())
        return out


def is_fact(func: Any) -> bool:
    """Whether a torch function asks or says something of a tensor without its values."""
    name = getattr(func, "__name__", "")
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    return name in FACTS or (name == "__get__" and owner not in VALUED_ATTRIBUTES) or name == "__set__"


def _made(value: Any) -> Any:
    if not isinstance(value, OnDemand):
        return value
    return value.written if value.written is not None else value.use.made(value.weight)


class Use:
    """What a run does with the weights that it makes."""

    def made(self, weight: Weight) -> Tensor:
        """`weight` as a plain tensor."""
        return weight.whole()

    def wrote(self, tensor: OnDemand, values: Tensor) -> None:
        """Forward has written `values` into its own weight: they stay."""
        tensor.written = values

    def by_rows(self, weight: Weight) -> bool:
        """Whether a matrix product is made by blocks of the weight's rows."""
        return weight.by_rows()

    def product(self, x: Tensor, weight: Weight) -> Tensor:
        """x [..., in] times `weight` [out, in], transposed."""
        return weight.times(x)

    def looked_up(self, rows: Tensor, weight: Weight) -> Tensor:
        """The rows of `weight` [n, width] at `rows` [...]."""
        return weight.at(rows.flatten()).view(*rows.shape, weight.shape[1])


class Recent(Use):
    """Keeps the values that were made last, for the next run that comes to the same place."""

    def __init__(self, room: int) -> None:
        """Up to `room` bytes of values stay, and those made last."""
        self.room = room
        # by the id of a weight, with its values, those used last behind
        self.held: OrderedDict[int, tuple[Weight, Tensor]] = OrderedDict()

    def made(self, weight: Weight) -> Tensor:
        """The values, which are not to be written into."""
        known = self.held.pop(id(weight), None)
        if known is not None and known[1]._version:
            self._refuse(weight)
        if known is None:
            while self.held and weight.bytes + sum(v.nbytes for _, v in self.held.values()) > self.room:
                self.held.popitem(last=False)
            with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
                known = weight, _by_rows(weight).data  # which counts the writes from here on
        self.held[id(weight)] = known
        return known[1]

    def wrote(self, tensor: OnDemand, values: Tensor) -> None:
        """What is shared by runs can't take them: an `InputError`."""
        self._refuse(tensor.weight)

    @staticmethod
    def _refuse(weight: Weight) -> None:
        raise InputError(
            f"forward writes into its own weight {weight.name}, which is read from elsewhere: "
            "use depgraph.prune, on the model in memory"
        )

    def by_rows(self, weight: Weight) -> bool:
        """Those that there is no room for; none where a run goes back, too, as `again` makes all values anew."""
        return weight.by_rows() and weight.bytes > self.room and not torch.is_grad_enabled()

    @contextmanager
    def again(self) -> Iterator[None]:
        """What runs inside keeps no weight for its way back: values are made anew when it comes to them."""

        def kept(t: Tensor) -> Any:
            own = t.untyped_storage().data_ptr()
            weight = next((w for w, v in self.held.values() if v.untyped_storage().data_ptr() == own), None)
            return t if weight is None else (weight, t.size(), t.stride(), t.storage_offset())

        def made(given: Any) -> Tensor:
            if isinstance(given, Tensor):
                return given
            weight, *place = given
            return self.made(weight).as_strided(*place)

        with torch.autograd.graph.saved_tensors_hooks(kept, made):
            yield

    def forget(self, weight: Weight) -> None:
        """Its values are others now."""
        self.held.pop(id(weight), None)


def _by_rows(weight: Weight) -> Tensor:
    """All values, read block by block, so that they are not there twice."""
    if not weight.shape or weight.cut is not None:
        return weight.whole()
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    step = max(1, READ // max(1, prod(weight.shape[1:])))
    for first in range(0, weight.shape[0], step):
        last = min(first + step, weight.shape[0])
        out[first:last] = weight.values.rows(weight.name, first, last)
    return out


def standing_in(model: nn.Module, weights: Weights, use: Use) -> nn.Module:
    """A copy of `model`, in which parameters that are on the meta device are made of `weights` when they are used."""
    tensors = all_tensors(model)
    stands: dict[int, Tensor] = {
        id(t): OnDemand(Weight(n, t, None, False, weights, t.dtype), use) if t.is_meta else t.clone()
        for n, t in tensors.items()
    }
    return skeleton(model, stands)


def _linear(input: Tensor, weight: Any, bias: Any = None) -> Any:  # noqa: A002  as torch names them
    fits = isinstance(weight, OnDemand) and weight.written is None and weight.use.by_rows(weight.weight)
    if not fits or isinstance(input, OnDemand) or input.dtype != weight.dtype or input.dim() < 1:
        return NotImplemented
    y = weight.use.product(input, weight.weight)
    return y if bias is None else y + bias


def _embedding(
    input: Tensor,  # noqa: A002  as torch names it
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    *_: Any,
    **__: Any,
) -> Any:
    fits = isinstance(weight, OnDemand) and weight.written is None and weight.weight.by_rows()
    if not fits or max_norm is not None or isinstance(input, OnDemand):
        return NotImplemented
    if input.numel() and not 0 <= int(input.min()) <= int(input.max()) < weight.shape[0]:
        raise IndexError("index out of range in self")
    return weight.use.looked_up(input, weight.weight)


SPECIAL: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch._C._nn.linear: _linear,
    F.embedding: _embedding,
}
