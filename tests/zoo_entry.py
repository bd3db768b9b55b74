"""What an entry of the zoo is, the decorator that makes one, and `ready`, which makes a network fit for value tests.

Sizes: batch 2, 8 x 6 pixels or 10 tokens; channels are primes (or products of distinct small numbers), so that no two
sizes coincide by accident and a swap can't hide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

BATCH, HEIGHT, WIDTH, TOKENS, CLASSES = 2, 8, 6, 10, 3


@dataclass(frozen=True)
class Entry:
    """A tiny network and what must come of it at pruning_ratio=0.5.

    `shrinks` and `keeps` are globs over parameter names, `name` or `name:dim`: each must match something, and every
    match must get smaller (keep its size) in that dim, or in all. What neither names is free.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    shrinks: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    train: bool = False
    dtype: torch.dtype = torch.float64
    trainable: bool = True
    about: str = field(default="", compare=False)

    def model(self, seed: int = 0) -> nn.Module:
        """The network with random, asymmetric weights in the entry's dtype and mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = ready(self.make(), seed).train(self.train)
        return model if self.dtype == torch.float64 else model.to(self.dtype)

    def example(self, seed: int = 0) -> tuple:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 + seed)
            return tuple(cast(value, self.dtype) for value in self.inputs())


ENTRIES: dict[str, Entry] = {}


def entry(inputs: Callable[[], Any], shrinks: str = "", keeps: str = "", **options: Any):
    """Class decorator that puts a network into the zoo; `shrinks` and `keeps` are lists of globs split by blanks."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        assert cls.__name__ not in ENTRIES, f"{cls.__name__} is in the zoo twice"
        about = (cls.__doc__ or "").strip()
        ENTRIES[cls.__name__] = Entry(
            cls, inputs, tuple(shrinks.split()), tuple(keeps.split()), about=about, **options
        )
        return cls

    return register


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def image(channels: int = 3, height: int = HEIGHT, width: int = WIDTH) -> Callable[[], tuple]:
    return lambda: (torch.randn(BATCH, channels, height, width),)


def tokens(width: int = 5, length: int = TOKENS) -> Callable[[], tuple]:
    return lambda: (torch.randn(BATCH, length, width),)


def words(vocabulary: int = 17, length: int = TOKENS) -> Callable[[], tuple]:
    return lambda: (torch.randint(0, vocabulary, (BATCH, length)),)


def vector(width: int = 5) -> Callable[[], tuple]:
    return lambda: (torch.randn(BATCH, width),)


def ready(model: nn.Module, seed: int = 0) -> nn.Module:
    """float64, eval, and nothing left at a default that hides mistakes: biases, norms, statistics, zeros are random."""
    dice = torch.Generator().manual_seed(seed)
    model = model.double().eval()

    def uniform(t: Tensor) -> Tensor:
        return torch.rand(t.shape, generator=dice, dtype=t.dtype) + 0.5

    def normal(t: Tensor, scale: float) -> Tensor:
        return torch.randn(t.shape, generator=dice, dtype=t.dtype) * scale

    with torch.no_grad():
        for p in model.parameters():
            constant = p.numel() > 1 and bool((p == p.flatten()[0]).all())
            if constant and p.flatten()[0] != 0:
                p.copy_(uniform(p))
            elif constant or p.dim() <= 1:
                p.copy_(normal(p, 0.5))
            else:
                p.copy_(normal(p, 1.2 / max(1, p[0].numel()) ** 0.5))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(normal(b, 0.3))
            elif name.endswith("running_var"):
                b.copy_(uniform(b))
    return model


def sizes_by_glob(model: nn.Module, glob: str) -> dict[str, int]:
    """The size that a glob `name` or `name:dim` speaks of, for each parameter it matches."""
    pattern, _, dim = glob.partition(":")
    found = {n: p for n, p in model.named_parameters(remove_duplicate=False) if fnmatch(n, pattern)}
    assert found, f"{glob} matches no parameter of {type(model).__name__}"
    return {n: p.shape[int(dim)] if dim else p.numel() for n, p in found.items()}


def broken_expectations(entry: Entry, original: nn.Module, pruned: nn.Module) -> list[str]:
    """What of `shrinks` and `keeps` does not hold, one line each."""
    wrong = []
    for glob in entry.shrinks:
        after = sizes_by_glob(pruned, glob)
        wrong += [
            f"{n} ({glob}) did not shrink: {s}"
            for n, s in sizes_by_glob(original, glob).items()
            if after[n] >= s
        ]
    for glob in entry.keeps:
        after = sizes_by_glob(pruned, glob)
        wrong += [
            f"{n} ({glob}) changed: {s} -> {after[n]}"
            for n, s in sizes_by_glob(original, glob).items()
            if after[n] != s
        ]
    return wrong
