"""What the weights of a model are given to consume, on real data.

`consumers` lists the weights that consume dims of activations, from the recorded graph. `observe` runs the model on
calibration batches and hands over the inputs of each: the matrix X of ``X @ W.T``, whatever op the contraction is
(linear, einsum, convolution ...). Nothing of a run stays but what `visit` keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..grouping.graph import DependencyGraph
from .calibration import Calibration
from .consumers import Consumer, consumers
from .watch import Call, Watch

Visit = Callable[[Consumer, torch.Tensor], None]


def observe(
    model: nn.Module,
    what: DependencyGraph | Iterable[Consumer],
    calibration: Calibration,
    visit: Visit,
    *,
    windows: bool = True,
    text: str = "observing",
) -> None:
    """Run `model` on calibration batches in eval mode without gradients, and hand over the inputs of consumers.

    Args:
        model: the model that `what` was recorded of, or one with the same calls; it is not touched.
        what: a graph, for all its consumers, or some of them; those with a `reason` are left out.
        calibration: the batches.
        visit: ``visit(consumer, inputs)``, called for each call of each consumer, maybe in several pieces. `inputs` are
            [samples, width] in the model's type, on its device; for a convolution [samples, width, kernel positions], a
            sample being an output position. They may share memory with activations: to be read, not kept. Of a grouped
            convolution the width is that of all groups; the inputs of stacked matrices (experts) come one after another.
        windows: False: convolutions hand over [input positions, width] instead, which is far less.
        text: what a progress bar calls it.

    Raises:
        InputError: the calibration data is bad, or the model can't be run on it. What `visit` raises passes through.
    """
    wanted = consumers(what) if isinstance(what, DependencyGraph) else list(what)

    def each(call: Call) -> None:
        for _, inputs in call.inputs(windows):
            visit(call.consumer, inputs)

    Watch(model, wanted, each).run_all(calibration, text)


__all__ = ["Consumer", "Visit", "consumers", "observe"]
