"""Arithmetic that can tell, whatever the model's type: weights widened while they are used."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.surgery.on_demand import Recent, Weight
from depgraph.verify.weights import DrawnValues


class Net(nn.Module):
    """What weights are used for: looked up, multiplied, in convolutions, tied, in recurrent layers, as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 12), nn.Linear(12, 20), nn.Linear(20, 12)
        self.conv, self.rnn = nn.Conv1d(12, 14, 3, padding=1), nn.LSTM(14, 10, batch_first=True)
        self.back, self.head = nn.Linear(10, 12), nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(self.up(x).relu()) + (x @ self.up.weight.t()) @ self.down.weight.mT
        return self.head(self.back(self.rnn(self.conv(x.mT).mT)[0]))


IDS = torch.arange(21).view(3, 7) % 11


@pytest.fixture(params=[0, 1 << 24], ids=["on demand", "whole"])
def _size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["depgraph.verify.weights"], "ROOM", request.param)


def pruned(kind: torch.dtype) -> tuple[nn.Module, depgraph.PruneResult]:
    torch.manual_seed(0)
    model = Net().to(kind).eval()
    return model, depgraph.prune(model, IDS, verify=False)


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_right_results_are_equal_in_any_type(kind: torch.dtype) -> None:
    model, result = pruned(kind)
    before = copy.deepcopy(model.state_dict())
    proof = depgraph.verify(model, result.model, result.plan, IDS)
    assert proof.status == "equal"
    assert proof.max_error < 1e-12
    assert not proof.unproved
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def scale(model: Any) -> None:
    model.down.bias.mul_(1.01)


def swap(model: Any) -> None:
    model.up.weight[[0, 1]] = model.up.weight[[1, 0]]


def flip(model: Any) -> None:
    model.conv.bias.copy_(model.conv.bias.flip(0))


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("spoil", [scale, swap, flip])
def test_half_precision_hides_nothing(spoil: Callable[[Any], None]) -> None:
    """In their own type these deviations are smaller than what rounding does."""
    model, result = pruned(torch.bfloat16)
    with torch.no_grad():
        spoil(result.model)
    with pytest.raises(depgraph.VerificationError, match="deviates"):
        depgraph.verify(model, result.model, result.plan, IDS)


class Kernel(nn.Module):
    """A part that takes one type only."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.dtype != self.kind:
            raise TypeError(f"this kernel is for {self.kind}")
        return self.b(h.relu())


def test_kernels_for_one_type() -> None:
    """The report says why float64 did not run, and nothing is said that the type can't tell."""
    for kind, status in ((torch.float32, "equal"), (torch.bfloat16, "shapes")):
        torch.manual_seed(0)
        model, x = Kernel(kind).to(kind).eval(), torch.randn(3, 6, dtype=kind)
        proof = depgraph.prune(model, x).report.verification
        assert proof.status == status
        assert "float64 can't run (TypeError: this kernel is for" in proof.detail


class ByNumpy(nn.Module):
    """Hands a weight to numpy, which knows no tensors without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) * float(abs(self.b.bias.detach().numpy()).sum())


@pytest.mark.usefixtures("_size")
def test_weights_that_leave_torch() -> None:
    torch.manual_seed(0)
    result = depgraph.prune(ByNumpy().eval(), torch.randn(3, 6))
    assert result.report.verification.status == "equal"
    assert result.model.a.out_features == 8


def test_memory_is_bounded_by_the_largest_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is made for the proof, no more than a few tensors live at once, in float64 as they are."""
    torch.manual_seed(0)
    width, layers = 1024, 6
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)))
    model = nn.Sequential(model, nn.Linear(width, 3)).to(torch.bfloat16).eval()
    x = torch.randn(2, width, dtype=torch.bfloat16)
    result = depgraph.prune(model, x, verify=False)
    made: list[int] = []
    monkeypatch.setattr(sys.modules["depgraph.verify.weights"], "ROOM", 1 << 14)
    weights = sys.modules["depgraph.surgery.on_demand"]
    plain = weights.Weight.whole

    def counted(self: Any) -> Tensor:
        value: Tensor = plain(self)
        made.append(value.numel())
        return value

    try:
        weights.Weight.whole = counted
        assert depgraph.verify(model, result.model, result.plan, x).status == "equal"
    finally:
        weights.Weight.whole = plain
    assert max(made) < width * width  # biases, and the head


def test_time_is_linear_in_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large matrix is widened by blocks of rows; no block widens all of it."""
    model = nn.Sequential(nn.Linear(512, 4096), nn.ReLU(), nn.Linear(4096, 8)).to(torch.bfloat16).eval()
    x = torch.randn(2, 512, dtype=torch.bfloat16)
    result = depgraph.prune(model, x, verify=False)
    monkeypatch.setattr(sys.modules["depgraph.verify.weights"], "ROOM", 1 << 14)
    run, widened = sys.modules["depgraph.verify.masked.run"], []
    plain = run.Widened._wide

    def counted(self: Any, value: Any) -> Any:
        wide = plain(self, value)
        if wide is not value:
            widened.append(value.numel())
        return wide

    monkeypatch.setattr(run.Widened, "_wide", counted)
    assert depgraph.verify(model, result.model, result.plan, x).status == "equal"
    assert sum(widened) <= 8 * sum(p.numel() for p in model.parameters())  # a few runs


@pytest.mark.parametrize("turn", [0, 1])
def test_rows_of_drawn_values_are_rows_of_the_whole(turn: int) -> None:
    tensors = {"w": torch.zeros(7, 3, 2, 2), "v": torch.zeros(5, 4), "own": torch.randn(6, 2)}
    drawn = DrawnValues(tensors, {"w", "v"}, frozenset({"v"}), turn)
    for name, tensor in tensors.items():
        whole = drawn.whole(name)
        assert whole.shape == tensor.shape
        assert torch.equal(drawn.rows(name, 2, 5), whole[2:5])
        assert torch.equal(drawn.at(name, torch.tensor([4, 0, 4])), whole[[4, 0, 4]])
    assert torch.equal(drawn.whole("own"), tensors["own"])
    assert not torch.equal(drawn.whole("w"), DrawnValues(tensors, {"w"}, frozenset(), 1 - turn).whole("w"))


def test_weights_that_there_is_room_for_are_taken_as_a_whole() -> None:
    def by_rows(size: int, rows: bool = True) -> bool:
        return Recent(room=100).by_rows(cast(Weight, SimpleNamespace(by_rows=lambda: rows, bytes=size)))

    with torch.no_grad():
        assert by_rows(101)
        assert not by_rows(100)
        assert not by_rows(101, rows=False)
    with torch.enable_grad():
        assert not by_rows(101)
