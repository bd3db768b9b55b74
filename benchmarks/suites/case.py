"""One architecture with inputs for it, tables of these, and what all tables are written with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from outputs import Inputs
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One architecture with inputs for it.

    Attributes:
        name: the name under which its library knows it.
        build: makes the model, with random weights (the same ones each time) and in eval mode.
        inputs: makes the example inputs (the same values each time): a tuple of positional arguments or a dict of
            keyword arguments.
        note: what is particular about it: other sizes than the library's own, structure of inputs or outputs.
        check: looks at the pruned model for more than its outputs (generation, a config that agrees with the weights)
            and says what is wrong, or nothing.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    note: str = ""
    check: Callable[[nn.Module], str] | None = None


class Cases(dict[str, Case]):
    """Cases by name, in the order in which they are added."""

    def add(
        self,
        name: str,
        build: Callable[[], nn.Module],
        inputs: Callable[[], Inputs],
        note: str = "",
        check: Callable[[nn.Module], str] | None = None,
    ) -> None:
        """Add one; what `build` makes gets weights that are the same each time, and is in eval mode."""
        self[name] = Case(name, partial(seeded, build), inputs, note, check)

    def network(self, name: str, inputs: Callable[[], Inputs], **options: Any) -> Callable[[type], type]:
        """Add the network class that stands below, built with `options`; the note is the head of its docstring."""

        def added(network: type) -> type:
            note = (network.__doc__ or "").strip().partition("\n")[0]
            self.add(name, partial(network, **options), inputs, note)
            return network

        return added


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Build with weights that are the same each time, in eval mode, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Normal noise that is the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensor_inputs(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """One tensor of noise a shape."""
    return tuple(noise(*shape, seed=1 + i) for i, shape in enumerate(shapes))
