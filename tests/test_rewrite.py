"""Literals in forward: what a recording must not hold for ever."""

from __future__ import annotations

import copy
import io

import torch
from torch import Tensor, nn

import depgraph


class Scaled(nn.Module):
    """A literal, and a buffer that forward computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 14, 1), nn.Linear(14 * 6, 5)
        self.register_buffer("scale", torch.linspace(1, 2, 14))

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) * self.scale[:, None, None]).view(-1, 84))


class Constant(Scaled):
    """A tensor that forward makes of nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) * torch.full((1,), 2.0)).view(-1, 84))


def test_buffers_are_read_when_the_rewritten_forward_runs() -> None:
    model, x = Scaled(), torch.randn(2, 3, 2, 3)
    small = depgraph.prune(model, x).model
    assert isinstance(small, torch.fx.GraphModule)
    assert small.first.out_channels == 7
    before = small(x)
    with torch.no_grad():
        small.scale.mul_(3)
        small.last.bias.mul_(3)
    torch.testing.assert_close(small(x), 3 * before)


def test_a_forward_that_makes_a_tensor_of_nothing_is_not_recorded() -> None:
    graph = depgraph.analyze(Constant(), torch.randn(2, 3, 2, 3))
    assert not graph.groups
    assert any("torch.fx can't record" in str(frozen) for frozen in graph.frozen)


def test_a_copy_of_a_rewritten_module_has_all_that_it_had() -> None:
    """Attributes that forward does not read, and children that it does not call, in their order."""

    class Unused(Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.note = nn.Linear(2, 3), "kept"
            self.last = self._modules.pop("last")  # after the unused one

    x = torch.randn(2, 3, 2, 3)
    once = depgraph.prune(Unused(), x, pruning_ratio=0.3).model
    twice = depgraph.prune(once, x, pruning_ratio=0.3).model
    assert isinstance(twice, torch.fx.GraphModule)
    assert twice.note == "kept"
    assert list(twice.state_dict()) == list(once.state_dict()) == list(Unused().state_dict())
    assert twice.first.out_channels < once.first.out_channels < 14


class Counting(Scaled):
    """Methods, a property and modes of its own, and a constructor that takes what nobody keeps."""

    kind = "counting"

    def __init__(self, secret: object) -> None:
        super().__init__()
        self.calls = 0

    @property
    def width(self) -> int:
        return self.first.out_channels

    def train(self, mode: bool = True) -> Counting:
        super().train(mode)
        self.scale.requires_grad_(False)
        self.calls += 1
        return self

    def twice(self, x: Tensor) -> Tensor:
        return 2 * self(x)


def test_a_rewritten_module_is_still_of_its_class() -> None:
    """Methods other than forward, after copies and pickles, and after being rewritten again."""
    x = torch.randn(2, 3, 2, 3)
    once = depgraph.prune(Counting(object()), x, pruning_ratio=0.3).model
    again = depgraph.prune(once, x, pruning_ratio=0.3).model
    for small in (once, again):
        buffer = io.BytesIO()
        torch.save(small, buffer)
        buffer.seek(0)
        copies = (small, copy.copy(small), copy.deepcopy(small), torch.load(buffer, weights_only=False))
        for one in copies:
            assert isinstance(one, Counting)
            assert isinstance(one, torch.fx.GraphModule)
            assert type(one).__mro__.count(Counting) == 1
            assert (type(one).__name__, type(one).__module__) == ("Counting", Counting.__module__)
            assert (one.width, one.kind) == (small.first.out_channels, "counting")
            assert torch.equal(one.twice(x), 2 * small(x))
            calls = one.calls
            assert one.eval() is one
            assert one.calls == calls + 1
    assert again.width < once.width < 14
    assert Counting.forward is Scaled.forward, "the class itself is not touched"
    with torch.no_grad():
        copies[2].first.weight.zero_()
    assert again.first.weight.abs().min() > 0
