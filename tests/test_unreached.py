"""What no run on the example inputs reached: it follows its siblings, or stays and is named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import prune_and_check, random_importance
from small_models import Branches, fresh, vectors
from torch import Tensor, nn

import depgraph

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


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


@pytest.mark.slow
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


@pytest.mark.slow
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
    with pytest.raises(depgraph.NothingToPruneError, match="is not the same in all siblings"):
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
