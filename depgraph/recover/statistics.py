"""Running statistics of batch norms, estimated anew on the smaller model.

Each norm takes the mean and (unbiased) variance of the batch itself, as in train mode, so that later norms see what earlier
ones then give; everything else stays in eval mode. The running statistics become the average over all batches, as torch
makes it with ``momentum=None``.

Source: Li et al., "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning", ECCV 2020 (adaptive batch
normalisation, section 3.3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..axes.nodes import BATCH_NORMS, op_name
from ..base.running import WriteGuardMode
from ..data.watch import prepared, twin
from ..grouping.graph import DependencyGraph
from .result import NOT_FINITE, LayerRecovery
from .task import Task

Tensor = torch.Tensor


class _OfTheBatch(TorchFunctionMode):
    """Batch norms with running statistics take those of the batch, and add them up under the names of their buffers."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.sums: dict[tuple[str, str], tuple[Any, Any, int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.batch_norm or kwargs or args[5] or not isinstance(args[3], Tensor):
            return func(*args, **(kwargs or {}))
        key = self.names.get(id(args[3]), ""), self.names.get(id(args[4]), "")
        x = args[0]
        if "" in key or x.numel() <= x.shape[1]:  # one value has no variance
            return func(*args)
        mean, variance = (torch.zeros_like(t) for t in args[3:5])
        given = (*args[:3], mean, variance, True, 1.0, *args[7:])
        out = func(*given)
        first, second, count = self.sums.get(key, (0.0, 0.0, 0))
        self.sums[key] = first + mean.double(), second + variance.double(), count + 1
        return out


def has_statistics(graph: DependencyGraph) -> bool:
    """Whether the model of `graph` calls a batch norm."""
    return any(op_name(node.target) in BATCH_NORMS for node in graph.trace.graph.nodes)


def estimate(task: Task) -> None:
    """Estimate the running statistics of every batch norm of the smaller model anew."""
    model, tensors = twin(task.changes.model)
    mode = _OfTheBatch({id(t): name for name, t in tensors.items()})
    with prepared():
        for batch, _ in task.each("batch-norm statistics"):
            with torch.no_grad(), mode, WriteGuardMode(model.parameters()):
                batch.run(model)
    for (mean, variance), (first, second, count) in mode.sums.items():
        if not bool(torch.isfinite(first + second).all()):
            task.recovery.skipped.append((mean, NOT_FINITE))
            continue
        task.changes.set(mean, first / count)
        task.changes.set(variance, second / count)
        task.recovery.layers.append(LayerRecovery(mean, "statistics", None, None, True, f"{count} batches"))
