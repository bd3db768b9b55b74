"""A small network of prime widths and a score: for sweeps, scans and pictures (fixtures `net` and `x`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """Two blocks of prime widths on one stream, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 11, 3, padding=1)
        self.norm = nn.BatchNorm2d(11)
        self.up, self.down = nn.Conv2d(11, 19, 3, padding=1), nn.Conv2d(19, 11, 1)
        self.wide, self.narrow = nn.Conv2d(11, 29, 1), nn.Conv2d(29, 11, 1)
        self.head = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.down(F.relu(self.up(x)))
        x = x + self.narrow(F.relu(self.wide(x)))
        return self.head(x.mean((2, 3)))


class Agreement:
    """Minus the distance from the dense model's outputs; counts its calls and can fail at one of them."""

    def __init__(self, model: nn.Module, x: Tensor, fails_at: int = -1, error: BaseException | None = None):
        with torch.no_grad():
            self.x, self.wanted = x, model.eval()(x)
        self.calls, self.fails_at, self.error = 0, fails_at, error

    def __call__(self, model: nn.Module) -> float:
        assert not any(m.training for m in model.modules())
        self.calls += 1
        if self.calls == self.fails_at and self.error is not None:
            raise self.error
        with torch.no_grad():
            return -float((model(self.x) - self.wanted).norm())
