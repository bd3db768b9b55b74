"""The parts of a proof by themselves: weights and inputs that are drawn, what is tried, and what counts as an answer."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.base.errors import VerificationError
from depgraph.base.inputs import Arguments
from depgraph.plan.plan import Plan
from depgraph.verify.conditions import drawn_inputs, other_sizes
from depgraph.verify.masked import Unfollowed
from depgraph.verify.runs import Setup
from depgraph.verify.verify import SMALL, SPARING, _Proof, _tells
from depgraph.verify.weights import TABLE, DrawnValues, _tables

VERIFY = sys.modules["depgraph.verify.verify"]

# --------------------------------------------------------------------------------- values that are drawn


def test_drawn_values_can_be_used_with_gradients_wherever_they_were_first_asked_for() -> None:
    _tables.cache_clear()
    with torch.inference_mode():
        assert not any(t.is_inference() for t in _tables())
    assert not any(t.is_inference() for t in _tables())


def test_drawn_values_vary_as_those_of_a_fresh_layer() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "vector": (5,), "number": (), "matrix": (5, 8), "image": (5, 2, 2, 2), "signal": (5, 8, 3), "empty": (5, 0),
    }  # fmt: skip
    drawn = DrawnValues({n: torch.zeros(s) for n, s in shapes.items()}, {*shapes})
    found = {n: drawn._table(n)[2] for n in shapes}
    assert found == {"vector": 1, "number": 1, "matrix": 0.5, "image": 0.5, "signal": 0.5, "empty": 2**0.5}
    normal, positive = _tables()
    assert abs(float(normal.mean())) < 0.01
    assert abs(float(normal.std()) - 1) < 0.01
    assert 0.6 <= float(positive.min()) < 0.61
    assert 1.39 < float(positive.max()) <= 1.4


def test_a_tensor_larger_than_the_table_takes_its_values_over_again() -> None:
    drawn = DrawnValues({"v": torch.zeros(2 * TABLE + 5)}, {"v"})
    whole, begin = drawn.whole("v"), drawn._table("v")[1]
    wanted = _tables()[1].roll(-begin)
    assert torch.equal(whole[:TABLE], wanted)
    assert torch.equal(whole[TABLE : 2 * TABLE], wanted)
    assert torch.equal(whole[2 * TABLE :], wanted[:5])
    some = torch.tensor([0, TABLE - begin - 1, TABLE - begin, 2 * TABLE + 4])
    assert torch.equal(drawn.at("v", some), whole[some])


def drawn(x: Tensor, free: bool, seed: int = 1) -> Tensor:
    (value,) = drawn_inputs(Arguments((x,)), seed, free).args
    assert value.shape == x.shape
    assert value.dtype == x.dtype
    found: Tensor = value
    return found


@pytest.mark.parametrize(
    ("x", "low", "high"),
    [
        (torch.linspace(-1, 3, 400), -1, 3),
        (torch.full((400,), 4.0), 2, 6),
        (torch.full((400,), -4.0), -6, -2),
        (torch.zeros(400), 0, 1),
        (torch.full((400,), torch.nan), 0, 1),
    ],
)
def test_inputs_are_drawn_between_the_bounds_of_the_example(x: Tensor, low: float, high: float) -> None:
    value, edge = drawn(x, free=False), 0.1 * (high - low)
    assert low <= float(value.min()) < low + edge
    assert high - edge < float(value.max()) <= high


def test_inputs_that_are_drawn_freely_have_the_other_sign_in_the_sum() -> None:
    for seed in range(6):
        assert (
            float(drawn(torch.ones(9), True, seed).sum()) < 0 < float(drawn(-torch.ones(9), True, seed).sum())
        )
    value = drawn(torch.zeros(4000), True)
    assert abs(float(value.std()) - 1) < 0.1
    assert not torch.equal(value, drawn(torch.zeros(4000), True, 2))
    assert bool(drawn(torch.full((9,), torch.nan), True).isfinite().all())


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize(
    "x", [torch.arange(5), torch.tensor([0, -torch.inf, 2]), torch.zeros(0, 3), torch.eye(3).to_sparse()]
)
def test_indices_and_masks_of_fillers_stay(x: Tensor, free: bool) -> None:
    value = drawn(x, free)
    assert value is not x
    assert torch.equal(value.to_dense(), x.to_dense())


def test_other_sizes_change_the_batch_and_then_what_may_count_positions() -> None:
    given = [
        torch.tensor(3.0), torch.arange(4 * 3 * 20 * 8.0).view(4, 3, 20, 8), torch.arange(28).view(4, 7),
        torch.rand(4, 5, 6), torch.rand(4, 9), torch.rand(5, 3), torch.rand(4, 2, 16, 15), torch.zeros(4, 0, 2),
    ]  # fmt: skip
    found = list(other_sizes(Arguments(tuple(given))))
    assert [[tuple(t.shape) for t in arguments.args] for arguments in found] == [
        [(), (5, 3, 10, 12), (5, 8), (5, 6, 6), (5, 9), (5, 3), (5, 2, 8, 22), (5, 1, 2)],
        [(), (5, 3, 20, 8), (5, 8), (5, 5, 7), (5, 9), (5, 3), (5, 2, 16, 15), (5, 0, 3)],
        [(), (5, 3, 20, 8), (5, 7), (5, 5, 6), (5, 9), (5, 3), (5, 2, 16, 15), (5, 0, 2)],
    ]
    images = given[1][[0, 1, 2, 3, 0]][:, :, :10][:, :, :, [*range(8), 0, 1, 2, 3]]
    assert torch.equal(found[0].args[1], images)
    assert torch.equal(found[0].args[2], given[2][[0, 1, 2, 3, 0]][:, [*range(7), 0]])
    assert all(torch.equal(arguments.args[5], given[5]) for arguments in found)


def test_what_has_a_batch_alone_has_one_other_size_and_a_number_none() -> None:
    (found,) = other_sizes(Arguments((torch.rand(4, 9),)))
    assert found.args[0].shape == (5, 9)
    assert not list(other_sizes(Arguments((torch.tensor(1.0), 3))))


# -------------------------------------------------------------------------------------- what counts, and what is tried


@pytest.mark.parametrize(
    ("before", "now", "tells"),
    [
        ([torch.zeros(2, 5)], [torch.zeros(3, 5)], True),
        ([torch.zeros(2, 5)], [torch.zeros(2, 5)], False),  # of another batch than the inputs
        ([torch.zeros(7, 5)], [torch.zeros(7, 5)], True),  # a table
        ([torch.zeros(2, 5)], [torch.zeros(3)], False),
        ([torch.tensor(1.0)], [torch.tensor(2.0)], True),
        ([torch.zeros(2)], [torch.zeros(3), torch.zeros(1)], True),
        ([torch.zeros(2)], [torch.tensor([0.0, torch.nan, 0])], False),
        ([torch.zeros(2), torch.zeros(2)], [torch.zeros(3), torch.tensor([torch.inf, 0, 0])], False),
        ([torch.zeros(2).long()], [torch.zeros(3).long()], True),
    ],
)
def test_outputs_that_are_finite_and_follow_the_batch_tell_something(
    before: list[Tensor], now: list[Tensor], tells: bool
) -> None:
    run = Setup(Arguments((torch.zeros(3, 4),)), batch=2)
    assert _tells(before, now, run) == tells


def test_a_model_without_values_is_not_compared() -> None:
    model = nn.Linear(3, 2, device="meta")
    proof = depgraph.verify(model, model, Plan(), torch.ones(1, 3))
    assert (proof.status, proof.detail) == ("skipped", "the model is on the meta device: it has no values")


def a_proof(**given: Any) -> _Proof:
    model = nn.Linear(3, 2)
    proof = _Proof(model, model, Plan(), 1e-5, {"values": None, "smaller": None})
    vars(proof).update(given)
    return proof


POSITIVE = Arguments((torch.linspace(1, 2, 6).view(2, 3),))


def test_inputs_that_told_nothing_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, bool]] = []

    def compare(self: _Proof, run: Setup) -> None:
        x = run.arguments.args[0]
        tried.append((len(x), bool((x > 0).all())))
        if len(x) > 2:
            raise TypeError("this batch is not for me")
        if not tried[-1][1]:
            raise VERIFY._NotAccepted

    monkeypatch.setattr(_Proof, "_compare", compare)
    proof = a_proof()
    assert proof._attempt(POSITIVE, [None])
    assert tried == [(3, False), (2, False), (2, True)]
    tried.clear()
    assert proof._attempt(POSITIVE, [None], turn=1)
    assert tried == [(2, True)]
    assert not proof._attempt(Arguments((torch.ones(3, 3),)), [None])
    tried.clear()
    assert proof._attempt(POSITIVE, [None])
    assert len(tried) == 3, "where nothing was accepted, all is tried again"


def test_what_float32_does_not_show_to_be_equal_is_computed_in_float64_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds: list[torch.dtype | None] = []

    def compare(self: _Proof, run: Setup) -> None:
        kinds.append(run.dtype)
        if run.dtype == torch.float32 or wrong:
            raise VerificationError("they differ")

    monkeypatch.setattr(_Proof, "_compare", compare)
    proof, wrong = a_proof(), False
    assert proof._attempt(POSITIVE, [None])
    assert proof._attempt(POSITIVE, [None])
    assert kinds == [torch.float32, torch.float64, torch.float64]
    wrong = True
    with pytest.raises(VerificationError):
        proof._attempt(POSITIVE, [None])


@pytest.mark.parametrize(
    ("count", "hidden", "found", "turns"),
    [
        (SMALL, 9, 0, 5), (SMALL, 9, 1, 5), (SMALL, 2, 1, 2), (SMALL, 0, 0, 1),
        (SMALL + 1, 9, 0, 2), (SMALL + 1, 9, 1, 3), (SPARING, 9, 1, 3), (SPARING, 0, 0, 1),
        (SPARING + 1, 9, 1, 1), (SPARING + 1, 0, 0, 0),
    ],
)  # fmt: skip
def test_values_are_drawn_as_often_as_the_size_of_a_model_allows(
    monkeypatch: pytest.MonkeyPatch, count: int, hidden: int, found: int, turns: int
) -> None:
    """Of `hidden` entries that move no output each turn shows `found`."""
    made: list[int] = []

    def attempt(
        self: _Proof, arguments: Arguments, weights: Any, training: bool = False, turn: int = 0
    ) -> bool:
        made.append(turn)
        left = max(0, hidden - found * len(made))
        self.unmoved = {("weight", 0): torch.arange(9) < left} if left else {}
        return True

    monkeypatch.setattr(_Proof, "_attempt", attempt)
    start: Any = {("weight", 0): torch.arange(9) < hidden} if hidden else {}
    a_proof(count=count, unmoved=start)._elsewhere(POSITIVE)
    assert made == list(range(turns))


@pytest.mark.parametrize(
    ("error", "whole", "batch", "on_demand", "times"),
    [
        (Unfollowed("odd"), False, None, {"weight"}, 1),
        (TypeError("no"), False, None, {"weight"}, 2),
        (TypeError("no"), True, None, {"weight"}, 1),
        (TypeError("no"), False, 2, {"weight"}, 1),
        (TypeError("no"), False, None, set(), 1),
    ],
)
def test_weights_are_made_as_a_whole_where_code_does_not_run_with_them_on_demand(
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    whole: bool,
    batch: int | None,
    on_demand: set[str],
    times: int,
) -> None:
    wholes: list[bool] = []

    def run_masked(model: nn.Module, plan: Plan, run: Any) -> Any:
        wholes.append(run.whole)
        raise error

    monkeypatch.setattr(VERIFY, "run_masked", run_masked)
    run: Any = SimpleNamespace(whole=whole, batch=batch, on_demand=lambda model: on_demand)
    with pytest.raises(type(error), match=str(error)):
        a_proof(whole=whole)._compare(run)
    assert wholes == [whole, True][:times]
