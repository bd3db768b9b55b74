"""What the quality benchmark asks of a case: a trained model, its data, a budget and how its result is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depgraph.costs.cost import count_macs, parameter_count

Batches = list[tuple[Any, Any]]


@dataclass(frozen=True)
class Budget:
    """A share of the dense model's MACs, or of its parameters but for those of `kept` modules."""

    what: str  # "macs" or "params"
    share: float
    kept: tuple[str, ...] = ()  # paths of modules that nobody may prune, and whose parameters do not count

    def cost(self, model: nn.Module, example: Any) -> int:
        """What counts against the budget: MACs of one forward pass by torch's counter, or parameters."""
        if self.what == "macs":
            return count_macs(model, example)
        return parameter_count(model) - self.exempt(model)

    def exempt(self, model: nn.Module) -> int:
        """Parameters of the modules that are kept."""
        return sum(parameter_count(model.get_submodule(path)) for path in self.kept)

    def arguments(self, model: nn.Module) -> dict[str, Any]:
        """The budget in the words of ``depgraph.prune``."""
        if self.what == "macs":
            return {"max_macs": self.share}
        exempt = self.exempt(model)
        limit = exempt + int(self.share * (parameter_count(model) - exempt))
        return {"max_params": limit, "ignore": [f"{path}.*" for path in self.kept]}


@dataclass(frozen=True)
class Hints:
    """What Torch-Pruning's documentation has users say about a model like this one."""

    arguments: Callable[[nn.Module], dict[str, Any]]  # keyword arguments of its pruner
    repair: Callable[[nn.Module, Any], None] = lambda model, pruner: (
        None
    )  # attributes set by hand after pruning


@dataclass(frozen=True)
class Case:
    """A trained model with what it is judged by: one table of figures.

    Attributes:
        name: as given on the command line.
        title: what is judged, in words.
        budget: what all methods must keep to.
        build: the trained dense model, in eval mode.
        example: example inputs for tracing.
        calibration: seed -> batches (inputs, target) of training data, never of what is evaluated.
        loss: ``loss(output, target)``.
        score: model -> figures; the first is the one that methods are compared by.
        higher: whether more of it is better.
        held_out: (model, seed) -> the figure that methods are chosen by, on training data that the seed does not draw for
            calibration and that is never evaluated; None where methods are chosen by the evaluated figure of the first
            seed.
        hints: for Torch-Pruning.
        tune: (model, seed) -> None, the same short training for everybody; None where there is none.
        image: shape of one input, where latency is measured.
    """

    name: str
    title: str
    budget: Budget
    build: Callable[[], nn.Module]
    example: Callable[[], Any]
    calibration: Callable[[int], Batches]
    loss: Callable[[Any, Any], Tensor]
    score: Callable[[nn.Module], dict[str, float]]
    higher: bool
    hints: Hints
    tune: Callable[[nn.Module, int], None] | None = None
    held_out: Callable[[nn.Module, int], float] | None = None
    image: tuple[int, ...] | None = None


def run(model: nn.Module, inputs: Any) -> Any:
    """The model's output on one batch of inputs, positional or by keyword."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def last_linears(model: nn.Module, outputs: int) -> list[nn.Module]:
    """The linear layers with so many outputs: the classifier, which users tell Torch-Pruning to leave alone."""
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == outputs]


def shuffled(count: int, seed: int) -> list[int]:
    """0 .. count - 1 in an order drawn from the seed."""
    order: Sequence[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return list(order)
