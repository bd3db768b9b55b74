"""Scores, budget and constraints -> Plan: plain data, for each tensor the indices that stay, and their order."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..base.errors import PlanError

Indices = npt.NDArray[np.int64]
Masks = dict[str, npt.NDArray[np.bool_]]  # group name -> [units], True where one stays
FORMAT = 3


@dataclass(frozen=True, eq=False)
class Cut:
    """What stays of one tensor.

    Attributes:
        shape: its original shape.
        keep: for each dim the kept indices (int64; ascending, or in the order in which they then stand), or None where
            all stay as they are.
        blocks: None, or for each of the equal blocks of dim 0 the kept indices of dim 1 (grouped convolutions).
        numbers: None, or the kept indices of the axis that the tensor's values number: a buffer of indices is
            renumbered as well as sliced.
    """

    shape: tuple[int, ...]
    keep: tuple[Indices | None, ...]
    blocks: list[Indices] | None = None
    numbers: Indices | None = None

    @property
    def new_shape(self) -> tuple[int, ...]:
        """The shape of what stays."""
        sizes = [n if k is None else len(k) for n, k in zip(self.shape, self.keep, strict=True)]
        if self.blocks is not None:
            sizes[1] = len(self.blocks[0])
        return tuple(sizes)

    def mask(self) -> torch.Tensor:
        """Bool tensor of the original shape, True where kept."""
        mask = torch.ones(self.shape, dtype=torch.bool)
        for d, kept in enumerate(self.keep):
            if kept is not None:
                gone = np.ones(self.shape[d], dtype=bool)
                gone[kept] = False
                mask.index_fill_(d, torch.from_numpy(np.flatnonzero(gone)), False)
        if self.blocks is not None:
            rows = self.shape[0] // len(self.blocks)
            for b, kept in enumerate(self.blocks):
                gone = np.ones(self.shape[1], dtype=bool)
                gone[kept] = False
                mask[b * rows : (b + 1) * rows].index_fill_(1, torch.from_numpy(np.flatnonzero(gone)), False)
        return mask

    def slice(self, tensor: torch.Tensor) -> torch.Tensor:
        """The kept entries of `tensor` in a new contiguous tensor; shared where nothing goes."""
        if tensor.is_meta:
            return torch.empty(self.new_shape, dtype=tensor.dtype, device="meta")
        out = tensor
        if self.blocks is not None:
            rows = self.shape[0] // len(self.blocks)
            first = self.keep[0]
            parts = []
            for b, kept in enumerate(self.blocks):
                block = out[b * rows : (b + 1) * rows]
                if first is not None:
                    mine = first[(first >= b * rows) & (first < (b + 1) * rows)] - b * rows
                    block = block.index_select(0, _on(mine, tensor))
                parts.append(block.index_select(1, _on(kept, tensor)))
            out = torch.cat(parts)
        order = sorted(
            (
                d
                for d, k in enumerate(self.keep)
                if k is not None and not (d == 0 and self.blocks is not None)
            ),
        )
        for d in order:
            kept_d = self.keep[d]
            if kept_d is not None:
                out = out.index_select(d, _on(kept_d, tensor))
        return self.renumbered(out)

    def renumbered(self, kept: torch.Tensor) -> torch.Tensor:
        """`kept`, the entries that stay, with their values counted among the kept indices of what they number."""
        if self.numbers is None:
            return kept
        return torch.searchsorted(_on(self.numbers, kept), kept.contiguous()).to(kept.dtype)

    @cached_property
    def leads(self) -> bool:
        """Whether what stays of each dim are its first indices, as they stand: then it is a view of the whole."""
        if self.blocks is not None or self.numbers is not None:
            return False
        return all(k is None or np.array_equal(k, np.arange(len(k))) for k in self.keep)

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """What `slice` gives, but a view of `tensor` where that is possible."""
        if not self.leads:
            return self.slice(tensor)
        for d, kept in enumerate(self.keep):
            tensor = tensor if kept is None else tensor.narrow(d, 0, len(kept))
        return tensor


def _on(indices: Indices, tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(indices).to(tensor.device)


@dataclass(frozen=True)
class Repair:
    """A number that a module remembers: attribute `name` (and `keys` into it) of module `path` becomes `value`.

    `old` is what it was, where the plan says so: the plan then fits no model that has another number there.
    """

    path: str
    name: str
    keys: tuple[int | str, ...]
    value: int
    old: int | None = None


@dataclass(frozen=True)
class Rewrite:
    """A number in the code of module `path` becomes `value`, in this module alone.

    Attributes:
        path: the module; "" for the model itself.
        function: the method in whose code it stands, mostly ``"forward"``.
        number: which of the numbers there that can be sizes (2, 3, ... and -2, -3, ...), in the order of the text, from 0.
            An expression of numbers alone, such as ``2 * 8``, is one of them.
        old: what it was.
        value: what it becomes.
    """

    path: str
    function: str
    number: int
    old: int
    value: int


@dataclass(eq=False, repr=False)
class Plan:
    """What to remove from a model. Plain data: no weights, no device; it replays on any model of the same shapes.

    Attributes:
        cuts: tensor name -> `Cut`, for the tensors that lose entries.
        shapes: name -> original shape of every parameter and buffer: the fingerprint of the model.
        aliases: further name of a tied tensor -> the name it has in `cuts`.
        repairs: attributes to set.
        rewrites: literals to rewrite.
        request: the arguments of `prune` that led to it, as far as they are numbers and names; for the reader only. Of a
            plan in several steps, those of the last one, and under ``"earlier"`` a list of those of the others.
    """

    cuts: dict[str, Cut] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    repairs: list[Repair] = field(default_factory=list)
    rewrites: list[Rewrite] = field(default_factory=list)
    request: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Plan(cuts {len(self.cuts)} of {len(self.shapes)} tensors)"

    def mask(self, name: str) -> torch.Tensor:
        """Bool tensor of the original shape of parameter or buffer `name`, True where kept.

        What is kept stands in the smaller model as it stood, unless the plan `reorders`.

        Raises:
            PlanError: the model has no such tensor.
        """
        first = self.aliases.get(name, name)
        if first not in self.shapes:
            raise PlanError(f"the plan has no parameter or buffer {name!r}")
        cut = self.cuts.get(first)
        return torch.ones(self.shapes[first], dtype=torch.bool) if cut is None else cut.mask()

    @property
    def reorders(self) -> bool:
        """Whether some indices that stay do not stand in the order in which they stood."""
        kept = [k for cut in self.cuts.values() for k in cut.keep if k is not None]
        return any(bool((np.diff(k) < 0).any()) for k in kept)

    def new_shape(self, name: str) -> tuple[int, ...]:
        """The shape that parameter or buffer `name` has afterwards."""
        first = self.aliases.get(name, name)
        cut = self.cuts.get(first)
        return self.shapes[first] if cut is None else cut.new_shape

    def apply_to_optimizer(
        self, optimizer: torch.optim.Optimizer, model: torch.nn.Module, small: torch.nn.Module
    ) -> torch.optim.Optimizer:
        """Let `optimizer` continue with `small` where it was with `model`: see `depgraph.apply_to_optimizer`."""
        from .optimizer import apply_to_optimizer  # noqa: PLC0415

        return apply_to_optimizer(self, optimizer, model, small)

    def then(self, later: Plan) -> Plan:
        """The plan that removes what this one removes and then what `later` removes from what is left.

        ``apply(model, a.then(b))`` is ``apply(apply(model, a), b)``.

        Args:
            later: a plan for the models that this one makes.

        Raises:
            PlanError: `later` is for another model, or only one after the other gives what both give.
        """
        from .compose import composed  # noqa: PLC0415  a plan is what it composes

        return composed(self, later)

    def to_json(self) -> str:
        """The plan as JSON text."""
        from .plan_json import as_data  # noqa: PLC0415  a plan is what it writes

        return json.dumps(as_data(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            PlanError: the text is not a plan; everything that is wrong with it is listed.
        """
        from .plan_json import from_text  # noqa: PLC0415

        return from_text(text)
