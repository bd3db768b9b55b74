"""A plan is data: JSON that replays on another copy of the model."""

from __future__ import annotations

import json

import pytest
import torch
from contract_models import (
    Residual,
    assert_replays,
    assert_same_function,
    images,
    on_meta,
    randomised,
    residual,
    shapes,
    snapshot,
)

import depgraph
from depgraph.base import errors


def test_plan_json_round_trip() -> None:
    model = residual()
    plan = depgraph.prune(model, images(), max_macs=0.4).plan
    text = plan.to_json()
    assert isinstance(text, str)
    json.loads(text)
    again = depgraph.Plan.from_json(text)
    assert again.to_json() == text
    for name in model.state_dict():
        assert torch.equal(again.mask(name), plan.mask(name)), name


def test_apply_on_a_fresh_copy_is_the_result() -> None:
    model = residual()
    result = depgraph.prune(model, images(), max_macs=0.5)
    fresh = residual()
    before = snapshot(fresh)
    applied = depgraph.apply(fresh, depgraph.Plan.from_json(result.plan.to_json()))
    assert snapshot(fresh) == before
    assert type(applied) is type(model)
    assert list(applied.state_dict()) == list(result.model.state_dict())
    for name, value in applied.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name]), name
    assert torch.equal(applied(images(3)), result.model(images(3)))
    assert applied.block[0].out_channels == result.model.block[0].out_channels


def test_plan_replays_on_other_weights() -> None:
    """Lottery tickets: the plan of the trained model on the initial one."""
    plan = depgraph.prune(residual(), images()).plan
    initial = randomised(Residual(), seed=5).eval()
    ticket = depgraph.apply(initial, plan)
    assert_replays(ticket, initial, plan)
    assert_same_function(ticket, initial, plan, images(3))


def test_plan_replays_on_a_meta_model() -> None:
    result = depgraph.prune(residual(), images())
    small = depgraph.apply(on_meta(), result.plan)
    assert all(p.is_meta for p in small.parameters())
    assert shapes(small) == shapes(result.model)


def test_mask_of_an_unknown_name_is_an_error() -> None:
    plan = depgraph.prune(residual(), images()).plan
    with pytest.raises((errors.DepgraphError, KeyError), match="nobody"):
        plan.mask("nobody.weight")
