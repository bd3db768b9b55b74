"""Einsums of three or more operands: the same axes whether or not torch looks for a path (opt_einsum is installed)."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from checks import prune_and_check
from torch import nn

import depgraph


class Bilinear(nn.Module):
    """o[n] = sum over i, j of a[i] w[o i j] b[j], by a call that a subclass makes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Linear(8, 12), nn.Linear(8, 10), nn.Linear(7, 3)
        self.w = nn.Parameter(torch.randn(7, 12, 10) / 10)

    def product(self, a, b):
        return torch.einsum("ni,oij,nj->no", a, self.w, b)

    def forward(self, x):
        return self.last(torch.tanh(self.product(self.a(x), self.b(x))))


class AsList(Bilinear):
    def product(self, a, b):
        return torch.einsum("ni,oij,nj->no", [a, self.w, b])


class BySublists(Bilinear):
    def product(self, a, b):
        return torch.einsum(a, [0, 1], self.w, [2, 1, 3], b, [0, 3], [0, 2])


class WithPath(Bilinear):
    """What torch.einsum calls inside, with a path of the user's own."""

    def product(self, a, b):
        return torch._VF.einsum("ni,oij,nj->no", (a, self.w, b), path=[0, 1, 0, 1])


class ByAten(Bilinear):
    def product(self, a, b):
        return torch.ops.aten.einsum("ni,oij,nj->no", [a, self.w, b], path=[0, 1, 0, 1])


class FourOperands(Bilinear):
    def product(self, a, b):
        return torch.einsum("ni,oij,nj,n->no", a, self.w, b, a.mean(1))


WAYS = (Bilinear, AsList, BySublists, WithPath, ByAten, FourOperands)


@pytest.fixture
def with_paths(monkeypatch):
    """Torch as it is with opt_einsum installed: it looks at the sizes of the operands, and hands a path on."""
    looked = []

    def contract_path(equation, *operands, optimize):
        for a, b in pairwise(operands):  # it compares sizes, as the package does
            looked.append(any(m > n for m in a.shape for n in b.shape))
        return [(0, 1)] * (len(operands) - 1), None

    backend = torch.backends.opt_einsum.m
    monkeypatch.setattr(torch.backends.opt_einsum, "is_available", lambda: True)
    monkeypatch.setattr(backend, "_opt_einsum", SimpleNamespace(contract_path=contract_path))
    monkeypatch.setattr(backend, "enabled", True)
    monkeypatch.setattr(backend, "strategy", "auto")
    yield
    looked.clear()
    torch.einsum("i,i,i->", *torch.ones(3, 2))
    assert looked, "a trace leaves torch as it was"


def check_all_shrinks(way):
    torch.manual_seed(0)
    model, x = way(), torch.randn(4, 8)
    result = prune_and_check(model, x, pruning_ratio=0.5)
    assert tuple(result.model.w.shape) == (4, 6, 5)
    assert (result.model.a.out_features, result.model.b.out_features) == (6, 5)
    assert depgraph.prune(model, x).report.verification.status == "equal"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_without_a_path(way, monkeypatch):
    monkeypatch.setattr(torch.backends.opt_einsum.m, "enabled", False)
    check_all_shrinks(way)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("with_paths")
def test_where_torch_looks_for_a_path(way):
    check_all_shrinks(way)


@pytest.mark.usefixtures("with_paths")
def test_a_trace_is_the_same_where_torch_looks_for_a_path():
    torch.manual_seed(0)
    model, x = Bilinear(), torch.randn(4, 8)
    found = depgraph.trace(model, x)
    call = next(n for n in found.graph.nodes if "einsum" in str(n.target))
    assert call.kwargs.get("path") is None
    assert not found.comparisons, "sizes that opt_einsum compares were taken for the user's own comparisons"


def test_arguments_that_a_schema_takes_by_name_alone_are_recorded_by_name():
    """So a node can be called again as it stands."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            q, k, v = self.q(x).chunk(3, -1)
            return self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5))

    found = depgraph.trace(Attention(), torch.randn(2, 5, 8))
    call = next(n for n in found.graph.nodes if "scaled_dot" in str(n.target))
    assert call.kwargs == {"scale": 0.5}
    assert len(call.args) == 3
