"""Schedules: ramps by their formulas, steps that compose, and the way back to the last good model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import as_float64, in_float64
from oracle import assert_equal_to_masked, assert_state_matches_plan
from torch import Tensor, nn
from zoo import ZOO

import depgraph
from depgraph import GradualPruner, prune_gradually, rewind
from depgraph.base.errors import BudgetError, InputError, PlanError
from depgraph.training.ramps import RAMPS, ramp_of


class Net(nn.Module):
    """A residual stream, heads, a grouped convolution and a literal that repeats a size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 13, 3, padding=1), nn.BatchNorm2d(13)
        self.mix = nn.Conv2d(13, 13, 1)
        self.grouped = nn.Conv2d(13, 22, 3, groups=1, padding=1)
        self.split = nn.Conv2d(22, 34, 3, groups=2, padding=1)
        self.heads, self.qkv, self.out = 2, nn.Linear(34, 3 * 2 * 7), nn.Linear(14, 34)
        self.last = nn.Linear(34 * 25, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = x + self.mix(x).relu()
        x = self.split(self.grouped(x).relu()).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = torch.softmax(q @ k.transpose(2, 3) * 0.3, -1) @ v
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.last(x.transpose(1, 2).reshape(-1, 850))


INPUTS = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def made() -> nn.Module:
    torch.manual_seed(0)
    return Net().double().eval()


def disturb(model: nn.Module, step: int) -> None:
    """What training does: every weight changes."""
    dice = torch.Generator().manual_seed(100 + step)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, dtype=p.dtype, generator=dice))


def widths(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


FORMULAS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda t, s: s * t,
    "cubic": lambda t, s: s + (0 - s) * (1 - t) ** 3,
    "exponential": lambda t, s: 1 - math.exp(t * math.log(1 - s)),
    "cosine": lambda t, s: s * math.sin(math.pi * t / 2) ** 2,
    "sinusoidal": lambda t, s: s * math.cos(math.pi * (1 - t) / 2),
    "one_shot": lambda t, s: s,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_ramps_follow_their_formulas(name: str) -> None:
    assert set(FORMULAS) == set(RAMPS)
    for t in (0.1, 1 / 3, 0.5, 0.9, 1.0):
        for share in (0.2, 0.5, 0.93):
            assert ramp_of(name)(t, share) == pytest.approx(FORMULAS[name](t, share), rel=1e-12)
    assert ramp_of(name)(0.0, 0.5) == 0
    assert ramp_of(name)(1.0, 0.37) == pytest.approx(0.37, rel=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("ramp", [*FORMULAS, lambda t: t**2])
def test_every_step_removes_the_share_of_the_original_that_the_ramp_says(ramp: Any) -> None:
    removed = FORMULAS[ramp] if isinstance(ramp, str) else lambda t, s: s * t**2
    seen: list[dict[str, tuple[int, ...]]] = []

    def train(model: nn.Module, step: int) -> None:
        seen.append(widths(model))
        disturb(model, step)

    model = made()
    how = {"pruning_ratio": 0.7, "granularity": "fine"}
    result = prune_gradually(model, INPUTS, steps=4, ramp=ramp, train=train, **how)
    by_hand = [
        {
            "stem.weight": 13 - int((removed(k / 4, 0.7) if k else 0) * 13 + 1e-9),
            "grouped.weight": 22
            - int((removed(k / 4, 0.7) if k else 0) * 11 + 1e-9) * 2,  # two blocks lose alike
            "split.weight": 34 - int((removed(k / 4, 0.7) if k else 0) * 17 + 1e-9) * 2,
            "qkv.weight": 6 * (7 - int((removed(k / 4, 0.7) if k else 0) * 7 + 1e-9)),
        }
        for k in range(5)
    ]
    expected = [w for k, w in enumerate(by_hand) if k and w != by_hand[k - 1]]
    got = [{n: shapes[n][0] for n in by_hand[0]} for shapes in seen]
    assert got == expected
    assert widths(result.model) == widths(depgraph.prune(model, INPUTS, **how).model)


@pytest.mark.slow
def test_ratios_by_name_caps_and_floors_count_from_the_original() -> None:
    model = made()
    by_name = prune_gradually(
        model, INPUTS, steps=3, train=disturb, pruning_ratio={"stem": 0.5, "qkv": 0.3}, ramp="linear",
        granularity="fine",
    )  # fmt: skip
    assert by_name.model.stem.out_channels == 13 - 6
    assert by_name.model.qkv.out_features == 6 * (7 - 2)
    assert by_name.model.grouped.out_channels == 22
    together = prune_gradually(model, INPUTS, steps=5, train=disturb, max_params=0.35, max_ratio=0.6)
    kept = {n: together.plan.mask(n).any(1 if together.plan.mask(n).dim() == 2 else (1, 2, 3)) for n in ("stem.weight", "split.weight", "grouped.weight")}  # fmt: skip
    assert all(float((~k).sum()) <= 0.6 * len(k) for k in kept.values())
    floor = depgraph.Scope("stem", at_least=0.7)
    held = prune_gradually(model, INPUTS, steps=4, train=disturb, max_params=0.4, scope=[floor])
    assert held.model.stem.out_channels >= math.ceil(0.7 * 13)
    scoped = [depgraph.Scope(["stem", "grouped"], ratio=0.5)]
    shared = prune_gradually(model, INPUTS, steps=4, train=disturb, scope=scoped, ramp="cosine")
    left = shared.model.stem.out_channels + shared.model.grouped.out_channels
    assert 0 <= left - (13 + 22) // 2 - 1 <= 1  # grouped channels go in pairs
    assert shared.model.split.out_channels == 34


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["max_params", "max_macs", "max_bytes"])
def test_budgets_fall_along_the_ramp(budget: str) -> None:
    model = made()
    count = {
        "max_params": depgraph.parameter_count,
        "max_macs": lambda m: depgraph.count_macs(m, INPUTS),
        "max_bytes": lambda m: sum(t.numel() * t.element_size() for t in [*m.parameters(), *m.buffers()]),
    }[budget]
    whole, seen = count(model), []

    def train(m: nn.Module, step: int) -> None:
        seen.append(count(m))
        disturb(m, step)

    result = prune_gradually(model, INPUTS, steps=4, ramp="linear", train=train, **{budget: 0.4})
    allowed = [whole * (1 - 0.6 * k / 4) for k in (1, 2, 3, 4)]
    assert len(seen) == 4
    assert all(got <= limit + 1 for got, limit in zip(seen, allowed, strict=True))
    assert all(got > 0.93 * limit for got, limit in zip(seen, allowed, strict=True))
    assert count(result.model) <= 0.4 * whole
    assert widths(prune_gradually(model, INPUTS, steps=1, **{budget: 0.4}).model) == widths(
        depgraph.prune(model, INPUTS, **{budget: 0.4}).model
    )


@pytest.mark.slow
def test_the_plan_makes_the_result_of_the_original() -> None:
    model = made()
    before = copy.deepcopy(model.state_dict())
    result = prune_gradually(model, INPUTS, steps=4, ramp="linear", train=disturb, pruning_ratio=0.6)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the original is untouched"
    plan = depgraph.Plan.from_json(result.plan.to_json())
    replayed = depgraph.apply(made(), plan)
    assert widths(replayed) == widths(result.model)
    assert replayed(INPUTS).shape == (2, 5)
    for name, value in replayed.state_dict().items():
        assert torch.equal(value.flatten(), before[name][plan.mask(name)]), name
    assert depgraph.verify(made(), replayed, plan, INPUTS).status == "equal"
    assert result.report.parameters == (
        depgraph.parameter_count(model),
        depgraph.parameter_count(result.model),
    )
    assert result.report.verification.status == "equal"
    assert [t.kept for t in result.history] == [True] * 4


@pytest.mark.slow
def test_earlier_must_be_the_plan_that_made_the_model() -> None:
    model = made()
    first = depgraph.prune(model, INPUTS, pruning_ratio=0.25)
    other = depgraph.prune(model, INPUTS, pruning_ratio=0.5)
    with pytest.raises(InputError, match=r"'stem\.weight' has shape \(10, 3, 3, 3\), the plan gives it \(7,"):
        depgraph.prune(first.model, INPUTS, pruning_ratio=0.5, already_pruned=other.plan)
    second = depgraph.prune(first.model, INPUTS, pruning_ratio=0.5, already_pruned=first.plan)
    assert widths(second.model) == widths(other.model)
    graph = depgraph.analyze(first.model, INPUTS)
    masks = depgraph.choose(graph, depgraph.scores_of(graph), pruning_ratio=0.5, already_pruned=first.plan)
    assert depgraph.build_plan(graph, masks).new_shape("stem.weight")[0] == 7


@pytest.mark.slow
def test_each_step_may_recover_without_training() -> None:
    """The kept weights are no longer the original's, the shapes are, and the outputs are nearer."""
    model, batches = made(), [torch.randn(7, 3, 5, 5, dtype=torch.float64) for _ in range(3)]
    options = {"steps": 2, "ramp": "linear", "pruning_ratio": 0.4}
    plain = prune_gradually(model, INPUTS, **options)
    won = prune_gradually(model, INPUTS, recover="reconstruction", calibration=batches, **options)
    assert widths(won.model) == widths(plain.model) == widths(depgraph.apply(model, won.plan))
    wanted = model(batches[0])
    error = {
        n: (m(batches[0]) - wanted).norm().item() for n, m in (("won", won.model), ("plain", plain.model))
    }
    assert error["won"] < 0.7 * error["plain"]


@pytest.mark.slow
def test_without_training_the_kept_weights_are_the_originals() -> None:
    model = made()
    result = prune_gradually(model, INPUTS, steps=3, max_macs=0.3)
    for name, value in result.model.state_dict().items():
        assert torch.equal(value.flatten(), model.state_dict()[name][result.plan.mask(name)]), name


def scripted(scores: dict[int, float], dense: float = 1.0) -> Callable[[nn.Module], float]:
    """A score by the number of channels of the stem."""
    return lambda model: scores.get(model.stem.out_channels, dense)


@pytest.mark.slow
def test_a_model_below_the_score_is_given_up_and_the_last_good_one_comes_back() -> None:
    """13 channels: good at 10, bad at 8 and below. From 10 (way 1/3) the steps towards 8 (2/3) are halved."""
    model, models = made(), []
    good: dict[int, dict[str, Tensor]] = {}

    def train(m: nn.Module, step: int) -> None:
        disturb(m, step)
        models.append(m)
        good[m.stem.out_channels] = copy.deepcopy(m.state_dict())

    result = prune_gradually(
        model, INPUTS, steps=3, ramp="linear", train=train, pruning_ratio={"stem": 0.7},
        score=lambda m: 1.0 if m.stem.out_channels >= 10 else 0.5, max_drop=0.1, backtracks=4,
    )  # fmt: skip
    tried = [(round(t.way, 6), t.kept) for t in result.history]
    # removed int(0.7 * way * 13): 3 at 1/3; 6 at 2/3; 4 at 1/2; 3 at 5/12 (nothing new); 4 at 11/24 (as before)
    assert tried == [(round(1 / 3, 6), True), (round(2 / 3, 6), False), (0.5, False)]
    assert [m.stem.out_channels for m in models] == [10, 7, 9]
    assert result.model is models[0]
    assert all(torch.equal(v, good[10][k]) for k, v in result.model.state_dict().items())
    assert result.plan.new_shape("stem.weight")[0] == 10
    assert result.done
    assert result.report.score == (1.0, 1.0)
    assert sum("given up" in note for note in result.report.notes) == 2


@pytest.mark.slow
def test_where_nothing_is_good_enough_the_original_comes_back() -> None:
    model = made()
    before = copy.deepcopy(model.state_dict())
    result = prune_gradually(
        model, INPUTS, steps=2, train=disturb, score=lambda m: float(m is model),
        max_drop=0.3, backtracks=2,
    )  # fmt: skip
    assert result.model is model
    assert not result.plan.cuts
    assert not any(t.kept for t in result.history)
    assert len(result.history) == 3
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert result.report.verification.status == "skipped"


@pytest.mark.slow
def test_the_allowed_drop_may_change_along_the_way() -> None:
    scores = {10: 0.7, 7: 0.7, 4: 0.7}

    def kept(max_drop: Any) -> list[bool]:
        result = prune_gradually(
            made(), INPUTS, steps=3, ramp="linear", pruning_ratio={"stem": 0.7}, score=scripted(scores),
            max_drop=max_drop, backtracks=0,
        )  # fmt: skip
        return [t.kept for t in result.history]

    assert kept(0.31) == [True, True, True]
    assert kept(0.29) == [False]
    assert kept((0.4, 0.22)) == [True, False]  # 0.34, 0.28
    assert kept((0.4, 0.28)) == [True, True, False]  # 0.36, 0.32, 0.28
    assert kept((0.2, 0.4)) == [False]


@pytest.mark.slow
def test_the_optimizer_goes_on_and_comes_back() -> None:
    model = made()
    trained = copy.deepcopy(model)
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.01)
    steps: list[nn.Module] = []

    def train(m: nn.Module) -> None:
        optimizer.zero_grad()
        m(INPUTS).square().mean().backward()
        optimizer.step()

    train(trained)
    pruner = GradualPruner(
        trained, INPUTS, steps=2, ramp="linear", pruning_ratio=0.5,
        score=lambda m: float(m is trained or m is steps[0]), max_drop=0.5, backtracks=0,
    )  # fmt: skip
    current = trained
    snapshots = []
    while not (result := pruner.step(current, optimizer)).done:
        current = result.model
        steps.append(current)
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in current.parameters()]
        train(current)
        snapshots.append({n: optimizer.state[p]["exp_avg"].clone() for n, p in current.named_parameters()})
    assert len(steps) == 2
    assert result.model is steps[0] is pruner.model
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in steps[0].parameters()]
    for n, p in steps[0].named_parameters():
        assert torch.equal(optimizer.state[p]["exp_avg"], snapshots[0][n]), n
        assert float(optimizer.state[p]["step"]) == 2
    train(result.model)


@pytest.mark.slow
def test_an_interrupted_run_leaves_the_model_as_it_was() -> None:
    model = made()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]

    def train(m: nn.Module, step: int) -> None:
        disturb(m, step)
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_gradually(model, INPUTS, steps=3, train=train)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())


def test_the_aim_is_checked_before_anything_is_trained() -> None:
    model, calls = made(), []
    with pytest.raises(BudgetError, match="max_params"):
        prune_gradually(model, INPUTS, max_params=3, train=lambda m, s: calls.append(s))
    for match, given in {
        "steps must": {"steps": 0},
        "backtracks must": {"backtracks": -1},
        "one of linear": {"ramp": "steep"},
        "must give 1": {"ramp": lambda t: t / 2},
        "needs a score": {"max_drop": 0.1},
        "max_drop must": {"max_drop": (0.1, -0.1), "score": lambda m: 1.0},
        "does not take inplace": {"inplace": True},
        "max_params=1.5": {"max_params": 1.5},
        "matches nothing": {"ignore": ["nobody"]},
    }.items():
        with pytest.raises(InputError, match=match):
            prune_gradually(model, INPUTS, train=lambda m, s: calls.append(s), **given)
    pruner = GradualPruner(model, INPUTS, steps=2)
    with pytest.raises(InputError, match="or the original at first"):
        pruner.step(made())
    pruner.step(model)
    with pytest.raises(InputError, match="train that model"):
        pruner.step(model)
    assert calls == []


def test_a_budget_that_is_no_whole_number_is_kept() -> None:
    """67 parameters, 3 a unit: half are 33.5, and 34 would be too many."""
    model = nn.Sequential(nn.Linear(2, 22, bias=False), nn.ReLU(), nn.Linear(22, 1))
    result = prune_gradually(model, torch.randn(2, 2), steps=2, max_params=0.5)
    assert result.report.parameters == (67, 31)


@pytest.mark.slow
def test_a_step_that_fails_is_made_again() -> None:
    """Ctrl-C while the score is computed; an optimizer that can't be carried over."""
    model, stops = made(), [False]

    def score(m: nn.Module) -> float:
        if stops[0]:
            raise KeyboardInterrupt
        return 1.0

    pruner = GradualPruner(model, INPUTS, steps=2, ramp="linear", pruning_ratio=0.5, score=score)
    with pytest.raises(InputError, match="L-BFGS"):
        pruner.step(model, torch.optim.LBFGS(model.parameters()))
    first = pruner.step(model).model
    stops[0] = True
    with pytest.raises(KeyboardInterrupt):
        pruner.step(first)
    stops[0] = False
    second = pruner.step(first).model
    assert pruner.step(second).done
    assert widths(second) == widths(depgraph.prune(model, INPUTS, pruning_ratio=0.5).model)
    assert [t.kept for t in pruner.history] == [True, True]


@pytest.mark.slow
def test_the_report_of_a_run_that_was_taken_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = made(), {"steps": 2, "ramp": "linear", "pruning_ratio": 0.5, "latency": True}
    timed: list[Any] = []
    seconds = lambda models, inputs: (timed.append(list(models)), [3.0, 2.0])[1]  # noqa: E731
    monkeypatch.setattr("depgraph.training.schedule.latencies", seconds)
    pruner = GradualPruner(model, INPUTS, **options)
    first = pruner.step(model)
    again = GradualPruner(model, INPUTS, **options)
    second = again.step(again.resume(pruner.state_dict()))
    assert second.report.latency == (3.0, 2.0)
    assert timed[-1] == [model, second.model]
    done = GradualPruner(model, INPUTS, **options)
    pruner.step(first.model)
    last = done.step(done.resume(pruner.state_dict()))
    assert last.done
    assert last.plan.cuts
    assert last.report.verification.detail == "the step was made before the checkpoint"


# -------------------------------------------------------------------------------------------------- thresholds


RANKED: list[nn.Module] = []  # the last one is pruned next


def ranked(scale: float = 1.0) -> nn.Module:
    """Unit u of 10 has a score of u (times `scale`) by `by_rank`; the mean is 4.5."""
    model = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[:, 0] = scale * torch.arange(10.0)
    RANKED.append(model)
    return model


def by_rank(group: Any) -> Tensor:
    return RANKED[-1][0].weight.detach()[:, 0]


def below(model: nn.Module, **options: Any) -> nn.Module:
    return depgraph.prune(model, torch.randn(4, 3), importance=by_rank, **options).model


def test_a_threshold_takes_what_is_below_it() -> None:
    assert below(ranked(), threshold=3.0, normalise="none")[0].weight[:, 0].tolist() == list(range(3, 10))
    assert below(ranked(), threshold=0.9)[0].weight[:, 0].tolist() == list(range(5, 10))  # 0.9 * 4.5 = 4.05
    assert below(ranked(7.0), threshold=0.9)[0].out_features == 5
    assert below(ranked(), threshold=-1.0)[0].out_features == 10
    assert below(ranked(), threshold=99.0)[0].out_features == 1  # at most 0.9 of a group
    assert below(ranked(), threshold=99.0, max_ratio=0.5)[0].out_features == 5
    for given in ({"pruning_ratio": 0.5}, {"max_params": 0.5}, {"scope": "global"}):
        with pytest.raises(InputError, match="give one of them"):
            below(ranked(), threshold=1.0, **given)
    with pytest.raises(InputError, match="finite"):
        below(ranked(), threshold=float("nan"))


@pytest.mark.parametrize(
    ("threshold", "ramp", "limits"),
    [
        (4.0, "linear", [1, 2, 3, 4]),
        (2.0, "one_shot", [2, 2, 2, 2]),
        ((4.0, 1.0), "cubic", [3.25, 2.5, 1.75, 1]),
        ((-2.0, 2.0), "linear", [-1, 0, 1, 2]),  # nothing at first, and nothing is passed over
    ],
)
def test_thresholds_that_grow_stay_or_fall(threshold: Any, ramp: str, limits: list[float]) -> None:
    """Training takes 1 from every score, so that one that stays finds new units below it every time."""
    seen = []

    def train(model: nn.Module, step: int) -> None:
        seen.append(model[0].out_features)
        with torch.no_grad():
            model[0].weight[:, 0] -= 1
        RANKED.append(model)

    expected, scores = [], torch.arange(10.0)
    for limit in limits:
        scores = scores[scores >= limit]
        expected.append(len(scores))
        scores = scores - 1
    result = prune_gradually(
        ranked(), torch.randn(4, 3), steps=4, ramp=ramp, threshold=threshold, normalise="none", importance=by_rank,
        train=train, max_ratio=0.95,
    )  # fmt: skip
    assert seen == expected
    assert result.model[0].out_features == expected[-1]
    with pytest.raises(InputError, match="or two"):
        prune_gradually(ranked(), torch.randn(4, 3), threshold=(1, 2, 3))


# --------------------------------------------------------------------------------------------------- rewinding


def test_rewinding_is_slicing_the_early_weights() -> None:
    early, model = made(), made()
    disturb(model, 0)
    model.norm.running_mean.add_(1.0)
    result = depgraph.prune(model, INPUTS, pruning_ratio=0.5)
    trained = copy.deepcopy(result.model.state_dict())
    for initial in (early, early.state_dict()):
        ticket = rewind(result.plan, initial, result.model)
        for name, value in ticket.state_dict().items():
            by_hand = early.state_dict()[name]
            mask = result.plan.mask(name)
            assert torch.equal(value.flatten(), by_hand[mask]), name
        assert ticket(INPUTS).shape == (2, 5)
        assert all(p.requires_grad and p.is_leaf for p in ticket.parameters())
    assert all(torch.equal(v, trained[k]) for k, v in result.model.state_dict().items())
    kept = result.plan.mask("stem.weight").any((1, 2, 3))
    assert torch.equal(ticket.stem.weight, early.stem.weight[kept])
    disturb(ticket, 3)
    assert torch.equal(early.stem.weight, made().stem.weight), "no memory is shared"


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_weights_of_before_the_model_was_wrapped_are_early_weights(wrap: Any) -> None:
    """And those of after it, for a model that is wrapped no more."""
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(7, 14), nn.ReLU(), nn.Linear(14, 3)).eval(), torch.randn(2, 7)
    early = copy.deepcopy(model)
    disturb(model, 0)
    around, alone = depgraph.prune(wrap(model), x), depgraph.prune(model, x)
    wanted = rewind(alone.plan, early, alone.model)
    for got in (
        rewind(around.plan, early.state_dict(), around.model),
        rewind(alone.plan, wrap(early).state_dict(), alone.model),
        rewind(around.plan, wrap(early), alone.model),
    ):
        for one, two in zip(got.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(one, two)


def test_rewinding_keeps_ties_types_and_what_a_state_dict_lacks() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 3)
            self.b.weight = self.a.weight
            self.register_buffer("scale", torch.ones(7), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.c((self.a(x).relu() + self.b(x)) * self.scale)

    torch.manual_seed(1)
    early = Tied().double()
    model = copy.deepcopy(early).float()
    model.scale.fill_(2.0)
    result = depgraph.prune(model, torch.randn(2, 5), pruning_ratio=0.5)
    result.model.c.weight.requires_grad_(False)
    state = early.state_dict()
    del state["a.weight"]  # as files without ties have it: under one of its names
    ticket = rewind(result.plan, state, result.model)
    assert type(ticket) is Tied
    assert ticket.a.weight is ticket.b.weight
    assert ticket.a.weight.dtype == torch.float32
    assert not ticket.c.weight.requires_grad
    assert ticket.scale.tolist() == [2.0] * 4
    mask = result.plan.mask("a.weight")
    assert torch.equal(ticket.a.weight.flatten(), early.a.weight[mask].float())


def test_other_weights_than_the_plans_are_refused() -> None:
    model = made()
    result = depgraph.prune(model, INPUTS, pruning_ratio=0.5)
    state = model.state_dict()
    del state["mix.bias"]
    with pytest.raises(PlanError, match=r"'mix\.bias' is not among"):
        rewind(result.plan, state, result.model)
    with pytest.raises(PlanError, match=r"'stem\.weight' had the initial shape \(7, 3"):
        rewind(result.plan, depgraph.prune(model, INPUTS, pruning_ratio=0.5).model, result.model)
    with pytest.raises(PlanError, match="the plan makes"):
        rewind(result.plan, model, model)


# -------------------------------------------------------------------------------------------- all kinds of networks


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["PermutationCycles", "LiteralView", "GroupedQueryExpand", "GroupedConvolution"]
)
def test_two_steps_take_no_more_than_one(name: str) -> None:
    entry = ZOO[name]
    model, x = entry.model(), entry.example()
    result = prune_gradually(model, x, steps=2, ramp="linear", pruning_ratio=0.5)
    assert widths(result.model) == widths(depgraph.prune(model, x, pruning_ratio=0.5).model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", ZOO)
def test_the_composed_plan_makes_what_the_steps_made(name: str) -> None:
    """Without training in between: the same tensors, equal to the masked original, and no wider than after one step."""
    entry = ZOO[name]
    model, x = entry.model(), entry.example()
    result = prune_gradually(model, x, steps=2, ramp="linear", pruning_ratio=0.5, verify=False)
    replayed = depgraph.apply(model, result.plan)
    for small in (result.model, replayed):
        assert_state_matches_plan(model, small, result.plan)
        wide = SimpleNamespace(model=in_float64(small), plan=result.plan)
        assert_equal_to_masked(in_float64(model), wide, as_float64(x), 1e-9)
