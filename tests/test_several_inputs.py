"""Several example inputs are one graph, and each is verified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import prune_and_check
from small_models import Branches, fresh, vectors

import depgraph

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


BRANCHES = depgraph.Examples(vectors(5), (vectors(5, 3), vectors(7, 3)), {"x": vectors(5), "deep": True})


@pytest.mark.slow
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


@pytest.mark.slow
def test_every_input_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that only the last example shows is found there; without that example, the tensors tell."""
    net, small = fresh(Branches), depgraph.prune(fresh(Branches), BRANCHES)
    assert depgraph.verify(net, small.model, small.plan, BRANCHES).status == "equal"
    with torch.no_grad():
        small.model.extra.bias[0] += 1
    with pytest.raises(depgraph.VerificationError, match=r"extra\.bias is off what the plan keeps"):
        depgraph.verify(net, small.model, small.plan, vectors(5))
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
