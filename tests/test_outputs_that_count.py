"""`outputs=`: what is not asked for may get smaller; methods other than forward are examples."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import assert_equal_to_masked
from small_models import fresh
from torch import Tensor, nn

import depgraph

Pair = namedtuple("Pair", "logits features")


@dataclass
class Output:
    logits: Tensor
    features: list[Tensor]


class Returning(nn.Module):
    """Logits and the features of each layer, in one of several forms."""

    def __init__(self, form: str = "dict") -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 12), nn.Linear(12, 14), nn.Linear(14, 3)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        first = self.a(x).relu()
        second = self.b(first).relu()
        logits, features = self.head(second), [first, second]
        if self.form == "dict":
            return {"logits": logits, "features": features}
        if self.form == "tuple":
            return logits, features
        return Output(logits, features) if self.form == "record" else Pair(logits, features)


def x() -> Tensor:
    return torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("form", "outputs"),
    [
        ("dict", "logits"), ("dict", ["logits"]), ("dict", lambda out: out["logits"]), ("tuple", "0"),
        ("tuple", lambda out: out[:1]), ("record", "logits"), ("named", "logits"),
    ],
)  # fmt: skip
def test_the_rest_is_free_to_shrink(form: str, outputs: Any) -> None:
    model = fresh(lambda: Returning(form))
    with pytest.raises(depgraph.NothingToPruneError):
        depgraph.prune(model, x(), pruning_ratio=0.5)
    result = depgraph.prune(model, x(), pruning_ratio=0.5, outputs=outputs)
    small = result.model
    assert (small.a.out_features, small.b.out_features, small.head.out_features) == (6, 7, 3)
    assert result.report.verification.status == "equal"
    plain = depgraph.prune(model, x(), pruning_ratio=0.5, outputs=outputs, verify=False)
    assert plain.model.a.out_features == 6
    assert depgraph.verify(model, small, result.plan, x(), outputs=outputs).status == "equal"
    assert depgraph.prune(model, depgraph.Examples(x(), outputs=outputs)).model.a.out_features == 6


def test_the_values_that_count_are_right() -> None:
    model = fresh(Returning)
    result = depgraph.prune(model, x(), pruning_ratio=0.5, outputs="logits")
    masked = fresh(Returning)
    masked.load_state_dict(model.state_dict())
    for name, p in masked.named_parameters():
        p.data *= result.plan.mask(name)
    assert torch.allclose(masked(x())["logits"], result.model(x())["logits"])


def test_one_of_several_features() -> None:
    model = fresh(Returning)
    small = depgraph.prune(model, x(), pruning_ratio=0.5, outputs=["logits", "features.0"]).model
    assert (small.a.out_features, small.b.out_features) == (12, 7)


def test_a_graph_remembers_what_counts() -> None:
    model = fresh(Returning)
    graph = depgraph.analyze(model, x(), outputs="logits")
    result = depgraph.prune(model, x(), graph=graph, max_params=0.5)
    assert result.report.verification.status == "equal"
    with pytest.raises(depgraph.InputError, match="have no effect on a finished graph"):
        depgraph.prune(model, x(), graph=graph, outputs="logits")


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        ("logit", "there is no 'logit' in what the model returns, but logits, features"),
        ("features.2", "there is no '2' in features, but 0, 1"),
        ("logits.mean", "there is no 'mean' in logits"),
        (lambda out: out["nothing"], "outputs failed on what the model returns: KeyError"),
        (lambda out: None, "outputs has no tensors"),
        (3, "outputs must be a function"),
        ([], "outputs must be a function"),
        ([1], "outputs must be a function"),
    ],
)
def test_refusals(outputs: Any, text: str) -> None:
    with pytest.raises(depgraph.InputError, match=text):
        depgraph.prune(fresh(Returning), x(), outputs=outputs)


class Backbone(nn.Module):
    """Returns its stages; a consumer is pruned with them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 14)

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.a(x).relu()
        return [first, self.b(first).relu()]


class Embedding(nn.Module):
    """`embed` has a layer of its own, and one that forward has, too; `encode` takes keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Backbone()
        self.project, self.out, self.head = nn.Linear(14, 10), nn.Linear(10, 4), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[-1])

    def embed(self, x: Tensor) -> Tensor:
        return self.out(self.project(self.body(x)[-1]).relu())

    def encode(self, *, words: Tensor) -> Tensor:
        return self.body(words)[0]


def test_methods_are_examples() -> None:
    model = fresh(Embedding)
    alone = depgraph.prune(model, x(), pruning_ratio=0.5)
    assert (alone.model.project.out_features, alone.model.body.b.out_features) == (10, 7)
    with pytest.raises(RuntimeError):
        alone.model.embed(x())
    both = depgraph.prune(model, depgraph.Examples(x(), embed=x()), pruning_ratio=0.5)
    small = both.model
    assert (small.project.in_features, small.project.out_features, small.out.out_features) == (7, 5, 4)
    assert both.report.verification.status == "equal"
    assert_equal_to_masked(model, both, x())
    assert small.embed(x()).shape == (4, 4)
    held = depgraph.prune(
        model, depgraph.Examples(embed=(x(),), encode={"words": x()}), pruning_ratio=0.5
    ).model
    assert (held.body.a.out_features, held.body.b.out_features) == (12, 7)  # what encode gives is an output


def test_budgets_and_figures_count_methods() -> None:
    model = fresh(Embedding)
    inputs = depgraph.Examples(x(), embed=x())
    report = depgraph.prune(model, inputs, max_macs=0.6).report
    before, after = report.macs
    assert before == 4 * (2 * (5 * 12 + 12 * 14) + 14 * 3 + 14 * 10 + 10 * 4)
    assert after <= 0.6 * before


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(depgraph.InputError, match="Embedding has no method 'embedd'"):
        depgraph.prune(fresh(Embedding), depgraph.Examples(x(), embedd=x()))
