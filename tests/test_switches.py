"""What is switched while depgraph runs is put back, is seen by no other thread, and holds for two prunes at once."""

from __future__ import annotations

import math
import random
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Tensor
from torch import nn

import depgraph
from depgraph.base.switches import around_calls, replaced, same_random_state, without_fast_attention

GLOBALS = {
    "nn.Module.__call__": lambda: nn.Module.__dict__["__call__"],
    "nn.Module.__init__": lambda: nn.Module.__dict__["__init__"],
    "autograd.Function.apply": lambda: torch.autograd.Function.__dict__["apply"],
    "has_torch_function": lambda: torch.nn.functional.has_torch_function,
    "has_torch_function_variadic": lambda: torch.nn.functional.has_torch_function_variadic,
    "math.sqrt": lambda: math.sqrt,
    "fast attention": lambda: torch.backends.mha.get_fastpath_enabled,
    "fast attention is on": torch.backends.mha.get_fastpath_enabled,
    "default dtype": torch.get_default_dtype,
    "default device": torch.get_default_device,
    "grad mode": torch.is_grad_enabled,
    "mkldnn": torch._C._get_mkldnn_enabled,
    "cudnn": torch._C._get_cudnn_enabled,
    "deterministic": torch.are_deterministic_algorithms_enabled,
    "warnings": lambda: list(warnings.filters),
}


class Noisy(nn.Module):
    """Draws at random in forward with torch, numpy and Python, and has attention and a square root of a size."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.width = width
        self.first, self.last = nn.Linear(6, width), nn.Linear(width, 4)
        self.mix = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x, x, x)[0]
        torch.rand(3), np.random.rand(3), random.random()
        return self.last(self.first(x).relu() / math.sqrt(2 * x.shape[-1]))


def noisy() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Noisy().eval(), torch.randn(2, 5, 6)


def standing() -> dict[str, Any]:
    return {name: read() for name, read in GLOBALS.items()}


# -------------------------------------------------------------------------------------------------- one thread alone


@pytest.mark.slow
def test_everything_is_as_it_was_after_a_prune_a_failed_one_and_a_load() -> None:
    model, x = noisy()
    depgraph.count_macs(model, x)  # imports that change filters of warnings are done
    before = standing()
    result = depgraph.prune(model, x, pruning_ratio=0.5, importance="taylor",
                            calibration=[(x, torch.zeros(2, 5, 4))], loss=nn.functional.mse_loss)  # fmt: skip
    assert result.report.verification.status == "equal"
    depgraph.count_macs(model, x), depgraph.measure_latency(model, x)
    assert standing() == before
    with pytest.raises(depgraph.TraceError):
        depgraph.prune(model, torch.randn(2, 5, 7), pruning_ratio=0.5)
    assert standing() == before


@pytest.mark.slow
@pytest.mark.parametrize("how", ["l1", "taylor", "recover", "macs"])
def test_random_states_are_as_they_were(how: str) -> None:
    model, x = noisy()
    data = [(x, torch.zeros(2, 5, 4))]
    asked: dict[str, Any] = {
        "l1": {"pruning_ratio": 0.5},
        "taylor": {"pruning_ratio": 0.5, "importance": "taylor", "calibration": data, "loss": nn.functional.mse_loss},
        "recover": {"pruning_ratio": 0.5, "calibration": data, "recover": "auto"},
        "macs": {"max_macs": 0.8},
    }[how]  # fmt: skip
    torch.manual_seed(3), np.random.seed(4), random.seed(5)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    depgraph.prune(model, x, **asked)
    depgraph.measure_latency(model, x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
    assert random.getstate() == states[2]


def test_what_is_made_in_inference_mode_can_be_trained() -> None:
    model, x = noisy()
    with torch.inference_mode():
        result = depgraph.prune(model, x, pruning_ratio=0.5)
        graph = depgraph.analyze(model, x)
        plan = depgraph.build_plan(graph, {})
        again = depgraph.apply(model, result.plan)
        depgraph.apply(model, plan)
    for made in (result.model, again):
        assert not any(t.is_inference() for t in (*made.parameters(), *made.buffers()))
        made.train()(x).sum().backward()
        assert all(p.grad is not None for p in made.parameters())


# --------------------------------------------------------------------------------------------------- several threads


@pytest.mark.slow
def test_two_prunes_at_once_give_what_each_gives_alone_and_leave_everything_as_it_was() -> None:
    before = standing()
    alone = depgraph.prune(*noisy(), pruning_ratio=0.5)
    start = threading.Barrier(2)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    models = [noisy() for _ in range(2)]
    torch.set_rng_state(state)

    def prune(which: int) -> depgraph.PruneResult:
        start.wait()
        found = [depgraph.prune(*models[which], pruning_ratio=0.5) for _ in range(3)]
        return found[-1]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(prune, range(2)))
    for result in results:
        assert result.plan.to_json() == alone.plan.to_json()
        assert result.report.verification == alone.report.verification
        for a, b in zip(result.model.parameters(), alone.model.parameters(), strict=True):
            assert torch.equal(a, b)
    assert standing() == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_another_thread_notices_nothing() -> None:
    seen: list[str] = []
    stop = threading.Event()
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval()
    x = torch.randn(2, 5, 6)
    with torch.no_grad():
        wanted, root = layer(x), math.sqrt(2)
    calls: list[str] = []

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(threading.current_thread().name)
            return x

    def work() -> None:
        other = Other()
        while not stop.is_set():
            with torch.no_grad():
                if not torch.equal(layer(x), wanted):
                    seen.append("another result")
            if type(math.sqrt(2)) is not float or math.sqrt(2) != root:
                seen.append("another root")
            if not torch.backends.mha.get_fastpath_enabled():
                seen.append("no fast path")
            if torch.get_default_dtype() is not torch.float32:
                seen.append("another default dtype")
            if other(x) is not x:
                seen.append("another call")

    thread = threading.Thread(target=work, name="beside")
    thread.start()
    try:
        for _ in range(3):
            model, given = noisy()
            depgraph.analyze(model, given)
            depgraph.count_macs(model, given)
    finally:
        stop.set()
        thread.join()
    assert not seen, set(seen)
    assert set(calls) == {"beside"}


def test_a_replacement_is_seen_by_its_thread_alone_and_nests() -> None:
    layer, x = nn.Identity(), torch.ones(1)
    original = nn.Module.__dict__["__call__"]
    calls: list[tuple[str, str]] = []
    inside, go = threading.Event(), threading.Event()

    def watched(name: str) -> None:
        with around_calls(layer, lambda path, module, run: (calls.append((name, path)), run())[1]):
            inside.set()
            go.wait()
            layer(x)

    thread = threading.Thread(target=watched, args=("thread",))
    thread.start()
    inside.wait()
    layer(x)
    assert not calls
    with around_calls(layer, lambda path, module, run: (calls.append(("outer", path)), run())[1]):
        with around_calls(layer, lambda path, module, run: (calls.append(("inner", path)), run())[1]):
            layer(x)
        assert calls == [("inner", ""), ("outer", "")]
        go.set()
        thread.join()
        layer(x)
    assert calls[2:] == [("thread", ""), ("outer", "")]
    assert nn.Module.__dict__["__call__"] is original


def test_what_somebody_else_replaces_meanwhile_stays_theirs() -> None:
    class Owner:
        def greet(self) -> str:
            return "plain"

    original = Owner.__dict__["greet"]
    with replaced(Owner, "greet", lambda before, self: f"ours over {before(self)}"):
        ours = Owner.__dict__["greet"]
        Owner.greet = lambda self: f"theirs over {ours(self)}"  # type: ignore[method-assign]
        assert Owner().greet() == "theirs over ours over plain"
    assert Owner().greet() == "theirs over plain"
    with replaced(Owner, "greet", lambda before, self: f"ours over {before(self)}"):
        assert Owner().greet() == "ours over theirs over plain"
    Owner.greet = ours  # type: ignore[method-assign]
    assert Owner().greet() == "plain"
    with replaced(Owner, "greet", lambda before, self: "ours"):
        assert Owner().greet() == "ours"
    assert Owner.__dict__["greet"] is original


def test_an_inherited_function_is_inherited_again() -> None:
    class Base:
        @classmethod
        def name(cls) -> str:
            return cls.__name__

    class Child(Base):
        pass

    with replaced(Base, "name", lambda before, cls: before(cls).lower()):
        assert Child.name() == "child"
    with replaced(Child, "name", lambda before: "other"):
        assert (Child.name(), Base.name()) == ("other", "Base")
    assert "name" not in vars(Child)
    assert Child.name() == "Child"


def test_switches_are_put_back_after_an_exception() -> None:
    before = standing()
    state = torch.get_rng_state()

    def fail() -> None:
        with same_random_state(), without_fast_attention():
            assert not torch.backends.mha.get_fastpath_enabled()
            torch.rand(1), 1 / 0

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(torch.get_rng_state(), state)
    assert standing() == before
