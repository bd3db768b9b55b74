"""Every way to make a number of a size: pruned without a proof, the result is right, or the size stays with the reason."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from math import log as imported_log
from typing import Any

import numpy as np
import pytest
import torch
from checks import check_result
from torch import Tensor, nn

import depgraph

TABLE = {16: 3.0, 8: 5.0, 6: 7.0}
LIST = [0.5 + 0.25 * i for i in range(40)]


def scale(of: Callable[[Any], Any]) -> Callable[[Tensor, Any], Tensor]:
    """The converted number as a factor."""
    return lambda h, n: h * float(of(n))


# How the number enters: each takes the hidden tensor h [batch, 16] and its width, and returns one of the same shape.
SCALES: dict[str, Callable[[Any], Any]] = {
    "int": int,
    "float": float,
    "index": operator.index,
    "complex": lambda n: complex(n).real,
    "bool": lambda n: 2.0 if n else 1.0,
    "not": lambda n: 2.0 if not n else 1.5,
    "abs": abs,
    "negative": lambda n: -n,
    "positive": lambda n: +n,
    "invert": lambda n: ~n,
    "round": round,
    "round to tens": lambda n: round(n, -1),
    "truncated": math.trunc,
    "floor": lambda n: math.floor(n / 3),
    "ceil": lambda n: math.ceil(n / 3),
    "right shift": lambda n: n >> 1,
    "left shift": lambda n: n << 1,
    "shift by it": lambda n: 1 << n,
    "and": lambda n: n & 12,
    "or": lambda n: n | 1,
    "xor": lambda n: n ^ 5,
    "power": lambda n: n**0.5,
    "power of": lambda n: 1.1**n,
    "divmod": lambda n: divmod(n, 5)[0] + divmod(n, 5)[1] / 7,
    "divmod by it": lambda n: divmod(100, n)[1] + 1,
    "log": math.log,
    "log of two": lambda n: math.log(n, 2),
    "imported log": imported_log,
    "log2": math.log2,
    "exp": lambda n: math.exp(n / 16),
    "sqrt": math.sqrt,
    "isqrt": math.isqrt,
    "gcd": lambda n: math.gcd(n, 12),
    "math.pow": lambda n: math.pow(n, 0.25),
    "math.prod": lambda n: math.prod([n, 2]),
    "fsum": lambda n: math.fsum([n, 1]),
    "comb": lambda n: math.comb(n, 2),
    "factorial": lambda n: math.factorial(n) ** 0.01,
    "sum": lambda n: sum([n, 1]),
    "max": lambda n: max(n, 12),
    "min": lambda n: min(n, 12),
    "sorted": lambda n: sorted([n, 12])[0],
    "text": lambda n: len(str(n)) + int(str(n)[0]),
    "format": lambda n: float(f"{n:d}"),
    "percent": lambda n: float("%d" % n),  # noqa: UP031
    "repr": lambda n: float(repr(n)),
    "hexadecimal": lambda n: len(hex(n)) + len(bin(n)),
    "character": lambda n: ord(chr(n)),
    "bit length": lambda n: n.bit_length(),
    "bytes": lambda n: sum(n.to_bytes(2, "big")),
    "range": lambda n: sum(1 for _ in range(n)),
    "copies of a list": lambda n: sum([1] * n),
    "copies of a text": lambda n: len("a" * n),
    "slice of a list": lambda n: sum(LIST[:n]),
    "index into a list": lambda n: LIST[n],
    "key of a table": lambda n: TABLE[n],
    "key or default": lambda n: {4: 3.0, 8: 5.0}.get(n, 1.0),
    "in a set": lambda n: 2.0 if n in {8, 12} else 1.0,
    "enumerate": lambda n: next(iter(enumerate([0], n)))[0],
    "numerator": lambda n: n.numerator + n.real,
    "fraction": lambda n: Fraction(n, 3).numerator,
    "np.prod": lambda n: np.prod([n, 2]),
    "np.array": lambda n: np.array([n, 2]).sum(),
    "np.int64": np.int64,
    "np.log": np.log,
    "np.zeros": lambda n: np.zeros(n).size,
    "np.arange": lambda n: np.arange(n).sum(),
    "np.sqrt": lambda n: int(np.sqrt(n) * 10),
}
FILLS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "tensor": lambda h, n: h * torch.tensor(float(n)),
    "tensor of an int": lambda h, n: h * torch.tensor(n),
    "tensor of a list": lambda h, n: h * torch.tensor([n, 2]).sum(),
    "as_tensor": lambda h, n: h * torch.as_tensor(n),
    "full": lambda h, n: h + torch.full((1,), float(n)),
    "full of an int": lambda h, n: h + torch.full((1,), n),
    "full_like": lambda h, n: torch.full_like(h, n) + h,
    "fill_": lambda h, n: h + torch.zeros(1).fill_(n),
    "new_tensor": lambda h, n: h * h.new_tensor(n),
    "IntTensor": lambda h, n: h * torch.IntTensor([n]),
    "scalar": lambda h, n: h + n,
    "in place": lambda h, n: h.clone().mul_(n),
    "clamp": lambda h, n: h.clamp(max=n / 20),
    "alpha": lambda h, n: torch.add(h, h, alpha=n),
    "where": lambda h, n: torch.where(h > 0, h, n),
    "linspace": lambda h, n: h * torch.linspace(0, n, 5).sum(),
    "linspace steps": lambda h, n: h * torch.linspace(0, 1, n).sum(),
    "arange": lambda h, n: h * torch.arange(n).sum(),
    "eye": lambda h, n: h @ torch.eye(n, dtype=h.dtype),
    "numel": lambda h, n: h * (h.numel() // h.shape[0]),
    "int of numel": lambda h, n: h * int(h.numel() / h.shape[0]),
    "nbytes": lambda h, n: h * (h.nbytes / h.shape[0]),
    "stride": lambda h, n: h * h.stride()[0],
    "stride of a dim": lambda h, n: h * h.stride(0),
    "length": lambda h, n: h * len(h[0]),
    "size": lambda h, n: h * h.size(-1),
    "a mean by hand": lambda h, n: h - h.sum(-1, keepdim=True) / n,
    "dropout": lambda h, n: h * torch.nn.functional.dropout(torch.ones(1), 1 / n, training=False) * (1 / n),
    "epsilon": lambda h, n: torch.nn.functional.layer_norm(h[:, :4], (4,), eps=1 / n)[:, :1] + h,
}
BOUNDS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "half": lambda h, n: parts(h, n // 2),
    "shift": lambda h, n: parts(h, n >> 1),
    "int of a share": lambda h, n: parts(h, int(n * 0.25)),
    "int of a quotient": lambda h, n: parts(h, int(n / 4)),
    "ceil": lambda h, n: parts(h, math.ceil(n / 4)),
    "floor": lambda h, n: parts(h, math.floor(n / 4)),
    "round": lambda h, n: parts(h, round(n * 0.25)),
    "minus": lambda h, n: parts(h, n - n // 4),
    "negated": lambda h, n: parts(h, -(-n // 4)),
    "divmod": lambda h, n: parts(h, divmod(n, 4)[0]),
    "isqrt": lambda h, n: parts(h, math.isqrt(n)),
    "text": lambda h, n: parts(h, int(str(n)) // 4),
    "int tensor": lambda h, n: parts(h, torch.IntTensor([n // 2])[0]),
    "numpy": lambda h, n: parts(h, int(np.prod([n, 2])) // 8),
    "min": lambda h, n: parts(h, min(n, 5)),
    "view": lambda h, n: h.view(-1, int(n)),
    "view by prod": lambda h, n: h.view(int(np.prod(h.shape[:1])), int(np.prod(h.shape[1:]))),
    "view by a list": lambda h, n: h.view([int(s) for s in h.shape]),
    "shape as a list": lambda h, n: h * 2 if list(h.shape) == [h.shape[0], n] else h,
    "shape as a literal list": lambda h, n: h * 2 if list(h.shape[1:]) == [16] else h,
    "len of the weight": lambda h, n: h.view(-1, len(h.t())),
    "flatten by numel": lambda h, n: h.view(int(h.numel() / n), n),
    "as text in a view": lambda h, n: h.view(-1, int(f"{n}")),
    "ones": lambda h, n: h * torch.ones(int(n)),
    "ones of floats": lambda h, n: h * torch.ones(int(float(n))),
    "split": lambda h, n: torch.cat([p * (i + 1) for i, p in enumerate(h.split(int(n / 2), 1))], 1),
    "numpy float": lambda h, n: parts(h, int(np.sqrt(n) * 2)),
    "a loop": lambda h, n: torch.stack([h[:, i] * (1 + i) for i in range(n)], 1),
}


def parts(h: Tensor, place: Any) -> Tensor:
    """What stands before `place` doubled."""
    return torch.cat([h[:, :place] * 2, h[:, place:]], 1)


class Net(nn.Module):
    """A number that is made of a width, and a layer beside it that can always go."""

    def __init__(self, use: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.use = use
        self.first, self.a, self.b, self.c = (
            nn.Linear(6, 12),
            nn.Linear(12, 16),
            nn.Linear(16, 5),
            nn.Linear(12, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        h = self.a(x)
        return self.b(self.use(h, h.shape[-1])) + self.c(x)


CASES = {
    **{f"scale by {name}": scale(of) for name, of in SCALES.items()},
    **{f"fill: {name}": use for name, use in FILLS.items()},
    **{f"bound: {name}": use for name, use in BOUNDS.items()},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_a_number_made_of_a_size(name: str, ratio: float) -> None:
    torch.manual_seed(0)
    model, x = Net(CASES[name]).eval(), torch.randn(3, 6)
    result = depgraph.prune(model, x, pruning_ratio=ratio, verify=False)
    assert result.model.first.out_features < 12, "the layer that no number holds goes"
    check_result(model, result, x)
    if result.model.a.out_features == 16:
        reasons = [f.reason for f in result.report.frozen if (f.name, f.dim) == ("a.weight", 0)]
        assert reasons or result.report.locked
        assert all(r.text for r in reasons)


FOLLOWED = ["half", "shift", "ceil", "floor", "round", "negated", "divmod", "shape as a list"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLLOWED)
def test_what_can_be_followed_exactly_gets_smaller(name: str) -> None:
    model, x = Net(BOUNDS[name]).eval(), torch.randn(3, 6)
    result = depgraph.prune(model, x, verify=False)
    assert result.model.a.out_features < 16
    check_result(model, result, x)
