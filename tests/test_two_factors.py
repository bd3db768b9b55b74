"""A layer as two: its factors worked out by hand, and what of the layer they take over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from depgraph.plan.plan import Factor
from depgraph.surgery.factors import Factors, best, can_be_two, full_rank, misfit, replace


def linear(rows: list[list[float]], **options: Any) -> nn.Linear:
    """A layer without bias whose weight is `rows`."""
    layer = nn.Linear(len(rows[0]), len(rows), bias=False, **options)
    layer.weight.data = torch.tensor(rows, dtype=layer.weight.dtype)
    return layer


def test_the_closest_factors_keep_the_largest_singular_values() -> None:
    layer = linear([[0, 0, 2], [-3, 0, 0]])  # of singular values 3 and 2
    down, up = best(layer, 1)
    assert down.shape == (1, 3)
    assert up.shape == (2, 1)
    close = {"rtol": 0, "atol": 1e-12, "check_dtype": False}
    torch.testing.assert_close(up @ down, torch.tensor([[0.0, 0, 0], [-3, 0, 0]]), **close)
    torch.testing.assert_close(down.norm(), torch.tensor(1.0), **close)  # the scale is in the second
    down, up = best(layer, 2)
    torch.testing.assert_close(up @ down, layer.weight.detach(), **close)


@pytest.mark.parametrize("layer", [nn.Linear(12, 7), nn.Conv2d(3, 7, (2, 2))], ids=["linear", "convolution"])
def test_factors_on_the_meta_device_have_the_shapes_of_the_others(layer: nn.Module) -> None:
    for kind in ("cpu", "meta"):
        down, up = best(layer.to(kind), 4)
        assert (down.shape, up.shape) == ((4, 12), (7, 4))
        assert {down.device.type, up.device.type} == {kind}


@pytest.mark.parametrize("shape", [(3, 50), (50, 3)])
def test_factors_are_found_without_a_square_of_the_longer_side(shape: tuple[int, int]) -> None:
    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made = [t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
            self.found = max(self.found, *made)
            return out

    layer = nn.Linear(shape[1], shape[0])
    with Largest() as largest:
        best(layer, 2)
    assert largest.found == 150


def test_what_can_become_two_and_of_which_rank() -> None:
    ranks = [
        (nn.Linear(5, 3), 3), (nn.Linear(2, 9), 2), (nn.Conv1d(2, 9, 3), 6), (nn.Conv2d(4, 5, 2), 5), (nn.Conv3d(1, 99, 2), 8),
    ]  # fmt: skip
    for layer, rank in ranks:
        assert can_be_two(layer)
        assert full_rank(layer) == rank
    for layer in (nn.Conv2d(4, 4, 1, groups=2), nn.ConvTranspose2d(4, 4, 1), nn.Bilinear(2, 2, 2), nn.ReLU()):
        assert not can_be_two(layer)


def test_what_does_not_fit_is_said() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU())
    assert [misfit(model, Factor("0", rank)) for rank in (1, 3)] == ["", ""]
    for rank in (0, 4):
        assert misfit(model, Factor("0", rank)) == f"'0' has a rank of at most 3, the plan wants {rank}"
    assert misfit(model, Factor("1", 1)) == "'1' can't become two factors: it is a ReLU"
    assert misfit(model, Factor("2", 1)).startswith("'2' can't become two factors: ")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(
    "layer",
    [nn.Linear(4, 3), nn.Linear(4, 3, bias=False), nn.Conv2d(2, 3, (1, 2), stride=2, padding=(0, 1), padding_mode="circular")],
    ids=["linear", "no bias", "convolution"],
)  # fmt: skip
def test_two_layers_take_over_what_the_one_was(layer: Any, trains: bool, training: bool) -> None:
    layer = layer.half().train(training)
    layer.weight.requires_grad_(trains)
    model = nn.ModuleDict({"a": layer, "b": nn.ModuleList([nn.ReLU(), layer])})
    down, up = torch.arange(8.0).view(2, 4), torch.arange(6.0).view(3, 2)
    before = torch.get_rng_state()
    replace(model, Factor("a", 2), (down, up))
    assert torch.equal(torch.get_rng_state(), before), "something was drawn"
    made: Any = model["a"]
    assert type(made) is Factors
    assert model["b"][1] is made  # type: ignore[index]
    assert made.bias is layer.bias
    assert made[0].bias is None
    assert [m.training for m in made.modules()] == [training] * 3
    for part, value in zip(made, (down, up), strict=True):
        assert isinstance(part, type(layer))
        assert part.weight.dtype == torch.float16
        assert part.weight.requires_grad is trains
        assert torch.equal(part.weight.flatten(1).float(), value)
    assert made.weight.shape == layer.weight.shape
    assert torch.equal(made.weight.flatten(1).float(), up @ down)
    if isinstance(layer, nn.Conv2d):
        first, second = made
        assert (first.in_channels, first.out_channels, second.in_channels, second.out_channels) == (
            2,
            2,
            2,
            3,
        )
        assert (first.kernel_size, first.stride, first.padding) == ((1, 2), (2, 2), (0, 1))
        assert (second.kernel_size, second.stride, second.padding) == ((1, 1), (1, 1), (0, 0))
        assert (first.padding_mode, second.padding_mode) == ("circular", "zeros")
