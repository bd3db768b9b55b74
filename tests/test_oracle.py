"""The oracle on trial: nets pruned by hand pass, wrong slices fail, statistics count live elements only."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    assert_equal_to_masked,
    assert_state_matches_plan,
    assert_trains,
    assert_untouched,
    expected_output,
    live_elements_only,
    mark_live_,
    snapshot,
    tensors_of,
    zeroed,
)
from torch import nn
from zoo import ZOO, ready
from zoo_entry import ENTRIES, broken_expectations, cast

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


class HandPlan:
    """Keeps, of each named tensor, the listed indices of each listed dim: {"conv.weight": {0: [1, 2]}}."""

    def __init__(self, model: nn.Module, kept: dict[str, dict[int, list[int]]]):
        self.masks = {name: torch.ones(t.shape, dtype=torch.bool) for name, t in tensors_of(model)}
        for name, dims in kept.items():
            for dim, indices in dims.items():
                gone = sorted(set(range(self.masks[name].shape[dim])) - set(indices))
                self.masks[name].index_fill_(dim, torch.tensor(gone, dtype=torch.long), False)

    def mask(self, name: str) -> torch.Tensor:
        return self.masks[name]


@dataclass
class HandResult:
    model: nn.Module
    plan: HandPlan


class Hand(nn.Module):
    """conv -> norm -> activation -> conv (+ skip over it) -> mean -> linear, of any width."""

    def __init__(self, width: int, norm=nn.BatchNorm2d, act=F.gelu, residual: bool = False):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, width, 3), norm(width), nn.Conv2d(width, width, 1)
        self.head, self.act, self.residual = nn.Linear(width, 2), act, residual

    def forward(self, x):
        x = self.act(self.norm(self.a(x)))
        y = self.b(x)
        return self.head((x + y if self.residual else y).mean((2, 3)))


def kept_everywhere(kept: list[int], other: list[int]) -> dict[str, dict[int, list[int]]]:
    """The plan of `Hand`: `kept` between a and b, `other` between b and head."""
    norm = {f"norm.{n}": {0: kept} for n in ("weight", "bias", "running_mean", "running_var")}
    return {
        "a.weight": {0: kept}, "a.bias": {0: kept}, **norm,
        "b.weight": {0: other, 1: kept}, "b.bias": {0: other}, "head.weight": {1: other},
    }  # fmt: skip


def sliced(model: nn.Module, small: nn.Module, plan: HandPlan) -> nn.Module:
    state = model.state_dict()
    shapes = small.double().state_dict()
    small.load_state_dict({n: t[plan.mask(n)].view(shapes[n].shape) for n, t in state.items()})
    return small.eval()


def by_hand(kept, other, **options) -> tuple[nn.Module, HandResult, torch.Tensor]:
    model = ready(Hand(7, **options), seed=1)
    names = dict(tensors_of(model))
    plan = HandPlan(model, {n: d for n, d in kept_everywhere(kept, other).items() if n in names})
    small = Hand(len(kept), **options)
    if len(kept) != len(other):
        small.b, small.head = nn.Conv2d(len(kept), len(other), 1), nn.Linear(len(other), 2)
    return model, HandResult(sliced(model, small, plan), plan), torch.randn(2, 3, 8, 6).double()


KEPT, OTHER = [0, 2, 3, 6], [1, 2, 5]


class LayerNorm2d(nn.Module):
    """Written out, so that x - mean is not 0 where x was."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        x = x - x.mean(1, keepdim=True)
        x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class Statistic(nn.Module):
    """A norm made of one function over channels."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


STATISTICS = {
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1) * x,
    "std": lambda x: x / (1 + x.std(1, keepdim=True)),
    "var_mean": lambda x: (x - torch.var_mean(x, 1, keepdim=True)[1]) * torch.var_mean(x, 1, keepdim=True)[0],
    "amax": lambda x: x - x.amax(1, keepdim=True),
    "max": lambda x: x - x.max(1, keepdim=True)[0],
    "amin": lambda x: x - x.amin((1, 2), keepdim=True),
    "logsumexp": lambda x: x - x.logsumexp(1, keepdim=True),
    "layer_norm": lambda x: F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1),
    "group_norm": lambda x: F.group_norm(x, 1),
    "rms_norm": lambda x: F.rms_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1),
    "sigmoid, then sum": lambda x: x * x.sigmoid().sum(1, keepdim=True),
    "exp, then mean": lambda x: x / x.exp().mean(1, keepdim=True),
    "relu, then mean": lambda x: x - x.relu().mean(1, keepdim=True),
    "hardswish, then mean": lambda x: x - F.hardswish(x).mean(1, keepdim=True),
    "instance_norm": F.instance_norm,
    "dropped tokens": lambda x: x - x.masked_fill(x[:, :1] > 0, 0).mean((1, 3), keepdim=True),
    "mean of a gram": lambda x: x - (x.flatten(2) @ x.flatten(2).mT).mean((1, 2))[:, None, None, None],
    "cat, then mean": lambda x: x - torch.cat([x, 2 * x], 1).mean(1, keepdim=True),
    "padded, then mean": lambda x: x - F.pad(x, (0, 0, 0, 0, 2, 1)).mean(1, keepdim=True),
    "written, then mean": lambda x: x - torch.zeros_like(x).copy_(x).tanh().mean(1, keepdim=True),
}


@pytest.mark.parametrize("other", [KEPT, OTHER])
def test_a_net_pruned_by_hand_passes(other):
    model, result, x = by_hand(KEPT, other)
    assert_equal_to_masked(model, result, (x,), tol=1e-13)
    assert_state_matches_plan(model, result.model, result.plan)
    assert_trains(result.model, (x,), model)


@pytest.mark.parametrize("act", [F.relu, F.sigmoid, torch.cos, F.hardswish])
def test_activations_that_revive_zero_or_make_zeros(act):
    model, result, x = by_hand(KEPT, KEPT, act=act, residual=True)
    assert_equal_to_masked(model, result, (x,), tol=1e-13)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_count_live_elements_only(name):
    model, result, x = by_hand(KEPT, OTHER, norm=lambda width: Statistic(STATISTICS[name]))
    assert_equal_to_masked(model, result, (x,), tol=1e-12)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_over_one_live_channel(name):
    """One channel less its own mean is 0, and yet alive."""
    model, result, x = by_hand([0], OTHER, norm=lambda width: Statistic(STATISTICS[name]))
    if name in ("std", "var_mean"):
        pytest.skip("the variance of one number is not a number")
    assert_equal_to_masked(model, result, (x,), tol=1e-12)


def test_a_hand_written_layer_norm_between_dead_channels():
    model, result, x = by_hand(KEPT, KEPT, norm=LayerNorm2d, residual=True)
    assert_equal_to_masked(model, result, (x,), tol=1e-12)


def test_without_the_mode_a_statistic_would_be_wrong():
    """A negative control: plain zeroing is not what a smaller LayerNorm computes."""
    model, result, x = by_hand(KEPT, KEPT, norm=LayerNorm2d)
    plain = zeroed(model, result.plan)(x)
    assert (plain - expected_output(model, result.plan, (x,))).abs().max() > 1e-3


def test_group_norm_with_other_positions_in_each_group():
    model = ready(
        nn.Sequential(nn.Conv2d(3, 10, 1), nn.GroupNorm(2, 10), nn.SiLU(), nn.Conv2d(10, 2, 1)), seed=2
    )
    kept = [0, 3, 4, 5, 6, 9]
    vectors = {n: {0: kept} for n in ("0.weight", "0.bias", "1.weight", "1.bias")}
    plan = HandPlan(model, {**vectors, "3.weight": {1: kept}})
    small = nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 2, 1))
    x = torch.randn(2, 3, 4, 5).double()
    result = HandResult(sliced(model, small, plan), plan)
    assert_equal_to_masked(model, result, (x,), tol=1e-12)


def test_weight_norm_of_a_removed_row_is_no_nan():
    v, g = torch.randn(3, 5).double(), torch.randn(3, 1).double()
    v[1] = 0
    with live_elements_only():
        w = torch._weight_norm(v, g, 0)
    assert w.isfinite().all()
    assert [bool((row == 0).all()) for row in w] == [False, True, False]


def test_masks_and_positions_that_are_true_zeros():
    """A causal mask compared with 0, and cos of position 0, must come out as without the mode."""
    mask, scores = torch.tril(torch.ones(4, 4)).double(), torch.randn(2, 4, 4).double()
    angles = torch.arange(4).double()[:, None] * torch.rand(3).double()

    def run():
        return (
            scores.masked_fill(mask_in == 0, -torch.inf).softmax(-1),
            angles_in.cos(),
            torch.arange(3.0).exp(),
        )

    mask_in, angles_in = mask, angles
    plain = run()
    mask_in, angles_in = mark_live_(mask.clone()), mark_live_(angles.clone())
    with live_elements_only():
        masked = run()
    for p, m in zip(plain, masked, strict=True):
        torch.testing.assert_close(p, m, rtol=0, atol=1e-14)


def test_accumulation_into_zeros():
    x = torch.randn(4, 3).double()
    x[:, 1] = 0
    with live_elements_only():
        total = torch.zeros(2, 3, dtype=x.dtype).index_add_(0, torch.tensor([0, 1, 1, 0]), x)
        mean = total.mean(1)
    torch.testing.assert_close(mean, total[:, [0, 2]].mean(1), rtol=0, atol=1e-14)


WRONG = {
    "another channel in the convolution": ("a.weight", 0),
    "another channel in the bias": ("a.bias", 0),
    "another channel in the running mean": ("norm.running_mean", 0),
    "another input of the consumer": ("b.weight", 1),
    "another output of the next layer": ("b.weight", 0),
    "another input of the head": ("head.weight", 1),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_slice_is_noticed(what):
    """One tensor of the pruned model has its slices rolled by one: values differ, and so does the state."""
    name, dim = WRONG[what]
    model, result, x = by_hand(KEPT, OTHER)
    with torch.no_grad():
        tensor = dict(tensors_of(result.model))[name]
        tensor.copy_(tensor.roll(1, dim))
    with pytest.raises(AssertionError, match="off its masked original"):
        assert_equal_to_masked(model, result, (x,))
    with pytest.raises(AssertionError, match="not the entries that the plan keeps"):
        assert_state_matches_plan(model, result.model, result.plan)


def test_a_plan_that_forgets_a_consumer_is_noticed():
    """The plan keeps inputs of b that no longer exist: what the masked original computes is another thing."""
    model, result, x = by_hand(KEPT, OTHER)
    wrong = copy.copy(result.plan)
    wrong.masks = {**wrong.masks, "b.weight": wrong.masks["b.weight"].roll(1, 1)}
    with pytest.raises(AssertionError, match="off its masked original"):
        assert_equal_to_masked(model, HandResult(result.model, wrong), (x,))
    with pytest.raises(AssertionError, match=r"b\.weight: not the entries"):
        assert_state_matches_plan(model, result.model, wrong)


def test_a_wrong_statistic_is_noticed():
    """The pruned model still divides by the old number of channels."""
    model, result, x = by_hand(
        KEPT, KEPT, norm=lambda width: Statistic(lambda x: x - x.mean(1, keepdim=True))
    )
    result.model.norm.function = lambda x: x - x.sum(1, keepdim=True) / 7
    with pytest.raises(AssertionError, match="off its masked original"):
        assert_equal_to_masked(model, result, (x,))


def test_changed_shapes_and_dead_outputs_are_noticed():
    model, result, x = by_hand(KEPT, KEPT)
    result.model.head = nn.Linear(4, 3).double()
    with pytest.raises(AssertionError, match="shapes changed"):
        assert_equal_to_masked(model, result, (x,))
    with pytest.raises(AssertionError, match=r"head\.weight"):
        assert_state_matches_plan(model, result.model, result.plan)


def test_training_is_checked():
    model, result, x = by_hand(KEPT, KEPT)
    result.model.b.requires_grad_(False)
    with pytest.raises(AssertionError, match="requires_grad changed"):
        assert_trains(result.model, (x,), model)
    result.model.b.requires_grad_(True)
    result.model.act = lambda t: F.gelu(t).detach()
    with pytest.raises(AssertionError, match="a gradient came or went"):
        assert_trains(result.model, (x,), model)


def test_touching_the_model_is_noticed():
    model = ready(Hand(5))
    before = snapshot(model)
    assert_untouched(model, before)
    model.norm.num_features = 4
    with pytest.raises(AssertionError, match="an attribute of norm"):
        assert_untouched(model, before)
    model.norm.num_features = 5
    with torch.no_grad():
        model.norm.running_mean[2] += 1e-12
    with pytest.raises(AssertionError, match=r"norm\.running_mean has other values"):
        assert_untouched(model, before)


def test_expectations_of_an_entry_are_checked():
    entry = ENTRIES["Residual"]
    model = entry.model()
    assert any("did not shrink" in line for line in broken_expectations(entry, model, model))
    head = ENTRIES["Plain"].model()
    assert not broken_expectations(
        ENTRIES["Plain"].__class__(lambda: head, lambda: (), keeps=("head.*",)), head, head
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_with_everything_kept_the_oracle_is_the_model(name):
    """On every network of the zoo the mode by itself changes nothing: no live element is taken for dead."""
    model, inputs = ZOO[name].model(), ZOO[name].example()
    model, inputs = model.double(), tuple(cast(value, torch.float64) for value in inputs)
    assert_equal_to_masked(model, HandResult(model, HandPlan(model, {})), inputs, tol=1e-12)
    assert_trains(model, inputs, model)
