"""Criteria made of second moments of what consumers are given: what the other units can make up for.

Groups whose consumers can't be observed (queries meet keys, and no weight; recurrent states) are scored by another criterion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..base.errors import InputError
from ..data.calibration import Calibration
from ..grouping.graph import DependencyGraph, Group, Indices
from .criterion import Importance, Prepared, Scores, needed
from .magnitude import L2
from .moments import Entries, Moments, Use, observed
from .readers import Reader, readers

Tensor = torch.Tensor
ENTRIES = 1 << 25  # held at a time while units are scored


class SecondMoments:
    """A criterion that scores units by the matrix of second moments H of each of their consumers' inputs.

    Subclasses say what to make of a matrix once (`solved`) and of the entries of units in it (`of`).
    """

    needs = "inputs"
    normalise = "mean"
    windows = False  # of convolutions, every kernel position is a column of its own
    centred = True  # moments about the mean: covariances
    average = True  # over consumers, instead of their sum
    weighted = False  # looks at the consumers' weights

    def __init__(
        self, damping: float, otherwise: Importance | None, widest: int = 8192, memory: int = 1 << 31
    ) -> None:
        """Bounds of what is held at a time.

        Args:
            damping: is added to the diagonal of H, as a share of its mean; above 0, more where H can't be inverted otherwise.
            otherwise: the criterion for groups whose consumers can't be observed, by default `L2`.
            widest: columns of one matrix; wider consumers are taken apart, and their parts looked at alone.
            memory: bytes of matrices held while the model runs; it runs as often as that asks for.
        """
        if not 0 <= damping < math.inf or widest < 1 or memory < 1:
            raise InputError("damping must be at least 0, widest and memory positive")
        self.damping, self.widest, self.memory = damping, widest, memory
        self.otherwise: Any = L2() if otherwise is None else otherwise

    def solved(self, moments: Tensor) -> Any:
        """What `of` needs of a matrix [m, m] of second moments."""
        return self.inverse(moments)

    def of(self, solved: Any, weight: Tensor, entries: Tensor) -> Tensor:
        """[units]: the scores of units with `entries` [units, k] in the columns of `weight` [rows, m]."""
        raise NotImplementedError

    def prepare(self, graph: DependencyGraph, calibration: Calibration | None) -> None:
        """Run the model of `graph` on the data, and solve; without data there is an `InputError`."""
        data = needed(calibration, "the inputs of layers")
        table = readers(graph)
        if isinstance(self.otherwise, Prepared):
            self.otherwise.prepare(graph, calibration)
        self.scores: dict[str, Scores] = {}
        self.seen: dict[str, set[Any]] = {}
        self.notes: list[str] = []
        self.counts: list[tuple[int, int]] = []  # (samples, columns) of each matrix
        for moments in self.observed(graph, table, data):
            self.counts += [(n, moments.width) for n in moments.count.values()]
            for stack, block, matrix in moments.means():
                known = moments.solved.pop((stack, block), None)
                solved = self.solved(matrix) if known is None else known
                for use in moments.uses:
                    weight = self.weight(moments, use, stack, block)
                    if weight is None:
                        continue
                    self.scores.setdefault(use.group, np.zeros(graph.named[use.group].units))
                    entries = list(moments.entries(use, block))
                    self.take(use.group, solved, weight, entries, self.share(moments, stack, matrix, solved))
                    self.seen.setdefault(use.group, set()).add(use.consumer)
            for group in moments.last_of:
                self.complete(group)
        few = sum(n < width for n, width in self.counts)
        if few and self.damping:
            self.notes.append(
                f"importance: {few} of {len(self.counts)} matrices of second moments are of more inputs than there are calibration "
                f"samples: they are of full rank only by the damping, {self.damping:g} of their mean"
            )

    def take(self, group: str, solved: Any, weight: Tensor, entries: list[Entries], share: float) -> None:
        """Add what one matrix says of the units of a group to its scores."""
        for units, at in entries:
            self.scores[group][units] += self._in_pieces(solved, weight, at) * share

    def complete(self, group: str) -> None:
        """All consumers of a group have been taken."""

    def observed(
        self, graph: DependencyGraph, table: dict[str, list[Reader]], data: Calibration
    ) -> Iterator[Moments]:
        """The moments of what the readers in `table` are given."""
        return observed(
            graph, table, data,
            windows=self.windows, centred=self.centred, widest=self.widest, memory=self.memory,
        )  # fmt: skip

    def weight(self, moments: Moments, use: Use, stack: int, block: int) -> Tensor | None:
        """What `of` needs of a consumer besides the moments; None where it was not called."""
        if use.consumer not in moments.weight:
            return None
        found = moments.matrix(use.consumer, stack, block)
        return found if self.weighted else found[:0]

    def share(self, moments: Moments, stack: int, matrix: Tensor, solved: Any) -> float:
        """How much one of the stacked matrices counts."""
        return moments.shares[stack] / (sum(moments.shares.values()) if self.average else 1.0)

    def __call__(self, group: Group) -> Scores:
        """[units] float64."""
        scores = self.scores.get(group.name)
        if scores is None:
            return np.asarray(self.otherwise(group))
        return scores / len(self.seen[group.name]) if self.average else scores

    def _in_pieces(self, solved: Any, weight: Tensor, entries: Indices) -> Scores:
        k = entries.shape[1]
        step = max(1, ENTRIES // (k * (k + 2 * len(weight))))
        at = torch.from_numpy(entries).to(weight.device)
        found = [self.of(solved, weight, at[i : i + step]) for i in range(0, len(at), step)]
        return np.asarray(torch.cat(found).clamp_(min=0).cpu().numpy())

    def inverse(self, moments: Tensor) -> Tensor:
        """The inverse of damped moments; where rounding asks for it, of ten times as much damping, and so on."""
        diagonal, damping = moments.diagonal(), self.damping
        if not bool(torch.isfinite(diagonal).all()):
            raise InputError("inputs of a layer are NaN or infinite on the calibration data")
        while damping <= max(1, self.damping):
            damped = moments.clone()
            damped.diagonal().add_(damping * float(diagonal.mean()) or 1e-300)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not bool(failed) and bool(torch.isfinite(factor).all()):
                return torch.cholesky_inverse(factor)
            if not damping:
                break
            damping *= 10
        raise InputError(
            "the second moments of a layer's inputs can't be inverted: give more calibration data, or a damping above 0"
        )


class Obs(SecondMoments):
    """tr(W_u ((H^-1)_uu)^-1 W_u'): the least squared error of the consumer's outputs without the unit, others updated.

    W_u are the columns of the consumer's weights that meet the unit (one for each kernel position), H the mean of x x' over its
    inputs x, so this is the least mean of ||Wx - W*x||^2 over the W* that are zero there. Errors of several consumers add
    up. Source: Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", NIPS 1992, for
    blocks of columns as Kurtic et al., "ZipLM", NeurIPS 2023, have it.
    """

    windows = True
    average = False
    weighted = True

    def __init__(
        self,
        damping: float = 0.01,
        bias: bool = False,
        otherwise: Importance | None = None,
        widest: int = 8192,
        memory: int = 1 << 31,
    ) -> None:
        """Arguments as for `SecondMoments`; `bias`: the update may change the consumer's bias, too (H is then the covariance)."""
        super().__init__(damping, otherwise, widest, memory)
        self.centred = bias

    def of(self, solved: Any, weight: Tensor, entries: Tensor) -> Tensor:
        """[units]: the least error."""
        columns = weight[:, entries].permute(1, 2, 0)  # [units, k, rows]
        block = solved[entries[:, :, None], entries[:, None, :]]
        return (columns * torch.linalg.solve(block, columns)).sum((1, 2))


class Redundancy(SecondMoments):
    """1 - R^2: the share of a unit's variance in its consumers' inputs that no linear function of the other units predicts.

    tr(((C^-1)_uu)^-1) / tr(C_uu) with C the covariance of the inputs; the mean over consumers. Source: multiple correlation;
    in pruning: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, keep the channels that
    others can't be reconstructed from.
    """

    def __init__(
        self,
        damping: float = 1e-4,
        otherwise: Importance | None = None,
        widest: int = 8192,
        memory: int = 1 << 31,
    ) -> None:
        """Arguments as for `SecondMoments`."""
        super().__init__(damping, otherwise, widest, memory)

    def solved(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """The variances and the inverse."""
        return moments.diagonal(), self.inverse(moments)

    def of(self, solved: Any, weight: Tensor, entries: Tensor) -> Tensor:
        """[units]: the share."""
        variances, inverse = solved
        block = inverse[entries[:, :, None], entries[:, None, :]]
        left = torch.linalg.inv(block).diagonal(dim1=1, dim2=2).sum(1)
        whole = variances[entries].sum(1)
        return torch.where(whole > 0, left / whole.clamp(min=1e-300), torch.zeros_like(whole)).clamp(max=1)


class Correlation(SecondMoments):
    """1 - max over the other units v of |corr(u, v)|: how far a unit is from being parallel to another one.

    corr(u, v) = sum C_(u_i, v_i) / sqrt(tr C_uu * tr C_vv) over the columns i of each, C the covariance of the inputs; the mean
    over consumers. Both units of a parallel pair score low, though one makes up for the other; so does a unit that does not
    vary, which a constant makes up for. Source: Wang et al.,
    "COP: Customized Deep Model Compression via Regularized Correlation-Based Filter-Level Pruning", IJCAI 2019, there of weights.
    """

    def __init__(
        self, otherwise: Importance | None = None, widest: int = 8192, memory: int = 1 << 31
    ) -> None:
        """Arguments as for `SecondMoments`."""
        super().__init__(0.0, otherwise, widest, memory)

    def solved(self, moments: Tensor) -> Tensor:
        """The covariance as it is."""
        return moments

    def _in_pieces(self, solved: Any, weight: Tensor, entries: Indices) -> Scores:
        at = torch.from_numpy(entries).to(solved.device)
        together = torch.zeros(len(at), len(at), dtype=solved.dtype, device=solved.device)
        for column in at.T:
            together += solved[column[:, None], column]
        size = together.diagonal().clamp(min=0).sqrt()
        together = (together / (size[:, None] * size).clamp(min=1e-300)).abs_()
        together.fill_diagonal_(0)
        found = (1 - together.amax(1)).clamp_(min=0) * (size > 0)
        return np.asarray(found.cpu().numpy())
