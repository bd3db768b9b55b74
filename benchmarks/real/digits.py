"""scikit-learn's 1797 digits, 8 x 8 pixels, and a net that learns them in seconds."""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import nn

from benchmarks.real import fashion
from benchmarks.real.nets import conv_norm

HELD_OUT = 500


def net() -> nn.Module:
    """Three convolutions and a linear layer."""
    return nn.Sequential(
        *(
            conv_norm(1, 16),
            nn.ReLU(),
            conv_norm(16, 32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            conv_norm(32, 32),
            nn.ReLU(),
        ),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )


def training() -> fashion.Images:
    """The digits that are trained on."""
    return fashion.Images(_all().images[HELD_OUT:], _all().labels[HELD_OUT:])


def held_out() -> fashion.Images:
    """The 500 that are evaluated."""
    return fashion.Images(_all().images[:HELD_OUT], _all().labels[:HELD_OUT])


@cache
def trained() -> nn.Module:
    """The net, trained for ten epochs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = net()
    fashion.train(model, training(), epochs=10, rate=0.05, seed=0, mirror=False)
    return model


def tune(model: nn.Module, seed: int) -> None:
    """One more epoch."""
    fashion.train(model, training(), epochs=1, rate=0.02, seed=seed, mirror=False)


@cache
def _all() -> fashion.Images:
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = (torch.from_numpy(bunch.images).float()[:, None] - 5) / 6
    return fashion.Images(images[order], torch.from_numpy(bunch.target).long()[order])
