"""A network with sizes written as numbers, for `exports.py` and the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Literals(nn.Module):
    """Sizes written as numbers, in the whole and in a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 22, 3), nn.BatchNorm2d(22)
        self.inner = Halves()
        self.last = nn.Linear(22 * 9, 3)
        self.labels = ["one", "two"]

    def forward(self, image: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.norm(self.conv(image)).relu(), 3)
        x = F.dropout(self.inner(x).reshape(-1, 198), 0.5, training=self.training)
        return self.last(x)


class Halves(nn.Module):
    """Halves by number, in-place operations on a view of what is read again, a child that forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.spare = nn.Conv2d(22, 26, 1), nn.Conv2d(13, 22, 1), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.full((13, 1, 1), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        half = y[:, :13]
        half += self.scale  # seen in y
        half[:, :, 0] = 0.25
        return x + self.two(y[:, :13] * torch.sigmoid(y[:, 13:]))
