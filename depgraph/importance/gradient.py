"""Criteria that look at how a loss depends on the weights: first order (Taylor) and second (Fisher, Hessian).

Gradients are taken in eval mode (running statistics, no dropout), on a copy of the module tree whose parameters are
aliases of the model's own: no gradient, flag, buffer or hook of the model is touched, and frozen models do as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..base.checks import whole_number
from ..base.errors import InputError
from ..data.calibration import Calibration
from ..grouping.graph import DependencyGraph, Group
from .criterion import Scores, checked_roles, counted, needed
from .differentiate import Aliases, Gradients, again, differentiate
from .sums import Entry, MemberSums, values_of

PER = ("all", "batch", "sample")
# What is summed over the weights of a unit, by the power that is taken of each w·g before the sum; 0: none.
PRODUCTS: dict[int, Entry] = {
    0: lambda out, weight, gradient: out.copy_(weight).mul_(gradient),
    1: lambda out, weight, gradient: out.copy_(weight).mul_(gradient).abs_(),
    2: lambda out, weight, gradient: out.copy_(weight).mul_(gradient).square_(),
}


def curvature(out: torch.Tensor, weight: torch.Tensor, product: torch.Tensor, signs: torch.Tensor) -> None:
    """w^2·z·(Hz)."""
    out.copy_(weight).square_().mul_(product).mul_(signs)


class Taylor:
    """|sum w·g| over all weights of the unit, g the gradient of the mean loss; other forms by the arguments.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019.
    """

    needs = "loss"
    normalise = "none"

    def __init__(
        self,
        entries: bool = False,
        power: int = 1,
        per: str = "all",
        roles: Sequence[str] = (),
    ) -> None:
        """The change of the loss, to first order, when the unit's weights become zero.

        With k the pieces of data that `per` says, and the mean over them outermost:

        ========= ======= ================================
        `entries` `power` score
        ========= ======= ================================
        False     1       mean_k abs(sum w·g_k)
        False     2       mean_k (sum w·g_k)^2
        True      1       mean_k sum abs(w·g_k)
        True      2       mean_k sum (w·g_k)^2
        ========= ======= ================================

        Args:
            entries: take the power of each entry before the sum, instead of that of the sum.
            power: 1 or 2.
            per: "all": one piece, g the mean of the batches' gradients. "batch": each batch is a piece. "sample": each
                sample is, so the model runs forward and backward once for each.
            roles: as for `Magnitude`.

        Raises:
            InputError: a value that is none of these.
        """
        if power not in (1, 2) or per not in PER:
            raise InputError(
                f"power must be 1 or 2 and per one of {', '.join(PER)}, not {power!r} and {per!r}"
            )
        self.entries, self.power, self.per = entries, power, per
        self.entry = PRODUCTS[power if entries else 0]
        self.roles = checked_roles(roles)

    def prepare(self, graph: DependencyGraph, calibration: Calibration | None) -> None:
        """Run the model of `graph` forward and backward on each piece of the data; raises as `differentiate` does."""
        data = needed(calibration, "gradients, and needs a loss")
        self.sums = MemberSums(graph)
        self.totals: dict[str, Scores] = {g.name: np.zeros(g.units) for g in graph.groups}
        own = {n: values_of(graph, n) for n in self.sums.names}
        mean: Gradients = {}
        self.pieces = 0

        def visit(_: Aliases, found: Gradients) -> None:
            self.pieces += 1
            if self.per == "all" and self.entries:
                _accumulate(mean, found)
                return
            if self.per != "all" and not self.entries:
                self.sums.clear()
            for name, gradient in found.items():
                self.sums.add(name, self.entry, own[name], gradient)
            if self.per != "all" and not self.entries:
                for group in graph.groups:
                    self.totals[group.name] += np.abs(self._sum(group)) ** self.power

        differentiate(graph, data, self.sums.names, visit, samples=self.per == "sample")
        for name, total in mean.items():
            self.sums.add(name, self.entry, own[name], total.div_(self.pieces))
        if mean:
            self.pieces = 1

    def __call__(self, group: Group) -> Scores:
        """[units] float64."""
        if self.entries:
            score = self._sum(group) / self.pieces
        elif self.per == "all":
            score = np.abs(self._sum(group) / self.pieces) ** self.power
        else:
            score = self.totals[group.name] / self.pieces
        return np.asarray(score)

    def _sum(self, group: Group) -> Scores:
        return self.sums.over(group, counted(group, self.sums.blocks, self.roles))


class TaylorEntries(Taylor):
    """sum |w·g| over all weights of the unit, g the gradient of the mean loss.

    Holds one copy of the gradients. Source: Molchanov et al., CVPR 2019, with absolute values for squares.
    """

    def __init__(self, roles: Sequence[str] = ()) -> None:
        """Arguments as for `Taylor`."""
        super().__init__(True, 1, "all", roles)


class GradientSize(Taylor):
    """sum |g| over all weights of the unit, g the gradient of the mean loss.

    Whatever the weights are: what moves the loss fastest stays. Holds one copy of the gradients. Source: Lee et al., "SNIP",
    ICLR 2019, without the weights.
    """

    def __init__(self, roles: Sequence[str] = ()) -> None:
        """Arguments as for `Taylor`."""
        super().__init__(True, 1, "all", roles)
        self.entry = lambda out, weight, gradient: out.copy_(gradient).abs_()


class TaylorSquared(Taylor):
    """mean over batches of (sum w·g)^2 over all weights of the unit, g the gradient of the batch's loss.

    Source: Molchanov et al., CVPR 2019, for groups of weights that go together.
    """

    def __init__(self, roles: Sequence[str] = ()) -> None:
        """Arguments as for `Taylor`."""
        super().__init__(False, 2, "batch", roles)


class TaylorSamples(Taylor):
    """mean over samples of (sum w·g)^2 over all weights of the unit, g the gradient of the sample's loss.

    The second-order term with the whole Fisher matrix of the unit, w'Fw. Source: Theis et al., "Faster Gaze Prediction With
    Dense Networks and Fisher Pruning", 2018; for coupled layers: Liu et al., "Group Fisher Pruning", ICML 2021.
    """

    def __init__(self, roles: Sequence[str] = ()) -> None:
        """Arguments as for `Taylor`."""
        super().__init__(False, 2, "sample", roles)


class Fisher(Taylor):
    """1/2 sum w^2·F over all weights of the unit, F the mean over samples of g^2: the diagonal of the empirical Fisher matrix.

    Source: LeCun et al., "Optimal Brain Damage", NIPS 1989, with the Fisher for the Hessian matrix. By default
    squares are of the gradients of single samples; ``per="batch"`` is cheaper and takes those of batches, which
    are closer to zero where samples disagree.
    """

    def __init__(self, per: str = "sample", roles: Sequence[str] = ()) -> None:
        """Arguments as for `Taylor`."""
        super().__init__(True, 2, per, roles)

    def __call__(self, group: Group) -> Scores:
        """[units] float64."""
        return super().__call__(group) / 2


class Hessian:
    """1/2 |sum w^2·H| over all weights of the unit, H the diagonal of the loss's Hessian matrix.

    Source: LeCun et al., "Optimal Brain Damage", NIPS 1989. H is estimated by Hutchinson's products z·(Hz) with random
    signs z (Yao et al., "PyHessian", 2020), so it is noisy: more data and more `draws` help.
    """

    needs = "loss"
    normalise = "none"

    def __init__(self, draws: int = 8, seed: int = 0, roles: Sequence[str] = ()) -> None:
        """How the diagonal is estimated.

        Args:
            draws: products taken for each batch; each costs about a backward pass.
            seed: of the random signs.
            roles: as for `Magnitude`.
        """
        self.draws, self.seed = whole_number("draws", draws, 1), seed
        self.roles = checked_roles(roles)

    def prepare(self, graph: DependencyGraph, calibration: Calibration | None) -> None:
        """Run the model forward, and backward for each product; an `InputError` where an op has no second derivative."""
        data = needed(calibration, "second derivatives, and needs a loss")
        self.sums, self.pieces = MemberSums(graph), 0
        own = {n: values_of(graph, n) for n in self.sums.names}
        makers: dict[torch.device, torch.Generator] = {}
        for tensor in own.values():
            if tensor.device not in makers:
                makers[tensor.device] = torch.Generator(tensor.device).manual_seed(self.seed)

        def visit(aliases: Aliases, first: Gradients) -> None:
            used = [n for n in first if first[n].requires_grad]
            for draw in range(self.draws if used else 0):
                signs = {n: _signs(aliases[n], makers[aliases[n].device]) for n in used}
                last = draw == self.draws - 1
                for name, found in again(aliases, first, signs, last).items():
                    self.sums.add(name, curvature, own[name], found, signs[name])
            self.pieces += self.draws

        differentiate(graph, data, self.sums.names, visit, twice=True)

    def __call__(self, group: Group) -> Scores:
        """[units] float64."""
        members = counted(group, self.sums.blocks, self.roles)
        return np.abs(self.sums.over(group, members)) / (2 * self.pieces)


def _accumulate(total: Gradients, found: Gradients) -> None:
    for name, gradient in found.items():
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if name in total:
            total[name] += wide
        else:
            total[name] = wide.clone()


def _signs(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    shape = (*like.shape, 2) if like.is_complex() else like.shape
    signs = 2 * torch.randint(0, 2, shape, generator=generator, device=like.device) - 1
    return torch.view_as_complex(signs.to(like.real.dtype)) if like.is_complex() else signs.to(like.dtype)
