"""Which factor of a product is cut: heads or the widths in them, against counts and scores made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import check_result, prune_and_check
from torch import Tensor, nn

import depgraph
from depgraph.base.errors import BudgetError, InputError


class Attention(nn.Module):
    """Heads whose queries and keys may be wider than their values; with `tuned`, one scale for the width of all layers."""

    def __init__(
        self, hidden: int, heads: int, width: int, values: int, tuned: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.heads, self.tuned = heads, tuned
        self.q, self.k = nn.Linear(hidden, heads * width), nn.Linear(hidden, heads * width)
        self.v, self.out = nn.Linear(hidden, heads * values), nn.Linear(heads * values, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.tuned is not None:
            q, k = q * self.tuned, k * self.tuned
        y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return x + self.out(y.transpose(1, 2).flatten(2))


class Grid(nn.Module):
    """A product whose factors are in the same weights."""

    def __init__(self, outer: int, inner: int) -> None:
        super().__init__()
        self.outer, self.enter, self.last = outer, nn.Linear(13, outer * inner), nn.Linear(outer * inner, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.enter(x).unflatten(-1, (self.outer, -1)).tanh().flatten(-2))


X = torch.randn(2, 7, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def model_of(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(*layers).double().eval()
    for p in model.parameters():
        nn.init.normal_(p)
    return model


def rows(model: nn.Module) -> list[tuple[int, int, int]]:
    """(heads, rows of the queries, rows of the values) of each attention layer."""
    layers = [m for m in model.modules() if isinstance(m, Attention)]
    return [(m.heads, m.q.out_features, m.v.out_features) for m in layers]


def test_whole_heads_go_those_with_the_least_weight() -> None:
    model = model_of(Attention(13, 5, 11, 7))
    layer = model[0]
    result = prune_and_check(model, X, pruning_ratio=0.4, importance="l1", ignore=["0.out.bias"])
    assert rows(result.model) == [(3, 33, 21)]
    weights: list[Tensor] = [
        layer.q.weight,
        layer.q.bias,
        layer.k.weight,
        layer.k.bias,
        layer.v.weight,
        layer.v.bias,
    ]
    sums = sum(w.detach().abs().reshape(5, -1).sum(1) for w in weights)
    sums = sums + layer.out.weight.detach().abs().reshape(13, 5, 7).sum((0, 2))
    kept = sums.argsort()[2:].sort().values
    wanted = layer.q.weight.detach().reshape(5, 11, 13)[kept].flatten(0, 1)
    assert torch.equal(result.model[0].q.weight, wanted)


def test_fine_takes_widths_and_leaves_heads() -> None:
    result = prune_and_check(model_of(Attention(13, 5, 11, 7)), X, pruning_ratio=0.4, granularity="fine")
    assert rows(result.model) == [(5, 5 * 7, 5 * 5)]
    assert result.plan.request["granularity"] == "fine"


def test_one_width_for_all_projections_is_not_preferred_though_a_weight_consumes_it() -> None:
    """Queries, keys and values from one weight: the width has more units than there are heads, and is in all weights."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.qkv, self.out = 5, nn.Linear(13, 3 * 5 * 11), nn.Linear(55, 13)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            return self.out((torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2))

    for granularity, left in ((None, (3, 33)), ("fine", (5, 35))):
        net = prune_and_check(model_of(Fused()), X, pruning_ratio=0.4, granularity=granularity).model[0]
        assert (net.heads, net.out.in_features) == left


def test_what_no_weight_sums_over_is_not_preferred_however_far_it_reaches() -> None:
    """One width in the queries and keys of three layers is in more weights than any layer's heads."""
    tuned = nn.Parameter(torch.ones(17))
    model = model_of(*(Attention(13, 3, 17, 2, tuned) for _ in range(3)))
    graph = depgraph.analyze(model, X)
    width = max(graph.groups, key=lambda g: len(g.members))
    assert width.units == 17
    reach = {g.units: sum(graph.tensors[m.name].numel() for m in g.members) for g in graph.groups}
    assert reach[17] > reach[3]
    result = prune_and_check(model, X, pruning_ratio=0.5)
    assert rows(result.model) == [(2, 34, 4)] * 3


@pytest.mark.parametrize(("outer", "inner", "left"), [(11, 5, (6, 5)), (5, 11, (5, 6))])
def test_factors_in_the_same_weights_are_told_apart_by_units(
    outer: int, inner: int, left: tuple[int, int]
) -> None:
    net = prune_and_check(model_of(Grid(outer, inner)), X, pruning_ratio=0.5).model[0]
    assert (net.outer, net.enter.out_features // net.outer) == left


def test_locked_heads_leave_the_widths_to_be_cut() -> None:
    lock = lambda graph: [graph.lock(g) for g in graph.groups if g.units == 5]  # noqa: E731
    result = prune_and_check(model_of(Attention(13, 5, 11, 7)), X, pruning_ratio=0.4, constraints=lock)
    assert rows(result.model) == [(5, 5 * 7, 5 * 5)]


def test_one_head_is_no_choice() -> None:
    result = prune_and_check(model_of(Attention(13, 1, 11, 7)), X, pruning_ratio=0.4)
    assert rows(result.model) == [(1, 7, 5)]


def least(model: nn.Module, widths: tuple[int, int, int]) -> int:
    """Parameters of a layer of `model` with such (heads, width of queries, of values)."""
    hidden = model[0].q.in_features
    return depgraph.parameter_count(Attention(hidden, *widths))


def test_budgets_that_heads_can_not_meet_are_met_by_widths() -> None:
    model = model_of(Attention(13, 2, 11, 7))
    held = {"ignore": ["0.out.bias"], "max_params": least(model, (1, 11, 7)) - 1}
    small = prune_and_check(model, X, **held).model
    assert rows(small)[0][0] == 2
    assert 0.88 * held["max_params"] < depgraph.parameter_count(small) <= held["max_params"]
    with pytest.raises(BudgetError, match=f"can't be reached: {held['max_params'] + 1} remain"):
        depgraph.prune(model, X, granularity="coarse", **held)


def test_an_unreachable_budget_names_the_least_of_both_ways() -> None:
    """Widths reach less than heads here, and with five heads of (1, 1) the other way round."""
    for heads, width, reached in [(2, 11, (2, 1, 1)), (11, 2, (1, 2, 2))]:
        model = model_of(Attention(13, heads, width, width))
        with pytest.raises(BudgetError, match=f"can't be reached: {least(model, reached)} remain"):
            depgraph.prune(model, X, max_params=13, ignore=["0.out.bias"])


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("share", [0.81, 0.53, 0.29])
def test_few_heads_land_on_budgets_beside_finer_groups(scope: str, share: float) -> None:
    inner = nn.Sequential(nn.Linear(13, 211), nn.ReLU(), nn.Linear(211, 13))
    model = model_of(Attention(13, 3, 11, 7), inner, Attention(13, 3, 11, 7))
    result = prune_and_check(model, X, max_params=share, scope=scope, importance="l1")
    assert 0.99 * share < depgraph.parameter_count(result.model) / depgraph.parameter_count(model) <= share
    assert all(q == heads * 11 and v == heads * 7 for heads, q, v in rows(result.model))


def test_widths_are_multiples_either_way() -> None:
    model = model_of(Attention(13, 5, 14, 10))
    for granularity, left in (("coarse", (4, 56, 40)), ("fine", (5, 40, 40))):
        small = depgraph.prune(model, X, pruning_ratio=0.5, round_to=4, granularity=granularity).model
        assert rows(small) == [left]


def test_gradual_steps_go_on_with_the_same_factor() -> None:
    model = model_of(Attention(13, 7, 11, 11))
    step = depgraph.prune(model, X, pruning_ratio=0.3)
    again = depgraph.prune(step.model, X, pruning_ratio=0.6, already_pruned=step.plan)
    assert [rows(r.model)[0] for r in (step, again)] == [(5, 55, 55), (3, 33, 33)]


def test_what_does_not_verify_is_found_among_widths_too() -> None:
    """Under a budget that only widths meet, the block to freeze is looked for among widths."""
    model = model_of(
        Attention(13, 2, 11, 7), nn.Sequential(nn.Linear(13, 101), nn.ReLU(), nn.Linear(101, 13))
    )
    graph = depgraph.analyze(model, X, ignore=["0.out.bias"])
    request, scores = depgraph.select.Request(), depgraph.scores_of(graph)
    cost = depgraph.costs.cost.parameter_cost(graph)
    masks = request.masks(
        graph, scores, [depgraph.select.Budget("max_params", cost, least(model, (1, 1, 1)) + 200)]
    )
    blocks = request.blocks(graph, scores, masks)
    assert set(masks) <= {name for b in blocks for name in b.names}


@pytest.mark.parametrize("bad", ["head", 3, ""])
def test_other_words_are_refused(bad: Any) -> None:
    with pytest.raises(InputError, match="granularity must be one of coarse, fine"):
        depgraph.analyze(model_of(Attention(13, 5, 11, 7)), X, granularity=bad)


def test_a_finished_graph_says_for_itself() -> None:
    model = model_of(Attention(13, 5, 11, 7))
    graph = depgraph.analyze(model, X, granularity="fine")
    with pytest.raises(InputError, match="granularity, outputs have no effect on a finished graph"):
        depgraph.prune(model, X, graph=graph, granularity="coarse")
    result = depgraph.prune(model, X, graph=graph, pruning_ratio=0.4)
    check_result(model, result, X)
    assert rows(result.model) == [(5, 35, 25)]
    assert depgraph.training.regularise.GroupLasso(graph, 1.0).norms().numel() == 11 + 7
    assert depgraph.training.regularise.GroupLasso(depgraph.analyze(model, X), 1.0).norms().numel() == 5
