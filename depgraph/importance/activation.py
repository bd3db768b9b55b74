"""Criteria that look at what is given to the weights that consume a unit.

With x_j the values of column j of a consumer's inputs over all samples (of a convolution: over all positions of
channel j), and W_j the weights that meet them. A unit scores the sum over its columns and over its consumers; of stacked
matrices (experts), each counts by its share of the samples. Groups whose consumers can't be observed (queries meet keys, and no weight; recurrent states) are scored by another criterion.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from ..data.calibration import Calibration
from ..data.consumers import Consumer
from ..data.watch import Call, Watch
from ..grouping.graph import DependencyGraph, Group
from .criterion import Importance, Prepared, Scores, needed
from .magnitude import L2
from .readers import matrices, readers

Tensor = torch.Tensor
ENTRIES = 1 << 22  # of a weight that are looked at together


@dataclass
class Columns:
    """Statistics of the inputs of one consumer, one entry for each column.

    Attributes:
        weight: sum |w|, and sum w^2, over the weights that meet a column, for each of the stacked matrices.
        count: samples that each of the stacked matrices was given.
        mean: their mean.
        spread: sum (x - mean)^2.
        absolute: sum |x|.
    """

    weight: tuple[Tensor, Tensor]
    count: dict[int, int] = field(default_factory=partial(defaultdict, int))
    mean: dict[int, Tensor] = field(default_factory=partial(defaultdict, float))
    spread: dict[int, Tensor] = field(default_factory=partial(defaultdict, float))
    absolute: dict[int, Tensor] = field(default_factory=partial(defaultdict, float))

    def add(self, stack: int, x: Tensor) -> None:
        """`x` [samples, width] for matrix `stack`: merged with what was there, without loss of precision."""
        if not len(x):
            return
        x = x if x.dtype == torch.float64 else x.float()
        mean, before, total = x.mean(0), self.count[stack], self.count[stack] + len(x)
        step = mean.double() - self.mean[stack]
        spread = (x - mean).square_().sum(0).double()
        self.spread[stack] += spread + step.square() * (before * len(x) / total)
        self.mean[stack] += step * (len(x) / total)
        self.absolute[stack] += x.abs().sum(0).double()
        self.count[stack] = total

    def share(self, stack: int) -> float:
        """How many samples one of the stacked matrices was given, relative to the one that was given most."""
        return self.count[stack] / max(self.count.values())

    def variance(self, stack: int) -> Tensor:
        """[width] float64."""
        return self.spread[stack] / max(self.count[stack] - 1, 1)

    def square(self, stack: int) -> Tensor:
        """[width] float64: the mean of x^2."""
        return self.spread[stack] / self.count[stack] + self.mean[stack].square()


class InputStatistic:
    """A criterion that adds up a score for each column of the inputs of a unit's consumers."""

    needs = "inputs"
    normalise = "mean"

    def __init__(self, otherwise: Importance | None = None) -> None:
        """`otherwise` scores the groups whose consumers can't be observed, by default `L2`."""
        self.otherwise: Any = L2() if otherwise is None else otherwise

    def of(self, columns: Columns, stack: int) -> Tensor:
        """[width]: the score of each column for one of the stacked matrices."""
        raise NotImplementedError

    def prepare(self, graph: DependencyGraph, calibration: Calibration | None) -> None:
        """Run the model of `graph` on the data, once; without data there is an `InputError`."""
        data = needed(calibration, "the inputs of layers")
        self.readers = readers(graph)
        if isinstance(self.otherwise, Prepared):
            self.otherwise.prepare(graph, calibration)
        seen: dict[Consumer, Columns] = {}

        def see(call: Call) -> None:
            if call.consumer not in seen:
                seen[call.consumer] = Columns(_column_sums(call))
            for stack, x in call.inputs(windows=False):
                seen[call.consumer].add(stack, x)

        wanted = {r.consumer for rs in self.readers.values() for r in rs}
        Watch(graph.running, wanted, see).run_all(data, "observing inputs")
        self.scores: dict[Consumer, Scores] = {}
        for consumer, columns in seen.items():
            if columns.count:
                found = torch.stack([self.of(columns, s) * columns.share(s) for s in columns.count])
                self.scores[consumer] = found.double().sum(0).cpu().numpy()

    def __call__(self, group: Group) -> Scores:
        """[units] float64."""
        own = [r for r in self.readers[group.name] if r.consumer in self.scores]
        if not own:
            return np.asarray(self.otherwise(group))
        return np.asarray(sum(self.scores[r.consumer][r.columns].sum(1) for r in own))


def _column_sums(call: Call) -> tuple[Tensor, Tensor]:
    """[stacks, width]: for each column, the sums of |w| and of w^2 over the weights that meet it."""
    weight = matrices(call)
    sums = [torch.zeros((), dtype=torch.float32, device=weight.device)] * 2
    step = max(1, ENTRIES // max(1, weight.shape[0] * weight[0, 0].numel()))
    for rows in weight.split(step, 1):
        wide = rows if rows.dtype == torch.float64 else rows.float()
        sums = [sums[0] + wide.abs().sum((1, 3)), sums[1] + wide.square().sum((1, 3))]
    if weight.shape[0] * weight.shape[2] == call.consumer.width:  # blocks have columns of their own
        return sums[0].reshape(1, -1), sums[1].reshape(1, -1)
    return sums[0], sums[1]


class ActivationMean(InputStatistic):
    """mean |x_j|.

    Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017 (mean
    activation), with absolute values, as not every activation is positive.
    """

    def of(self, columns: Columns, stack: int) -> Tensor:
        """[width]."""
        return columns.absolute[stack] / columns.count[stack]


class ActivationVariance(InputStatistic):
    """var x_j.

    Source: Polyak and Wolf, "Channel-Level Acceleration of Deep Face Representations", IEEE Access 2015 (inbound pruning).
    """

    def of(self, columns: Columns, stack: int) -> Tensor:
        """[width]."""
        return columns.variance(stack)


class Wanda(InputStatistic):
    """sum |W_j| * sqrt(mean x_j^2), the sum over the outputs.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), ICLR 2024, summed
    over a column as An et al., AAAI 2024, do for comparison (Wanda-sp).
    """

    def of(self, columns: Columns, stack: int) -> Tensor:
        """[width]."""
        return columns.weight[0][stack] * columns.square(stack).sqrt()


class Flap(InputStatistic):
    """var x_j * sum W_j^2: what is lost when the column is replaced by its mean.

    Source: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (FLAP), AAAI 2024; the
    standardisation that makes layers comparable there is ``normalise="standard"``, which this criterion asks for.
    """

    normalise = "standard"

    def of(self, columns: Columns, stack: int) -> Tensor:
        """[width]."""
        return columns.weight[1][stack] * columns.variance(stack)
