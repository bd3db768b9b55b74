"""Models that can't be pruned as they are: what is said of each kind, and that nothing else is raised."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from versions import on_new_torch

import depgraph
from depgraph import InputError

X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3)).eval()


def with_part(part: nn.Module) -> nn.Sequential:
    model = net()
    model[2] = part
    return model


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}, dtype=torch.qint8)


def packed() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = net()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def offloaded() -> nn.Module:
    model = net()
    pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")
    return model


def scripted(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(model)


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(net(), X)


def both(model: nn.Module, x: Tensor = X) -> Iterator[Callable[[], Any]]:
    yield lambda: depgraph.analyze(model, x)
    yield lambda: depgraph.prune(model, x)
    yield lambda: depgraph.prune(model, x, max_params=0.5)


def refused(model: nn.Module, text: str, remedy: str, x: Tensor = X) -> None:
    for call in both(model, x):
        with pytest.raises(InputError, match=text) as error:
            call()
        assert remedy in str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [quantised, packed])
def test_quantised_models_are_pruned_before(make: Callable[[], nn.Module]) -> None:
    refused(make(), "quantised or packed weights", "prune the model in floating point first, then quantise")


def test_a_quantised_part_is_named() -> None:
    model = with_part(quantised()[2])
    refused(model, r"2\._packed_params", "prune the model in floating point first, then quantise")


@pytest.mark.parametrize("make", [lambda: scripted(net()), traced], ids=["scripted", "traced"])
def test_torchscript_is_pruned_before(make: Callable[[], nn.Module]) -> None:
    refused(make(), "^the model: TorchScript", "prune the nn.Module that it was made of")


def test_a_part_in_torchscript_is_named() -> None:
    refused(with_part(scripted(nn.Sequential(nn.Linear(16, 24)))), "^2: TorchScript", "prune the nn.Module")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_of_model_and_inputs_must_fit(dtype: torch.dtype) -> None:
    refused(
        net().to(dtype),
        f"the model is in {dtype}, the example inputs are in torch.float32",
        "model.to(torch.float32)",
    )


def test_a_model_that_converts_its_inputs_is_pruned() -> None:
    class Converts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net().double()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.double())

    result = depgraph.prune(Converts().eval(), X)
    assert result.report.verification.status == "equal"


def test_offloaded_weights_are_loaded_before() -> None:
    model = offloaded()
    with pytest.raises(InputError, match="without values") as error:
        depgraph.analyze(model, X)
    assert "load the model whole, without offloading" in str(error.value)
    with pytest.raises(InputError, match="load it whole where it is offloaded"):
        depgraph.prune(model, X)


def test_a_graph_of_a_model_without_values_needs_inputs_without_values() -> None:
    with torch.device("meta"):
        model, x = net(), torch.randn(2, 5)
    assert len(depgraph.analyze(model, x).groups) == 2
    with pytest.raises(InputError, match="on the meta device, so without values"):
        depgraph.analyze(model, X)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@on_new_torch
def test_tensors_must_have_values() -> None:
    model = net()
    for context in (lambda: torch.device("meta"), lambda: default_device("meta")):
        for call in both(model):
            with pytest.raises(InputError, match="the default device is meta"), context():
                call()


def test_a_threshold_that_removes_nothing_says_so() -> None:
    result = depgraph.prune(net(), X, threshold=1e-9)
    assert not result.plan.cuts
    (note,) = [n for n in result.report.notes if "threshold" in n]
    assert note.startswith("no score is below threshold=1e-09, so nothing was removed: the lowest is 0.")
    lowest = float(note.rpartition(" ")[2])
    assert depgraph.prune(net(), X, threshold=1.01 * lowest).plan.cuts or lowest > 0
