"""Literals in forward: what a recording must not hold for ever."""

from __future__ import annotations

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
