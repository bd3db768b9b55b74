"""What `analyze` gives: groups, what is frozen, what moves together; and what is done where a proof fails."""

from __future__ import annotations

import copy
import importlib
import sys
import threading
from collections import OrderedDict
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from contract_models import Residual, images, on_meta, residual, snapshot
from torch import Tensor, nn

import depgraph
from depgraph.base import errors
from depgraph.costs.memory import measure_memory
from depgraph.tracing.wrappers import copied
from depgraph.verify.weights import ROOM


def test_analyze_leaves_the_model_alone() -> None:
    model = residual().train()
    before = snapshot(model)
    depgraph.analyze(model, images())
    assert snapshot(model) == before


def test_groups_and_frozen() -> None:
    graph = depgraph.analyze(residual(), images())
    assert len(graph.groups) == 3  # the stream, and what is inside each block
    frozen = str(graph.frozen)
    assert graph.frozen
    assert "input" in frozen
    assert "output" in frozen


@pytest.mark.parametrize("indices", [[5], [2, 3, 31], np.array([0, 47]), torch.tensor([46, 1])])
def test_coupled(indices: Any) -> None:
    """Everything that must go with some channels of the block's middle, and nothing else."""
    model = residual()
    graph = depgraph.analyze(model, images())
    gone = torch.zeros(48, dtype=torch.bool)
    gone[torch.as_tensor(indices)] = True
    masks = graph.coupled("block.0.weight", 0, indices)
    touched = {name for name, mask in masks.items() if mask.any()}
    vectors = {f"block.1.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert touched == {"block.0.weight", "block.3.weight"} | vectors
    for name in touched:
        assert masks[name].shape == model.state_dict()[name].shape, name
        assert masks[name].dtype == torch.bool
    assert torch.equal(masks["block.0.weight"], gone.view(-1, 1, 1, 1).expand(48, 32, 3, 3))
    assert torch.equal(masks["block.3.weight"], gone.view(1, -1, 1, 1).expand(32, 48, 3, 3))
    for name in vectors:
        assert torch.equal(masks[name], gone), name


def test_coupled_agrees_from_every_member() -> None:
    graph = depgraph.analyze(residual(), images())
    starts = [
        ("stem.weight", 0),
        ("stem.bias", 0),
        ("block.0.weight", 1),
        ("block.3.weight", 0),
        ("head.weight", 1),
    ]
    answers = [graph.coupled(name, dim, [4, 9]) for name, dim in starts]
    assert {name for name, mask in answers[0].items() if mask.any()} == {
        "stem.weight",
        "stem.bias",
        "block.0.weight",
        "block.3.weight",
        "block.3.bias",
        "second.0.weight",
        "second.2.weight",
        "second.2.bias",
        "head.weight",
    }
    for answer in answers[1:]:
        assert answer.keys() == answers[0].keys()
        assert all(torch.equal(mask, answers[0][name]) for name, mask in answer.items())


@pytest.mark.parametrize(
    ("name", "dim", "indices", "text"),
    [
        ("nobody.weight", 0, [0], "nobody.weight"),
        ("stem.weight", 9, [0], "9"),
        ("stem.weight", 0, [32], "32"),
        ("stem.weight", 0, [-33], "32"),
    ],
)
def test_coupled_refuses_what_is_not_there(name: str, dim: int, indices: list[int], text: str) -> None:
    graph = depgraph.analyze(residual(), images())
    with pytest.raises(errors.DepgraphError, match=text):
        graph.coupled(name, dim, indices)


def test_coupled_refuses_frozen_dims_with_the_reason() -> None:
    graph = depgraph.analyze(residual(), images())
    with pytest.raises(errors.DepgraphError, match=r"head\.weight.*output|output.*head\.weight"):
        graph.coupled("head.weight", 0, [0])


def test_to_networkx() -> None:
    view = depgraph.analyze(residual(), images()).to_networkx()
    assert isinstance(view, nx.Graph)
    assert view.number_of_nodes() > 0
    assert view.number_of_edges() > 0
    text = " ".join(map(str, view.nodes(data=True)))
    assert "block.0.weight" in text


def test_analyze_needs_no_weights() -> None:
    """On the meta device: a model too large to build can be analysed all the same."""
    meta = depgraph.analyze(on_meta(), images().to("meta"))
    real = depgraph.analyze(residual(), images())
    assert len(meta.groups) == len(real.groups)


@pytest.mark.filterwarnings(
    "ignore::FutureWarning"
)  # torch.export warns about its own use of a deprecated name
@pytest.mark.parametrize("form", ["graph module", "exported program"])
def test_graph_modules_and_exported_programs_are_accepted(form: str) -> None:
    """Their literals stand in a graph, so they can always be rewritten."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = (
                nn.Conv2d(3, 12, 3, padding=1),
                nn.Conv2d(12, 12, 1),
                nn.Linear(12 * 20, 5),
            )

        def forward(self, x):
            x = self.a(x)
            return self.out((x + self.b(x)).relu().view(-1, 240))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 4, 5)
    given = torch.fx.symbolic_trace(model) if form == "graph module" else torch.export.export(model, (x,))
    result = depgraph.prune(given, x)
    assert result.report.verification.status == "equal"
    assert result.plan.new_shape("out.weight") == (5, 120)
    assert result.model(x).shape == (2, 5)


def test_what_does_not_verify_is_frozen_and_the_rest_is_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong rule (a gate whose halves are not tied) costs compression; the result is right all the same."""
    from depgraph.rules.registry import REGISTRY

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 14), nn.Linear(7, 11), nn.Linear(11, 3)

        def forward(self, x):
            return self.c(nn.functional.gelu(self.b(nn.functional.glu(self.a(x)))))

    def loose(site):
        x = site.dims(site.args[0])
        left, _ = site.algebra.cut(x[-1], 7)
        return [*x[:-1], left]

    torch.manual_seed(0)
    model, x = Gated().eval(), torch.randn(4, 5)
    monkeypatch.setitem(REGISTRY, "aten::glu", loose)
    result = depgraph.prune(model, x, importance=lambda g: torch.arange(g.units, dtype=torch.float64).flip(0))
    assert result.report.verification.status == "equal"
    assert result.plan.new_shape("c.weight") == (3, 6)
    assert any("stay whole" in note for note in result.report.notes)


class ComplexInPlace(nn.Module):
    """Turns the last 4 of 10 channels as complex numbers: a view of memory whose rows must then be even."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(5, 10), nn.Linear(10, 3)
        self.plain = 6

    def forward(self, x: Tensor) -> Tensor:
        still, turned = self.proj(x).split([self.plain, self.proj.out_features - self.plain], -1)
        pairs = torch.view_as_complex(turned.float().reshape(*x.shape[:-1], -1, 2)) * 1j
        return self.out(torch.cat([still, torch.view_as_real(pairs).flatten(-2).to(x.dtype)], -1))


def test_what_kernels_ask_of_strides_in_the_models_own_type_is_met() -> None:
    """In float64 the cast makes a copy, so that odd rows would only fail in float32: they must be noticed."""
    model, x = ComplexInPlace(), torch.randn(2, 7, 5)
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    assert result.report.verification.status == "equal"
    assert result.model.proj.out_features < 10
    result.model(x)


def test_blocks_that_only_fail_together_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cuts that verify alone and not together: the second stays whole."""
    module = importlib.import_module("depgraph.search")
    honest = module.verify_values

    def picky(model: nn.Module, small: nn.Module, plan: depgraph.Plan, inputs: Any) -> depgraph.Verification:
        if {"block.0.weight", "second.0.weight"} <= set(plan.cuts):
            raise errors.VerificationError("these two do not go together")
        return honest(model, small, plan, inputs)

    monkeypatch.setattr(module, "verify_values", picky)
    result = depgraph.prune(Residual(), torch.randn(2, 3, 8, 6), pruning_ratio=0.5)
    assert ("block.0.weight" in result.plan.cuts) != ("second.0.weight" in result.plan.cuts)


class Clipped(nn.Module):
    """Writes into its weights whenever it runs, through a view of one that it reads only later, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5, max_norm=0.5)
        self.up, self.middle, self.down = nn.Linear(5, 11), nn.Linear(11, 13), nn.Linear(13, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.up(self.embed(x)).tanh())
        self.down.weight.data.t().mul_(0.5)
        self.up.bias.detach().add_(1)
        return self.down(y.tanh())


@pytest.mark.slow
@pytest.mark.parametrize("limit", [ROOM, 0])
@pytest.mark.parametrize(("kind", "how"), [(torch.float32, "statistics"), (torch.float64, "statistics"),
                                          (torch.float32, "reconstruction")])  # fmt: skip
def test_weights_that_forward_writes_into_stay(
    limit: int, kind: torch.dtype, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["depgraph.verify.weights"], "ROOM", limit)
    model, x = Clipped().to(kind).eval(), torch.arange(7)
    before = copy.deepcopy(model.state_dict())
    result = depgraph.prune(model, x, calibration=[x], importance="wanda", recover=how)
    _ = result.report.macs, measure_memory(model, x)
    assert result.report.parameters[1] < result.report.parameters[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
        kept = value[result.plan.mask(name)]
        if how == "statistics":  # there are none here
            assert torch.equal(result.model.state_dict()[name].flatten(), kept), f"the smaller {name}"
    model(x)
    assert all(not torch.equal(v, before[n]) for n, v in model.state_dict().items() if n in WRITTEN)


WRITTEN = ("embed.weight", "up.bias", "down.weight")


class Odd(nn.Module):
    """Attributes that a copy of a module tree has to get right."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(3, 5), nn.BatchNorm1d(5)
        self.same = [self.first, {"again": self.again, "weight": self.first.weight}]
        self.table = {"list": [1, (2, {3})], "names": {"b", "a"}, "empty": set()}
        self.shared = self.table
        self.order = OrderedDict(b=[1], a=self.table["list"])
        self.order.note = "kept"  # type: ignore[attr-defined]
        self.me = [self]


class WithSlots(nn.Module):
    """The copy protocol of modules forgets slots: copies are given them."""

    __slots__ = ("more",)

    def __init__(self) -> None:
        super().__init__()
        self.more = [1, 2]


class OwnState(nn.Module):
    """Says itself what it is copied from."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.layer = threading.Lock(), nn.Linear(3, 2)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


def test_copies_of_module_trees_are_what_deepcopy_makes() -> None:
    model = nn.Sequential(Odd(), WithSlots(), OwnState(), torch.fx.symbolic_trace(nn.Linear(3, 2)))
    made = copied(model, {}, frozenset())
    odd, own = made[0], model[0]
    assert odd is not own
    assert odd.me[0] is odd
    assert odd.same[0] is odd.first
    assert odd.same[1]["again"] is odd.again
    assert odd.same[1]["weight"] is odd.first.weight is not own.first.weight
    assert odd.shared is odd.table is not own.table
    assert odd.order["a"] is odd.table["list"]
    assert (odd.table, odd.order, odd.order.note) == (own.table, own.order, "kept")
    assert not any(odd.table[k] is own.table[k] for k in own.table)
    assert made[1].more == [1, 2]
    assert made[1].more is not model[1].more
    assert made[2].lock is not model[2].lock
    assert made[3](torch.ones(1, 3)).shape == (1, 2)
    for (path, new), (_, old) in zip(made.named_modules(), model.named_modules(), strict=True):
        slow = copy.deepcopy(old)
        assert type(new).__name__ == type(slow).__name__, path
        assert list(vars(new)) == list(vars(slow)), path
        for name, value in vars(old).items():
            assert not isinstance(value, dict | set) or vars(new)[name] is not value, (path, name)
    states = made.state_dict().values(), model.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
