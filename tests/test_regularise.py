"""Sparse training: penalties, gradients and direct steps against loops over units written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph import GroupLasso, GrowingRegularisation, Slimming
from depgraph.base.errors import InputError, PlanError


class Net(nn.Module):
    """A residual stream, a grouped convolution, a norm, and a square matrix whose rows and columns are one group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.mix = nn.Conv2d(6, 6, 1)
        self.grouped = nn.Conv2d(6, 10, 3, groups=2, padding=1)
        self.last = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = x + self.mix(x).relu()
        return self.last(self.grouped(x).relu().mean((2, 3)))


@pytest.fixture
def graph() -> depgraph.DependencyGraph:
    torch.manual_seed(0)
    model = Net().double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    return depgraph.analyze(model, torch.randn(2, 3, 7, 7, dtype=torch.float64))


def naive_norms(graph: depgraph.DependencyGraph) -> list[Tensor]:
    """||w_u|| of every unit of every group, entry by entry."""
    known = dict(graph.model.named_parameters())
    norms = []
    for group in graph.groups:
        for u in range(group.units):
            total = torch.zeros((), dtype=torch.float64)
            for m in (m for m in group.members if m.name in known):
                w = known[m.name] if m.rows is None else known[m.name][m.rows[0] : m.rows[1]]
                for position in m.indices[u].tolist():
                    total = total + w.select(m.dim, position).pow(2).sum()
            norms.append(total.sqrt())
    return norms


def test_group_lasso_of_a_known_coupling() -> None:
    """Row u of the first matrix, its bias and column u of the second: nothing of depgraph in the expected value."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2))
    first, second = model[0], model[2]
    reg = GroupLasso(depgraph.analyze(model, torch.randn(5, 3)), weight=0.3)
    expected = sum(
        math.sqrt(
            first.weight[u].pow(2).sum().item()
            + first.bias[u].item() ** 2
            + second.weight[:, u].pow(2).sum().item()
        )
        for u in range(7)
    )
    assert reg().item() == pytest.approx(0.3 * expected, rel=1e-6)


def test_group_lasso_equals_a_loop_over_units_and_so_does_its_gradient(
    graph: depgraph.DependencyGraph,
) -> None:
    assert any(m.rows is not None for g in graph.groups for m in g.members), (
        "blocks must be among the members"
    )
    reg = GroupLasso(graph, weight=0.7, groups=graph.groups)
    assert torch.allclose(reg.norms(), torch.stack(naive_norms(graph)), atol=1e-12)
    parameters = [p for p in graph.model.parameters() if p.requires_grad]
    got = torch.autograd.grad(reg(), parameters, allow_unused=True)
    expected = torch.autograd.grad(0.7 * torch.stack(naive_norms(graph)).sum(), parameters, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-12)


def test_group_lasso_takes_the_groups_that_pruning_would_cut() -> None:
    """Of heads x width one factor is cut; the other is left alone."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.out = nn.Linear(5, 14), nn.Linear(14, 5)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).unflatten(-1, (2, 7)).transpose(-2, -3)
            return self.out((torch.softmax(q @ q.transpose(-1, -2), -1) @ q).transpose(-2, -3).flatten(-2))

    for granularity, units in (("coarse", 2), ("fine", 7)):
        graph = depgraph.analyze(Attention(), torch.randn(3, 11, 5), granularity=granularity)
        assert sorted(g.units for g in graph.groups) == [2, 7]
        assert GroupLasso(graph, 1.0).norms().shape == (units,)


def test_a_unit_of_zeros_has_a_gradient_of_zero(graph: depgraph.DependencyGraph) -> None:
    with torch.no_grad():
        for p in graph.model.parameters():
            p.zero_()
    GroupLasso(graph, 1.0)().backward()
    grads = [p.grad for p in graph.model.parameters() if p.grad is not None]
    assert grads
    assert all(bool((g == 0).all()) for g in grads)


def test_frozen_parameters_count_and_get_no_gradient(graph: depgraph.DependencyGraph) -> None:
    graph.model.stem.weight.requires_grad_(False)
    reg = GroupLasso(graph, 1.0, graph.groups)
    assert torch.allclose(reg.norms(), torch.stack(naive_norms(graph)))
    reg().backward()
    assert graph.model.stem.weight.grad is None
    assert graph.model.mix.weight.grad is not None


def test_the_proximal_step_solves_its_problem() -> None:
    """argmin over v of |v - w|^2 / 2 + t ||v||, unit by unit; small units become exactly 0."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2)).double()
    with torch.no_grad():
        model[0].weight[4] *= 1e-3
        model[0].bias[4] *= 1e-3
        model[2].weight[:, 4] *= 1e-3

    def unit(u: int) -> Tensor:
        return (
            torch.cat([model[0].weight[u], model[0].bias[u : u + 1], model[2].weight[:, u]]).detach().clone()
        )

    before = [unit(u) for u in range(7)]
    other = model[2].bias.detach().clone()
    GroupLasso(depgraph.analyze(model, torch.randn(5, 3, dtype=torch.float64)), weight=2.0).step(lr=0.1)
    for u, w in enumerate(before):
        v = unit(u)
        expected = w * max(0.0, 1 - 0.2 / float(w.norm()))
        assert torch.allclose(v, expected, atol=1e-14)
        if v.any():  # the condition for the minimum: v - w + t v / |v| = 0
            assert float((v - w + 0.2 * v / v.norm()).norm()) < 1e-12
    assert not unit(4).any()
    assert torch.equal(model[2].bias, other)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_proximal_step_shrinks_an_entry_by_each_of_its_units(
    graph: depgraph.DependencyGraph, layout: torch.memory_format
) -> None:
    graph.model.to(memory_format=layout)
    norms = torch.stack(naive_norms(graph)).detach()
    factor = (1 - 0.05 / norms).clamp_min(0)
    expected = {n: p.detach().clone() for n, p in graph.model.named_parameters()}
    start = 0
    for group in graph.groups:
        for m in (m for m in group.members if m.name in expected):
            w = expected[m.name] if m.rows is None else expected[m.name][m.rows[0] : m.rows[1]]
            for u in range(group.units):
                for position in m.indices[u].tolist():
                    w.select(m.dim, position).mul_(factor[start + u])
        start += group.units
    GroupLasso(graph, 0.5, graph.groups).step(lr=0.1)
    for n, p in graph.model.named_parameters():
        assert torch.allclose(p, expected[n], atol=1e-14), n


class Heads(nn.Module):
    """Rows of one matrix go with a head and with a place in all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.out = nn.Linear(7, 3 * 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.values(x).unflatten(1, (3, 5)).sum(1))


def test_one_index_may_go_with_two_units() -> None:
    torch.manual_seed(5)
    graph = depgraph.analyze(Heads().double(), torch.randn(2, 7, dtype=torch.float64))
    heads, places = sorted(graph.groups, key=lambda g: g.units)
    assert (heads.units, places.units) == (3, 5)
    w, b, o = (graph.tensors[n].detach().clone() for n in ("values.weight", "values.bias", "out.weight"))
    rows = torch.cat([w, b[:, None]], 1).view(3, 5, 8)
    h = (1 - 0.3 / rows.flatten(1).norm(dim=1)).clamp_min(0)
    whole = torch.cat([rows.transpose(0, 1).flatten(1), o.t()], 1)
    p = (1 - 0.3 / whole.norm(dim=1)).clamp_min(0)
    GroupLasso(graph, 3.0, graph.groups).step(lr=0.1)
    wanted = rows * h[:, None, None] * p[None, :, None]
    assert torch.allclose(graph.tensors["values.weight"], wanted[..., :7].reshape(15, 7), atol=1e-12)
    assert torch.allclose(graph.tensors["values.bias"], wanted[..., 7].reshape(15), atol=1e-12)
    assert torch.allclose(graph.tensors["out.weight"], o * p, atol=1e-12)


def test_training_with_the_lasso_makes_the_units_that_go_small() -> None:
    """A target that needs 3 of 13 units: after proximal training most units are exactly 0, and removing them is free."""
    torch.manual_seed(3)
    x = torch.randn(64, 5)
    y = torch.tanh(x @ torch.randn(5, 3)) @ torch.randn(3, 2)
    model = nn.Sequential(nn.Linear(5, 13), nn.Tanh(), nn.Linear(13, 2))
    graph = depgraph.analyze(model, x[:3])
    reg, optimizer = GroupLasso(graph, weight=0.03), torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        reg.step(lr=0.2)
    dead = int((reg.norms() == 0).sum())
    assert 3 <= dead <= 10
    result = depgraph.prune(model, x[:3], pruning_ratio=dead / 13)
    assert result.model[0].out_features == 13 - dead
    assert torch.allclose(result.model(x), model(x), atol=1e-5)


def test_slimming_is_the_l1_norm_of_the_scales_that_can_go(graph: depgraph.DependencyGraph) -> None:
    reg = Slimming(graph, 0.2)
    gamma = graph.model.norm.weight
    assert reg().item() == pytest.approx(0.2 * gamma.abs().sum().item(), rel=1e-12)
    reg().backward()
    assert torch.equal(gamma.grad, 0.2 * gamma.sign())
    assert graph.model.norm.bias.grad is None
    before = gamma.detach().clone()
    reg.step(lr=2.0)
    assert torch.allclose(gamma, before.sign() * (before.abs() - 0.4).clamp_min(0), atol=1e-15)
    assert bool((gamma == 0).any())
    assert bool((gamma != 0).any())


def test_slimming_leaves_channels_alone_that_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 7, 1), nn.BatchNorm2d(7))
    graph = depgraph.analyze(model, torch.randn(2, 3, 5, 5))  # the last norm scales the output
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(5.0) - 2)
    reg = Slimming(graph, 1.0)
    assert reg().item() == 6.0
    reg().backward()
    assert model[3].weight.grad is None
    with pytest.raises(InputError, match="GroupLasso"):
        Slimming(depgraph.analyze(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), torch.randn(2, 3)), 1.0)


def growing() -> tuple[nn.Module, depgraph.Plan]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2)).double()
    return model, depgraph.prune(model, torch.randn(5, 3, dtype=torch.float64), pruning_ratio=0.5).plan


def test_growing_regularisation_follows_its_schedule() -> None:
    model, plan = growing()
    reg = GrowingRegularisation(model, plan, growth=0.25, every=3, start=0.1, limit=0.8)
    seen = []
    for _ in range(12):
        seen.append(reg.strength)
        reg.grow()
    expected = [min(0.1 + 0.25 * (k // 3), 0.8) for k in range(12)]
    assert seen == pytest.approx(expected)
    assert reg.done


def test_growing_regularisation_acts_on_what_goes_alone() -> None:
    model, plan = growing()
    gone = {n: ~plan.mask(n) for n, _ in model.named_parameters()}
    assert 0 < int(gone["0.weight"].sum()) < 21
    reg = GrowingRegularisation(model, plan, start=0.3)
    expected = 0.15 * sum(p[gone[n]].pow(2).sum().item() for n, p in model.named_parameters())
    assert reg().item() == pytest.approx(expected, rel=1e-12)
    reg().backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        if p.grad is None:
            assert not gone[n].any()
        else:
            assert torch.allclose(p.grad, 0.3 * before[n] * gone[n], atol=1e-14)
    reg.step(lr=0.5)
    assert reg.calls == 1
    for n, p in model.named_parameters():
        assert torch.allclose(p, torch.where(gone[n], before[n] * 0.85, before[n]), atol=1e-14), n


def test_units_fade_until_their_removal_changes_nothing() -> None:
    model, plan = growing()
    x = torch.randn(9, 3, dtype=torch.float64)
    reg = GrowingRegularisation(model, plan, growth=0.05, every=1, limit=0.9)
    for _ in range(60):
        reg.step(lr=1.0)
    assert torch.allclose(depgraph.apply(model, plan)(x), model(x), atol=1e-9)


def test_bad_input_is_refused() -> None:
    model, plan = growing()
    graph = depgraph.analyze(model, torch.randn(5, 3, dtype=torch.float64))
    for bad in (-1.0, float("nan"), float("inf"), "much", True):
        with pytest.raises(InputError, match="at least 0"):
            GroupLasso(graph, bad)
    with pytest.raises(InputError, match="units"):
        GroupLasso(graph, 1.0, groups=[])
    with pytest.raises(InputError, match="every"):
        GrowingRegularisation(model, plan, every=0)
    with pytest.raises(PlanError, match="before anything is removed"):
        GrowingRegularisation(depgraph.apply(model, plan), plan)
    with pytest.raises(PlanError, match="removes nothing"):
        GrowingRegularisation(model, depgraph.Plan())
