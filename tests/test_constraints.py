"""What users state of a graph: locked places, minima, multiples, equal counts; each against counts made by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checks import check_result, prune_and_check
from torch import Tensor, nn

import depgraph
from depgraph.base.errors import InputError


class Chain(nn.Module):
    """Hidden layers that share nothing."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise([5, *widths, 3]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)

    @property
    def widths(self) -> list[int]:
        return [layer.out_features for layer in self.layers[:-1]]


class Joined(nn.Module):
    """The outputs of two layers side by side, and three columns that are input, into a third."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, left), nn.Linear(3, right)
        self.last = nn.Linear(left + right + 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x), x, self.right(x)], 1))


class Heads(nn.Module):
    """Seven heads of five: the width of a projection is a product."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.enter, self.scale = 7, nn.Linear(3, 35), nn.Parameter(torch.randn(5))
        self.last = nn.Linear(35, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.enter(x).unflatten(1, (self.heads, -1)) * self.scale).flatten(1))


def cut(model: nn.Module, width: int, constraints: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p)
    options = options or {"pruning_ratio": 0.5}
    x = torch.randn(4, width, dtype=torch.float64)
    return prune_and_check(model.double().eval(), x, constraints=constraints, **options).model


def test_a_locked_dim_stays_whole_with_all_that_goes_with_it() -> None:
    model = cut(Chain(11, 13, 17), 5, lambda graph: graph.lock("layers.2.weight:1", "is wired"))
    assert model.widths == [6, 13, 9]
    graph = depgraph.analyze(
        Chain(11, 13), torch.randn(2, 5), constraints=lambda g: g.lock("layers.2.weight:1", "is wired")
    )
    wired = {(f.name, f.dim, f.count) for f in graph.frozen if f.reason.text == "is wired"}
    assert wired == {("layers.1.weight", 0, 13), ("layers.1.bias", 0, 13), ("layers.2.weight", 1, 13)}


@pytest.mark.parametrize(("count", "left"), [(1, 6), (7, 7), (11, 11)])
def test_a_minimum(count: int, left: int) -> None:
    model = cut(Chain(11, 13), 5, lambda graph: graph.at_least("layers.0.weight:0", count))
    assert model.widths == [left, 7]


def test_a_minimum_holds_under_a_budget() -> None:
    constraint = lambda graph: graph.at_least("layers.0.weight:0", 9)  # noqa: E731
    model = cut(Chain(11, 13), 5, constraint, max_params=0.4)
    assert model.widths[0] >= 9
    assert depgraph.parameter_count(model) <= 0.4 * depgraph.parameter_count(Chain(11, 13))
    with pytest.raises(depgraph.BudgetError):
        cut(Chain(11, 13), 5, constraint, max_params=0.2)


@pytest.mark.parametrize(("number", "left"), [(1, 12), (4, 12), (5, 15), (7, 14), (23, 23)])
def test_a_multiple(number: int, left: int) -> None:
    model = cut(Chain(23, 13), 5, lambda graph: graph.multiple_of("layers.0.weight:0", number))
    assert model.widths == [left, 7]


@pytest.mark.parametrize("number", [2, 3, 4, 5])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
def test_a_multiple_under_a_budget(number: int, share: float) -> None:
    model = cut(
        Chain(23, 29), 5, lambda graph: graph.multiple_of("layers.1.weight:0", number), max_params=share
    )
    assert model.widths[1] % number == 0 or model.widths[1] == 29
    assert depgraph.parameter_count(model) <= share * depgraph.parameter_count(Chain(23, 29))


def test_a_multiple_counts_the_whole_dim() -> None:
    """Of 11 + 3 + 10 = 24 columns: whatever goes, goes by fours."""
    model = cut(Joined(11, 10), 3, lambda graph: graph.multiple_of("last.weight:1", 4))
    assert (model.left.out_features, model.right.out_features, model.last.in_features) == (7, 6, 16)


def test_a_multiple_that_parts_would_have_to_agree_on_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"25 indices of last.weight:1 .* independently pruned.* multiple of 4"
    ):
        cut(Joined(11, 11), 3, lambda graph: graph.multiple_of("last.weight:1", 4))


def test_a_multiple_of_a_product_goes_by_whole_factors() -> None:
    """Of 7 heads x 5 one factor is cut: 3 or more heads of 5 that make a multiple of 15."""
    model = cut(Heads(), 3, lambda graph: graph.multiple_of("enter.weight:0", 15))
    assert (model.heads, model.enter.out_features) == (6, 30)


def test_equal_counts_without_equal_positions() -> None:
    def tied(graph: depgraph.DependencyGraph) -> None:
        graph.equal_counts(["layers.0.weight:0", "layers.1.weight:0"], "are one buffer")

    model = cut(Chain(23, 23, 17), 5, tied, max_params=0.5)
    apart = cut(Chain(23, 23, 17), 5, (), max_params=0.5)
    assert model.widths[0] == model.widths[1] < 23
    assert apart.widths[0] != apart.widths[1]  # else this says nothing


def test_equal_to_what_is_locked_is_locked() -> None:
    def stated(graph: depgraph.DependencyGraph) -> None:
        graph.equal_counts(["layers.0.weight:0", "layers.1.weight:0"])
        graph.lock("layers.1.weight:0")

    assert cut(Chain(13, 13, 17), 5, stated).widths == [13, 13, 9]


def test_several_constraints_and_groups_as_places() -> None:
    def fives(graph: depgraph.DependencyGraph) -> None:
        for group in graph.groups:
            graph.multiple_of(group, 5)

    def large(graph: depgraph.DependencyGraph) -> None:
        graph.at_least(max(graph.groups, key=lambda g: g.units), 22)

    assert cut(Chain(11, 31), 5, [fives, large]).widths == [10, 25]


def test_a_finished_graph_keeps_its_constraints_for_every_plan() -> None:
    torch.manual_seed(0)
    model, x = Chain(11, 13).double().eval(), torch.randn(4, 5, dtype=torch.float64)
    graph = depgraph.analyze(model, x, constraints=lambda graph: graph.multiple_of("layers.0.weight:0", 4))
    for ratio, left in ((0.1, 11), (0.3, 8), (0.6, 8), (0.7, 4)):
        result = depgraph.prune(model, x, graph=graph, pruning_ratio=ratio, verify=False)
        check_result(model, result, x)
        assert result.model.widths[0] == left
    masks = depgraph.choose(graph, depgraph.scores_of(graph, "l1"), pruning_ratio=0.3)
    assert sorted(int(m.sum()) for m in masks.values()) == [8, 10]


def test_the_other_calls_hand_them_on() -> None:
    torch.manual_seed(0)
    model, x = Chain(13, 17).eval(), torch.randn(4, 5)
    constraint = lambda graph: graph.multiple_of("layers.0.weight:0", 5)  # noqa: E731
    seen: list[int] = []
    result = depgraph.prune_gradually(
        model, x, steps=3, pruning_ratio=0.5, constraints=constraint,
        train=lambda small, step: seen.append(small.widths[0]), progress=False,
    )  # fmt: skip
    assert result.model.widths == [10, 9]
    assert {*seen} <= {10, 13}
    rows = depgraph.sweep(
        model,
        x,
        [0.5],
        score=lambda m: float(m.widths[0]),
        constraints=constraint,
        latency=False,
        progress=False,
    ).rows
    assert [row.score for row in rows] == [10.0]
    scan = depgraph.sensitivity(
        model, x, lambda m: float(m.widths[0]), [0.5], constraints=constraint, progress=False
    )
    assert np.array_equal(np.sort(scan.scores[:, 0]), [10.0, 13.0])


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (lambda g: g.lock("nothing:0"), "'nothing:0' is neither a dim"),
        (lambda g: g.lock("layers.0.weight"), "fix: give a group, its name, or a parameter"),
        (lambda g: g.lock("layers.0.weight:2"), "is neither a dim"),
        (lambda g: g.lock("layers.0.weight:0[0:5]"), "is neither a dim that a traced run used nor a group"),
        (lambda g: g.lock(None), "None is neither a dim"),
        (lambda g: g.lock("layers.0.weight:0", None), "must be a text, not None"),
        (lambda g: g.at_least("layers.0.weight:0", None), "not None"),
        (lambda g: g.equal_counts("layers.0.weight:0"), "a list of at least two places"),
        (lambda g: g.equal_counts(None), "a list of at least two places, not None"),
        (lambda g: g.equal_counts([5, None]), "5 is neither a dim"),
        (
            lambda g: g.at_least("layers.0.weight:0", 12),
            "at_least of 'layers.0.weight:0' must be a whole number from 1 to 11, not 12",
        ),
        (lambda g: g.at_least("layers.0.weight:0", 0.5), "not 0.5"),
        (
            lambda g: g.multiple_of("layers.0.weight:0", 0),
            "multiple_of 'layers.0.weight:0' must be a whole number",
        ),
        (lambda g: g.multiple_of("layers.0.weight:0", True), "not True"),
        (
            lambda g: g.equal_counts(["layers.0.weight:0", "layers.1.weight:0"]),
            "layers.0.weight:0 11, layers",
        ),
        ("lock", "constraints must be a function"),
    ],
)
def test_bad_input(state: Callable[[depgraph.DependencyGraph], None], text: str) -> None:
    with pytest.raises(InputError) as caught:
        depgraph.prune(Chain(11, 13), torch.randn(2, 5), constraints=[state])
    assert text in str(caught.value)


def test_constraints_come_too_late_for_a_finished_graph() -> None:
    model, x = Chain(11), torch.randn(2, 5)
    graph = depgraph.analyze(model, x)
    with pytest.raises(InputError, match="give them to analyze"):
        depgraph.prune(model, x, graph=graph, constraints=lambda g: g.lock("layers.0.weight:0"))


class Divisible(nn.Module):
    """A width that code demands to be a multiple of a number, by one way or another."""

    def __init__(self, demand) -> None:
        super().__init__()
        self.heads, self.demand = 4, demand
        self.a, self.b = nn.Linear(6, 24), nn.Linear(24, 5)

    def forward(self, x):
        h = self.a(x)
        self.demand(self, h.shape[-1])
        return self.b(h)


def asserted(net, width):
    assert width % net.heads == 0


def torch_asserted(net, width):
    torch._assert(width % 3 == 0, "no multiple of three")


def divided(net, width):
    count, rest = divmod(width, 4)
    if rest:
        raise ValueError(count)


def raised(net, width):
    if width % 4 != 0:
        raise ValueError(width)


@pytest.mark.parametrize("demand", [asserted, torch_asserted, divided, raised])
@pytest.mark.parametrize("ratio", [0.4, 0.5, 0.7])
@pytest.mark.parametrize("verify", [True, False])
def test_a_remainder_of_zero_is_a_multiple_and_no_lock(demand, ratio: float, verify: bool):
    model, x = Divisible(demand).eval(), torch.randn(3, 6)
    result = depgraph.prune(model, x, pruning_ratio=ratio, verify=verify)
    assert result.model.a.out_features < 24
    result.model(x)
    check_result(model, result, x)


try:
    from einops import rearrange
except ImportError:
    rearrange = None


class Rearranged(nn.Module):
    """Heads by the notation of einops, which divides and checks by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.a, self.b = 4, nn.Linear(6, 24), nn.Linear(24, 5)

    def forward(self, x):
        h = rearrange(self.a(x), "b n (h d) -> b h n d", h=self.heads)
        return self.b(rearrange(h.relu(), "b h n d -> b n (h d)"))


def hold_the_largest(graph):
    graph.lock(max(graph.groups, key=lambda g: g.units))


@pytest.mark.skipif(rearrange is None, reason="einops is not installed")
def test_einops_can_lose_heads_each_time():
    """Its functions remember their results: a second run, and one of the user before, change nothing."""
    model, x = Rearranged().eval(), torch.randn(3, 4, 6)
    model(x)
    for _ in range(2):
        assert sorted(g.units for g in depgraph.analyze(model, x).groups) == [4, 6]

        result = depgraph.prune(model, x, constraints=hold_the_largest)
        assert (result.model.heads, result.model.a.out_features) == (2, 12)
        check_result(model, result, x)


class OfAnother(nn.Module):
    """Zeros as wide as another layer says it is."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 12, 1), nn.Conv2d(24, 5, 1)

    def forward(self, x):
        zeros = torch.zeros(x.shape[0], self.f.out_channels, *x.shape[2:], dtype=x.dtype)
        return self.c(torch.cat([self.f(x), self.g(x) + zeros], 1))


@pytest.mark.parametrize(
    "options", [{}, {"pruning_ratio": {"f": 0.5}}, {"max_params": 0.6}, {"scope": "global"}]
)
@pytest.mark.parametrize("verify", [True, False])
def test_a_size_of_another_layer_ties_both(options, verify: bool):
    model, x = OfAnother().eval(), torch.randn(2, 3, 4, 4)
    result = depgraph.prune(model, x, verify=verify, **options)
    assert result.model.f.out_channels == result.model.g.out_channels < 12
    check_result(model, result, x)


def test_ignoring_one_layer_holds_the_other():
    with pytest.raises(depgraph.NothingToPruneError):
        depgraph.prune(OfAnother().eval(), torch.randn(2, 3, 4, 4), ignore=["f"])


class Coincidence(nn.Module):
    """Numbers that happen to be a power of the width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.b(torch.exp(0.5 * self.a(x)) * 4 * 0.0625 / 16 * 0.25)


def test_a_number_that_looks_like_a_size_is_none():
    model, x = Coincidence().eval(), torch.randn(3, 6)
    result = depgraph.prune(model, x)
    assert result.model.a.out_features == 8
    check_result(model, result, x)


# ------------------------------------------------------------------------------------------- why heads can't go alone


class Attends(nn.Module):
    """nn.MultiheadAttention, whose embedding is an input and an output, beside a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.rise, self.fall = nn.Linear(32, 24), nn.Linear(24, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.fall(self.rise(x).relu())


def test_a_reason_says_which_sizes_must_go_on_being_equal() -> None:
    """Heads times their width are the embedding; where that stays, only the feed-forward shrinks, and the reason says so."""
    result = depgraph.prune(Attends().eval(), torch.randn(2, 7, 32), pruning_ratio=0.5)
    assert result.model.rise.weight.shape == (12, 32)
    assert result.model.attention.in_proj_weight.shape == (96, 32)
    heads = [
        f.reason.text for f in result.report.frozen if f.name == "attention.out_proj.weight" and f.count == 4
    ]
    assert heads == ["is computed from other sizes: 32 = 8 x num_heads"]
    assert result.report.locks[0][0].text == heads[0]  # and not only that the embedding is an input
