"""Weights that are made by rows compute what the whole matrix does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from depgraph.base.weights import InMemory
from depgraph.plan.plan import Cut
from depgraph.surgery import on_demand
from depgraph.surgery.on_demand import Weight

ROWS, COLUMNS = np.array([0, 2, 3, 7]), np.array([1, 2, 4])


@pytest.fixture(params=[1, 11, 1 << 17], ids=["row by row", "two rows", "whole"], autouse=True)
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_demand, "BLOCK", request.param)


def matrix(
    rows: bool, columns: bool, zeroed: bool, kind: torch.dtype = torch.float64
) -> tuple[Weight, Tensor]:
    """A weight [8, 5] of which rows or columns go, and the matrix that it stands for."""
    source = torch.randn(8, 5, dtype=torch.float64)
    cut = Cut((8, 5), (ROWS if rows else None, COLUMNS if columns else None)) if rows or columns else None
    if cut is None:
        value = source
    elif zeroed:
        value = source * cut.mask()
    else:
        value = source[ROWS if rows else slice(None)][:, COLUMNS if columns else slice(None)]
    return Weight("w", source, cut, zeroed, InMemory({"w": source}), kind), value.to(kind)


@pytest.mark.parametrize("zeroed", [True, False])
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("rows", [True, False])
def test_products_and_rows(rows: bool, columns: bool, zeroed: bool) -> None:
    weight, value = matrix(rows, columns, zeroed)
    assert weight.shape == value.shape
    assert weight.by_rows()
    assert weight.bytes == value.numel() * 8
    assert torch.equal(weight.whole(), value)
    assert torch.equal(weight.mask() > 0, value != 0)
    x = torch.randn(2, 3, value.shape[1], dtype=torch.float64)
    torch.testing.assert_close(weight.times(x), x @ value.T)
    wanted = torch.tensor([1, 3, 1, 0])
    assert torch.equal(weight.at(wanted), value[wanted])
    assert torch.equal(weight.whole(), value)  # nothing was written into the source
    if not zeroed:
        gradient = torch.randn(2, 3, value.shape[0], dtype=torch.float64)
        torch.testing.assert_close(weight.back(gradient), gradient @ value)


def test_blocks_are_the_rows_that_stay_in_the_type_of_the_run() -> None:
    weight, _ = matrix(True, True, False, torch.float32)
    found = torch.cat([values.clone() for _, _, values in weight.blocks()])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, weight.source[ROWS].float())
    spans = [(first, last) for first, last, _ in weight.blocks()]
    assert spans[0][0] == 0
    assert spans[-1][1] == len(ROWS)
    assert [a for a, _ in spans[1:]] == [b for _, b in spans[:-1]]
    assert all(last - first <= max(1, on_demand.BLOCK // 5) for first, last in spans)


def test_what_is_no_matrix_or_cut_otherwise_is_not_made_by_rows() -> None:
    cube = torch.randn(4, 3, 2)
    assert not Weight("w", cube, None, False, InMemory({"w": cube}), torch.float32).by_rows()
    grouped = Cut((4, 2), (None, None), blocks=[np.array([0]), np.array([1])])
    flat = torch.randn(4, 2)
    assert not Weight("w", flat, grouped, False, InMemory({"w": flat}), torch.float32).by_rows()


@pytest.mark.parametrize(
    ("block", "shape", "spans"),
    [
        (4, (8, 1), [(0, 4), (4, 8)]), (4, (7, 2), [(0, 2), (2, 4), (4, 6), (6, 7)]), (5, (3, 2), [(0, 2), (2, 3)]),
        (3, (2, 4), [(0, 1), (1, 2)]), (4, (5, 0), [(0, 4), (4, 5)]), (9, (0, 3), []), (9, (3, 3), [(0, 3)]),
    ],
)  # fmt: skip
def test_a_block_has_as_many_rows_as_fit(
    block: int, shape: tuple[int, int], spans: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_demand, "BLOCK", block)
    source = torch.randn(shape)
    blocks = list(Weight("w", source, None, False, InMemory({"w": source}), torch.float32).blocks())
    assert [(first, last) for first, last, _ in blocks] == spans
