"""Fisher-weighted OBS: its scores by hand, on every kind of consumer, with and without a loss, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from curvature import (
    Given,
    alike,
    batches,
    in_common,
    of_two_readers,
    on_others,
    ones,
    plain,
    scores,
    watched,
)
from torch import Tensor, nn
from torch.nn import functional as F
from versions import on_new_torch

import depgraph
from depgraph import InputError
from depgraph.importance import L2, KfacObs
from depgraph.importance.kfac import signed
from depgraph.importance.positions import owners


def by_hand(every: Sequence[Given], damping: float, samples: int, trace: float = 1.0) -> list[float]:
    """tr(G W_u ((H^-1)_uu)^-1 W_u') for each unit, added up over consumers; G is scaled by the root of `trace`."""
    totals = [0.0] * len(every[0][3])
    for x, g, weight, units in every:
        moment = x.T @ x / len(x)
        inverse = torch.linalg.inv(moment + damping * moment.diagonal().mean() * torch.eye(x.shape[1]).to(x))
        fisher = g.T @ g / samples * on_others(x, damping) * trace
        for u, columns in enumerate(units):
            w = weight[:, columns]
            block = torch.linalg.inv(inverse[columns][:, columns])
            totals[u] += float(torch.trace(fisher @ w @ block @ w.T))
    return totals


class Attention(nn.Module):
    """Heads of width 3; keys and values from one input."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 7)
        self.q, self.k, self.v, self.out = (
            nn.Linear(7, 12),
            nn.Linear(7, 12),
            nn.Linear(7, 12),
            nn.Linear(12, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x))
        q, k, v = (m(x).unflatten(-1, (4, 3)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(y).mean(1)


def test_linear_layers_with_a_loss() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 7), nn.ReLU(inplace=True), nn.Linear(7, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)
    ).double()
    data = batches((3,), 2)
    for name, units in (("2", 7), ("4", 5)):
        ((x, g),) = watched(plain(net), data, F.cross_entropy, name)
        expected = by_hand([(x, g, net.get_submodule(name).weight.detach(), ones(units))], 0.01, 33)
        np.testing.assert_allclose(scores(net, data, units, "kfac_obs", F.cross_entropy), expected, rtol=1e-8)


@pytest.mark.parametrize("damping", [0.3, 3.0])
def test_wide_results_and_several_consumers_add_up(damping: float) -> None:
    net, data, every = of_two_readers()
    found = scores(net, data, 7, KfacObs(damping), F.cross_entropy)
    np.testing.assert_allclose(found, by_hand(every, damping, 33))


@pytest.mark.parametrize("groups", [1, 2])
def test_windows_of_convolutions(groups: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.ReLU(inplace=True), nn.Conv2d(6, 4, (3, 2), padding=1, groups=groups), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).double()  # fmt: skip
    data = alike(batches((2, 4, 5), 3))
    ((x, g),) = watched(plain(net), data, F.cross_entropy, "2")
    windows = F.unfold(x, (3, 2), padding=1).transpose(1, 2).flatten(0, 1)
    results = g.flatten(2).transpose(1, 2).flatten(0, 1)
    weights = net[2].weight.detach().flatten(1).chunk(groups)
    apart = zip(windows.chunk(groups, 1), results.chunk(groups, 1), weights, strict=True)
    trace = in_common(net, data, F.cross_entropy, "2.weight", *apart, damping=0.9)
    assert trace > 1.1
    totals: list[float] = []
    for block in range(groups):
        width, rows = 6 // groups, 4 // groups
        part = windows[:, block * width * 6 : (block + 1) * width * 6]
        weight = net[2].weight.detach()[block * rows : (block + 1) * rows].flatten(1)
        units = [[6 * u + i for i in range(6)] for u in range(width)]
        totals += by_hand(
            [(part, results[:, block * rows : (block + 1) * rows], weight, units)], 0.9, 33, trace
        )
    found = scores(
        net, data, 6 // groups, KfacObs(0.9), F.cross_entropy
    )  # the first block's units are a group of their own
    np.testing.assert_allclose(found, totals[: len(found)], rtol=1e-8)


def test_heads_of_attention() -> None:
    torch.manual_seed(0)
    net, data = (
        Attention().double(),
        [(torch.randn(11, 6, 3).double(), torch.randint(0, 5, (11,))) for _ in range(3)],
    )
    ((x, g),) = watched(net, data, F.cross_entropy, "out")
    units = [[3 * u + i for i in range(3)] for u in range(4)]
    every = [(x.flatten(0, 1), g.flatten(0, 1), net.out.weight.detach(), units)]
    trace = in_common(net, data, F.cross_entropy, "out.weight", every[0][:3])
    expected = by_hand(every, 0.01, 11 * 6 * 3, trace)
    np.testing.assert_allclose(scores(net, data, 4, "kfac_obs", F.cross_entropy), expected, rtol=1e-8)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_inputs_of_recurrent_layers(kind: Any, bidirectional: bool) -> None:
    """W'g, for all gates and directions together, is the gradient at the layer's input."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(3, 7)
            self.steps = kind(7, 4, batch_first=True, bidirectional=bidirectional)
            self.out = nn.Linear(8 if bidirectional else 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.steps(torch.tanh(self.enter(x)))[0].mean(1))

    torch.manual_seed(0)
    net, data = (
        Steps().double(),
        [(torch.randn(11, 5, 3).double(), torch.randint(0, 2, (11,))) for _ in range(2)],
    )
    inputs, back = [], []
    for x, target in data:
        hidden = torch.tanh(net.enter(x)).detach().requires_grad_()
        loss = F.cross_entropy(net.out(net.steps(hidden)[0].mean(1)), target)
        back.append(torch.autograd.grad(loss, hidden)[0].flatten(0, 1))
        inputs.append(hidden.detach().flatten(0, 1))
    x, g = torch.cat(inputs), torch.cat(back)
    found = scores(net, data, 7, "kfac_obs", F.cross_entropy)
    expected = by_hand([(x, g, torch.eye(7).double(), ones(7))], 0.01, 1)
    np.testing.assert_allclose(found / found.sum(), np.array(expected) / sum(expected), rtol=1e-8)


@on_new_torch
def test_experts_count_by_the_gradients_of_their_samples() -> None:
    class Runs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rise, self.fall = nn.Parameter(torch.randn(3, 8, 28)), nn.Parameter(torch.randn(3, 28, 4))
            self.register_buffer("ends", torch.tensor([2, 13, 20], dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(torch._grouped_mm(x, self.rise, offs=self.ends) / 4)
            return torch._grouped_mm(hidden, self.fall, offs=self.ends)

    torch.manual_seed(1)
    net, data = Runs(), [(torch.randn(20, 8), torch.randint(0, 4, (20,))) for _ in range(30)]
    units = [list(range(4 * u, 4 * u + 4)) for u in range(7)]
    expected = np.zeros(7)
    for e, (i, j) in enumerate(((0, 2), (2, 13), (13, 20))):
        x = torch.cat([torch.tanh(b[i:j] @ net.rise[e] / 4).detach() for b, _ in data]).double()
        out = x.float() @ net.fall[e].detach()
        target = torch.cat([t[i:j] for _, t in data])
        g = (out.softmax(1) - F.one_hot(target, 4)).double() / 20
        expected += by_hand([(x, g, net.fall[e].detach().T.double(), units)], 0.01, 1)
    found = scores(net, data, 7, "kfac_obs", F.cross_entropy)
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=1e-3)


class Pooled(nn.Module):
    """A layer on each of several positions, in some order of dims, and the mean of them."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.enter, self.fall, self.order = nn.Linear(3, 7), nn.Linear(7, 4), order

    def forward(self, x: Tensor) -> Tensor:  # [samples, positions, 3]
        if self.order == "positions first":
            return self.fall(torch.tanh(self.enter(x.transpose(0, 1)))).mean(0)
        if self.order == "windows":  # two of each sample, one after the other
            parts = x.unflatten(1, (2, -1)).flatten(0, 1)
            return self.fall(torch.tanh(self.enter(parts))).unflatten(0, (-1, 2)).mean((1, 2))
        if self.order == "rows":
            return self.fall(torch.tanh(self.enter(x.flatten(0, 1)))).unflatten(0, (len(x), -1)).mean(1)
        return self.fall(torch.tanh(self.enter(x))).mean(1)


@pytest.mark.parametrize("order", ["samples first", "positions first", "windows", "rows"])
@pytest.mark.parametrize(
    "positions", [4, 40]
)  # products of positions are fewer than entries of the weight, and more
def test_what_positions_of_a_sample_have_in_common_counts(order: str, positions: int) -> None:
    torch.manual_seed(0)
    net = Pooled(order).double()
    data = [
        (
            torch.randn(11, 1, 3).double() + 0.3 * torch.randn(11, positions, 3).double(),
            torch.randint(0, 4, (11,)),
        )
        for _ in range(3)
    ]
    twin = Pooled("samples first").double()
    twin.load_state_dict(net.state_dict())
    ((x, g),) = watched(twin, data, F.cross_entropy, "fall")
    x, g = x.flatten(0, 1), g.flatten(0, 1)
    trace = in_common(net, data, F.cross_entropy, "fall.weight", (x, g, net.fall.weight.detach()))
    assert 1.2 < trace < positions
    expected = by_hand([(x, g, net.fall.weight.detach(), ones(7))], 0.01, 33 * positions, trace)
    np.testing.assert_allclose(scores(net, data, 7, "kfac_obs", F.cross_entropy), expected, rtol=1e-8)


def test_wide_layers_are_taken_apart_with_what_positions_have_in_common() -> None:
    torch.manual_seed(0)
    net = Pooled("").double()
    data = [
        (torch.randn(11, 1, 3).double() + 0.3 * torch.randn(11, 9, 3).double(), torch.randint(0, 4, (11,)))
        for _ in range(3)
    ]
    ((x, g),) = watched(net, data, F.cross_entropy, "fall")
    x, g, weight = x.flatten(0, 1), g.flatten(0, 1), net.fall.weight.detach()
    expected: list[float] = []
    for a, b in ((0, 4), (4, 7)):
        part = x[:, a:b], g, weight[:, a:b]
        trace = in_common(net, data, F.cross_entropy, "fall.weight", part, damping=0.9, first=a)
        assert trace > 1.2
        expected += by_hand([(*part, ones(b - a))], 0.9, 297, trace)
    np.testing.assert_allclose(
        scores(net, data, 7, KfacObs(0.9, widest=4), F.cross_entropy), expected, rtol=1e-8
    )


def test_groups_of_convolutions_that_are_taken_apart() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.Tanh(), nn.Conv2d(6, 4, (3, 2), padding=1, groups=2), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).double()  # fmt: skip
    data = alike(batches((2, 4, 5), 3))
    ((x, g),) = watched(net, data, F.cross_entropy, "2")
    windows = F.unfold(x, (3, 2), padding=1).transpose(1, 2).flatten(0, 1)
    results, weight = g.flatten(2).transpose(1, 2).flatten(0, 1), net[2].weight.detach().flatten(1)
    every: list[list[float]] = []
    for row in (0, 2):
        every.append([])
        for a, b in ((0, 12), (12, 18)):  # of the 18 columns of a group of 3 channels
            part = (
                windows[:, 9 * row + a : 9 * row + b],
                results[:, row : row + 2],
                weight[row : row + 2, a:b],
            )
            trace = in_common(net, data, F.cross_entropy, "2.weight", part, damping=0.9, row=row, first=a)
            units = [list(range(i, i + 6)) for i in range(0, b - a, 6)]
            every[-1] += by_hand([(*part, units)], 0.9, 33, trace)
    found = scores(net, data, 3, KfacObs(0.9, widest=12), F.cross_entropy)
    assert any(np.allclose(found, e, rtol=1e-8) for e in every)


def test_errors_that_cancel_count_as_if_positions_were_independent() -> None:
    """Behind differences of two positions whose inputs are the same the gradients of a sample add up to nothing."""

    class Differences(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            y = self.fall(torch.tanh(self.enter(x.repeat_interleave(2, 1))))
            return y[:, 0] - y[:, 1] + y.detach()[:, 0]

    torch.manual_seed(0)
    net = Differences("").double()
    data = [(torch.randn(11, 1, 3).double(), torch.randint(0, 4, (11,))) for _ in range(3)]
    ((x, g),) = watched(net, data, F.cross_entropy, "fall")
    x, g = x.flatten(0, 1), g.flatten(0, 1)
    assert float(g.square().sum()) > 0
    expected = by_hand([(x, g, net.fall.weight.detach(), ones(7))], 0.01, 66)
    np.testing.assert_allclose(scores(net, data, 7, "kfac_obs", F.cross_entropy), expected, rtol=1e-8)


def test_of_rows_that_are_of_no_known_sample_all_count_together() -> None:
    """Eleven outputs of 3 x 11 rows are told, five outputs of 33 rows are not."""
    assert owners([33], 11).bincount().tolist() == [3] * 11
    assert owners([33], 5).bincount().tolist() == [33]
    assert owners([4, 11, 3], 11).view(4, 11, 3)[2, :, 1].tolist() == list(range(11))
    assert owners([], 3).tolist() == [0]


def test_without_a_loss_signs_at_the_outputs_stand_for_it() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    data = [x for x, _ in batches((3,), 2)]
    seeds = iter(range(1, 4))
    pairs = [(x, None) for x in data]
    ((x, g),) = watched(net, pairs, lambda out, _: signed(out, next(seeds)), "2")
    expected = by_hand([(x, g, net[2].weight.detach(), ones(7))], 0.01, 33)
    np.testing.assert_allclose(scores(net, data, 7, "kfac_obs", None), expected, rtol=1e-8)
    # of many draws G is the same as that of all outputs by themselves: no output matters more than another
    gradients = torch.cat([_signs(net, x, s) for x in data for s in range(400)])
    fisher = gradients.T @ gradients
    assert float(fisher[0, 1].abs()) < 0.1 * float(fisher[0, 0])


def _signs(net: nn.Module, x: Tensor, seed: int) -> Tensor:
    out = net(x).detach().requires_grad_()
    return torch.autograd.grad(signed(out, seed), out)[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients_and_frozen_models_make_no_difference(mode: Any) -> None:
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2)).double(), batches((3,), 2)
    expected = scores(net, data, 7, "kfac_obs", F.cross_entropy)
    net.requires_grad_(False)
    with mode():
        copies = [(x.clone(), target) for x, target in data]
        np.testing.assert_array_equal(scores(net, copies, 7, "kfac_obs", F.cross_entropy), expected)
        assert depgraph.prune(
            net, data[0][0], max_params=0.6, calibration=copies, progress=False
        ).report.recovery


def test_one_backward_pass_and_memory_is_bounded() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    data, calls = batches((3,), 2), []

    def counted(output: Tensor, target: Tensor) -> Tensor:
        calls.append(0)
        return F.cross_entropy(output, target)

    once = scores(net, data, 7, "kfac_obs", counted)
    assert len(calls) == len(data)
    often = scores(net, data, 7, KfacObs(memory=1), counted)
    assert len(calls) == 3 * len(data)
    scores(net, data, 7, KfacObs(memory=1000), counted)  # 824 bytes without the inverses, 1416 with them
    assert len(calls) == 5 * len(data)
    np.testing.assert_array_equal(once, often)


def test_groups_that_no_weight_reads_come_to_the_same_scale() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 7), nn.Linear(3, 7)
            self.enter, self.out = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            similar = (self.left(x) * 10) @ (self.right(x) * 10).mT
            return self.out(torch.tanh(self.enter(x))) + similar.mean()

    torch.manual_seed(0)
    net, data = Both().double(), batches((3,), 2)
    unread, read = (scores(net, data, units, "kfac_obs", F.cross_entropy) for units in (7, 5))
    plain = scores(net, data, 7, L2(), F.cross_entropy)
    assert unread.mean() == pytest.approx(read.mean())
    np.testing.assert_allclose(unread / unread.mean(), plain / plain.mean())


def test_a_model_that_runs_without_gradients_is_scored_by_errors_alone() -> None:
    class Quiet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(3, 7), nn.Linear(7, 5), nn.Linear(5, 2)

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))

    torch.manual_seed(0)
    net, data = Quiet().double(), batches((3,), 2)
    inputs = [x for x, _ in data]
    for units in (7, 5):
        found, plain = (scores(net, inputs, units, name, None) for name in ("kfac_obs", "obs"))
        np.testing.assert_allclose(found / found.sum(), plain / plain.sum())
    result = depgraph.prune(net, inputs[0], max_params=0.6, calibration=inputs, progress=False)
    assert any("no gradient comes back" in note for note in result.report.notes)
    with pytest.raises(InputError, match="does not depend on any weight"):
        scores(net, data, 7, "kfac_obs", F.cross_entropy)


def test_a_group_that_no_gradient_reaches_is_not_the_first_to_go() -> None:
    class Leaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three, self.four = (
                nn.Linear(*n) for n in ((3, 7), (7, 2), (3, 5), (5, 2))
            )

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                aside = self.two(torch.tanh(self.one(x)))
            return aside + self.four(torch.tanh(self.three(x)))

    torch.manual_seed(0)
    net, data = Leaves().double(), batches((3,), 2)
    aside, read = (scores(net, data, units, "kfac_obs", F.cross_entropy) for units in (7, 5))
    assert aside.mean() == pytest.approx(read.mean())


class Silent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.enter, self.out = kind, nn.Linear(3, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.out(torch.relu(self.enter(x)))
        return y.argmax(1) if self.kind == "numbers" else y


@pytest.mark.parametrize(
    ("kind", "dtype", "loss", "message"),
    [
        ("numbers", torch.float32, None, "returns no floating-point tensor"),
        ("plain", torch.float32, lambda out, _: out.detach().sum(), "does not depend on any weight"),
        (
            "plain",
            torch.float32,
            lambda out, _: torch.ones((), requires_grad=True),
            "does not depend on any weight",
        ),
        (
            "plain",
            torch.float32,
            lambda out, _: (0 * out).sqrt().sum(),
            "NaN or infinite on the calibration data",
        ),
        (
            "plain",
            torch.float16,
            lambda out, _: 100 * (1000 * (out - out.detach())).sum(),
            "in half precision",
        ),
    ],
)
def test_what_can_not_be_differentiated_is_refused(
    kind: str, dtype: torch.dtype, loss: Any, message: str
) -> None:
    torch.manual_seed(0)
    net = Silent(kind).to(dtype)
    data = [(torch.rand(5, 3).to(dtype), torch.zeros(5).long()) for _ in range(2)]
    if loss is None:
        data = [x for x, _ in data]  # type: ignore[misc]
    before = {n: p.clone() for n, p in net.named_parameters()}
    state = torch.get_rng_state()
    with pytest.raises(InputError, match=message):
        scores(net, data, 7, "kfac_obs", loss)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in net.named_parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in net.modules())
