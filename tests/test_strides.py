"""as_strided: dims that walk through memory are followed where their sizes and strides say which dims they walk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import prune_and_check
from torch import Tensor, nn

import depgraph


class Net(nn.Module):
    """Tokens [n, t, 16] through whatever a test makes of them."""

    def __init__(self, walk: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.width, self.heads, self.walk = 16, 4, walk
        self.first, self.last = nn.Linear(10, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.walk(self, self.first(x)))


class Numbered(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.as_strided(self.first(x), (2, 7, 2, 16), (128, 16, 16, 1)).sum(2))


def windows(net: Net, y: Tensor) -> Tensor:
    n, t, c = y.shape
    return y.as_strided((n, t - 2, 3, c), (t * c, c, c, 1)).mean(2)


def by_an_attribute(net: Net, y: Tensor) -> Tensor:
    c = net.width
    return torch.as_strided(y, size=(len(y), y.shape[1] - 1, 2, c), stride=(y.shape[1] * c, c, c, 1)).sum(2)


def every_other(net: Net, y: Tensor) -> Tensor:
    a, b, c = y.stride()
    return torch.as_strided(y, (y.shape[0], y.shape[1] // 2, y.shape[2]), (a, 2 * b, c))


def overlapping_chunks(net: Net, y: Tensor) -> Tensor:
    n, t, c = y.shape
    chunks = y.view(n, t // 4, 4, c)
    size, stride = list(chunks.size()), list(chunks.stride())
    size[1], stride[1] = size[1] * 2 - 1, stride[1] // 2
    return chunks.as_strided(size=size, stride=stride).sum(2)


def turned(net: Net, y: Tensor) -> Tensor:
    n, t, c = y.shape
    return y.as_strided((n, c, t), (t * c, 1, c)).transpose(1, 2)


def heads(net: Net, y: Tensor) -> Tensor:
    n, t, c = y.shape
    d = c // net.heads
    z = y.as_strided((n, net.heads, t, d), (t * c, d, c, 1))
    return (z * z.softmax(2)).transpose(1, 2).reshape(n, t, -1)


def diagonal(net: Net, y: Tensor) -> Tensor:
    square = y.view(len(y), 2, 4, -1).transpose(1, 3).contiguous()  # [n, c, 4, 2]
    walked = square.as_strided((*square.shape[:2], 2), (square.stride(0), square.stride(1), 2 + 1))
    return walked.transpose(1, 2)


WALKS = [windows, by_an_attribute, every_other, overlapping_chunks, turned, heads, diagonal]


@pytest.mark.parametrize("walk", WALKS)
def test_channels_pass_walks_through_memory(walk: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    result = prune_and_check(Net(walk).eval(), torch.randn(2, 8, 10), pruning_ratio=0.5)
    assert result.model.last.weight.shape == (5, 8)
    assert result.report.notes == []


def test_sizes_and_strides_written_as_numbers_follow() -> None:
    torch.manual_seed(0)
    result = prune_and_check(Numbered(windows).eval(), torch.randn(2, 8, 10), pruning_ratio=0.5)
    assert result.model.last.weight.shape == (5, 8)


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((2, 8, 8), (128, 16, 2), 0), ((2, 8, 16), (128, 16, 1), 1), ((2, 8, 16), (64, 8, 1), 0)],
)
def test_walks_that_pick_or_mix_channels_stay(size: Any, stride: Any, offset: int) -> None:
    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(10, 16), nn.Linear(size[2], 5)

        def forward(self, x: Tensor) -> Tensor:
            wide = torch.cat([self.first(x), self.first(x)])
            return self.last(wide.as_strided(size, stride, offset))

    with pytest.raises(depgraph.NothingToPruneError):
        depgraph.prune(Picked().eval(), torch.randn(2, 8, 10), verify=False)


def test_a_last_stage_in_channels_last_shrinks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    result = prune_and_check(model.eval(), x, pruning_ratio=0.5)
    assert result.model[0].weight.shape == (8, 3, 3, 3)
