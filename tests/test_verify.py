"""What verification must not object to: runs of the masked original that are right, and results that are."""

from __future__ import annotations

import enum

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
from depgraph.base.errors import VerificationError
from depgraph.verify.verify import verify


class Narrow(nn.Module):
    """stem -> `between` -> head; the 14 channels of the stem must shrink to 7."""

    def __init__(self, head: int = 14) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 14), nn.Linear(head, 3)

    def between(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.stem(x)))


class Noisy(Narrow):
    """Draws at random in forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn(x.shape, dtype=x.dtype))

    def between(self, y: Tensor) -> Tensor:
        return y.relu()


class Uncovered(Narrow):
    """Patches that do not cover the last row and column of what they are folded into."""

    def between(self, y: Tensor) -> Tensor:
        image = y.unflatten(1, (3, 3)).permute(0, 3, 1, 2)
        folded = F.fold(F.unfold(image, 2, stride=2), (3, 3), 2, stride=2)
        return (folded + folded.sigmoid()).flatten(2).transpose(1, 2)


class Counted(Narrow):
    """Rows repeated by counts that are computed, and a mask of integers joined of two."""

    def between(self, y: Tensor) -> Tensor:
        kinds = torch.cat([torch.zeros(4, dtype=torch.int64), torch.arange(5) % 2])
        counts = (kinds == 0).long() + 1
        rows = torch.repeat_interleave(y, counts, dim=1)
        seen = torch.where(kinds.repeat_interleave(counts) == 0, 1.0, 2.0)
        return rows * seen[:, None]


class Kind(enum.Enum):
    """A choice that a module holds."""

    PLAIN = 1


class Choosing(Narrow):
    """Holds an enumeration, beside a number that forward needs as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.kind, self.width = Kind.PLAIN, 14

    def between(self, y: Tensor) -> Tensor:
        return y.reshape(-1, self.width).relu()


@pytest.mark.parametrize("kind", [Noisy, Uncovered, Counted, Choosing])
def test_right_results_verify(kind: type[Narrow]) -> None:
    """Values are compared, nothing is frozen for a failed comparison, and no module is rewritten.

    Nothing but `head` takes what is pruned: with its columns zeroed the original is the masked original.
    """
    torch.manual_seed(0)
    model, x = kind().double().eval(), torch.randn(2, 9, 5, dtype=torch.float64)
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    assert result.report.verification.status == "equal"
    assert not result.report.notes
    assert not result.plan.rewrites
    assert result.model.stem.out_features == 7
    with torch.no_grad():
        model.head.weight *= result.plan.mask("head.weight")
        torch.manual_seed(1)
        wanted = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(result.model(x), wanted, rtol=1e-9, atol=1e-9)


class Systems(nn.Module):
    """A triangular system of equations for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 35), nn.Linear(5, 35), nn.Linear(35, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = (
            layer(x).unflatten(2, (7, -1)).transpose(1, 2) for layer in (self.a, self.b)
        )  # [n, heads, tokens, 5]
        matrix = (a @ b.mT).tril(-1) + torch.eye(x.shape[1])
        y = torch.linalg.solve_triangular(matrix, b, upper=False)
        return self.out(y.transpose(1, 2).flatten(2))


def test_systems_of_equations_of_heads_that_go() -> None:
    torch.manual_seed(0)
    model, x = Systems().eval(), torch.randn(2, 11, 5)
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    assert result.model.out.in_features == 4 * 5
    assert result.report.verification.status == "equal"


def test_a_small_deviation_is_found_and_a_rounding_error_is_none() -> None:
    """Values of float64 are compared: a thousandth of the largest entry of the output is a wrong result, and more of its spread."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(5, 14), nn.ReLU(), nn.Linear(14, 3)).double().eval(),
        torch.randn(9, 5).double(),
    )
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    right = result.model[2].bias.detach().clone()
    largest = float(result.model(x).detach().abs().max())
    for wrong in (1e-8, 1e-3):
        with torch.no_grad():
            result.model[2].bias.copy_(right + wrong * largest)
        if wrong < 1e-6:
            assert verify(model, result.model, result.plan, x).status == "equal"
        else:
            with pytest.raises(VerificationError, match=r"deviates from the masked original by 0\.00"):
                verify(model, result.model, result.plan, x)
