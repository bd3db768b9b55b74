"""The parts of a plan by themselves: its text, its names in wrapped models, and what becomes of an optimizer's state."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import depgraph
from depgraph.base.errors import InputError, PlanError
from depgraph.plan.names import _resolved, fitted
from depgraph.plan.optimizer import _along, _carried, _spread, apply_to_optimizer
from depgraph.plan.plan import Cut, Plan, Repair, Rewrite

# ---------------------------------------------------------------------------------------------------------- text


def text(sets: list[Any], keep: list[Any], **cut: Any) -> str:
    return json.dumps({
        "format": 3, "request": {}, "shapes": {"w": [4, 3]}, "aliases": {}, "sets": sets,
        "cuts": {"w": {"keep": keep, **cut}}, "repairs": [], "rewrites": [],
    })  # fmt: skip


def test_sets_of_indices_are_read_in_the_order_they_have() -> None:
    cut = Plan.from_json(text([[2, 0, 3], [1]], [0, 1])).cuts["w"]
    assert [k if k is None else k.tolist() for k in cut.keep] == [[2, 0, 3], [1]]
    assert cut.new_shape == (3, 1)
    assert Plan.from_json(text([[0]], [None, None])).cuts["w"].keep == (None, None)


@pytest.mark.parametrize(
    "bad", [[1, 1], [-1], [], [[0]], ["a"], [0.5], [True], [[0], [1, 2]], 7, None, [2**63]]
)
def test_a_set_that_is_no_list_of_indices_is_named_and_so_is_what_uses_it(bad: Any) -> None:
    with pytest.raises(PlanError) as refused:
        Plan.from_json(text([[0, 1], bad], [1, None]))
    assert "set 1 is not a list of indices, each once" in str(refused.value)
    assert "'w' has an invalid cut: 1 is not a set of indices below 4" in str(refused.value)


@pytest.mark.parametrize(
    ("keep", "cut", "why"),
    [
        ([0, None], {}, "0 is not a set of indices below 4"),
        ([None, 1], {}, "1 is not a set of indices below 3"),
        ([None, 4], {}, "4 is not a set of indices below 3"),
        ([None, True], {}, "True is not a set of indices below 3"),
        ([None], {}, "[None] kept of 2 dims"),
        ([None, 2], {"blocks": [2, 2]}, "blocks [2, 2]"),
        ([None, None], {"blocks": []}, "blocks []"),
        ([None, None], {"blocks": [3, 3]}, "set 3 is not ascending"),
        ([None, None], {"blocks": [2, 2, 2]}, "3 blocks are not equal parts of 4"),
        ([None, None], {"blocks": [2, 1]}, "1 is not a set of indices below 3"),
        ([3, None], {"blocks": [2, 2]}, "set 3 is not ascending"),
        ([None, None], {"more": 1}, "{'keep': [None, None], 'more': 1}"),
    ],
)
def test_a_cut_that_fits_no_tensor_is_refused(keep: list[Any], cut: dict[str, Any], why: str) -> None:
    with pytest.raises(PlanError, match=re.escape(f"'w' has an invalid cut: {why}")):
        Plan.from_json(text([[4], [0, 3], [0, 2], [2, 0]], keep, **cut))


# --------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize(
    ("keep", "leads"),
    [((None, None), True), (([0, 1], None), True), (([0, 1], [0]), True), (([1, 2], None), False), (([1, 0], None), False),
     (([0, 1], [0, 2]), False)],
)  # fmt: skip
def test_the_first_indices_of_a_tensor_are_a_view_of_it(keep: tuple[Any, ...], leads: bool) -> None:
    cut = Cut((4, 3), tuple(None if k is None else np.array(k) for k in keep))
    whole = torch.arange(12).view(4, 3)
    part = cut.part(whole)
    rows, columns = (k if k is not None else list(range(n)) for k, n in zip(keep, (4, 3), strict=True))
    assert part.tolist() == [[3 * r + c for c in columns] for r in rows]
    assert cut.leads is leads
    assert (part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()) == leads


# --------------------------------------------------------------------------------------------------------- names


def named(prefix: str) -> Plan:
    """A plan for a layer in a part of a model; `prefix`: what stands before the names."""
    return Plan(
        {f"{prefix}a.weight": Cut((4, 3), (np.array([0, 2]), None))},
        {f"{prefix}a.weight": (4, 3), f"{prefix}a.bias": (4,)},
        repairs=[Repair(f"{prefix}a", "out_features", (), 2, 4)],
        rewrites=[Rewrite(prefix.rstrip("."), "forward", 0, 4, 2)],
    )


def test_a_plan_takes_the_names_of_a_model_in_wrappers_or_out_of_them() -> None:
    plain = nn.Sequential()
    plain.add_module("a", nn.Linear(3, 4))
    for model, prefix in ((plain, ""), (nn.DataParallel(plain), "module.")):
        for other in ("", "module.", "_orig_mod.", "module._orig_mod."):
            found = fitted(named(other), model)
            assert found.shapes == named(prefix).shapes
            assert [*found.cuts] == [f"{prefix}a.weight"]
            assert found.repairs == named(prefix).repairs
            assert found.rewrites == named(prefix).rewrites


def test_a_plan_finds_a_part_that_is_wrapped_by_itself() -> None:
    model = nn.Sequential()
    model.add_module("a", nn.DataParallel(nn.Linear(3, 4)))
    found = fitted(named(""), model)
    assert found.shapes == {"a.module.weight": (4, 3), "a.module.bias": (4,)}
    assert found.repairs[0].path == "a.module"
    assert found.rewrites[0].path == ""


def test_a_plan_for_something_else_keeps_its_names() -> None:
    plan = named("other.")
    assert fitted(plan, nn.DataParallel(nn.Linear(3, 4))) is plan


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.weight", "A"),
        ("module.a.weight", "A"),
        ("_orig_mod.a.module.weight", "A"),
        ("module." * 8 + "a.weight", "A"),
        (
            "module." * 9 + "a.weight",
            "module." * 9 + "a.weight",
        ),  # more are not looked for: each doubles the ways
        ("module.b", "B"),  # the way that leaves out the least
        ("module.module.b", "B"),
        ("module.c._orig_mod", "module.c._orig_mod"),  # two ways, to two tensors
        ("wrapped.a.weight", "wrapped.a.weight"),
    ],
)
def test_a_name_is_looked_up_without_what_wrappers_add(name: str, found: str) -> None:
    there = {"a.weight": "A", "module.b": "B", "b": "bare", "c._orig_mod": "C", "module.c": "D"}
    assert _resolved(name, there) == found


# ----------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("value", [None, True, 3, 0.5, "sum"])
def test_what_an_optimizer_notes_beside_tensors_is_carried_as_it_is(value: Any) -> None:
    cut = Cut((4,), (np.array([0, 2]),))
    assert _carried(value, (4,), cut, "SGD, w: 'k'") is value


def test_state_is_cut_as_its_parameter_along_the_dims_that_it_has() -> None:
    cut = Cut((4, 3), (np.array([2, 0]), np.array([1])))
    value = torch.arange(12.0).view(4, 3)
    assert _carried(value, (4, 3), cut, "").tolist() == [[7], [1]]
    assert _carried(value[:, :1], (4, 3), cut, "").tolist() == [[6], [0]]
    assert _carried(value[:1], (4, 3), cut, "").tolist() == [[1]]
    for other, wanted in ((torch.tensor(5.0), 5.0), (torch.tensor([[5.0]]), [[5.0]])):
        copied = _carried(other, (4, 3), cut, "")
        assert copied.tolist() == wanted
        assert copied.data_ptr() != other.data_ptr()
    same = _carried(value, (4, 3), None, "")
    assert torch.equal(same, value)
    assert same.data_ptr() != value.data_ptr()
    for bad in (torch.zeros(4), torch.zeros(3, 4), torch.zeros(2, 1), [value]):
        with pytest.raises(InputError, match="Adam, w: 'k'"):
            _carried(bad, (4, 3), cut, "Adam, w: 'k'")
    with pytest.raises(InputError, match="Adam, w: 'k' is shared by groups"):
        _along(Cut((4, 3), (None, None), [np.array([0]), np.array([1])]), value[:, :1], "Adam, w: 'k'")


def test_state_that_is_not_of_the_shape_of_a_spread_parameter_is_not_spread() -> None:
    parameter, value = SimpleNamespace(full_tensor=None, shape=torch.Size([2])), torch.ones(3)
    assert _spread(value, parameter) is value
    assert _spread(7, parameter) == 7
    assert _spread(value, torch.ones(3)) is value
    number = torch.tensor(1.0)
    assert _spread(number, SimpleNamespace(full_tensor=None, shape=torch.Size([]))) is number


@pytest.mark.parametrize("bad", ["plan", "optimizer", "model", "small"])
def test_an_optimizer_is_carried_between_models_alone(bad: str) -> None:
    model, small = nn.Linear(3, 2), nn.Linear(3, 2)
    given: dict[str, Any] = {
        "plan": depgraph.Plan(), "optimizer": torch.optim.SGD(model.parameters()), "model": model, "small": small,
    }  # fmt: skip
    with pytest.raises(InputError, match=bad):
        apply_to_optimizer(**{**given, bad: "net"})
