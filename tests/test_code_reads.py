"""What the code of a model reads when it is called, told from the code alone."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from depgraph.tracing.code_reads import other_forwards, read_by_calls, read_elsewhere, reads_of


def helper(module: Any) -> int:
    return deeper(module)


def deeper(module: Any) -> int:
    return int(module.by_helper)


class Base(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.by_base


class Reader(Base):
    def forward(self, x: Tensor) -> Tensor:
        def inner() -> int:
            return self.by_closure

        x = super().forward(x) + self.prop + self.cached + helper(self) + getattr(self, "by" + "_text", 0)
        return self._step(x) + sum(self.inside for _ in range(2)) + inner()

    def _step(self, x: Tensor) -> Tensor:
        return x + self.by_step

    @property
    def prop(self) -> int:
        return self.by_property

    @cached_property
    def cached(self) -> int:
        return self.by_cached

    def other(self) -> int:
        return self.by_other

    def forward_split(self, x: Tensor) -> Tensor:
        return x * self.by_split

    def forward_more(self, x: Tensor, y: Tensor) -> Tensor:
        return x * self.by_more * y

    def forward_same(self, x: Tensor) -> Tensor:
        return self._step(x)


@pytest.mark.parametrize("name", ["base", "helper", "step", "property", "cached", "closure"])
def test_what_forward_leads_to(name: str) -> None:
    assert f"by_{name}" in read_by_calls(Reader())[Reader]


def test_what_it_does_not_lead_to() -> None:
    assert not {"by_other", "by_split", "by_more"} & read_by_calls(Reader())[Reader]
    assert {"by_other", "by_split", "by_more"} <= read_elsewhere(Reader)
    assert "inside" in reads_of(Reader).own


def test_methods_that_stand_in_for_forward() -> None:
    """Of the same arguments, and with an attribute that forward does not read."""
    assert other_forwards(Reader) == ("forward_split",)
    assert other_forwards(nn.Linear) == ()


def test_a_call_of_a_tensor_reads_no_module() -> None:
    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(x.dim() - 1) + torch.ones(x.size(0))

    assert "dim" not in read_by_calls(Asking())[Asking]
