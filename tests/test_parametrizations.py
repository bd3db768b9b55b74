"""Reparametrised weights: old hooks, parametrizations, masks of `torch.nn.utils.prune`; values by the oracle."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import prune_and_check, random_importance
from small_models import Plain, fresh, pixels
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as masking

import depgraph

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


class Mask(nn.Module):
    """Multiplies a weight by a fixed mask of zeros and ones."""

    def __init__(self, like: Tensor, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.register_buffer("mask", (torch.rand(like.shape) > 0.3).to(dtype))

    def forward(self, weight):
        return weight * self.mask


class RowScale(nn.Module):
    """A factor for each row, whose number it remembers."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows, self.gain = rows, nn.Parameter(torch.rand(rows) + 0.5)

    def forward(self, weight):
        return weight * self.gain.view(self.rows, *[1] * (weight.dim() - 1))


class LowRank(nn.Module):
    """Adds a product of two thin matrices."""

    def __init__(self, rows: int, columns: int, rank: int = 5):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(rank, columns)), nn.Parameter(torch.randn(rows, rank))

    def forward(self, weight):
        return weight + self.up @ self.down


class Standardised(nn.Module):
    """Zero mean and unit variance in every filter."""

    def forward(self, weight):
        mean, var = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), keepdim=True)
        return (weight - mean) / (var + 1e-5).sqrt()


class Exponential(nn.Module):
    def forward(self, weight):
        return weight.exp()

    def right_inverse(self, weight):
        return weight.abs().log()


def old(function: Callable[..., Any], **options: Any) -> Callable[[Plain], None]:
    def change(net: Plain) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            function(net.b, **options)
            function(net.c, **options)

    return change


def registered(**made: Callable[[nn.Module], nn.Module]) -> Callable[[Plain], None]:
    def change(net: Plain) -> None:
        for name, make in made.items():
            module = net.get_submodule(name)
            parametrize.register_parametrization(module, "weight", make(module))

    return change


def both(function: Callable[..., Any], **options: Any) -> Callable[[Plain], None]:
    def change(net: Plain) -> None:
        function(net.b, **options)
        function(net.c, **options)

    return change


def boolean_masks(net: Plain) -> None:
    parametrize.register_parametrization(net.b, "weight", Mask(net.b.weight, torch.bool))
    parametrize.register_parametrization(net.c, "bias", Mask(net.c.bias, torch.bool))


def torch_pruned(net: Plain) -> None:
    masking.l1_unstructured(net.b, "weight", amount=0.3)
    masking.random_unstructured(net.c, "weight", amount=0.3)
    masking.l1_unstructured(net.c, "bias", amount=0.3)


def several(net: Plain) -> None:
    parametrize.register_parametrization(net.c, "weight", RowScale(13))
    parametrize.register_parametrization(net.c, "weight", Mask(net.c.weight))
    parametrizations.weight_norm(net.b)
    parametrizations.spectral_norm(net.a)


def symmetric(net: Plain) -> None:
    class Symmetric(nn.Module):
        def forward(self, weight):
            return (weight + weight.T) / 2

    net.c, net.head = nn.Linear(11, 11), nn.Linear(11, 3)
    parametrize.register_parametrization(net.c, "weight", Symmetric())


REPARAMETRISED: dict[str, Callable[[Plain], None]] = {
    "old weight norm": old(nn.utils.weight_norm),
    "old weight norm over columns": old(nn.utils.weight_norm, dim=1),
    "old weight norm over all": old(nn.utils.weight_norm, dim=None),
    "weight norm": both(parametrizations.weight_norm),
    "weight norm over columns": both(parametrizations.weight_norm, dim=1),
    "weight norm over all": both(parametrizations.weight_norm, dim=None),
    "old spectral norm": old(nn.utils.spectral_norm),
    "spectral norm": both(parametrizations.spectral_norm),
    "spectral norm of columns": both(parametrizations.spectral_norm, dim=1),
    "torch.nn.utils.prune": torch_pruned,
    "mask": registered(b=lambda m: Mask(m.weight), c=lambda m: Mask(m.weight)),
    "boolean mask": boolean_masks,
    "factor for each row": registered(b=lambda _: RowScale(11), c=lambda _: RowScale(13)),
    "low rank": registered(c=lambda _: LowRank(13, 11)),
    "standardised": registered(b=lambda _: Standardised()),
    "symmetric": symmetric,
    "exponential": registered(c=lambda _: Exponential()),
    "several": several,
}


def reparametrised(how: str, seed: int = 0, train: bool = False) -> nn.Module:
    def build() -> nn.Module:
        net = Plain()
        REPARAMETRISED[how](net)
        return net

    net = fresh(build, seed)
    with torch.no_grad():
        net(*pixels())  # old hooks leave a weight with a history, which deepcopy (of the oracle) refuses
    return net.train(train)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("how", REPARAMETRISED)
def test_reparametrised_weights(how: str, train: bool) -> None:
    """Values, state and names by the oracle; every layer but the first's input and the last's output shrinks."""
    net = reparametrised(how, train=train)
    result = prune_and_check(net, pixels(), check_inputs=pixels(1), pruning_ratio=0.5)
    small = result.model
    widths = [small.b.out_channels, small.b.in_channels, small.c.in_features, small.c.out_features]
    assert widths == [6, 4, 6, 6 if how == "symmetric" else 7]
    for module in (small.b, small.c):
        assert module.weight.shape[:2] == (
            getattr(module, "out_channels", 0) or module.out_features,
            getattr(module, "in_channels", 0) or module.in_features,
        )
    assert depgraph.prune(net, pixels()).report.verification.status == "equal"
    prune_and_check(net, pixels(), pruning_ratio=0.4, importance=random_importance(3))


@pytest.mark.slow
@pytest.mark.parametrize("how", REPARAMETRISED)
def test_reparametrised_weights_in_place(how: str) -> None:
    """The same object gets the weights that the copy would have got, and the parametrizations can be taken off it."""
    net = reparametrised(how)
    copied = depgraph.prune(net, pixels()).model
    changed = depgraph.prune(net, pixels(), inplace=True).model
    assert changed is net
    wanted = copied(*pixels(2))
    torch.testing.assert_close(net(*pixels(2)), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in (net.a, net.b, net.c):
            take_off(module)
    assert {n.rpartition(".")[2] for n in net.state_dict()} == {"weight", "bias"}
    torch.testing.assert_close(net(*pixels(2)), wanted)


def take_off(module: nn.Module) -> None:
    """Bake every parametrization, of either kind, into the weight."""
    for name in list(getattr(module, "parametrizations", ())):
        parametrize.remove_parametrizations(module, name)
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, masking.BasePruningMethod):
            masking.remove(module, hook._tensor_name)
        elif type(hook).__name__ == "WeightNorm":
            nn.utils.remove_weight_norm(module)
        elif type(hook).__name__ == "SpectralNorm":
            nn.utils.remove_spectral_norm(module)


@pytest.mark.parametrize("kind", ["matrix_exp", "cayley", "householder"])
def test_orthogonal_weights_stay_whole_and_say_why(kind: str) -> None:
    """Rows of an orthogonal matrix are not orthogonal columns any more: the promise is kept, the rest shrinks."""

    def build() -> nn.Module:
        net = Plain()
        parametrizations.orthogonal(net.c, orthogonal_map=kind)
        return net

    net = fresh(build)
    result = prune_and_check(net, pixels(), pruning_ratio=0.5)
    assert result.model.a.weight.shape == (4, 3, 3, 3)
    torch.testing.assert_close(result.model.c.weight, net.c.weight)
    reasons = {str(f.reason) for f in depgraph.analyze(net, pixels()).frozen if f.name.startswith("c.")}
    assert any("c.parametrizations.weight" in r for r in reasons), reasons


def test_reading_a_spectral_norm_moves_no_buffer() -> None:
    """Surgery looks at the shape of a weight whose reading, in train mode, is a step of the power iteration."""
    net = reparametrised("spectral norm", train=True)
    plan = depgraph.prune(net, pixels()).plan
    small = depgraph.apply(net, plan)
    name = "b.parametrizations.weight.0._u"
    before = net.state_dict()[name]
    assert torch.equal(small.state_dict()[name], before[plan.mask(name)])


@pytest.mark.parametrize(
    "how", ["weight norm", "old weight norm", "old spectral norm", "torch.nn.utils.prune"]
)
def test_a_pruned_reparametrised_model_copies_saves_and_is_pruned_again(how: str) -> None:
    small = depgraph.prune(reparametrised(how), pixels()).model
    again = copy.deepcopy(small)
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(*pixels(1)), small(*pixels(1)))
    prune_and_check(small, pixels(), pruning_ratio=0.5)


def test_a_boolean_choice_of_two_is_no_permutation() -> None:
    class Choice(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(5, 2), nn.Linear(1, 3)
            self.register_buffer("chosen", torch.tensor([False, True]))

        def forward(self, x):
            return self.leave(self.enter(x)[:, self.chosen])

    with pytest.raises(depgraph.NothingToPruneError, match="index"):
        depgraph.prune(fresh(Choice), (torch.randn(2, 5, dtype=torch.float64),))
