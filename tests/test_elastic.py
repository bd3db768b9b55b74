"""One model, many widths: every size is the masked original on shared weights, before and after training."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import random_importance
from oracle import assert_equal_to_masked, assert_untouched, snapshot
from small_models import fresh
from torch import Tensor, nn
from versions import on_new_torch
from zoo import ZOO

import depgraph
from depgraph.axes.axes import Reason
from depgraph.base.values import output_leaves
from depgraph.elastic.cascade import _cheapest, upper
from depgraph.select.nested import StaysWhole, removed_units
from depgraph.store import weights
from depgraph.store.document import _first_line

X = torch.randn(4, 3, 8, 6, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 1])


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 22, 3), nn.BatchNorm2d(22), nn.ReLU(), nn.Conv2d(22, 26, 3), nn.BatchNorm2d(26), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(26, 5),
    )  # fmt: skip


def net(seed: int = 0) -> nn.Module:
    return fresh(build, seed).float().eval()


def made(model: nn.Module | None = None, inputs: Any = X, **options: Any) -> depgraph.Elastic:
    options = {"sizes": [1, 0.5, 0.25], "importance": random_importance(1), **options}
    return depgraph.Elastic(net() if model is None else model, inputs, **options)


def batches(count: int = 4, rows: int = 16) -> list[tuple[Tensor, Tensor]]:
    dice = torch.Generator().manual_seed(3)
    x = torch.randn(count * rows, 3, 8, 6, generator=dice)
    return list(zip(x.split(rows), (x.mean((1, 2, 3)) > 0).long().split(rows), strict=True))


def same_outputs(one: nn.Module, other: nn.Module, inputs: Any) -> bool:
    """Up to the order in which sums are taken over a view or a copy, which depends on the processor."""
    found = []
    for model in (one, other):
        torch.manual_seed(0)
        found.append(output_leaves(model(*copy.deepcopy(inputs))))
    pairs = zip(*found, strict=True)
    return all(
        a.shape == b.shape and torch.allclose(a, b, *2 * [1e3 * torch.finfo(a.dtype).eps], equal_nan=True)
        if a.is_floating_point()
        else a.equal(b)
        for a, b in pairs
    )


def check_sizes(elastic: depgraph.Elastic, original: nn.Module, inputs: tuple) -> None:
    """Every size: on shared weights as extracted, and both the masked original."""
    for size in elastic.sizes:
        assert same_outputs(elastic.at(size), elastic.extract(size), inputs)
        small = elastic.extract(size)
        assert_equal_to_masked(original, SimpleNamespace(model=small, plan=elastic.plan(size)), inputs, 1e-9)


SOME = ("NestedCat", "GroupedConvolution", "LstmLayer")


# ------------------------------------------------------------------------------------------------ plans that nest


@pytest.mark.parametrize("budget", ["max_macs", "max_params", "max_bytes"])
def test_what_a_smaller_plan_keeps_a_larger_one_keeps(budget: str) -> None:
    model = net()
    graph = depgraph.analyze(model, X)
    scores = depgraph.scores_of(graph, random_importance(2))
    larger = None
    for share in (0.8, 0.6, 0.45, 0.3, 0.1):
        masks = depgraph.choose(graph, scores, **{budget: share}, within=larger)
        plan = depgraph.build_plan(graph, masks)
        if larger is not None:
            assert all((plan.mask(n) <= larger.mask(n)).all() for n in plan.shapes)
            assert any((plan.mask(n) != larger.mask(n)).any() for n in plan.shapes)
        larger = plan


def test_plans_nest_whatever_the_scores_and_the_way_of_choosing() -> None:
    model = net()
    graph = depgraph.analyze(model, X)
    larger = depgraph.prune(model, X, graph=graph, max_macs=0.6, importance=random_importance(1)).plan
    for how in (
        {"pruning_ratio": 0.7},
        {"max_params": 0.2},
        {"pruning_ratio": 0.7, "scope": "global"},
        {"max_macs": 0.3, "round_to": 4},
    ):
        plan = depgraph.prune(
            model, X, graph=graph, within=larger, importance=random_importance(2), verify=False, **how
        ).plan
        assert all((plan.mask(n) <= larger.mask(n)).all() for n in plan.shapes)


def test_within_is_refused_where_it_does_not_fit() -> None:
    model = net()
    graph = depgraph.analyze(model, X)
    plan = depgraph.prune(model, X, pruning_ratio=0.5).plan
    with pytest.raises(depgraph.BudgetError, match="within takes more of"):
        depgraph.prune(model, X, graph=graph, within=plan, pruning_ratio=0.2)
    with pytest.raises(depgraph.InputError, match="within is a plan for another model"):
        depgraph.prune(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(2, 5),
                       within=depgraph.Plan(shapes={"0.weight": (7, 5)}))  # fmt: skip
    (first,) = (g for g in graph.groups if g.units == 22)
    held = graph.without([first.name], Reason("is read elsewhere"))
    with pytest.raises(
        StaysWhole, match=f"within cuts what must stay whole: '{re.escape(first.name)}' is read"
    ) as caught:
        removed_units(held, plan)
    assert [g.name for g in caught.value.groups] == [first.name]
    assert caught.value.graph is held
    with pytest.raises(depgraph.InputError, match=r"within must be the depgraph\.Plan"):
        depgraph.choose(graph, depgraph.scores_of(graph), within="larger")
    odd = copy.deepcopy(plan)
    del odd.cuts["4.running_mean"]
    with pytest.raises(depgraph.InputError, match=r"within removes from '4\.running_mean'"):
        depgraph.prune(model, X, within=odd, pruning_ratio=0.6)


# -------------------------------------------------------------------------------------------- plans hold an order


def test_a_plan_holds_an_order_and_so_does_its_text() -> None:
    model = net()
    graph = depgraph.analyze(model, X)
    order = {g.name: np.random.default_rng(0).permutation(g.units) for g in graph.groups}
    plan = depgraph.Plan.from_json(depgraph.build_plan(graph, {}, order=order).to_json())
    moved = depgraph.apply(model, plan)
    assert depgraph.verify(model, moved, plan, X).status == "equal"
    assert torch.equal(moved[0].weight, model[0].weight[torch.from_numpy(order["0.weight:0"])])
    torch.testing.assert_close(moved(X), model(X))


def test_an_order_is_proved_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a large matrix are widened in blocks; those that an order brings together lie far apart."""
    monkeypatch.setattr(importlib.import_module("depgraph.surgery.on_demand"), "BLOCK", 33)
    model = fresh(
        lambda: nn.Sequential(nn.Linear(11, 26), nn.ReLU(), nn.Linear(26, 22), nn.ReLU(), nn.Linear(22, 3))
    ).float()
    x = torch.randn(4, 11)
    graph = depgraph.analyze(model, x)
    order = {g.name: np.random.default_rng(0).permutation(g.units) for g in graph.groups}
    for masks in ({}, depgraph.choose(graph, depgraph.scores_of(graph), pruning_ratio=0.5)):
        plan = depgraph.build_plan(graph, masks, order=order)
        small = depgraph.apply(model, plan)
        assert depgraph.verify(model, small, plan, x).status == "equal"
        with torch.no_grad():
            small[2].weight[[0, 1]] = small[2].weight[[1, 0]]
        with pytest.raises(depgraph.VerificationError):
            depgraph.verify(model, small, plan, x)


def test_units_that_are_removed_leave_the_order_of_the_others() -> None:
    model = net()
    graph = depgraph.analyze(model, X)
    masks = depgraph.choose(graph, depgraph.scores_of(graph), pruning_ratio=0.5)
    order = {g.name: np.arange(g.units)[::-1] for g in graph.groups}
    plan = depgraph.build_plan(graph, masks, order=order)
    small = depgraph.apply(model, plan)
    assert torch.equal(
        small[0].bias, model[0].bias[torch.from_numpy(np.flatnonzero(masks["0.weight:0"])[::-1].copy())]
    )
    assert_equal_to_masked(model, SimpleNamespace(model=small, plan=plan), (X,), 1e-5)


def test_what_pairs_units_of_two_models_refuses_a_plan_with_an_order() -> None:
    model, elastic = net(), made()
    small, plan = elastic.extract(0.5), elastic.plan(0.5)
    assert plan.reorders
    assert not elastic.plans[0.5].reorders
    with pytest.raises(depgraph.InputError, match="the plan holds an order"):
        depgraph.recover(model, small, plan, depgraph.analyze(model, X), [X])
    with pytest.raises(depgraph.InputError, match="the plan holds an order"):
        depgraph.distill(small, model, [X], plan=plan, hidden=["3"], steps=1)
    depgraph.distill(small, elastic.model, [X], plan=elastic.plans[0.5], hidden=["3"], steps=1)
    depgraph.recover(
        elastic.model, small, elastic.plans[0.5], depgraph.analyze(elastic.model, X), [X], "compensation"
    )


@pytest.mark.parametrize(
    ("order", "text"),
    [
        ({"0.weight:0": [0, 1]}, "must be the numbers from 0 to 21, each once"),
        ({"0.weight:0": [0] * 22}, "must be the numbers from 0 to 21, each once"),
        ({"nope": [0]}, "is not a group"),
    ],
)
def test_orders_are_checked(order: Any, text: str) -> None:
    graph = depgraph.analyze(net(), X)
    with pytest.raises(depgraph.InputError, match=text):
        depgraph.build_plan(graph, {}, order=order)


def test_units_that_must_stand_as_they_do_are_not_moved() -> None:
    entry = ZOO["GroupedConvolution"]
    graph = depgraph.analyze(entry.model(), entry.example())
    held = [g.name for g in graph.groups if g.axis in graph.in_order]
    assert held
    with pytest.raises(depgraph.InputError, match="must stand as they do"):
        depgraph.build_plan(graph, {}, order={held[0]: range(graph.named[held[0]].units)})


def test_a_set_of_indices_in_another_order_is_refused_for_blocks() -> None:
    entry = ZOO["GroupedConvolution"]
    plan = depgraph.prune(entry.model(), entry.example(), pruning_ratio=0.5).plan
    name = next(n for n, cut in plan.cuts.items() if cut.blocks is not None)
    for kept in plan.cuts[name].blocks or ():
        kept[:] = kept[::-1].copy()
    with pytest.raises(depgraph.PlanError, match="is not ascending"):
        depgraph.Plan.from_json(plan.to_json())


def test_units_whose_order_shows_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops that see the order of units freeze their axes today; should one not, the proof of the order notices."""
    real = depgraph.verify

    def strict(model: nn.Module, small: nn.Module, plan: depgraph.Plan, inputs: Any) -> Any:
        if plan.cuts.get("3.bias") is not None and len(plan.cuts["3.bias"].keep[0]) == 26:
            raise depgraph.VerificationError("the order shows")
        return real(model, small, plan, inputs)

    monkeypatch.setattr("depgraph.elastic.nested.verify", strict)
    model = net()
    elastic = made(model)
    assert torch.equal(elastic.model[3].bias, model[3].bias)
    assert not torch.equal(elastic.model[0].bias, model[0].bias)
    assert not elastic.plans[0.5].cuts["3.bias"].leads
    with torch.no_grad():
        for p in elastic.parameters():
            p.data.mul_(1.1)
    assert torch.equal(elastic.at(0.5)(X), elastic.extract(0.5)(X))
    check_sizes(made(model).double(), model.double(), (X.double(),))


# ---------------------------------------------------------------------------------------------------- sub-models


@pytest.mark.parametrize("name", SOME)
def test_each_size_is_the_masked_original(name: str) -> None:
    entry = ZOO[name]
    model, inputs = entry.model(), entry.example()
    check_sizes(made(model, inputs, sizes=[1, 0.7, 0.5], cost="params"), model, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, e in ZOO.items() if e.dtype == torch.float64])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_each_size_of_every_network_is_the_masked_original(name: str) -> None:
    entry = ZOO[name]
    model, inputs = entry.model(), entry.example()
    before = snapshot(model)
    try:
        elastic = made(model, inputs, sizes=[1, 0.8, 0.6], cost="params")
    except depgraph.InputError as error:
        if "can't be reached" not in str(error):
            raise
        return  # more than that stays whole
    assert_untouched(model, before)
    check_sizes(elastic, model, inputs)


def test_sizes_nest_meet_their_share_and_are_views() -> None:
    model = net()
    elastic = made(model)
    whole = depgraph.count_macs(model, X)
    larger = None
    for size in (1, 0.5, 0.4, 0.25):
        part, plan = elastic.at(size), elastic.plan(size)
        assert type(part) is type(model)
        assert 0.7 * size * whole < depgraph.count_macs(part, X) <= size * whole
        if larger is not None:
            assert all((plan.mask(n) <= larger.mask(n)).all() for n in plan.shapes)
        larger = plan
        for name, parameter in part.named_parameters():
            assert parameter.data_ptr() == elastic.model.get_parameter(name).data_ptr()
    check_sizes(elastic.double(), model.double(), (X.double(),))
    assert all(p.status == "equal" for p in elastic.proofs.values())


def test_gradients_of_a_size_land_on_the_kept_entries_of_the_whole() -> None:
    model = net()
    elastic = made(model)
    elastic.at(0.5)(X).square().sum().backward()
    small = elastic.extract(0.5)
    small(X).square().sum().backward()
    for name, cut in elastic.plans[0.5].cuts.items():
        if "running" not in name:
            got = elastic.model.get_parameter(name).grad
            torch.testing.assert_close(got[cut.mask()], small.get_parameter(name).grad.flatten())
            assert not got[~cut.mask()].any()


def test_gradients_land_where_weights_are_gathered() -> None:
    entry = ZOO["NestedCat"]
    inputs, elastic = entry.example(), made(entry.model(), entry.example(), sizes=[1, 0.6], cost="params")
    small, cuts = elastic.extract(0.6), elastic.plans[0.6].cuts
    for model in (elastic.at(0.6), small):
        sum(t.square().sum() for t in output_leaves(model(*inputs))).backward()
    assert not all(cut.leads for cut in cuts.values())
    for name, parameter in small.named_parameters():
        got, mask = elastic.model.get_parameter(name).grad, elastic.plans[0.6].mask(name)
        torch.testing.assert_close(got[mask], parameter.grad.flatten())
        assert not got[~mask].any()


def test_a_size_follows_the_weights_wherever_they_go() -> None:
    elastic = made()
    with torch.no_grad():
        for change in (
            lambda: [p.data.mul_(1.5) for p in elastic.parameters()],
            elastic.double,
            lambda: elastic.load_state_dict(made(net(1)).double().state_dict()),
            lambda: [setattr(p, "data", p.data.clone() * 0.7) for p in elastic.model.parameters()],
        ):
            change()
            x = X.to(elastic.model[0].weight.dtype)
            assert torch.equal(elastic.at(0.5)(x), elastic.extract(0.5)(x))


def test_weights_that_can_be_no_views_are_never_stale() -> None:
    """The parts of a concatenation each have a prefix, so what stays is no view."""
    entry = ZOO["NestedCat"]
    inputs = entry.example()
    elastic = made(entry.model(), inputs, sizes=[1, 0.6], cost="params")
    with torch.no_grad():
        for p in elastic.parameters():
            p.data.mul_(1.3)
        assert same_outputs(elastic.at(0.6), elastic.extract(0.6), inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "pickle"]
)
def test_copies_are_independent(way: Any) -> None:
    elastic = made()
    elastic.estimate_statistics([x for x, _ in batches()])
    elastic.at(0.5)(X)
    other, part = way(elastic), copy.deepcopy(elastic.at(0.5))
    wanted = elastic.at(0.5)(X)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    assert torch.equal(elastic.at(0.5)(X), wanted)
    assert torch.equal(part(X), wanted)
    assert torch.equal(other.at(0.5)(X), other.extract(0.5)(X))
    assert not torch.equal(other.at(0.5)(X), wanted)


@pytest.mark.slow
def test_a_model_that_was_pruned_before(tmp_path: Path) -> None:
    first = depgraph.prune(net(), X, pruning_ratio=0.2)
    elastic = made(first.model)
    depgraph.save(elastic, tmp_path / "f")
    assert torch.equal(depgraph.load(net, tmp_path / "f", size=0.5)(X), elastic.at(0.5)(X))


# ------------------------------------------------------------------------------------------------------ training


def test_the_sandwich_trains_every_size_on_one_set_of_weights() -> None:
    elastic = made().train()
    state = torch.get_rng_state()
    optimizer = torch.optim.AdamW(elastic.model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = elastic.sandwich((X, Y), F.cross_entropy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(torch.get_rng_state(), state)
    elastic.eval()
    for size in elastic.sizes:
        assert same_outputs(elastic.at(size), elastic.extract(size), (X,))


def test_the_loss_is_that_of_three_sizes() -> None:
    elastic = made()
    largest, smallest, between = (elastic.at(s)(X) for s in (1, 0.25, 0.5))
    aim = largest.detach().log_softmax(1)
    soft = [
        F.kl_div(s.log_softmax(1), aim, log_target=True, reduction="batchmean") for s in (smallest, between)
    ]
    wanted = F.cross_entropy(largest, Y) + sum(soft)
    torch.testing.assert_close(elastic.sandwich((X, Y), F.cross_entropy), wanted)
    torch.testing.assert_close(elastic.sandwich(X, lambda out: F.cross_entropy(out, Y)), wanted)
    hard = sum(F.cross_entropy(out, Y) for out in (largest, smallest, between))
    torch.testing.assert_close(elastic.sandwich((X, Y), F.cross_entropy, alpha=0.0), hard)


def test_statistics_of_batch_norms_are_kept_beside() -> None:
    elastic = made()
    before = elastic.model[1].running_mean.clone()
    elastic.estimate_statistics([x for x, _ in batches()])
    assert torch.equal(elastic.model[1].running_mean, before)
    part = elastic.at(0.5)
    assert not torch.equal(part[4].running_mean, elastic.model[4].running_mean[: len(part[4].running_mean)])
    assert torch.equal(part(X), elastic.extract(0.5)(X))
    part.train()(X)
    assert torch.equal(elastic.model[1].running_mean, before)
    again = made()
    again.load_state_dict(elastic.state_dict())
    assert torch.equal(again.at(0.25)(X), elastic.at(0.25)(X))


# ------------------------------------------------------------------------------------------------ switching, serving


def test_calls_run_the_size_that_is_switched_to() -> None:
    elastic = made().eval()
    assert elastic.size == 1
    for size in (0.25, 1, 0.5, 0.3):
        elastic.switch(size)
        assert torch.equal(elastic(X), elastic.extract(size)(X))


@pytest.mark.slow
def test_switching_is_safe_between_threads() -> None:
    elastic = made().eval()
    wanted = {size: elastic.extract(size)(X) for size in elastic.sizes}
    wrong: list[Tensor] = []
    done = threading.Event()

    def serve() -> None:
        with torch.no_grad():
            while not done.is_set():
                out = elastic(X)
                if not any(torch.equal(out, w) for w in wanted.values()):
                    wrong.append(out)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(150):
        elastic.switch(elastic.sizes[i % 3])
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_limit_of_latency_chooses_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    elastic = made()
    calls = []
    monkeypatch.setattr(
        "depgraph.elastic.elastic.latencies", lambda models, _: calls.append(1) or [0.03, 0.02, 0.01]
    )
    for limit, size in (("1s", 1), ("25ms", 0.5), ("12ms", 0.25), (0.7, 0.5), ("50%", 0.25)):
        served = elastic.serve(max_latency=limit)
        assert (served.size, elastic.size, served.table[0.5]) == (size, size, 0.02)
        assert torch.equal(served(X), elastic.at(size)(X))
    assert len(calls) == 1
    elastic.serve(torch.cat([X, X]), max_latency="12ms")
    assert len(calls) == 2
    with pytest.raises(
        depgraph.InputError, match=r"no size takes at most 5\.000 ms on these inputs: 1: 30\.000 ms"
    ):
        elastic.serve(max_latency="5ms")
    assert elastic.size == 0.25


def trained() -> depgraph.Elastic:
    elastic = made().train()
    optimizer = torch.optim.AdamW(elastic.parameters(), lr=0.01)
    for _ in range(8):
        for batch in batches():
            loss = elastic.sandwich(batch, F.cross_entropy)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    elastic.eval().estimate_statistics([x for x, _ in batches()])
    return elastic


def test_each_row_of_a_cascade_is_what_the_size_that_answered_gives() -> None:
    elastic, x = trained(), batches()[0][0]
    middle = float(elastic.at(0.25)(x).softmax(1).amax(1).median().detach())
    for threshold in (0.0, middle, 1.0):
        cascade = elastic.cascade(threshold)
        out, answered = cascade.routed(x)
        for size in elastic.sizes:
            rows = answered == size
            torch.testing.assert_close(out[rows], elastic.at(size)(x)[rows])
        sure = elastic.at(0.25)(x).softmax(1).amax(1) >= threshold
        assert torch.equal(answered == 0.25, sure)
        assert torch.equal(cascade(x), out)
        assert (len(answered.unique()) > 1) == (threshold == middle)


@pytest.mark.slow
def test_a_cascade_says_what_it_costs_and_loses() -> None:
    elastic = trained()
    cascade = elastic.cascade(threshold="auto", calibration=batches(8), drop=0.02)
    found = cascade.report
    assert found is not None
    assert found.rows == 64
    assert abs(sum(found.shares.values()) - 1) < 1e-6
    assert found.drop <= found.bound <= 1
    assert found.seconds > 0
    assert f"{found.bound:.2%}" in str(found)
    unlabelled = elastic.cascade(threshold="auto", calibration=[x for x, _ in batches(8)], drop=0.0)
    assert unlabelled.report is not None
    with pytest.raises(depgraph.InputError, match="at least two"):
        elastic.cascade(calibration=batches(1))


@pytest.mark.parametrize(("drop", "threshold"), [(0.006, 0.9), (0.011, 0.1)])
def test_the_estimated_loss_and_its_standard_error_stay_below_what_may_be_lost(
    drop: float, threshold: float
) -> None:
    """One row in 200 is lost where the small size answers all: 0.5 points, with a standard error of 0.5."""
    sure = np.full((2, 200), 0.9)
    sure[0, 0] = 0.1
    right = np.ones((2, 200), dtype=bool)
    right[0, 0] = False
    assert _cheapest((0.25, 1), (1.0, 4.0), sure, right, drop) == ((0.25, 1), threshold)


@pytest.mark.parametrize("count", [0, 1, 7, 50, 99])
def test_the_bound_is_that_of_clopper_and_pearson(count: int) -> None:
    """At the bound, so few successes are seen with just the probability that was asked for."""
    p = upper(count, 100, 0.05)
    ways = np.array([float(np.prod([(100 - i) / (i + 1) for i in range(k)])) for k in range(count + 1)])
    k = np.arange(count + 1)
    assert abs((ways * p**k * (1 - p) ** (100 - k)).sum() - 0.05) < 1e-6
    assert upper(100, 100, 0.05) == 1


# ------------------------------------------------------------------------------------------------ saving and loading


def test_a_saved_model_has_all_sizes_in_one_file(tmp_path: Path) -> None:
    elastic = made()
    elastic.estimate_statistics([x for x, _ in batches()])
    depgraph.save(elastic, tmp_path / "f")
    again = depgraph.load(net, tmp_path / "f")
    assert isinstance(again, depgraph.Elastic)
    for size in elastic.sizes:
        alone = depgraph.load(lambda: net(5), tmp_path / "f", size=size)
        assert type(alone) is nn.Sequential
        assert torch.equal(alone(X), elastic.at(size)(X))
        assert torch.equal(again.at(size)(X), elastic.at(size)(X))
    whole = (tmp_path / "f" / "model.safetensors").stat().st_size
    assert whole < 1.1 * sum(t.numel() * t.element_size() for t in net().state_dict().values()) + 2000
    again.example_inputs = X
    assert again.serve(max_latency="10s").size == 1
    with pytest.raises(depgraph.InputError, match=r"loaded or copied has no size 0\.4"):
        again.at(0.4)


@pytest.mark.parametrize("name", ["GroupedConvolution", "NestedCat"])
def test_every_kind_of_cut_is_read_in_part(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    inputs = entry.example()
    elastic = made(entry.model(), inputs, sizes=[1, 0.6], cost="params")
    depgraph.save(elastic, tmp_path / "f")
    assert same_outputs(depgraph.load(entry.model, tmp_path / "f", size=0.6), elastic.extract(0.6), inputs)


def test_a_part_lies_in_memory_as_the_whole_does(tmp_path: Path) -> None:
    elastic = made().to(memory_format=torch.channels_last)
    folder = depgraph.save(elastic, tmp_path / "f")
    small = depgraph.load(net, folder, size=0.5)
    assert small[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert not small[3].weight.is_contiguous()
    assert torch.equal(small(X), elastic.extract(0.5)(X))


def test_a_size_reads_its_own_bytes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elastic = made()
    depgraph.save(elastic, tmp_path / "f")
    read: list[int] = []
    fill = weights._fill
    monkeypatch.setattr(
        weights,
        "_fill",
        lambda s, view, name: (name != "header" and read.append(len(view)), fill(s, view, name)),
    )
    small = depgraph.load(net, tmp_path / "f", size=0.25)
    assert sum(read) == sum(t.numel() * t.element_size() for t in small.state_dict().values())


def test_a_damaged_part_is_noticed_and_only_that(tmp_path: Path) -> None:
    elastic = made()
    folder = depgraph.save(elastic, tmp_path / "f")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    first, last = (p + 8 + int.from_bytes(data[:8], "little") for p in header["3.weight"]["data_offsets"])

    def flipped(at: int) -> None:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])

    flipped(last - 1)
    assert torch.equal(depgraph.load(net, folder, size=0.25)(X), elastic.at(0.25)(X))
    with pytest.raises(depgraph.StoreError, match=r"'3\.weight' .* checksum mismatch"):
        depgraph.load(net, folder)
    flipped(first)
    with pytest.raises(depgraph.StoreError, match=r"'3\.weight' .* checksum mismatch"):
        depgraph.load(net, folder, size=0.25)


def test_what_plan_json_says_of_sizes_is_checked(tmp_path: Path) -> None:
    folder = depgraph.save(made(), tmp_path / "f")
    text = (folder / "plan.json").read_text()
    for change in (
        lambda s: s[0].update(size=2),
        lambda s: s[0].update(own={"1.running_mean": "nope"}),
        lambda s: s[0].update(own={"1.running_mean": "8.bias"}),
        lambda s: s[0]["crc32"].pop("8.bias"),
        lambda s: s[0].pop("plan"),
        lambda s: s.append(5),
    ):
        data = json.loads(text)
        change(data["sizes"])
        rest = json.dumps({k: v for k, v in data.items() if k != "sha256"})[1:]
        (folder / "plan.json").write_text(f"{_first_line(rest)}\n{rest}\n")
        with pytest.raises(depgraph.StoreError, match=r"invalid size|is not one of its tensors"):
            depgraph.load(net, folder, size=0.5)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sizes": [0.5, 1]}, "shares of the whole model that fall from 1"),
        ({"sizes": [1, 1]}, "shares of the whole model that fall from 1"),
        ({"sizes": [1, -0.5]}, "shares of the whole model that fall from 1"),
        ({"sizes": [1, True]}, "shares of the whole model that fall from 1"),
        ({"sizes": [2, 1]}, "shares of the whole model that fall from 1"),
        ({"sizes": []}, "shares of the whole model that fall from 1"),
        ({"sizes": 0.5}, "sizes must be a list of shares"),
        ({"sizes": ["a"]}, "must be one of shares"),
        ({"sizes": [1, 1e-6]}, "size 1e-06 can't be reached"),
        ({"cost": "joules"}, "cost must be one of macs, params, latency"),
        ({"depth": 1}, "depth must be True or False"),
        ({"max_macs": 0.5}, "Elastic takes no max_macs"),
        ({"pruning_ratio": 0.5}, "Elastic takes no pruning_ratio"),
        ({"rounded": 8}, "unknown argument 'rounded': the options are scope"),
        ({"importance": "nope"}, "importance must be"),
        ({"ignore": "nope*"}, "ignore matches nothing"),
    ],
)
def test_bad_arguments_are_refused(options: Any, text: str) -> None:
    model = net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(depgraph.InputError, match=text):
        made(model, **options)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_bad_calls_are_refused_and_change_nothing(tmp_path: Path) -> None:
    elastic = made()
    for call, text in (
        (lambda: elastic.at(0.1), "there is no size 0.1: the sizes are 1, 0.5, 0.25"),
        (lambda: elastic.at("half"), "there is no size 'half'"),
        (lambda: elastic.switch(2), "there is no size 2"),
        (lambda: elastic.sandwich(X, F.cross_entropy), "loss_fn takes a target"),
        (lambda: elastic.sandwich((X, Y), 5), "loss_fn must be a function"),
        (lambda: elastic.sandwich((X, Y), F.cross_entropy, alpha=2), "alpha must be between 0 and 1"),
        (lambda: elastic.serve(max_latency="fast"), "can't be read"),
        (lambda: elastic.serve(max_latency="1us"), "no size takes at most 0.001 ms"),
        (elastic.cascade, "threshold='auto' is found on data"),
        (lambda: elastic.cascade(1.5), "threshold must be 'auto' or from 0 to 1"),
        (lambda: elastic.cascade(0.5, drop=2), "drop must be between 0 and 1"),
        (lambda: elastic.cascade(calibration=[(X, Y.float())] * 2), "targets must be 4 classes"),
        (lambda: elastic.estimate_statistics([]), "calibration is empty"),
        (lambda: depgraph.save(elastic, tmp_path / "f", plans=[]), "an Elastic knows its plans"),
    ):
        with pytest.raises(depgraph.InputError, match=text):
            call()
    assert elastic.size == 1
    assert list(elastic.plans) == [1.0, 0.5, 0.25]


def test_an_elastic_is_no_model_to_prune() -> None:
    elastic = made()
    for call in (lambda: made(elastic), lambda: depgraph.prune(nn.Sequential(elastic), X)):
        with pytest.raises(
            depgraph.InputError, match=r"an Elastic, which is several models(.|\n)*elastic\.model"
        ):
            call()
    assert depgraph.prune(elastic.at(0.5), X, pruning_ratio=0.2).report.verification.status == "equal"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "8", nn.Linear(26, 5)),
        lambda m: nn.utils.parametrizations.weight_norm(m[3]),
        lambda m: m.append(nn.ReLU()),
    ],
)
def test_modules_of_the_whole_that_are_replaced_are_noticed(change: Any) -> None:
    elastic = made()
    elastic.switch(0.5)
    change(elastic.model)
    for call in (lambda: elastic.at(0.5), lambda: elastic.extract(0.25), lambda: elastic(X)):
        with pytest.raises(
            depgraph.InputError, match=r"other modules or parameters(.|\n)*make an Elastic of it"
        ):
            call()


def test_what_runs_the_whole_is_checked() -> None:
    elastic = made()
    wrapped = nn.Sequential(elastic)
    assert torch.isfinite(elastic.sandwich((X, Y), F.cross_entropy, largest=wrapped))
    elastic.switch(0.5)
    for other in (wrapped, net(), 5):
        with pytest.raises(depgraph.InputError, match=r"largest must be elastic\.model"):
            elastic.sandwich((X, Y), F.cross_entropy, largest=other)  # type: ignore[arg-type]


def test_the_state_of_other_sizes_is_refused() -> None:
    elastic = made()
    before = {n: t.clone() for n, t in elastic.model.state_dict().items()}
    state = made(net(1), sizes=[1, 0.5]).state_dict()
    with pytest.raises(depgraph.InputError, match=r"without these sizes 0\.25"):
        elastic.load_state_dict(state)
    other = made(net(1), sizes=[1, 0.5, 0.25], cost="params").state_dict()
    with pytest.raises(depgraph.InputError, match="with others of that name"):
        elastic.load_state_dict(other)
    assert all(torch.equal(t, before[n]) for n, t in elastic.model.state_dict().items())
    elastic.load_state_dict(made(net(1), sizes=[1, 0.5, 0.4, 0.25]).state_dict())


@on_new_torch
def test_a_size_is_traced_while_gradients_are_on() -> None:
    elastic = made()
    part = elastic.at(0.5)
    for traced in (torch.jit.trace(part, X), torch.export.export(part, (X,)).module()):
        torch.testing.assert_close(traced(X), elastic.extract(0.5)(X))


def test_several_threads_ask_for_a_size_between() -> None:
    elastic, found = made(), []
    threads = [threading.Thread(target=lambda: found.append(elastic.at(0.4))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(part(X), elastic.extract(0.4)(X)) for part in found)
    assert len(found) == 3


def test_a_cascade_needs_class_scores() -> None:
    model = fresh(lambda: nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 3, 3))).float()
    elastic = made(model, sizes=[1, 0.5])
    with pytest.raises(depgraph.InputError, match="a cascade needs class scores"):
        elastic.cascade(0.5)


def test_a_wrapped_model_is_refused() -> None:
    with pytest.raises(depgraph.InputError, match="the model is wrapped"):
        made(nn.DataParallel(net()))


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = depgraph.save(made(), tmp_path / "f")
    other = depgraph.save(depgraph.prune(net(), X), tmp_path / "other")
    for call, text in (
        (lambda: depgraph.load(lambda: nn.Linear(3, 3), folder, size=0.5), "does not fit the model"),
        (lambda: depgraph.load(net, folder, size=0.3), "has no size 0.3, but the sizes 1, 0.5, 0.25"),
        (lambda: depgraph.load(net, other, size=0.5), "has no size 0.5, but one size"),
        (lambda: depgraph.load(folder, size=0.5), "give what builds the original, too"),  # type: ignore[call-overload]
    ):
        with pytest.raises(depgraph.InputError, match=text):
            call()


def test_the_report_has_a_row_for_each_size() -> None:
    elastic = made()
    rows = elastic.report.to_dict()
    assert [r["value"] for r in rows["rows"]] == [0.5, 0.25]
    assert rows["dense"]["macs"] == depgraph.count_macs(net(), X)
    assert "size=0.25" in str(elastic.report)
    assert "score" not in str(elastic.report)
    scored = elastic.measured(lambda m: m(X).sum().item(), latency=False)
    assert scored.rows[1].score == elastic.extract(0.25)(X).sum().item()
    depgraph.pictures.trade_off({"elastic": scored, "also": scored})


@pytest.mark.slow
def test_shares_of_latency() -> None:
    model = fresh(
        lambda: nn.Sequential(
            nn.Linear(16, 700), nn.ReLU(), nn.Linear(700, 700), nn.ReLU(), nn.Linear(700, 3)
        )
    ).float()
    x = torch.randn(64, 16)
    elastic = made(model, x, sizes=[1, 0.6], cost="latency")
    assert depgraph.count_macs(elastic.at(0.6), x) < 0.9 * depgraph.count_macs(model, x)
    assert elastic.proofs[0.6].status == "equal"


def test_models_without_logits_or_values_are_refused() -> None:
    model = fresh(lambda: nn.Sequential(nn.Linear(5, 22), nn.ReLU(), nn.Linear(22, 1))).float()
    x = torch.randn(4, 5)
    elastic = made(model, x)
    with pytest.raises(depgraph.InputError, match="no logits over the last dim"):
        elastic.sandwich((x, x[:, :1]), F.mse_loss)
    assert torch.isfinite(elastic.sandwich((x, x[:, :1]), F.mse_loss, alpha=0.0))
    with pytest.raises(depgraph.InputError, match="meta device"):
        depgraph.Elastic(copy.deepcopy(model).to("meta"), x)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(depgraph.InputError, match="NaN"):
        depgraph.Elastic(model, x)
    with pytest.raises(depgraph.TraceError):
        made(model, torch.randn(4, 7))
