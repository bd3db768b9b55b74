"""Scores, budget and constraints -> Plan: plain data, for each tensor the indices that stay."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from .errors import PlanError

Indices = npt.NDArray[np.int64]
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Cut:
    """What stays of one tensor.

    Attributes:
        shape: its original shape.
        keep: for each dim the kept indices (int64, ascending), or None where all stay.
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
        if self.numbers is not None:
            out = torch.searchsorted(_on(self.numbers, tensor), out.contiguous()).to(tensor.dtype)
        return out


def _on(indices: Indices, tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(indices).to(tensor.device)


@dataclass(frozen=True)
class Repair:
    """A number that a module remembers: attribute `name` (and `keys` into it) of module `path` becomes `value`."""

    path: str
    name: str
    keys: tuple[int | str, ...]
    value: int


@dataclass(frozen=True)
class Rewrite:
    """A literal in `forward` of module `path`: argument `argument` of the n-th call of `function` becomes `value`."""

    path: str
    function: str
    occurrence: int
    argument: tuple[int | str, ...]
    old: int
    value: int


@dataclass(eq=False)
class Plan:
    """What to remove from a model. Plain data: no weights, no device; it replays on any model of the same shapes.

    Attributes:
        cuts: tensor name -> `Cut`, for the tensors that lose entries.
        shapes: name -> original shape of every parameter and buffer: the fingerprint of the model.
        aliases: further name of a tied tensor -> the name it has in `cuts`.
        repairs: attributes to set.
        rewrites: literals to rewrite.
    """

    cuts: dict[str, Cut] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    repairs: list[Repair] = field(default_factory=list)
    rewrites: list[Rewrite] = field(default_factory=list)

    def mask(self, name: str) -> torch.Tensor:
        """Bool tensor of the original shape of parameter or buffer `name`, True where kept.

        Raises:
            PlanError: the model has no such tensor.
        """
        first = self.aliases.get(name, name)
        if first not in self.shapes:
            raise PlanError(f"the plan knows no parameter or buffer {name!r}")
        cut = self.cuts.get(first)
        return torch.ones(self.shapes[first], dtype=torch.bool) if cut is None else cut.mask()

    def new_shape(self, name: str) -> tuple[int, ...]:
        """The shape that parameter or buffer `name` has afterwards."""
        first = self.aliases.get(name, name)
        cut = self.cuts.get(first)
        return self.shapes[first] if cut is None else cut.new_shape

    def apply_to_optimizer(
        self, optimizer: torch.optim.Optimizer, model: torch.nn.Module, small: torch.nn.Module
    ) -> torch.optim.Optimizer:
        """Let `optimizer` go on with `small` where it was with `model`: see `depgraph.apply_to_optimizer`."""
        from .optimizer import apply_to_optimizer  # noqa: PLC0415

        return apply_to_optimizer(self, optimizer, model, small)

    def to_json(self) -> str:
        """The plan as JSON text."""

        def indices(kept: Indices | None) -> list[int] | None:
            return None if kept is None else [int(i) for i in kept]

        return json.dumps(
            {
                "format": FORMAT,
                "shapes": {n: list(s) for n, s in self.shapes.items()},
                "aliases": self.aliases,
                "cuts": {
                    n: {
                        "keep": [indices(k) for k in c.keep],
                        "blocks": c.blocks and [indices(k) for k in c.blocks],
                        "numbers": indices(c.numbers),
                    }
                    for n, c in self.cuts.items()
                },
                "repairs": [[r.path, r.name, list(r.keys), r.value] for r in self.repairs],
                "rewrites": [
                    [r.path, r.function, r.occurrence, list(r.argument), r.old, r.value]
                    for r in self.rewrites
                ],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            PlanError: the text is no plan, with what is wrong.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise PlanError(f"plan format {data['format']!r} is not {FORMAT}, the one this version reads")
            shapes = {str(n): tuple(int(k) for k in s) for n, s in data["shapes"].items()}
            cuts = {}
            for name, cut in data["cuts"].items():
                keep = tuple(_read_indices(k, shapes[name][d], name) for d, k in enumerate(cut["keep"]))
                blocks = cut["blocks"]
                if len(keep) != len(shapes[name]):
                    raise PlanError(
                        f"the plan keeps indices of {len(keep)} dims of {name!r}, which has {len(shapes[name])}"
                    )
                read = None if blocks is None else [_read_indices(b, shapes[name][1], name) for b in blocks]
                numbers = cut.get("numbers")
                kept = None if numbers is None else _read_indices(numbers, max(numbers, default=0) + 1, name)
                cuts[name] = Cut(shapes[name], keep, read, kept)  # type: ignore[arg-type]
            return cls(
                cuts=cuts,
                shapes=shapes,
                aliases={str(k): str(v) for k, v in data["aliases"].items()},
                repairs=[Repair(str(p), str(n), tuple(k), int(v)) for p, n, k, v in data["repairs"]],
                rewrites=[
                    Rewrite(str(p), str(f), int(o), tuple(a), int(old), int(v))
                    for p, f, o, a, old, v in data["rewrites"]
                ],
            )
        except PlanError:
            raise
        except Exception as error:
            raise PlanError(f"this text is no depgraph plan: {type(error).__name__}: {error}") from error


def _read_indices(given: Sequence[int] | None, size: int, name: str) -> Indices | None:
    if given is None:
        return None
    kept = np.asarray(given, dtype=np.int64)
    if kept.ndim != 1 or kept.size == 0 or kept.min() < 0 or kept.max() >= size or (np.diff(kept) <= 0).any():
        raise PlanError(f"the plan's indices for {name!r} are not ascending within 0..{size - 1}")
    return kept
