"""`a.then(b)` is a and then b: on every network of the zoo, on cuts made by hand, and refused where it can't be."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from checks import random_importance
from torch import nn
from zoo import ZOO

import depgraph
from depgraph.plan.plan import Cut, Plan, Repair, Rewrite

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def twice(name: str) -> tuple[nn.Module, Any, depgraph.PruneResult, depgraph.PruneResult] | None:
    entry = ZOO[name]
    model, inputs = entry.model(), entry.example()
    one = depgraph.prune(model, inputs, pruning_ratio=0.3, verify=False)
    try:
        two = depgraph.prune(
            one.model, inputs, pruning_ratio=0.4, importance=random_importance(1), verify=False
        )
    except depgraph.NothingToPruneError:
        return None
    return model, inputs, one, two


def same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert torch.equal(first[name].to_dense(), second[name].to_dense()), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_one_plan_does_what_two_did(name: str) -> None:
    made = twice(name)
    if made is None:
        return
    model, inputs, one, two = made
    whole = depgraph.Plan.from_json(one.plan.then(two.plan).to_json())
    small = depgraph.apply(model, whole)
    same(small, two.model)
    for tensor in whole.shapes:
        if tensor in model.state_dict() and whole.cuts.get(tensor, Cut((), ())).numbers is None:
            kept = model.state_dict()[tensor].to_dense()[whole.mask(tensor)]
            assert torch.equal(kept, small.state_dict()[tensor].to_dense().flatten()), tensor
    torch.manual_seed(7)
    wanted = leaves(copy.deepcopy(two.model)(*inputs))
    torch.manual_seed(7)
    got = leaves(small(*inputs))
    assert len(got) == len(wanted)
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def leaves(value: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def indices(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


GROUPED = torch.arange(12 * 5 * 2).reshape(12, 5, 2)
CUTS = {
    "dims": (Cut((12, 5, 2), (indices(1, 3, 4, 8), None, None)), Cut((4, 5, 2), (indices(0, 3), indices(2, 4), None))),
    "blocks, then blocks": (
        Cut((12, 5, 2), (None, None, None), [indices(0, 2, 4), indices(1, 2, 3)]),
        Cut((12, 3, 2), (None, None, None), [indices(0, 2), indices(1, 2)]),
    ),
    "blocks, then columns of all": (
        Cut((12, 5, 2), (None, None, None), [indices(0, 2, 4), indices(1, 2, 3)]),
        Cut((12, 3, 2), (None, indices(0, 2), None)),
    ),
    "columns of all, then blocks": (
        Cut((12, 5, 2), (indices(0, 1, 4, 6, 7, 10), indices(0, 2, 4), None)),
        Cut((6, 3, 2), (None, None, None), [indices(0, 2), indices(1, 2)]),
    ),
    "a block that goes as a whole": (
        Cut((12, 5, 2), (indices(0, 1, 2, 3, 8, 9, 10, 11), None, None)),
        Cut((8, 5, 2), (indices(1, 2, 5, 6), None, None), [indices(0, 2), indices(1, 2)]),
    ),
    "blocks that go as a whole, twice": (
        Cut((12, 5, 2), (indices(0, 1, 2, 6, 7, 8, 9, 10, 11), None, None), [indices(0, 1, 3), indices(1, 3, 4), indices(0, 2, 4), indices(0, 1, 2)]),
        Cut((9, 3, 2), (indices(3, 4, 5, 6, 7, 8), None, None), [indices(0), indices(1), indices(2)]),
    ),
    "numbers": (
        Cut((3,), (None,), None, indices(0, 2, 4, 6)),
        Cut((3,), (indices(0, 2),), None, indices(0, 2, 3)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CUTS)
def test_cuts_made_by_hand(case: str) -> None:
    first, second = CUTS[case]
    whole = Plan({"w": first}, {"w": first.shape}).then(Plan({"w": second}, {"w": first.new_shape}))
    tensor = torch.tensor([0, 6, 4]) if case == "numbers" else GROUPED
    wanted = second.slice(first.slice(tensor))
    assert torch.equal(whole.cuts["w"].slice(tensor), wanted)
    assert whole.new_shape("w") == tuple(wanted.shape)
    if case != "numbers":
        assert torch.equal(tensor[whole.mask("w")], wanted.flatten())


def test_blocks_that_no_equal_parts_have() -> None:
    """Rows 0 to 3 of 7: no division of 7 but into rows makes two blocks of the first four."""
    first, second = (
        Cut((7, 5), (indices(0, 1, 2, 3), None)),
        Cut((4, 5), (None, None), [indices(0, 1), indices(2, 3)]),
    )
    whole = Plan({"w": first}, {"w": (7, 5)}).then(Plan({"w": second}, {"w": (4, 5)}))
    tensor = torch.arange(35).reshape(7, 5)
    assert torch.equal(whole.cuts["w"].slice(tensor), torch.tensor([[0, 1], [5, 6], [12, 13], [17, 18]]))


def test_plans_that_do_not_follow_each_other_are_refused_with_every_reason() -> None:
    first = Plan({"a": Cut((5,), (indices(0, 1, 2),))}, {"a": (5,), "b": (7,), "c": (2,)})
    second = Plan({}, {"a": (4,), "b": (7,), "d": (2,)}, {"e": "a"})
    with pytest.raises(depgraph.PlanError) as caught:
        first.then(second)
    for text in (
        "'a' the shape (3,)",
        "is for (4,)",
        "'c' is in the first",
        "'d' is in the second",
        "ties other",
    ):
        assert text in str(caught.value)


def test_a_number_in_code_that_changes_twice_is_held_against_its_first_value() -> None:
    first = Plan(rewrites=[Rewrite("m", "forward", 0, 6, 4), Rewrite("m", "forward", 1, 5, 3)])
    second = Plan(rewrites=[Rewrite("m", "forward", 0, 4, 3)])
    assert first.then(second).rewrites == [Rewrite("m", "forward", 0, 6, 3), Rewrite("m", "forward", 1, 5, 3)]


def test_a_repair_that_is_set_twice_is_held_against_its_first_number() -> None:
    first, second = Plan(repairs=[Repair("", "n", (), 5, 8)]), Plan(repairs=[Repair("", "n", (), 3, 5)])
    assert first.then(second).repairs == [Repair("", "n", (), 3, 8)]

    class Counted(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.n = n

    assert depgraph.apply(Counted(8), first.then(second)).n == 3
    with pytest.raises(depgraph.PlanError, match="'n' is 7, the plan is for 8"):
        depgraph.apply(Counted(7), first.then(second))


def test_a_plan_of_several_steps_says_what_each_was_asked_for() -> None:
    a, b, c = (Plan(request={"pruning_ratio": n / 8, "scope": "local"}) for n in (1, 2, 3))
    wanted = {**c.request, "earlier": [a.request, b.request]}
    assert a.then(b).then(c).request == a.then(b.then(c)).request == wanted
    assert Plan.from_json(a.then(b).then(c).to_json()).request == wanted
    assert Plan().then(a).request == a.then(Plan()).request == a.request
    assert Plan().then(Plan()).request == {}


@pytest.mark.parametrize(
    "name", ["VisionTransformer", "InplaceOnViews", "BatchedExperts", "StandardisedWeights"]
)
def test_rewrites_in_place(name: str) -> None:
    """What can't be rewritten is found before anything changes; what can be, is."""
    entry = ZOO[name]
    result = depgraph.prune(entry.model(), entry.example(), pruning_ratio=0.5, verify=False)
    assert result.plan.rewrites
    same(depgraph.apply(entry.model(), result.plan, inplace=True), result.model)
    model, last = entry.model(), result.plan.rewrites[-1]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    result.plan.rewrites[-1] = Rewrite(last.path, last.function, last.number, 10**6, 10**6 + 3)
    with pytest.raises(depgraph.PlanError, match="the plan is for 1000000"):
        depgraph.apply(model, result.plan, inplace=True)
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in before.items()}


def test_a_plan_of_the_format_before_is_read() -> None:
    plan = Plan(request={"round_to": 8}, shapes={"a": (5,)})
    old = json.loads(plan.to_json())
    old |= {"format": 2, "asked": old.pop("request")}
    assert Plan.from_json(json.dumps(old)).to_json() == plan.to_json()
    with pytest.raises(depgraph.PlanError, match="plan format 1 is not supported: this version reads 3"):
        Plan.from_json(json.dumps(old | {"format": 1}))
