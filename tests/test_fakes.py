"""Runs without weights: what does not depend on them has its values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from depgraph.tracing.fakes import LARGEST, Fakes
from depgraph.tracing.trace import trace

WORDS = torch.tensor([[3, 1, 0, 2], [4, 1, 2, 0]])


class Padded(nn.Module):
    """Another layer reads the words where all are there; which of them are asked for stands in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.some, self.every = nn.Embedding(5, 6), nn.Linear(6, 8), nn.Linear(6, 8)
        self.head = nn.Linear(8, 2)
        self.register_buffer("asked", torch.tensor([0, 2]))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        mask = words != 0
        x = self.embed(words)
        x = self.every(x) if mask.all() else self.some(x) * mask[..., None]
        if int(self.asked.sum()) != 2:
            raise ValueError("another buffer")
        return self.head(x[:, self.asked].relu())


@pytest.mark.parametrize("words", [WORDS, WORDS.clamp(1)])
def test_forward_decides_by_its_inputs_as_with_weights(words: torch.Tensor) -> None:
    real = trace(Padded(), words)
    model = Padded()
    for name in ("embed", "some", "every", "head"):
        getattr(model, name).to("meta")
    found = trace(model, words, elsewhere=True)
    assert found.fake
    assert found.unreached == real.unreached
    assert [n.target for n in found.graph.nodes] == [n.target for n in real.graph.nodes]


def test_what_a_run_reads_stays_as_it_is() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("runs", torch.tensor(0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.runs += 1
            x += 1
            return self.layer(x) if self.runs == 1 else x

    model, x = Counting(), torch.zeros(2, 4)
    model.layer.to("meta")
    assert "layer.weight" in trace(model, x, elsewhere=True).tensors
    assert model.runs == 0
    assert not x.any()


def test_what_is_written_into_an_input_is_read_behind_it() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.add_(self.layer(x))
            torch.mul(x, self.layer.bias, out=x)
            return self.head(x)

    def seen(model: nn.Module, **how: bool) -> list[Any]:
        nodes = trace(model, torch.zeros(2, 4), **how).graph.nodes
        return [(str(n.target), [i.name for i in n.all_input_nodes]) for n in nodes]

    assert seen(Writing().to("meta"), elsewhere=True) == seen(Writing())


def test_what_is_written_over_has_no_values_any_more() -> None:
    """Nor has what lies on the same memory; who wrote it gets back what it wrote into."""
    mode = Fakes()
    fake = mode.from_tensor(torch.ones(3))
    with mode:
        x = torch.zeros(2, 3)
        row, other = x[0], torch.zeros(3)
        assert not isinstance(x, FakeTensor)
        assert bool((x == 0).all())
        assert x[1].copy_(fake) is not other
        written = row.add_(fake)
        assert written is row
        with pytest.raises(DataDependentOutputException):
            bool(row.any())
        with pytest.raises(DataDependentOutputException):
            bool(x.any())
        assert isinstance(x + 1, FakeTensor)
        assert torch.add(fake, 1, out=other) is other
        assert isinstance(other * 2, FakeTensor)
        assert not isinstance(torch.zeros(3) + 1, FakeTensor)


def test_what_is_large_is_not_made() -> None:
    with Fakes():
        assert isinstance(torch.zeros(LARGEST + 1), FakeTensor)
        assert not isinstance(torch.zeros(4), FakeTensor)
        assert isinstance(torch.zeros(4, device="meta") + 1, FakeTensor)
