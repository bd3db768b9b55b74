"""A proof that could have noticed: weights drawn anew, spreads, and what moves no output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_proof_conditions import Two
from torch import Tensor, nn

import depgraph


def width_of(h: Tensor) -> float:
    """Outside of the modules, where no read of a size can become a number."""
    return float(int(h.shape[1]))


class Empty(Two):
    """A width as a number, hidden behind something that the example does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def between(self, h: Tensor) -> Tensor:
        return h * width_of(h)


class Gated(Empty):
    """A gate that is closed at the start."""

    def between(self, h: Tensor) -> Tensor:
        return self.gate * super().between(h)


class Filled(Empty):
    """One entry of the output is a filler."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat([y, torch.full_like(y[:, :1], -1e9)], -1)


class Offset(Empty):
    """An output of small differences on a large constant."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e6 + super().forward(x)


class Chosen(Empty):
    """Nothing but an index is returned."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(-1)


def zero_head(model: Any) -> None:
    nn.init.zeros_(model.b.weight)
    nn.init.zeros_(model.b.bias)


EXAMPLES = {
    "zeros": torch.zeros(4, 6),
    "nan": torch.full((4, 6), float("nan")),
    "empty": torch.zeros(0, 6),
    "one": torch.ones(1, 6),
}


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("kind", [Empty, Gated, Filled, Offset, Chosen])
def test_no_empty_proof(kind: type[Empty], example: str) -> None:
    """The width that is a number stays: on other weights and inputs it shows."""
    torch.manual_seed(0)
    model = kind().eval()
    if kind is Empty:
        zero_head(model)
    result = depgraph.prune(model, EXAMPLES[example])
    assert result.model.a.out_features == 16, result.report.verification
    assert result.model.free[0].out_features == 7


class Unread(Two):
    """What the second layer computes is used, but never shown."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        y = x + self.free(x)
        return y + 0 * self.b(hidden).sum()


def test_what_moves_no_output_is_named() -> None:
    torch.manual_seed(0)
    result = depgraph.prune(Unread().eval(), torch.randn(4, 6))
    proof = result.report.verification
    assert proof.status == "equal"
    assert proof.unproved == ("a.weight:0", "b.weight:0")
    assert "not proved: a.weight:0" in str(result.report)
    assert result.report.to_dict()["verification"]["unproved"] == ["a.weight:0", "b.weight:0"]


class Nothing(nn.Module):
    """Returns no more than signs that never change."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).square() >= 0


def test_a_proof_of_nothing_is_not_equal() -> None:
    proof = depgraph.prune(Nothing().eval(), torch.randn(4, 6)).report.verification
    assert proof.status == "shapes"
    assert proof.unproved


class Late(nn.Module):
    """Units that open on few inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) - 3).relu())


@pytest.mark.parametrize("unit", [3, 5, 7, 9, 11, 6])
def test_units_that_are_dead_on_the_example_are_looked_at(unit: int) -> None:
    """A plan whose two cuts disagree about one unit is refused; the unit behind 6 opens on no draw, and its tensors are named."""
    torch.manual_seed(0)
    model, x = Late().eval(), torch.randn(4, 6)
    graph = depgraph.analyze(model, x)
    mask = torch.ones(16, dtype=torch.bool)
    mask[unit] = False
    plan = depgraph.build_plan(graph, {graph.groups[0].name: mask})
    keep = plan.cuts["b.weight"].keep[1].copy()
    keep[unit] = unit  # in place of the next one, which the first layer still computes
    plan.cuts["b.weight"] = replace(plan.cuts["b.weight"], keep=(None, keep))
    small = depgraph.apply(model, plan)
    if unit == 6:
        assert set(depgraph.verify(model, small, plan, x).unproved) == {"a.weight", "b.weight"}
    else:
        with pytest.raises(depgraph.VerificationError):
            depgraph.verify(model, small, plan, x)


class Halves(nn.Module):
    """Units that are one half where their weights are zero, in a layer's sum, or added up."""

    def __init__(self, added: bool) -> None:
        super().__init__()
        self.a, self.b, self.added = nn.Linear(6, 16), nn.Linear(16, 5), added

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).sigmoid()
        return self.b(h) * (h.sum(-1, keepdim=True) if self.added else 1)


@pytest.mark.parametrize("added", [True, False])
def test_sums_of_what_is_not_zero_are_named(added: bool) -> None:
    torch.manual_seed(0)
    proof = depgraph.prune(Halves(added).eval(), torch.randn(4, 6)).report.verification
    assert proof.status == "equal"
    assert proof.restricted == (("sum",) if added else ())


class Normed(nn.Module):
    """A norm over what stays whole, which in train mode alone is written into a new tensor first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 16), nn.Linear(16, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        if self.training:
            y = torch.zeros_like(y).add_(y)
        return self.norm(x + y)


def test_a_norm_over_what_stays_whole_is_not_named() -> None:
    torch.manual_seed(0)
    proof = depgraph.prune(Normed().train(), torch.randn(4, 6)).report.verification
    assert (proof.status, proof.restricted) == ("equal", ())
