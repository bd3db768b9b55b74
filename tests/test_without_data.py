"""Recovery without data: `recover="synthetic"`, on the example inputs with noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_equal_to_masked
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
from depgraph import InputError
from depgraph.data.synthetic import synthetic


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 5)).eval()


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.rise, self.fall = nn.Embedding(50, 16), nn.Linear(16, 64), nn.Linear(64, 7)

    def forward(self, words: Tensor) -> Tensor:
        return self.fall(F.gelu(self.rise(self.table(words))))


def off(small: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((small(x) - model(x)).square().mean() / model(x).square().mean())


def test_layers_are_fitted_without_data() -> None:
    model, x = perceptron(), torch.randn(2, 12)
    fresh = torch.randn(500, 12)
    plain = depgraph.prune(model, x, max_params=0.5)
    found = depgraph.prune(model, x, max_params=0.5, recover="synthetic")
    assert all(torch.equal(plain.plan.mask(n), found.plan.mask(n)) for n in plain.plan.shapes)
    assert_equal_to_masked(model, plain, x, 1e-5)
    assert found.report.verification.status == "equal"
    assert off(found.model, model, fresh) < 0.5 * off(plain.model, model, fresh)
    recovery = found.report.recovery
    assert recovery is not None
    assert recovery.layers
    assert "without data" in str(found.report)


def test_batch_norms_are_fitted_without_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).train()  # fmt: skip
    for _ in range(20):
        model(torch.randn(32, 1, 8, 8))
    model.eval()
    x, fresh = torch.zeros(1, 1, 8, 8), torch.randn(200, 1, 8, 8)
    plain = depgraph.prune(model, x, pruning_ratio=0.5)
    found = depgraph.prune(model, x, pruning_ratio=0.5, recover="synthetic")
    assert_equal_to_masked(model, plain, fresh, 1e-5)
    assert off(found.model, model, fresh) < 0.5 * off(plain.model, model, fresh)


@pytest.mark.parametrize("inference", [False, True])
def test_inputs_are_fitted_to_what_batch_norms_remember(inference: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)
    )
    mean, variance = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0.3, 2.0, 1.0])
    for _ in range(200):
        model(mean[:, None, None] + variance.sqrt()[:, None, None] * torch.randn(16, 3, 8, 8))
    with torch.inference_mode(inference):
        x = torch.cat([b.args[0] for b in synthetic(model, torch.zeros(1, 3, 8, 8))])
    assert torch.allclose(x.mean((0, 2, 3)), mean, atol=0.3)
    assert torch.allclose(x.var((0, 2, 3)), variance, atol=0.4)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_words_stay_what_they_are() -> None:
    model, words = Words().eval(), torch.randint(0, 50, (8, 40))
    (batch,) = synthetic(model, words)
    assert torch.equal(batch.args[0], words)
    plain = depgraph.prune(model, words, max_params=0.5)
    found = depgraph.prune(model, words, max_params=0.5, recover="synthetic")
    assert_equal_to_masked(model, plain, words, 1e-5)
    assert off(found.model, model, words) < 0.4 * off(plain.model, model, words)


def test_a_new_bias_without_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 5, bias=False)).eval()
    x = torch.randn(2, 12)
    found = depgraph.prune(model, x, pruning_ratio=0.5, recover=["new_bias", "synthetic"])
    assert found.report.recovery is not None
    assert found.report.recovery.biases == ["2.bias"]


def test_batches_have_rows_and_what_is_no_number_stays() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fall = nn.Linear(6, 3)

        def forward(self, x: Tensor, mask: Tensor, count: int, shown: Tensor) -> Tensor:
            return self.fall(x + mask).masked_fill(~shown, 0) * count

    x, mask = torch.randn(3, 6), torch.tensor([[0.0] * 6, [float("-inf")] + [0.0] * 5, [0.0] * 6])
    shown = torch.tensor([[True], [False], [True]])
    batches = synthetic(Masked(), (x, mask, 2, shown))
    assert len(batches) == 4
    rows = batches[0].args[0].shape[0]
    assert rows > 200
    assert rows % 3 == 0
    for batch in batches:
        found, fillers, count, told = batch.args
        assert torch.equal(fillers, mask.repeat(rows // 3, 1))
        assert count == 2
        assert torch.equal(told, shown.repeat(rows // 3, 1))
        assert 0.8 < float(found.std() / x.std()) < 1.2
        assert (
            0.3
            < float(torch.corrcoef(torch.stack([found.flatten(), x.repeat(rows // 3, 1).flatten()]))[0, 1])
            < 0.7
        )
    assert not torch.equal(batches[0].args[0], batches[1].args[0])
    assert torch.equal(batches[1].args[0], synthetic(Masked(), (x, mask, 2, shown))[1].args[0])


def test_a_mask_of_zeros_and_ones_stays_and_an_image_of_ones_does_not() -> None:
    class Shown(nn.Module):
        def forward(self, words: Tensor, mask: Tensor) -> Tensor:
            return words * mask

    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    (batch,) = synthetic(Shown(), (torch.tensor([[1, 2], [3, 4]]), mask))
    assert torch.equal(batch.args[1], mask)
    batches = synthetic(nn.Conv2d(1, 2, 3), torch.ones(1, 1, 5, 5))
    assert float(batches[0].args[0].std()) > 0.5


def test_a_model_of_one_batch_size_is_given_that() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rise, self.fall = nn.Linear(6, 32), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] != 2:
                raise ValueError("two rows")
            return self.fall(self.rise(x).relu())

    model, x = Two().eval(), torch.randn(2, 6)
    assert {b.args[0].shape for b in synthetic(model, x)} == {(2, 6)}
    assert depgraph.prune(model, x, pruning_ratio=0.5, recover="synthetic").report.recovery is not None


def test_the_model_is_not_touched() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rise, self.fall = nn.Linear(6, 32), nn.Linear(32, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            with torch.no_grad():
                self.fall.bias.add_(1)
            return self.fall(self.rise(x).relu())

    model = Counts().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    synthetic(model, torch.randn(2, 6))
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"recover": "synthetic", "calibration": [torch.randn(4, 12)]}, "where there is no calibration data"),
        ({"recover": "auto"}, "or where there are none 'synthetic'"),
        ({"recover": "nose"}, "'synthetic'"),
    ],
)
def test_what_does_not_fit_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        depgraph.prune(perceptron(), torch.randn(2, 12), max_params=0.5, **how)


def test_recover_by_itself_needs_the_example_inputs() -> None:
    model, x = perceptron(), torch.randn(2, 12)
    graph = depgraph.analyze(model, x)
    plan = depgraph.build_plan(graph, depgraph.choose(graph, depgraph.scores_of(graph), pruning_ratio=0.5))
    small = depgraph.apply(model, plan)
    with pytest.raises(InputError, match="give example_inputs"):
        depgraph.recover(model, small, plan, graph, None, "synthetic")
    fresh = torch.randn(300, 12)
    before = off(small, model, fresh)
    with torch.inference_mode():
        depgraph.recover(model, small, plan, graph, None, "synthetic", example_inputs=x)
    assert off(small, model, fresh) < 0.5 * before
