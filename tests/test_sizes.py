"""Numbers that remember where they came from, on ways that the zoo's value checks would forgive."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_equal_to_masked
from torch import nn

import depgraph
from depgraph.tracing.sizes import Size, expression

WIDTH = ("attr", "", "width")


def width_of(a):
    return a.shape[-1]


class Scaled(nn.Module):
    """Two projections multiplied, over a number that is computed from their width, which a function reads."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.a, self.b, self.head = nn.Linear(5, 14), nn.Linear(5, 14), nn.Linear(4, 3)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.head(self.scale((a.unsqueeze(1) * b.unsqueeze(0)).sum(-1), width_of(a)))


class ScaledHere(Scaled):
    """Its own method reads the width."""

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.head(self.scale((a.unsqueeze(1) * b.unsqueeze(0)).sum(-1), a.shape[-1]))


SCALES = [
    lambda y, n: y / math.sqrt(2 * n),
    lambda y, n: y / np.sqrt(2 * n),
    lambda y, n: y * (3.0 / np.power(n, -0.5)),
    lambda y, n: y / (np.float64(2) * n + 1.0),
    lambda y, n: y / np.log(n),
    lambda y, n: torch.add(y, y, alpha=math.sqrt(3 * n)),
    lambda y, n: torch.mul(y, other=math.sqrt(3 * n)),
]


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_computed_from_a_width_keeps_the_width(scale):
    """Also without verification, which would find out."""
    graph = depgraph.analyze(Scaled(scale), torch.randn(4, 5))
    assert not graph.groups
    assert any("sets a number that the op computes with" in str(lock) for lock in graph.lock_summary())


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_computed_from_a_width_keeps_its_value(scale):
    """Where the method of a module reads the width, that read becomes the number."""
    model, x = ScaledHere(scale).double(), torch.randn(4, 5).double()
    result = depgraph.prune(model, x, verify=False)
    assert result.model.a.out_features < 14
    assert_equal_to_masked(model, result, x)


class Copied(nn.Module):
    """Each channel of one branch stands beside several of another; the call says how many that makes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 24, 1), nn.Conv2d(24, 5, 1)

    def forward(self, x):
        h = self.a(x)
        return self.head(self.b(h) + h.repeat_interleave(4, dim=1, output_size=h.shape[1] * 4))


class CopiedToANumber(Copied):
    """It says it by a number."""

    def forward(self, x):
        h = self.a(x)
        return self.head(self.b(h) + h.repeat_interleave(4, dim=1, output_size=24))


@pytest.mark.parametrize("kind", [Copied, CopiedToANumber])
def test_the_size_that_a_repetition_is_said_to_have_follows(kind):
    model, x = kind().double(), torch.randn(2, 3, 4, 4).double()
    result = depgraph.prune(model, x, pruning_ratio=0.5, verify=False)
    assert result.model.b.out_channels == 4 * result.model.a.out_channels < 24
    assert_equal_to_masked(model, result, x)


class Numbered(nn.Module):
    """A width says how often another tensor is copied, padded, or divided: its number stays what it was."""

    def __init__(self, ins):
        super().__init__()
        self.a, self.b, self.head, self.other = (
            nn.Linear(5, 8),
            nn.Linear(5, 4),
            nn.Linear(ins, 3),
            nn.Linear(8, 3),
        )


class Repeated(Numbered):
    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.head(b.repeat(1, a.shape[1])) + self.other(a)


class Tiled(Numbered):
    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.head(b.tile(a.shape[1])) + self.other(a)


class Interleaved(Numbered):
    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.head(b.repeat_interleave(a.shape[1], 1)) + self.other(a)


class PaddedByWidth(Numbered):
    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.head(F.pad(b, (0, a.shape[1]))) + self.other(a)


class Stepped(Numbered):
    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.head(x[:, :: b.shape[1]]) + self.other(a)


class SplitByWidth(Numbered):
    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.head(torch.cat([a, a], 1).tensor_split(b.shape[1], 1)[1]) + self.other(a)


@pytest.mark.parametrize(
    ("kind", "ins"),
    [(Repeated, 32), (Tiled, 32), (Interleaved, 32), (PaddedByWidth, 12), (Stepped, 2), (SplitByWidth, 4)],
)
def test_a_number_of_copies_or_parts_that_is_a_width_stays(kind, ins):
    """Found by the rules: without the proof, and without a trial run that would freeze a group."""
    model, x = kind(ins).double(), torch.randn(3, 5).double()
    result = depgraph.prune(model, x, pruning_ratio=0.5, verify=False)
    assert not any("stay whole" in note for note in result.report.to_dict().get("notes", ()))
    assert_equal_to_masked(model, result, x)


class Shared(nn.Module):
    """Two groups of channels, each copied for three heads; time is taken in pairs, with sizes read after the copy."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(5, 24), nn.Linear(24, 3)

    def copied(self, a):
        return a.repeat_interleave(3, dim=2)

    def forward(self, x):
        a = self.copied(self.a(x).unflatten(-1, (2, -1)))
        a = F.pad(a, (0, 0, 0, 0, 0, a.shape[1] % 2))
        pairs = a.reshape(a.shape[0], -1, 2, a.shape[2], a.shape[3]).sum(2)
        b = self.b(x).reshape(a.shape[0], -1, 2, a.shape[2], a.shape[3]).sum(2)
        return self.head((pairs * b).flatten(2))


class SharedByRepeat(Shared):
    def copied(self, a):
        return a.repeat(1, 1, 3, 1)


class SharedByExpand(Shared):
    def copied(self, a):
        return a[:, :, :, None].expand(-1, -1, -1, 3, -1).flatten(2, 3)


@pytest.mark.parametrize("kind", [Shared, SharedByRepeat, SharedByExpand])
def test_copies_by_a_number_do_not_range_over_inputs(kind):
    """The size of a dim of copies is that of the model: what it divides can shrink."""
    model, x = kind().double(), torch.randn(2, 4, 5).double()
    result = depgraph.prune(model, x, pruning_ratio=0.5, verify=False)
    assert result.model.a.out_features == 4
    assert_equal_to_masked(model, result, x)
    assert_equal_to_masked(model, result, torch.randn(3, 6, 5).double())


class CopiedByInput(nn.Module):
    """As many copies as there are tokens, which then stand in for a width."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        a = self.a(x)  # [b t 8]
        copies = a[:, :1].repeat(1, x.shape[1], 1)
        return self.head((a.reshape(-1, copies.shape[1], 8) + copies[: a.shape[0]]).flatten(0, 1))


def test_copies_by_an_input_range_over_it():
    model, x = CopiedByInput().double(), torch.randn(2, 8, 5).double()
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    assert_equal_to_masked(model, result, x)
    assert_equal_to_masked(model, result, torch.randn(3, 6, 5).double())


@pytest.mark.parametrize(
    ("kind", "dim", "fixed"), [(Shared, 2, True), (SharedByRepeat, 2, True), (CopiedByInput, 1, False)]
)
def test_which_copies_range_over_inputs(kind, dim, fixed):
    graph = depgraph.analyze(kind().double(), torch.randn(2, 8, 5).double())
    copies = [n for n in graph.trace.graph.nodes if "aten.repeat" in str(n.target)]
    assert [graph.sizes.ranging.is_fixed(("dim", node, dim)) for node in copies] == [fixed]


class Padded(nn.Module):
    """How far an input is padded is computed by numpy, and becomes a plain number."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 12, 3), nn.Conv1d(12, 4, 1)

    def forward(self, x):
        whole = int(np.ceil(x.shape[-1] / 4)) * 4
        x = nn.functional.pad(x, (0, whole - x.shape[-1]))
        return self.b(self.a(x).relu())


def test_lengths_that_numpy_computes():
    model, x = Padded().double(), torch.randn(2, 3, 10).double()
    result = depgraph.prune(model, x)
    assert result.model.a.out_channels < 12
    assert_equal_to_masked(model, result, x)


def test_numpy_of_a_tracked_number():
    """Values are numpy's own; a float keeps its expression, in further arithmetic too; arrays do not."""
    n = Size(16, WIDTH)
    root = np.sqrt(n)
    assert root == 4
    assert root.item() == 4.0
    assert isinstance(root, np.float64)
    assert expression(root) == ("pow", WIDTH, 0.5)
    assert expression(1 / root) == ("truediv", 1, ("pow", WIDTH, 0.5))
    assert expression(np.divide(n, 4)) == ("truediv", WIDTH, 4)
    assert type(np.arange(3) * n) is np.ndarray
    assert type(np.add.reduce([n, n])) is not Size
    assert np.add.reduce([n, n]) == 32


def test_encoder_layers_are_counted_though_torch_has_one_kernel_for_them():
    """In eval mode torch would run a whole layer as one op, whose work its counter does not know."""
    layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True).eval()
    report = depgraph.prune(layer, torch.randn(2, 7, 12), pruning_ratio=0.5).report.to_dict()
    tokens, products = 2 * 7, 12 * 36 + 12 * 12 + 2 * 12 * 20
    assert report["macs"]["before"] >= tokens * products
    assert report["macs"]["after"] < report["macs"]["before"]


@functools.lru_cache(maxsize=4)
def remembered(width: int) -> int:
    """What a cache of the user's code keeps from one run to the next."""
    return width * 2


class Remembering(nn.Module):
    """Computes a size in a function that remembers its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 14), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(y.reshape(remembered(y.shape[0]), -1))


def test_sizes_that_a_cache_kept_from_another_run() -> None:
    """They belong to a graph that is gone: a second analysis takes them for plain numbers, and stays right."""
    remembered.cache_clear()
    model, x = Remembering().double().eval(), torch.randn(2, 5).double()
    first = depgraph.analyze(model, x)
    again = depgraph.analyze(model, x)
    assert [g.units for g in first.groups] == [g.units for g in again.groups]
    for ratio in (0.3, 0.5):
        try:
            result = depgraph.prune(model, x, pruning_ratio=ratio)
        except depgraph.NothingToPruneError:
            continue
        assert_equal_to_masked(model, result, x)


def positions(shape):
    """[1 t 1]: a table that does not depend on the number of channels, though callers give all of a shape."""
    return torch.linspace(0, 1, shape[1]).double()[None, :, None]


def remembering(function):
    """As libraries write it: the memoised function is in a closure."""
    remembered = functools.lru_cache(maxsize=1)(function)

    @functools.wraps(function)
    def wrapper(*args):
        return remembered(*args)

    return wrapper


class Placed(nn.Module):
    """Adds a memoised table to its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 14), nn.Linear(14, 3)

    in_closure = staticmethod(remembering(positions))
    of_class = staticmethod(functools.lru_cache(maxsize=1)(positions))

    @functools.lru_cache(maxsize=1)  # noqa: B019  as people write it
    def method(self, shape):
        return positions(shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last((y + self.table(y)).relu())


class PlacedFromClosure(Placed):
    def table(self, y):
        return self.in_closure(y.shape)


class PlacedFromClass(Placed):
    def table(self, y):
        return self.of_class(y.shape)


class PlacedByMethod(Placed):
    def table(self, y):
        return self.method(y.shape)


@pytest.mark.parametrize("kind", [PlacedFromClosure, PlacedFromClass, PlacedByMethod])
def test_a_memoised_function_wherever_it_is_named(kind):
    model, x = kind().double(), torch.randn(2, 4, 5).double()
    model(x)
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    assert result.model.first.out_features == 7
    assert_equal_to_masked(model, result, x)
    assert_equal_to_masked(model, result, torch.randn(3, 6, 5).double())


class Divided(nn.Module):
    """The hidden width is divided at a place, or into as many parts, as the batch has rows; another layer can go."""

    def __init__(self, divide):
        super().__init__()
        self.divide = divide
        self.first, self.a, self.b, self.c = (
            nn.Linear(5, 8),
            nn.Linear(8, 12),
            nn.Linear(12, 3),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.first(x)
        return self.b(self.divide(self.a(x), x.shape[0])) + self.c(x)


@pytest.mark.parametrize(
    "divide",
    [
        lambda h, n: torch.cat([h[:, :n] * 2, h[:, n:]], 1),
        lambda h, n: torch.cat([h[:, : max(h.shape[1] - n, 1)] * 2, h[:, max(h.shape[1] - n, 1) :]], 1),
        lambda h, n: h.roll(n, 1),
        lambda h, n: h + h[:, ::n].sum(1, keepdim=True),
        lambda h, n: torch.cat([part * i for i, part in enumerate(h.chunk(n, 1))], 1),
        lambda h, n: torch.cat([part * i for i, part in enumerate(h.tensor_split(n, 1))], 1),
        lambda h, n: h.unflatten(1, (n, -1)).cumsum(1).flatten(1),
        nn.functional.group_norm,
        lambda h, n: h + h.topk(n, 1)[0].sum(1, keepdim=True),
        lambda h, n: nn.functional.pad(h, (n, 0))[:, :12],
        lambda h, n: nn.functional.pad(nn.functional.pad(h, (-n, 0)), (n, 0)),
    ],
    ids=[
        "slice",
        "max",
        "roll",
        "step",
        "chunk",
        "tensor_split",
        "unflatten",
        "group_norm",
        "topk",
        "pad",
        "crop",
    ],
)
def test_a_dim_that_other_inputs_divide_elsewhere_stays_whole(divide):
    """The example says where it is divided for one batch only; also without verification."""
    graph = depgraph.analyze(Divided(divide), torch.randn(4, 5))
    assert [g.units for g in graph.groups] == [8]


class Halved(Divided):
    """The place is half of what Python's ``len`` says, which is a plain number."""

    def forward(self, x):
        x = self.first(x)
        return self.b(self.divide(self.a(x), len(x) // 2)) + self.c(x)


@pytest.mark.parametrize(
    "divide", [lambda h, n: h.roll(n, 1), lambda h, n: h + h[:, :n].sum(1, keepdim=True)]
)
def test_a_length_is_the_size_that_it_repeats(divide):
    graph = depgraph.analyze(Halved(divide), torch.randn(4, 5))
    assert [g.units for g in graph.groups] == [8]


class Lengths(nn.Module):
    """Shapes and a scale by ``len`` of a row."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x):
        h = self.a(x)
        h = h.reshape(len(x), len(h[0]) // 2, 2).flip(2).reshape(-1, len(h[0]))
        return self.b(h / len(x))


def test_lengths_follow_what_they_are_of():
    model, x = Lengths().double(), torch.randn(4, 5).double()
    result = depgraph.prune(model, x, verify=False)
    assert result.model.a.out_features == 6
    assert_equal_to_masked(model, result, x)
    assert_equal_to_masked(model, result, torch.randn(7, 5).double())


@pytest.mark.parametrize(
    "also",
    [lambda h: h.shape[-1], lambda h: h.shape, lambda h: {"cost": [h.size(1) * 2.0]}],
    ids=["size", "shape", "cost"],
)
def test_a_size_that_is_returned_stays_what_it_was(also):
    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, x):
            h = self.a(self.first(x))
            return self.b(h), also(h)

    model, x = Returning().double(), torch.randn(4, 5).double()
    result = depgraph.prune(model, x, verify=False)
    assert result.model.first.out_features == 4
    assert result.model(x)[1] == model(x)[1]
    assert_equal_to_masked(model, result, x)


class Points(nn.Module):
    """How many points it finds depends on values, so on what is removed."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        h = self.a(x).relu()
        y, x = torch.nonzero(self.b(h)[0, 0] > 0, as_tuple=True)
        return self.c(h)[0, :, y, x].sum(1)


def test_how_many_indices_values_choose_is_not_planned():
    model, x = Points().double(), torch.randn(1, 1, 9, 9).double()
    for seed in range(5):
        torch.manual_seed(seed)
        nn.init.normal_(model.b.weight)
        result = depgraph.prune(model, x, pruning_ratio=0.5, verify=False)
        assert result.model.a.out_channels == 4
        assert_equal_to_masked(model, result, x)


class Told(nn.Module):
    """Another layer's width says which entries of the input are taken, or what is put into them."""

    def __init__(self, taken):
        super().__init__()
        self.taken = taken
        self.a, self.b, self.c, self.d = (nn.Linear(*n) for n in ((8, 16), (8, 4), (16, 3), (4, 3)))

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.c(a) + self.d(b) + self.taken(x, b)


def written(x, value):
    x = x.clone()
    x[:, 0] = value
    return x[:, :3]


TAKEN = {
    "index": lambda x, b: x[:, b.shape[1] - 1, None],
    "list of indices": lambda x, b: x[:, [b.shape[1] - 1]],
    "index that is written": lambda x, b: written(x, b.shape[1]),
    "number that is written": lambda x, b: written(x, 1 / b.shape[1]),
    "bound beyond the dim": lambda x, b: x[:, : 3 * b.shape[1] - 3].sum(1, keepdim=True),
    "k-th value": lambda x, b: x.kthvalue(b.shape[1], 1)[0][:, None],
    "value of a padding": lambda x, b: F.pad(x, (0, 1), value=b.shape[1])[:, -3:],
    "kernel": lambda x, b: F.avg_pool2d(x[None], (1, b.shape[1]), 1)[0, :, :3],
    "size of an image": lambda x, b: F.interpolate(x[None, None], size=(3, b.shape[1] + 1))[0, 0, :, -3:],
    "epsilon": lambda x, b: F.layer_norm(x, (8,), eps=b.shape[1])[:, :3],
    "first number": lambda x, b: torch.arange(b.shape[1], 9)[:1],
    "step": lambda x, b: torch.arange(0, 8, b.shape[1] // 2)[1:2],
    "largest number": lambda x, b: torch.linspace(0, b.shape[1], 3),
    "factor of several": lambda x, b: torch._foreach_mul([x[:, :3]], b.shape[1])[0],
    "factor of several, in place": lambda x, b: written_by(lambda y: torch._foreach_mul_([y], b.shape[1]), x),
}


def written_by(change, x):
    x = x[:, :3].clone()
    change(x)
    return x


@pytest.mark.parametrize("taken", TAKEN.values(), ids=TAKEN)
def test_what_a_width_takes_from_an_input_stays(taken):
    """By rule: without the proof, and without a trial run that would freeze a group."""
    model, x = Told(taken).double(), torch.randn(3, 8).double()
    result = depgraph.prune(model, x, pruning_ratio=0.5, verify=False)
    assert not any("stay whole" in note for note in result.report.to_dict().get("notes", ()))
    assert_equal_to_masked(model, result, x)


class OneKey(nn.Module):
    """Heads of queries that share one key and value, which are repeated for each; their dim is put in."""

    def __init__(self, put_in):
        super().__init__()
        self.heads, self.put_in = 4, put_in
        self.q, self.kv, self.out = nn.Linear(5, 4 * 6), nn.Linear(5, 12), nn.Linear(24, 3)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (-1, 6)).transpose(1, 2)
        k, v = (self.repeated(self.put_in(t)) for t in self.kv(x).chunk(2, -1))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def repeated(self, t):
        batch, keys, length, width = t.shape
        t = t[:, :, None].expand(batch, keys, self.heads, length, width)
        return t.reshape(batch, keys * self.heads, length, width)


@pytest.mark.parametrize(
    "put_in",
    [
        lambda t: t[:, None],
        lambda t: t.unsqueeze(2).transpose(1, 2),
        lambda t: t.unsqueeze(-1).permute(0, 3, 1, 2),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_dim_that_is_put_in_is_1_for_all_inputs(put_in, batch):
    torch.manual_seed(0)
    model, x = OneKey(put_in).eval(), torch.randn(batch, 7, 5)
    result = depgraph.prune(model, x, pruning_ratio=0.5, progress=False)
    assert result.model.q.out_features == 12
    assert result.model.heads == 2
    for other in (x, torch.randn(3, 4, 5), torch.randn(1, 2, 5)):
        assert_equal_to_masked(model, result, other, 1e-5)


def test_a_dim_of_one_that_an_input_has_may_be_another():
    """Two keys in another input would be repeated to two heads each."""

    class Given(OneKey):
        def forward(self, x, keys):
            q = self.q(x).unflatten(-1, (-1, 6)).transpose(1, 2)
            k, v = (self.repeated(t) for t in self.kv(keys).chunk(2, -1))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = Given(None).eval()
    with pytest.raises(depgraph.NothingToPruneError, match="is divided in reshape by a size of an input"):
        depgraph.prune(model, (torch.randn(2, 7, 5), torch.randn(2, 1, 7, 5)))
