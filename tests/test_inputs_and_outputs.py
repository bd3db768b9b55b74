"""Inputs and outputs of any structure, lazy modules, and how weights lie in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from checks import prune_and_check
from oracle import assert_equal_to_masked
from small_models import fresh, pixels, vectors
from torch import Tensor, nn
from zoo_entry import ready

import depgraph
from depgraph.base.values import tensor_leaves

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


@dataclass
class Batch:
    x: Tensor
    more: dict[str, Tensor]


@dataclass(frozen=True)
class Sealed:
    x: Tensor


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Request:
    """A plain object that models read and write."""

    def __init__(self, x: Tensor):
        self.x, self.log = x, []


class Core(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(12, 14), nn.Linear(14, 3)
        self.other = nn.Linear(5, 14)

    def core(self, x, y):
        return self.c(F.gelu(self.b(F.gelu(self.a(x))) + self.other(y)))


class Named(Core):
    def forward(self, *, x, y=None, scale=1.0):
        return self.core(x, y) * scale


class Whatever(Core):
    def forward(self, x, **options):
        return self.core(x, options["y"])


class Nest(Core):
    def forward(self, batch):
        out = self.core(batch["xs"][0], batch["deep"]["y"])
        return {"out": [out], "n": 3, "none": None, "text": "t"}


class Dataclasses(Core):
    def forward(self, batch, sealed):
        return Batch(self.core(batch.x, batch.more["y"]), {"sealed": sealed.x}), Sealed(batch.x)


class Tuples(Core):
    def forward(self, pair):
        return Pair(self.core(pair.x, pair.y), pair.x)


class Objects(Core):
    """Reads an object, leaves a mark on it and on its tensors, and returns another."""

    def forward(self, request):
        request.log.append(1)
        return Request(self.core(request.x.mul_(1.5), request.x))


class Later(Core):
    """Returns something that nobody can look into."""

    def forward(self, x, y):
        out = self.core(x, y)
        return (part for part in [out])


X, Y = vectors(5), vectors(5, seed=1)


CALLS: dict[str, tuple[type[nn.Module], Callable[[Tensor, Tensor], Any]]] = {
    "keywords only": (Named, lambda x, y: {"x": x, "y": y}),
    "any keywords": (Whatever, lambda x, y: {"x": x, "y": y}),
    "nested": (Nest, lambda x, y: {"batch": {"xs": [x], "deep": {"y": y}}}),
    "dataclasses": (Dataclasses, lambda x, y: (Batch(x, {"y": y}), Sealed(x))),
    "named tuples": (Tuples, lambda x, y: (Pair(x, y),)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CALLS)
def test_inputs_and_outputs_of_any_structure(kind: str) -> None:
    build, arguments = CALLS[kind]
    net = fresh(build)
    inputs = arguments(X, Y)
    result = depgraph.prune(net, inputs)
    assert result.report.verification.status == "equal"
    shapes = {n: tuple(p.shape) for n, p in result.model.named_parameters() if n.endswith("weight")}
    assert shapes == {"a.weight": (6, 5), "b.weight": (7, 6), "c.weight": (3, 7), "other.weight": (7, 5)}
    plain = Named().double()
    plain.load_state_dict(net.state_dict())
    small = depgraph.apply(plain, result.plan)
    twin = SimpleNamespace(model=small, plan=result.plan)
    assert_equal_to_masked(plain, twin, {"x": X, "y": Y})
    got, wanted = (
        result.model(**inputs) if isinstance(inputs, dict) else result.model(*inputs),
        small(x=X, y=Y),
    )
    assert any(torch.equal(t, wanted) for t in tensor_leaves(got))


@pytest.mark.parametrize("kind", ["object", "generator"])
def test_outputs_in_objects_keep_their_size(kind: str) -> None:
    """Inputs are left as they are, too."""
    net, x = fresh(Objects if kind == "object" else Later), X.clone()
    request = Request(x)
    result = depgraph.prune(net, (request,) if kind == "object" else (x, Y))
    assert result.model.c.weight.shape == (3, 7)
    assert torch.equal(x, X)
    assert request.log == []
    proof = result.report.verification
    assert proof.status == ("equal" if kind == "object" else "shapes")
    (out,) = (result.model(Request(x)).x,) if kind == "object" else result.model(x, Y)
    assert out.shape == (2, 3)


def test_lazy_modules() -> None:
    """Before their first call, what to do; after it, as any other."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.LazyConv2d(7, 3),
            nn.LazyBatchNorm2d(),
            nn.GELU(),
            nn.Flatten(),
            nn.LazyLinear(11),
            nn.LazyLinear(3),
        )

    net = build().double()
    with pytest.raises(depgraph.InputError, match=r"lazy modules.*\n.*call model"):
        depgraph.prune(net, pixels())
    with pytest.raises(depgraph.InputError, match="lazy modules"):
        depgraph.analyze(net, pixels())
    net.eval()(*pixels())
    ready(net)
    result = prune_and_check(net, pixels(), check_inputs=pixels(1), pruning_ratio=0.5)
    assert [type(m) for m in result.model] == [
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.GELU,
        nn.Flatten,
        nn.Linear,
        nn.Linear,
    ]
    assert (result.model[0].out_channels, result.model[4].in_features, result.model[4].out_features) == (
        4,
        96,
        6,
    )


class LazyPair(nn.Module):
    """Its `size` is that of two dims, which forward reads nowhere: only the constructor could say of which."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.rise, self.fall = nn.LazyLinear(size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fall(self.rise(x).relu())


def test_a_class_that_makes_lazy_layers_is_called_in_vain() -> None:
    net, x = nn.Sequential(LazyPair(8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 5)
    net(x)
    graph = depgraph.analyze(net, x)
    few = {g.name: torch.arange(8) < (3 if g.name.startswith("0.rise") else 5) for g in graph.groups}
    small = depgraph.apply(net, depgraph.build_plan(graph, few))
    assert small[0].fall.weight.shape == (5, 3)
    assert small(x).shape == (2, 3)


@pytest.mark.parametrize(
    ("kind", "layout"), [(nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d)]
)
def test_weights_keep_their_order_in_memory(kind: Any, layout: torch.memory_format) -> None:
    model = nn.Sequential(kind(3, 10, 3), nn.ReLU(), kind(10, 5, 3))
    x = torch.randn(2, 3, *[7] * (model[0].weight.dim() - 2))
    for inplace in (False, True):
        plain = depgraph.prune(copy.deepcopy(model), x, inplace=inplace).model
        last = depgraph.prune(copy.deepcopy(model).to(memory_format=layout), x, inplace=inplace).model
        for i in (0, 2):
            assert plain[i].weight.is_contiguous()
            assert last[i].weight.is_contiguous(memory_format=layout)
            assert not last[i].weight.is_contiguous()
            assert torch.equal(plain[i].weight, last[i].weight)
