"""What a model costs: parameters, MACs, bytes, as polynomials in the sizes of the groups and as measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from . import axes
from .axes import Axis, Polynomial
from .graph import DependencyGraph
from .inputs import each_example, map_tensors
from .tensors import named_tensors, skeleton
from .trace import quiet_fakes
from .wrappers import eagerly


class CostModel:
    """Parameters and MACs as functions of how many indices each group's axis keeps."""

    def __init__(self, graph: DependencyGraph) -> None:
        """Read the sizes of every parameter and every contraction off `graph`."""
        free = graph.free
        self._axes: dict[int, tuple[Axis, Polynomial]] = {}
        parameters = {n for n, _ in graph.model.named_parameters()}
        self.fixed_parameters = 0
        self._parameters: list[tuple[int, list[int]]] = []
        for name in parameters:
            dims = graph.dims(name)
            self.fixed_parameters += self._add(self._parameters, dims, free, tuple(graph.tensors[name].shape))
        self.fixed_macs = 0
        self._macs: list[tuple[int, list[int]]] = []
        for _, factors in graph.state.work:
            numbers = [f for f in factors if isinstance(f, int)]
            self.fixed_macs += self._add(
                self._macs, [f for f in factors if isinstance(f, Axis)], free, (), prod(numbers)
            )

    def _add(
        self, into: list[tuple[int, list[int]]], dims: Sequence[Axis | None], free: dict[int, Axis],
        shape: tuple[int, ...], scale: int = 1,
    ) -> int:  # fmt: skip
        """Add a product of sizes to `into`; what does not vary is returned instead."""
        constant, varying = scale, []
        if not dims and shape:
            return prod(shape) * scale
        for axis in dims:
            if axis is None:
                continue
            root = axis.find()
            if id(root) not in self._axes:
                self._axes[id(root)] = (root, axes.count(root, free))
            p = self._axes[id(root)][1]
            if set(p) <= {()}:
                constant *= p.get((), 0)
            else:
                varying.append(id(root))
        if not varying:
            return constant
        into.append((constant, varying))
        return 0

    def _total(self, terms: list[tuple[int, list[int]]], counts: dict[int, int], fixed: int) -> int:
        sizes = {key: axes.evaluate(p, counts) for key, (_, p) in self._axes.items()}
        return fixed + sum(c * prod([sizes[k] for k in keys]) for c, keys in terms)

    def parameters(self, counts: dict[int, int]) -> int:
        """Parameters with `counts` indices in each group's axis (by id)."""
        return self._total(self._parameters, counts, self.fixed_parameters)

    def macs(self, counts: dict[int, int]) -> int:
        """Multiply-accumulates of one traced forward pass, likewise."""
        return self._total(self._macs, counts, self.fixed_macs)


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
