"""A bias for layers that have none: where there is a place for it, what it is set to, and what must survive it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recover import cut, normal, randomised
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
from depgraph.base.errors import InputError, PlanError
from depgraph.recover import Reconstruction

HOW = ["new_bias", "auto"]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 11), nn.Linear(11, 7, bias=False), nn.Linear(7, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).tanh())


BATCHES = [normal(40, 5, seed=s) for s in range(5)]
KEEP, ROWS = [0, 2, 3, 6, 8, 9], [0, 1, 3, 4, 6]


def recovered(
    model: nn.Module, kept: dict[str, list[int]], batches: list[Any], how: Any, **options: Any
) -> tuple[nn.Module, depgraph.Plan, Any]:
    graph, plan = cut(model, batches[0], kept)
    small = depgraph.apply(model, plan)
    return small, plan, depgraph.recover(model, small, plan, graph, batches, how, **options)


def mlp(how: Any = HOW) -> tuple[nn.Module, nn.Module, depgraph.Plan, Any]:
    model = randomised(Mlp())
    return model, *recovered(model, {"a.weight": KEEP, "b.weight": ROWS}, BATCHES, how)


# ------------------------------------------------------------------------------------------------ what it is set to


def test_it_is_the_constant_of_least_squares():
    model, small, plan, told = mlp(["new_bias", Reconstruction(damping=1e-12)])
    with torch.no_grad():
        whole = model.a(torch.cat(BATCHES)).relu()
        inputs = torch.cat([whole[:, KEEP], torch.ones(200, 1).double()], 1)
        solution = torch.linalg.lstsq(inputs, model.b(whole)[:, ROWS]).solution.T
    torch.testing.assert_close(small.b.weight.data, solution[:, :-1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(small.b.bias.data, solution[:, -1], rtol=1e-6, atol=1e-8)
    assert told.biases == ["b.bias", "c.bias"]
    assert told.to_dict()["biases"] == told.biases
    assert "new bias: b.bias" in str(told)
    assert plan.added() == {"b.bias": (5,), "c.bias": (3,)}


def test_it_is_the_mean_of_what_was_removed():
    model, small, _, _ = mlp(["new_bias", "compensation"])
    gone = [1, 4, 5, 7, 10]
    with torch.no_grad():
        x = model.a(torch.cat(BATCHES)).relu()[:, gone].mean(0)
        wanted = model.b.weight[ROWS][:, gone] @ x
    torch.testing.assert_close(small.b.bias.data, wanted)
    assert torch.equal(small.b.weight, model.b.weight[ROWS][:, KEEP])


class Net(nn.Module):
    """A layer between two others, on an image."""

    def __init__(self, middle: nn.Module, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), middle
        self.c = nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).sigmoid()).relu())


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(8, 6, 3, padding=1, stride=2, bias=False),
    "grouped": lambda: nn.Conv2d(8, 6, 3, groups=2, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 3, bias=False),
    "transposed and grouped": lambda: nn.ConvTranspose2d(8, 6, 3, groups=2, bias=False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_the_mean_over_samples_and_places_of_a_convolution(name: str):
    model = randomised(Net(LAYERS[name](), 6))
    batches = [normal(4, 3, 9, 7, seed=s) for s in range(3)]
    found = depgraph.prune(
        model,
        batches[0],
        pruning_ratio=0.4,
        importance="l1",
        calibration=batches,
        recover=["new_bias", "compensation"],
    )
    gone, rows = ~found.plan.mask("a.bias"), found.plan.mask("c.weight").any(0).flatten()
    assert gone.any()
    assert found.report.recovery.biases == ["b.bias"]
    assert found.model.b.bias.shape == (int(rows.sum()),)
    with torch.no_grad():
        lost = model.b(model.a(torch.cat(batches)).sigmoid() * gone[:, None, None])
    torch.testing.assert_close(found.model.b.bias.data, lost.mean((0, 2, 3))[rows])


def test_attention_without_biases():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 8)
            self.attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
            self.down = nn.Linear(8, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x).relu()
            return self.down(h + self.attention(h, h, h, need_weights=False)[0])

    model = randomised(Attention())
    batches = [normal(9, 7, 6, seed=s) for s in range(4)]
    options = {"pruning_ratio": 0.5, "calibration": batches}
    plain = depgraph.prune(model, batches[0], recover="auto", **options)
    found = depgraph.prune(model, batches[0], recover=HOW, **options)
    assert found.report.recovery.biases == ["attention.in_proj_bias", "attention.out_proj.bias", "down.bias"]
    assert found.report.recovery.output[1] < plain.report.recovery.output[1]


# --------------------------------------------------------------------------------------------------------- where not


def test_off_by_default():
    _, small, plan, told = mlp("auto")
    assert small.b.bias is None
    assert small.c.bias is None
    assert told.biases == plan.biases == []
    assert "biases" not in plan.to_json()


class Doubles(nn.Linear):
    """A bias would change more than the sum."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.bias is None else 2 * out


class Elsewhere(nn.Linear):
    """The empty place is of something else."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight)
        return x if self.bias is None else x * self.bias


class Refuses(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            raise RuntimeError("no biases here")
        return super().forward(x)


@pytest.mark.parametrize("kind", [Doubles, Elsewhere, Refuses])
def test_a_place_that_means_something_else_stays_empty(kind: type[nn.Linear]):
    model = Mlp()
    model.b = kind(11, 7, bias=False)
    model = randomised(model)
    small, plan, told = recovered(model, {"a.weight": KEEP, "b.weight": ROWS}, BATCHES, HOW)
    assert small.b.bias is None
    assert told.biases == ["c.bias"] == [b.name for b in plan.biases]
    assert told.output[1] < told.output[0]


def test_layers_that_share_a_weight_get_none():
    """The place of one is not that of the others."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.c.weight = self.b.weight

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            return self.b(h) + self.c(h.square())

    model = randomised(Tied())
    small, _, told = recovered(model, {"a.weight": [0, 1, 3, 4, 6, 7]}, BATCHES, HOW)
    assert told.biases == []
    assert small.b.bias is small.c.bias is None
    assert any(layer.name == "b.weight" and layer.kept for layer in told.layers)


def test_a_layer_that_is_called_twice_adds_it_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 4, bias=False), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).sigmoid()
            return self.c(torch.cat([self.b(h), self.b(h.square())], 1))

    model = randomised(Twice())
    with torch.no_grad():
        model.a.weight[[1, 4]] = 0
        h = model.a(BATCHES[0]).sigmoid()
        lost = [model.b.weight[:, [1, 4]] @ h[0, [1, 4]] ** p for p in (1, 2)]
    small, _, told = recovered(model, {"a.weight": [0, 2, 3, 5, 6, 7]}, BATCHES, ["new_bias", "compensation"])
    assert told.biases == ["b.bias"]
    torch.testing.assert_close(small.b.bias.data, sum(lost) / 2)


def test_several_examples():
    model = randomised(Mlp())
    examples = depgraph.Examples(BATCHES[0], BATCHES[1][:7])
    found = depgraph.prune(model, examples, pruning_ratio=0.4, calibration=BATCHES, recover=HOW)
    assert found.report.recovery.biases == ["b.bias", "c.bias"]


def test_it_is_gone_where_nothing_came_of_it(monkeypatch: pytest.MonkeyPatch):
    """An exception, and a method that is undone."""
    model = randomised(Mlp())
    graph, plan = cut(model, BATCHES[0], {"a.weight": KEEP})
    small = depgraph.apply(model, plan)
    with monkeypatch.context() as patched:

        def fails(*given: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr(depgraph.recover.__globals__["Task"], "each", fails)
        with pytest.raises(KeyboardInterrupt):
            depgraph.recover(model, small, plan, graph, BATCHES, ["new_bias", "compensation"])
    assert small.b.bias is None
    assert plan.biases == []
    same = depgraph.apply(model, depgraph.build_plan(graph, {}))
    told = depgraph.recover(model, same, depgraph.build_plan(graph, {}), graph, BATCHES, HOW)
    assert same.b.bias is None
    assert told.biases == []


# ------------------------------------------------------------------------------------------------- what must survive


def test_a_folder(tmp_path: Path):
    _, small, plan, _ = mlp()
    depgraph.save(small, tmp_path / "one")
    loaded = depgraph.load(lambda: Mlp().double(), tmp_path / "one")
    assert torch.equal(loaded(BATCHES[0]), small(BATCHES[0]))
    assert torch.equal(loaded.b.bias, small.b.bias)
    assert depgraph.Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    assert depgraph.load_plans(tmp_path / "one")[0].to_json() == plan.to_json()


@pytest.mark.parametrize(
    "row",
    [
        ["b.weight", "bias"],
        ["x.weight", "bias", [5]],
        ["b.weight", "a.bias", [5]],
        ["b.weight", "bias", [-5]],
        7,
    ],
)
def test_a_damaged_plan_is_refused(row: Any):
    _, _, plan, _ = mlp()
    data = plan.to_json().replace('["b.weight", "bias", [5]]', str(row).replace("'", '"'))
    with pytest.raises(PlanError, match="invalid bias"):
        depgraph.Plan.from_json(data)


def test_the_plan_elsewhere():
    model, small, plan, _ = mlp()
    for kind in (lambda m: m, nn.DataParallel):
        other = depgraph.apply(kind(randomised(Mlp(), seed=1)), plan)
        inner = getattr(other, "module", other)
        assert inner.b.bias.tolist() == [0] * 5
        assert {n: t.shape for n, t in inner.state_dict().items()} == {
            n: t.shape for n, t in small.state_dict().items()
        }
    fresh = depgraph.apply(model, plan)
    assert depgraph.verify(model, fresh, plan, BATCHES[0]).status == "equal"
    full = Mlp().double()
    full.b.bias = nn.Parameter(torch.zeros(7).double())
    with pytest.raises(PlanError, match=r"'b\.bias', which the plan adds, has no empty place"):
        depgraph.apply(full, depgraph.Plan(shapes=plan.shapes, biases=plan.biases))


def test_copies_in_place_and_exported():
    options = {"pruning_ratio": 0.4, "calibration": BATCHES, "recover": HOW}
    result = depgraph.prune(randomised(Mlp()), BATCHES[0], **options)
    wanted = result.model(BATCHES[1])
    one = randomised(Mlp())
    assert depgraph.prune(one, BATCHES[0], inplace=True, **options).model is one
    assert torch.equal(one(BATCHES[1]), wanted)
    assert torch.equal(copy.deepcopy(result.model)(BATCHES[1]), wanted)
    exported = torch.export.export(result.model, (BATCHES[1],)).module()
    torch.testing.assert_close(exported(BATCHES[1]), wanted)
    wrapped = depgraph.prune(nn.DataParallel(randomised(Mlp())), BATCHES[0], **options)
    torch.testing.assert_close(wrapped.model.module(BATCHES[1]), wanted)
    assert wrapped.report.recovery.biases == ["module.b.bias", "module.c.bias"]


def test_pruned_again():
    model, small, plan, _ = mlp()
    again = depgraph.prune(small, BATCHES[0], pruning_ratio=0.4, importance="l1")
    left = again.plan.mask("b.weight").any(1)
    assert again.report.verification.status == "equal"
    assert torch.equal(again.model.b.bias, small.b.bias[left])
    both = plan.then(again.plan)
    made = depgraph.apply(model, both)
    assert {n: t.shape for n, t in made.state_dict().items()} == {
        n: t.shape for n, t in again.model.state_dict().items()
    }
    assert "b.bias" not in both.shapes
    assert both.added() == {"b.bias": tuple(again.model.b.bias.shape), "c.bias": (3,)}
    with pytest.raises(PlanError, match=r"b\.bias"):
        plan.then(depgraph.prune(model, BATCHES[0], pruning_ratio=0.4).plan)


def test_gradually(tmp_path: Path):
    found = depgraph.prune_gradually(
        randomised(Mlp()), BATCHES[0], steps=2, pruning_ratio=0.5, calibration=BATCHES, recover=HOW
    )
    assert depgraph.Plan.from_json(found.plan.to_json()).added().keys() == {"b.bias", "c.bias"}
    depgraph.save(found, tmp_path / "two")
    loaded = depgraph.load(lambda: Mlp().double(), tmp_path / "two")
    assert torch.equal(loaded(BATCHES[0]), found.model(BATCHES[0]))


def test_with_fewer_branches(tmp_path: Path):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 12, bias=False), nn.Linear(12, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(x).relu())

    def build() -> nn.Module:
        return randomised(nn.Sequential(nn.Linear(5, 6), *(Block() for _ in range(4)), nn.Linear(6, 3)))

    found = depgraph.prune(
        build(), BATCHES[0], pruning_ratio=0.3, depth=depgraph.Depth(keep=3), calibration=BATCHES, recover=HOW
    )
    names = {found.plan.new_name(b.weight) for b in found.plan.biases}
    assert names
    assert all(found.model.get_submodule(n.rpartition(".")[0]).bias is not None for n in names)
    depgraph.save(found, tmp_path / "short")
    loaded = depgraph.load(build, tmp_path / "short")
    assert torch.equal(loaded(BATCHES[0]), found.model(BATCHES[0]))
    assert found.report.recovery.output[1] < found.report.recovery.output[0]


def test_an_optimizer_goes_on_with_it():
    model, small, plan, _ = mlp()
    groups = [
        {"params": [model.b.weight], "lr": 0.5},
        {"params": [model.a.weight, model.a.bias, model.c.weight]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    model(BATCHES[0]).sum().backward()
    optimizer.step()
    depgraph.apply_to_optimizer(plan, optimizer, model, small)
    first, second = (group["params"] for group in optimizer.param_groups)
    assert [id(p) for p in first] == [id(small.b.weight), id(small.b.bias)]
    assert id(small.c.bias) in map(id, second)
    bare = depgraph.apply(model, depgraph.Plan(plan.cuts, plan.shapes))
    with pytest.raises(PlanError, match=r"'b\.bias', which the plan adds"):
        depgraph.apply_to_optimizer(plan, torch.optim.SGD(model.parameters(), lr=0.1), model, bare)


# ------------------------------------------------------------------------------------------------ budgets, arguments


@pytest.mark.parametrize(
    "budget", [{"max_params": 0.5}, {"max_bytes": 0.5}, {"max_params": 0.5, "depth": True}]
)
def test_budgets_count_it(budget: dict[str, Any]):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 40, bias=False), nn.ReLU(), nn.Linear(40, 30, bias=False), nn.ReLU(),
        nn.Linear(30, 3),
    ).double()  # fmt: skip
    whole = sum(p.numel() for p in model.parameters())
    options = {"importance": "l1", "calibration": BATCHES, **budget}
    if "depth" in budget:
        model = nn.Sequential(model[0], Residual(40), Residual(40), nn.Linear(40, 3)).double()
        whole = sum(p.numel() for p in model.parameters())
    found = depgraph.prune(model, BATCHES[0], recover=HOW, **options)
    assert found.report.recovery.biases
    assert 0.4 * whole < sum(p.numel() for p in found.model.parameters()) <= 0.5 * whole


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def test_as_many_as_there_is_room_for():
    model = randomised(Mlp())
    _, _, told = recovered(model, {"a.weight": KEEP, "b.weight": ROWS}, BATCHES, HOW, room=4)
    assert told.biases == ["c.bias"]
    assert ("b.weight", "would get a bias, and the budget has no room for it") in told.skipped


def test_bad_arguments():
    model = randomised(Mlp())
    how: dict[str, Any] = {"calibration": BATCHES}
    for alone in (["new_bias"], ["new_bias", "statistics"]):
        with pytest.raises(InputError, match="finds values for new biases: give"):
            depgraph.prune(model, BATCHES[0], recover=alone, **how)
    with pytest.raises(InputError, match="and 'new_bias'"):
        depgraph.prune(model, BATCHES[0], recover="new_bias", **how)
    with pytest.raises(InputError, match=r"uniform=True .* 'new_bias'"):
        depgraph.prune(model, BATCHES[0], recover=HOW, uniform=True, **how)
    with pytest.raises(InputError, match="the files of the checkpoint lack"):
        depgraph.checkpoint.prune("there", BATCHES[0], out="here", recover=HOW, **how)
    with pytest.raises(InputError, match="room must be a whole number"):
        recovered(model, {"a.weight": KEEP}, BATCHES, HOW, room=-1)
