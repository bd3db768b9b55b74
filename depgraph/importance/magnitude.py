"""Criteria that look at the weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..axes.nodes import NORMS, argument_of, base_name
from ..base.errors import InputError
from ..data.calibration import Calibration
from ..grouping.graph import DependencyGraph, Group, Member
from .criterion import Prepared, Scores, checked_roles, counted, reduction
from .sums import MemberSums, absolute, moved_from, squared, values_of

BLOCK = 1 << 24  # distances held at a time


class Magnitude:
    """(reduction over the group's members of sum |w|^p over the unit's entries)^(1/p).

    With the sum over members it is the p-norm of all weights that go with the unit, as one vector. Running statistics
    and other buffers do not count. Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, for one
    layer; Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, for groups.
    """

    needs = "weights"
    normalise = "mean"

    def __init__(self, p: int = 1, reduce: str = "sum", roles: Sequence[str] = ()) -> None:
        """A norm of the unit's weights.

        Args:
            p: 1 or 2.
            reduce: "sum", "mean", "max", "product" (the geometric mean, which orders units as the product does) or
                "first" (the member that the group is named after: the first that produces it).
            roles: which members count, of "produces", "consumes" and "scales"; all where a group has none of these.

        Raises:
            InputError: a value that is none of these.
        """
        if p not in (1, 2):
            raise InputError(f"p must be 1 or 2, not {p!r}")
        self.p, self.roles = p, checked_roles(roles)
        self.reduce = reduction(reduce)

    def prepare(self, graph: DependencyGraph, calibration: Calibration | None = None) -> None:
        """Look at `graph`; no data is needed."""
        self.graph, self.sums = graph, MemberSums(graph)

    def __call__(self, group: Group) -> Scores:
        """[units] float64."""
        members = counted(group, self.sums.blocks.keys(), self.roles)
        if not members:
            return np.zeros(group.units)
        return np.asarray(self.reduce(np.stack(list(map(self._of, members)))) ** (1 / self.p))

    def _of(self, member: Member) -> Scores:
        if not self.sums.has(member.name):
            entry = absolute if self.p == 1 else squared
            self.sums.read(member.name, entry)
        return self.sums.of(member)


class L1(Magnitude):
    """sum |w| over all weights that go with the unit.

    Source: Li et al., ICLR 2017; for groups: Fang et al., CVPR 2023, with p = 1. See `Magnitude`.
    """

    def __init__(self, reduce: str = "sum", roles: Sequence[str] = ()) -> None:
        """`reduce` and `roles` as for `Magnitude`."""
        super().__init__(1, reduce, roles)


class L2(Magnitude):
    """sqrt(sum w^2) over all weights that go with the unit.

    Source: Fang et al., "DepGraph", CVPR 2023, with p = 2. See `Magnitude`.
    """

    def __init__(self, reduce: str = "sum", roles: Sequence[str] = ()) -> None:
        """Arguments as for `Magnitude`."""
        super().__init__(2, reduce, roles)


class Lamp(L2):
    """s_u^2 / sum of s_v^2 over u and the units v of its group that come after it in ascending order, where s is the L2 score.

    The share of a unit in what is left of its group when all smaller ones have gone; comparable between groups.
    Source: Lee et al., "Layer-Adaptive Sparsity for the Magnitude-Based Pruning", ICLR 2021, with units for weights.
    """

    normalise = "none"

    def __call__(self, group: Group) -> Scores:
        """[units] float64."""
        squares = super().__call__(group) ** 2
        order = np.argsort(squares, kind="stable")
        left = np.cumsum(squares[order][::-1])[::-1]  # of this one and all that are not smaller
        out = np.empty_like(squares)
        out[order] = squares[order] / np.maximum(left, 1e-300)
        return out


class ConsumerNorm(L2):
    """sqrt(sum w^2) over the input weights of the layers that consume the unit (all weights, where none does).

    Source: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, where channels are chosen by
    the layer that reads them.
    """

    def __init__(self, reduce: str = "sum") -> None:
        """Arguments as for `Magnitude`."""
        super().__init__(reduce, ("consumes",))


class Spectrum(L2):
    """sum w^2 over the input weights of the layers that consume the unit (all weights, where none does).

    Of the rank between the two factors that `depgraph.factorise` makes of a layer, these are the squared singular values: what
    the layer's result is off without the unit. Source: Eckart and Young, "The approximation of one matrix by another of lower
    rank", 1936; whitened by the inputs: Wang et al., "SVD-LLM", 2024.
    """

    normalise = "sum"

    def __init__(self, reduce: str = "sum") -> None:
        """Arguments as for `Magnitude`."""
        super().__init__(reduce, ("consumes",))

    def __call__(self, group: Group) -> Scores:
        """[units] float64."""
        return np.asarray(super().__call__(group) ** 2)


class Scale:
    """sum |gamma| over the scales of the unit: those of its batch norms, other norms and layer scales.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017. A scale is a
    parameter that a recorded norm takes as its weight, or that activations are multiplied by, entry by entry.
    """

    needs = "weights"
    normalise = "mean"

    def __init__(self, reduce: str = "sum", otherwise: Any = None) -> None:
        """Arguments as for `Magnitude`; `otherwise` is the criterion for groups without a scale, by default `L1`."""
        self.reduce = reduction(reduce)
        self.otherwise = L1() if otherwise is None else otherwise

    def prepare(self, graph: DependencyGraph, calibration: Calibration | None = None) -> None:
        """Look at `graph` for scales, at least one; no data is needed."""
        self.sums, found = MemberSums(graph), scales(graph)
        known = self.sums.names
        self.names = found.intersection(
            m.name for g in graph.groups for m in g.members if m.role == "scales" and m.name in known
        )
        if not self.names:
            raise InputError("no norm with a scale was recorded: use another importance, such as 'l2'")
        for name in self.names:
            self.sums.read(name, absolute)
        if isinstance(self.otherwise, Prepared):
            self.otherwise.prepare(graph, calibration)

    def __call__(self, group: Group) -> Scores:
        """[units] float64."""
        members = [m for m in group.members if m.name in self.names and m.role == "scales"]
        if not members:
            return np.asarray(self.otherwise(group))
        return np.asarray(self.reduce(np.stack([self.sums.of(m) for m in members])))


def scales(graph: DependencyGraph) -> set[str]:
    """Names of the tensors that a norm takes as its weight, or that something is multiplied by, entry by entry."""
    found = set()
    for node in graph.trace.graph.nodes:
        name = base_name(node.target)
        if name == "mul":
            given = list(node.args[:2])
        elif name in NORMS:
            given = [argument_of(node, "weight")]
        else:
            continue
        found |= {str(leaf.target) for leaf in map(moved_from, given) if leaf is not None}
    return found


class Random:
    """A random number for each unit: the baseline that any criterion must beat."""

    needs = "nothing"
    normalise = "none"

    def __init__(self, seed: int = 0) -> None:
        """The same `seed` gives a model the same scores again."""
        self.seed = seed

    def prepare(self, graph: DependencyGraph, calibration: Calibration | None = None) -> None:
        """Number the groups of `graph`."""
        self.numbers = {g.name: i for i, g in enumerate(graph.groups)}

    def __call__(self, group: Group) -> Scores:
        """[units] float64, uniform in 0..1."""
        return np.random.default_rng([self.seed, self.numbers[group.name]]).random(group.units)


class GeometricMedian:
    """sum over the other units v of ||w_u - w_v||, where w_u is all weights that go with unit u, as one vector.

    The least go first: what is near the middle of its group can be made up for by others. Source: He et al., "Filter
    Pruning via Geometric Median for Deep Neural Networks Acceleration" (FPGM), CVPR 2019, there for one layer.
    """

    needs = "weights"
    normalise = "mean"

    def __init__(self, roles: Sequence[str] = ()) -> None:
        """Arguments as for `Magnitude`; ``roles=("produces",)`` is the paper's form."""
        self.roles = checked_roles(roles)

    def prepare(self, graph: DependencyGraph, calibration: Calibration | None = None) -> None:
        """Look at `graph`; no data is needed."""
        self.graph = graph
        self.parameters = {n for n, _ in graph.model.named_parameters()}

    def __call__(self, group: Group) -> Scores:
        """[units] float64."""
        members = counted(group, self.parameters, self.roles)
        total = np.zeros(group.units)
        step = max(1, BLOCK // max(1, group.units))
        for start in range(0, group.units, step):  # all units against some
            some = slice(start, min(start + step, group.units))
            distances = torch.zeros(group.units, some.stop - some.start, dtype=torch.float64)
            for m in members:
                distances += _squared_distances(self._vectors(m), some)
            total += distances.clamp_(min=0).sqrt_().sum(1).numpy()
        return total

    def _vectors(self, member: Member) -> torch.Tensor:
        """[units, entries] float32 or wider: what goes with each unit."""
        tensor = values_of(self.graph, member.name)
        if member.rows is not None:
            tensor = tensor[slice(*member.rows)]
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        at = torch.from_numpy(member.indices).to(tensor.device)
        vectors = tensor.movedim(member.dim, 0)[at.reshape(-1)].reshape(len(at), -1)
        return vectors if vectors.dtype == torch.float64 else vectors.float()


def _squared_distances(vectors: torch.Tensor, some: slice) -> torch.Tensor:
    """[units, some] on the CPU: ||x_u - x_v||^2; about the mean, which costs the least precision."""
    centred = vectors - vectors.mean(0)
    norms = centred.square().sum(1)
    found = torch.addmm(norms[:, None] + norms[some], centred, centred[some].t(), alpha=-2)
    found[torch.arange(some.start, some.stop), torch.arange(some.stop - some.start)] = 0
    return found.cpu()
