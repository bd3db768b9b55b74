"""`max_latency` and `latency=`: timers of one's own, pairs in turn, and budgets that hold though measurements vary."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from depth_checks import check_depth
from small_models import fresh
from torch import nn

import depgraph
from depgraph.costs import latency
from depgraph.costs.latency import now, pairs_of, seconds_since
from depgraph.select import BUDGETS, Request
from depgraph.select.budgets import ROUNDS, Target, Targets, _target


def chain() -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in ((16, 61), (61, 67), (67, 71), (71, 5)):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def x() -> torch.Tensor:
    return torch.randn(3, 16, dtype=torch.float64)


class Phone:
    """Seconds that are a function of the widths, with noise, a slow hour now and then, and a count of the calls."""

    def __init__(self, noise: float = 0.0, floor: float = 0.0) -> None:
        self.dice, self.noise, self.floor = np.random.default_rng(0), noise, floor
        self.calls: list[int] = []

    def exact(self, model: nn.Module) -> float:
        return self.floor + 1e-6 * sum(p.numel() for p in model.parameters()) ** 0.8

    def __call__(self, model: nn.Module, inputs: Any) -> float:
        self.calls.append(sum(p.numel() for p in model.parameters()))
        slow = 3.0 if len(self.calls) % 40 > 30 else 1.0  # slows both of a pair
        return self.exact(model) * slow * (1 + self.noise * abs(self.dice.standard_normal()))


@pytest.mark.parametrize("share", [0.6, 0.3])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_timer_of_ones_own(share: float, noise: float) -> None:
    model, phone = fresh(chain), Phone(noise)
    result = depgraph.prune(model, x(), max_latency=share, latency=phone)
    left = phone.exact(result.model) / phone.exact(model)
    assert 0.9 * share <= left <= 1.05 * share
    assert result.report.latency is not None
    before, after = result.report.latency
    assert 0 < after < before
    assert (result.report.latency_spread or 0) < 0.2
    assert "measured in turns" in str(result.report)
    assert result.report.to_dict()["latency"]["spread"] == result.report.latency_spread
    dense = sum(p.numel() for p in model.parameters())
    turns = phone.calls[-6:]
    assert turns[::2] == [dense] * 3  # A B A B
    assert dense not in turns[1::2]


def test_steps_widen_until_a_plan_fits() -> None:
    """Noise, or a jump, makes each plan a little too slow: small steps would use up the tries before one fits."""
    cost: Any = SimpleNamespace(value=lambda counts: counts)
    target = Target(BUDGETS["max_latency"], limit=0.5, whole=1.0, measure=None, model=lambda graph: cost)
    target.measure = lambda small: 0.505 if target.planned > 0.3 else 0.49
    for _ in range(ROUNDS):
        target.learn(cast("Any", target.planned), cast("Any", None), nn.Identity())
    assert target.fits is not None
    assert 0.15 < target.fits <= 0.3


def test_what_is_planned_lies_between_what_fits_and_what_does_not() -> None:
    kind = BUDGETS["max_latency"]
    target = Target(kind, limit=0.8, whole=1.0, measure=None, model=cast("Any", None))
    aim = 0.8 * (1 - target.near / 2)
    assert target.near < kind.near
    assert target.aim == target.planned == aim
    target.factor = 2.0
    assert target.planned == aim / 2
    target._bracket(0.2, True)
    assert (target.fits, target.over, target.missed) == (0.2, None, 0)
    assert target.planned == aim / 2
    target._bracket(0.5, True)  # more fits than the model says
    assert target.planned == 0.5 * (1 + kind.near)
    target._bracket(0.9, False)
    assert (target.fits, target.over, target.missed) == (0.5, 0.9, 1)
    assert target.planned == pytest.approx(0.63)  # one measurement does not decide about half of the model
    target._bracket(0.7, True)
    assert target.planned == pytest.approx(0.8)  # the middle: near what fits nothing would be learnt
    target.factor = 0.95
    assert target.planned == aim / 0.95  # the model's own number, where it is well in between
    target._bracket(0.75, False)
    assert (target.fits, target.over, target.missed) == (0.7, 0.75, 1)
    target._bracket(0.8, True)  # noise: what does not fit is larger than what does
    assert (target.fits, target.over, target.missed) == (0.8, None, 0)
    target._bracket(0.9, False)
    target._bracket(0.8, False)
    assert (target.fits, target.over) == (None, 0.8)


def test_the_factor_is_the_median_of_what_was_measured() -> None:
    cost: Any = SimpleNamespace(value=lambda counts: counts)
    target = Target(BUDGETS["max_latency"], limit=0.5, whole=1.0, measure=None, model=lambda graph: cost)
    found = iter([0.9, 0.6, 0.1])
    target.measure = lambda small: next(found)
    for counts, factor in ((0.3, 3.0), (0.3, 2.5), (0.2, 2.0)):
        measured, closer = target.learn(cast("Any", counts), cast("Any", None), nn.Identity())
        assert target.factor == pytest.approx(factor)
        assert closer
    assert measured == 0.1


def test_others_fill_the_gap_that_one_layer_leaves() -> None:
    """One layer takes far longer from a width on: it stays below, and the others keep more."""

    def seconds(model: nn.Module, inputs: Any) -> float:
        wide = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
        return 1e-6 * (sum(p.numel() for p in model.parameters()) + 5000 * (len(wide) > 2 and wide[2] > 40))

    model = fresh(chain)
    dense, share = seconds(model, None), 0.5
    result = depgraph.prune(model, x(), max_latency=share, latency=seconds)
    assert 0.95 * share <= seconds(result.model, None) / dense <= share


def test_what_can_not_be_reached_is_refused() -> None:
    phone = Phone(floor=1.0)  # seconds that no plan saves
    with pytest.raises(depgraph.BudgetError, match="max_latency"):
        depgraph.prune(fresh(chain), x(), max_latency=0.5, latency=phone)


def test_figures_alone() -> None:
    phone = Phone()
    report = depgraph.prune(fresh(chain), x(), pruning_ratio=0.5, latency=phone).report
    assert report.ratios["latency"] == pytest.approx(report.latency[0] / report.latency[1])  # type: ignore[index]
    assert depgraph.prune(fresh(chain), x(), pruning_ratio=0.5).report.latency is None


def test_the_ratio_is_that_of_pairs_in_turn() -> None:
    model = fresh(chain)
    small = depgraph.prune(model, x(), pruning_ratio=0.5).model
    phone = Phone(0.02)
    found = pairs_of(model, small, x(), phone)
    exact = phone.exact(small) / phone.exact(model)
    assert found.ratio == pytest.approx(exact, rel=max(0.03, found.spread))
    assert found.count % 3 == 0


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), None, "soon"])
def test_no_seconds(value: Any) -> None:
    with pytest.raises(depgraph.InputError, match="latency must return seconds above 0"):
        depgraph.prune(fresh(chain), x(), max_latency=0.5, latency=lambda model, inputs: value)


@pytest.mark.parametrize("wrong", [3, "fast", lambda: 1.0])
def test_no_timer(wrong: Any) -> None:
    with pytest.raises(depgraph.InputError, match="latency"):
        depgraph.prune(fresh(chain), x(), latency=wrong)


@pytest.mark.slow
def test_onnx_runtime() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from depgraph.integrations import onnx_runtime

    model = fresh(chain).float()
    result = depgraph.prune(model, x().float(), pruning_ratio=0.5, latency=onnx_runtime.latency)
    assert 0 < (result.report.latency or (0, 0))[1] < 1
    with pytest.raises(depgraph.InputError, match="ONNX Runtime can't time this model"):
        onnx_runtime.latency(fresh(chain).float(), torch.zeros(3, 2))


def test_a_budget_tells_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nobody asks for seconds: in turns, with the spread."""
    share = lambda small, whole, _: sum(p.numel() for p in small.parameters()) / 12_000  # noqa: E731
    monkeypatch.setitem(BUDGETS, "max_latency", replace(BUDGETS["max_latency"], compare=share))
    report = depgraph.prune(fresh(chain), x(), max_latency=0.5, verify=False).report
    assert min(report.latency or (0.0,)) > 0
    assert report.latency_spread is not None
    assert "measured in turns" in str(report)


def test_what_others_do_on_the_processor_is_no_time_of_the_pass() -> None:
    """A thread that is preempted took what it worked; one that waits took what the clock says."""

    def work() -> int:
        return sum(range(1_000_000))

    work()
    alone = min(_timed(work)[0] for _ in range(3))
    stop = multiprocessing.get_context("fork").Event()
    others = [multiprocessing.get_context("fork").Process(target=_spin, args=(stop,)) for _ in range(2)]
    for other in others:
        other.start()
    try:
        found = [_timed(work) for _ in range(5)]
    finally:
        stop.set()
        for other in others:
            other.join()
    assert min(took for took, _ in found) < 2 * alone
    assert all(took <= wall * 1.05 for took, wall in found)
    assert _timed(lambda: time.sleep(0.05))[0] >= 0.05


def _timed(run: Any) -> tuple[float, float]:
    start, wall = now(), time.perf_counter()
    run()
    return seconds_since(start), time.perf_counter() - wall


def _spin(stop: Any) -> None:
    while not stop.is_set():
        sum(range(10_000))


def test_measurements_that_lead_far_below_are_refused() -> None:
    """What noise left is no answer, though it fits: the next question could leave a tenth of the model."""
    over = "max_latency=5 ms is not met: 6 ms was measured"
    far = Targets([], tried=ROUNDS, best={}, best_slack=0.4, over=over)
    with pytest.raises(
        depgraph.BudgetError, match=r"6 ms was measured, and the largest plan that fits is 40% below .* vary"
    ):
        far.masks(None, None, {})  # type: ignore[arg-type]
    near = Targets([], tried=ROUNDS, best={}, best_slack=0.02, over=over)
    assert near.masks(None, None, {}) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("measured", "found"), [((0.58, 0.66), 0.62), ((0.58, 0.59), 0.585), ((0.62,), 0.62), ((0.4,), 0.4)]
)
def test_what_would_be_taken_is_measured_again(measured: tuple[float, ...], found: float) -> None:
    """A plan that fits by chance is none: two measurements of it decide."""
    model, more = fresh(chain), list(measured)
    kind = replace(
        BUDGETS["max_latency"], compare=lambda *_: more.pop(0), measure=lambda *_: 2.0, calibrate=None
    )
    graph = depgraph.analyze(model, x())
    target = _target(graph, x(), Request(), kind, 0.6)
    assert target.measure is not None
    assert target.measure(model) == pytest.approx(2 * found)
    assert not more


def test_the_seconds_of_a_module_are_without_those_of_what_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("depgraph.costs.latency.now", lambda: clock[0])
    monkeypatch.setattr("depgraph.costs.latency.seconds_since", lambda start: clock[0] - start)

    class Slow(nn.Module):
        def __init__(self, seconds: float, *inner: nn.Module) -> None:
            super().__init__()
            self.seconds, self.inner = seconds, nn.ModuleList(inner)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clock[0] += self.seconds
            for module in self.inner:
                x = module(x)
            return x

    with latency._timed(model := Slow(1.0, Slow(2.0, Slow(4.0)), Slow(8.0))) as rows:
        model(torch.zeros(1))
        model(torch.zeros(1))
    assert rows == {"": 2.0, "inner.0": 4.0, "inner.0.inner.0": 8.0, "inner.1": 16.0}


def test_what_is_queued_on_a_device_is_of_the_module_that_queued_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a call and after it the device is waited for: else a module pays for what ran before it."""
    clock, queued = [0.0], [0.0]

    def wait() -> None:
        clock[0], queued[0] = clock[0] + queued[0], 0.0

    monkeypatch.setattr("depgraph.costs.latency.now", lambda: clock[0])
    monkeypatch.setattr("depgraph.costs.latency.seconds_since", lambda start: clock[0] - start)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)

    class Queue(nn.Module):
        def __init__(self, seconds: float, *inner: nn.Module) -> None:
            super().__init__()
            self.seconds, self.inner = seconds, nn.ModuleList(inner)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            queued[0] += self.seconds
            for module in self.inner:
                x = module(x)
            return x

    with latency._timed(model := Queue(1.0, Queue(2.0), Queue(4.0))) as rows:
        model(torch.zeros(1))
    assert rows == {"": 1.0, "inner.0": 2.0, "inner.1": 4.0}


def test_what_pairs_say_by_hand() -> None:
    """Ratios of 1/2, 3/4, 1/2 and 1: the middle half is from 0.5 to 0.8125."""
    found = latency._summed_up([2.0, 4.0, 2.0, 2.0], [1.0, 3.0, 1.0, 2.0])
    assert (found.before, found.after, found.ratio, found.count) == (2.0, 1.25, 0.625, 4)
    assert found.spread == pytest.approx(2 * 1.25 * 0.3125 / (1.35 * 2 * 0.625))


@pytest.mark.parametrize(("ratios", "count"), [((0.5,), 3), ((0.5, 0.502), 3), ((0.5, 0.525, 0.55), 18)])
def test_pairs_are_taken_until_the_ratio_is_known_well_enough(ratios: tuple[float, ...], count: int) -> None:
    """The last of these vary by a tenth: the spread is 5 % of three pairs, and 4 % of eighteen."""
    reference, model, asked = nn.Identity(), nn.Identity(), [0]

    def seconds(module: nn.Module, inputs: Any) -> float:
        if module is reference:
            return 2.0
        asked[0] += 1
        return 2.0 * ratios[asked[0] % len(ratios)]

    found = pairs_of(reference, model, None, seconds)
    assert (found.count, asked[0]) == (count, count)
    assert found.before == 2.0


@pytest.mark.parametrize(
    ("before", "modelled", "found", "factor", "closer"),
    [
        (1.0, 100.0, 50.0, 0.5, True),
        (1.0, 100.0, 100.0, 1.0, False),  # just what is allowed
        (1.0, 100.0, 101.0, 1.01, False),
        (
            1.2,
            100.0,
            110.0,
            1.2 * 1.001,
            False,
        ),  # too much: the next plan is smaller, whatever the model says
        (1.2, 100.0, 90.0, 0.9, True),
    ],
)
def test_what_a_measurement_teaches_of_a_cost_that_is_modelled(
    before: float, modelled: float, found: float, factor: float, closer: bool
) -> None:
    kind = BUDGETS["max_macs"]
    cost: Any = SimpleNamespace(value=lambda counts: modelled)
    target = Target(kind, 100.0, 200.0, lambda small: found, lambda graph: cost, before)
    assert kind.near == 0.01
    assert target.learn(cast("Any", None), cast("Any", None), nn.Identity()) == (found, closer)
    assert target.factor == pytest.approx(factor, rel=1e-12)
    assert target.aim == 100.0
    assert target.seen == []


def test_a_plan_that_fits_is_taken_where_no_other_meets_the_budgets() -> None:
    def refused(*_: Any) -> Any:
        raise depgraph.BudgetError("can't be reached")

    request, fits = cast("Any", SimpleNamespace(masks=refused)), {"layer": np.array([True, False])}
    targets = Targets(best=fits)
    assert targets.masks(cast("Any", None), request, {}) is fits
    assert targets.tried == ROUNDS
    with pytest.raises(depgraph.BudgetError, match="can't be reached"):
        Targets().masks(cast("Any", None), request, {})


@pytest.mark.parametrize("high", [1, 2, 3])
def test_branches_and_seconds_that_fall_from_one_measurement_to_the_next(high: int) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rise, self.fall = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.fall(self.rise(x).relu())

    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(6)), nn.Linear(16, 4)).eval()
    inputs = torch.randn(8, 16)
    layer, head = (sum(p.numel() for p in m.parameters()) for m in (model[0], model[6]))
    seen: dict[int, int] = {}

    def timer(given: nn.Module, _: Any) -> float:
        """A tenth less after so many measurements of a size."""
        count = sum(p.numel() for p in given.parameters())
        seen[count] = seen.get(count, 0) + 1
        return count * (1e-6 if seen[count] <= high else 0.9e-6)

    limit = 0.95e-6 * (
        3 * layer + head
    )  # three layers are above it, and below it when they are measured again
    found = depgraph.prune(model, inputs, max_latency=f"{limit}s", depth=True, latency=timer)
    assert sum(p.numel() for p in found.model.parameters()) * 0.9e-6 <= limit
    check_depth(model, found, inputs, 1e-5)
