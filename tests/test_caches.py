"""Memoised functions, tables and counters of the user's code: a run of ours leaves nothing there, and finds nothing."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
import time
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import depgraph
from depgraph.tracing.caches import nothing_kept
from depgraph.tracing.sizes import Scalar, Size

rearrange = pytest.importorskip("einops").rearrange
Rearrange = pytest.importorskip("einops.layers.torch").Rearrange


class Attention(nn.Module):
    def __init__(self, dim: int = 12, heads: int = 4, width: int = 6) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv, self.out = nn.Linear(dim, 3 * heads * width), nn.Linear(heads * width, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in self.to_qkv(x).chunk(3, -1))
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_patch_embedding = nn.Sequential(
            Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4), nn.Linear(48, 12)
        )
        self.mix, self.mlp = Attention(), nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.to_patch_embedding(x)
        x = x + self.mix(x)
        return self.head((x + self.mlp(x)).mean(1))


class Tokens(nn.Module):
    """The sizes in its recipes come from tensors, and from an attribute of a child that each model names in its own way."""

    def __init__(self, name: str = "to_patch_embedding") -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)
        self.name, child = name, nn.Identity()
        child.p = 4
        self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        parts = rearrange(h, "b c (h p) w -> b (h w) (p c)", p=getattr(self, self.name).p)
        return self.out(rearrange(h, "b c h w -> b (h w) c")) + parts.mean()


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_what_is_memoised_changes_no_prune() -> None:
    """In a fresh process, a second time, and of a model that was run before: the same is cut."""
    found = []
    for name, runs in (("to_patch_embedding", 0), ("other", 0), ("to_patch_embedding", 3), ("another", 1)):
        torch.manual_seed(0)
        model = Tokens(name).eval()
        for _ in range(runs):
            model(images())
        found.append(parameters(depgraph.prune(model, images()).model))
    assert found == [269] * 4  # of 533
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import torch, depgraph, test_caches as t\ntorch.manual_seed(0)\n"
        "print(t.parameters(depgraph.prune(t.Tokens().eval(), t.images()).model))"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert fresh.stdout.strip() == str(found[0]), fresh.stderr


def test_another_model_compiles_afterwards() -> None:
    depgraph.prune(Patches().eval(), images())
    other = Attention().eval()
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(compiled(x), other(x))
    torch._dynamo.reset()


TABLE: dict[Any, Any] = {}
ORDERED: OrderedDict[Any, Any] = OrderedDict()
DEFAULT: Any = defaultdict(list)
LIST: list[Any] = []
SET: set[Any] = set()
NESTED: dict[str, Any] = {"inner": {}}
LAST: Any = None


class Cache:
    """One object for all models."""

    def __init__(self) -> None:
        self.table: dict[Any, Any] = {}
        self.last: Any = 0


CACHE = Cache()


def counted(function: Any) -> Any:
    known: dict[Any, Any] = {}
    calls = 0

    def inner(n: int) -> Any:
        nonlocal calls
        calls += n
        if n not in known:
            known[n] = function(n)
        return known[n]

    inner.known, inner.calls = known, lambda: calls  # type: ignore[attr-defined]
    return inner


@counted
def tens(n: int) -> Tensor:
    return torch.full((n,), 10.0)


@functools.cache
def ones(n: int) -> Tensor:
    return torch.ones(n)


@functools.cache
def half(n: int) -> int:
    return n // 2


def defaulted(n: int, known: dict[Any, Any] = {}) -> Tensor:  # noqa: B006  as people do
    if n not in known:
        known[n] = torch.ones(n)
    return known[n]


class Writes(nn.Module):
    table: ClassVar[dict[Any, Any]] = {}
    last: Any = 0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        global LAST  # noqa: PLW0603
        h = self.a(x)
        n = h.shape[-1]
        for table in (TABLE, ORDERED, NESTED["inner"], CACHE.table, type(self).table):
            table[n] = h
            table["n"] = n
        DEFAULT[n].append(h)
        LIST.append(n)
        SET.add(n)
        LAST = CACHE.last = h
        type(self).last = n
        defaulted.last = h  # type: ignore[attr-defined]
        h = h * ones(n) + tens(n) + defaulted(n)
        return self.c(self.b(h.reshape(-1, 2 * half(n))))


def kept() -> list[Any]:
    """Everything that forward may have left."""
    return [
        TABLE, ORDERED, dict(DEFAULT), LIST, SET, NESTED, LAST, CACHE.table, CACHE.last, Writes.table, Writes.last,
        tens.known, tens.calls(), defaulted.__defaults__, getattr(defaulted, "last", None),
    ]  # fmt: skip


EMPTY: list[Any] = [{}, {}, {}, [], set(), {"inner": {}}, None, {}, 0, {}, 0, {}, 0, ({},), None]


@pytest.mark.parametrize("options", [{}, {"verify": False}, {"max_macs": 0.6}])
def test_nothing_of_a_run_stays(options: dict[str, Any]) -> None:
    ones.cache_clear()
    depgraph.prune(Writes().eval(), torch.randn(2, 6), **options)
    assert kept() == EMPTY
    assert ones.cache_info().currsize == half.cache_info().currsize == 0


def test_what_the_user_had_there_is_there_again() -> None:
    ones.cache_clear()
    model, x = Writes().eval(), torch.randn(2, 6)
    try:
        model(x)
        half(16)
        before = [dict(v) if type(v) is dict else v for v in kept()]
        small = depgraph.prune(model, x).model
        after = kept()
        assert [list(v) if isinstance(v, dict) else v is w for v, w in zip(after, before, strict=True)] == [
            list(w) if isinstance(w, dict) else True for w in before
        ]
        assert ones.cache_info().currsize == 0
        small(x)
        found = [*ones.__wrapped__(3), *tens.known.values(), *TABLE.values(), *TABLE, *SET, LAST]
        assert not [v for v in found if isinstance(v, (FakeTensor, Size, Scalar))]
        assert {v.dtype for v in found if isinstance(v, Tensor)} == {torch.float32}
    finally:
        for table in (
            TABLE,
            ORDERED,
            DEFAULT,
            LIST,
            SET,
            NESTED["inner"],
            CACHE.table,
            Writes.table,
            tens.known,
        ):
            table.clear()
        globals().update(LAST=None)
        Writes.last = CACHE.last = 0
        del defaulted.last  # type: ignore[attr-defined]
        defaulted.__defaults__[0].clear()
        tens.__closure__[0].cell_contents = 0


def registered() -> Any:
    """A function that forward makes once."""


class Registers(Writes):
    def forward(self, x: Tensor) -> Tensor:
        TABLE["code"] = registered
        return self.c(self.b(self.a(x)))


def test_code_that_was_registered_stays() -> None:
    try:
        depgraph.prune(Registers().eval(), torch.randn(2, 6))
        assert TABLE["code"] is registered
    finally:
        TABLE.clear()


def test_it_takes_little_time() -> None:
    """The quickest of several times: what else the machine does only adds to it."""
    model, seconds = Patches(), []
    with nothing_kept(model):  # whatever is imported is looked at once
        pass
    for _ in range(20):
        start = time.thread_time()
        with nothing_kept(model):
            pass
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.02


class Biased(nn.Module):
    """A table by heads, which eval mode makes once; setting a mode drops it, whichever mode that is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 32), nn.Parameter(torch.randn(8, 9)), nn.Linear(32, 3)
        self.register_buffer("index", torch.arange(4))
        self.table: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Biased:
        self.table = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table.get(str(x.device))
        if bias is None:
            bias = self.b[:, self.index]
            if not self.training:
                self.table[str(x.device)] = bias
        return self.c((self.a(x).view(-1, 8, 4) + bias).flatten(1).relu())


@pytest.mark.parametrize("verify", [True, False])
def test_what_a_model_cached_is_cut_though_setting_a_mode_drops_it(verify: bool) -> None:
    torch.manual_seed(0)
    model, x = Biased().eval(), torch.randn(5, 6)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        model(x)
    result = depgraph.prune(model, x, verify=verify)
    assert result.model.b.shape[0] == 4
    assert result.model.table["cpu"].shape == (4, 4)
    assert model.table["cpu"].shape == (8, 4)
    with torch.no_grad():
        for name, parameter in masked.named_parameters():
            parameter.mul_(result.plan.mask(name))
    assert torch.allclose(result.model(x), masked(x), atol=1e-6)
