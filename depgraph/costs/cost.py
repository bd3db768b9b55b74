"""What a model costs: parameters, MACs, bytes, as polynomials in the sizes of the groups and as measured."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from inspect import unwrap
from typing import Any, Protocol

import numpy as np
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..base.checks import a_module
from ..base.inputs import Arguments
from ..base.switches import replaced, without_library_kernels
from ..grouping.given import checked_counts
from ..grouping.graph import DependencyGraph
from ..tracing.tensors import named_tensors
from .size_table import Floats, Integers, SizeTable
from .stand_ins import on_stand_ins


class Cost(Protocol):
    """What a budget bounds, as a function of how many indices each free axis keeps ([free axes], in their order)."""

    def value(self, counts: Integers) -> float:
        """The cost at `counts`."""

    def slopes(self, counts: Integers) -> Floats:
        """[free axes]: how fast it grows with each count."""


class Total:
    """A cost that is one sum of products of sizes."""

    def __init__(self, table: SizeTable) -> None:
        """`table` has one row."""
        self.table = table

    def value(self, counts: Integers) -> int:
        """The sum at `counts`."""
        return int(self.table.values(counts)[0])

    def slopes(self, counts: Integers) -> Floats:
        """Its derivative by each count."""
        return self.table.slopes(counts, np.ones(1))


def parameter_cost(graph: DependencyGraph) -> Total:
    """The number of parameters, tied ones once."""
    return Total(_tensor_sizes(graph, {n: 1 for n, _ in graph.model.named_parameters()}))


def byte_cost(graph: DependencyGraph) -> Total:
    """Bytes of all parameters and buffers, tied ones once."""
    tensors = named_tensors(graph.model)[0]
    return Total(_tensor_sizes(graph, {n: t.element_size() for n, t in tensors.items()}))


def mac_cost(graph: DependencyGraph) -> Total:
    """Multiply-accumulates of one traced forward pass, as the rules state them."""
    table = SizeTable(graph)
    for _, factors in graph.state.work:
        table.add(factors)
    return Total(table)


def _tensor_sizes(graph: DependencyGraph, sizes: dict[str, int]) -> SizeTable:
    """One row: the entries of the named tensors, each weighted."""
    table = SizeTable(graph)
    for name, weight in sizes.items():
        table.add(graph.dims(name) or tuple(graph.tensors[name].shape), weight)
    return table


class CostModel:
    """Parameters, MACs and bytes as functions of how many units each group keeps: group name -> count, all where one is absent."""

    def __init__(self, graph: DependencyGraph) -> None:
        """Read the sizes of every tensor and every contraction off `graph`."""
        self._graph = graph
        self._parameters, self._macs, self._bytes = parameter_cost(graph), mac_cost(graph), byte_cost(graph)

    def parameters(self, counts: Mapping[str, int]) -> int:
        """Parameters with `counts` units in each group.

        Raises:
            InputError: unknown names, or more units than a group has.
        """
        return self._value(self._parameters, counts)

    def macs(self, counts: Mapping[str, int]) -> int:
        """Multiply-accumulates of one traced forward pass with `counts`, likewise."""
        return self._value(self._macs, counts)

    def bytes(self, counts: Mapping[str, int]) -> int:
        """Bytes of all parameters and buffers with `counts`, likewise."""
        return self._value(self._bytes, counts)

    def _value(self, total: Total, counts: Mapping[str, int]) -> int:
        return total.value(total.table.vector(checked_counts(self._graph, counts)))


def parameter_count(model: nn.Module) -> int:
    """Entries of all parameters, tied ones once.

    Args:
        model: any module.
    """
    a_module("model", model)
    return sum(p.numel() for p in model.parameters())


def byte_count(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    return sum(t.numel() * t.element_size() for t in named_tensors(model)[0].values())


class _OneModule:
    """Stands in for the counter's tracker of modules, whose hooks on gradients clash with those that forward takes."""

    parents = ("Global",)

    def __enter__(self) -> None:
        """Nothing is hooked."""

    def __exit__(self, *_: object) -> None:
        """Nothing to undo."""


def _bare(mode: Any) -> AbstractContextManager[None]:
    """A mode of torch's without the wrapper that only matters under ``torch.compile``, and costs seconds of imports."""
    return replaced(type(mode), "__torch_dispatch__", lambda before, *args: unwrap(before)(*args))


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of one forward pass (of one on each of `Examples`) in eval mode, by torch's FLOP counter.

    They are FLOPs / 2, counted on fake tensors, or real ones where the path through the model depends on data. Kernels of
    whole layers, which the counter does not know, run as the products they are made of.

    Args:
        model: any module.
        example_inputs: as for `prune`.
    """
    a_module("model", model)
    return macs_of(model, example_inputs)


def macs_of(model: nn.Module, example_inputs: Any, cheap: bool = False) -> int:
    """As `count_macs`; on real tensors where a run is known to be `cheap`."""

    def count(twin: nn.Module, examples: list[Arguments]) -> int:
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _OneModule()  # type: ignore[assignment]
        with without_library_kernels(), counter, _bare(counter.mode):
            for example in examples:
                example.run(twin)
        return int(counter.get_total_flops()) // 2

    return on_stand_ins(model, example_inputs, count, cheap)
