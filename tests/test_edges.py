"""Models at the edge of what runs: tensors without entries, and modules nested as deep as Python lets them run."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from checks import prune_and_check
from torch import Tensor, nn

import depgraph


class EmptyRows(nn.Module):
    """A parameter [0, 16] beside activations [n, 16]: learned tokens of which there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(0, 16))
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(torch.cat([self.up(x), self.tokens])))


class NoRank(nn.Module):
    """A branch over a dim of size 0: an adapter of rank 0."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 0), nn.Linear(0, 16)
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x) + self.b(self.a(x))))


class EmptyLast(nn.Module):
    """A parameter [16, 0] in a sum with others over its empty dim, and a buffer without entries."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.empty(16, 0))
        self.register_buffer("nothing", torch.empty(0))
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        extra = self.extra.expand(x.shape[0], -1, -1)
        return self.down(torch.relu(torch.cat([self.up(x).unsqueeze(-1), extra], -1).sum(-1)))


class EmptySum(nn.Module):
    """A sum of nothing is added: a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.empty(16, 0, 3))
        self.register_buffer("nothing", torch.empty(0))
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x) + self.extra.sum((1, 2)) + self.nothing.sum()))


EMPTY = (EmptyRows, NoRank, EmptyLast)  # not EmptySum: the oracle takes a 0 for an entry that is gone


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("kind", [*EMPTY, EmptySum])
@pytest.mark.parametrize("importance", depgraph.CRITERIA)
def test_a_parameter_without_entries(kind, importance):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(5, 4)
    targets = torch.zeros(len(model(x)), 2)
    data = {"calibration": [(x, targets)], "loss": nn.functional.mse_loss}
    if importance == "bn_scale":
        with pytest.raises(depgraph.InputError):
            depgraph.prune(model, x, importance=importance)
        return
    result = depgraph.prune(model, x, importance=importance, **data)
    assert result.model.up.out_features == 8
    assert result.report.verification.status == "equal"


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("kind", EMPTY)
def test_a_parameter_without_entries_under_the_oracle(kind, tmp_path):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(5, 4)
    for how in ({"pruning_ratio": 0.5}, {"max_params": 0.5}, {"max_macs": 0.5, "scope": "isomorphic"}):
        result = prune_and_check(model, x, **how)
        assert result.model.up.out_features < 16
        str(result.report)
    depgraph.save(result, tmp_path / "saved")
    again = depgraph.load(kind, tmp_path / "saved")
    assert torch.equal(again(x), result.model(x))


class Nest(nn.Module):
    def __init__(self, inner: nn.Module, last: nn.Module | None) -> None:
        super().__init__()
        self.inner, self.last = inner, last

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x if self.last is None else torch.relu(self.last(x))


def nest(depth: int) -> nn.Module:
    inner: nn.Module = nn.Linear(4, 8)
    for i in range(depth):
        inner = Nest(inner, nn.Linear(8, 8) if i % 60 == 0 else None)
    return nn.Sequential(inner, nn.Linear(8, 2))


def deepest() -> int:
    """How many modules in modules run by themselves from a frame like this one."""
    depth = 100
    while True:
        try:
            nest(depth + 10)(torch.randn(2, 4))
        except RecursionError:
            return depth
        depth += 10


@pytest.mark.slow
def test_modules_nested_as_deep_as_they_run(tmp_path):
    torch.manual_seed(0)
    depth, limit = deepest() - 20, sys.getrecursionlimit()  # a few frames stand above our call of the model
    assert depth >= 200
    model, x = nest(depth), torch.randn(6, 4)
    result = depgraph.prune(model, x, recover="auto", calibration=[x], latency=True)
    assert result.report.verification.status == "equal"
    assert depgraph.parameter_count(result.model) < depgraph.parameter_count(model)
    depgraph.prune(
        model, x, importance="taylor", calibration=[(x, torch.zeros(6, 2))], loss=nn.functional.mse_loss
    )
    depgraph.save(result, tmp_path / "saved")
    again = depgraph.load(lambda: nest(depth), tmp_path / "saved")
    assert torch.equal(again(x), result.model(x))
    assert sys.getrecursionlimit() == limit


def test_the_stack_is_as_deep_as_before_once_all_threads_are_done():
    limit, wrong = sys.getrecursionlimit(), []

    def work() -> None:
        try:
            for _ in range(3):
                depgraph.trace(nest(20), torch.randn(2, 4))
        except Exception as error:  # noqa: BLE001  a thread of its own: told to the test
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert sys.getrecursionlimit() == limit


class Chain(nn.Module):
    """Long without being nested: what follows the graph must not call itself for each step."""

    def __init__(self, how: str, length: int) -> None:
        super().__init__()
        self.how, self.length = how, length
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        for _ in range(self.length):
            x = {
                "view": lambda x: x.view(x.shape),
                "relu": torch.relu,
                "add": lambda x: x + 1,
                "write": lambda x: x.view(-1, 8).mul_(1.0),
            }[self.how](x)
        return self.down(x)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "length"), [("view", 700), ("relu", 700), ("add", 700), ("write", 60)])
def test_long_chains(how, length):
    torch.manual_seed(0)
    result = depgraph.prune(Chain(how, length), torch.randn(3, 4), verify=False)
    assert result.model.up.out_features == 4
