"""Sizes that also leave out branches: nested, on shared weights, each the original whose removed branches put out zeros."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import vision_ops  # noqa: F401  # makes torchvision importable, which transformers needs
from checks import random_importance
from depth_checks import check_depth
from oracle import assert_untouched, snapshot
from random_networks import random_network
from test_depth import IMAGE, TOKENS, Attention, PostNorm, ResNet, decoder, ready
from torch import Tensor, nn

import depgraph
from depgraph import Depth

SIZES = (1, 0.7, 0.4)


def made(model: nn.Module, inputs: Any, **options: Any) -> depgraph.Elastic:
    """With branches; the model stays as it is."""
    before = snapshot(model)
    options = {"sizes": SIZES, "importance": random_importance(1), "depth": True, **options}
    elastic = depgraph.Elastic(model, inputs, **options)
    assert_untouched(model, before)
    return elastic


def removed(elastic: depgraph.Elastic, size: float) -> set[str]:
    """Names of the parameters that go as a whole."""
    plan = elastic.plans[size]
    return {n for n in plan.shapes if plan.drops(n)}


@torch.no_grad()
def check(elastic: depgraph.Elastic, original: nn.Module, inputs: Any) -> None:
    """Sizes nest; on shared weights each is what it is extracted, and that is the model without its branches."""
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    torch.testing.assert_close(elastic.model(*given), original(*given))
    larger = None
    for size, plan in sorted(elastic.plans.items(), reverse=True):
        assert elastic.proofs[size].status == "equal"
        small = elastic.extract(size)
        assert torch.equal(elastic.at(size)(*given), small(*given))
        check_depth(elastic.model, SimpleNamespace(model=small, plan=plan), given)
        torch.testing.assert_close(depgraph.apply(original, elastic.plan(size))(*given), small(*given))
        if larger is not None:
            assert all((plan.mask(n) <= larger.mask(n)).all() for n in plan.shapes)
        larger = plan


def four() -> nn.Module:
    return decoder(*["plain"] * 4)


def residual() -> nn.Module:
    """One of its blocks hardly adds anything, so that it is the one to go."""
    model = ready(ResNet())
    with torch.no_grad():
        for p in model.blocks[1].bn2.parameters():
            p.mul_(1e-3)
    return model


@pytest.fixture(scope="module")
def layers() -> depgraph.Elastic:
    return made(four(), TOKENS)


@pytest.fixture(scope="module")
def blocks() -> depgraph.Elastic:
    return made(residual(), IMAGE, sizes=(1, 0.4))


def test_smaller_sizes_leave_out_branches_that_larger_ones_leave_out(layers: depgraph.Elastic) -> None:
    check(layers, four(), TOKENS)
    assert set() != removed(layers, 0.7) < removed(layers, 0.4)
    assert [len(layers.at(s).layers) for s in SIZES] == [layers.at(s).config.depth for s in SIZES]
    assert any(note.startswith("0.7: ") and "branches removed" in note for note in layers.notes)
    for size, row in zip(SIZES, [layers.report.dense, *layers.report.rows], strict=True):
        assert row.macs == depgraph.count_macs(layers.extract(size), TOKENS)
        assert row.macs <= size * layers.report.dense.macs


@pytest.mark.slow
def test_a_size_between_leaves_out_what_its_neighbours_allow() -> None:
    elastic = made(four(), TOKENS)
    elastic.at(0.55)
    assert removed(elastic, 0.7) <= removed(elastic, 0.55) <= removed(elastic, 0.4)
    check(elastic, four(), TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("cost", ["macs", "params"])
@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (residual, IMAGE),
        (lambda: ready(nn.Sequential(PostNorm(), PostNorm(), PostNorm(), nn.Linear(12, 3))), TOKENS),
        (lambda: decoder("plain", "loud", "plain"), TOKENS),
    ],
)
def test_any_architecture(make: Any, inputs: Tensor, cost: str) -> None:
    check(made(make(), inputs, cost=cost), make(), inputs)


def test_weights_are_views_and_gradients_land_on_the_whole(layers: depgraph.Elastic) -> None:
    elastic = copy.deepcopy(layers)
    part, plan, old = elastic.at(0.4), elastic.plans[0.4], elastic.plans[0.4].moves.old
    whole = dict(elastic.model.named_parameters())
    for name, parameter in part.named_parameters():
        if (cut := plan.cuts.get(old(name))) is None or cut.leads:
            assert parameter.data_ptr() == whole[old(name)].data_ptr()
    elastic.sandwich(
        (TOKENS, torch.ones(2, 5, dtype=torch.long)), lambda out, y: F.cross_entropy(out.mT, y)
    ).backward()
    assert all(p.grad is not None for p in elastic.parameters())
    elastic.zero_grad()
    part(TOKENS).square().sum().backward()
    small = elastic.extract(0.4)
    small(TOKENS).square().sum().backward()
    grads = {old(n): p.grad for n, p in small.named_parameters()}
    for name, parameter in whole.items():
        mask = plan.mask(name)
        got = torch.zeros(()) if parameter.grad is None else parameter.grad[~mask]
        assert not got.any()
        if name in grads:
            torch.testing.assert_close(parameter.grad[mask], grads[name].flatten())


def test_statistics_and_modes_of_what_is_left(blocks: depgraph.Elastic) -> None:
    elastic = copy.deepcopy(blocks)
    assert removed(elastic, 0.4)
    elastic.train()
    part = elastic.at(0.4)
    assert all(m.training for m in part.modules())
    elastic.eval().estimate_statistics([IMAGE, IMAGE + 1])
    own = elastic.own_buffers(0.4)
    assert own
    assert own.keys() <= dict(elastic.model.named_buffers()).keys()
    assert torch.equal(elastic.at(0.4)(IMAGE), elastic.extract(0.4)(IMAGE))
    for other in (copy.deepcopy(elastic), pickle.loads(pickle.dumps(elastic))):
        assert torch.equal(other.at(0.4)(IMAGE), part(IMAGE))
    fresh = copy.deepcopy(blocks)
    fresh.load_state_dict(elastic.state_dict())
    assert torch.equal(fresh.at(0.4)(IMAGE), part(IMAGE))


def test_switch_runs_what_is_left(layers: depgraph.Elastic) -> None:
    for size in (0.4, 0.7, 1):
        layers.switch(size)
        assert torch.equal(layers(TOKENS), layers.extract(size)(TOKENS))


def test_one_size_is_loaded_without_what_went(
    layers: depgraph.Elastic, blocks: depgraph.Elastic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elastic = copy.deepcopy(blocks)
    elastic.estimate_statistics([IMAGE, IMAGE + 1])
    folder = depgraph.save(elastic, tmp_path / "f")
    again = depgraph.load(residual, folder)
    read: list[int] = []
    weights = importlib.import_module("depgraph.store.weights")
    fill = weights._fill
    monkeypatch.setattr(
        weights,
        "_fill",
        lambda s, view, name: (name != "header" and read.append(len(view)), fill(s, view, name)),
    )
    for size in elastic.sizes:
        read.clear()
        alone = depgraph.load(residual, folder, size=size)
        assert sum(read) == sum(t.numel() * t.element_size() for t in alone.state_dict().values())
        assert torch.equal(alone(IMAGE), elastic.at(size)(IMAGE))
        assert torch.equal(again.at(size)(IMAGE), elastic.at(size)(IMAGE))
    folder = depgraph.save(layers, tmp_path / "g")
    alone = depgraph.load(four, folder, size=0.4)
    assert torch.equal(alone(TOKENS), layers.at(0.4)(TOKENS))
    assert len(alone.layers) == alone.config.depth < 4


@pytest.mark.slow
def test_branches_that_hold_what_is_ignored_stay() -> None:
    elastic = made(four(), TOKENS, ignore="layers.2.*")
    assert removed(elastic, 0.4)
    assert not any(n.startswith("layers.2.") for n in removed(elastic, 0.4))


def test_models_without_branches_are_refused() -> None:
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    with pytest.raises(depgraph.NothingToPruneError, match="no branch of this model can go"):
        depgraph.Elastic(model, TOKENS, depth=True)


# ------------------------------------------------------------------------------------- the same in prune(within=)


@pytest.mark.parametrize(
    "how",
    [
        {"depth": Depth(keep=3)},
        pytest.param({"depth": Depth(keep=2, contiguous=True)}, marks=pytest.mark.slow),
        pytest.param({"depth": True, "max_params": 0.3}, marks=pytest.mark.slow),
        pytest.param({"depth": Depth(by="magnitude"), "pruning_ratio": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_prune_removes_the_branches_of_a_larger_plan(how: dict[str, Any]) -> None:
    model = four()
    larger = depgraph.prune(model, TOKENS, depth=Depth(keep=5), pruning_ratio=0.2).plan
    result = depgraph.prune(model, TOKENS, within=larger, importance=random_importance(2), **how)
    check_depth(model, result, TOKENS)
    assert all((result.plan.mask(n) <= larger.mask(n)).all() for n in larger.shapes)


def test_a_larger_plan_that_does_not_fit_is_refused() -> None:
    model = four()
    larger = depgraph.prune(model, TOKENS, depth=Depth(keep=4)).plan
    for how, text in (
        ({"pruning_ratio": 0.5}, r"within removes modules that stay here(.|\n)*depth=True"),
        ({"depth": Depth(keep=6)}, "more than the 4 branches that within leaves"),
        ({"depth": True, "max_params": 0.3, "ignore": "layers.*"}, "within removes what is no branch here"),
    ):
        with pytest.raises(depgraph.InputError, match=text):
            depgraph.prune(model, TOKENS, within=larger, **how)


class Pair(nn.Module):
    """Two layers that keep their own norm in front of attention and linear part together."""

    def __init__(self) -> None:
        super().__init__()
        config = SimpleNamespace(width=12, heads=3)
        self.norm, self.attention, self.rise = nn.LayerNorm(12), Attention(config, 0), nn.Linear(12, 16)
        self.fall = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y)[0] + self.fall(self.rise(y).relu())


@pytest.mark.slow
def test_branches_with_a_norm_in_common() -> None:
    make = lambda: ready(nn.Sequential(Pair(), Pair(), Pair(), nn.Linear(12, 4)))  # noqa: E731
    check(made(make(), TOKENS), make(), TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("DEPGRAPH_RANDOM_NETWORKS", "24"))))
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_sizes_of_random_networks_with_branches(seed: int) -> None:
    model, inputs = random_network(seed)
    try:
        elastic = made(model, inputs, sizes=(1, 0.8, 0.5), cost="params")
    except (depgraph.NothingToPruneError, depgraph.InputError) as error:
        if isinstance(error, depgraph.NothingToPruneError) or "can't be reached" in str(error):
            return
        raise
    for size in elastic.plans:
        check_depth(
            elastic.model, SimpleNamespace(model=elastic.extract(size), plan=elastic.plans[size]), inputs
        )
