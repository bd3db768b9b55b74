"""Recovery without training: against closed forms, and where the removed inputs are exactly what the kept ones say."""

from __future__ import annotations

import copy
import gc
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO

import depgraph
from depgraph.base.errors import DepgraphError, InputError, StoreError
from depgraph.base.shelf import Shelf
from depgraph.recover import Reconstruction, recover
from depgraph.recover import _error as output_error
from depgraph.recover import reconstruction as module_of_reconstruction
from depgraph.recover.solve import RUN, Sums

EXACT = 1e-6


def normal(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and eval mode with random parameters, biases and statistics."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data.copy_(values.abs() + 0.5 if name.endswith("running_var") else 0.5 * values)
    return model


def cut(model: nn.Module, example: Any, kept: dict[str, list[int]]) -> tuple[Any, depgraph.Plan]:
    """The graph, and a plan that keeps the units `kept` of the groups of these tensors' dim 0 (``name:dim:units``)."""
    graph = depgraph.analyze(model, example)
    masks = {}
    for place, units in kept.items():
        name, dim, count = (*place.split(":"), "0", "0")[:3]
        (group,) = (
            g
            for g in graph.groups
            if any(m.name == name and m.dim == int(dim) for m in g.members)
            if g.units == int(count) or (count == "0" and g.units > len(units))
        )
        mask = torch.zeros(group.units, dtype=torch.bool)
        mask[units] = True
        masks[group.name] = mask.numpy()
    return graph, depgraph.build_plan(graph, masks)


def recovered(
    model: nn.Module, example: Any, kept: dict[str, list[int]], batches: list[Any], how: Any
) -> tuple[nn.Module, Any]:
    graph, plan = cut(model, example, kept)
    small = depgraph.apply(model, plan)
    told = recover(model, small, plan, graph, batches, how, example_inputs=example)
    return small, told


def error(small: nn.Module, model: nn.Module, batch: Any) -> float:
    args = batch if isinstance(batch, tuple) else (batch,)
    with torch.no_grad():
        a, b = small(*args), model(*args)
    return float((a - b).abs().max() / b.abs().max())


class Mlp(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 11), nn.Linear(11, 7, bias=bias), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).tanh())


# ------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("bias", [True, False])
def test_reconstruction_is_least_squares(bias: bool):
    model = randomised(Mlp(bias))
    batches = [normal(40, 5, seed=s) for s in range(5)]
    keep, rows = [0, 2, 3, 6, 8, 9], [0, 1, 3, 4, 6]
    small, told = recovered(
        model, batches[0], {"a.weight": keep, "b.weight": rows}, batches, Reconstruction(damping=1e-12)
    )
    x = torch.cat(batches)
    with torch.no_grad():
        whole = model.a(x).relu()
        inputs, target = whole[:, keep], model.b(whole)[:, rows]
        if bias:
            inputs = torch.cat([inputs, torch.ones(len(x), 1).double()], 1)
        solution = torch.linalg.lstsq(inputs, target).solution.T
    torch.testing.assert_close(small.b.weight.data, solution[:, : len(keep)], rtol=1e-6, atol=1e-8)
    if bias:
        torch.testing.assert_close(small.b.bias.data, solution[:, -1], rtol=1e-6, atol=1e-8)
    assert [r.name for r in told.layers if r.kept] == ["b.weight", "c.weight"]


def test_free_memory_is_given_back_whenever_the_process_has_grown(monkeypatch: pytest.MonkeyPatch):
    module: Any = sys.modules["depgraph.recover.sequence"]
    now, given_back = [0], []
    monkeypatch.setattr(module, "held", lambda: now[0])
    monkeypatch.setattr(module, "trim", lambda: given_back.append(now[0]))
    model, batches = randomised(Mlp()), [normal(40, 5, seed=s) for s in range(5)]
    solve = module._Lockstep._solve

    def grows(self: Any, *args: Any) -> None:
        now[0] += module.UNUSED * 2 // 3
        solve(self, *args)

    monkeypatch.setattr(module._Lockstep, "_solve", grows)
    recovered(model, batches[0], {"a.weight": [0, 2, 3], "b.weight": [0, 1, 3]}, batches, Reconstruction())
    assert given_back == [
        2 * (module.UNUSED * 2 // 3)
    ]  # once it has grown by more than that, at the second of two layers


def test_errors_are_those_of_the_batches_that_are_held_out():
    """Before; and after, of what was fitted on the others, though the weight is then solved with all."""
    model = randomised(Mlp())
    batches = [normal(40, 5, seed=s) * (1 + s) for s in range(5)]
    keep = [0, 2, 3, 6, 8, 9]
    _, told = recovered(model, batches[0], {"a.weight": keep}, batches, Reconstruction(damping=1e-12))
    with torch.no_grad():
        whole = model.a(torch.cat(batches)).relu()
        ones = torch.ones(200, 1).double()
        x, y = torch.cat([whole[:, keep], ones], 1), model.b(whole)
        fitted = x[160:] @ torch.linalg.lstsq(x[:160], y[:160]).solution
        plain = F.linear(whole[160:, keep], model.b.weight[:, keep], model.b.bias)
        size = y[160:].square().sum()
    assert told.layers[0].name == "b.weight"
    assert told.layers[0].before == pytest.approx(float((y[160:] - plain).square().sum() / size))
    assert told.layers[0].after == pytest.approx(float((y[160:] - fitted).square().sum() / size), rel=1e-5)


def test_of_many_samples_some_are_taken(monkeypatch: pytest.MonkeyPatch):
    """As many as were asked for, or four for each column; of every batch, and the same of inputs and results."""
    taken: list[int] = []
    add = module_of_reconstruction.Sums.add

    def noted(self: Any, where: slice, x: Tensor, *rest: Any, **options: Any) -> None:
        taken.append(x.shape[1])
        add(self, where, x, *rest, **options)

    monkeypatch.setattr(module_of_reconstruction.Sums, "add", noted)
    model = randomised(Mlp())
    keep = [0, 2, 3, 6, 8, 9]
    repeat(model.a.weight, keep)
    repeat(model.a.bias, keep)
    batches = [normal(400, 5, seed=s) for s in range(5)]
    for samples, each in ((55, 11), (3, 5)):  # 4 * 6 columns are 24 of 2000, 5 of each 400
        taken.clear()
        how = Reconstruction(samples=samples)
        small, told = recovered(model, batches[0], {"a.weight": keep}, batches, how)
        assert taken == [each] * 5
        assert [r.name for r in told.layers if r.kept] == ["b.weight"]
        assert error(small, model, normal(30, 5, seed=9)) < EXACT


def test_each_row_takes_the_damping_that_is_best_on_what_is_held_out():
    """Few noisy samples: some rows ask for none to speak of, others for more than the inputs weigh, one for no change."""
    n, c = 17, 11
    x, held = normal(n, c), normal(300, c, seed=1)
    slopes = torch.cat([normal(2, c, seed=2), 0.3 * normal(3, c, seed=3), torch.zeros(1, c)])
    noise = torch.tensor([0, 0.01, 1, 2, 3, 5])
    r = x @ slopes.T + noise * normal(n, 6, seed=4)
    wanted = held @ slopes.T
    sums = []
    for given, target in ((x, r), (held, wanted)):
        one = module_of_reconstruction.Sums.zero(1, c, 6, torch.device("cpu"))
        one.add(slice(0, 1), given[None], target[None])
        sums.append(one)
    step = module_of_reconstruction.choose(*sums, False, None)
    tried = {}
    for damping in (1e-1, 1e-2, 1e-3, 1e-5, 1e-10, 1, 10, 100):
        load = damping * (x.T @ x).diagonal().mean() * torch.eye(c).double()
        tried[damping] = (wanted - held @ torch.linalg.solve(x.T @ x + load, x.T @ r)).square().sum(0)
    errors = torch.stack([wanted.square().sum(0), *tried.values()])
    best = errors.argmin(0)
    assert len(set(best.tolist())) >= 3
    assert max(best.tolist()) >= 6  # of the stronger ones
    assert step.after == pytest.approx(float(errors.min(0).values.sum()))
    x, r = torch.cat([x, held]), torch.cat([r, wanted])
    for row, which in enumerate(best.tolist()):
        load = [0, *tried][which] * (x.T @ x).diagonal().mean() * torch.eye(c).double()
        weight = torch.linalg.solve(x.T @ x + load, x.T @ r[:, row]) if which else torch.zeros(c).double()
        torch.testing.assert_close(step.change.weight[0, row], weight)


def test_damping_shrinks_towards_the_weights_as_they_were_cut():
    model = randomised(Mlp())
    batches = [normal(40, 5, seed=s) for s in range(5)]
    keep = [0, 2, 3, 6, 8, 9]
    small, _ = recovered(model, batches[0], {"a.weight": keep}, batches, Reconstruction(damping=0.3))
    with torch.no_grad():
        whole = model.a(torch.cat(batches)).relu()
        missing = whole @ model.b.weight.T - whole[:, keep] @ model.b.weight[:, keep].T
        x = whole[:, keep] - whole[:, keep].mean(0)
        gram = x.T @ x
        load = 0.3 * gram.diagonal().mean() * torch.eye(len(keep))
        change = torch.linalg.solve(gram + load, x.T @ (missing - missing.mean(0))).T
    torch.testing.assert_close(small.b.weight.data, model.b.weight[:, keep] + change)
    constant = model.b.bias + missing.mean(0) - change @ whole[:, keep].mean(0)
    torch.testing.assert_close(small.b.bias.data, constant)


def test_later_layers_are_fitted_to_what_earlier_ones_give():
    """The last layer's inputs are those of the smaller model, recovered so far; its target is the original's result."""
    model = randomised(Mlp())
    batches = [normal(400, 5, seed=s) for s in range(5)]
    small, _ = recovered(
        model,
        batches[0],
        {"a.weight": [0, 2, 3, 6], "b.weight": [0, 1, 3, 4, 6]},
        batches,
        Reconstruction(damping=1e-12),
    )
    x = torch.cat(batches)
    with torch.no_grad():
        inputs = small.b(small.a(x).relu()).tanh()
        target = model(x)
        apart = model.b(model.a(x).relu()).tanh()[:, [0, 1, 3, 4, 6]]
        ones = torch.ones(len(x), 1).double()
        right = torch.linalg.lstsq(torch.cat([inputs, ones], 1), target).solution.T
        wrong = torch.linalg.lstsq(torch.cat([apart, ones], 1), target).solution.T
    torch.testing.assert_close(small.c.weight.data, right[:, :5], rtol=1e-6, atol=1e-8)
    assert not torch.allclose(wrong[:, :5], right[:, :5], atol=1e-3)


def test_what_a_stream_has_lost_is_made_up_for_where_it_is_next_written():
    """The layer that writes the stream is fitted to the stream behind the sum, not to its own result."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (
                nn.Linear(5, 11),
                nn.Linear(11, 5),
                nn.Linear(5, 13),
                nn.Linear(13, 5),
            )

        def first(self, x: Tensor) -> Tensor:
            return x + self.b(self.a(x).relu())

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return x + self.d(self.c(x).tanh())

    model = randomised(Blocks())
    batches = [normal(400, 5, seed=s) for s in range(5)]
    kept = {"a.weight": [0, 2, 3], "c.weight": [0, 1, 3, 5, 6, 8]}
    x, lost = torch.cat(batches), []
    for streams in (True, False):
        how = Reconstruction(damping=1e-12, streams=streams)
        small, _ = recovered(model, batches[0], kept, batches, how)
        with torch.no_grad():
            stream, whole = small.first(x), model.first(x)
            wanted = model.d(model.c(whole).tanh()) + (whole - stream if streams else 0)
            inputs = torch.cat([small.c(stream).tanh(), torch.ones(len(x), 1).double()], 1)
            solution = torch.linalg.lstsq(inputs, wanted).solution.T
        torch.testing.assert_close(small.d.weight.data, solution[:, :6], rtol=1e-5, atol=1e-7)
        lost.append(error(small, model, normal(500, 5, seed=9)))
    assert lost[0] < 0.9 * lost[1]


def test_columns_are_solved_in_blocks_where_there_are_many(monkeypatch: pytest.MonkeyPatch):
    model = randomised(nn.Sequential(nn.Linear(13, 40), nn.ReLU(), nn.Linear(40, 3)))
    batches = [normal(60, 13, seed=s) for s in range(5)]
    kept = {"0.weight": list(range(0, 40, 2))}
    _, one = recovered(model, batches[0], kept, batches, "reconstruction")
    monkeypatch.setattr(module_of_reconstruction, "COLUMNS", 7)
    blocks, several = recovered(model, batches[0], kept, batches, "reconstruction")
    ends = [t.layers[0] for t in (one, several)]
    assert ends[0].before == pytest.approx(ends[1].before)
    assert ends[1].after < 0.5 * ends[1].before
    assert ends[0].after <= ends[1].after
    x = normal(500, 13, seed=9)
    assert error(blocks, model, x) < error(depgraph.apply(model, cut(model, x, kept)[1]), model, x)


def test_compensation_is_the_mean_of_what_was_removed():
    model = randomised(Mlp())
    batches = [normal(40, 5, seed=s) for s in range(5)]
    keep, gone = [0, 2, 3, 6, 8, 9], [1, 4, 5, 7, 10]
    small, told = recovered(model, batches[0], {"a.weight": keep}, batches, "compensation")
    mean = model.a(torch.cat(batches)).relu().mean(0)
    torch.testing.assert_close(small.b.bias.data, (model.b.bias + model.b.weight[:, gone] @ mean[gone]).data)
    assert torch.equal(small.b.weight, model.b.weight[:, keep])
    assert [r.name for r in told.layers if r.kept] == ["b.weight"]


def test_statistics_are_the_average_over_batches():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.b = nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.Conv2d(7, 5, 3)
            self.m, self.drop, self.c = nn.BatchNorm2d(5, momentum=0.3), nn.Dropout(0.9), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.n(self.a(x)).relu()
            return self.c(self.drop(self.m(self.b(x))).relu().mean((2, 3)))

    model = randomised(Net())
    batches = [normal(6, 3, 9, 7, seed=s) for s in range(3)]
    with torch.no_grad():
        for i, norm in ((0, model.n), (1, model.m)):  # right for the original: the outputs can be judged
            x = torch.cat(batches)
            y = model.a(x) if i == 0 else model.b(model.n(model.a(x)).relu())
            norm.running_mean.copy_(y.mean((0, 2, 3)))
            norm.running_var.copy_(y.var((0, 2, 3)))
    small, told = recovered(model, batches[0], {"a.weight": [0, 2, 5]}, batches, "statistics")
    assert told.layers, told.notes
    assert all(r.kept for r in told.layers), told.notes
    first, second = [], []
    with torch.no_grad():
        for x in batches:
            y = small.a(x)
            first.append((y.mean((0, 2, 3)), y.var((0, 2, 3))))
            z = F.batch_norm(y, None, None, small.n.weight, small.n.bias, True).relu()
            z = small.b(z)
            second.append((z.mean((0, 2, 3)), z.var((0, 2, 3))))
    for norm, found in ((small.n, first), (small.m, second)):
        mean, variance = (torch.stack(parts).mean(0) for parts in zip(*found, strict=True))
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, variance)
    assert int(small.n.num_batches_tracked) == int(model.n.num_batches_tracked)
    assert small.m.momentum == 0.3


# ------------------------------------------------------------------- exact where kept inputs say all of the removed ones


def repeat(weight: Tensor, kept: list[int], dim: int = 0, block: int = 1) -> None:
    """Make the entries of `dim` that are not kept copies of kept ones (in blocks), times 2."""
    count = weight.shape[dim] // block
    with torch.no_grad():
        blocks = weight.unflatten(dim, (count, block))
        source = [kept[u % len(kept)] for u in range(count) if u not in kept]
        gone = [u for u in range(count) if u not in kept]
        index = [slice(None)] * dim
        blocks[(*index, gone)] = 2 * blocks[(*index, source)]


CASES: dict[str, Callable[[], tuple[nn.Module, Any, dict[str, list[int]], list[Any]]]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__] = function
    return function


def first_layer_copied(model: nn.Module) -> Any:
    """The units of layer `a` that are removed are copies of those that stay."""
    model = randomised(model)
    keep = [0, 2, 3, 6, 8, 9]
    repeat(model.a.weight, keep)
    repeat(model.a.bias, keep)
    return model, normal(9, 5), {"a.weight": keep}, [normal(30, 5, seed=s) for s in (1, 2, 3)]


@case
def linear() -> Any:
    return first_layer_copied(Mlp())


def convolutional(between: nn.Module, head: nn.Module, spatial: int = 2) -> Any:
    first = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1](3, 8, 3, padding=1)
    model = randomised(nn.Sequential(first, nn.ReLU(), between, nn.Flatten(), head))
    keep = [0, 1, 2, 5]
    for tensor in (first.weight, first.bias):
        with torch.no_grad():
            tensor[3], tensor[4], tensor[6], tensor[7] = (
                2 * tensor[0],
                0.5 * tensor[5],
                3 * tensor[5],
                tensor[1],
            )
    shape = (5, 7, 4)[:spatial]
    return model, normal(2, 3, *shape), {"0.weight": keep}, [normal(5, 3, *shape, seed=s) for s in (1, 2, 3)]


@case
def convolution() -> Any:
    return convolutional(nn.Conv2d(8, 5, (3, 2), (2, 1), (1, 0), (1, 2)), nn.Linear(75, 2))


@case
def convolution_1d() -> Any:
    return convolutional(nn.Conv1d(8, 5, 3, padding=2), nn.Linear(35, 2), 1)


@case
def convolution_3d() -> Any:
    return convolutional(nn.Conv3d(8, 3, 3, padding=1), nn.Linear(420, 2), 3)


@case
def transposed_convolution() -> Any:
    return convolutional(
        nn.ConvTranspose2d(8, 5, (3, 2), (2, 1), (1, 0), (1, 0), 1, True, 1), nn.Linear(400, 2)
    )


def in_two_groups(between: nn.Module, head: nn.Module) -> Any:
    """Each group keeps two of its four inputs: 0, 1 and 5, 6, of which the others are multiples."""
    model, example, _, batches = convolutional(between, head)
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[2], tensor[3], tensor[4], tensor[7] = (
                2 * tensor[0],
                3 * tensor[1],
                0.5 * tensor[5],
                tensor[6],
            )
    return model, example, {"first": [0, 1], "second": [1, 2]}, batches


@case
def grouped_convolution() -> Any:
    return in_two_groups(nn.Conv2d(8, 6, 3, groups=2), nn.Linear(90, 2))


@case
def grouped_transposed_convolution() -> Any:
    return in_two_groups(nn.ConvTranspose2d(8, 6, 3, 2, groups=2), nn.Linear(990, 2))


class Attention(nn.Module):
    """Grouped-query attention: three key heads, each for two query heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(5, 6 * 4), nn.Linear(5, 3 * 4), nn.Linear(5, 3 * 7)
        self.o = nn.Linear(6 * 7, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, n)).transpose(1, 2) for p, n in ((self.q, 4), (self.k, 4), (self.v, 7))
        )
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v
        return x + self.o(y.transpose(1, 2).flatten(2))


@case
def attention_heads() -> Any:
    """The last key head and its queries are copies of the first ones."""
    model = randomised(Attention())
    with torch.no_grad():
        for layer, width in ((model.q, 8), (model.k, 4), (model.v, 7)):
            for tensor in (layer.weight, layer.bias):
                tensor[2 * width :] = tensor[:width] * (2 if layer is model.v else 1)
    return model, normal(2, 6, 5), {"k.weight:0:3": [0, 1]}, [normal(3, 6, 5, seed=s) for s in (1, 2, 3)]


@case
def value_width() -> Any:
    model = randomised(Attention())
    keep = [0, 1, 3, 6]
    for head in range(3):
        for tensor in (model.v.weight, model.v.bias):
            repeat(tensor[7 * head : 7 * head + 7], keep)
    return model, normal(2, 6, 5), {"v.weight": keep}, [normal(3, 6, 5, seed=s) for s in (1, 2, 3)]


class Experts(nn.Module):
    """All experts of each token, in stacked tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(5, 3)
        self.up, self.down = nn.Parameter(torch.zeros(3, 11, 5)), nn.Parameter(torch.zeros(3, 5, 11))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("ni,eki->enk", x, self.up).relu()
        return torch.einsum("ne,eni->ni", self.router(x).softmax(-1), torch.bmm(hidden, self.down.mT))


@case
def stacked_experts() -> Any:
    model = randomised(Experts())
    keep = [0, 2, 3, 6, 8, 9]
    repeat(model.up, keep, dim=1)
    return model, normal(9, 5), {"up:1": keep}, [normal(30, 5, seed=s) for s in (1, 2, 3)]


class Chosen(nn.Module):
    """Experts in one tensor, called one by one on the tokens that chose them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(5, 3)
        self.up, self.down = nn.Parameter(torch.zeros(3, 11, 5)), nn.Parameter(torch.zeros(3, 5, 11))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for e in range(3):
            out[chosen == e] = F.linear(F.linear(x[chosen == e], self.up[e]).relu(), self.down[e])
        return out


@case
def chosen_experts() -> Any:
    model = randomised(Chosen())
    keep = [0, 2, 3, 6, 8, 9]
    repeat(model.up, keep, dim=1)
    return model, normal(40, 5), {"up:1": keep}, [normal(90, 5, seed=s) for s in (1, 2, 3)]


class Residual(nn.Module):
    """One stream, two layers that write it, two that read it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(5, 11), nn.Linear(11, 7), nn.Linear(7, 11)
        self.gate, self.head = nn.Linear(11, 7, bias=False), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(self.up(x).relu() * self.gate(x).sigmoid())
        return self.head(x)


@case
def residual_stream() -> Any:
    model = randomised(Residual())
    keep = [0, 2, 3, 6, 8, 9]
    for tensor in (model.stem.weight, model.stem.bias, model.down.weight, model.down.bias):
        repeat(tensor, keep)
    return model, normal(9, 5), {"stem.weight": keep}, [normal(30, 5, seed=s) for s in (1, 2, 3)]


class Shared(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 11), nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.b(self.a(x).relu())
        return x


@case
def shared_layer() -> Any:
    return first_layer_copied(Shared())


class Packed(nn.Module):
    """Slices of one weight, a transposed one, and a bias added behind."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 11)
        self.both, self.bias = nn.Parameter(torch.zeros(2 * 7, 11)), nn.Parameter(torch.zeros(7))
        self.c = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        left, right = self.both.chunk(2)
        return self.c((x @ left.T + self.bias).tanh() + torch.einsum("ni,oi->no", x, right))


@case
def packed_weight() -> Any:
    return first_layer_copied(Packed())


class Normed(nn.Module):
    """Convolutions without biases, whose norms take what is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.b(self.a(x).relu())).relu().mean((2, 3)))


@case
def normed_convolution() -> Any:
    model = randomised(Normed())
    with torch.no_grad():
        for u in (1, 4):  # constant, so that only the running mean can make up for them
            model.a.weight[u], model.a.bias[u] = 0, 0.5 + u
        for tensor in (model.a.weight, model.a.bias):
            tensor[6] = 2 * tensor[0]
    batches = [normal(5, 3, 7, 9, seed=s) for s in (1, 2, 3)]
    return model, normal(2, 3, 7, 9), {"a.weight": [0, 2, 3, 5, 7]}, batches


class Branches(nn.Module):
    """Convolutions of one input that see it through different windows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 5, 3, padding=2, dilation=2), nn.Conv2d(8, 5, (1, 9), 1, (0, 4))
        self.head = nn.Linear(15, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.head(torch.cat([self.b(x), self.c(x), self.d(x)], 1).tanh().mean((2, 3)))


@case
def convolutions_of_one_input() -> Any:
    model = randomised(Branches())
    keep = [0, 1, 2, 5]
    repeat(model.a.weight, keep)
    repeat(model.a.bias, keep)
    return model, normal(2, 3, 9, 11), {"a.weight": keep}, [normal(9, 3, 9, 11, seed=s) for s in (1, 2, 3)]


class Parallel(nn.Module):
    """Two branches of one stream that are both computed before either is added."""

    def __init__(self, order: str = "xab") -> None:
        super().__init__()
        self.order = order
        self.a, self.b = nn.Linear(5, 11), nn.Linear(11, 5)
        self.c, self.d = nn.Linear(5, 13), nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        parts = {"x": x, "a": self.b(self.a(x).relu()), "b": self.d(self.c(x).relu())}
        first, second, third = (parts[name] for name in self.order)
        return first + second + third


def parallel(order: str) -> Any:
    model = randomised(Parallel(order))
    keep = {"a.weight": [0, 2, 3, 6, 8, 9], "c.weight": [0, 1, 3, 5, 6, 8, 10]}
    for layer, kept in ((model.a, keep["a.weight"]), (model.c, keep["c.weight"])):
        repeat(layer.weight, kept)
        repeat(layer.bias, kept)
    return model, normal(9, 5), keep, [normal(40, 5, seed=s) for s in (1, 2, 3)]


@case
def branches_added_in_order() -> Any:
    return parallel("xab")


@case
def branches_added_in_reverse() -> Any:
    return parallel("xba")


@case
def branches_added_to_each_other() -> Any:
    return parallel("abx")


def kept_of(model: nn.Module, example: Any, kept: dict[str, list[int]]) -> tuple[Any, depgraph.Plan]:
    """As `cut`; "first" and "second" are the two groups of inputs of a grouped convolution."""
    if "first" not in kept:
        return cut(model, example, kept)
    graph = depgraph.analyze(model, example)
    blocks = [g for g in graph.groups if any(m.name == "0.weight" and m.dim == 0 for m in g.members)]
    assert [g.units for g in blocks] == [4, 4]
    masks = {}
    for group, units in zip(blocks, kept.values(), strict=True):
        mask = torch.zeros(4, dtype=torch.bool)
        mask[units] = True
        masks[group.name] = mask.numpy()
    return graph, depgraph.build_plan(graph, masks)


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs hold waits in files, as where no memory is free."""
    monkeypatch.setattr(sys.modules["depgraph.recover.task"], "available", lambda: 0)


@pytest.mark.usefixtures("in_files")
@pytest.mark.parametrize("name", CASES)
def test_reconstruction_is_exact_where_the_kept_inputs_say_all(name: str):
    model, example, kept, batches = CASES[name]()
    graph, plan = kept_of(model, example, kept)
    small = depgraph.apply(model, plan)
    assert error(small, model, example) > 1e-3, "nothing was lost"
    told = recover(model, small, plan, graph, batches, "auto", example_inputs=example)
    assert error(small, model, normal(*example.shape, seed=77)) < EXACT, told
    assert told.output[1] < EXACT**2 < told.output[0]


@pytest.mark.slow
@pytest.mark.usefixtures("in_files")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", ZOO)
def test_no_network_gets_worse(name: str):
    entry = ZOO[name]
    model, example = entry.model(), entry.example()
    options = {"pruning_ratio": 0.5, "calibration": [entry.example(s) for s in range(4)]}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    won = depgraph.prune(model, example, recover="auto", loss=None, **options).report.recovery
    assert won.output is None or won.output[1] <= won.output[0]
    assert all(torch.equal(t.to_dense(), before[n].to_dense()) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["linear", "convolution", "stacked_experts"])
def test_half_precision_weights_are_solved_in_double(name: str):
    model, example, kept, batches = CASES[name]()
    model, example, batches = model.bfloat16(), example.bfloat16(), [b.bfloat16() for b in batches]
    graph, plan = kept_of(model, example, kept)
    small = depgraph.apply(model, plan)
    before = error(small, model, example)
    told = recover(model, small, plan, graph, batches, "auto", example_inputs=example)
    assert error(small, model, example) < 0.3 * before, told
    assert all(p.dtype == torch.bfloat16 for p in small.parameters())


def test_compensation_is_exact_where_removed_inputs_are_constant():
    model, example, _, batches = normed_convolution()
    small, told = recovered(model, example, {"a.weight": [0, 2, 3, 5, 6, 7]}, batches, "compensation")
    assert error(small, model, example) < EXACT, told
    assert torch.equal(small.b.weight, model.b.weight[:, [0, 2, 3, 5, 6, 7]])


# ------------------------------------------------------------------------------------------ what must not happen


def test_a_layer_without_a_bias_gets_none():
    model = randomised(Mlp(bias=False))
    batches = [normal(40, 5, seed=s) for s in range(5)]
    small, told = recovered(model, batches[0], {"a.weight": [0, 2, 3]}, batches, "compensation")
    assert small.b.bias is None
    assert small.state_dict().keys() == model.state_dict().keys()
    assert any(name == "b.weight" and "no bias" in why for name, why in told.skipped)


def test_weights_that_others_use_are_left_alone():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.up, self.down = nn.Embedding(13, 6), nn.Linear(6, 11), nn.Linear(11, 6)
            self.head = nn.Linear(6, 13, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.words(x)
            return self.head(x + self.down(self.up(x).relu()))

    model = randomised(Tied())
    batches = [torch.randint(0, 13, (4, 9), generator=torch.Generator().manual_seed(s)) for s in range(4)]
    small, told = recovered(model, batches[0], {"words.weight:1": [0, 1, 2, 4]}, batches, "auto")
    assert torch.equal(small.words.weight, model.words.weight[:, [0, 1, 2, 4]])
    assert small.head.weight is small.words.weight
    assert any(name == "words.weight" and "embedding" in why for name, why in told.skipped)
    assert told.output[1] < told.output[0]


def test_computed_weights_are_left_alone_with_a_reason():
    model = randomised(Mlp())
    nn.utils.parametrizations.weight_norm(model.b)
    batches = [normal(40, 5, seed=s) for s in range(5)]
    _, told = recovered(model, batches[0], {"a.weight": [0, 2, 3, 6, 8, 9]}, batches, "reconstruction")
    assert any("parametrizations.weight" in name for name, _ in told.skipped), told
    assert [r.name for r in told.layers] == ["c.weight"]
    assert told.output[1] < told.output[0]


def test_what_raises_the_error_is_undone():
    """Statistics of a batch that says nothing of the others."""
    model, example, _, batches = normed_convolution()
    with torch.no_grad():
        model.a.weight[1], model.a.bias[1] = 0, 1e-3
    graph, plan = cut(model, example, {"a.weight": [0, 2, 3, 4, 5, 6, 7]})
    small = depgraph.apply(model, plan)
    before = {n: t.clone() for n, t in small.state_dict().items()}
    odd = [100 * batches[0], batches[1]]
    told = recover(model, small, plan, graph, odd, "statistics", example_inputs=example)
    assert any("undone" in note for note in told.notes)
    assert told.output[0] == told.output[1]
    assert all(torch.equal(t, before[n]) for n, t in small.state_dict().items())
    assert not any(r.kept for r in told.layers)


class Counted(nn.Module):
    """Layers without biases and a norm without running statistics; counts its runs on four rows."""

    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = (
            nn.Linear(5, 11, bias=False),
            nn.LayerNorm(11),
            nn.Linear(11, 3, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        Counted.runs += len(x) == 4
        return self.b(self.norm(self.a(x)).relu())


@pytest.mark.parametrize("how", ["statistics", "compensation"])
def test_the_model_is_not_run_where_there_is_nothing_to_recover(how: str):
    """Twice, for the error of the outputs: on the last batch, held out, of both models."""
    model, batches = randomised(Counted()), [normal(4, 5, seed=s) for s in range(5)]
    graph, plan = cut(model, normal(3, 5), {"a.weight": [0, 2, 3, 6, 8, 9]})
    small = depgraph.apply(model, plan)
    Counted.runs = 0
    told = recover(model, small, plan, graph, batches, how, example_inputs=normal(3, 5))
    assert Counted.runs == 2
    assert not told.layers
    assert not told.notes
    assert told.output[0] == told.output[1] > 0


def passing() -> nn.Sequential:
    """Its first layer hands on its two inputs as they are."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.zero_()
    return model


def test_a_layer_is_kept_only_if_held_out_batches_confirm_it():
    """What holds on the fitted batches, that the removed input is the kept one, is wrong on the one that is held out."""
    model = passing()
    x = normal(50, 1)
    same, other = torch.cat([x, x], 1), torch.cat([x, -x], 1)
    for batches, right in (([same, same, other], False), ([same, same, same], True)):
        small, told = recovered(model, same, {"0.weight": [0]}, batches, "reconstruction")
        assert [(r.name, r.kept) for r in told.layers] == [("1.weight", right)]
        assert torch.equal(small[1].weight, model[1].weight[:, :1]) is not right


def test_a_mean_is_taken_only_if_held_out_batches_confirm_it():
    """What is removed is about 2 on the fitted batches, and about -2 or 2 on the one that is held out."""
    model = passing()
    x = normal(50, 2)
    up, down = x + torch.tensor([0, 2.0]), x - torch.tensor([0, 2.0])
    for batches, right in (([up, up, down], False), ([up, up, up], True)):
        small, told = recovered(model, up, {"0.weight": [0]}, batches, "compensation")
        assert [(r.name, r.kept) for r in told.layers] == [("1.weight", right)]
        assert not any("undone" in note for note in told.notes)
        assert torch.equal(small[1].bias, model[1].bias) is not right


class Exponential(nn.Module):
    """Overflows where an input is large; once, or called twice."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.a, self.b, self.c = nn.Linear(5, 11), nn.Linear(11, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.b(self.a(x).exp()).tanh()
        return self.c(x)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("bad", [0, 3], ids=["fitted", "held out"])
def test_layers_that_overflow_on_a_batch_are_left_alone(times: int, bad: int):
    """There is no least-squares solution, and no mean: it was looked for without end."""
    model = randomised(Exponential(times))
    batches = [normal(40, 5, seed=s) for s in range(4)]
    batches[bad][7] = 1e5
    for how in ("reconstruction", "compensation"):
        small, told = recovered(model, normal(9, 5), {"a.weight": [0, 2, 3, 6]}, batches, how)
        assert any(n == "b.weight" and ("NaN" in why or "no bias" in why) for n, why in told.skipped), told
        assert not [r for r in told.layers if r.name == "b.weight"]
        assert torch.equal(small.b.weight, model.b.weight[:, [0, 2, 3, 6]])
        assert torch.equal(small.b.bias, model.b.bias)


def test_statistics_of_a_batch_that_overflows_are_not_taken():
    """Norms that take NaN give NaN everywhere, which must not count as nothing to compare."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.n(self.a(x).exp()))

    model = randomised(Net())
    batches = [normal(4, 3, 7, 5, seed=s) for s in range(4)]
    batches[0][1] = 1e5
    small, told = recovered(model, batches[1], {"a.weight": [0, 2, 3, 6]}, batches, "statistics")
    assert [name for name, why in told.skipped if "NaN" in why] == ["n.running_mean"]
    assert torch.equal(small.n.running_mean, model.n.running_mean[[0, 2, 3, 6]])


def test_the_error_of_outputs_counts_what_is_not_finite():
    inf, nan = float("inf"), float("nan")
    wanted = [[torch.tensor([3.0, 4.0, -inf])], [torch.tensor([nan, 5.0])]]
    near = [[torch.tensor([3.0, 6.0, 7.0])], [torch.tensor([1.0, 4.0])]]
    assert output_error(wanted, near) == pytest.approx((4 + 1) / (9 + 16 + 25))
    for broken in (nan, inf):
        assert output_error(wanted, [[torch.tensor([3.0, broken, 7.0])], near[1]]) == inf
    assert output_error(wanted, [[torch.ones(2)], near[1]]) is None


def test_complex_layers_are_left_alone():
    """Sums in real numbers would lose the imaginary part."""

    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(5, 11), nn.Linear(7, 3)
            self.w = nn.Parameter(torch.randn(7, 11, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.fft.fft(self.a(x), dim=0)
            return self.c(torch.fft.ifft(F.linear(hidden, self.w), dim=0).real.tanh())

    torch.manual_seed(0)
    model = Spectral().eval()
    model.a, model.c = model.a.double(), model.c.double()
    batches = [normal(16, 5, seed=s) for s in range(4)]
    small, told = recovered(model, batches[0], {"a.weight": [0, 2, 3, 6]}, batches, "auto")
    assert ("w", "its inputs are complex") in told.skipped
    assert torch.equal(small.w, model.w[:, [0, 2, 3, 6]])
    assert told.output[1] < told.output[0]


@pytest.mark.parametrize("how", ["reconstruction", "compensation"])
@pytest.mark.parametrize("reached", [(0, 1), (3,)], ids=["fitted", "held out"])
def test_layers_that_few_batches_reach(how: str, reached: tuple[int, ...]):
    """Errors are relative to the result on the very batches that they are measured on; a layer of none is named."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 11), nn.Linear(11, 7), nn.Linear(7, 7)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) != 40:
                return x.sum(1, keepdim=True).expand(-1, 7)
            hidden = self.a(x).relu()  # twice: solved on the original's inputs
            return self.c(self.b(hidden) + (self.b(2 * hidden) if how == "reconstruction" else 0))

    model = randomised(Net())
    batches = [normal(40 if i in reached else 30, 5, seed=i) for i in range(4)]
    small, told = recovered(model, normal(40, 5), {"a.weight": [0, 2, 3, 6, 8, 9]}, batches, how)
    (own,) = [r for r in told.layers if r.name == "b.weight"]
    assert own.kept
    assert 0 <= own.after < own.before < 10
    changed = "weight" if how == "reconstruction" else "bias"
    cut_ = model.b.weight[:, [0, 2, 3, 6, 8, 9]] if how == "reconstruction" else model.b.bias
    assert not torch.equal(small.b.get_parameter(changed), cut_)
    _, told = recovered(model, normal(40, 5), {"a.weight": [0, 2, 3]}, [normal(30, 5)] * 3, how)
    assert ("b.weight", "no calibration batch reached it") in told.skipped


@pytest.mark.parametrize("bad", [{"damping": -1}, {"damping": float("nan")}, {"samples": 0}])
def test_options_out_of_range(bad: dict[str, float]):
    with pytest.raises(InputError, match=next(iter(bad))):
        Reconstruction(**bad)


def test_every_example_is_traced_of_the_smaller_model_too():
    """A branch that the first calibration batch does not take is recovered all the same."""

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 11), nn.Linear(11, 3), nn.Linear(11, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (self.b if len(x) == 40 else self.c)(self.a(x).relu())

    model = randomised(Either())
    batches = [normal(n, 5, seed=n + i) for i, n in enumerate((40, 30, 40, 30, 30, 40, 40, 30, 40, 30))]
    example = depgraph.Examples(*batches[:2])
    small, told = recovered(model, example, {"a.weight": [0, 2, 3, 6, 8, 9]}, batches, "reconstruction")
    assert {r.name for r in told.layers if r.kept} == {"b.weight", "c.weight"}
    assert not told.skipped
    with torch.no_grad():
        hidden = [torch.cat([model.a(b).relu() for b in batches if len(b) == n]) for n in (40, 30)]
        for layer, old, x in ((small.b, model.b, hidden[0]), (small.c, model.c, hidden[1])):
            lost = F.linear(x[:, [0, 2, 3, 6, 8, 9]], old.weight[:, [0, 2, 3, 6, 8, 9]], old.bias) - old(x)
            assert (layer(x[:, [0, 2, 3, 6, 8, 9]]) - old(x)).square().sum() < 0.5 * lost.square().sum()


class Stop(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("how", ["auto", "statistics", "compensation", "reconstruction"])
@pytest.mark.parametrize("stop", [Stop, KeyboardInterrupt, ValueError])
def test_nothing_is_left_behind_after_an_exception(how: str, stop: type[BaseException]):
    class Breaks(Normed):
        countdown = 10**9

        def forward(self, x: Tensor) -> Tensor:
            Breaks.countdown -= 1
            if Breaks.countdown < 0:
                raise stop
            return super().forward(x)

    model = randomised(Breaks())
    batches = [normal(5, 3, 7, 9, seed=s) for s in (1, 2, 3)]
    graph, plan = cut(model, batches[0], {"a.weight": [0, 2, 3, 5, 7]})
    small = depgraph.apply(model, plan)
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in (model, small)]
    threads, stopped = threading.active_count(), 0
    for countdown in (0, 2, 5, 9):
        Breaks.countdown = countdown
        try:
            recover(model, small, plan, graph, batches, how, example_inputs=batches[0])
        except (stop, DepgraphError):
            stopped += 1
        else:  # done before the count was down
            small = depgraph.apply(model, plan)
        for m, values in zip((model, small), before, strict=True):
            assert all(torch.equal(t, values[n]) for n, t in m.state_dict().items())
            assert not any(x._forward_hooks or x._forward_pre_hooks for x in m.modules())
            assert all(p.grad is None and p.requires_grad for p in m.parameters())
    assert threading.active_count() == threads
    assert stopped >= 3
    Breaks.countdown = 10**9


def test_the_original_and_its_mode_stay_as_they_are():
    model = randomised(Normed()).train()
    batches = [normal(5, 3, 7, 9, seed=s) for s in (1, 2, 3)]
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    result = depgraph.prune(model, batches[0], pruning_ratio=0.4, calibration=batches, recover="auto")
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert result.report.recovery.output[1] < result.report.recovery.output[0]
    assert "reconstruction changed" in str(result.report)
    assert result.report.to_dict()["recovery"]["output"]["after"] < result.report.recovery.output[0]


def test_in_place():
    batches = [normal(5, 3, 7, 9, seed=s) for s in (1, 2, 3)]
    one, other = randomised(Normed()), randomised(Normed())
    options = {"pruning_ratio": 0.4, "calibration": batches, "recover": "auto"}
    small = depgraph.prune(one, batches[0], **options).model
    same = depgraph.prune(other, batches[0], inplace=True, **options).model
    assert same is other
    assert all(torch.equal(t, small.state_dict()[n]) for n, t in other.state_dict().items())


def test_bad_input_is_refused_before_anything_is_done():
    model, x = Mlp(), torch.randn(9, 5)
    with pytest.raises(InputError, match="'reconstruction'"):
        depgraph.prune(model, x, recover="magic", calibration=[x])
    with pytest.raises(InputError, match="needs calibration data"):
        depgraph.prune(model, x, recover="auto")
    with pytest.raises(InputError, match="empty list"):
        depgraph.prune(model, x, recover=[], calibration=[x])
    with pytest.raises(InputError, match="empty"):
        depgraph.prune(model, x, recover="auto", calibration=[])
    with pytest.raises(InputError, match="NaN"):
        depgraph.prune(model, x, recover="auto", calibration=[x * float("nan")])


def test_a_function_of_the_users():
    model, x = Mlp(), torch.randn(9, 5)
    seen: list[Any] = []

    def mine(*given: Any) -> None:
        seen.extend(given)
        given[1].c.bias.data.fill_(7)

    result = depgraph.prune(model, x, recover=mine)
    assert seen[0] is model
    assert seen[1] is result.model
    assert seen[2] is result.plan
    assert result.model.c.bias.tolist() == [7, 7, 7]


def test_one_batch_is_enough():
    model = randomised(Mlp())
    keep = [0, 2, 3, 6, 8, 9]
    repeat(model.a.weight, keep)
    repeat(model.a.bias, keep)
    small, told = recovered(model, normal(9, 5), {"a.weight": keep}, [normal(60, 5, seed=1)], "auto")
    assert error(small, model, normal(30, 5, seed=5)) < EXACT, told


def test_batches_may_differ_in_size_and_length():
    model = randomised(Attention())
    keep = [0, 1, 3, 6]
    for head in range(3):
        for tensor in (model.v.weight, model.v.bias):
            repeat(tensor[7 * head : 7 * head + 7], keep)
    batches = [normal(n, t, 5, seed=t) for n, t in ((3, 6), (1, 11), (4, 2))]
    small, told = recovered(model, normal(2, 6, 5), {"v.weight": keep}, batches, "auto")
    assert error(small, model, normal(2, 7, 5, seed=5)) < EXACT, told


def test_a_router_that_decides_otherwise_is_noticed():
    """Where the two models send tokens elsewhere, their samples must not be taken for the same."""

    class Routed(Chosen):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mix = nn.Linear(5, 13), nn.Linear(13, 5)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.mix(self.stem(x).relu()))

    model = randomised(Routed())
    with torch.no_grad():
        model.router.bias.zero_()
        model.mix.bias.zero_()
    batches = [normal(90, 5, seed=s) for s in range(4)]
    keep = {"stem.weight": [0, 1, 4, 5, 7, 11], "up:1": [0, 2, 3, 6, 8, 9]}
    small, told = recovered(model, batches[0], keep, batches, "reconstruction")
    chosen = [m.router(m.mix(m.stem(batches[0]).relu())).argmax(-1) for m in (model, small)]
    assert not torch.equal(*chosen)
    assert all(c.unique().numel() == 3 for c in chosen)
    own = [r for r in told.layers if r.name == "down"]
    assert len(own) == 3
    assert all("original" in r.detail for r in own if r.kept)
    assert any(r.kept for r in own)
    assert told.output[1] < told.output[0]


def test_memory_is_bounded_for_wide_layers(monkeypatch: pytest.MonkeyPatch):
    """A Gram matrix of all columns of a wide layer would take 64 MiB; solved in blocks, none is made that large."""
    made: list[int] = []
    zero = module_of_reconstruction.Sums.zero.__func__

    def noted(cls: Any, *sizes: Any) -> Any:
        found = zero(cls, *sizes)
        made.append(sum(getattr(found, n).numel() * 8 for n in ("xx", "xr", "x", "r")))
        return found

    monkeypatch.setattr(module_of_reconstruction.Sums, "zero", classmethod(noted))
    monkeypatch.setattr(module_of_reconstruction, "COLUMNS", 256)
    width = 2900
    model = nn.Sequential(nn.Linear(7, 2 * width), nn.ReLU(), nn.Linear(2 * width, 3)).eval()
    batches = [torch.randn(300, 7) for _ in range(3)]
    kept = {"0.weight": list(range(width))}
    graph, plan = cut(model, batches[0], kept)
    small = depgraph.apply(model, plan)
    gc.collect()
    told = recover(model, small, plan, graph, batches, "reconstruction", example_inputs=batches[0])
    assert told.layers[0].after < 0.1 * told.layers[0].before
    assert len(made) == 2 * -(-width // 256)
    assert max(made) <= 8 * (256 * 256 + 256 * 3 + 256 + 3)


@pytest.mark.parametrize("columns", [3, 511, 700, 1030])
def test_a_gram_matrix_of_blocks_is_that_of_all_columns(columns: int):
    x = normal(2, 50, columns)
    sums = Sums.zero(2, columns, 3, torch.device("cpu"))
    r = normal(2, 50, 3, seed=1)
    for part in (slice(0, 1), slice(1, 2)):
        sums.add(part, x[part], r[part])
    torch.testing.assert_close(sums.xx, x.double().mT @ x.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.xx, sums.xx.mT)
    torch.testing.assert_close(sums.xr, x.double().mT @ r.double(), rtol=1e-5, atol=1e-5)
    assert sums.xx.dtype == torch.float64


def test_float32_products_add_up_without_a_drift():
    x, r = (normal(1, 3 * RUN + 5, n, seed=n) + 1 for n in (11, 2))
    sums = Sums.zero(1, 11, 2, torch.device("cpu"))
    sums.add(slice(0, 1), x.float(), r.float())
    exact = x.double().mT @ x.double()
    assert float((sums.xx - exact).abs().max() / exact.abs().max()) < 2e-6
    assert float(sums.count[0]) == 3 * RUN + 5


def test_sums_of_two_are_solved_as_one_is_and_stay_as_they_are() -> None:
    torch.manual_seed(0)
    some, others = (Sums.zero(2, 5, 3, torch.device("cpu")) for _ in range(2))
    for sums, count in ((some, 4), (others, 7)):
        sums.add(slice(0, 2), torch.randn(2, count, 5), torch.randn(2, count, 3))
    before = [t.clone() for t in (some.xx, others.xx, some.xr)]
    for damping, affine in ((0.0, True), (0.1, False)):
        wanted = some.plus(others).solve(damping, affine)
        for a, b in zip(some.solve(damping, affine, others), wanted, strict=True):
            assert torch.equal(a, b)
    singular = Sums.zero(1, 3, 2, torch.device("cpu"))
    singular.add(slice(0, 1), torch.ones(1, 4, 3), torch.ones(1, 4, 2))
    assert torch.isfinite(singular.solve(0.0, False)[0]).all()
    assert singular.error(*singular.solve(0.0, False)).max() < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(before, (some.xx, others.xx, some.xr), strict=True))


# ------------------------------------------------------------------------------------------- memory


class Tabled(Residual):
    """A factor for each position, made in the first run and kept for all models of the class, and what each run reads."""

    tables: ClassVar[dict[int, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        table = self.tables.get(len(x))
        if table is None:
            table = self.tables[len(x)] = torch.arange(len(x), dtype=x.dtype).cos()
        x = self.tables[-len(self.tables)] = x * table[:, None]
        return super().forward(x)


@pytest.mark.parametrize("kind", [Residual, Tabled])
def test_what_runs_hold_waits_in_files_where_memory_is_short(
    kind: type[Residual], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The result is that of runs in memory; what a run leaves to others is whole, and no file is left."""
    model, keep = randomised(kind()), {"stem.weight": [0, 2, 3, 6, 8, 9], "up.weight": [0, 1, 4]}
    batches = [normal(30, 5, seed=s) for s in range(4)] + [
        normal(20, 5)
    ]  # the last is held out, and run first
    module, put = sys.modules["depgraph.recover.task"], []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    real = Shelf.put
    monkeypatch.setattr(Shelf, "put", lambda self, t: put.append(t.nbytes) or real(self, t))
    results, tables = [], Tabled.tables
    for free in (None, 0, 1 << 40):
        monkeypatch.setattr(module, "available", lambda free=free: free)
        tables.clear()
        count = len(put)
        results.append(recovered(model, normal(9, 5), keep, batches, "auto"))
        assert (len(put) > count) == (free == 0)
        for n, t in tables.items():
            wanted = (
                [torch.arange(n).double().cos()] if n > 0 else [b * tables[len(b)][:, None] for b in batches]
            )
            assert any(torch.equal(t, w) for w in wanted), n
    assert {n for n in tables if n > 0} == ({20, 30} if kind is Tabled else set())
    (first, told), *others = results
    assert any(layer.kept for layer in told.layers)
    for small, other in others:
        assert other.layers == told.layers
        for name, value in small.state_dict().items():
            assert torch.equal(value, first.state_dict()[name]), name
    assert not list(tmp_path.iterdir())


def test_where_runs_can_not_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No folder for temporary files: in memory. A full disk: an error with a remedy, and the model is as it was."""
    model, batches = randomised(Residual()), [normal(30, 5, seed=s) for s in range(5)]
    module, keep = sys.modules["depgraph.recover.task"], {"stem.weight": [0, 2, 3, 6, 8, 9]}
    monkeypatch.setattr(module, "available", lambda: 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    _, told = recovered(model, batches[0], keep, batches, "auto")
    assert any(layer.kept for layer in told.layers)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(self: Shelf, tensor: Tensor) -> Any:
        raise StoreError(f"{self.path} can't be written: no space left on device")

    monkeypatch.setattr(Shelf, "put", full)
    graph, plan = cut(model, batches[0], keep)
    small = depgraph.apply(model, plan)
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(StoreError, match=r"(?s)of 5 calibration batches do not fit.*no space left.*TMPDIR"):
        recover(model, small, plan, graph, batches, "auto", example_inputs=batches[0])
    assert all(torch.equal(before[n], t) for n, t in small.state_dict().items())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says it there")
def test_free_memory_is_that_of_the_machine_and_of_its_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    module = sys.modules["depgraph.base.memory"]
    monkeypatch.setattr(module, "LIMITS", (str(tmp_path / "none"), str(tmp_path / "limit")))
    (whole,) = re.findall(r"MemTotal: *(\d+)", Path("/proc/meminfo").read_text())
    assert 0 < module.available() < 1024 * int(whole)
    (tmp_path / "limit").write_text("max\n")
    assert module.available() > 1 << 20
    (tmp_path / "limit").write_text(f"{module.held() + (1 << 20)}\n")
    assert module.available() == pytest.approx(1 << 20, abs=1 << 19)
    (tmp_path / "limit").write_text("1000\n")
    assert module.available() == 0
