"""Scores, budget and constraints -> Plan: plain data, for each tensor the indices that stay, and their order."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..base.errors import PlanError
from .bits import Bits

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
    """A number in the code of module `path` becomes `value`, in this module alone; or a size that it loads does.

    A size (``h.shape[-1]``, a variable that holds one) becomes the number that it was where the code computes with it.

    Attributes:
        path: the module; "" for the model itself.
        function: the method in whose code it stands, mostly ``"forward"``.
        number: which of the numbers there that can be sizes (2, 3, ... and -2, -3, ...), in the order of the text, from 0.
            An expression of numbers alone, such as ``2 * 8``, is one of them. Behind them the sizes and variables that are loaded there.
        old: what it was.
        value: what it becomes.
    """

    path: str
    function: str
    number: int
    old: int
    value: int


@dataclass(frozen=True)
class Fusion:
    """A norm over batches goes into the layer whose result it reads, and an identity stands in its place.

    Attributes:
        layer: path of the convolution or linear layer.
        norm: path of the norm.
        bias: whether the layer gets a bias that it did not have.
    """

    layer: str
    norm: str
    bias: bool


@dataclass(frozen=True)
class Scale:
    """The scale of a norm, and its shift, go into the linear layers that read its result; they become ones and zeros.

    Attributes:
        scale: name of the parameter.
        shift: likewise, or None.
        layers: paths of the layers.
    """

    scale: str
    shift: str | None
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Factor:
    """A linear or convolution layer becomes two, ``<layer>.0`` and ``<layer>.1``, of that rank.

    Attributes:
        layer: its path.
        rank: how many numbers go from the first to the second.
    """

    layer: str
    rank: int


@dataclass(frozen=True)
class Bias:
    """A layer without a bias gets one: zeros, until other values are put there.

    Attributes:
        weight: name of the layer's weight.
        parameter: what the module of the weight calls its bias; it has an empty place for it.
        shape: of the bias in the smaller model.
    """

    weight: str
    parameter: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the bias."""
        path = self.weight.rpartition(".")[0]
        return f"{path}.{self.parameter}" if path else self.parameter


@dataclass(frozen=True)
class Removal:
    """Module `path` goes.

    Attributes:
        path: the module, by the name it has before anything goes.
        leaves: what stands in its place: ``"zeros"`` (a module that yields zeros in the shape of what it is given),
            ``"zero"`` (one that yields a single zero, with as many dims, for sums with what has other sizes), ``"channels"`` (one that
            yields zeros, as many channels as the module did, for code that takes them apart), ``"input"`` (one that returns what
            it is given), or ``"nothing"``: it is a child of a Sequential or ModuleList, and the children behind
            it move up.
        returns: of a module that returns a tuple, its length and the place in it of the one tensor that is used; None of
            one that returns a tensor.
        entries: of a child of a container, the lists that have one entry for each child and lose this one's: (module path,
            attribute, keys into it), and the entry.
    """

    path: str
    leaves: str
    returns: tuple[int, int] | None = None
    entries: tuple[tuple[tuple[int | str, ...], Any], ...] = ()


LEAVES = ("zeros", "zero", "channels", "input", "nothing")
SILENT = ("zeros", "zero")  # of these, those that put out what a branch without weights does


class Moves:
    """Where modules and tensors go when children of containers are removed and the rest move up."""

    def __init__(self, removals: Iterable[Removal]) -> None:
        """Only those that leave nothing move others."""
        self.removed = {r.path for r in removals}
        self.gone: dict[str, list[int]] = {}
        for r in removals:
            parent, _, child = r.path.rpartition(".")
            if r.leaves == "nothing" and child.isdigit():
                self.gone.setdefault(parent, []).append(int(child))

    def holds(self, name: str) -> bool:
        """Whether a tensor or module is in one that is removed."""
        steps = name.split(".")
        return any(".".join(steps[:i]) in self.removed for i in range(1, len(steps) + 1))

    def new(self, name: str) -> str:
        """The new name of what stays."""
        return self._each(name, lambda child, gone: child - sum(i < child for i in gone))[1]

    def old(self, name: str) -> str:
        """The name from which `new` makes `name`."""

        def before(child: int, gone: list[int]) -> int:
            for i in sorted(gone):
                child += i <= child
            return child

        return self._each(name, before, back=True)[1]

    def _each(self, name: str, number: Any, back: bool = False) -> tuple[str, str]:
        """`name` with other numbers behind the containers in `gone`: by the original names, whichever way it goes."""
        original: list[str] = []
        made: list[str] = []
        for step in name.split(".") if name else ():
            gone = self.gone.get(".".join(original))
            other = str(number(int(step), gone)) if gone and step.isdigit() else step
            original.append(other if back else step)
            made.append(other)
        return ".".join(original), ".".join(made)


@dataclass(eq=False, repr=False)
class Plan:
    """What to remove from a model. Plain data: no weights, no device; it replays on any model of the same shapes.

    Attributes:
        cuts: tensor name -> `Cut`, for the tensors that lose entries.
        shapes: name -> original shape of every parameter and buffer: the fingerprint of the model.
        aliases: further name of a tied tensor -> the name it has in `cuts`.
        repairs: attributes to set.
        rewrites: literals to rewrite.
        entries: tensor name -> which single entries stay; the others are zero, and stay in the tensor. They count in the
            original's shape, as `cuts` do.
        fusions: norms that go into the layers before them. A plan with some, or with `scales` or `factors`,
            has no cuts.
        scales: scales of norms that go into the layers behind them.
        factors: layers that become two. On another model than the one it was made for, the two are the closest to its weights.
        removals: modules that go. Everything else in a plan has the names from before they went.
        biases: layers that get a bias which the original lacks.
        request: the arguments of `prune` that led to it, as far as they are numbers and names; for the reader only. Of a
            plan in several steps, those of the last one, and under ``"earlier"`` a list of those of the others.
    """

    cuts: dict[str, Cut] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    repairs: list[Repair] = field(default_factory=list)
    rewrites: list[Rewrite] = field(default_factory=list)
    entries: dict[str, Bits] = field(default_factory=dict)
    fusions: list[Fusion] = field(default_factory=list)
    scales: list[Scale] = field(default_factory=list)
    factors: list[Factor] = field(default_factory=list)
    request: dict[str, Any] = field(default_factory=dict)
    removals: list[Removal] = field(default_factory=list)
    biases: list[Bias] = field(default_factory=list)

    def __repr__(self) -> str:
        gone = f", removes {len(self.removals)} modules" if self.removals else ""
        return f"Plan(cuts {len(self.cuts)} of {len(self.shapes)} tensors{gone})"

    @property
    def moves(self) -> Moves:
        """Which names go, and what becomes of the others."""
        return Moves(self.removals)

    def new_name(self, name: str) -> str | None:
        """The name that parameter, buffer or module `name` has afterwards; None where it goes with a removed module.

        ``pruned.state_dict()[plan.new_name(name)]`` holds the entries of ``original.state_dict()[name]`` that ``mask(name)``
        keeps.

        Args:
            name: as the original has it.
        """
        moves = self.moves
        return None if moves.holds(name) else moves.new(name)

    def mask(self, name: str) -> torch.Tensor:
        """Bool tensor of the original shape of parameter or buffer `name`, True where kept: neither cut off nor made zero.

        What is kept stands in the smaller model as it stood, unless the plan `reorders`.

        Raises:
            PlanError: the model has no such tensor.
        """
        first = self.aliases.get(name, name)
        if first not in self.shapes:
            raise PlanError(f"the plan has no parameter or buffer {name!r}")
        if self.drops(first):
            return torch.zeros(self.shapes[first], dtype=torch.bool)
        cut, bits = self.cuts.get(first), self.entries.get(first)
        mask = torch.ones(self.shapes[first], dtype=torch.bool) if cut is None else cut.mask()
        return mask if bits is None else mask & bits.mask()

    def drops(self, name: str) -> bool:
        """Whether tensor `name` goes as a whole, with the module that has it."""
        if self.removals and self.moves.holds(name):
            return True
        return name.rpartition(".")[0] in {*(f.norm for f in self.fusions), *(f.layer for f in self.factors)}

    def added(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the parameters that the original does not have."""
        found = {bias.name: bias.shape for bias in self.biases}
        for fusion in self.fusions:
            if fusion.bias:
                found[f"{fusion.layer}.bias"] = self.shapes[f"{fusion.norm}.running_mean"]
        for scale in self.scales:
            for layer in scale.layers if scale.shift is not None else ():
                if f"{layer}.bias" not in self.shapes:
                    found[f"{layer}.bias"] = self.shapes[f"{layer}.weight"][:1]
        for factor in self.factors:
            out, inputs, *kernel = self.shapes[f"{factor.layer}.weight"]
            found[f"{factor.layer}.0.weight"] = (factor.rank, inputs, *kernel)
            found[f"{factor.layer}.1.weight"] = (out, factor.rank, *[1] * len(kernel))
            if f"{factor.layer}.bias" in self.shapes:
                found[f"{factor.layer}.1.bias"] = (out,)
        return found

    @property
    def reorders(self) -> bool:
        """Whether some indices that stay do not stand in the order in which they stood."""
        kept = [k for cut in self.cuts.values() for k in cut.keep if k is not None]
        return any(bool((np.diff(k) < 0).any()) for k in kept)

    def new_shape(self, name: str) -> tuple[int, ...]:
        """The shape that parameter or buffer `name` has afterwards: all zeros where it goes with a removed module."""
        first = self.aliases.get(name, name)
        if self.removals and self.moves.holds(first):
            return (0,) * max(1, len(self.shapes[first]))
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
