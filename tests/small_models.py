"""Random inputs and networks in float64, for tests that hold models as users have them against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_entry import ready

import depgraph


def pixels(seed: int = 0) -> tuple[Tensor]:
    return (torch.randn(2, 3, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),)


def fresh(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network in float64 with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ready(build(), seed)


class Plain(nn.Module):
    """Two convolutions and two linears; what a test reparametrises are `b` and `c`."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(7, 11, 3, padding=1)
        self.c, self.head = nn.Linear(11, 13), nn.Linear(13, 3)

    def forward(self, x):
        x = F.gelu(self.b(F.gelu(self.a(x)))).mean((2, 3))
        return self.head(F.gelu(self.c(x)))


def vectors(width: int, rows: int = 2, seed: int = 0) -> Tensor:
    dice = torch.Generator().manual_seed(1000 * width + seed)
    return torch.randn(rows, width, dtype=torch.float64, generator=dice)


class Branches(nn.Module):
    """What runs depends on which inputs are given."""

    def __init__(self):
        super().__init__()
        self.enter, self.other, self.body = nn.Linear(5, 11), nn.Linear(7, 11), nn.Linear(11, 13)
        self.extra, self.head = nn.Linear(11, 13), nn.Linear(13, 3)

    def forward(self, x, y=None, *, deep=False):
        h = F.gelu(self.enter(x))
        if y is not None:
            h = h + self.other(y)
        z = self.body(h) + self.extra(h) if deep else self.body(h)
        return self.head(F.gelu(z))


def between(function: Callable[[nn.Module, Tensor], Tensor], **attributes: Any) -> nn.Module:
    """Three linear layers with `function` between the first two."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(12, 13), nn.Linear(13, 3)
            self.extra = nn.Parameter(torch.randn(12, 12))
            vars(self).update(attributes)

        def forward(self, x):
            return self.c(F.gelu(self.b(function(self, F.gelu(self.a(x))))))

    return fresh(Net)


def frozen_texts(net: nn.Module, x: Tensor, name: str) -> str:
    return " ".join(str(f.reason) for f in depgraph.analyze(net, x).frozen if f.name == name)


class Written(nn.Module):
    """A width as a literal in forward, one as an attribute: the wrapper must be no obstacle to either repair."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.width = nn.Linear(5, 12), nn.Linear(12, 13), nn.Linear(13, 3), 13

    def forward(self, x):
        h = F.gelu(self.a(x)).view(-1, 12).tanh()
        return self.c(F.gelu(self.b(h)).view(-1, self.width))


def attributes(**values: Callable[[], Any]) -> Callable[[nn.Module], None]:
    def setup(net: nn.Module) -> None:
        for name, value in values.items():
            setattr(net, name, value())

    return setup
