"""Functions of functions in forward: vmap, grad, jvp, jacrev, and gradients that forward itself takes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import depgraph


class Base(nn.Module):
    """Three layers; the hidden width of the last one is what the functions range over."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 16), nn.Linear(16, 5)
        self.w = nn.Parameter(torch.randn(3, 16, 16))

    def hidden(self, x: Tensor) -> Tensor:
        return self.a(self.i(x)).tanh()


class VmapOfLayers(Base):
    def forward(self, x: Tensor) -> Tensor:
        return vmap(lambda row: self.b(self.hidden(row)))(x)


class VmapOfEntries(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.b(vmap(lambda p, q: p * q)(h, h.roll(1, 0)))


class VmapWithSizes(Base):
    """The width scales: it stays."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.b(h * vmap(lambda p: p.sum() / p.shape[0])(h)[:, None])


class VmapWithViews(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(vmap(lambda p: p.view(2, p.shape[0] // 2).flip(0).reshape(-1))(self.hidden(x)))


class VmapOverChannels(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(vmap(lambda c: c * 2 - c.mean(), in_dims=1, out_dims=1)(self.hidden(x)))


class VmapOfWeights(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.b(vmap(lambda w: h @ w)(self.w).mean(0))


class VmapInVmap(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.b(vmap(lambda p: vmap(lambda w: p @ w)(self.w))(h).sum(1))


class Grad(Base):
    def forward(self, x: Tensor) -> Tensor:
        return vmap(grad(lambda row: self.b(self.hidden(row)).sum()))(x)


class GradOfHidden(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(grad(lambda t: (t.tanh() * t).sum())(self.hidden(x)))


class Jvp(Base):
    def forward(self, x: Tensor) -> Tensor:
        y, tangent = jvp(lambda row: self.b(self.hidden(row)), (x,), (torch.ones_like(x),))
        return y + tangent


class Jacobian(Base):
    def forward(self, x: Tensor) -> Tensor:
        return vmap(jacrev(lambda row: self.b(self.hidden(row))))(x)


class Functional(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(functional_call(self.a, dict(self.a.named_parameters()), (self.i(x),)))


class Gradient(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.b(F.softplus(self.a(F.silu(self.i(x))))).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]


class GradientInGradMode(Base):
    """Without grad mode it raises."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.b(F.gelu(self.hidden(x))).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


SMALLER = [VmapOfLayers, VmapOfEntries, VmapOfWeights, VmapInVmap, Grad, Jacobian, Functional, Gradient]
HELD = [VmapWithSizes, VmapWithViews, VmapOverChannels, GradOfHidden, Jvp, GradientInGradMode]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*SMALLER, *HELD], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("verify", [False, True])
def test_a_function_of_a_function(kind: Any, verify: bool) -> None:
    """Right also where nothing is verified; what can't be followed stays."""
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(3, 6)
    try:
        result = depgraph.prune(model, x, pruning_ratio=0.5, verify=verify)
    except depgraph.NothingToPruneError:
        assert kind in HELD
        return
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in masked.named_parameters():
            p.mul_(result.plan.mask(name))
    torch.testing.assert_close(result.model(x), masked(x), rtol=1e-4, atol=1e-5)
    assert kind in HELD or result.model.a.out_features < 16


class GradientThroughNorm(nn.Module):
    """The gradient of an energy of normalised units, added to them."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.energy, self.b = nn.Linear(6, 12), norm, nn.Linear(12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            h = self.a(x)
            h = h if h.requires_grad else h.requires_grad_()
            (change,) = torch.autograd.grad(self.energy(self.norm(h).tanh()).sum(), h)
        return self.b(h + change)


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(12), nn.LayerNorm(12, elementwise_affine=False), nn.GroupNorm(3, 12), nn.GroupNorm(1, 12)],
    ids=str,
)
def test_the_gradient_of_a_norm_is_over_kept_units(norm: nn.Module) -> None:
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0)
    model, x = GradientThroughNorm(norm).double(), torch.randn(3, 6).double()
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    assert result.report.verification.status == "equal"
    keep = result.plan.mask("a.weight")[:, 0].nonzero().flatten()
    weights = None if norm.weight is None else (norm.weight[keep], norm.bias[keep])
    h = (x @ model.a.weight[keep].T + model.a.bias[keep]).detach().requires_grad_()
    if isinstance(norm, nn.GroupNorm):
        unit = F.group_norm(h, norm.num_groups, *weights)
    else:
        unit = F.layer_norm(h, (len(keep),), *(weights or ()))
    (change,) = torch.autograd.grad((unit.tanh() @ model.energy.weight[0, keep]).sum(), h)
    expected = (h + change) @ model.b.weight[:, keep].T + model.b.bias
    torch.testing.assert_close(result.model(x), expected)
    assert not any("did not verify" in str(lock) for lock in result.report.to_dict()["locks"])
    assert result.model.a.out_features == 6


class Squeezed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.hidden(x).unsqueeze(0).squeeze())


def test_a_squeeze_without_a_dim_keeps_two_units() -> None:
    model, x = Squeezed(), torch.randn(3, 6)
    result = depgraph.prune(model, x, pruning_ratio=0.99, max_ratio=1.0, verify=False)
    assert result.model.a.out_features == 2
    assert result.model(x).shape == (3, 5)
