"""A tool of somebody else's on top of depgraph: its own criterion, its own constraint, and a rule for its own op."""

from typing import Any

import torch
from torch import Tensor, nn

import depgraph

LANES = 4  # what the tool's kernels take at once


class Spread:
    """A criterion: the standard deviation of the weights that produce a unit, summed over the members of its group."""

    normalise = "max"

    def prepare(self, graph: depgraph.DependencyGraph, calibration: depgraph.Calibration | None) -> None:
        self.tensors = graph.tensors

    def __call__(self, group: depgraph.Group) -> Tensor:
        total = torch.zeros(group.units, dtype=torch.float64)
        for member in group.members:
            tensor = self.tensors[member.name].detach().double()
            if member.role == "produces" and tensor.dim() > 1:
                rows = tensor.movedim(member.dim, 0)[torch.from_numpy(member.indices)]
                total += rows.flatten(1).std(1)
        return total


def lanes(graph: depgraph.DependencyGraph) -> None:
    """A constraint: wide groups keep whole lanes, narrow ones are not worth cutting."""
    for group in graph.groups:
        if group.units < 2 * LANES:
            graph.lock(group, "is too narrow for the kernel")
        else:
            graph.multiple_of(group, LANES)


@depgraph.op_rule("thinner::gated")
def gated(site: depgraph.OpCall) -> list[depgraph.Axis | None]:
    """A rule: ``gated(x, weight)`` is a linear layer [2 m, k] whose second half gates the first."""
    x, weight = (site.dims(argument) for argument in site.args)
    rows = site.shape_of(site.args[1])[0]
    value, gate = (site.slice(weight[0], at, at + rows // 2) for at in (0, rows // 2))
    site.same(value, gate)
    site.same(x[1], weight[1])
    site.weight(site.args[1], [weight[0]], [weight[1]])
    return [x[0], value]


def thin(model: nn.Module, example_inputs: Any, ratio: float) -> tuple[nn.Module, depgraph.Plan]:
    """The pruner: `model` without `ratio` of its units, checked, and the plan."""
    graph = depgraph.analyze(model, example_inputs, constraints=lanes)
    scores = depgraph.scores_of(graph, Spread())
    plan = depgraph.build_plan(graph, depgraph.choose(graph, scores, pruning_ratio=ratio))
    small = depgraph.apply(model, plan)
    depgraph.verify(model, small, plan, example_inputs)
    return small, plan
