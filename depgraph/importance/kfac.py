"""Fisher-weighted OBS: what the loss gains by the error that is left after the consumers' best update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..base.checks import flag
from ..base.errors import InputError
from ..base.values import output_leaves
from ..data.calibration import Batch, Calibration
from ..data.gradients import NoGradientError
from ..grouping.graph import DependencyGraph, Group
from .criterion import Importance, Scores
from .moments import Moments, Use, observed
from .readers import Reader
from .second_order import Obs

Tensor = torch.Tensor


class KfacObs(Obs):
    """tr(G W_u ((H^-1)_uu)^-1 W_u'): the error of `Obs`, weighted by what the loss makes of it.

    G is the second moment of the loss's gradient at the consumer's results, summed over the positions of a sample (one of a
    linear layer on vectors, all windows of a convolution); H and W_u are as for `Obs`. That is how much the loss grows, to
    second order, where its Hessian matrix is taken to be the Kronecker product of H and G, scaled by what positions of a sample have in
    common (`Together`) and by what updates fit of few samples. So scores compare between layers.
    Without a loss, G is that of random signs at the model's outputs (each relative to its size): what moves the outputs
    counts, whatever they are for.

    Sources: Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", NIPS 1992; Martens and
    Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015; for pruning: Wang et al.,
    "EigenDamage", ICML 2019, and van der Ouderaa et al., "The LLM Surgeon", ICLR 2024.
    """

    normalise = "none"
    per_cost = True

    def __init__(
        self,
        damping: float = 0.01,
        otherwise: Importance | None = None,
        widest: int = 8192,
        memory: int = 1 << 31,
        seed: int = 0,
        use_loss: bool = True,
    ) -> None:
        """Arguments as for `SecondMoments`; `seed` of the random signs, which without `use_loss` stand for a loss in any case.

        Groups that `otherwise` scores, and those that no gradient reaches, are brought to the scale of the others: their
        average unit is made that of all others.
        """
        super().__init__(damping, False, otherwise, widest, memory)
        flag("use_loss", use_loss)
        self.seed, self.use_loss = seed, use_loss
        self.by_loss = False  # whether there was a loss, and it was used

    def prepare(self, graph: DependencyGraph, calibration: Calibration | None) -> None:
        """Run the model of `graph` on the data forward, and then forward and back, once where memory allows.

        Raises:
            InputError: there is no data, no floating-point output and no loss, or a gradient is NaN, infinite or missing.
        """
        try:
            super().prepare(graph, calibration)
        except NoGradientError:
            if not self.notes:  # there is a loss: it is to blame
                raise
            self._without_gradients(graph, calibration)
        samples = min((n for n, _ in self.counts), default=1) if self.scores else 1
        averages = [average / samples for n in self.scores if (average := self.average_alone(n))]
        self.scale = float(np.mean(averages)) if averages else None
        for scores in self.scores.values():
            scores /= samples

    def _without_gradients(self, graph: DependencyGraph, calibration: Calibration | None) -> None:
        """Errors as they are, each group's mean 1: of a model that computes under ``no_grad`` no more can be known."""
        plain = Obs(self.damping, False, self.otherwise, self.widest, self.memory)
        plain.prepare(graph, calibration)
        self.counts = plain.counts
        self.scores = {n: s / (float(s.mean()) or 1.0) if s.size else s for n, s in plain.scores.items()}
        self.notes = [
            *plain.notes,
            "importance: no gradient comes back from the model's outputs, as where forward runs under torch.no_grad(): units "
            "are scored by 'obs'",
        ]

    def observed(
        self, graph: DependencyGraph, table: dict[str, list[Reader]], data: Calibration
    ) -> Iterator[Moments]:
        """The moments, and sums over the gradients."""
        batches, self.by_loss = 0, False

        def objective(output: Any, batch: Batch) -> Tensor:
            nonlocal batches
            batches += 1
            if self.use_loss and data.has_loss(output):
                self.by_loss = True
                return data.loss_of(output, batch)
            if not self.notes:
                self.notes.append(
                    "importance: gradients are those of random signs at the outputs"
                    if data.has_loss(output)
                    else "importance: there is no loss, so gradients are those of random signs at the outputs"
                )
            return signed(output, self.seed + batches)

        return observed(
            graph, table, data,
            windows=True, centred=False, widest=self.widest, memory=self.memory, objective=objective, solve=self.solved,
        )  # fmt: skip

    def weight(self, moments: Moments, use: Use, stack: int, block: int) -> Tensor | None:
        """[m, m]: the sum of W'gg'W."""
        return moments.curvature(use.consumer, stack, block)

    def share(self, moments: Moments, stack: int, matrix: Tensor, solved: Any) -> float:
        """What errors are multiplied by, as updates of few samples' H fit these samples: n/(n - d).

        So the variance of residuals is estimated, with d the degrees of freedom of a ridge regression with that damping on n samples.
        """
        n, damping = moments.count[stack], self.damping * float(matrix.diagonal().mean())
        free = len(matrix) - damping * float(solved.diagonal().sum())
        return 1 / max(1 - free / n, 1 / n)

    def of(self, solved: Any, weight: Tensor, entries: Tensor) -> Tensor:
        """[units]: the least error."""
        block = solved[entries[:, :, None], entries[:, None, :]]
        curvature = weight[entries[:, :, None], entries[:, None, :]]
        return torch.linalg.solve(block, curvature).diagonal(dim1=1, dim2=2).sum(1)

    def average_alone(self, group: str) -> float:
        """What a unit of a group costs alone, on average."""
        return float(self.scores[group].mean()) if len(self.scores[group]) else 0.0

    def __call__(self, group: Group) -> Scores:
        """[units] float64."""
        scores = self.scores.get(group.name)
        if scores is not None and scores.any():  # else no gradient came, as where a number leaves the graph
            return scores
        other = np.asarray(self.otherwise(group), dtype=np.float64)
        size = float(np.abs(other).mean()) if other.size else 0.0
        return other if self.scale is None or not size else other * (self.scale / size)


def signed(output: Any, seed: int) -> Tensor:
    """The sum of a model's outputs under random signs, each output divided by its root mean square.

    Raises:
        InputError: no output is a floating-point tensor.
    """
    total: Tensor | None = None
    generator = torch.Generator().manual_seed(seed)
    for t in output_leaves(output):
        t = torch.view_as_real(t) if t.is_complex() else t
        if not t.is_floating_point():
            continue
        flat = t.flatten().to(torch.promote_types(t.dtype, torch.float32))
        size = torch.nan_to_num(flat.detach(), 0.0, 0.0, 0.0).square().mean().sqrt()
        signs = (2 * torch.randint(0, 2, flat.shape, generator=generator) - 1).to(flat)
        signs = signs.masked_fill(~torch.isfinite(flat.detach()), 0)
        added = (torch.where(signs != 0, flat, 0) * signs).sum() / (size * len(flat) ** 0.5 + 1e-30)
        total = added if total is None else total + added
    if total is None:
        raise InputError(
            "the model returns no floating-point tensor, and there is no loss: give loss=... (a function of output and target) "
            "and batches that are pairs (inputs, target), or another importance, such as 'obs'"
        )
    return total
