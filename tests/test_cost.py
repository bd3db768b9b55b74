"""Multiply-accumulates as torch's counter sees them, and what it needs help with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from depgraph.axes.axes import Axis, concat
from depgraph.costs.cost import count_macs
from depgraph.costs.size_table import SizeTable


def test_work_does_not_depend_on_the_kernel():
    """In float32 an LSTM is one kernel of a library that torch's counter does not know."""
    model, x = nn.LSTM(5, 7), torch.randn(10, 2, 5)
    assert count_macs(model, x) == count_macs(model.double(), x.double()) == 20 * 28 * (5 + 7)


def test_work_of_attention_does_not_depend_on_its_fast_path():
    """In eval mode without gradients nn.MultiheadAttention is one kernel that torch's counter does not know."""
    model, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(3, 5, 8)
    assert count_macs(model, (x, x, x)) == 3 * 5 * 8 * (4 * 8) + 2 * 3 * 5 * 5 * 8
    assert torch.backends.mha.get_fastpath_enabled()


def test_work_of_a_model_that_takes_a_gradient_itself():
    """The counter's own hooks on gradients would refuse to run inside torch.autograd.grad."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.energy = nn.Linear(5, 7), nn.Linear(7, 1)

        def forward(self, x):
            y = self.enter(x)
            with torch.enable_grad():
                state = y.detach().requires_grad_()
                return y - torch.autograd.grad(self.energy(state).tanh().sum(), state)[0]

    assert (
        count_macs(Net(), torch.randn(2, 5)) == 2 * 5 * 7 + 2 * 7 + 2 * 7
    )  # the energy forward and backward


def test_sums_of_products_and_their_slopes_by_hand() -> None:
    """3ab + 2 * 7a + 4a of a = 4, b = 5 and a fixed 6; b squared and a + b."""
    a, b, fixed = Axis(11), Axis(13), Axis(6)
    graph: Any = SimpleNamespace(by_axis={a: 0, b: 1})
    table = SizeTable(graph, rows=3)
    table.add([a, b], scale=3)
    table.add([None, 7, a], scale=2)
    table.add([b, b], row=1)
    table.add([concat([a, b])], row=1)
    table.add([fixed, 2], scale=5, row=2)
    table.add([fixed, a], row=2)
    counts = np.array([4, 5])
    assert table.full.tolist() == [11, 13]
    assert table.values(counts).tolist() == [3 * 20 + 14 * 4, 25 + 9, 60 + 24]
    slopes = table.slopes(counts, np.array([2.0, 10.0, 0.5]))
    assert slopes.tolist() == [2 * (3 * 5 + 14) + 10 * 1 + 0.5 * 6, 2 * 3 * 4 + 10 * (2 * 5 + 1)]
