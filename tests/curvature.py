"""What criteria of second order are given, seen by hooks: for tests that compute their scores by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
from depgraph.data.calibration import Calibration

Loss = Callable[[Any, Any], Tensor]
# What one consumer is given [n, m], the gradients of its results [n, rows], its weight [rows, m], and each unit's columns.
Given = tuple[Tensor, Tensor, Tensor, list[list[int]]]


def scores(net: nn.Module, data: list[Any], units: int, criterion: Any, loss: Loss | None) -> Any:
    example = data[0][0] if isinstance(data[0], tuple) else data[0]
    graph = depgraph.analyze(net, example)
    group = next(g for g in graph.groups if g.units == units)
    calibration = Calibration(data, example, loss, False)
    return depgraph.scores_of(graph, criterion, calibration=calibration)[group.name]


def watched(net: nn.Module, data: list[Any], objective: Loss, *names: str) -> list[tuple[Tensor, Tensor]]:
    """(inputs, gradients of the results) of modules, of all batches one after the other."""
    inputs: dict[str, list[Tensor]] = {n: [] for n in names}
    gradients: dict[str, list[Tensor]] = {n: [] for n in names}
    twin = copy.deepcopy(net).eval()
    for n in names:
        module = twin.get_submodule(n)
        module.register_forward_pre_hook(lambda _, args, n=n: inputs[n].append(args[0].detach()))
        module.register_full_backward_hook(lambda _, __, out, n=n: gradients[n].append(out[0].detach()))
    for x, target in data:
        objective(twin(x.clone().requires_grad_()), target).backward()
    return [(torch.cat(inputs[n]), torch.cat(gradients[n])) for n in names]


def batches(shape: tuple[int, ...], classes: int, count: int = 3) -> list[Any]:
    return [(torch.randn(11, *shape).double(), torch.randint(0, classes, (11,))) for _ in range(count)]


def alike(data: list[Any]) -> list[Any]:
    """Batches of images whose pixels are nearly the same."""
    return [(0.2 * x + 3 * x.mean((2, 3), keepdim=True), target) for x, target in data]


def ones(units: int) -> list[list[int]]:
    return [[u] for u in range(units)]


def plain(net: nn.Module) -> nn.Module:
    """The same without writing in place, which hooks of modules do not stand."""
    found = copy.deepcopy(net)
    for m in found.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = False
    return found


class TwoReaders(nn.Module):
    """Seven units that a wide layer and a narrow one read."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.wide, self.narrow = nn.Linear(3, 7), nn.Linear(7, 19), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x))
        return torch.tanh(self.wide(x)).sum(1, keepdim=True) + self.narrow(x)


def of_two_readers() -> tuple[nn.Module, list[Any], list[Given]]:
    """The network, batches for it, and what its two readers are given."""
    torch.manual_seed(0)
    net, data = TwoReaders().double(), batches((3,), 2)
    found = watched(net, data, F.cross_entropy, "wide", "narrow")
    readers = zip(found, (net.wide, net.narrow), strict=True)
    return net, data, [(x, g, m.weight.detach(), ones(7)) for (x, g), m in readers]


def on_others(x: Tensor, damping: float) -> float:
    """n/(n - d): the sum of squared residuals of a ridge regression on the rows of `x` is short by the degrees of freedom d."""
    moment = x.T @ x / len(x)
    hat = (
        x
        @ torch.linalg.inv(moment + damping * moment.diagonal().mean() * torch.eye(x.shape[1]).to(x))
        @ x.T
        / len(x)
    )
    return float(1 / (1 - hat.trace() / len(x)))


def in_common(
    net: nn.Module,
    data: list[Any],
    loss: Loss,
    name: str,
    *parts: tuple[Tensor, Tensor, Tensor],
    damping: float = 0.01,
    row: int = 0,
    first: int = 0,
) -> float:
    """How much more the loss moves when a column of a weight goes and the others make up for it than if the rows of a sample did it apart.

    The squares, summed over samples and columns, of the gradient of a sample that is run alone by the change of the weight (the loss is
    a mean over a batch), by those of each row; `parts` are inputs [n, m], gradients [n, rows] and rows of the weight [rows, m], one behind
    the other from `row` on, their columns from `first` on.
    """
    parameter = net.get_parameter(name)
    changes, apart = [], 0.0
    for x, g, weight in parts:
        moment = x.T @ x / len(x)
        inverse = torch.linalg.inv(moment + damping * moment.diagonal().mean() * torch.eye(x.shape[1]).to(x))
        for u in range(x.shape[1]):
            mine, change = (
                torch.outer(weight[:, u], inverse[u] / inverse[u, u]),
                torch.zeros_like(parameter).flatten(1),
            )
            change[row : row + len(weight), first : first + x.shape[1]] = mine
            apart += float((g * (x @ mine.T)).sum(1).square().sum())
            changes.append(change.flatten())
        row += len(weight)
    exact = 0.0
    for x, target in data:
        for i in range(len(x)):
            value = loss(net(x[i : i + 1]), target[i : i + 1]) / len(x)
            gradient = torch.autograd.grad(value, parameter)[0].flatten()
            exact += float((torch.stack(changes) @ gradient).square().sum())
    return max(1.0, exact / apart)
