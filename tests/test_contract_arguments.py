"""The other arguments of `prune`: inputs, in place, reproducible."""

from __future__ import annotations

import torch
from contract_models import assert_replays, assert_same_function, images, parameters, residual

import depgraph


def test_inputs_as_tensor_tuple_and_dict() -> None:
    plans = [depgraph.prune(residual(), x).plan for x in (images(), (images(),), {"x": images()})]
    assert plans[0].to_json() == plans[1].to_json() == plans[2].to_json()


def test_inplace_returns_the_same_object() -> None:
    model, reference = residual(), residual()
    kept = model.head
    result = depgraph.prune(model, images(), inplace=True)
    assert result.model is model
    assert result.model.head is kept
    assert parameters(model) < parameters(reference)
    assert_replays(model, reference, result.plan)
    assert_same_function(model, reference, result.plan, images(3))


def test_inplace_and_copy_agree() -> None:
    one = depgraph.prune(residual(), images(), max_macs=0.5)
    two = depgraph.prune(residual(), images(), max_macs=0.5, inplace=True)
    assert one.plan.to_json() == two.plan.to_json()
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name]), name


def test_the_same_call_gives_the_same_plan() -> None:
    plans = {depgraph.prune(residual(), images(), max_macs=0.5).plan.to_json() for _ in range(2)}
    assert len(plans) == 1


def test_random_state_is_not_disturbed() -> None:
    model = residual()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    depgraph.prune(model, images())
    assert torch.equal(torch.rand(4), expected)
