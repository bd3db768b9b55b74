"""Train mode, random draws, other inputs than the example, and what a call gives away."""

from __future__ import annotations

import copy
import functools
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import vision_ops  # noqa: F401  # declares an op without a handler
from checks import random_importance
from oracle import assert_equal_to_masked
from random_networks import random_network, random_options
from torch import Tensor, nn

import depgraph


class Two(nn.Module):
    """A stem of 16, something between, a head; beside it a pair of layers that can always shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Sequential(nn.Linear(6, 14), nn.ReLU(), nn.Linear(14, 6))
        self.a, self.b, self.width = nn.Linear(6, 16), nn.Linear(16, 5), 16

    def forward(self, x: Tensor) -> Any:
        return self.b(self.between(self.a(x + self.free(x))))

    def between(self, h: Tensor) -> Tensor:
        return h.relu()


class TrainScale(Two):
    """A number that is repaired scales in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x + self.free(x)).view(-1, self.width)
        return self.b(h * self.width if self.training else h)


class TrainMask(Two):
    """A mask of channels, made by a literal, in train mode."""

    def between(self, h: Tensor) -> Tensor:
        return h * torch.linspace(0, 1, 16) if self.training else h


class TrainFold(Two):
    """Train mode reshapes by literals."""

    def between(self, h: Tensor) -> Tensor:
        return h.view(-1, 4, 4).transpose(1, 2).reshape(-1, 16) if self.training else h


def _helper(module: nn.Module, h: Tensor) -> Tensor:
    return h * h.shape[1] if module.training else h * 16


class TrainHelper(Two):
    """A function outside of the module asks for the mode."""

    def between(self, h: Tensor) -> Tensor:
        return _helper(self, h)


class TrainOutput(Two):
    """Train mode returns the hidden state, too."""

    def forward(self, x: Tensor) -> Any:
        h = self.a(x + self.free(x))
        return (self.b(h), h) if self.training else self.b(h)


class NoiseLike(Two):
    """Noise as wide as the hidden state."""

    def between(self, h: Tensor) -> Tensor:
        return h + torch.randn_like(h)


class NoiseSized(Two):
    """Noise of the hidden state's sizes."""

    def between(self, h: Tensor) -> Tensor:
        return h * torch.rand(h.shape)


class Dropped(Two):
    """Dropout that is always on."""

    def between(self, h: Tensor) -> Tensor:
        return F.dropout(F.dropout1d(h.relu()[:, :, None], 0.2, True)[:, :, 0], 0.4, training=True)


class StochasticDepth(Two):
    """A layer that is left out at random, by Python's own dice, in train mode."""

    def between(self, h: Tensor) -> Tensor:
        return h.relu() if self.training and random.random() < 0.5 else h.tanh()


def both(model: nn.Module, result: depgraph.PruneResult, x: Any, training: bool) -> tuple[Any, Any]:
    """The outputs of the zeroed original, where only the columns of `b` and `free.2` see what goes, and of the result."""
    with torch.no_grad():
        for name in ("b.weight", "free.2.weight"):
            model.get_parameter(name).mul_(result.plan.mask(name))
        outs = []
        for m in (model, result.model):
            torch.manual_seed(5)
            random.seed(5)
            outs.append(m.train(training)(x))
    return outs[0], outs[1]


@pytest.mark.parametrize("kind", [TrainScale, TrainMask, TrainFold, TrainHelper, TrainOutput])
def test_train_mode_is_right(kind: type[Two]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(4, 6)
    result = depgraph.prune(model, x)
    assert result.report.verification.status == "equal"
    assert result.model.free[0].out_features == 7
    for training in (False, True):
        wanted, got = both(model, result, x, training)
        torch.testing.assert_close(got, wanted)


def test_the_trace_sees_what_train_mode_returns() -> None:
    """Also without the proof."""
    result = depgraph.prune(TrainOutput().eval(), torch.randn(4, 6), verify=False)
    assert result.model.a.out_features == 16


@pytest.mark.parametrize("kind", [NoiseLike, NoiseSized, Dropped, StochasticDepth])
def test_what_is_drawn_at_random_does_not_freeze(kind: type[Two]) -> None:
    torch.manual_seed(0)
    result = depgraph.prune(kind().eval(), torch.randn(4, 6))
    assert result.report.verification.status == "equal"
    assert not result.report.notes
    assert result.model.a.out_features == 8


def test_random_states_are_as_before() -> None:
    import numpy as np

    model, x = NoiseLike().eval(), torch.randn(4, 6)
    for module, seed, draw in ((torch, torch.manual_seed, lambda: float(torch.rand(()))),
                               (random, random.seed, random.random),
                               (np.random, np.random.seed, lambda: float(np.random.rand()))):  # fmt: skip
        seed(3)
        wanted = draw()
        seed(3)
        depgraph.prune(model, x)
        assert draw() == wanted, module.__name__


class BatchBranch(Two):
    """Large batches are reshaped by literals."""

    def between(self, h: Tensor) -> Tensor:
        return h.view(-1, 4, 4).transpose(1, 2).reshape(-1, 16) if h.shape[0] > 9 else h


class SmallerOf(Two):
    """A minimum of a width and a batch size."""

    def between(self, h: Tensor) -> Tensor:
        n = min(h.shape[1], h.shape[0])
        return torch.cat([h[:, :n] * 2, h[:, n:]], 1)


class SignBranch(Two):
    """A branch on the values of the input, with a width in the other side."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x + self.free(x))
        return self.b(h if x.sum() > 0 else h * h.shape[1])


@pytest.mark.parametrize("kind", [BatchBranch, SmallerOf, SignBranch])
def test_other_inputs_than_the_example(kind: type[Two]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    result = depgraph.prune(model, torch.ones(4, 6))
    assert result.model.free[0].out_features == 7
    for x in (torch.ones(4, 6), -torch.ones(4, 6), torch.randn(12, 6), torch.randn(30, 6)):
        wanted, got = both(model, result, x, False)
        torch.testing.assert_close(got, wanted)


class Tall(nn.Module):
    """Channels are compared with the height of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 14, 1), nn.Conv2d(14, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(self.b(h * 2 if h.shape[1] > h.shape[2] else h))


def test_other_image_sizes() -> None:
    torch.manual_seed(0)
    model = Tall().eval()
    result = depgraph.prune(model, torch.randn(1, 3, 4, 4))
    with torch.no_grad():
        model.c.weight.mul_(result.plan.mask("c.weight"))
        for n in (4, 12, 20):
            x = torch.randn(1, 3, n, n)
            torch.testing.assert_close(result.model(x), model(x))


class Slots:
    """A record without a dict."""

    __slots__ = ("h",)

    def __init__(self, h: Tensor) -> None:
        self.h = h


class Store:
    """A cache: what is in it is the model's own business."""

    def __init__(self, h: Tensor) -> None:
        self.h = h

    def update(self, h: Tensor) -> None:
        """Put something else in."""
        self.h = h


WAYS = {
    "namespace": lambda h: SimpleNamespace(h=h),
    "slots": Slots,
    "closure": lambda h: lambda: h,
    "partial": lambda h: functools.partial(torch.add, h),
    "nested": lambda h: [{"a": (SimpleNamespace(b=[h]),)}],
}


class Giving(Two):
    """Gives the hidden state away."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor, sink: Any = None) -> Any:
        h = self.a(x + self.free(x))
        if self.way == "attribute":
            self.seen = h
        elif self.way == "sink":
            sink["h"] = h
        elif self.way == "store":
            return self.b(h), Store(h)
        else:
            return self.b(h), WAYS[self.way](h)
        return self.b(h)


@pytest.mark.parametrize("way", [*WAYS, "attribute"])
@pytest.mark.parametrize("verify", [True, False])
def test_what_is_given_away_keeps_its_size(way: str, verify: bool) -> None:
    result = depgraph.prune(Giving(way).eval(), torch.randn(4, 6), verify=verify)
    assert result.model.a.out_features == 16
    assert result.model.free[0].out_features == 7


def test_what_is_put_into_a_dict_of_the_caller_keeps_its_size() -> None:
    result = depgraph.prune(Giving("sink").eval(), (torch.randn(4, 6), {}))
    assert result.model.a.out_features == 16


def test_a_cache_is_named() -> None:
    result = depgraph.prune(Giving("store").eval(), torch.randn(4, 6))
    assert result.model.a.out_features == 8
    assert result.report.verification.unseen == ("Store",)
    assert "Store" in str(result.report)


def test_small_damage_in_train_mode_beside_what_moves_no_output() -> None:
    """The bias of keys moves no output, so weights are drawn anew; the damage to queries shows with the model's own alone."""
    seed = 191
    model, inputs = random_network(seed)
    importance = random_importance(seed)
    result = depgraph.prune(model, inputs, importance=importance, **random_options(seed, model))
    assert_equal_to_masked(model, result, inputs)
    proof = depgraph.verify(model, result.model, result.plan, inputs)
    assert any("k.bias" in name for name in proof.unproved)
    query = next(m for n, m in result.model.named_modules() if n.startswith("tokens.") and n.endswith(".q"))
    query.register_forward_hook(lambda m, _, out: out * 1.02 if m.training else out)
    with pytest.raises(depgraph.VerificationError, match="in train mode"):
        depgraph.verify(model, result.model, result.plan, inputs)


def test_what_float32_rounds_is_computed_in_float64() -> None:
    """Damage of a few 1e-5 of the spread, in train mode alone, is above the tolerance."""
    model, x = Two().double().eval(), torch.randn(3, 6, dtype=torch.float64)
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    assert_equal_to_masked(model, result, x)
    result.model.b.register_forward_hook(lambda m, _, out: out * (1 + 2e-5) if m.training else out)
    with pytest.raises(depgraph.VerificationError, match="in train mode"):
        depgraph.verify(model, result.model, result.plan, x)


class Regions(nn.Module):
    """Features of boxes, some of which lie outside of the image, written level by level into one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        h = self.features(x)
        found = h.new_zeros(len(boxes), h.shape[1], 2, 2)
        for level, scale in ((0, 1.0), (1, 0.5)):
            rows = (torch.arange(len(boxes)) % 2 == level).nonzero()[:, 0]
            found[rows] = torch.ops.torchvision.roi_align(h, boxes[rows], scale, 2, 2, 2, False)
        return self.head(found.flatten(1))


def test_what_lies_outside_of_an_image_is_not_what_was_removed() -> None:
    """An op without a handler gives zeros there whatever goes in: no sign of a removed channel."""
    corners = torch.tensor([[0, 1, 1, 6, 6], [0, 2, 0, 9, 7], [0, 5, 5, 30, 30], [0, -9, -9, -2, 3]])
    inputs = (torch.randn(1, 3, 8, 8), corners.float())
    model = Regions().eval()
    result = depgraph.prune(model, inputs, pruning_ratio=0.5)
    assert result.plan.new_shape("features.weight") == (4, 3, 3, 3)
    assert result.report.verification.status == "equal"
    assert not any("differ" in note for note in result.report.notes)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in masked.named_parameters():
            tensor.mul_(result.plan.mask(name))
        torch.testing.assert_close(result.model(*inputs), masked(*inputs))


class Follows(Two):
    """A second pair of layers follows the first slowly: its weights are written in place, through what shares their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            for mine, theirs in ((self.c, self.a), (self.d, self.b)):
                mine.weight.data.mul_(0.9).add_(theirs.weight.data, alpha=0.1)
                mine.bias.detach().lerp_(theirs.bias, 0.1)
        return super().forward(x) - self.d(self.c(x).relu())


def test_what_is_written_through_shared_memory_is_seen() -> None:
    torch.manual_seed(0)
    model, x = Follows().eval(), torch.randn(3, 6)
    result = depgraph.prune(model, x, pruning_ratio=0.5, importance=random_importance(0))
    assert (result.report.verification.status, result.report.notes) == ("equal", [])
    assert [m.out_features for m in (result.model.a, result.model.c)] == [8, 8]
    assert_equal_to_masked(model, result, x, tol=1e-5)


class Nearest(Two):
    """Each row is replaced by the entry of a table that is nearest to it; entries of the table go, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)

    def between(self, h: Tensor) -> Tensor:
        table = self.table.weight
        far = h.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * h @ table.T
        return self.table(far.argmin(1)) + 0.1 * h


def test_the_nearest_of_the_entries_that_stay() -> None:
    torch.manual_seed(0)
    model, x = Nearest().eval(), torch.randn(7, 6)
    result = depgraph.prune(model, x, pruning_ratio=0.5, importance=random_importance(0))
    assert result.model.table.weight.shape == (10, 8)
    assert result.report.verification.status == "equal"
    assert "argmin" in result.report.verification.restricted
    assert_equal_to_masked(model, result, x, tol=1e-5)


class Bags(Two):
    """Words are looked up and joined by bags."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(20, 16, mode=mode)

    def forward(self, x: Tensor) -> Any:
        words = torch.arange(3 * len(x)).view(-1, 3) % 20
        return self.b((self.a(x + self.free(x)) * self.bags(words)).relu())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_words_are_compared(mode: str) -> None:
    torch.manual_seed(0)
    model, x = Bags(mode).eval(), torch.randn(4, 6)
    result = depgraph.prune(model, x, pruning_ratio=0.5, importance=random_importance(0))
    assert result.model.bags.embedding_dim == 8
    assert result.report.verification.status == "equal"
    assert_equal_to_masked(model, result, x, tol=1e-5)


class Sparing(nn.Module):
    """Eval mode gives one row for a batch of another size; train mode gives all, and has a gain for them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gain = nn.Linear(6, 16), nn.Linear(16, 5), 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        if self.training:
            return y + 1 if x.shape[0] == 4 else y * self.gain
        return y if x.shape[0] == 4 else y[:1]


def test_train_mode_is_asked_again_where_eval_mode_told_nothing() -> None:
    torch.manual_seed(0)
    model, x = Sparing().eval(), torch.randn(4, 6)
    result = depgraph.prune(model, x)
    result.model.gain = 2.0
    with pytest.raises(depgraph.VerificationError, match="train mode"):
        depgraph.verify(model, result.model, result.plan, x)


class Ranged(nn.Module):
    """Divides by a range over all activations, in train mode alone."""

    def __init__(self, positive: bool) -> None:
        super().__init__()
        self.a, self.b, self.positive = nn.Linear(6, 16), nn.Linear(16, 3), positive

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = h.abs() + 1 if self.positive else h
        if self.training:
            h = h / (1 + (h.min() if self.positive else h.max()))
        return self.b(h)


def test_a_range_that_removed_entries_do_not_change_is_no_reason() -> None:
    """The largest of values on both sides of zero is the same with zeros among them; the least of positive ones is not."""
    model, x = Ranged(positive=False).double(), torch.randn(9, 6).double()
    result = depgraph.prune(model, x)
    assert result.model.a.out_features == 8
    assert_equal_to_masked(model.train(), result, x)
    with pytest.raises(depgraph.NothingToPruneError, match="in train mode alone"):
        depgraph.prune(Ranged(positive=True), torch.randn(9, 6))
