"""Sparse training: regularisers over the groups of a dependency graph, for any training loop.

Each is made once, from the graph or a plan of the model that is trained, and reads that model's own parameters.
``loss + reg()`` adds a differentiable penalty; or ``reg.step(lr)`` after ``optimizer.step()`` shrinks the weights
directly. Units near zero can then be pruned at little loss. A smaller model needs a new regulariser.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..axes.ragged import block_count
from ..base.checks import number
from ..base.errors import InputError, PlanError
from ..grouping.graph import DependencyGraph, Group
from ..plan.plan import Plan
from ..select import choose_factors
from ..tracing.tensors import named_tensors


class GroupLasso:
    """Group lasso over structural groups: weight * sum over units u of ||w_u||_2.

    w_u holds the entries of all members of the group that go with unit u: rows of what produces it, columns of what
    consumes it, biases and scales in between. An entry that goes with several units (row i and column j of one matrix)
    counts for each. Source: Yuan and Lin, "Model selection and estimation in regression with grouped variables", J. R.
    Stat. Soc. B 68 (2006), without their weights sqrt(size); over coupled layers as in Fang et al., CVPR 2023.
    The gradient of a unit whose entries are all 0 is taken as 0.
    """

    def __init__(self, graph: DependencyGraph, weight: float, groups: Iterable[Group] | None = None) -> None:
        """Look up where the units lie.

        Args:
            graph: of the model that is trained (`analyze`).
            weight: lambda, at least 0.
            groups: which groups of `graph`; by default those that pruning would cut.

        Raises:
            InputError: a bad weight, or there is no group.
        """
        self.weight = _weight(weight)
        self._units = _Units(graph, choose_factors(graph)[0] if groups is None else list(groups))

    def norms(self) -> Tensor:
        """[units of all groups, in their order]: ||w_u||_2, differentiable; the slope of 0 is 0."""
        squares = self._units.squares()
        return torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)

    def __call__(self) -> Tensor:
        """The penalty, a differentiable scalar."""
        return self.weight * self.norms().sum()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Shrink every unit: w_u <- w_u * max(0, 1 - lr * weight / ||w_u||), so that units become exactly 0.

        This is the proximal operator of the penalty (Parikh and Boyd, "Proximal Algorithms", 2014, section 6.5.1) where
        no entry goes with two units; an entry that does is shrunk by each of them.
        """
        units = self._units
        norms = units.squares().sqrt()
        factor = (1 - lr * self.weight / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0)
        spread = norms.new_ones(units.length)
        spread.scatter_reduce_(0, units.position, factor[units.unit], "prod")
        for side in units.sides:
            w = units.parameters[side.parameter]
            w.view(side.split).mul_(side.broadcast(spread, w))  # splits a dim: a view in any layout


class Slimming:
    """L1 on the scales of batch norms: weight * sum of |gamma| over the channels that can be pruned.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017, equation 1.
    """

    def __init__(self, graph: DependencyGraph, weight: float) -> None:
        """Find the scales.

        Args:
            graph: of the model that is trained (`analyze`).
            weight: lambda, at least 0.

        Raises:
            InputError: a bad weight, or no batch norm scales a channel that can be pruned.
        """
        self.weight = _weight(weight)
        scales = {
            id(m.weight): m.weight
            for m in graph.model.modules()
            if isinstance(m, nn.modules.batchnorm._NormBase) and isinstance(m.weight, nn.Parameter)
        }
        places: dict[str, list[Any]] = {}
        for m in (m for group in choose_factors(graph)[0] for m in group.members):
            if id(graph.tensors[m.name]) in scales:
                places.setdefault(m.name, []).append(m.indices.reshape(-1))
        self._scales = [
            (graph.tensors[n], torch.from_numpy(np.unique(np.concatenate(at))).to(graph.tensors[n].device))
            for n, at in places.items()
        ]
        if not self._scales:
            raise InputError(
                "no batch norm of this model scales a channel that can be pruned: slimming has no effect\n"
                "  fix: use GroupLasso, which looks at all weights of a unit"
            )

    def __call__(self) -> Tensor:
        """The penalty, a differentiable scalar."""
        return self.weight * torch.stack([s[at.to(s.device)].abs().sum() for s, at in self._scales]).sum()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Soft thresholding: gamma <- sign(gamma) * max(0, |gamma| - lr * weight), its proximal operator."""
        for scale, at in self._scales:
            scale[at.to(scale.device)] = nn.functional.softshrink(
                scale[at.to(scale.device)], lr * self.weight
            )


class GrowingRegularisation:
    """L2 on what a plan removes, growing: strength / 2 * sum of w^2 over the entries that go.

    The strength begins at `start` and rises by `growth` at every `every`-th call of `grow`, up to `limit`, so the units
    fade while the rest of the network takes over, before they are removed. Source: GReg-1 in Wang et al., "Neural
    Pruning via Growing Regularization", ICLR 2021.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, *, growth: float = 1e-4, every: int = 10, start: float = 0.0, limit: float = 1.0,
    ) -> None:  # fmt: skip
        """Look up which entries go.

        Args:
            model: the model that is trained, which still has all its units.
            plan: what will be removed from it (`prune(...).plan`, or `build_plan`).
            growth: by how much the strength rises each time, above 0.
            every: how many calls of `grow` until it does, at least 1.
            start: strength at the beginning, at least 0.
            limit: where it stops rising.

        Raises:
            InputError: a bad number.
            PlanError: the plan is for a model of other shapes, or removes nothing.
        """
        self.growth, self.limit, self.strength = (_weight(v) for v in (growth, limit, start))
        if not growth or every < 1:
            raise InputError(f"growth={growth!r} must be above 0 and every={every!r} at least 1")
        self.every, self.calls = every, 0
        self._gone: list[tuple[Tensor, Tensor]] = []
        for name, parameter in named_tensors(model)[0].items():
            if name in plan.cuts and isinstance(parameter, nn.Parameter) and parameter.is_floating_point():
                if tuple(parameter.shape) != plan.shapes[name]:
                    raise PlanError(
                        f"{name!r} has shape {tuple(parameter.shape)}, the plan is for {plan.shapes[name]}: use growing "
                        "regularisation before anything is removed"
                    )
                self._gone.append((parameter, ~plan.mask(name).to(parameter.device)))
        if not self._gone:
            raise PlanError("the plan removes nothing of this model")

    @property
    def done(self) -> bool:
        """Whether the strength has reached its limit."""
        return self.strength >= self.limit

    def __call__(self) -> Tensor:
        """The penalty, a differentiable scalar; the strength stays as it is."""
        parts = [(w * gone.to(w.device)).square().sum() for w, gone in self._gone]
        return self.strength / 2 * torch.stack([p.to(parts[0].device) for p in parts]).sum()

    def grow(self) -> None:
        """Count one training step; every `every`-th raises the strength."""
        self.calls += 1
        if self.calls % self.every == 0:
            self.strength = min(self.strength + self.growth, self.limit)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Weight decay by the same strength, w <- w * (1 - lr * strength) on the entries that go, then `grow`."""
        for w, gone in self._gone:
            w.mul_(1 - max(0.0, min(1.0, lr * self.strength)) * gone.to(w.device, w.dtype))
        self.grow()


# ------------------------------------------------------------------------------------------- units as index arrays


@dataclass
class _Side:
    """One dim of a parameter along which units lie: sums over the other dims, one for each index (in each block).

    Attributes:
        parameter: which one, by position.
        split: its shape with dim 0 split into the blocks that have units of their own on this dim (1 block: no split).
        kept: the dims of `split` that are not summed over.
        start, stop: where the sums stand among those of all sides.
    """

    parameter: int
    split: tuple[int, ...]
    kept: tuple[int, int]
    start: int
    stop: int

    def sums(self, values: Tensor) -> Tensor:
        """[stop - start] sums of `values`, which have the shape of the parameter."""
        rest = [d for d in range(len(self.split)) if d not in self.kept]
        values = values.reshape(self.split)
        return (values.sum(rest) if rest else values).reshape(-1)

    def broadcast(self, spread: Tensor, like: Tensor) -> Tensor:
        """The side's part of `spread`, shaped so that it multiplies the parameter in its split shape."""
        shape = [n if d in self.kept else 1 for d, n in enumerate(self.split)]
        return spread[self.start : self.stop].reshape(shape).to(like)


class _Units:
    """Which entries of which parameters go with which unit: two index arrays into the sums of all sides.

    Position ``position[i]`` of the sums counts for unit ``unit[i]``. There is no loop over units or channels.
    """

    def __init__(self, graph: DependencyGraph, groups: Sequence[Group]) -> None:
        known = {n: p for n, p in graph.model.named_parameters() if p.is_floating_point()}
        number: dict[str, int] = {}
        sides: dict[tuple[str, int], _Side] = {}
        positions, units = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        self.length = self.count = 0
        for group in groups:
            for m in (m for m in group.members if m.name in known):
                number.setdefault(m.name, len(number))
                side = sides.get((m.name, m.dim))
                if side is None:
                    side = sides[m.name, m.dim] = self._side(graph, m.name, m.dim, number[m.name])
                block = 0 if m.rows is None else m.rows[0] * side.split[0] // known[m.name].shape[0]
                positions.append((side.start + block * side.split[m.dim + 1] + m.indices).reshape(-1))
                units.append(np.repeat(np.arange(group.units) + self.count, m.indices.shape[1]))
            self.count += group.units
        if not self.count:
            raise InputError("no group of this model can be pruned: there are no units to regularise")
        self.parameters = [known[n] for n in number]
        self.sides = sorted(sides.values(), key=lambda s: s.parameter)
        self.position, self.unit = (torch.from_numpy(np.concatenate(a)) for a in (positions, units))

    def _side(self, graph: DependencyGraph, name: str, dim: int, parameter: int) -> _Side:
        shape, axis = graph.tensors[name].shape, graph.dims(name)[dim]
        blocks = block_count(axis)
        split = (blocks, shape[0] // blocks, *shape[1:])
        start, self.length = self.length, self.length + blocks * split[dim + 1]
        return _Side(parameter, split, (0, dim + 1), start, self.length)

    def squares(self) -> Tensor:
        """[units], float32 or wider: the sum of squares of the entries of each unit. Each parameter is squared once."""
        device = self.parameters[0].device
        wide = torch.float64 if any(p.dtype == torch.float64 for p in self.parameters) else torch.float32
        self.position, self.unit = self.position.to(device), self.unit.to(device)
        sums: dict[int, Tensor] = {}
        for parameter, sides in groupby(self.sides, lambda side: side.parameter):
            squared = self.parameters[parameter].to(wide).square()
            sums |= {side.start: side.sums(squared).to(device) for side in sides}
        whole = torch.cat([sums[start] for start in sorted(sums)])
        return whole.new_zeros(self.count).index_add(0, self.unit, whole[self.position])


def _weight(given: float) -> float:
    return number("the strength of a regulariser", given, 0)
