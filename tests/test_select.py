"""Which units go: scopes, caps and floors, normalisation, budgets alone and together, memory, latency, bad input."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import assert_equal_to_masked
from torch import Tensor, nn
from zoo import ZOO

import depgraph
from depgraph.base.errors import BudgetError, InputError
from depgraph.costs.cost import byte_cost, byte_count, count_macs, mac_cost, parameter_cost, parameter_count
from depgraph.costs.latency import LatencyTable
from depgraph.costs.memory import measure_memory, memory_cost
from depgraph.costs.size_table import SizeTable
from depgraph.grouping.build import build_plan
from depgraph.select import BUDGETS, Budget, Scope, choose
from depgraph.select.normalise import normalised


class Chain(nn.Module):
    """Three hidden layers of primes: three groups that share nothing."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        sizes = [5, *(widths or (11, 13, 17)), 3]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def chain(*widths: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Chain(*widths).eval(), torch.randn(2, 5)


def graph_of(*widths: int) -> depgraph.DependencyGraph:
    return depgraph.analyze(*chain(*widths))


def by_layer(graph: depgraph.DependencyGraph, *scores: list[float]) -> dict[str, np.ndarray]:
    """Scores of the groups in the order of the layers that produce them."""
    groups = sorted(graph.groups, key=lambda g: g.name)
    return {g.name: np.array(s, dtype=float) for g, s in zip(groups, scores, strict=True)}


def gone(graph: depgraph.DependencyGraph, masks: dict) -> list[int]:
    """How many units each group loses, in the order of the layers."""
    groups = sorted(graph.groups, key=lambda g: g.name)
    return [int((~masks[g.name]).sum()) if g.name in masks else 0 for g in groups]


def ramp(n: int, factor: float = 1.0, offset: float = 0.0) -> list[float]:
    return [offset + factor * (i + 1) for i in range(n)]


# ------------------------------------------------------------------------------------------------------ scopes


def test_local_takes_the_same_share_of_each() -> None:
    graph = graph_of()
    scores = by_layer(graph, ramp(11, 100), ramp(13), ramp(17, 0.01))
    for scope in (None, "local"):
        assert gone(graph, choose(graph, scores, pruning_ratio=0.4, scope=scope)) == [4, 5, 6]


def test_global_takes_the_lowest_of_all() -> None:
    """Of 41 units 16 go: those with the lowest scores, wherever they are."""
    graph = graph_of()
    scores = by_layer(graph, ramp(11, 1, 0.5), ramp(13, 2, 0.25), ramp(17, 3))
    flat = sorted((s, g) for g, found in enumerate(scores.values()) for s in found)
    wanted = Counter(g for _, g in flat[:16])
    masks = choose(graph, scores, pruning_ratio=0.4, scope="global", normalise="none")
    assert gone(graph, masks) == [wanted[0], wanted[1], wanted[2]]


def test_global_leaves_a_tenth_unless_asked() -> None:
    graph = graph_of()
    scores = by_layer(graph, ramp(11, 1e-3), ramp(13), ramp(17))
    free = choose(graph, scores, pruning_ratio=0.3, scope="global", normalise="none", max_ratio=1.0)
    held = choose(graph, scores, pruning_ratio=0.3, scope="global", normalise="none")
    third = choose(graph, scores, pruning_ratio=0.3, scope="global", normalise="none", max_ratio=0.3)
    assert [gone(graph, m)[0] for m in (free, held, third)] == [10, 9, 3]
    assert sum(gone(graph, free)) == sum(gone(graph, held)) == 12
    assert max(g / n for g, n in zip(gone(graph, third), (11, 13, 17), strict=True)) <= 0.3


class Twins(nn.Module):
    """Two residual-free branches of linear layers and two of convolutions: two structures."""

    def __init__(self) -> None:
        super().__init__()
        self.a1, self.a2 = nn.Conv2d(3, 11, 3), nn.Conv2d(11, 13, 3)
        self.b1, self.b2, self.b3 = nn.Linear(13, 17), nn.Linear(17, 19), nn.Linear(19, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a2(self.a1(x).relu()).relu().mean((2, 3))
        return self.b3(self.b2(self.b1(x).relu()).relu())


def test_isomorphic_lets_like_compete_with_like() -> None:
    """conv-conv, conv-linear and linear-linear groups: the two linear ones share what they lose, the others don't."""
    model, x = Twins().eval(), torch.randn(2, 3, 9, 7)
    graph = depgraph.analyze(model, x)
    groups = sorted(graph.groups, key=lambda g: g.name)
    assert [g.units for g in groups] == [11, 13, 17, 19]
    scores = {g.name: np.array(ramp(g.units, 10.0**i)) for i, g in enumerate(groups)}
    lost = gone(graph, choose(graph, scores, pruning_ratio=0.4, scope="isomorphic", normalise="none"))
    assert lost[:2] == [4, 5]
    flat = sorted((s, i) for i in (2, 3) for s in scores[groups[i].name])
    wanted = Counter(i for _, i in flat[: int(0.4 * 36)])
    assert lost[2:] == [wanted[2], wanted[3]]
    assert wanted[2] > 0.4 * 17


def test_ratios_by_name() -> None:
    """The last name that fits counts; what is not named stays."""
    graph = graph_of()
    scores = by_layer(graph, ramp(11), ramp(13), ramp(17))
    ratios = {"layers.*": 0.5, "layers.1.weight": 0.2}
    assert gone(graph, choose(graph, scores, pruning_ratio=ratios)) == [5, 2, 8]
    assert gone(graph, choose(graph, scores, pruning_ratio={"layers.1": 0.2})) == [0, 2, 0]


def test_scopes_of_the_users_own() -> None:
    """Two layers compete under one ratio, the third has floor and cap."""
    graph = graph_of()
    scores = by_layer(graph, ramp(11), ramp(13, 100), ramp(17))
    scopes = [Scope(["layers.0", "layers.1"], ratio=0.25, at_least=7), Scope("layers.2", at_most_ratio=0.3)]
    assert gone(graph, choose(graph, scores, scope=scopes, normalise="none")) == [4, 2, 0]
    assert gone(graph, choose(graph, scores, scope=scopes, pruning_ratio=0.5, normalise="none")) == [4, 2, 5]
    floor = [Scope("layers.*", at_least=0.8)]
    assert gone(graph, choose(graph, scores, scope=floor)) == [2, 2, 3]
    hundred = graph_of(100)
    scores = by_layer(hundred, ramp(100))
    masks = choose(hundred, scores, scope=[Scope("layers.0", at_least=0.07)], max_params=9 * 7 + 3)
    assert gone(hundred, masks) == [93]  # 0.07 * 100 is a little above 7


def test_a_fixed_part_and_a_budget_for_the_rest() -> None:
    graph = graph_of()
    scores = by_layer(graph, ramp(11), ramp(13), ramp(17))
    whole = parameter_count(graph.model)
    for asked in ({"pruning_ratio": {"layers.0": 0.2}}, {"scope": [Scope("layers.0", ratio=0.2)]}):
        masks = choose(graph, scores, max_params=whole // 2, **asked)
        assert gone(graph, masks)[0] == 2
        assert parameter_count(depgraph.apply(graph.model, build_plan(graph, masks))) <= whole // 2


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
def test_every_scope_meets_budgets(scope: str) -> None:
    model, x = chain(31, 37, 41)
    result = depgraph.prune(model, x, max_params=0.5, scope=scope)
    assert 0.48 * parameter_count(model) <= parameter_count(result.model) <= 0.5 * parameter_count(model)
    if scope == "local":
        left = [m.out_features / n for m, n in zip(result.model.layers, (31, 37, 41), strict=False)]
        assert max(left) - min(left) <= 0.05


# ----------------------------------------------------------------------------------------------- normalisation


def test_normalisations() -> None:
    rng = np.random.default_rng(0)
    one, other, third = (rng.normal(size=n) for n in (7, 5, 3))
    both = np.concatenate([one, other])
    scales = {"none": 1, "mean": np.abs(both).mean(), "sum": np.abs(both).sum(), "max": np.abs(both).max()}
    for how, scale in scales.items():
        found = normalised({0: one, 1: other, 2: third}, [[0, 1], [2]], how)
        assert np.allclose(found[0], one / scale)
        assert np.allclose(found[1], other / scale)
    found = normalised({0: one, 1: other, 2: third}, [[0, 1], [2]], "standard")
    joined = np.concatenate([found[0], found[1]])
    assert abs(joined.mean()) < 1e-12
    assert abs(joined.std() - 1) < 1e-12
    assert np.allclose(found[2], (third - third.mean()) / third.std())


# ----------------------------------------------------------------------------------------------------- budgets


def sizes_after(widths: tuple[int, ...]) -> tuple[int, int]:
    """(parameters, MACs of 2 rows) of a chain, by hand."""
    ends = (5, *widths, 3)
    work = sum(a * b for a, b in itertools.pairwise(ends))
    return work + sum(ends[1:]), 2 * work


def loss_of(scores: list[list[float]], lost: tuple[int, ...]) -> float:
    return sum(sum(sorted(s)[:n]) for s, n in zip(scores, lost, strict=True))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shares", [(0.5, 1.0), (1.0, 0.4), (0.55, 0.5), (0.35, 0.3)])
def test_joint_budgets_against_all_plans(seed: int, shares: tuple[float, float]) -> None:
    """Both budgets hold, no unit could come back, and by price the loss is near the least of all plans."""
    widths = (5, 7, 6)
    graph = graph_of(*widths)
    rng = np.random.default_rng(seed)
    drawn = [list(rng.exponential(size=n) + 0.05) for n in widths]
    limits = [int(share * whole) for share, whole in zip(shares, sizes_after(widths), strict=True)]
    best = min(
        loss_of(drawn, lost)
        for lost in itertools.product(*(range(n) for n in widths))
        if all(c <= m for c, m in zip(sizes_after(tuple(np.subtract(widths, lost))), limits, strict=True))
    )
    for per_cost in (False, True):
        masks = choose(
            graph, by_layer(graph, *drawn), max_params=limits[0], max_macs=limits[1], normalise="none",
            max_ratio=1.0, per_cost=per_cost,
        )  # fmt: skip
        lost = tuple(gone(graph, masks))
        left = tuple(int(n) for n in np.subtract(widths, lost))
        assert all(c <= m for c, m in zip(sizes_after(left), limits, strict=True))
        for i in range(3):
            more = tuple(n + (i == j) for j, n in enumerate(left))
            assert lost[i] == 0 or any(c > m for c, m in zip(sizes_after(more), limits, strict=True))
        assert loss_of(drawn, lost) <= (1.35 if per_cost else 2.0) * best


def test_prices_lose_less_than_scores_alone() -> None:
    """Over many draws, score per saved cost gives a smaller loss of additive scores than scores do."""
    widths, ratios = (12, 40, 8), []
    graph = graph_of(*widths)
    whole = sizes_after(widths)[0]
    for seed in range(12):
        rng = np.random.default_rng(seed)
        drawn = [list(rng.exponential(size=n)) for n in widths]
        both = []
        for per_cost in (False, True):
            masks = choose(
                graph, by_layer(graph, *drawn), max_params=whole // 2, normalise="none", per_cost=per_cost
            )
            both.append(loss_of(drawn, tuple(gone(graph, masks))))
        ratios.append(both[1] / both[0])
    assert np.mean(ratios) < 0.95
    assert max(ratios) < 1.05


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ZOO)[::9])
def test_budgets_on_the_zoo(name: str) -> None:
    """Every budget holds on the result itself, and no step of a block could be undone."""
    entry = ZOO[name]
    model, inputs = entry.model(), entry.example()
    for argument, measure in (
        ("max_params", parameter_count),
        ("max_bytes", byte_count),
        ("max_macs", lambda m: count_macs(m, inputs)),
        ("max_memory", lambda m: measure_memory(m, inputs)),
    ):
        try:
            result = depgraph.prune(model, inputs, verify=False, **{argument: 0.7})
        except BudgetError:  # too much of it is locked
            continue
        assert measure(result.model) <= 0.7 * measure(model), argument


@pytest.mark.parametrize("argument", ["max_params", "max_macs", "max_memory", "max_bytes"])
def test_within_a_hundredth_where_units_allow(argument: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 211, 3), nn.BatchNorm2d(211), nn.ReLU(), nn.Conv2d(211, 199, 3), nn.ReLU(),
        nn.Conv2d(199, 223, 3), nn.Flatten(), nn.Linear(223 * 9, 4),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 9, 9)
    measures = {"max_params": parameter_count, "max_bytes": byte_count, "max_macs": lambda m: count_macs(m, x),
                "max_memory": lambda m: measure_memory(m, x)}  # fmt: skip
    measure = measures[argument]
    for share in (0.35, 0.6):
        small = depgraph.prune(model, x, verify=False, **{argument: share}).model
        assert 0.99 * share <= measure(small) / measure(model) <= share


def test_an_unreachable_budget_names_the_least_and_what_was_asked_for() -> None:
    model, x = chain()
    with pytest.raises(BudgetError, match=r"(?s)max_params.*remain.*layers\.1.*at least 12 of 13"):
        depgraph.prune(model, x, max_params=0.05, scope=[Scope("layers.1", at_least=12)])
    with pytest.raises(BudgetError, match="max_macs"):
        depgraph.prune(model, x, max_macs=0.3, max_params=0.9, max_ratio=0.2)


def test_a_cap_that_was_not_asked_for_gives_way_to_a_budget() -> None:
    model, x = chain()
    tight = sizes_after((1, 1, 1))[0]
    assert parameter_count(depgraph.prune(model, x, max_params=tight).model) == tight


def test_a_budget_of_ones_own() -> None:
    """A cost is any object with a value and slopes: here the number of units left in the first two layers."""
    graph = graph_of()
    table = SizeTable(graph)
    for name in ("layers.0.bias", "layers.1.bias"):
        table.add(graph.dims(name))
    cost = depgraph.costs.cost.Total(table)
    scores = by_layer(graph, ramp(11), ramp(13), ramp(17))
    masks = choose(graph, scores, budgets=[Budget("width", cost, 10)])
    lost = gone(graph, masks)
    assert 24 - lost[0] - lost[1] == 10


# ------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize("name", sorted(ZOO)[::7])
def test_costs_are_those_of_the_smaller_model(name: str) -> None:
    """Parameters and bytes at the counts of a plan are those of what it makes; slopes are differences."""
    entry = ZOO[name]
    model, inputs = entry.model(), entry.example()
    graph = depgraph.analyze(model, inputs)
    scores = {g.name: np.random.default_rng(0).random(g.units) for g in graph.groups}
    masks = choose(graph, scores, pruning_ratio=0.5)
    counts = np.array([int(masks[g.name].sum()) if g.name in masks else g.units for g in graph.groups])
    small = depgraph.apply(model, build_plan(graph, masks))
    assert parameter_cost(graph).value(counts) == parameter_count(small)
    assert byte_cost(graph).value(counts) == byte_count(small)
    for cost in (parameter_cost(graph), mac_cost(graph)):
        slopes = cost.slopes(counts)
        for i in range(len(counts)):
            step = np.eye(len(counts), dtype=np.int64)[i]
            linear = (cost.value(counts + step) - cost.value(counts - step)) / 2
            square = cost.value(counts + step) + cost.value(counts - step) - 2 * cost.value(counts)
            assert slopes[i] == linear or square  # exact where the cost is linear in this count


def test_peak_memory_by_hand() -> None:
    """Before the sum there are the input's product, kept for it, and two more at once; views and in-place ops are free."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(5, 11), nn.Linear(11, 13), nn.Linear(13, 11)

        def forward(self, x: Tensor) -> Tensor:
            kept = self.one(x).relu_()
            return (kept.view(7, 11) + self.three(self.two(kept).sigmoid())).sum(1)

    model, x = Net().eval(), torch.randn(7, 5)
    graph = depgraph.analyze(model, x)
    full = np.array([g.units for g in graph.groups])
    by_hand = 4 * 7 * (11 + 13 + 13)  # what is kept, the middle, its sigmoid
    assert memory_cost(graph).value(full) == measure_memory(model, x) == by_hand
    result = depgraph.prune(model, x, max_memory=0.6)
    assert measure_memory(result.model, x) <= 0.6 * by_hand


def test_views_take_no_memory_where_it_is_most() -> None:
    """At the peak there are the first product and the last: views of views are the same memory."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).view(7, 4, 3).transpose(0, 1).transpose(0, 1).flatten(1))

    model, x = Net().eval(), torch.randn(7, 5)
    graph = depgraph.analyze(model, x)
    full = np.array([g.units for g in graph.groups])
    assert memory_cost(graph).value(full) == measure_memory(model, x) == 4 * 7 * (12 + 3)


@pytest.mark.parametrize(
    "name", ["TorchMultihead", "RollChannels", "ThreeDimensional", "WeightNorm", "LiteralView"]
)
def test_the_model_of_memory_is_what_is_measured(name: str) -> None:
    """Exactly, where no name in forward holds a tensor after its last use."""
    entry = ZOO[name]
    model, inputs = entry.model(), entry.example()
    graph = depgraph.analyze(model, inputs)
    full = np.array([g.units for g in graph.groups])
    assert memory_cost(graph).value(full) == measure_memory(model, inputs)


def test_latency_interpolates_between_measured_widths() -> None:
    graph = graph_of()
    full = np.array([g.units for g in graph.groups])
    table = LatencyTable(graph)
    table.add(full, {"layers.0": 4.0, "layers.1": 6.0})
    table.add(full // 2, {"layers.0": 2.0, "layers.1": 1.0})
    assert table.value(full) == pytest.approx(10)
    assert table.value(full // 2) == pytest.approx(3)
    assert 3 < table.value((full + full // 2) // 2) < 10
    assert (table.slopes(full) >= 0).all()


@pytest.mark.slow
def test_max_latency_keeps_a_measured_model_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """With seconds that are a known function of the widths, the plan lands within a twentieth below the budget."""
    model, x = chain(61, 67, 71)

    def seconds(m: nn.Module) -> float:
        return 1e-9 * count_macs(m, x) ** 1.2 + 1e-6

    rows = lambda m, _: {f"layers.{i}": seconds(m) / 4 for i in range(4)}  # noqa: E731
    clock = replace(
        BUDGETS["max_latency"],
        measure=lambda m, _: seconds(m),
        compare=lambda m, ref, _: seconds(m) / seconds(ref),
    )
    monkeypatch.setitem(BUDGETS, "max_latency", clock)
    monkeypatch.setattr("depgraph.select.latency_table.measure_rows", rows)
    result = depgraph.prune(model, x, max_latency=0.5)
    assert 0.95 * 0.5 <= seconds(result.model) / seconds(model) <= 0.5
    text = f"{seconds(model) * 0.4 * 1e6:.3f}us"
    result = depgraph.prune(model, x, max_latency=text)
    assert 0.95 * 0.4 <= seconds(result.model) / seconds(model) <= 0.4001


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scope": "everywhere"}, "scope.*local, global, isomorphic"),
        ({"scope": Scope("layers.0", ratio=0.5)}, "list of depgraph.Scope"),
        ({"scope": [Scope("layers.0")]}, "is empty"),
        ({"scope": [Scope("layer.0", ratio=0.5)]}, "layer.0"),
        ({"scope": [Scope("layers.3", ratio=0.5)]}, "nothing can be removed.*model output"),
        ({"scope": [Scope("layers.0", at_least=12)]}, "above the 11 units"),
        ({"scope": [Scope("layers.0", at_least=1.5)]}, "at_least"),
        ({"scope": [Scope("layers.0", ratio=0.5, at_most_ratio=0.2)]}, "contradict"),
        ({"scope": [Scope("layers.0", ratio=1.0)]}, "between 0 and 1"),
        ({"pruning_ratio": {}}, "is empty"),
        ({"pruning_ratio": {"layers.9": 0.5}}, "layers.9"),
        ({"pruning_ratio": {"layers.0": 1.5}}, "between 0 and 1"),
        ({"pruning_ratio": {"layers.0": 0.5}, "scope": "global"}, "contradict"),
        ({"pruning_ratio": {"layers.0": 0.5}, "scope": [Scope("layers.0", ratio=0.5)]}, "contradict"),
        ({"pruning_ratio": 0.5, "max_params": 0.5}, "max_ratio"),
        ({"pruning_ratio": 0.5, "max_ratio": 0.4}, "contradict"),
        ({"max_ratio": 0}, "max_ratio"),
        ({"normalise": "nicely"}, "none, mean, sum, max, standard"),
        ({"max_params": 0.5, "per_cost": True, "normalise": "standard"}, "per_cost"),
        ({"per_cost": 1}, "True or False"),
        ({"uniform": "yes"}, "True or False"),
        ({"max_latency": 3}, "unit"),
        ({"max_latency": "soon"}, "give a share up to 1"),
        ({"max_latency": "3MB"}, "give a share up to 1"),
        ({"max_memory": "3ms"}, "give a share up to 1"),
        ({"max_memory": float("nan")}, "max_memory"),
        ({"max_bytes": 2.0}, "max_bytes=2.0 .*share up to 1.* positive int"),
        ({"max_bytes": "1GB"}, "above what the model has"),
    ],
)
def test_bad_input(options: dict, text: str) -> None:
    model, x = chain()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(InputError, match=f"(?s){text}"):
        depgraph.prune(model, x, **options)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# ------------------------------------------------------------------------------------------------------ uniform


class Rounded(nn.Module):
    """A class that loses the track of its numbers: the head width through int(), the inner width through a float."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        width = config.hidden
        self.heads, self.head = config.heads, int(width / config.heads)
        self.scale = self.head**-0.5
        self.enter = nn.Linear(5, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "qkv": nn.Linear(width, 3 * self.heads * self.head),
                    "out": nn.Linear(self.heads * self.head, width),
                    "up": nn.Linear(width, int(width * config.grow)),
                    "down": nn.Linear(int(width * config.grow), width),
                }
            )
            for _ in range(3)
        )
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            q, k, v = block["qkv"](x).unflatten(2, (3, -1, self.head)).permute(2, 0, 3, 1, 4)
            mixed = torch.softmax(q @ k.transpose(2, 3) * self.scale, -1) @ v
            x = x + block["out"](mixed.transpose(1, 2).flatten(2))
            x = x + block["down"](block["up"](x).relu())
        return self.last(x.mean(1))


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"pruning_ratio": 0.4}, {"max_params": 0.5}, {"max_macs": 0.7}])
def test_a_config_says_the_result_by_value(how: dict) -> None:
    """Heads and hidden width shrink in proportion, so that the scale stays; the inner width follows; all blocks alike."""
    torch.manual_seed(0)
    model = Rounded(SimpleNamespace(hidden=30, heads=5, grow=2.0)).double().eval()
    x = torch.randn(2, 11, 5).double()
    result = depgraph.prune(model, x, uniform=True, **how)
    config = result.model.config
    assert config.heads < 5
    assert (config.hidden, config.grow) == (6 * config.heads, 2.0)
    assert result.report.config_mismatches == []
    again = Rounded(config).double().eval()
    again.load_state_dict(result.model.state_dict())
    assert torch.equal(again(x), result.model(x))
    kept = [result.plan.mask(f"blocks.{i}.up.bias") for i in range(3)]
    assert len({int(k.sum()) for k in kept}) == 1
    assert not torch.equal(kept[0], kept[1])


class Retention(nn.Module):
    """Heads that differ by a fixed decay, as wide together as the stream: none can go alone, but widths can."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.d = heads, width // heads
        self.embed = nn.Linear(5, width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm, self.proj, self.out = (
            nn.GroupNorm(heads, width),
            nn.Linear(width, width),
            nn.Linear(width, 3),
        )
        self.register_buffer("decay", torch.linspace(0.5, 0.9, heads))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, t, c = x.shape
        q, k, v = (f(x).view(n, t, self.heads, self.d).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = (q @ k.transpose(-2, -1) * self.decay[:, None, None]) @ v
        return self.out(x + self.proj(self.norm(y.transpose(1, 2).reshape(n * t, c)).view(n, t, c)))


def test_where_no_head_can_go_widths_do() -> None:
    model, x = Retention().double().eval(), torch.randn(2, 6, 5).double()
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    assert result.report.parameters[1] < 0.6 * result.report.parameters[0]
    assert_equal_to_masked(model, result, x)
