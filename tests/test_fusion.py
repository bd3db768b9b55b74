"""Batch norms folded into the layers before them: equal values, and every case in which a norm has to stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import assert_untouched, call, output_tensors, snapshot
from random_networks import random_network
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as fx_fuse
from torch.nn.utils import parametrizations

import depgraph

X = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ready(model: nn.Module) -> nn.Module:
    """In float64, with statistics that a training run would leave, in eval mode."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.weight, module.bias):
                if tensor is not None:
                    nn.init.normal_(tensor)
            if module.running_var is not None:
                nn.init.uniform_(module.running_var, 0.3, 3)
    return model.double().eval()


def check(model: nn.Module, x: Tensor = X) -> depgraph.Simplified:
    before = snapshot(model)
    result = depgraph.fuse(model, x)
    assert_untouched(model, before)
    for given in (x, torch.randn_like(x)):
        torch.testing.assert_close(result.model(given), model(given), rtol=1e-9, atol=1e-9)
    assert result.report.verification.status == "equal"
    assert result.report.verification.max_error < 1e-9
    return result


class Lambda(nn.Module):
    def __init__(self, code: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.code = code
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


def kept(result: depgraph.Simplified) -> str:
    """The reason why the one norm of a network stays."""
    assert result.plan.fusions == []
    (note,) = result.report.notes
    return note


LAYERS = {
    "convolution": nn.Conv2d(4, 6, 3),
    "no bias": nn.Conv2d(4, 6, 3, bias=False),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4, bias=False),
    "padded by reflection": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "transposed": nn.ConvTranspose2d(4, 6, 3, stride=2),
    "transposed and grouped": nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("affine", [True, False])
def test_a_convolution(kind: str, affine: bool) -> None:
    layer = copy.deepcopy(LAYERS[kind])
    net = ready(
        nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels, affine=affine), nn.ReLU(inplace=True))
    )
    result = check(net)
    assert isinstance(result.model[1], nn.Identity)
    assert result.plan.mask("0.weight").all()
    assert not result.plan.mask("1.running_mean").any()


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer(bias: bool) -> None:
    net = ready(nn.Sequential(nn.Flatten(), nn.Linear(196, 5, bias=bias), nn.BatchNorm1d(5)))
    assert isinstance(check(net).model[2], nn.Identity)


def test_one_and_three_dims() -> None:
    assert check(ready(nn.Sequential(nn.Conv1d(7, 5, 3), nn.BatchNorm1d(5))), X[:, 0]).plan.fusions
    assert check(
        ready(nn.Sequential(nn.Conv3d(2, 5, 3), nn.BatchNorm3d(5))),
        X.view(2, 2, 2, 7, 7).repeat(1, 1, 2, 1, 1),
    ).plan.fusions


def test_where_torchs_own_fusion_is_wrong() -> None:
    """A convolution that is called twice, once without the norm."""
    net = ready(
        Lambda(lambda m, x: m.norm(m.conv(x)) + m.conv(x), conv=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6))
    )
    theirs = fx_fuse(copy.deepcopy(net).float())(X.float()).double()
    assert (theirs - net(X)).abs().max() > 0.1
    assert "'conv' is shared: called 2 times" in kept(check(net))


def test_code_that_fx_cant_trace() -> None:
    def code(m: nn.Module, x: Tensor) -> Tensor:
        y = m.norm(m.conv(x))
        return y.relu() if y.sum() > 0 else y.tanh()

    assert check(ready(Lambda(code, conv=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6)))).plan.fusions


STAYS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "read twice": (
        lambda: Lambda(lambda m, x: m.n(y := m.c(x)) + y, c=nn.Conv2d(4, 6, 3), n=nn.BatchNorm2d(6)),
        "the result of 'c' is also read at",
    ),
    "shared norm": (
        lambda: Lambda(lambda m, x: m.n(m.c(x)) + m.n(m.d(x)), c=nn.Conv2d(4, 6, 3), d=nn.Conv2d(4, 6, 3), n=nn.BatchNorm2d(6)),
        "it is shared: called 2 times",
    ),
    "no statistics": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)),
        "no running statistics",
    ),
    "something between": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)),
        "not the result of a convolution or linear layer itself",
    ),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), "not the result of a convolution"),
    "computed weight": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)),
        "the weight of '0' is computed",
    ),
    "another dim": (
        lambda: nn.Sequential(nn.Linear(7, 7), nn.Flatten(1, 2), nn.Linear(7, 7), nn.BatchNorm1d(28)),
        "not its channels",
    ),
    "never called": (lambda: Lambda(lambda m, x: m.c(x), c=nn.Conv2d(4, 6, 3), n=nn.BatchNorm2d(6)), "no run"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STAYS)
def test_what_stays_and_why(kind: str) -> None:
    make, why = STAYS[kind]
    net = ready(make())
    result = check(net)
    assert why in kept(result)
    assert len(result.model.state_dict()) == len(net.state_dict())


def test_ties_and_hooks_stay() -> None:
    tied = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    tied[2].weight = tied[0].weight
    assert "is tied" in kept(check(ready(tied)))
    for i in (0, 1):
        hooked = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        hooked[i].register_forward_hook(lambda module, args, out: out * 2)
        assert "hooks" in kept(check(ready(hooked)))
        hooked = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        hooked[i].register_forward_hook(lambda module, args, out: None)
        assert "has hooks" in kept(check(ready(hooked)))


class Doubling(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_norm_with_code_of_its_own_stays() -> None:
    assert "the forward of Doubling is its own" in kept(
        check(ready(nn.Sequential(nn.Conv2d(4, 6, 3), Doubling(6))))
    )


class NormAndActivation(nn.BatchNorm2d):
    """A norm with an activation in it, as some libraries have them."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.drop, self.act = nn.Dropout(0.3), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Backwards(NormAndActivation):
    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, self.act(x))


class Twice(NormAndActivation):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.act(nn.BatchNorm2d.forward(self, x)))


def test_a_norm_with_modules_in_it_leaves_them() -> None:
    result = check(ready(nn.Sequential(nn.Conv2d(4, 6, 3), NormAndActivation(6))))
    assert [type(m) for m in result.model[1]] == [nn.Dropout, nn.SiLU]
    assert "result of a convolution" in kept(check(ready(nn.Sequential(nn.Conv2d(4, 6, 3), Backwards(6)))))
    assert "the result would differ" in kept(check(ready(nn.Sequential(nn.Conv2d(4, 6, 3), Twice(6)))))


def test_train_mode_is_refused() -> None:
    net = ready(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    net[1].train()
    before = snapshot(net)
    with pytest.raises(depgraph.InputError, match=r"'1' in train mode(.|\n)*call model.eval\(\)"):
        depgraph.fuse(net, X)
    assert_untouched(net, before)
    with pytest.raises(depgraph.InputError, match=r"call model.eval\(\)"):
        depgraph.fuse(net.train(), X)


def test_bad_input() -> None:
    with pytest.raises(depgraph.InputError, match=r"torch\.nn\.Module"):
        depgraph.fuse("net", X)  # type: ignore[arg-type]
    with pytest.raises(depgraph.InputError, match="no example inputs"):
        depgraph.fuse(nn.Sequential(nn.Conv2d(4, 6, 3)).eval(), None)
    net = ready(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    nn.init.constant_(net[0].weight, float("nan"))
    with pytest.raises(depgraph.InputError, match=r"NaN or infinite values in '0\.weight'"):
        depgraph.fuse(net, X)


def test_a_plan_replays_and_is_saved(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return ready(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)))

    net = make()
    result = depgraph.fuse(net, X)
    plan = depgraph.Plan.from_json(result.plan.to_json())
    other = make()
    nn.init.normal_(other[0].weight)
    torch.testing.assert_close(depgraph.apply(other, plan)(X), other(X), rtol=1e-9, atol=1e-9)
    again = depgraph.load(make, depgraph.save(result, tmp_path / "fused"))
    assert torch.equal(again(X), result.model(X))
    with pytest.raises(depgraph.PlanError, match="can't go into"):
        depgraph.apply(result.model, plan)
    with pytest.raises(depgraph.PlanError, match="one of them fuses norms"):
        plan.then(plan)


def test_a_fused_model_is_pruned_and_a_pruned_one_fused() -> None:
    net = ready(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3)))
    first = depgraph.prune(depgraph.fuse(net, X).model, X, pruning_ratio=0.5).model
    assert first[0].bias.shape == (3,)
    small = depgraph.prune(net, X, pruning_ratio=0.5).model
    torch.testing.assert_close(check(small).model(X), small(X))


def test_wrappers_and_low_precision() -> None:
    net = ready(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    assert isinstance(check(nn.DataParallel(net).eval()).model.module[1], nn.Identity)
    low = copy.deepcopy(net).bfloat16()
    result = depgraph.fuse(low, X.bfloat16())
    assert result.model[0].weight.dtype == torch.bfloat16
    assert result.report.verification.max_error < 1e-9


class Scaled(nn.Module):
    """A norm whose scale is multiplied in forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """Norms that several layers read, that are also read elsewhere, and whose layers have a norm of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.four = (
            nn.LayerNorm(8),
            Scaled(8),
            nn.RMSNorm(8),
            nn.LayerNorm(8, bias=False),
        )
        self.q, self.k, self.up, self.down = (
            nn.Linear(8, 8),
            nn.Linear(8, 8, bias=False),
            nn.Linear(8, 8, bias=False),
            nn.Linear(8, 8),
        )
        self.batch, self.last = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        x = x + torch.tanh(self.q(y)) * self.k(y)
        x = x + self.batch(self.up(self.two(x)))
        y = self.three(x)
        return self.last(self.four(x + y + self.down(y)))


def test_scales_of_norms_into_linear_layers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = ready(Block())
    for parameter in net.parameters():
        nn.init.normal_(parameter, 1)
    x = torch.randn(5, 8, dtype=torch.float64)
    assert depgraph.fuse(net, x).plan.scales == []
    result = depgraph.fuse(net, x, scales=True)
    for given in (x, torch.randn_like(x)):
        torch.testing.assert_close(result.model(given), net(given), rtol=1e-10, atol=1e-10)
    moved = {s.scale: (s.shift, s.layers) for s in result.plan.scales}
    assert moved == {
        "one.weight": ("one.bias", ("q", "k")), "two.scale": (None, ("up",)), "four.weight": (None, ("last",)),
    }  # fmt: skip
    assert len(result.plan.fusions) == 1
    assert (result.model.one.weight == 1).all()
    assert not result.model.one.bias.any()
    assert (result.model.two.scale == 1).all()
    assert torch.equal(result.model.three.weight, net.three.weight)  # also read by the sum
    assert result.model.k.bias is not None
    plan = depgraph.Plan.from_json(result.plan.to_json())
    torch.testing.assert_close(depgraph.apply(net, plan)(x), net(x))
    again = depgraph.load(lambda: ready(Block()), depgraph.save(result, tmp_path / "moved"))
    assert torch.equal(again(x), result.model(x))
    with pytest.raises(depgraph.PlanError, match="invalid scale"):
        depgraph.Plan.from_json(result.plan.to_json().replace('["two.scale"', '["no.scale"'))
    with pytest.raises(depgraph.InputError, match="scales must be True or False"):
        depgraph.fuse(net, x, scales=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 200, 15))])
def test_random_networks(start: int) -> None:
    fused = 0
    for seed in range(start, start + (15 if start else 2)):
        model, inputs = random_network(seed)
        model.eval()
        result = depgraph.fuse(model, inputs)
        fused += len(result.plan.fusions)
        other = tuple(torch.randn_like(t) for t in inputs)
        for given in (inputs, other):
            pairs = zip(
                output_tensors(call(result.model, given)), output_tensors(call(model, given)), strict=True
            )
            for got, wanted in pairs:
                torch.testing.assert_close(
                    got, wanted, rtol=1e-9, atol=1e-9, msg=lambda text, seed=seed: f"seed {seed}: {text}"
                )
    assert fused
