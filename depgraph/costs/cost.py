"""What a model costs: parameters, MACs, bytes, as polynomials in the sizes of the groups and as measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..grouping.graph import DependencyGraph
from ..inputs import each_example, map_tensors
from ..tracing.tensors import named_tensors, skeleton
from ..tracing.trace import quiet_fakes
from ..tracing.wrappers import eagerly
from .size_table import Floats, Integers, SizeTable


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
    """Parameters, MACs and bytes as functions of how many indices each group's axis keeps (axis id -> count)."""

    def __init__(self, graph: DependencyGraph) -> None:
        """Read the sizes of every tensor and every contraction off `graph`."""
        self._parameters, self._macs, self._bytes = parameter_cost(graph), mac_cost(graph), byte_cost(graph)

    def parameters(self, counts: dict[int, int]) -> int:
        """Parameters with `counts` indices in each group's axis (by id)."""
        return self._parameters.value(self._parameters.table.vector(counts))

    def macs(self, counts: dict[int, int]) -> int:
        """Multiply-accumulates of one traced forward pass, likewise."""
        return self._macs.value(self._macs.table.vector(counts))

    def bytes(self, counts: dict[int, int]) -> int:
        """Bytes of all parameters and buffers, likewise."""
        return self._bytes.value(self._bytes.table.vector(counts))


def parameter_count(model: nn.Module) -> int:
    """Entries of all parameters, tied ones once."""
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
        """Nothing was."""


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    """Recurrent and encoder layers run as the products that they are made of, not as one kernel of a library."""
    before = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_cudnn_enabled(False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(before[0])
        torch._C._set_cudnn_enabled(before[1])


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of one forward pass (of one on each of `Examples`) in eval mode, by torch's FLOP counter.

    They are FLOPs / 2. Counted on fake tensors, without arithmetic; on real ones where the path through the model
    depends on data. The counter does not know the kernels of whole layers, which run as the products they are made of.
    """
    tensors = named_tensors(model)[0].values()
    for fake in (True, False):
        mode: Any = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
        stand_in = mode.from_tensor if fake else torch.Tensor.detach
        twin = skeleton(model, {id(t): stand_in(t) for t in tensors}).eval().requires_grad_(False)
        examples = map_tensors(each_example(example_inputs), stand_in)
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _OneModule()  # type: ignore[assignment]
        try:
            with quiet_fakes(), mode, torch.no_grad(), eagerly(), _without_fused_layers(), counter:
                for args, kwargs in examples:
                    twin(*args, **kwargs)
            return int(counter.get_total_flops()) // 2
        except Exception:
            if not fake:
                raise
    raise AssertionError("unreachable")


def measure_latency(model: nn.Module, example_inputs: Any, repeats: int = 20) -> float:
    """Median seconds of one forward pass (of one on each of `Examples`) in eval mode without gradients.

    Three passes go before, to warm up.
    """
    examples = each_example(example_inputs)
    training = [m for m in model.modules() if m.training]
    model.eval()
    times = []
    try:
        with torch.no_grad():
            for i in range(repeats + 3):
                start = time.perf_counter()
                for args, kwargs in examples:
                    model(*args, **kwargs)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if i >= 3:
                    times.append(time.perf_counter() - start)
    finally:
        for module in training:
            module.training = True
    return sorted(times)[len(times) // 2]
