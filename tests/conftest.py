"""One thread: the networks here are too small for more, and CI machines have few cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import depgraph
from depgraph.rules import REGISTRY, STATED

torch.set_num_threads(1)


@pytest.fixture
def stated() -> Iterator[Callable[..., Any]]:
    """`depgraph.op_rule`, whose rules are forgotten after the test."""
    before = dict(REGISTRY), dict(STATED)
    yield depgraph.op_rule
    for table, rows in zip((REGISTRY, STATED), before, strict=True):
        table.clear()
        table.update(rows)
