"""One thread in each process: the networks here are too small for more, and the cores are for `make test`'s processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from two_blocks import Net

import depgraph
from depgraph.rules import REGISTRY, STATED
from depgraph.select import BUDGETS

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    """Every test draws the same numbers, in whatever order and process it runs."""
    torch.manual_seed(0)


@pytest.fixture
def stated() -> Iterator[Callable[..., Any]]:
    """`depgraph.op_rule`, whose rules are forgotten after the test; so are budgets."""
    tables: tuple[dict[str, Any], ...] = (REGISTRY, STATED, BUDGETS)
    before = [dict(table) for table in tables]
    yield depgraph.op_rule
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 7, 13, generator=torch.Generator().manual_seed(1))
