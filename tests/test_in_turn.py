"""Units scored in turn: what each costs once those before it are gone, by hand, and what follows for a plan."""

from __future__ import annotations

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
from oracle import assert_equal_to_masked
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
from depgraph.data.calibration import Calibration
from depgraph.importance import KfacInTurn, KfacObs


def matrices(given: Given, samples: int, trace: float = 1.0) -> tuple[Tensor, Tensor]:
    """W'GW, and the inverse of H; G is scaled by `trace`."""
    x, g, weight, _ = given
    moment = x.T @ x / len(x)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(x.shape[1]).to(x)
    return weight.T @ g.T @ g @ weight / samples * on_others(x, 0.01) * trace, torch.linalg.inv(damped)


def by_hand(every: list[Given], samples: int, trace: float = 1.0) -> list[float]:
    """The cheapest set of units is made larger by the unit that makes it least dearer; no score is below one before it."""
    known = [matrices(given, samples, trace) for given in every]

    def cost(units: list[int]) -> float:
        total = 0.0
        for (curvature, inverse), given in zip(known, every, strict=True):
            at = [c for u in units for c in given[3][u]]
            total += float(torch.trace(torch.linalg.inv(inverse[at][:, at]) @ curvature[at][:, at]))
        return total

    found, gone, last = [0.0] * len(every[0][3]), [], 0.0
    while len(gone) < len(found):
        rest = [u for u in range(len(found)) if u not in gone]
        least = min(rest, key=lambda u: cost([*gone, u]))
        last = max(last, cost([*gone, least]) - cost(gone))
        found[least] = last
        gone.append(least)
    return found


def test_linear_layers_and_several_consumers() -> None:
    net, data, every = of_two_readers()
    expected = by_hand(every, 33)
    np.testing.assert_allclose(
        scores(net, data, 7, KfacInTurn(alone=0), F.cross_entropy), expected, rtol=1e-7
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_windows_of_convolutions(groups: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.ReLU(inplace=True), nn.Conv2d(6, 4, (3, 2), padding=1, groups=groups), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).double()  # fmt: skip
    data = alike(batches((2, 4, 5), 3))
    ((x, g),) = watched(plain(net), data, F.cross_entropy, "2")
    width, rows = 6 // groups, 4 // groups  # of the first block, whose units are a group of their own
    windows = F.unfold(x, (3, 2), padding=1).transpose(1, 2).flatten(0, 1)[:, : width * 6]
    results = g.flatten(2).transpose(1, 2).flatten(0, 1)[:, :rows]
    given = (
        windows,
        results,
        net[2].weight.detach()[:rows].flatten(1),
        [[6 * u + i for i in range(6)] for u in range(width)],
    )
    if groups == 1:
        expected = by_hand([given], 33, in_common(net, data, F.cross_entropy, "2.weight", given[:3]))
        np.testing.assert_allclose(
            scores(net, data, 6, KfacInTurn(alone=0), F.cross_entropy), expected, rtol=1e-7
        )
    else:
        second = windows_of_second_block(x, g, net[2].weight.detach())
        found = scores(net, data, 3, KfacInTurn(alone=0), F.cross_entropy)
        trace = in_common(net, data, F.cross_entropy, "2.weight", given[:3], second[:3])
        expected = by_hand([given], 33, trace), by_hand([second], 33, trace)
        assert any(np.allclose(found, e, rtol=1e-7) for e in expected)


def windows_of_second_block(x: Tensor, g: Tensor, weight: Tensor) -> Given:
    windows = F.unfold(x, (3, 2), padding=1).transpose(1, 2).flatten(0, 1)[:, 18:]
    results = g.flatten(2).transpose(1, 2).flatten(0, 1)[:, 2:]
    return windows, results, weight[2:].flatten(1), [[6 * u + i for i in range(6)] for u in range(3)]


def twins() -> tuple[nn.Sequential, list[Any]]:
    """Every unit but the last two has a copy."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    with torch.no_grad():
        net[0].weight *= 5
        net[0].weight[4:8], net[0].bias[4:8] = net[0].weight[:4], net[0].bias[:4]
    return net, batches((6,), 3, 20)


def test_of_two_units_that_say_the_same_one_stays() -> None:
    net, data = twins()
    alone = scores(net, data, 10, KfacObs(1e-6), F.cross_entropy)
    found = scores(net, data, 10, KfacInTurn(1e-6), F.cross_entropy)
    assert len({u % 4 for u in np.argsort(alone)[:4]}) < 4  # alone, both of a pair could go
    first = set(np.argsort(found)[:4])
    assert first <= set(range(8))
    assert {u % 4 for u in first} == {0, 1, 2, 3}  # one of each pair is the first to go

    how: dict[str, Any] = {
        "pruning_ratio": 0.4,
        "calibration": data,
        "loss": F.cross_entropy,
        "progress": False,
    }
    with_twins, without = (
        depgraph.prune(net, data[0][0], importance=criterion(1e-6), recover="auto", **how)
        for criterion in (KfacObs, KfacInTurn)
    )
    x = torch.randn(200, 6).double()
    lost = [float((r.model(x) - net(x)).detach().square().mean()) for r in (with_twins, without)]
    assert lost[1] < 0.3 * lost[0]
    assert_equal_to_masked(
        net, depgraph.prune(net, data[0][0], importance=KfacInTurn, **how), data[0][0], 1e-9
    )


def test_rounds_of_several_units_share_what_they_cost_together() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 150), nn.ReLU(), nn.Linear(150, 4)).double()
    data = batches((3,), 4, 12)
    ((x, g),) = watched(net, data, F.cross_entropy, "2")
    curvature, inverse = matrices((x, g, net[2].weight.detach(), ones(150)), 132)
    whole = float(torch.trace(torch.linalg.inv(inverse) @ curvature))
    found = scores(net, data, 150, KfacInTurn(alone=0), F.cross_entropy)
    alone = scores(net, data, 150, KfacObs(), F.cross_entropy)
    assert (
        whole * (1 - 1e-9) <= found.sum() < 1.3 * whole
    )  # more only where a later round would have cost less
    assert alone.sum() < 0.5 * whole
    assert len(np.unique(found)) > 50


def test_what_takes_too_much_memory_is_scored_alone_and_said() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    data = batches((3,), 2)
    small = 2 * 8 * 5 * 5  # of the second group alone
    for units, same in ((7, True), (5, False)):
        found = scores(net, data, units, KfacInTurn(memory=small), F.cross_entropy)
        np.testing.assert_allclose(
            found, scores(net, data, units, KfacObs() if same else KfacInTurn(), F.cross_entropy)
        )
    result = depgraph.prune(
        net, data[0][0], pruning_ratio=0.3, importance=KfacInTurn(memory=small),
        calibration=data, loss=F.cross_entropy, progress=False,
    )  # fmt: skip
    assert any("units of 1 of 2 groups are scored each alone" in note for note in result.report.notes)


def test_a_bound_on_memory_is_kept() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    data = batches((3,), 2)
    graph = depgraph.analyze(net, data[0][0])
    found = {}
    for bound in (
        None,
        2800,
    ):  # a quarter of it has room for the second group alone: 2 * 8 * 5 * 5 bytes, not 2 * 8 * 7 * 7
        calibration = Calibration(data, data[0][0], F.cross_entropy, False)
        calibration.memory = bound
        criterion = KfacInTurn()
        criterion.prepare(graph, calibration)
        found[bound] = criterion.notes
    (without, within) = found.values()
    assert not any("scored each alone" in note for note in without)
    assert any("units of 1 of 2 groups are scored each alone" in note for note in within)


def test_groups_of_another_criterion_are_brought_to_a_unit_removed_alone() -> None:
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
    unread, read = (scores(net, data, units, KfacInTurn(alone=0), F.cross_entropy) for units in (7, 5))
    unread_alone, alone = (scores(net, data, units, KfacObs(), F.cross_entropy) for units in (7, 5))
    np.testing.assert_allclose(unread, unread_alone)
    assert read.sum() > alone.sum()


def test_without_gradients_errors_are_what_is_left() -> None:
    class Quiet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(3, 7), nn.Linear(7, 5), nn.Linear(5, 2)

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))

    torch.manual_seed(0)
    net, data = Quiet().double(), [x for x, _ in batches((3,), 2)]
    found, plain = (scores(net, data, 7, criterion, None) for criterion in (KfacInTurn(alone=0), KfacObs()))
    np.testing.assert_allclose(found, plain)


def test_inputs_that_are_all_zero() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(-1)
    found = scores(net, batches((3,), 2), 7, KfacInTurn(alone=0), F.cross_entropy)
    assert np.isfinite(found).all()


def test_the_score_is_between_in_turn_and_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)).double().eval()
    data = [(torch.randn(32, 4).double(), torch.randint(0, 3, (32,))) for _ in range(3)]
    turn, alone, found = (
        scores(net, data, 9, criterion, F.cross_entropy)
        for criterion in (KfacInTurn(alone=0), KfacInTurn(alone=1), "kfac_in_turn")
    )
    np.testing.assert_allclose(alone, scores(net, data, 9, "kfac_obs", F.cross_entropy), rtol=1e-9)
    np.testing.assert_allclose(found, np.sqrt(turn * alone), rtol=1e-9)
    assert not np.allclose(turn, alone)
    with pytest.raises(depgraph.InputError, match="alone"):
        KfacInTurn(alone=2)
