"""Each criterion against a plain computation of its formula: loops over the entries that are known, by hand, to go with a unit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from versions import on_new_torch

import depgraph
from depgraph import Calibration, InputError
from depgraph.importance import (
    CRITERIA,
    L1,
    L2,
    ConsumerNorm,
    Correlation,
    Fisher,
    GeometricMedian,
    Hessian,
    Magnitude,
    Obs,
    Random,
    Redundancy,
    Scale,
    Taylor,
)

Piece = tuple[str, Any]  # a parameter, and the index of the entries in it


class Residual(nn.Module):
    """A stream of 7 channels with a square convolution on it, batch norms, and a group that only the branch has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.rise, self.inner = nn.Conv2d(7, 11, 1, bias=False), nn.BatchNorm2d(11)
        self.fall, self.square = nn.Conv2d(11, 7, 1), nn.Conv2d(7, 7, 1)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.stem(x)))
        x = x + self.fall(torch.sigmoid(self.inner(self.rise(x))))
        return self.head((x + self.square(x)).mean((2, 3)))


class Grouped(nn.Module):
    """A convolution in two groups of 3 -> 5 channels: each group has units of its own on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.grouped, self.leave = (
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(6, 10, 3, groups=2),
            nn.Linear(10, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.grouped(torch.tanh(self.enter(x)))).mean((2, 3)))


class Heads(nn.Module):
    """Attention of 7 heads of 5: a unit of the heads is 5 rows of each of q, k and v, and 5 columns of out."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 7
        self.qkv, self.out, self.last = nn.Linear(11, 3 * 7 * 5), nn.Linear(35, 11), nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = torch.softmax(q @ k.transpose(2, 3) * 0.4, -1) @ v
        return self.last(torch.tanh(self.out(y.transpose(1, 2).flatten(2)))).mean(1)


class Experts(nn.Module):
    """Stacked weights of 3 experts: a hidden unit goes from all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Parameter(torch.randn(3, 11, 7)), nn.Parameter(torch.randn(3, 5, 11))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ech,enh->nc", self.fall, torch.tanh(torch.einsum("ehc,nc->enh", self.rise, x)))


class Stacked(Experts):
    """The same, and what each expert says stays apart: three matrices that have their columns' units in common."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("ehc,nc->enh", self.rise, x))
        return torch.einsum("ech,enh->nec", self.fall, hidden).sum(1)


class Tied(nn.Module):
    """One matrix that embeds and reads out: its columns go once."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.read = (
            nn.Embedding(13, 7),
            nn.Linear(7, 7, bias=False),
            nn.Linear(7, 13, bias=False),
        )
        self.read.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.read(x + torch.tanh(self.inner(x))).mean(1)


def _residual(u: int) -> list[Piece]:
    rows = [(f"{m}.{p}", u) for m in ("stem", "norm", "fall", "square") for p in ("weight", "bias")]
    return [*rows, ("rise.weight", (slice(None), u)), ("square.weight", (slice(None), u)),
            ("head.weight", (slice(None), u))]  # fmt: skip


def _branch(u: int) -> list[Piece]:
    rows = [("rise.weight", u), ("inner.weight", u), ("inner.bias", u)]
    return [*rows, ("fall.weight", (slice(None), u))]


def _inputs_of_block(u: int) -> list[Piece]:
    return [("enter.weight", 3 + u), ("enter.bias", 3 + u), ("grouped.weight", (slice(5, 10), u))]


def _outputs_of_block(u: int) -> list[Piece]:
    return [("grouped.weight", 5 + u), ("grouped.bias", 5 + u), ("leave.weight", (slice(None), 5 + u))]


def _heads(u: int) -> list[Piece]:
    rows = [35 * part + 5 * u + i for part in range(3) for i in range(5)]
    return [("qkv.weight", rows), ("qkv.bias", rows), ("out.weight", (slice(None), [5 * u + i for i in range(5)]))]  # fmt: skip


def _experts(u: int) -> list[Piece]:
    return [("rise", (slice(None), u)), ("fall", (slice(None), slice(None), u))]


def _tied(u: int) -> list[Piece]:
    return [("embed.weight", (slice(None), u)), ("inner.weight", u), ("inner.weight", (slice(None), u))]


@dataclass
class Case:
    """A network, and one of its groups: how to find it, and the entries that go with each unit."""

    make: Callable[[], nn.Module]
    place: tuple[str, int, int, int]  # tensor, dim, position of unit 0 there, units
    pieces: Callable[[int], list[Piece]]
    inputs: Callable[[int], Tensor]

    def __call__(self, count: int = 4) -> Problem:
        torch.manual_seed(5)
        model = self.make().double()
        for p in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            p.data.uniform_(0.1, 0.9) if "running_var" in str(p.shape) else p.data.normal_(0, 0.6)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_var.uniform_(0.5, 2)
        batches = [(self.inputs(3), torch.randint(0, 5, (3,))) for _ in range(count)]
        graph = depgraph.analyze(model, batches[0][0])
        name, dim, first, units = self.place
        (group,) = [
            g
            for g in graph.groups
            if g.units == units
            and any((m.name, m.dim, m.indices[0, 0]) == (name, dim, first) for m in g.members)
        ]
        return Problem(model, batches, graph, group, [self.pieces(u) for u in range(units)])


@dataclass
class Problem:
    """What `Case` makes."""

    model: nn.Module
    batches: list[Any]
    graph: depgraph.DependencyGraph
    group: depgraph.Group
    pieces: list[list[Piece]]

    def data(self, **given: Any) -> Calibration:
        return Calibration(
            self.batches, self.batches[0][0], given.get("loss", nn.functional.cross_entropy), False
        )

    def scores(self, criterion: Any, **given: Any) -> np.ndarray:
        return depgraph.scores_of(self.graph, criterion, calibration=self.data(**given))[self.group.name]

    def slices(self, tensors: dict[str, Tensor]) -> list[list[Tensor]]:
        """For each unit, the entries of each member."""
        return [[tensors[name].detach()[index] for name, index in unit] for unit in self.pieces]

    def weights(self) -> list[list[Tensor]]:
        return self.slices(dict(self.model.named_parameters()))

    def gradients(self, batches: list[Any]) -> list[dict[str, Tensor]]:
        """The gradients of the loss of each batch, by a backward pass on a copy."""
        found = []
        for x, target in batches:
            twin = copy.deepcopy(self.model).eval()
            nn.functional.cross_entropy(twin(x), target).backward()
            found.append({n: p.grad for n, p in twin.named_parameters()})
        return found


def pictures(n: int) -> Tensor:
    return torch.randn(n, 3, 5, 5, dtype=torch.float64)


CASES = {
    "stream": Case(Residual, ("stem.weight", 0, 0, 7), _residual, pictures),
    "branch": Case(Residual, ("rise.weight", 0, 0, 11), _branch, pictures),
    "inputs of a block": Case(Grouped, ("enter.weight", 0, 3, 3), _inputs_of_block, pictures),
    "outputs of a block": Case(Grouped, ("grouped.weight", 0, 5, 5), _outputs_of_block, pictures),
    "heads": Case(Heads, ("out.weight", 1, 0, 7), _heads, lambda n: torch.randn(n, 4, 11, dtype=torch.float64)),
    "experts": Case(Experts, ("rise", 1, 0, 11), _experts, lambda n: torch.randn(n, 7, dtype=torch.float64)),
    "stacked": Case(Stacked, ("rise", 1, 0, 11), _experts, lambda n: torch.randn(n, 7, dtype=torch.float64)),
    "tied": Case(Tied, ("embed.weight", 1, 0, 7), _tied, lambda n: torch.randint(0, 13, (n, 6))),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def flat(unit: list[Tensor]) -> list[float]:
    return [float(x) for piece in unit for x in piece.flatten()]


def close(found: Any, expected: Any, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(found, np.asarray([float(e) for e in expected]), rtol=rtol)


# ------------------------------------------------------------------------------------------------ weights alone


@each_case
def test_magnitude_is_the_norm_of_all_entries_that_go_with_a_unit(case: Case) -> None:
    p = case()
    close(p.scores("l1"), [sum(abs(x) for x in flat(unit)) for unit in p.weights()])
    close(p.scores("l2"), [math.sqrt(sum(x * x for x in flat(unit))) for unit in p.weights()])


@pytest.mark.slow
@each_case
@pytest.mark.parametrize("p_", [1, 2])
def test_reductions_are_over_members(case: Case, p_: int) -> None:
    p = case()
    norms = [[sum(abs(x) ** p_ for x in flat([piece])) for piece in unit] for unit in p.weights()]
    ways: dict[str, Callable[[list[float]], float]] = {
        "sum": sum,
        "mean": lambda v: sum(v) / len(v),
        "max": max,
        "product": lambda v: math.prod(v) ** (1 / len(v)),
        "first": lambda v: v[0],
    }
    for name, way in ways.items():
        if name == "first" and case.place[0] != p.group.name.partition(":")[0]:
            continue
        close(p.scores(Magnitude(p_, reduce=name)), [way(v) ** (1 / p_) for v in norms])


def test_the_first_member_is_the_one_that_the_group_is_named_after() -> None:
    p = CASES["heads"]()
    assert p.group.name == "qkv.weight:0[0:35:5]"
    close(
        p.scores(L2(reduce="first")), [math.sqrt(sum(x * x for x in flat(unit[:1]))) for unit in p.weights()]
    )


def test_lamp_is_the_share_in_what_is_not_smaller() -> None:
    p = CASES["branch"]()
    raw = p.scores("l2").tolist()
    close(p.scores("lamp"), [s**2 / sum(t**2 for t in raw if t >= s) for s in raw])
    assert p.scores("lamp").max() == 1


def test_lamp_of_equal_units_is_that_of_their_order() -> None:
    net = nn.Sequential(nn.Linear(2, 5, bias=False), nn.Tanh(), nn.Linear(5, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([3.0, 1, 2, 1, 2])[:, None].expand(5, 2))
        net[2].weight.zero_()
    graph = depgraph.analyze(net, torch.randn(3, 2))
    found = depgraph.scores_of(graph, "lamp")[graph.groups[0].name]
    close(found, [1, 1 / 19, 4 / 17, 1 / 18, 4 / 13], 1e-6)


def test_roles_choose_the_members_that_count() -> None:
    p = CASES["branch"]()
    units = p.weights()  # rise, weight and bias of the norm, fall
    close(p.scores(L1(roles=["produces"])), [sum(map(abs, flat(u[:1]))) for u in units])
    close(p.scores(L1(roles=("scales",))), [sum(map(abs, flat(u[1:3]))) for u in units])
    reading = [math.sqrt(sum(x * x for x in flat(u[3:]))) for u in units]
    close(p.scores("consumer_norm"), reading)
    close(p.scores(ConsumerNorm()), reading)
    close(p.scores(L2(roles=["consumes"])), reading)


def test_a_square_weight_produces_one_side_and_consumes_the_other() -> None:
    p = CASES["stream"]()
    units = p.weights()  # stem, norm, fall, square: weight and bias of each; then what reads the stream
    close(p.scores(L1(roles=["produces"])), [sum(map(abs, flat([u[0], u[4], u[6]]))) for u in units])
    close(p.scores("consumer_norm"), [math.sqrt(sum(x * x for x in flat(u[8:]))) for u in units])

    class Turned(nn.Module):
        """The weights' first dim is the one that is consumed."""

        def __init__(self) -> None:
            super().__init__()
            self.enter, self.up = nn.Conv2d(3, 7, 1), nn.ConvTranspose2d(7, 7, 1)
            self.mix = nn.Parameter(torch.randn(7, 7))
            self.leave = nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            x = (x + self.up(x)).mean((2, 3))
            return self.leave(x + x @ self.mix)

    (group,) = depgraph.analyze(Turned(), torch.randn(2, 3, 5, 5)).groups
    roles = {(m.name, m.dim): m.role for m in group.members}
    assert roles["up.weight", 0] == roles["mix", 0] == roles["leave.weight", 1] == "consumes"
    assert roles["up.weight", 1] == roles["mix", 1] == roles["enter.weight", 0] == "produces"


def test_a_group_that_no_weight_consumes_counts_all_its_members() -> None:
    class Similarity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 7), nn.Linear(3, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) @ self.right(x).T

    graph = depgraph.analyze(Similarity(), torch.randn(2, 3))
    (group,) = graph.groups
    both = [depgraph.scores_of(graph, c)[group.name].tolist() for c in ("consumer_norm", "l2")]
    assert both[0] == both[1]
    assert min(both[0]) > 0


@each_case
def test_the_distance_to_all_others_is_that_of_whole_units(case: Case) -> None:
    p = case()
    vectors = [torch.tensor(flat(unit)) for unit in p.weights()]
    expected = [sum(float((a.double() - b.double()).norm()) for b in vectors) for a in vectors]
    close(p.scores("fpgm"), expected, rtol=1e-5)


def test_distances_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    p = CASES["branch"]()
    at_once = p.scores("fpgm")
    monkeypatch.setattr("depgraph.importance.magnitude.BLOCK", 35)  # 3 of 11 units at a time
    close(p.scores(GeometricMedian()), at_once)
    filters = [torch.tensor(flat(unit[:1]), dtype=torch.float64) for unit in p.weights()]
    close(
        p.scores(GeometricMedian(roles=["produces"])), [sum((a - b).norm() for b in filters) for a in filters]
    )


def test_distances_far_from_zero_keep_their_precision() -> None:
    """Weights of about a thousand that differ by about one, in float32."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 11, bias=False), nn.Tanh(), nn.Linear(11, 3))
    with torch.no_grad():
        net[0].weight.add_(1000)
    graph = depgraph.analyze(net, torch.randn(2, 5))
    found = depgraph.scores_of(graph, "fpgm")[graph.groups[0].name]
    units = torch.cat([net[0].weight, net[2].weight.T], 1).detach().double()
    close(found, torch.cdist(units, units, compute_mode="donot_use_mm_for_euclid_dist").sum(1), 1e-3)


def test_scales_are_those_of_norms_and_of_products() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.norm, self.slope = nn.Linear(3, 7), nn.LayerNorm(7), nn.PReLU(7)
            self.gain, self.shift = nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(7))
            self.leave, self.last = nn.Linear(7, 5), nn.Linear(5, 2)
            self.register_buffer("fixed", torch.randn(7))  # no parameter: does not count

        def forward(self, x: Tensor) -> Tensor:
            x = self.slope(self.norm(self.enter(x))) * self.gain.view(1, -1) * self.fixed + self.shift
            return self.last(self.leave(x))

    net, x = Net(), torch.randn(2, 3)
    nn.init.normal_(net.norm.weight)
    graph = depgraph.analyze(net, x)
    scored, plain = graph.groups
    scores = depgraph.scores_of(graph, "bn_scale")
    close(scores[scored.name], net.norm.weight.detach().abs() + net.gain.detach().abs(), 1e-6)
    close(scores[plain.name], depgraph.scores_of(graph, "l1")[plain.name])
    other = depgraph.scores_of(graph, Scale(otherwise=Random(3)))[plain.name]
    assert other.tolist() == depgraph.scores_of(graph, Random(3))[plain.name].tolist()


def test_batch_norms_of_a_stream_add_up() -> None:
    p = CASES["stream"]()
    close(p.scores("bn_scale"), p.model.norm.weight.detach().abs())
    p = CASES["branch"]()
    close(p.scores("bn_scale"), p.model.inner.weight.detach().abs())
    q = CASES["experts"]()
    with pytest.raises(InputError, match="no norm with a scale"):
        q.scores("bn_scale")


def test_random_scores_are_those_of_their_seed() -> None:
    p = CASES["stream"]()
    every = [depgraph.scores_of(p.graph, Random(seed)) for seed in (0, 0, 1)]
    assert all((every[0][k] == every[1][k]).all() and (every[0][k] != every[2][k]).all() for k in every[0])
    first, second = (every[0][g.name][:5] for g in p.graph.groups[:2])
    assert (first != second).all()


# ----------------------------------------------------------------------------------------------------- gradients


def joint(p: Problem, gradients: dict[str, Tensor]) -> list[float]:
    """sum w·g over each unit."""
    pairs = zip(p.weights(), p.slices(gradients), strict=True)
    return [sum(w * g for w, g in zip(flat(ws), flat(gs), strict=True)) for ws, gs in pairs]


def apart(p: Problem, gradients: dict[str, Tensor], power: int) -> list[float]:
    """sum |w·g|^power over each unit."""
    pairs = zip(p.weights(), p.slices(gradients), strict=True)
    return [sum(abs(w * g) ** power for w, g in zip(flat(ws), flat(gs), strict=True)) for ws, gs in pairs]


def mean_of(gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {n: sum(g[n] for g in gradients) / len(gradients) for n in gradients[0]}  # type: ignore[misc]


def mean(values: list[list[float]]) -> list[float]:
    return [sum(column) / len(values) for column in zip(*values, strict=True)]


def one_by_one(batches: list[Any]) -> list[Any]:
    return [(x[i : i + 1], t[i : i + 1]) for x, t in batches for i in range(len(x))]


@pytest.mark.slow
@each_case
def test_first_order_criteria(case: Case) -> None:
    p = case()
    by_batch, by_sample = p.gradients(p.batches), p.gradients(one_by_one(p.batches))
    whole = mean_of(by_batch)
    close(p.scores("taylor"), [abs(s) for s in joint(p, whole)])
    close(p.scores("taylor_entries"), apart(p, whole, 1))
    close(p.scores("gradient"), [sum(abs(g) for g in flat(gs)) for gs in p.slices(whole)])
    close(p.scores("taylor_squared"), mean([[s * s for s in joint(p, g)] for g in by_batch]))
    close(p.scores("taylor_samples"), mean([[s * s for s in joint(p, g)] for g in by_sample]))
    close(p.scores("fisher"), [s / 2 for s in mean([apart(p, g, 2) for g in by_sample])])
    close(p.scores(Fisher(per="batch")), [s / 2 for s in mean([apart(p, g, 2) for g in by_batch])])
    close(p.scores(Taylor(power=2)), [s * s for s in joint(p, whole)])
    close(p.scores(Taylor(per="sample")), mean([[abs(s) for s in joint(p, g)] for g in by_sample]))
    close(p.scores(Taylor(True, 1, "batch")), mean([apart(p, g, 1) for g in by_batch]))
    close(p.scores(Taylor(True, 2, "all")), apart(p, whole, 2))


@pytest.mark.slow
def test_the_hessian_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double(), torch.randn(5, 2).double()
    target = torch.randint(0, 2, (5,))
    names = [n for n, _ in net.named_parameters()]

    def loss(*given: Tensor) -> Tensor:
        out = torch.func.functional_call(net, dict(zip(names, given, strict=True)), (x,))
        return nn.functional.cross_entropy(out, target)

    values = tuple(p.detach() for p in net.parameters())
    whole: Any = torch.autograd.functional.hessian(loss, values)
    diagonal = {
        n: torch.stack([whole[i][i].reshape(v.numel(), -1)[k, k] for k in range(v.numel())]).reshape(v.shape)
        for i, (n, v) in enumerate(zip(names, values, strict=True))
    }
    terms = {n: (v**2 * diagonal[n]) for n, v in zip(names, values, strict=True)}
    expected = [
        abs(sum(flat([terms["0.weight"][u], terms["0.bias"][u], terms["2.weight"][:, u]]))) / 2
        for u in range(3)
    ]
    graph = depgraph.analyze(net, x)
    data = Calibration([(x, target)], x, nn.functional.cross_entropy, False)
    key = graph.groups[0].name
    found = depgraph.scores_of(graph, Hessian(draws=2000), calibration=data)[key]
    np.testing.assert_allclose(found, expected, atol=0.02)  # one draw alone has a deviation of 0.2
    few = [
        depgraph.scores_of(graph, Hessian(draws=7, seed=s), calibration=data)[key].tolist() for s in (0, 0, 1)
    ]
    assert few[0] == few[1] != few[2]
    # Over the rows of a Hadamard matrix the products of different signs cancel: 16 draws give the diagonal of 15 weights.
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    served = iter(row[1:].split([6, 3, 6]) for row in hadamard)
    pending: list[Tensor] = []

    def signs(like: Tensor, generator: torch.Generator) -> Tensor:
        if not pending:
            pending.extend(next(served))
        return pending.pop(0).reshape(like.shape)

    monkeypatch.setattr("depgraph.importance.gradient._signs", signs)
    close(depgraph.scores_of(graph, Hessian(draws=16), calibration=data)[key], expected)


def test_the_hessian_of_complex_weights_is_that_of_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of sum c (re w)^2 + d (im w)^2 has 2 c and 2 d on its diagonal."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.last = (
                nn.Parameter(torch.randn(7, 3, dtype=torch.complex128)),
                nn.Linear(7, 2).double(),
            )

        def forward(self, x: Tensor) -> Tensor:
            hidden = (x.to(self.w.dtype) @ self.w.T).real
            return torch.cat([self.last(hidden), self.w.real.square().sum()[None, None].expand(len(x), 1) * 3,
                              self.w.imag.square().sum()[None, None].expand(len(x), 1) * 5], 1)  # fmt: skip

    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 3).double()
    graph = depgraph.analyze(net, x)
    data = Calibration([(x, x)], x, lambda out, _: out[0, 2] + out[0, 3], False)
    found = depgraph.scores_of(graph, Hessian(draws=3), calibration=data)[graph.groups[0].name]
    w = net.w.detach()
    close(found, (6 * w.real.square() + 10 * w.imag.square()).sum(1) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_of_narrow_models_are_summed_wide(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(11, 523), nn.Tanh(), nn.Linear(523, 3)).to(dtype)
    x = torch.randn(3, 11).to(dtype)
    graph = depgraph.analyze(net, x)
    wide = copy.deepcopy(net).double()
    first, bias, last = wide[0].weight.detach(), wide[0].bias.detach(), wide[2].weight.detach()
    scores = {name: depgraph.scores_of(graph, name)[graph.groups[0].name] for name in ("l1", "l2")}
    close(scores["l1"], first.abs().sum(1) + bias.abs() + last.abs().sum(0), 1e-5)
    close(scores["l2"], (first.square().sum(1) + bias.square() + last.square().sum(0)).sqrt(), 1e-5)
    data = Calibration([(x, torch.tensor([0, 2, 1]))], x, nn.functional.cross_entropy, False)
    twin = copy.deepcopy(net)
    nn.functional.cross_entropy(twin(x), torch.tensor([0, 2, 1])).backward()
    g = {n: p.grad.double() for n, p in twin.named_parameters()}
    entries = (
        (first * g["0.weight"]).abs().sum(1)
        + (bias * g["0.bias"]).abs()
        + (last * g["2.weight"]).abs().sum(0)
    )
    found = depgraph.scores_of(graph, "taylor_entries", calibration=data)[graph.groups[0].name]
    close(found, entries, 1e-4)


# -------------------------------------------------------------------------------------------- what consumers are given


@dataclass
class Read:
    """What one consumer of a unit is given, found by hand.

    Attributes:
        plain: [samples, width] inputs; of a convolution, of every position of the image.
        windows: [samples, width * positions] what meets the weights.
        weight: [rows, width, positions].
        columns: unit -> its columns.
    """

    plain: Tensor
    windows: Tensor
    weight: Tensor
    columns: Callable[[int], list[int]]

    def entries(self, u: int) -> list[int]:
        positions = self.weight.shape[2]
        return [j * positions + i for j in self.columns(u) for i in range(positions)]


def given_to(p: Problem, name: str) -> Tensor:
    """The inputs of a module, of all batches."""
    found: list[Tensor] = []
    twin = copy.deepcopy(p.model).eval()
    twin.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    for x, _ in p.batches:
        twin(x)
    return torch.cat(found)


def read(p: Problem, name: str, columns: Callable[[int], list[int]] = lambda u: [u]) -> Read:
    module = p.model.get_submodule(name)
    x, weight = given_to(p, name), module.weight.detach()
    if weight.dim() == 2:
        return Read(x.flatten(0, -2), x.flatten(0, -2), weight[:, :, None], columns)
    windows = nn.functional.unfold(x, weight.shape[2:]).transpose(1, 2).flatten(0, 1)
    return Read(x.movedim(1, -1).flatten(0, -2), windows, weight.flatten(2), columns)


def _second_block(p: Problem) -> list[Read]:
    whole = read(p, "grouped")
    part = Read(whole.plain[:, 3:], whole.windows[:, 27:], whole.weight[5:], lambda u: [u])
    return [part]


def _all_experts(p: Problem) -> list[Read]:
    """The sum is over experts, too: one matrix of 3 x 11 columns."""
    x = torch.cat([x for x, _ in p.batches])
    hidden = torch.tanh(torch.stack([x @ p.model.rise[e].T for e in range(3)], 1)).detach().flatten(1)
    weight = torch.cat(list(p.model.fall.detach()), 1)[:, :, None]
    return [Read(hidden, hidden, weight, lambda u: [u, 11 + u, 22 + u])]


def _each_expert(p: Problem) -> list[Read]:
    x = torch.cat([x for x, _ in p.batches])
    hidden = [torch.tanh(x @ p.model.rise[e].T).detach() for e in range(3)]
    return [Read(h, h, p.model.fall[e].detach()[:, :, None], lambda u: [u]) for e, h in enumerate(hidden)]


READS: dict[str, Callable[[Problem], list[Read]]] = {
    "stream": lambda p: [read(p, "rise"), read(p, "square"), read(p, "head")],
    "branch": lambda p: [read(p, "fall")],
    "inputs of a block": _second_block,
    "outputs of a block": lambda p: [read(p, "leave", lambda u: [5 + u])],
    "heads": lambda p: [read(p, "out", lambda u: [5 * u + i for i in range(5)])],
    "experts": _all_experts,
    "stacked": _each_expert,
    "tied": lambda p: [read(p, "inner"), read(p, "read")],
}
each_read = pytest.mark.parametrize("name", READS)


@each_read
def test_statistics_of_what_consumers_are_given(name: str) -> None:
    p = CASES[name]()
    found = READS[name](p)
    units = range(p.group.units)

    def added(score: Callable[[Read, int], float]) -> list[float]:
        return [sum(score(r, j) for r in found for j in r.columns(u)) for u in units]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def variance(values: list[float]) -> float:
        return sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1)

    def inputs(r: Read, j: int) -> list[float]:
        return r.plain[:, j].tolist()

    def weights(r: Read, j: int) -> list[float]:
        return r.weight[:, j].flatten().tolist()

    close(p.scores("activation_mean"), added(lambda r, j: mean([abs(v) for v in inputs(r, j)])))
    close(p.scores("activation_variance"), added(lambda r, j: variance(inputs(r, j))))
    close(p.scores("wanda"), added(lambda r, j: sum(map(abs, weights(r, j))) * math.sqrt(mean([v * v for v in inputs(r, j)]))))  # fmt: skip
    close(p.scores("flap"), added(lambda r, j: sum(w * w for w in weights(r, j)) * variance(inputs(r, j))))


def least_error(x: Tensor, y: Tensor, without: list[int]) -> float:
    """Mean squared distance of y from the nearest linear function of the columns of x that are left."""
    rest = [j for j in range(x.shape[1]) if j not in without]
    fitted = x[:, rest] @ torch.linalg.lstsq(x[:, rest], y, driver="gelsd").solution if rest else 0 * y
    return float((y - fitted).square().sum()) / len(x)


@pytest.mark.slow
@each_read
def test_obs_is_the_error_after_the_best_update(name: str) -> None:
    p = CASES[name](20)
    found = READS[name](p)

    def errors(centred: bool) -> list[float]:
        totals = [0.0] * p.group.units
        for r in found:
            x = r.windows - r.windows.mean(0) * centred
            for u in range(p.group.units):
                totals[u] += least_error(x, x @ r.weight.flatten(1).T, r.entries(u))
        return totals

    close(p.scores(Obs(damping=0)), errors(False), rtol=1e-6)
    close(p.scores(Obs(damping=0, bias=True)), errors(True), rtol=1e-6)


def test_damping_is_ridge_regression() -> None:
    p = CASES["branch"](20)
    (r,) = READS["branch"](p)
    x, w, n = r.windows, r.weight.flatten(1), len(r.windows)
    ridge = 0.3 * float((x.T @ x / n).diagonal().mean())
    expected = []
    for u in range(11):
        rest = [j for j in range(11) if j != u]
        # || x (w - v) ||^2 / n + ridge |w - v|^2, the column of u in v zero: more rows of the same problem
        big = torch.cat([x, math.sqrt(ridge * n) * torch.eye(11, dtype=x.dtype)])
        v = torch.linalg.lstsq(big[:, rest], big @ w.T).solution
        expected.append(float((big @ w.T - big[:, rest] @ v).square().sum()) / n)
    close(p.scores(Obs(damping=0.3)), expected)


def test_consumers_of_one_input_are_solved_once_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(3, 7)
            self.q, self.k, self.v = nn.Linear(7, 5), nn.Linear(7, 5), nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.enter(x))
            return torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)

    net, data = Attention().double(), [torch.randn(5, 11, 3).double() for _ in range(3)]
    graph = depgraph.analyze(net, data[0])
    group = next(g for g in graph.groups if g.units == 7)
    solved: list[int] = []
    inverse = Obs.inverse

    def counting(self: Obs, moments: Tensor) -> Tensor:
        solved.append(len(moments))
        return inverse(self, moments)

    monkeypatch.setattr(Obs, "inverse", counting)
    found = depgraph.scores_of(graph, Obs(0), calibration=Calibration(data, data[0], None, False))
    x = torch.tanh(net.enter(torch.cat(data))).detach().flatten(0, 1)
    readers = [net.q, net.k, net.v]
    close(
        found[group.name],
        [sum(least_error(x, x @ r.weight.detach().T, [u]) for r in readers) for u in range(7)],
        1e-6,
    )
    assert solved == [7]  # what reads the values is the model's output


@pytest.mark.slow
@each_read
def test_redundancy_is_what_others_do_not_predict(name: str) -> None:
    p = CASES[name](20)
    shares = []
    for r in READS[name](p):
        x = r.plain - r.plain.mean(0)
        columns = [r.columns(u) for u in range(p.group.units)]
        shares.append(
            [least_error(x, x[:, js], js) / float(x[:, js].square().sum(1).mean()) for js in columns]
        )
    close(p.scores(Redundancy(damping=0)), mean(shares), rtol=1e-6)


@pytest.mark.slow
@each_read
def test_correlation_is_that_with_the_most_parallel_unit(name: str) -> None:
    p = CASES[name]()
    scores = []
    for r in READS[name](p):
        x = r.plain - r.plain.mean(0)
        units = [x[:, r.columns(u)].flatten() for u in range(p.group.units)]
        scores.append(
            [
                1 - max(abs(float(a @ b / (a.norm() * b.norm()))) for j, b in enumerate(units) if i != j)
                for i, a in enumerate(units)
            ]
        )
    close(p.scores("correlation"), mean(scores), rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", [Redundancy(1e-9), Correlation(), Obs(1e-9)])
def test_copies_of_a_unit_are_found(criterion: Any) -> None:
    p = CASES["branch"](20)
    before = p.scores(criterion)[[4, 9]]
    norm = p.model.inner
    with torch.no_grad():
        for tensor in (p.model.rise.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor[4] = tensor[9]
    assert p.scores(criterion)[[4, 9]].max() < 0.02 * before.min()


class Counted(list):  # type: ignore[type-arg]
    """Batches that count how often they are gone through."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        yield from super().__iter__()


@pytest.mark.slow
@pytest.mark.parametrize("criterion", [Obs, Redundancy, Correlation])
def test_memory_is_bounded_by_more_passes(criterion: Any) -> None:
    p = CASES["stream"](20)
    batches = Counted(p.batches)
    p.batches = batches
    close(p.scores(criterion(memory=1)), p.scores(criterion()))
    batches.passes = 0
    p.scores(criterion())
    assert batches.passes == 1
    p.scores(criterion(memory=1))
    assert batches.passes == 1 + 4  # rise, square and head for the stream, fall for the branch
    p.scores(criterion(memory=8 * (7 * 7 + 7 * 7)))
    assert batches.passes == 5 + 3


def test_wide_consumers_are_taken_apart() -> None:
    p = CASES["heads"](20)
    (r,) = READS["heads"](p)
    expected = []
    for heads in ([0, 1, 2], [3, 4, 5], [6]):  # at most 17 columns: three heads of 5
        columns = [j for h in heads for j in r.columns(h)]
        x = r.plain[:, columns]
        y = x @ r.weight[:, columns, 0].T
        expected += [least_error(x, y, list(range(5 * i, 5 * i + 5))) for i in range(len(heads))]
    close(p.scores(Obs(damping=0, widest=17)), expected, rtol=1e-6)


@pytest.mark.parametrize(("widest", "runs"), [(9, [[0], [1], [2]]), (19, [[0, 1], [2]])])
def test_wide_blocks_of_a_convolution_are_taken_apart(widest: int, runs: list[list[int]]) -> None:
    """Units of 9 columns in the second block of 27: each run sees its own columns of its own block alone."""
    p = CASES["inputs of a block"](20)
    (r,) = READS["inputs of a block"](p)
    errors, shares = [], []
    for units in runs:
        columns = [j for u in units for j in r.entries(u)]
        x = r.windows[:, columns]
        y = x @ r.weight.flatten(1)[:, columns].T
        errors += [least_error(x, y, list(range(9 * i, 9 * i + 9))) for i in range(len(units))]
    close(p.scores(Obs(damping=0, widest=widest)), errors, rtol=1e-6)
    for units in ([0, 1], [2]):  # without windows a unit has one column
        x = (r.plain - r.plain.mean(0))[:, units]
        shares += [least_error(x, x[:, [i]], [i]) / float(x[:, i].square().mean()) for i in range(len(units))]
    close(p.scores(Redundancy(damping=0, widest=2)), shares, rtol=1e-6)


def test_a_unit_that_does_not_vary_can_be_spared() -> None:
    """Of one that is always 0 and of one that is always 0.3, up to rounding, correlations are those of noise."""
    torch.manual_seed(3)
    net, batches = (
        nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2)),
        [torch.randn(53, 3) for _ in range(3)],
    )
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2], net[0].bias[5] = 0, 0.3, -90
    graph = depgraph.analyze(net, batches[0])
    for criterion in ("correlation", "redundancy"):
        data = Calibration(batches, batches[0], None, False)
        found = depgraph.scores_of(graph, criterion, calibration=data)[graph.groups[0].name]
        assert (found == 0).nonzero()[0].tolist() == [2, 5]
    x = net[:2](torch.cat(batches)).detach()[:, [0, 1, 3, 4, 6]]
    others = 1 - (torch.corrcoef(x.T).abs() - torch.eye(5)).amax(1)
    data = Calibration(batches, batches[0], None, False)
    found = depgraph.scores_of(graph, "correlation", calibration=data)[graph.groups[0].name]
    close(found[[0, 1, 3, 4, 6]], others, 1e-4)


@pytest.mark.parametrize("criterion", [Redundancy(), Correlation(), Obs(bias=True)])
def test_covariances_far_from_zero_keep_their_precision(criterion: Any) -> None:
    """Values of about a thousand that vary by one, in float32."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 7), nn.LeakyReLU(0.1), nn.Linear(7, 2))
    hidden = nn.Linear(7, 11)
    with torch.no_grad():
        hidden.bias += 1000
    net = nn.Sequential(*net[:2], hidden, nn.Linear(11, 5))
    batches = [torch.randn(53, 3) for _ in range(3)]
    found = []
    for dtype in (torch.float32, torch.float64):
        model, data = copy.deepcopy(net).to(dtype), [b.to(dtype) for b in batches]
        graph = depgraph.analyze(model, data[0])
        group = next(g for g in graph.groups if g.units == 11)
        given = Calibration(data, data[0], None, False)
        found.append(depgraph.scores_of(graph, criterion, calibration=given)[group.name])
    np.testing.assert_allclose(found[0], found[1], rtol=0.05, atol=1e-4)


class Runs(nn.Module):
    """Three experts, given 2, 11 and 7 of 20 rows; hidden units go by fours, as the kernel asks."""

    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Parameter(torch.randn(3, 8, 28)), nn.Parameter(torch.randn(3, 28, 4))
        self.register_buffer("ends", torch.tensor([2, 13, 20], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch._grouped_mm(x, self.rise, offs=self.ends) / 4)
        return torch._grouped_mm(hidden, self.fall, offs=self.ends)


@on_new_torch
def test_experts_count_by_their_share_of_the_samples() -> None:
    torch.manual_seed(1)
    net, batches = Runs().eval(), [torch.randn(20, 8) for _ in range(30)]
    graph = depgraph.analyze(net, batches[0])
    group = next(g for g in graph.groups if g.units == 7)
    rows = [torch.cat([b[i:j] for b in batches]).double() for i, j in ((0, 2), (2, 13), (13, 20))]
    hidden = [torch.tanh(x @ net.rise[e].double() / 4).detach() for e, x in enumerate(rows)]
    weights = [net.fall[e].detach().double() for e in range(3)]  # [28, 4]
    shares, units = [2 / 11, 1, 7 / 11], [list(range(4 * u, 4 * u + 4)) for u in range(7)]

    def found(criterion: Any) -> Any:
        data = Calibration(batches, batches[0], None, False)
        return depgraph.scores_of(graph, criterion, calibration=data)[group.name]

    wanda = [h.square().mean(0).sqrt() * w.abs().sum(1) for h, w in zip(hidden, weights, strict=True)]
    close(found("wanda"), sum(s * v for s, v in zip(shares, wanda, strict=True)).view(7, 4).sum(1), 1e-4)
    errors = [[least_error(h, h @ w, u) for u in units] for h, w in zip(hidden, weights, strict=True)]
    close(found(Obs(damping=1e-9)), np.array(shares) @ np.array(errors), 1e-3)
    centred = [h - h.mean(0) for h in hidden]
    left = [
        [least_error(h, h[:, u], u) / float(h[:, u].square().sum(1).mean()) for u in units] for h in centred
    ]
    close(found(Redundancy(damping=1e-9)), np.array(shares) @ np.array(left) / sum(shares), 1e-3)


def test_a_depthwise_convolution_reads_nothing_that_stays() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 7, 1), nn.Conv2d(7, 7, 3, groups=7), nn.Conv2d(7, 5, 1), nn.Flatten(2)
    ).double()
    x = torch.randn(11, 3, 5, 5).double()
    graph = depgraph.analyze(net, x)
    group = next(g for g in graph.groups if g.units == 7)
    data = Calibration([x], x, None, False)
    inputs = net[:2](x).detach().movedim(1, -1).flatten(0, -2)
    weight = net[2].weight.detach().flatten(1)
    expected = (inputs.var(0) * weight.square().sum(0)).tolist()
    close(depgraph.scores_of(graph, "flap", calibration=data)[group.name], expected)
    least = [least_error(inputs, inputs @ weight.T, [u]) for u in range(7)]
    close(depgraph.scores_of(graph, Obs(0), calibration=data)[group.name], least, 1e-6)


@pytest.mark.parametrize("name", [n for n, c in CRITERIA.items() if getattr(c, "needs", "") == "inputs"])
def test_groups_that_no_weight_reads_are_scored_otherwise(name: str) -> None:
    class Similarity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 7), nn.Linear(3, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) @ self.right(x).T

    x = torch.randn(5, 3)
    graph = depgraph.analyze(Similarity(), x)
    data = Calibration([x], x, None, False)
    (group,) = graph.groups
    key = group.name
    assert (
        depgraph.scores_of(graph, name, calibration=data)[key].tolist()
        == depgraph.scores_of(graph, "l2")[key].tolist()
    )
    mine: Any = CRITERIA[name]
    other = depgraph.scores_of(graph, mine(otherwise=Random(7)), calibration=data)[key]
    assert other.tolist() == depgraph.scores_of(graph, Random(7))[key].tolist()


def test_too_little_data_for_an_inverse_is_said() -> None:
    p = CASES["heads"](1)
    with pytest.raises(InputError, match="more calibration data, or a damping"):
        p.scores(Obs(damping=0))
    assert np.isfinite(p.scores("obs")).all()


def test_moments_that_rounding_made_indefinite_are_damped_more() -> None:
    moments = torch.diag(torch.tensor([2.0, -1e-7], dtype=torch.float64))
    found = Redundancy(damping=1e-9).inverse(
        moments
    )  # 1e-9 and 1e-8 of the mean, 1, are too little; 1e-7 is the border
    damping = float(1 / found[0, 0] - 2)
    assert 1e-7 < damping < 2e-6
    close(found.diagonal(), [1 / (2 + damping), 1 / (damping - 1e-7)], 1e-5)
    with pytest.raises(InputError, match="NaN or infinite"):
        Obs().inverse(moments * math.nan)


def test_dead_units_score_nothing() -> None:
    p = CASES["branch"](20)
    with torch.no_grad():
        p.model.inner.weight[3] = p.model.inner.bias[3] = 0
        p.model.fall.weight[:, 3] = 0
    for name in ("wanda", "flap", "obs"):
        assert p.scores(name)[3] == 0, name
        assert p.scores(name).argmin() == 3, name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", [n for n, c in CRITERIA.items() if getattr(c, "needs", "") in ("inputs", "loss")]
)
def test_narrow_models_are_run_as_they_are(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5))
    data = [(torch.randn(31, 3), torch.randint(0, 5, (31,))) for _ in range(2)]
    seen: set[torch.dtype] = set()
    exact = depgraph.scores_of(
        depgraph.analyze(net, data[0][0]),
        name,
        calibration=Calibration(data, data[0][0], nn.functional.cross_entropy),
    )
    narrow = copy.deepcopy(net).to(dtype)
    narrow[2].register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    short = [(x.to(dtype), t) for x, t in data]
    graph = depgraph.analyze(narrow, short[0][0])
    found = depgraph.scores_of(
        graph, name, calibration=Calibration(short, short[0][0], nn.functional.cross_entropy)
    )
    a, b = next(iter(exact.values())), next(iter(found.values()))
    np.testing.assert_allclose(a, b, atol=0.1 * np.abs(a).max())
    assert seen == {dtype}


# -------------------------------------------------------------------------------------------- nothing left behind


class Marked(nn.Module):
    """A model with a state worth keeping: half in train mode, half frozen, gradients, hooks, a counter in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.drop = nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Dropout(0.5)
        self.two = nn.Linear(7, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x + 0 * torch.rand_like(x)  # draws from the generator
        return self.two(self.drop(torch.tanh(self.norm(self.one(x)))))


@pytest.fixture
def marked() -> nn.Module:
    torch.manual_seed(1)
    model = Marked()
    model.norm.eval()
    model.one.weight.requires_grad_(False)
    model.two.weight.grad = torch.randn(5, 7)
    model.two.register_forward_hook(lambda *_: None)
    return model


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {n: t.clone() for n, t in model.state_dict().items()},
        "same": {n: (id(p), p.data_ptr(), p.requires_grad, id(p.grad)) for n, p in model.named_parameters()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for n, m in model.named_modules()
        },
        "tensor hooks": {n: p._backward_hooks for n, p in model.named_parameters()},
        "torch": (torch.is_grad_enabled(), torch.get_rng_state(), torch.backends.cudnn.enabled),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


@pytest.fixture(params=[n for n, c in CRITERIA.items() if getattr(c, "needs", "") in ("loss", "inputs")])
def with_data(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def batches_of(model: nn.Module, count: int = 3) -> list[Any]:
    return [(torch.randn(4, 3), torch.randint(0, 5, (4,))) for _ in range(count)]


@pytest.fixture(params=[True, False], ids=["grad", "no grad"])
def grad_mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled(request.param):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("grad_mode")
def test_data_driven_criteria_leave_nothing_behind(marked: nn.Module, with_data: str) -> None:
    data = batches_of(marked)
    graph = depgraph.analyze(marked, data[0][0])
    calibration = Calibration(data, data[0][0], nn.functional.cross_entropy, False)
    before = state(marked)
    scores = depgraph.scores_of(graph, with_data, calibration=calibration)
    assert same(before, state(marked))
    for p in marked.parameters():
        p.requires_grad_(False)
    frozen = depgraph.scores_of(graph, with_data, calibration=calibration)
    assert all((scores[k] == frozen[k]).all() for k in scores), "frozen weights are scored as well"


@pytest.mark.slow
@pytest.mark.usefixtures("grad_mode")
@pytest.mark.parametrize("failure", [ValueError("mine"), KeyboardInterrupt(), "nan"])
def test_nothing_is_left_behind_after_a_failure(marked: nn.Module, with_data: str, failure: Any) -> None:
    data = batches_of(marked)
    graph = depgraph.analyze(marked, data[0][0])
    calls = []

    def stop() -> None:
        calls.append(0)
        if len(calls) == 2 and isinstance(failure, BaseException):
            raise failure

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target) * (math.nan if failure == "nan" else 1)

    class Stopping(list):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            for item in super().__iter__():
                stop()
                yield (item[0] * math.nan, item[1]) if failure == "nan" else item

    before = state(marked)
    calibration = Calibration(Stopping(data), data[0][0], loss, False)
    expected = type(failure) if isinstance(failure, BaseException) else InputError
    with pytest.raises(expected) as caught:
        depgraph.scores_of(graph, with_data, calibration=calibration)
    assert caught.value is not None  # the traceback, and every frame in it, is alive here
    assert same(before, state(marked))


def test_weights_that_forward_writes_into_stay() -> None:
    net = nn.Sequential(nn.Embedding(7, 5, max_norm=0.5), nn.Linear(5, 11), nn.Tanh(), nn.Linear(11, 3))
    x, target = torch.arange(7), torch.randint(0, 3, (7,))
    graph = depgraph.analyze(net, x[:2])
    before = net[0].weight.detach().clone()
    data = Calibration([(x, target)], x, nn.functional.cross_entropy, False)
    depgraph.scores_of(graph, "taylor", calibration=data)
    assert torch.equal(net[0].weight, before)
    assert before.norm(dim=1).max() > 0.51, "forward would have changed it"


# ------------------------------------------------------------------------------------------------------ bad input


def test_criteria_that_need_data_say_so(marked: nn.Module, with_data: str) -> None:
    graph = depgraph.analyze(marked, torch.randn(2, 3))
    with pytest.raises(InputError, match="give calibration="):
        depgraph.scores_of(graph, with_data)
    with pytest.raises(InputError, match="calibration is empty"):
        depgraph.scores_of(
            graph,
            with_data,
            calibration=Calibration([], torch.randn(2, 3), nn.functional.cross_entropy, False),
        )


def test_losses_that_can_not_be_used_are_refused(marked: nn.Module) -> None:
    x, target = batches_of(marked, 1)[0]
    graph = depgraph.analyze(marked, x)

    def scored(loss: Any, name: str = "taylor", batch: Any = (x, target)) -> None:
        depgraph.scores_of(graph, name, calibration=Calibration([batch], x, loss, False))

    with pytest.raises(InputError, match="loss of a batch is nan"):
        scored(lambda out, target: out.sum() * math.nan)
    with pytest.raises(InputError, match="does not depend on any weight"):
        scored(lambda out, target: out.detach().sum())
    with pytest.raises(InputError, match="give loss="):
        scored(None)
    with pytest.raises(InputError, match="cannot be split into samples"):
        scored(lambda out, target: out.sum(), "taylor_samples", (x, torch.zeros(3)))
    with pytest.raises(InputError, match="one number"):
        scored(lambda out, target: out)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_can_not_be_run_or_differentiated_is_said(marked: nn.Module) -> None:
    x, target = batches_of(marked, 1)[0]
    graph = depgraph.analyze(marked, x)
    wide = Calibration([(torch.randn(4, 5), target)], x, nn.functional.cross_entropy, False)
    for name in ("taylor", "hessian", "wanda", "obs"):
        with pytest.raises(InputError, match="could not be run on a calibration batch"):
            depgraph.scores_of(graph, name, calibration=wide)

    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.last = nn.Linear(3, 7), nn.Linear(7, 11), nn.Linear(11, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.utils.checkpoint.checkpoint(self.two, self.one(x), use_reentrant=True))

    graph = depgraph.analyze(Saving(), x)
    data = Calibration([(x, target)], x, nn.functional.cross_entropy, False)
    with pytest.raises(InputError, match="use_reentrant=False"):
        depgraph.scores_of(graph, "taylor", calibration=data)


def test_an_op_without_second_derivative_is_named(marked: nn.Module) -> None:
    x, target = batches_of(marked, 1)[0]
    graph = depgraph.analyze(marked, x)
    data = Calibration([(x, target)], x, lambda out, t: torch.cdist(out, out + 1).sum(), False)
    with pytest.raises(InputError, match=r"no second derivative.*fisher"):
        depgraph.scores_of(graph, "hessian", calibration=data)


@pytest.mark.parametrize(
    "name", ["l1", "l2", "fpgm", "bn_scale", "lamp", "consumer_norm", "taylor", "hessian"]
)
def test_weights_without_values_are_refused(name: str) -> None:
    x = torch.randn(2, 3)
    net = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5))
    with torch.device("meta"):
        empty = copy.deepcopy(net).to("meta")
    graph = depgraph.analyze(empty, x.to("meta"))
    data = Calibration([(x.to("meta"), torch.zeros(2).long())], x.to("meta"), nn.functional.cross_entropy)
    with pytest.raises(InputError, match="meta device"):
        depgraph.scores_of(graph, name, calibration=data)


@pytest.mark.parametrize("name", ["l1", "l2", "fpgm", "lamp", "taylor"])
def test_weights_that_are_nan_are_refused(name: str) -> None:
    p = CASES["branch"]()
    p.model.rise.weight.data[3, 1] = math.nan
    with pytest.raises(InputError, match=r"NaN|loss of a batch is nan"):
        p.scores(name)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (lambda g: torch.rand(g.units + 1), "of shape"),
        (lambda g: torch.full((g.units,), math.nan), "NaN or infinite scores"),
        (lambda g: None, "one per unit|one number per unit"),
        (lambda g: ["a"] * g.units, "one number per unit"),
        ("charm", "one of l1"),
        (3, "must be a name"),
    ],
)
def test_scores_that_make_no_sense_are_refused(criterion: Any, message: str) -> None:
    p = CASES["branch"]()
    with pytest.raises(InputError, match=message):
        p.scores(criterion)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Magnitude(p=3),
        lambda: Magnitude(reduce="median"),
        lambda: L1(roles="produces"),
        lambda: L1(roles=["eats"]),
        lambda: GeometricMedian(roles=["eats"]),
        lambda: Taylor(power=3),
        lambda: Taylor(per="epoch"),
        lambda: Hessian(draws=0),
    ],
)
def test_arguments_of_criteria_are_checked(make: Callable[[], Any]) -> None:
    with pytest.raises(InputError):
        make()


# ------------------------------------------------------------------------------------------------- users' criteria


def test_a_users_function_and_class_do_as_well() -> None:
    p = CASES["branch"]()

    class Bias:
        """Needs the model and data first."""

        def prepare(self, graph: depgraph.DependencyGraph, calibration: Calibration | None) -> None:
            assert calibration is not None
            self.bias = graph.tensors["inner.bias"].detach()
            self.seen = sum(1 for _ in calibration.batches())

        def __call__(self, group: depgraph.Group) -> Tensor:
            return self.bias.abs().bfloat16() if group.units == 11 else torch.ones(group.units)

    mine = Bias()
    close(p.scores(mine), p.model.inner.bias.detach().abs().bfloat16().double())
    assert mine.seen == 4
    close(p.scores(Bias), p.scores(mine))  # the class itself stands for one with its defaults
    close(p.scores(lambda g: list(range(g.units))), range(11))
    result = depgraph.prune(
        p.model.float(),
        torch.randn(2, 3, 5, 5),
        importance=lambda g: list(range(g.units)),
        pruning_ratio=0.5,
    )
    assert result.plan.mask("inner.weight").tolist() == [False] * 5 + [True] * 6


@pytest.mark.slow
@pytest.mark.parametrize("name", CRITERIA)
def test_every_name_prunes_to_a_ratio(name: str) -> None:
    p = CASES["branch"]()
    model = p.model.eval()
    result = depgraph.prune(
        model,
        p.batches[0][0],
        importance=name,
        pruning_ratio=0.5,
        calibration=p.batches,
        loss=nn.functional.cross_entropy,
        progress=False,
    )
    kept = result.plan.mask("inner.weight").nonzero().flatten().tolist()
    scores = p.scores(name)
    assert sorted(kept) == sorted(np.argsort(scores, kind="stable")[5:].tolist())
    assert result.report.verification.status == "equal"
