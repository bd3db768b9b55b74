"""depgraph as another tool sees it: `foreign/thinner.py` brings a criterion, a constraint and an op rule."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from checks import check_result
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
FOREIGN = ROOT / "tests" / "foreign"


@torch.library.custom_op("thinner::gated", mutates_args=())
def gated(x: Tensor, weight: Tensor) -> Tensor:
    a, b = (x @ weight.T).chunk(2, 1)
    return a * b.sigmoid()


@gated.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2)


def _saved(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    a, b = (x @ weight.T).chunk(2, 1)
    gate = b.sigmoid()
    both = torch.cat([grad * gate, grad * a * gate * (1 - gate)], 1)
    return both @ weight, both.T @ x


gated.register_autograd(_backward, setup_context=_saved)


class Net(nn.Module):
    """A gated layer by the tool's op, a residual stream, and a layer too narrow for the tool's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.back = nn.Linear(5, 23), nn.Linear(19, 23)
        self.weight = nn.Parameter(torch.randn(38, 23))
        self.narrow, self.last = nn.Linear(23, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.back(gated(x, self.weight))
        return self.last(self.narrow(x).tanh())


@pytest.fixture
def thinner(stated: Callable[..., Any]) -> Iterator[ModuleType]:
    """The tool, imported anew; its rule is forgotten afterwards."""
    spec = importlib.util.spec_from_file_location("thinner", FOREIGN / "thinner.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_tool_in_under_sixty_lines_prunes_right(thinner: ModuleType) -> None:
    torch.manual_seed(0)
    model, x = Net().double().eval(), torch.randn(4, 5, dtype=torch.float64)
    small, plan = thinner.thin(model, x, 0.5)
    assert (small.enter.out_features, small.narrow.out_features) == (12, 7)  # 23 -> 12; 7 is narrow
    assert small.weight.shape == (2 * 12, 12)  # 19 -> 12: 10 would be no multiple of four
    check_result(model, SimpleNamespace(model=small, plan=plan), x)
    rows = [model.enter.weight, model.back.weight]  # both make the stream
    spread = sum(w.detach().std(1) for w in rows)
    kept = plan.mask("enter.weight")[:, 0]
    assert kept.nonzero().flatten().tolist() == sorted(spread.topk(12).indices.tolist())


def test_without_the_rule_the_op_freezes_what_it_touches() -> None:
    import depgraph

    graph = depgraph.analyze(Net().eval(), torch.randn(4, 5))
    assert [g.name for g in graph.groups] == ["narrow.weight:0"]


def test_the_tool_is_as_short_as_it_claims() -> None:
    assert len((FOREIGN / "thinner.py").read_text().splitlines()) < 60


@pytest.mark.slow
def test_the_types_hold_for_a_foreign_package(tmp_path: Path) -> None:
    """mypy --strict, in another folder, sees the tool as right and each mistake in `misused.py`."""
    sources = {p.name: p.read_text() for p in sorted(FOREIGN.glob("*.py"))}
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    cache = ROOT / ".mypy_cache" / "foreign"
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={cache}", *sources],
        cwd=tmp_path, capture_output=True, text=True, timeout=540, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    found = set(re.findall(r"^(\w+\.py):(\d+): error: .*\[([\w-]+)\]$", run.stdout, re.MULTILINE))
    wanted = {
        (name, str(number), kind)
        for name, text in sources.items()
        for number, line in enumerate(text.splitlines(), start=1)
        for kind in re.findall(r"# E: ([\w-]+)", line)
    }
    assert found == wanted, run.stdout + run.stderr
    assert len(wanted) == 7
