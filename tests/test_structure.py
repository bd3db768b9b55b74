"""Models as users have them: reparametrised, wrapped, tied, lazily built, with ops and inputs of their own.

Each is pruned and held against the oracle, so a test here is about values and never only about a forward that runs.
"""

from __future__ import annotations

import copy
import importlib.util
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from checks import prune_and_check, random_importance
from oracle import assert_equal_to_masked, assert_state_matches_plan, assert_untouched, snapshot
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as masking
from zoo_entry import ready

import depgraph
from depgraph.base.values import tensor_leaves

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def pixels(seed: int = 0) -> tuple[Tensor]:
    return (torch.randn(2, 3, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),)


def fresh(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network in float64 with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ready(build(), seed)


# ------------------------------------------------------------------------------------------------ parametrizations


class Plain(nn.Module):
    """Two convolutions and two linears; what a test reparametrises are `b` and `c`."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(7, 11, 3, padding=1)
        self.c, self.head = nn.Linear(11, 13), nn.Linear(13, 3)

    def forward(self, x):
        x = F.gelu(self.b(F.gelu(self.a(x)))).mean((2, 3))
        return self.head(F.gelu(self.c(x)))


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


# ------------------------------------------------------------------------------------------------ several inputs


def vectors(width: int, rows: int = 2, seed: int = 0) -> Tensor:
    dice = torch.Generator().manual_seed(1000 * width + seed)
    return torch.randn(rows, width, dtype=torch.float64, generator=dice)


class Branches(nn.Module):
    """What runs depends on which inputs are given."""

    def __init__(self):
        super().__init__()
        self.enter, self.other, self.body = nn.Linear(5, 11), nn.Linear(7, 11), nn.Linear(11, 13)
        self.extra, self.head = nn.Linear(11, 13), nn.Linear(13, 3)

    def forward(self, x, y=None, *, deep=False):
        h = F.gelu(self.enter(x))
        if y is not None:
            h = h + self.other(y)
        z = self.body(h) + self.extra(h) if deep else self.body(h)
        return self.head(F.gelu(z))


BRANCHES = depgraph.Examples(vectors(5), (vectors(5, 3), vectors(7, 3)), {"x": vectors(5), "deep": True})


def test_several_inputs_are_one_graph() -> None:
    """What only one of the runs reaches is pruned with what all share, and every run of the result is right."""
    net = fresh(Branches)
    assert set(depgraph.analyze(net, vectors(5)).trace.unreached) == {
        "other.weight", "other.bias", "extra.weight", "extra.bias"
    }  # fmt: skip
    result = depgraph.prune(net, BRANCHES)
    shapes = {n: tuple(p.shape) for n, p in result.model.named_parameters() if n.endswith("weight")}
    assert shapes == {
        "enter.weight": (6, 5), "other.weight": (6, 7), "body.weight": (7, 6), "extra.weight": (7, 6),
        "head.weight": (3, 7),
    }  # fmt: skip
    x, y = vectors(5, seed=9), vectors(7, seed=9)
    for inputs in ((x,), (x, y), {"x": x, "y": y, "deep": True}):
        prune_and_check(net, BRANCHES, check_inputs=inputs, pruning_ratio=0.5)
    assert result.report.verification.status == "equal"


def test_every_input_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that only the last example shows is found."""
    net, small = fresh(Branches), depgraph.prune(fresh(Branches), BRANCHES)
    assert depgraph.verify(net, small.model, small.plan, BRANCHES).status == "equal"
    with torch.no_grad():
        small.model.extra.bias[0] += 1
    assert depgraph.verify(net, small.model, small.plan, vectors(5)).status == "equal"
    with pytest.raises(depgraph.VerificationError, match="deviates"):
        depgraph.verify(net, small.model, small.plan, BRANCHES)


def test_costs_of_several_inputs_add_up() -> None:
    net = fresh(Branches)
    total = sum(depgraph.count_macs(net, e) for e in BRANCHES.examples)
    assert depgraph.count_macs(net, BRANCHES) == total
    result = depgraph.prune(net, BRANCHES, max_macs=0.5)
    assert result.report.macs[0] == total
    assert 0.2 * total < result.report.macs[1] <= total // 2


def test_a_list_is_still_one_example() -> None:
    """Positional arguments in a list are no list of examples."""
    net = fresh(Branches)
    assert set(depgraph.analyze(net, [vectors(5), vectors(7)]).trace.unreached) == {
        "extra.weight",
        "extra.bias",
    }


@pytest.mark.parametrize(
    "make", [depgraph.Examples, lambda: depgraph.Examples(BRANCHES), lambda: depgraph.Examples(())]
)
def test_examples_without_an_example_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(depgraph.InputError, match="xample"):
        depgraph.prune(fresh(Branches), make())


# ------------------------------------------------------------------------------------------------ what no run reached


class Expert(nn.Module):
    """Remembers widths, writes one down, and normalises: all that must follow when nobody calls it."""

    def __init__(self, width: int, inner: int = 12):
        super().__init__()
        self.width, self.heads = width, 2
        self.up, self.norm, self.down = (
            nn.Linear(width, inner),
            nn.GroupNorm(3, inner),
            nn.Linear(inner, width),
        )
        self.gain = nn.Parameter(torch.ones(width))
        self.before = nn.LayerNorm(width)

    def forward(self, x):
        x = self.before(x.reshape(-1, self.width)) * self.gain
        x = self.norm(self.up(x).view(x.shape[0], 12))
        x = x.view(x.shape[0], self.heads, -1).tanh().flatten(1)
        return self.down(x)


class Tabled(nn.Module):
    """Holds tables of both widths as plain attributes."""

    def __init__(self, width: int, inner: int = 11):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.tables = [torch.rand(width).double() + 0.5, torch.rand(inner).double() + 0.5]

    def forward(self, x):
        return self.down(self.up(x * self.tables[0]).tanh() * self.tables[1])


class Mixture(nn.Module):
    """Each row goes to the expert that its first entry names."""

    def __init__(self, experts: nn.Module, width: int = 7):
        super().__init__()
        self.enter, self.experts, self.head = nn.Linear(5, width), experts, nn.Linear(width, 3)

    def forward(self, x):
        rows, chosen = F.gelu(self.enter(x)), (x[:, 0].abs() * 10).long() % len(self.experts)
        out = torch.zeros_like(rows)
        for name, expert in enumerate(
            self.experts.values() if isinstance(self.experts, nn.ModuleDict) else self.experts
        ):
            at = (chosen == name).nonzero().flatten()
            if at.numel():
                out = out.index_add(0, at, expert(rows[at]))
        return self.head(rows + out)


def naming(*experts: int) -> Tensor:
    """Rows that go to these experts."""
    x = vectors(5, len(experts), seed=len(experts))
    x[:, 0] = torch.tensor(experts, dtype=torch.float64) / 10 + 0.05
    return x


EVERY = naming(*range(5), *range(5), *range(5))
MIXTURES = {
    "list": lambda: Mixture(nn.ModuleList(Expert(7) for _ in range(5))),
    "dict": lambda: Mixture(nn.ModuleDict({c: Expert(7) for c in "abcde"})),
    "simple": lambda: Mixture(
        nn.ModuleList(nn.Sequential(nn.Linear(7, 11), nn.GELU(), nn.Linear(11, 7)) for _ in range(5))
    ),
    "with tables": lambda: Mixture(nn.ModuleList(Tabled(7) for _ in range(5))),
    "of one layer": lambda: Mixture(nn.ModuleList(nn.Linear(7, 7) for _ in range(5))),
}  # fmt: skip


@pytest.mark.parametrize("chosen", [(2,), (2, 2, 4), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_that_nobody_chose_follow_their_siblings(kind: str, chosen: tuple[int, ...]) -> None:
    """All experts shrink alike, in values too: the check routes rows to those that the trace never saw."""
    net = fresh(MIXTURES[kind])
    for importance in ("l1", random_importance(5)):
        result = prune_and_check(
            net, naming(*chosen), check_inputs=EVERY, pruning_ratio=0.5, importance=importance
        )
        shapes = [[p.shape for p in e.parameters()] for e in result.model.experts.children()]
        assert all(s == shapes[0] for s in shapes), shapes
        assert sum(p.numel() for p in result.model.parameters()) < 0.6 * sum(
            p.numel() for p in net.parameters()
        )
    data = depgraph.prune(net, naming(*chosen)).report.to_dict()
    assert len(data["followed"]) == 5 - len(set(chosen))
    assert not data["unreached"]


def test_siblings_with_other_numbers_are_not_followed() -> None:
    """The same shapes, cut up differently in forward: what holds for one says nothing of the other."""

    def build() -> nn.Module:
        net = Mixture(nn.ModuleList(Expert(7) for _ in range(3)))
        net.experts[1].heads = 3
        return net

    graph = depgraph.analyze(fresh(build), naming(0))
    assert [(s.path, s.executed) for s in graph.followed] == [("experts.2", "experts.0")]
    assert "experts.1.up.weight" in graph.trace.unreached


class Nested(nn.Module):
    """Layers of experts: one layer calls none of its own, but the layer before does."""

    def __init__(self):
        super().__init__()
        self.enter, self.head = nn.Linear(5, 7), nn.Linear(7, 3)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"mix": nn.Linear(7, 13), "out": nn.Linear(13, 7), "experts": nn.ModuleList(
                    nn.Sequential(nn.Linear(13, 11), nn.GELU(), nn.Linear(11, 13)) for _ in range(2))}
            )
            for _ in range(3)
        )  # fmt: skip

    def forward(self, x, plan=((0,), (), (1,))):
        h = self.enter(x)
        for layer, chosen in zip(self.layers, plan, strict=True):
            y = layer["mix"](h)
            for i in chosen:
                y = y + layer["experts"][i](y)
            h = h + layer["out"](F.gelu(y))
        return self.head(h)


def test_a_layer_whose_experts_were_not_called_follows_another_layer() -> None:
    """Its own width (13, each layer's own) is read off what it did run."""
    net = fresh(Nested)
    x = vectors(5)
    result = prune_and_check(net, (x,), check_inputs=(x, ((0, 1), (0, 1), (1,))), pruning_ratio=0.5)
    prune_and_check(
        net, (x,), check_inputs=(x, ((1,), (0, 1), (0,))), pruning_ratio=0.5, importance=random_importance(2)
    )
    assert result.model.layers[1]["experts"][0][0].weight.shape == (6, 7)


class Chain(nn.Module):
    """Layers of one width in a row, without a residual sum: each has a different axis before and behind it."""

    def __init__(self):
        super().__init__()
        self.enter, self.head = nn.Linear(5, 7), nn.Linear(7, 3)
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(4))

    def forward(self, x, skip=(1,)):
        x = self.enter(x)
        for i, layer in enumerate(self.layers):
            x = x if i in skip else F.gelu(layer(x))
        return self.head(x)


def test_siblings_that_disagree_freeze_what_they_disagree_on() -> None:
    """What a skipped layer ranges over can't be told; it must go on working when it is not skipped."""
    net = fresh(Chain)
    x = vectors(5)
    with pytest.raises(depgraph.NothingToPruneError, match="do not agree"):
        depgraph.prune(net, (x,))


def test_parameters_in_a_list_follow_too() -> None:
    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.head = nn.Linear(5, 7), nn.Linear(7, 3)
            self.maps = nn.ParameterList(nn.Parameter(torch.randn(7, 7)) for _ in range(3))

        def forward(self, x, which=0):
            h = self.enter(x)
            return self.head(h + h @ self.maps[which])

    net = fresh(Tables)
    for which in range(3):
        result = prune_and_check(
            net, (vectors(5),), check_inputs=(vectors(5, seed=1), which), pruning_ratio=0.5
        )
    assert [tuple(p.shape) for p in result.model.maps] == [(4, 4)] * 3


def test_ignoring_an_expert_that_nobody_chose() -> None:
    """Its sizes are those of its executed sibling and of the stream: nothing else is left that could shrink."""
    net = fresh(MIXTURES["simple"])
    with pytest.raises(depgraph.NothingToPruneError, match="executed sibling"):
        depgraph.prune(net, naming(0), pruning_ratio=0.5, ignore=["experts.3.0.weight"])


def test_what_has_no_executed_sibling_stays_and_is_named() -> None:
    result = depgraph.prune(fresh(Branches), (vectors(5),))
    assert result.report.to_dict()["unreached"] == [
        "other.weight",
        "other.bias",
        "extra.weight",
        "extra.bias",
    ]
    text = " ".join(str(result.report).split())
    assert "no run used other.weight, other.bias, extra.weight, extra.bias: left as they are" in text
    assert "depgraph.Examples" in text


# ------------------------------------------------------------------------------------------------ ops of one's own


@torch.library.custom_op("structure::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """An op that does its work outside torch, without a rule."""
    return torch.from_numpy(x.detach().numpy() * 2)


twice.register_fake(torch.empty_like)
twice.register_autograd(lambda _, gradient: gradient * 2)


@torch.library.custom_op("structure::heads", mutates_args=())
def heads_op(x: Tensor, shape: list[int], heads: int) -> Tensor:
    """Each row's heads (x [n, heads * width]) are scaled by a number of their own, 1 / (1 + how many heads there are)."""
    return (x.view(shape[0], heads, -1) * 0.5).flatten(1)


@torch.library.custom_op("structure::scale_", mutates_args=("x",))
def scale_(x: Tensor, weight: Tensor) -> None:
    """Changes its argument and returns nothing."""
    x.mul_(weight)


@torch.library.custom_op("structure::pair", mutates_args=())
def pair(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x @ weight.T, x * 2


def between(function: Callable[[nn.Module, Tensor], Tensor], **attributes: Any) -> nn.Module:
    """Three linear layers with `function` between the first two."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(12, 13), nn.Linear(13, 3)
            self.extra = nn.Parameter(torch.randn(12, 12))
            vars(self).update(attributes)

        def forward(self, x):
            return self.c(F.gelu(self.b(function(self, F.gelu(self.a(x))))))

    return fresh(Net)


def prune_and_verify(net: nn.Module, x: Tensor, **options: Any) -> depgraph.PruneResult:
    """The library's own proof and the oracle's values; for nets that can't be trained."""
    result = depgraph.prune(net, x, **options)
    assert result.report.verification.status == "equal"
    assert_equal_to_masked(net, result, x)
    assert_state_matches_plan(net, result.model, result.plan)
    return result


def frozen_texts(net: nn.Module, x: Tensor, name: str) -> str:
    return " ".join(str(f.reason) for f in depgraph.analyze(net, x).frozen if f.name == name)


def test_an_op_without_a_rule_is_frozen_and_says_what_to_do() -> None:
    net = between(lambda _, x: twice(x))
    result = prune_and_check(net, (vectors(5),), pruning_ratio=0.5)
    assert result.model.a.weight.shape == (12, 5)
    assert result.model.b.weight.shape == (7, 12)
    text = frozen_texts(net, vectors(5), "a.weight")
    assert "structure.twice.default" in text
    assert "depgraph.op_rule" in text
    with pytest.raises(depgraph.UnknownOpError, match=r"structure\.twice.*\n.*\n.*op_rule"):
        depgraph.analyze(net, vectors(5), strict=True)


def test_an_op_that_returns_nothing_freezes_what_it_changes() -> None:
    def change(net: nn.Module, x: Tensor) -> Tensor:
        x = x.clone()
        scale_(x, net.extra[0])
        return x

    net = between(change)
    result = prune_and_verify(net, vectors(5))
    assert result.model.a.weight.shape == (12, 5)
    assert "structure.scale_" in frozen_texts(net, vectors(5), "a.weight")


def test_a_rule_makes_an_op_prunable(stated: Callable[..., Any]) -> None:
    stated("structure::twice")(lambda site: site.dims(site.args[0]))
    result = prune_and_check(between(lambda _, x: twice(x)), (vectors(5),), pruning_ratio=0.5)
    assert result.model.a.weight.shape == (6, 5)


def test_an_equation_and_several_results(stated: Callable[..., Any]) -> None:
    product = depgraph.equation("nk,mk->nm", weight=1)
    stated("structure::pair")(lambda site: [product(site), site.dims(site.args[0])])
    net = between(lambda net, x: torch.add(*pair(x, net.extra)))
    result = prune_and_verify(net, vectors(5))
    assert result.model.extra.shape == (6, 6)  # rows and columns are one axis: the two results are added


@pytest.mark.parametrize("spelling", ["position", "name", "literal"])
def test_numbers_that_a_rule_explains_are_repaired(spelling: str, stated: Callable[..., Any]) -> None:
    @stated("structure::heads")
    def rule(site: depgraph.OpCall) -> Any:
        x = site.dims(site.args[0])
        head, width = site.algebra.factor(x[1], site.arg(2, "heads"))
        site.lock(width, "has a width that means something")
        for place in (2, "heads"):
            site.counts(head, place)
        return x

    calls = {
        "position": lambda net, x: heads_op(x, [x.shape[0]], net.heads),
        "name": lambda net, x: heads_op(x, heads=net.heads, shape=[x.shape[0]]),
        "literal": lambda net, x: net.literal(x),
    }

    class Net(type(between(calls[spelling]))):
        def literal(self, x: Tensor) -> Tensor:
            return torch.ops.structure.heads(x, [x.shape[0]], 4)

    net = between(calls[spelling], heads=4)
    net.__class__ = Net
    result = prune_and_verify(net, vectors(5))
    assert result.model.a.weight.shape == (6, 5)
    if spelling == "literal":
        assert result.report.rewritten == [""]
    else:
        assert result.model.heads == 2


def test_numbers_that_a_rule_does_not_explain_stay(stated: Callable[..., Any]) -> None:
    """`heads` is also used in a view, where it would follow the heads; the op pins it."""
    stated("structure::heads")(lambda site: site.dims(site.args[0]))

    def call(net: nn.Module, x: Tensor) -> Tensor:
        x = heads_op(x, [x.shape[0]], net.heads)
        return (x.view(x.shape[0], net.heads, -1).tanh()).flatten(1)

    result = prune_and_verify(between(call, heads=4), vectors(5))
    assert result.model.heads == 4
    assert result.model.a.weight.shape == (8, 5)  # two of three in each head


@pytest.mark.parametrize("verify", [True, False])
def test_a_wrong_rule_is_found(verify: bool, stated: Callable[..., Any]) -> None:
    """It says that columns are the op's own; whoever does not verify believes it."""

    @torch.library.custom_op("structure::reverse", mutates_args=())
    def reverse(x: Tensor) -> Tensor:
        return x.flip(1)

    stated("structure::reverse")(lambda site: site.dims(site.args[0]))
    net = between(lambda _, x: reverse(x))
    result = depgraph.prune(net, vectors(5), verify=verify, importance=random_importance(1))
    assert result.model.a.weight.shape == ((12, 5) if verify else (6, 5))
    if verify:
        assert "did not verify" in frozen_texts_of(result, "a.weight")
        assert_equal_to_masked(net, result, vectors(5))


def frozen_texts_of(result: depgraph.PruneResult, name: str) -> str:
    return " ".join(str(f.reason) for f in result.report.graph.frozen if f.name == name)


def test_a_statistic_says_how_it_is_run_on_zeros(stated: Callable[..., Any]) -> None:
    @torch.library.custom_op("structure::centred", mutates_args=())
    def centred(x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)

    def on_zeroed(x: Tensor, masks: list[Tensor]) -> Tensor:
        return (x - x.sum(1, keepdim=True) / masks[0].sum(1, keepdim=True)) * masks[0]

    net = between(lambda _, x: centred(x))
    stated("structure::centred")(lambda site: site.dims(site.args[0]))
    assert depgraph.prune(net, vectors(5)).model.a.weight.shape == (12, 5)  # zeros are not nothing to a mean
    stated("structure::centred", masked=on_zeroed)(lambda site: site.dims(site.args[0]))
    result = depgraph.prune(net, vectors(5))
    assert result.report.verification.status == "equal"
    assert result.model.a.weight.shape == (6, 5)


@pytest.mark.parametrize("name", ["relu", "aten::relu", "prim::device", ""])
def test_op_rule_is_for_ops_of_ones_own(name: str) -> None:
    with pytest.raises(depgraph.InputError, match="op_rule"):
        depgraph.op_rule(name)


# ------------------------------------------------------------------------------------------------ autograd functions


class Rounded(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx, x):
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return gradient * s * (1 + x * (1 - s))


class Product(torch.autograd.Function):
    """Written with setup_context, with a number among its arguments."""

    @staticmethod
    def forward(x, weight, scale):
        return x @ weight.T * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, ctx.scale = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight * ctx.scale, gradient.T @ x * ctx.scale, None


class BackwardOfElevenPlusOne(torch.autograd.Function):
    """The forward fits every size, the backward does not."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient.view(-1, 12) * 2


class Accumulating(torch.autograd.Function):
    """The forward keeps every channel to itself, the backward does not."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient.cumsum(1)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("not written yet")


class ThroughNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy() * 2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


@pytest.mark.parametrize(
    "function",
    [
        lambda _, x: Rounded.apply(x),
        lambda _, x: Swish.apply(x),
        lambda net, x: Product.apply(x, net.extra, 0.5) + x,
    ],
    ids=["straight through", "saves its input", "product"],
)
def test_autograd_functions_are_followed_forward_and_backward(function: Callable[..., Tensor]) -> None:
    net = between(function)
    result = prune_and_check(net, (vectors(5),), check_inputs=(vectors(5, seed=1),), pruning_ratio=0.5)
    assert result.model.a.weight.shape == (6, 5)
    assert depgraph.count_macs(net, vectors(5)) == 2 * depgraph.count_macs(net, vectors(5, 1))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (BackwardOfElevenPlusOne, "repeated by the number 12"),
        (Accumulating, "in order by aten.cumsum"),
        (NoBackward, "NoBackward, whose backward can't be traced"),
        (ThroughNumpy, "constant"),
    ],
)
def test_autograd_functions_that_do_not_fit_smaller_tensors_are_frozen(function: Any, reason: str) -> None:
    """With the reason, and also where nothing is verified: only gradients would tell."""
    net = between(lambda _, x: function.apply(x))
    result = depgraph.prune(net, vectors(5), verify=False)
    assert result.model.a.weight.shape == (12, 5)
    assert result.model.b.weight.shape == (7, 12)
    assert reason in frozen_texts(net, vectors(5), "a.weight")
    if function is not NoBackward:
        prune_and_check(net, (vectors(5),), pruning_ratio=0.5)


@pytest.mark.parametrize(
    "leave",
    [
        lambda x: torch.as_tensor(x.detach().numpy()[:, ::-1].copy()),
        lambda x: torch.tensor(x.tolist(), dtype=x.dtype),
        lambda x: copy.deepcopy(x.detach()),
    ],
    ids=["numpy", "tolist", "deepcopy"],
)
def test_what_leaves_torch_is_frozen(leave: Callable[[Tensor], Tensor]) -> None:
    net = between(lambda net, x: x @ net.extra + leave(x).abs().sum() * 0)
    result = depgraph.prune(net, vectors(5), verify=False)
    assert result.model.a.weight.shape == (12, 5)
    assert_equal_to_masked(net, result, vectors(5))
    assert "leaves torch through" in frozen_texts(net, vectors(5), "a.weight")


# ------------------------------------------------------------------------------------------------ wrappers


class Written(nn.Module):
    """A width as a literal in forward, one as an attribute: the wrapper must be no obstacle to either repair."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.width = nn.Linear(5, 12), nn.Linear(12, 13), nn.Linear(13, 3), 13

    def forward(self, x):
        h = F.gelu(self.a(x)).view(-1, 12).tanh()
        return self.c(F.gelu(self.b(h)).view(-1, self.width))


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def check_wrapped(wrap: Callable[[nn.Module], nn.Module], inner: str) -> depgraph.PruneResult:
    """The same class, names and values as the unwrapped model, pruned; and it trains."""
    net = fresh(Written)
    bare = depgraph.prune(net, vectors(5))
    model = wrap(fresh(Written)).eval()
    before = snapshot(model)
    result = depgraph.prune(model, vectors(5))
    assert_untouched(model, before)
    assert result.report.verification.status == "equal"
    assert type(result.model) is type(model)
    assert list(result.model.state_dict()) == [f"{inner}.{n}" for n in net.state_dict()]
    for name, tensor in bare.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[f"{inner}.{name}"], tensor), name
        assert torch.equal(result.plan.mask(f"{inner}.{name}"), bare.plan.mask(name)), name
    assert getattr(result.model, inner).width == 7
    x = vectors(5, seed=3)
    torch.testing.assert_close(result.model(x), bare.model(x))
    result.model.train()(x).square().sum().backward()
    bare.model.train()(x).square().sum().backward()
    wanted = {f"{inner}.{n}": p.grad for n, p in bare.model.named_parameters()}
    torch.testing.assert_close({n: p.grad for n, p in result.model.named_parameters()}, wanted)
    assert all(p.grad is None for p in model.parameters())
    return result


def test_data_parallel() -> None:
    check_wrapped(nn.DataParallel, "module")


@pytest.mark.parametrize("unused", [False, True])
def test_distributed_data_parallel(unused: bool, one_process: None) -> None:
    def wrap(net: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(
            net, find_unused_parameters=unused, static_graph=not unused
        )

    result = check_wrapped(wrap, "module")
    assert result.model.find_unused_parameters is unused
    model = wrap(fresh(Written))
    before = snapshot(model.module)
    with pytest.raises(depgraph.InputError, match=r"model\.module"):
        depgraph.prune(model, vectors(5), inplace=True)
    assert_untouched(model.module, before)
    model(vectors(5)).sum().backward()  # its reducer is as it was


def test_compiled() -> None:
    check_wrapped(compiled, "_orig_mod")


def test_compiled_in_place() -> None:
    """Also when it has compiled code for the sizes it had."""
    for build, x in ((Plain, pixels()[0]), (Written, vectors(5))):
        model, bare = compiled(fresh(build)), fresh(build)
        model(x)
        assert depgraph.prune(model, x, inplace=True).model is model
        torch.testing.assert_close(model(x), depgraph.prune(bare, x).model(x))


def test_wrapped_parts() -> None:
    """One layer compiled, one in DataParallel inside it, a compiled function in between, and a hook on the wrapper."""

    def build() -> nn.Module:
        net = Plain()
        net.b = compiled(nn.DataParallel(net.b))
        net.c = nn.DataParallel(net.c)
        net.c.register_forward_hook(lambda module, inputs, out: out * 2)
        function = torch.compile(lambda t: t.tanh() * 3, backend="eager")
        net.a.register_forward_hook(lambda module, inputs, out: function(out))
        return net

    net = fresh(build)
    result = prune_and_check(net, pixels(), check_inputs=pixels(1), pruning_ratio=0.5)
    small = result.model
    assert [type(m) for m in small.modules()] == [type(m) for m in net.modules()]
    assert small.b.module.out_channels == 6
    assert small.c.module.in_features == 6


def test_compiled_by_its_own_method() -> None:
    """`module.compile()` keeps the class; the copy is not compiled and runs as it is."""
    net = fresh(Plain)
    net.compile(backend="eager")
    net(*pixels())
    assert type(prune_and_check(net, pixels(), pruning_ratio=0.5).model) is Plain


def test_sharded_models_are_refused(one_process: None) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model = fully_shard(fresh(Written).float(), mesh=mesh)
    with pytest.raises(depgraph.InputError, match="sharded"):
        depgraph.prune(model, vectors(5).float())


class Attended(nn.Module):
    """As Lightning's modules: a trainer that must not be asked for too early, a lock, hyperparameters, its own steps."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.hparams = {"width": width, "rate": 1e-3}
        self.lock, self._trainer = threading.Lock(), None
        self.net = nn.Sequential(nn.Linear(5, width), nn.GELU(), nn.Linear(width, 3))

    @property
    def trainer(self):
        if self._trainer is None:
            raise RuntimeError("not attached to a trainer")
        return self._trainer

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return self(batch).square().mean()


def test_modules_with_a_trainer_and_a_lock() -> None:
    """What can't be copied is shared; what must not be touched is not."""
    net = fresh(Attended)
    result = depgraph.prune(net, vectors(5))
    assert result.report.verification.status == "equal"
    assert type(result.model) is Attended
    assert result.model.lock is net.lock
    assert [p.shape for p in result.model.parameters()] == [(6, 5), (6,), (3, 6), (3,)]
    result.model.training_step(vectors(5), 0).backward()


def installed(name: str) -> Any:
    """A library that tests can do without."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    import benchmarks.suites  # noqa: F401  which makes torchvision fit for import, as these libraries import it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def test_lightning() -> None:
    lightning = installed("lightning")

    class Net(lightning.LightningModule):
        def __init__(self, width: int = 12):
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(5, width), nn.GELU(), nn.Linear(width, 3))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            return self(batch).square().mean()

    result = prune_and_check(fresh(Net), (vectors(5),), pruning_ratio=0.5)
    assert type(result.model) is Net
    assert result.model.net[0].out_features == 6


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter beside it."""

    def __init__(self, columns: int, rows: int, rank: int = 4):
        super().__init__()
        self.base_layer = nn.Linear(columns, rows).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(columns, rank, bias=False), nn.Linear(rank, rows, bias=False)
        self.scaling, self.dropout = 2.0, nn.Dropout(0.1)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(self.dropout(x))) * self.scaling

    def merged(self) -> nn.Linear:
        linear = copy.deepcopy(self.base_layer)
        with torch.no_grad():
            linear.weight += self.scaling * self.lora_B.weight @ self.lora_A.weight
        return linear


def test_adapters_follow_their_base_layer() -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(5, 12), nn.GELU(), Adapted(12, 14), nn.GELU(), Adapted(14, 11), nn.Linear(11, 3)
        )

    net = fresh(build)
    small = prune_and_check(net, (vectors(5),), check_inputs=(vectors(5, seed=1),), pruning_ratio=0.5).model
    assert small[2].lora_A.weight.shape == (2, 6)  # the rank is an axis of its own
    assert small[2].lora_B.weight.shape == (7, 2)
    assert small[2].base_layer.weight.shape == (7, 6)
    assert not small[2].base_layer.weight.requires_grad
    whole = small(vectors(5))
    small[2], small[4] = small[2].merged(), small[4].merged()
    torch.testing.assert_close(small(vectors(5)), whole)


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"bias": "lora_only", "lora_dropout": 0.1}], ids=str
)
def test_peft(options: dict[str, Any]) -> None:
    peft = installed("peft")

    def build() -> nn.Module:
        net = nn.Sequential(nn.Linear(5, 12), nn.GELU(), nn.Linear(12, 14), nn.GELU(), nn.Linear(14, 3))
        return peft.get_peft_model(net, peft.LoraConfig(r=6, lora_alpha=9, target_modules=["2"], **options))

    net = fresh(build)
    result = prune_and_check(net, (vectors(5),), check_inputs=(vectors(5, seed=1),), pruning_ratio=0.5)
    small = result.model
    assert type(small) is type(net)
    layer = small.base_model.model[2]
    assert layer.lora_B["default"].weight.shape == (7, 3)
    assert layer.lora_A["default"].weight.shape[1] == layer.base_layer.in_features
    whole = small(vectors(5))
    torch.testing.assert_close(small.merge_and_unload()(vectors(5)), whole)


# ------------------------------------------------------------------------------------------------ tensors in odd places


def holding(setup: Callable[[nn.Module], None], body: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    """Three linear layers; `body` works on the 12 channels between the first two, with what `setup` gave the model."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(12, 14), nn.Linear(14, 3)
            setup(self)

        def forward(self, x):
            return self.c(F.gelu(self.b(body(self, F.gelu(self.a(x))))))

    return fresh(Net)


class Config:
    """A plain object that a model keeps."""


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(shape[0]))


def attributes(**values: Callable[[], Any]) -> Callable[[nn.Module], None]:
    def setup(net: nn.Module) -> None:
        for name, value in values.items():
            setattr(net, name, value())

    return setup


def in_an_object(net: nn.Module) -> None:
    net.config = Config()
    net.config.scale, net.config.itself = numbers(12), net.config


def buffers(net: nn.Module) -> None:
    net.register_buffer("table", numbers(12), persistent=False)
    net.register_buffer("nothing", None)


def alias(net: nn.Module) -> None:
    net.register_buffer("table", numbers(12))
    net.original = net.table


def tied_when_saved(net: nn.Module) -> None:
    """One weight under two names, the second left out of the state and put back by hooks."""
    tied_layers(net)

    def leave_out(module: nn.Module, state: dict[str, Tensor], prefix: str, meta: Any) -> None:
        del state[prefix + "e.weight"]

    def put_back(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        state[prefix + "e.weight"] = state[prefix + "d.weight"]

    net.register_state_dict_post_hook(leave_out)
    net.register_load_state_dict_pre_hook(put_back)


def tied_layers(net: nn.Module) -> None:
    net.d, net.e = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
    net.e.weight = net.d.weight


def in_two_places(net: nn.Module) -> None:
    net.m = nn.Linear(12, 12)
    net.more, net.again = nn.ModuleList([net.m]), net.m


def parameter_containers(net: nn.Module) -> None:
    net.many = nn.ParameterList(nn.Parameter(torch.randn(12, 12)) for _ in range(2))
    net.named = nn.ParameterDict({"gain": nn.Parameter(torch.randn(12))})


class Cache(nn.Module):
    """Counts its calls, averages what it sees, and keeps a table that it makes when the width is new to it."""

    def __init__(self, filled: bool):
        super().__init__()
        self.linear, self.calls = nn.Linear(12, 12), 0
        self.table = torch.full((12,), 1.5, dtype=torch.float64) if filled else None
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(12))

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        if self.table is None or self.table.shape[-1] != x.shape[-1]:
            self.table = torch.full((x.shape[-1],), 1.5, dtype=x.dtype)
        self.average.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.linear(x) * self.table + self.average


class Magic(nn.Module):
    """Attributes that only __getattr__ knows."""

    def __init__(self):
        super().__init__()
        self.linear, self.more = nn.Linear(12, 12), {"width": 12}

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("more", {}):
            return self.__dict__["more"][name]
        return super().__getattr__(name)

    def forward(self, x):
        return self.linear(x).view(-1, self.width)


def hooked(net: nn.Module) -> None:
    net.b.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    net.a.register_forward_hook(lambda module, args, out: out + 1e9).remove()
    net.c.register_forward_hook(lambda module, args, kwargs, out: out.tanh(), with_kwargs=True)


ODD_PLACES: dict[str, tuple[Callable[..., None], Callable[..., Tensor]]] = {
    "a plain attribute": (attributes(table=lambda: numbers(12)), lambda net, x: x * net.table),
    "positions": (attributes(at=lambda: torch.arange(12.0).double()), lambda net, x: x + net.at * 0.01),
    "lists and dicts": (
        attributes(tables=lambda: [numbers(12), {"deep": (numbers(12), 3)}]),
        lambda net, x: x * net.tables[0] + net.tables[1]["deep"][0],
    ),
    "one tensor in two places": (
        attributes(pair=lambda: [numbers(12)] * 2),
        lambda net, x: x * net.pair[0] + net.pair[1],
    ),
    "a plain object": (in_an_object, lambda net, x: x * net.config.scale),
    "a parameter in a plain list": (
        attributes(loose=lambda: [nn.Parameter(numbers(12))]),
        lambda net, x: x * net.loose[0],
    ),
    "a buffer that is not saved, and one that is None": (
        buffers,
        lambda net, x: x * net.table if net.nothing is None else x,
    ),
    "a buffer under another name": (alias, lambda net, x: x * net.table + net.original),
    "tied by hooks of the state": (tied_when_saved, lambda net, x: x + net.d(x) + net.e(x)),
    "tied layers": (tied_layers, lambda net, x: x + net.d(x) + net.e(x)),
    "a module in two places": (in_two_places, lambda net, x: x + net.more[0](net.again(x))),
    "parameter lists and dicts": (
        parameter_containers,
        lambda net, x: x @ net.many[0] @ net.many[1] * net.named["gain"],
    ),
    "an empty cache": (attributes(cache=lambda: Cache(False)), lambda net, x: net.cache(x)),
    "a filled cache": (attributes(cache=lambda: Cache(True)), lambda net, x: net.cache(x)),
    "magic attributes": (attributes(magic=Magic), lambda net, x: net.magic(x)),
    "hooks": (hooked, lambda _, x: x),
}


@pytest.mark.parametrize("place", ODD_PLACES)
def test_tensors_in_odd_places_are_cut_with_the_channels(place: str) -> None:
    setup, body = ODD_PLACES[place]
    net = holding(setup, body)
    result = prune_and_check(net, (vectors(5),), check_inputs=(vectors(5, seed=1),), pruning_ratio=0.5)
    assert result.model.a.weight.shape == (6, 5)
    assert depgraph.prune(net, vectors(5)).report.verification.status == "equal"
    again = depgraph.Plan.from_json(result.plan.to_json())
    wanted = result.model(vectors(5, seed=2))
    torch.testing.assert_close(depgraph.apply(holding(setup, body), again)(vectors(5, seed=2)), wanted)
    net = holding(setup, body)
    depgraph.apply(net, again, inplace=True)
    torch.testing.assert_close(net(vectors(5, seed=2)), wanted)
    prune_and_check(net, (vectors(5),), pruning_ratio=0.4, importance=random_importance(3))


def test_side_effects_do_not_reach_the_users_model() -> None:
    net = holding(*ODD_PLACES["an empty cache"])
    calls = net.cache.calls
    depgraph.prune(net, vectors(5), max_macs=0.6)
    assert (net.cache.calls, net.cache.table, int(net.cache.seen)) == (calls, None, 0)


def test_a_table_that_makes_a_dim_freezes_it() -> None:
    """What a constant produces is no channel, though weights consume it: a filter bank keeps its bands."""
    net = holding(attributes(bank=lambda: numbers(12, 12)), lambda net, x: x @ net.bank)
    result = prune_and_check(net, (vectors(5),), pruning_ratio=0.5)
    assert result.model.bank.shape == (
        6,
        6,
    )  # but these bands, a linear layer consumes: channels like any other
    loose = holding(
        attributes(bank=lambda: numbers(12, 9)), lambda net, x: x + (x @ net.bank).abs().sum() * 0
    )
    assert depgraph.prune(loose, vectors(5)).model.bank.shape == (6, 9)


class Rotary(nn.Module):
    """Rotary positions from tables made in __init__ and held as plain attributes."""

    def __init__(self):
        super().__init__()
        self.heads, self.width = 2, 6
        angles = torch.arange(7.0)[:, None] / torch.arange(1, 4)
        self.cos, self.sin = (torch.cat([f(angles)] * 2, 1).double() for f in (torch.cos, torch.sin))
        self.enter, self.leave = nn.Linear(5, 12), nn.Linear(12, 3)
        self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def rotate(self, x):
        x = x.unflatten(-1, (self.heads, self.width)).transpose(1, 2)
        a, b = x.chunk(2, -1)
        return x * self.cos[: x.shape[2]] + torch.cat([-b, a], -1) * self.sin[: x.shape[2]]

    def forward(self, x):
        x = self.enter(x)
        weights = (self.rotate(self.q(x)) @ self.rotate(self.k(x)).transpose(2, 3)).softmax(-1)
        v = self.v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.leave(x + (weights @ v).transpose(1, 2).flatten(2))


def test_rotary_tables_made_in_init() -> None:
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    result = prune_and_check(
        fresh(Rotary), (x,), check_inputs=(torch.randn(3, 7, 5).double(),), pruning_ratio=0.5
    )
    small = result.model
    assert small.cos.shape == small.sin.shape == (7, small.width)
    assert small.q.weight.shape[0] == small.heads * small.width < 12


class Slotted(nn.Module):
    """A slot, which the copy protocol of modules forgets."""

    __slots__ = ("rows",)

    def __init__(self):
        super().__init__()
        self.linear, self.rows = nn.Linear(12, 12), -1

    def forward(self, x):
        return self.linear(x).view(self.rows, x.shape[1])


def test_modules_with_slots() -> None:
    net = holding(attributes(slotted=Slotted), lambda net, x: net.slotted(x))
    result = depgraph.prune(net, vectors(5))
    assert result.report.verification.status == "equal"
    assert result.model.slotted.rows == -1
    assert result.model.slotted.linear.weight.shape == (6, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_types(dtype: torch.dtype) -> None:
    """One layer in low precision, the rest in single."""

    def build() -> nn.Module:
        return holding(
            attributes(low=lambda: nn.Linear(12, 12)),
            lambda net, x: x + net.low(x.to(net.low.weight.dtype)).to(x.dtype),
        )

    net = build().float()
    net.low.to(dtype)
    result = depgraph.prune(net, vectors(5).float())
    assert result.report.verification.status == "equal"
    assert result.model.low.weight.dtype == dtype
    assert result.model.low.weight.shape == (6, 6)
    assert_state_matches_plan(net, result.model, result.plan)


def test_models_without_values_or_on_another_device_are_refused() -> None:
    """Before anything changes, and with what to do."""
    with torch.device("meta"):
        empty = Written()
    with pytest.raises(depgraph.InputError, match="meta device"):
        depgraph.prune(empty, vectors(5))
    net = fresh(Written)
    before = snapshot(net)
    with pytest.raises(depgraph.InputError, match="meta"):
        depgraph.prune(net, torch.empty(2, 5, device="meta", dtype=torch.float64))
    assert_untouched(net, before)


# ------------------------------------------------------------------------------------------------ inputs and outputs


@dataclass
class Batch:
    x: Tensor
    more: dict[str, Tensor]


@dataclass(frozen=True)
class Sealed:
    x: Tensor


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Request:
    """A plain object that models read and write."""

    def __init__(self, x: Tensor):
        self.x, self.log = x, []


class Core(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(12, 14), nn.Linear(14, 3)
        self.other = nn.Linear(5, 14)

    def core(self, x, y):
        return self.c(F.gelu(self.b(F.gelu(self.a(x))) + self.other(y)))


class Named(Core):
    def forward(self, *, x, y=None, scale=1.0):
        return self.core(x, y) * scale


class Whatever(Core):
    def forward(self, x, **options):
        return self.core(x, options["y"])


class Nest(Core):
    def forward(self, batch):
        out = self.core(batch["xs"][0], batch["deep"]["y"])
        return {"out": [out], "n": 3, "none": None, "text": "t"}


class Dataclasses(Core):
    def forward(self, batch, sealed):
        return Batch(self.core(batch.x, batch.more["y"]), {"sealed": sealed.x}), Sealed(batch.x)


class Tuples(Core):
    def forward(self, pair):
        return Pair(self.core(pair.x, pair.y), pair.x)


class Objects(Core):
    """Reads an object, leaves a mark on it and on its tensors, and returns another."""

    def forward(self, request):
        request.log.append(1)
        return Request(self.core(request.x.mul_(1.5), request.x))


class Later(Core):
    """Returns something that nobody can look into."""

    def forward(self, x, y):
        out = self.core(x, y)
        return (part for part in [out])


X, Y = vectors(5), vectors(5, seed=1)
CALLS: dict[str, tuple[type[nn.Module], Callable[[Tensor, Tensor], Any]]] = {
    "keywords only": (Named, lambda x, y: {"x": x, "y": y}),
    "any keywords": (Whatever, lambda x, y: {"x": x, "y": y}),
    "nested": (Nest, lambda x, y: {"batch": {"xs": [x], "deep": {"y": y}}}),
    "dataclasses": (Dataclasses, lambda x, y: (Batch(x, {"y": y}), Sealed(x))),
    "named tuples": (Tuples, lambda x, y: (Pair(x, y),)),
}


@pytest.mark.parametrize("kind", CALLS)
def test_inputs_and_outputs_of_any_structure(kind: str) -> None:
    build, arguments = CALLS[kind]
    net = fresh(build)
    inputs = arguments(X, Y)
    result = depgraph.prune(net, inputs)
    assert result.report.verification.status == "equal"
    shapes = {n: tuple(p.shape) for n, p in result.model.named_parameters() if n.endswith("weight")}
    assert shapes == {"a.weight": (6, 5), "b.weight": (7, 6), "c.weight": (3, 7), "other.weight": (7, 5)}
    plain = Named().double()
    plain.load_state_dict(net.state_dict())
    small = depgraph.apply(plain, result.plan)
    twin = SimpleNamespace(model=small, plan=result.plan)
    assert_equal_to_masked(plain, twin, {"x": X, "y": Y})
    got, wanted = (
        result.model(**inputs) if isinstance(inputs, dict) else result.model(*inputs),
        small(x=X, y=Y),
    )
    assert any(torch.equal(t, wanted) for t in tensor_leaves(got))


@pytest.mark.parametrize("kind", ["object", "generator"])
def test_outputs_in_objects_keep_their_size(kind: str) -> None:
    """Inputs are left as they are, too."""
    net, x = fresh(Objects if kind == "object" else Later), X.clone()
    request = Request(x)
    result = depgraph.prune(net, (request,) if kind == "object" else (x, Y))
    assert result.model.c.weight.shape == (3, 7)
    assert torch.equal(x, X)
    assert request.log == []
    proof = result.report.verification
    assert proof.status == ("equal" if kind == "object" else "shapes")
    (out,) = (result.model(Request(x)).x,) if kind == "object" else result.model(x, Y)
    assert out.shape == (2, 3)


def test_lazy_modules() -> None:
    """Before their first call, what to do; after it, as any other."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.LazyConv2d(7, 3),
            nn.LazyBatchNorm2d(),
            nn.GELU(),
            nn.Flatten(),
            nn.LazyLinear(11),
            nn.LazyLinear(3),
        )

    net = build().double()
    with pytest.raises(depgraph.InputError, match=r"lazy modules.*\n.*call model"):
        depgraph.prune(net, pixels())
    with pytest.raises(depgraph.InputError, match="lazy modules"):
        depgraph.analyze(net, pixels())
    net.eval()(*pixels())
    ready(net)
    result = prune_and_check(net, pixels(), check_inputs=pixels(1), pruning_ratio=0.5)
    assert [type(m) for m in result.model] == [
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.GELU,
        nn.Flatten,
        nn.Linear,
        nn.Linear,
    ]
    assert (result.model[0].out_channels, result.model[4].in_features, result.model[4].out_features) == (
        4,
        96,
        6,
    )


@pytest.mark.parametrize(
    ("kind", "layout"), [(nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d)]
)
def test_weights_keep_their_order_in_memory(kind: Any, layout: torch.memory_format) -> None:
    model = nn.Sequential(kind(3, 10, 3), nn.ReLU(), kind(10, 5, 3))
    x = torch.randn(2, 3, *[7] * (model[0].weight.dim() - 2))
    for inplace in (False, True):
        plain = depgraph.prune(copy.deepcopy(model), x, inplace=inplace).model
        last = depgraph.prune(copy.deepcopy(model).to(memory_format=layout), x, inplace=inplace).model
        for i in (0, 2):
            assert plain[i].weight.is_contiguous()
            assert last[i].weight.is_contiguous(memory_format=layout)
            assert not last[i].weight.is_contiguous()
            assert torch.equal(plain[i].weight, last[i].weight)
