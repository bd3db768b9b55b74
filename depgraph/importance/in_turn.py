"""Fisher-weighted OBS of units that go one after the other: each is scored by what it costs once those before it are gone.

Two units that make up for each other each score low alone, and cost much together. So the lowest units of a group are taken
first, the consumers' weights and the inverse of H are brought to what they are without them, and the rest is scored anew:

    H^-1 <- (H^-1)_RR - (H^-1)_RS ((H^-1)_SS)^-1 (H^-1)_SR,    W <- W_R - W_S ((H^-1)_SS)^-1 (H^-1)_SR

for the units S that go and the columns R that stay.

Sources: Kurtic et al., "ZipLM: Inference-Aware Structured Pruning of Language Models", NeurIPS 2023 (section 3, units of a layer
in turn); Hassibi and Stork, NIPS 1992 (the update). The weighting by gradients is that of `KfacObs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..base.checks import fraction
from ..data.calibration import Calibration
from ..grouping.graph import DependencyGraph
from .criterion import Importance
from .kfac import KfacObs
from .moments import Entries

Tensor = torch.Tensor
ROUNDS = 64  # in which the units of a group go; scores are made anew after each
GONE = -1  # owner of a column that is gone
LEFT = 0.75  # of the columns, below which the matrices are made smaller


@dataclass
class Part:
    """What one matrix of moments says of the units of a group.

    Attributes:
        curvature: [m, m]: the sum of W'gg'W over samples.
        inverse: [m, m]: of the damped moments.
        owner: [m]: the unit that each column goes with, or `GONE`.
    """

    curvature: Tensor
    inverse: Tensor
    owner: Tensor

    @property
    def bytes(self) -> int:
        """Of both matrices."""
        return 2 * self.inverse.numel() * self.inverse.element_size()

    def scores(self, units: int) -> Tensor:
        """[units]: what each that is left costs alone; 0 for those without columns here."""
        found = self.inverse.new_zeros(units)
        count = torch.bincount(self.owner + 1, minlength=units + 1)  # first of those that are gone
        start = (count.cumsum(0) - count)[1:]
        order, count = torch.argsort(self.owner, stable=True), count[1:]
        for k in count[count > 0].unique().tolist():
            some = (count == k).nonzero()[:, 0]
            at = order[
                start[some][:, None] + torch.arange(k, device=order.device)
            ]  # [units with k columns, k]
            found[some] = _least(
                self.inverse[at[:, :, None], at[:, None, :]], self.curvature[at[:, :, None], at[:, None, :]]
            )
        return found

    def remove(self, gone: Tensor) -> float:
        """Take the columns of the units `gone` away and update the others; what these units cost together.

        Rows and columns that are gone become 0 (with U the update of the others, C is less C_S'U, and W'GW becomes
        (W - W_S U)'G(W - W_S U)), and leave the matrices when they are a quarter of them.
        """
        s = torch.isin(self.owner, gone).nonzero()[:, 0]
        if not len(s):
            return 0.0
        own, among = self.inverse[s][:, s], self.curvature[s][:, s]
        cost = float(_least(own[None], among[None]))
        update = torch.linalg.solve(own, self.inverse[s])
        half = self.curvature[s] - 0.5 * (among @ update)
        self.curvature.addmm_(update.mT, half, alpha=-1).addmm_(half.mT, update, alpha=-1)
        self.inverse.addmm_(self.inverse[:, s], update, alpha=-1)
        self.owner[s] = GONE
        left = (self.owner != GONE).nonzero()[:, 0]
        if len(left) < LEFT * len(self.owner):
            self.curvature, self.inverse = self.curvature[left][:, left], self.inverse[left][:, left]
            self.owner = self.owner[left]
        return max(cost, 0.0)


def _least(inverse: Tensor, curvature: Tensor) -> Tensor:
    """[n]: tr(G W ((H^-1)_uu)^-1 W') for stacked (H^-1)_uu and W'GW [n, k, k]."""
    if inverse.shape[1] == 1:
        return (curvature / inverse)[:, 0, 0]
    return torch.linalg.solve(inverse, curvature).diagonal(dim1=1, dim2=2).sum(1)


def _alone(parts: list[Part], units: int) -> Tensor:
    """[units]: what each that is left costs alone."""
    return torch.stack([part.scores(units) for part in parts]).sum(0).clamp_(min=0)


def in_turn(parts: list[Part], units: int) -> Tensor:
    """[units]: what each costs, given that those with lower scores are gone. The parts are used up.

    The units that go in one round share what they cost together in proportion to what they cost alone. Scores never fall
    from one round to the next: a unit can't go before what it is scored without.
    """
    device = parts[0].inverse.device
    found = parts[0].inverse.new_zeros(units)
    left = torch.arange(units, device=device)
    least = 0.0
    while len(left):
        alone, order = _alone(parts, units)[left].sort(stable=True)
        mine = alone[: -(-units // ROUNDS)]
        going = left[order[: len(mine)]]
        together, whole = sum(part.remove(going) for part in parts), float(mine.sum())
        share = together / whole if whole else 0.0
        found[going] = (mine * share).clamp(min=least)
        least = float(found[going].max())
        left = left[order[len(mine) :]].sort().values
    return found


class KfacInTurn(KfacObs):
    """The geometric mean of the score of `KfacObs` and of what that is when all units with lower scores are gone.

    Once units are gone the consumers are updated. So of units that make up for each other not both go because either could, and what
    a group loses as a whole is what scores in turn add up to. The lowest units of a group go first, in up to 64 rounds. Scores are
    between these and those of units alone, which did best over several networks (docs/best.md): layers behind the consumers, which
    recovery fits, too, are not seen here. Source: Kurtic et al., "ZipLM: Inference-Aware Structured Pruning of Language Models", NeurIPS 2023, there
    without the mean.
    """

    def __init__(
        self,
        damping: float = 0.01,
        otherwise: Importance | None = None,
        widest: int = 8192,
        memory: int = 1 << 31,
        seed: int = 0,
        alone: float = 0.5,
        use_loss: bool = True,
    ) -> None:
        """Arguments as for `KfacObs`; with more damping less is seen of what units make up for.

        `alone` is the weight of the unit's score alone in the geometric mean, from 0 (in turn) to 1.
        """
        super().__init__(damping, otherwise, widest, memory, seed, use_loss)
        self.weight_alone = fraction("alone", alone, zero=True, one=True)

    def prepare(self, graph: DependencyGraph, calibration: Calibration | None) -> None:
        """As for `KfacObs`; a group whose matrices take more than `memory` is scored as there, and a note says so."""
        self.parts: dict[str, list[Part]] = {}
        self.alone: set[str] = set()  # groups whose matrices are too large
        self.averages: dict[str, float] = {}  # what a unit costs alone, of the other groups
        bound = None if calibration is None else calibration.memory
        self.room = self.memory if bound is None else min(self.memory, bound // 4)
        super().prepare(graph, calibration)
        if self.alone:
            self.notes.append(
                f"importance: units of {len(self.alone)} of {len(self.scores)} groups are scored each alone, since the matrices of what "
                f"reads them take more than {self.room:,} bytes: give more `memory` to score them in turn"
            )

    def take(self, group: str, solved: Any, weight: Tensor, entries: list[Entries], share: float) -> None:
        """Hold what a consumer of a group says until all of them have come."""
        if group in self.alone:
            super().take(group, solved, weight, entries, share)
            return
        owner = torch.full((len(weight),), GONE)
        for units, at in entries:
            owner[torch.from_numpy(at)] = torch.from_numpy(units)[:, None].expand(at.shape)
        owner = owner.to(weight.device)
        own = (owner != GONE).nonzero()[:, 0]
        self.parts.setdefault(group, []).append(
            Part(weight[own][:, own] * share, solved[own][:, own], owner[own])
        )
        if sum(part.bytes for parts in self.parts.values() for part in parts) > self.room:
            self.alone.add(group)
            self.scores[group] += _alone(self.parts.pop(group), len(self.scores[group])).cpu().numpy()

    def complete(self, group: str) -> None:
        """Score the units of a group whose consumers have all come."""
        if parts := self.parts.pop(group, []):
            alone = _alone(parts, len(self.scores[group]))
            self.averages[group] = float(alone.mean())
            found = in_turn(parts, len(alone)) if self.weight_alone < 1 else alone
            found = alone**self.weight_alone * found ** (1 - self.weight_alone)
            self.scores[group][:] = found.cpu().numpy()

    def average_alone(self, group: str) -> float:
        """What a unit of a group costs alone, on average: groups that are scored by another criterion are brought to that."""
        return self.averages.get(group) or super().average_alone(group)
