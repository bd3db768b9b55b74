"""Who reads the units of a group: the weights that consume them, and what these are given on calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..axes import axes
from ..data.consumers import Consumer, consumers
from ..data.watch import Call
from ..grouping.graph import DependencyGraph, Indices


@dataclass(frozen=True)
class Reader:
    """A consumer, and the columns of its inputs that go with each unit of a group ([units, k])."""

    consumer: Consumer
    columns: Indices


def readers(graph: DependencyGraph) -> dict[str, list[Reader]]:
    """Name of each group -> its consumers that can be observed.

    A grouped convolution does not read units that take whole groups of it (depthwise): its outputs go with them.
    """
    found: dict[str, list[Reader]] = {g.name: [] for g in graph.groups}
    for consumer in consumers(graph):
        if consumer.reason or consumer.axis is None:
            continue
        for atom in dict.fromkeys(axes.atoms(consumer.axis)):
            if atom in graph.by_axis:
                columns = axes.positions(consumer.axis, atom)
                if columns.shape[1] and not _takes_blocks(consumer, columns):
                    found[graph.by_axis[atom].name].append(Reader(consumer, columns))
    return found


def blocks(consumer: Consumer) -> int:
    """Groups of a grouped convolution, else 1."""
    count: Any = consumer.node.args[8] if consumer.is_convolution else 1
    return int(count)


def _takes_blocks(consumer: Consumer, columns: Indices) -> bool:
    if (count := blocks(consumer)) == 1:
        return False
    size = consumer.width // count
    _, taken = np.unique(columns[0] // size, return_counts=True)
    return bool((taken == size).all())


def matrices(call: Call) -> torch.Tensor:
    """The weight of a call as [blocks, rows, columns of the block, kernel positions].

    The blocks are the groups of a convolution, which have columns of their own, or stacked matrices, which share them.
    """
    weight = call.weight.detach()
    found = call.layout.matrices(weight)
    positions = weight[0, 0].numel() if call.consumer.is_convolution else 1
    return found.unflatten(2, (-1, positions))
