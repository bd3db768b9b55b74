"""The parts of a run with masks by themselves: grids, products of groups, weights on demand, ops of the user's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from depgraph.base.inputs import Arguments
from depgraph.base.weights import InMemory
from depgraph.plan.plan import Cut, Plan
from depgraph.rules import STATED
from depgraph.surgery.on_demand import Weight
from depgraph.verify.masked import MaskedRun
from depgraph.verify.masked.contraction import _alike
from depgraph.verify.masked.quantisation import _axis, _rounded, _without_dead
from depgraph.verify.masked.run import _grouped_mm
from depgraph.verify.runs import Setup, _Masked, run_masked


def test_steps_of_a_grid_are_counted_from_its_zero_and_end_at_its_bounds() -> None:
    x = torch.tensor([-3.0, -2.5, -0.6, 0.2, 0.9, 3.0, 5.0], dtype=torch.float64)
    value, inside = _rounded(x, torch.tensor(0.5), torch.tensor(1.2), None, -4, 7)
    # steps -6 -5 -1 0 2 6 10, and 1 for the zero; of these -4 ... 7 are on the grid
    assert value.tolist() == [-2.5, -2.5, -0.5, 0, 1, 3, 3]
    assert inside.tolist() == [False, True, True, True, True, True, False]


@pytest.mark.parametrize("axis", [1, -2])
def test_each_channel_has_a_grid_of_its_own(axis: int) -> None:
    x = torch.tensor([[[0.7, 9.0], [0.7, 9.0]]], dtype=torch.float64)
    value, inside = _rounded(x, torch.tensor([0.5, 2.0]), torch.tensor([0, 1]), axis, -8, 7)
    assert value.tolist() == [[[0.5, 3.5], [0.0, 8.0]]]  # 9 / 2 is 4.5, which is rounded to 4
    assert inside.tolist() == [[[True, False], [True, True]]]


def test_channels_are_along_the_axis_that_an_op_names() -> None:
    x = torch.zeros(2, 3, 4)
    assert _axis({"self": x}) is None
    assert _axis({"self": x, "axis": -1}) == 2
    assert _axis({"self": x, "axis": 0}) == 0
    assert _axis({"self": x, "per_row_fake_quant": True, "ch_axis": -2}) == 1
    assert _axis({"self": x, "per_row_fake_quant": False, "ch_axis": 1}) is None


def test_dead_entries_widen_no_observed_range() -> None:
    x, alive = (
        torch.tensor([[5.0, 0, 3], [-1, 0, 0], [0, 0, 0]]),
        torch.tensor([[1.0, 0, 1], [1, 0, 0], [0, 0, 0]]),
    )
    assert _without_dead(x, alive, 0).tolist() == [[5, 3, 3], [-1, -1, -1], [0, 0, 0]]
    assert _without_dead(x, alive, 1).tolist() == [[5, 0, 3], [-1, 0, 3], [-1, 0, 3]]
    assert _without_dead(x, alive, None).tolist() == [[5, -1, 3], [-1, -1, -1], [-1, -1, -1]]


def test_one_row_stands_for_rows_of_a_mask_that_are_alike() -> None:
    alike = _alike(torch.tensor([[1.0, 0], [1, 0], [1, 0]]))
    assert alike is not None
    assert alike.tolist() == [[1, 0]]
    assert _alike(torch.tensor([[1.0, 0], [1, 1]])) is None
    assert _alike(torch.tensor([[1.0, 0]])) is None


def test_products_of_groups() -> None:
    dice = torch.Generator().manual_seed(0)
    rows, tables = (torch.randn(s, generator=dice, dtype=torch.float64) for s in ((5, 3), (2, 3, 4)))
    ends = torch.tensor([2, 5])
    by_rows = torch.cat([rows[:2] @ tables[0], rows[2:] @ tables[1]])
    assert torch.allclose(_grouped_mm(rows, tables, ends), by_rows)
    by_columns = torch.cat([tables[0].T @ rows[:2].T, tables[1].T @ rows[2:].T], 1)
    assert torch.allclose(_grouped_mm(tables.mT, rows.T, ends), by_columns)
    other = torch.randn(5, 4, generator=dice, dtype=torch.float64)
    summed = torch.stack([rows[:2].T @ other[:2], rows[2:].T @ other[2:]])
    assert torch.allclose(_grouped_mm(rows.T, other, ends), summed)
    assert torch.allclose(_grouped_mm(tables.mT, tables), torch.bmm(tables.mT, tables))


@pytest.mark.parametrize("rows", [None, [0, 2]])
@pytest.mark.parametrize("columns", [None, [0, 1, 3]])
@pytest.mark.parametrize("known", [False, True])
def test_a_product_with_a_weight_on_demand_is_alive_where_both_are(
    rows: list[int] | None, columns: list[int] | None, known: bool
) -> None:
    source = torch.arange(1.0, 13).view(3, 4)
    keep = tuple(None if k is None else torch.tensor(k).numpy() for k in (rows, columns))
    cut = None if rows is None and columns is None else Cut((3, 4), keep)
    run, x = MaskedRun(), torch.ones(2, 4)
    if known:  # of its second row nothing stays but what the weight does not read
        run.give(
            x,
            torch.tensor(
                [[1.0, 1, 1, 1], [0, 0, 0, 0]] if columns is None else [[1.0, 1, 1, 1], [0, 0, 1, 0]]
            ),
        )
    y = _Masked(run).product(x, Weight("w", source, cut, True, InMemory({"w": source}), torch.float32))
    alive = torch.ones(2, 3)
    if rows is not None:
        alive[:, 1] = 0
    if known:
        alive[1] = 0
    assert torch.equal(run.full(y), alive)
    sums = source.sum(1) if columns is None else source[:, columns].sum(1)
    assert torch.equal(y, sums.expand(2, 3) * alive)


def test_what_a_user_states_of_an_op_counts_also_where_torch_knows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = torch.library.Library("depgraph_parts", "DEF")
    library.define("tilt(Tensor x) -> Tensor", tags=(torch.Tag.pointwise,))
    library.impl("tilt", lambda x: x + 1, "CompositeExplicitAutograd")

    def stated(x: Tensor, masks: list[Tensor]) -> Tensor:
        return x + masks[0].sum()

    monkeypatch.setitem(STATED, "depgraph_parts::tilt", stated)
    x, run = torch.tensor([1.0, 0, 3]), MaskedRun()
    run.give(x, torch.tensor([1.0, 0, 1]))
    with run:
        y = torch.ops.depgraph_parts.tilt(x)
    assert y.tolist() == [3, 0, 5]


class Watched(nn.Linear):
    """Tells where its weight is, and how wide its entries are."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([self.weight.data_ptr(), self.weight.itemsize])


def test_weights_that_lose_nothing_are_copied_where_their_type_changes_alone() -> None:
    model, arguments = Watched(3, 2), Arguments((torch.ones(1, 3),))
    ((own,), _), ((wide,), _) = (
        run_masked(model, Plan(), Setup(arguments, t)) for t in (None, torch.float64)
    )
    assert own.tolist() == [model.weight.data_ptr(), 4]
    assert wide[0] != own[0]
    assert wide[1] == 8
