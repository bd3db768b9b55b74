"""Functions of TorchScript, and sizes that are put into tables of integers and read back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import prune_and_check
from torch import Tensor, nn
from versions import on_new_torch

import depgraph


@torch.jit.script
def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@torch.jit.script
def gated(x: Tensor, y: Tensor, n: int) -> Tensor:
    z = x + y
    return torch.tanh(z[:, :n]) * swish(z[:, n:])


@torch.jit.script
def gated_by_table(x: Tensor, table: Tensor) -> Tensor:
    n = table[0]
    return torch.tanh(x[:, :n]) * torch.sigmoid(x[:, n:])


@torch.jit.script
def halved(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return a * torch.nn.functional.gelu(b)


@torch.jit.script
def with_a_number(x: Tensor) -> Tensor:
    return x[:, :8] * x[:, 8:]


class Net(nn.Module):
    """A wide layer, whatever a test makes of it, and a last one."""

    def __init__(self, width: int = 16, last: int = 16) -> None:
        super().__init__()
        self.width = last
        self.first, self.last = nn.Linear(10, width), nn.Linear(last, 5)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


class Gate(Net):
    def middle(self, x: Tensor) -> Tensor:
        return gated(x, x.flip(0), x.shape[1] // 2)


class Half(Net):
    def middle(self, x: Tensor) -> Tensor:
        return halved(swish(x))


class Table(Net):
    def middle(self, x: Tensor) -> Tensor:
        return gated_by_table(x.view(-1, 2 * self.width), torch.IntTensor([self.width]))


class EagerTable(Net):
    def middle(self, x: Tensor) -> Tensor:
        n = torch.IntTensor([self.width])[0]
        x = x.view(-1, 2 * self.width)
        return torch.tanh(x[:, :n]) * torch.sigmoid(x[:, n:])


@on_new_torch
@pytest.mark.parametrize("kind", [Gate, Half, Table, EagerTable])
def test_a_scripted_function_is_followed_through_its_source(kind: type[Net]) -> None:
    torch.manual_seed(0)
    result = prune_and_check(kind(32, 16).eval(), torch.randn(3, 10), pruning_ratio=0.5)
    assert result.model.first.weight.shape == (16, 10)
    assert result.model.last.weight.shape == (5, 8)
    assert result.report.notes == []


@on_new_torch
def test_a_number_in_a_scripted_function_stays() -> None:
    class Numbered(Net):
        def middle(self, x: Tensor) -> Tensor:
            return with_a_number(x)

    with pytest.raises(depgraph.NothingToPruneError, match="repeated by the number 8"):
        depgraph.prune(Numbered(16, 8).eval(), torch.randn(3, 10), verify=False)


def test_a_traced_function_is_not_followed() -> None:
    halves = torch.jit.trace(lambda x: torch.cat([x[:, 8:], x[:, :8]], 1), torch.randn(3, 16))

    class Traced(Net):
        def middle(self, x: Tensor) -> Tensor:
            return halves(x)

    with pytest.raises(depgraph.NothingToPruneError, match="TorchScript without a source"):
        depgraph.prune(Traced().eval(), torch.randn(3, 10), verify=False)


@pytest.mark.parametrize("read", [lambda t: t.float(), lambda t: t.item(), lambda t: t.sum()])
def test_a_size_in_a_table_that_is_computed_with_stays(read: Any) -> None:
    class Scaled(Net):
        def middle(self, x: Tensor) -> Tensor:
            return x.view(-1, self.width) * read(torch.IntTensor([self.width]))

    with pytest.raises(depgraph.NothingToPruneError):
        depgraph.prune(Scaled().eval(), torch.randn(3, 10), verify=False)
