"""Magnitude criteria: how large the weights of a unit are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..calibration import Calibration
from ..errors import InputError
from ..graph import DependencyGraph, Group
from .criterion import Scores

CHUNK = 1 << 17  # entries summed at a time: few enough to stay in the processor's cache


class Norms:
    """Sums of absolute values along each dim of each tensor, every tensor read once, when first asked for."""

    def __init__(self, graph: DependencyGraph) -> None:
        """For the tensors of `graph`."""
        self.graph = graph
        self._sums: dict[str, list[Scores]] = {}
        self._blocks: dict[str, Scores] = {}

    def along(self, name: str, dim: int) -> Scores:
        """[size of `dim`] float64: for each index of the dim, the sum of |entries| of tensor `name` there."""
        if name not in self._sums:
            sums = absolute_sums(self.graph.tensors[name].detach())
            if not all(bool(torch.isfinite(s).all()) for s in sums):
                raise InputError(f"NaN or infinite values in {name}: nothing was pruned")
            self._sums[name] = [s.double().numpy() for s in sums]
        return self._sums[name][dim]

    def in_rows(self, name: str, dim: int, rows: tuple[int, int]) -> Scores:
        """As `along`, over the entries in `rows` of dim 0 alone."""
        key = f"{name}:{dim}:{rows}"
        if key not in self._blocks:
            part = self.graph.tensors[name].detach()[slice(*rows)]
            self._blocks[key] = absolute_sums(part)[dim].double().numpy()
        return self._blocks[key]


def absolute_sums(tensor: torch.Tensor) -> list[torch.Tensor]:
    """For each dim, the sums of |entries| over all other dims: a list of 1-D tensors, float32 or wider, on the CPU.

    The tensor is read once, as a matrix of dim 0 by the rest, in blocks of rows that stay in the processor's cache.
    """
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if tensor.dim() <= 1:
        return [tensor.abs().to(wide).cpu()] * tensor.dim()
    matrix = tensor.reshape(tensor.shape[0], -1)
    rows, columns = matrix.shape
    step = max(1, min(rows, CHUNK // max(1, columns)))
    make: dict[str, Any] = {"dtype": wide, "device": tensor.device}
    buffer = torch.empty(step, columns, **make)
    per_row, per_column = torch.empty(rows, **make), torch.zeros(columns, **make)
    ones_across, ones_down = torch.ones(columns, **make), torch.ones(step, **make)
    for start in range(0, rows, step):
        block = matrix[start : start + step]
        n = block.shape[0]
        absolute = buffer[:n].copy_(block).abs_() if block.dtype != wide else torch.abs(block, out=buffer[:n])
        torch.mv(absolute, ones_across, out=per_row[start : start + n])
        per_column.addmv_(absolute.t(), ones_down[:n])
    rest = per_column.reshape(tensor.shape[1:])
    sums = [per_row]
    for d in range(rest.dim()):
        others = [e for e in range(rest.dim()) if e != d]
        sums.append(rest.sum(others) if others else rest)
    return [s.cpu() for s in sums]


class L1:
    """Group-level L1: score(u) = sum over members m of sum of |w| over the entries of m that go with unit u.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, with p = 1. Running statistics and
    other buffers do not count.
    """

    def prepare(self, graph: DependencyGraph, calibration: Calibration | None = None) -> None:
        """Look at `graph`; no data is needed."""
        self.norms = Norms(graph)
        self.parameters = {n for n, _ in graph.model.named_parameters()}

    def __call__(self, group: Group) -> Scores:
        """[units] float64."""
        total = np.zeros(group.units)
        for m in group.members:
            if m.name in self.parameters:
                source = (
                    self.norms.along(m.name, m.dim)
                    if m.rows is None
                    else self.norms.in_rows(m.name, m.dim, m.rows)
                )
                total += source[m.indices].sum(1)
        return total
