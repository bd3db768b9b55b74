"""Tensors in attributes, containers, caches and slots are cut with the channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import prune_and_check, random_importance
from oracle import assert_state_matches_plan, assert_untouched, snapshot
from small_models import Written, attributes, fresh, vectors
from torch import Tensor, nn

import depgraph

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def holding(setup: Callable[[nn.Module], None], body: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    """Three linear layers; `body` works on the 12 channels between the first two, with what `setup` gave the model."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(12, 14), nn.Linear(14, 3)
            setup(self)

        def forward(self, x):
            return self.c(F.gelu(self.b(body(self, F.gelu(self.a(x))))))

    return fresh(Net)


class Config:
    """A plain object that a model keeps."""


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(shape[0]))


def in_an_object(net: nn.Module) -> None:
    net.config = Config()
    net.config.scale, net.config.itself = numbers(12), net.config


def buffers(net: nn.Module) -> None:
    net.register_buffer("table", numbers(12), persistent=False)
    net.register_buffer("nothing", None)


def alias(net: nn.Module) -> None:
    net.register_buffer("table", numbers(12))
    net.original = net.table


def tied_when_saved(net: nn.Module) -> None:
    """One weight under two names, the second left out of the state and put back by hooks."""
    tied_layers(net)

    def leave_out(module: nn.Module, state: dict[str, Tensor], prefix: str, meta: Any) -> None:
        del state[prefix + "e.weight"]

    def put_back(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        state[prefix + "e.weight"] = state[prefix + "d.weight"]

    net.register_state_dict_post_hook(leave_out)
    net.register_load_state_dict_pre_hook(put_back)


def tied_layers(net: nn.Module) -> None:
    net.d, net.e = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
    net.e.weight = net.d.weight


def in_two_places(net: nn.Module) -> None:
    net.m = nn.Linear(12, 12)
    net.more, net.again = nn.ModuleList([net.m]), net.m


def parameter_containers(net: nn.Module) -> None:
    net.many = nn.ParameterList(nn.Parameter(torch.randn(12, 12)) for _ in range(2))
    net.named = nn.ParameterDict({"gain": nn.Parameter(torch.randn(12))})


class Cache(nn.Module):
    """Counts its calls, averages what it sees, and keeps a table that it makes when the width is new to it."""

    def __init__(self, filled: bool):
        super().__init__()
        self.linear, self.calls = nn.Linear(12, 12), 0
        self.table = torch.full((12,), 1.5, dtype=torch.float64) if filled else None
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(12))

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        if self.table is None or self.table.shape[-1] != x.shape[-1]:
            self.table = torch.full((x.shape[-1],), 1.5, dtype=x.dtype)
        self.average.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.linear(x) * self.table + self.average


class Magic(nn.Module):
    """Attributes that only __getattr__ knows."""

    def __init__(self):
        super().__init__()
        self.linear, self.more = nn.Linear(12, 12), {"width": 12}

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("more", {}):
            return self.__dict__["more"][name]
        return super().__getattr__(name)

    def forward(self, x):
        return self.linear(x).view(-1, self.width)


def hooked(net: nn.Module) -> None:
    net.b.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    net.a.register_forward_hook(lambda module, args, out: out + 1e9).remove()
    net.c.register_forward_hook(lambda module, args, kwargs, out: out.tanh(), with_kwargs=True)


ODD_PLACES: dict[str, tuple[Callable[..., None], Callable[..., Tensor]]] = {
    "a plain attribute": (attributes(table=lambda: numbers(12)), lambda net, x: x * net.table),
    "positions": (attributes(at=lambda: torch.arange(12.0).double()), lambda net, x: x + net.at * 0.01),
    "lists and dicts": (
        attributes(tables=lambda: [numbers(12), {"deep": (numbers(12), 3)}]),
        lambda net, x: x * net.tables[0] + net.tables[1]["deep"][0],
    ),
    "one tensor in two places": (
        attributes(pair=lambda: [numbers(12)] * 2),
        lambda net, x: x * net.pair[0] + net.pair[1],
    ),
    "a plain object": (in_an_object, lambda net, x: x * net.config.scale),
    "a parameter in a plain list": (
        attributes(loose=lambda: [nn.Parameter(numbers(12))]),
        lambda net, x: x * net.loose[0],
    ),
    "a buffer that is not saved, and one that is None": (
        buffers,
        lambda net, x: x * net.table if net.nothing is None else x,
    ),
    "a buffer under another name": (alias, lambda net, x: x * net.table + net.original),
    "tied by hooks of the state": (tied_when_saved, lambda net, x: x + net.d(x) + net.e(x)),
    "tied layers": (tied_layers, lambda net, x: x + net.d(x) + net.e(x)),
    "a module in two places": (in_two_places, lambda net, x: x + net.more[0](net.again(x))),
    "parameter lists and dicts": (
        parameter_containers,
        lambda net, x: x @ net.many[0] @ net.many[1] * net.named["gain"],
    ),
    "an empty cache": (attributes(cache=lambda: Cache(False)), lambda net, x: net.cache(x)),
    "a filled cache": (attributes(cache=lambda: Cache(True)), lambda net, x: net.cache(x)),
    "magic attributes": (attributes(magic=Magic), lambda net, x: net.magic(x)),
    "hooks": (hooked, lambda _, x: x),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", ODD_PLACES)
def test_tensors_in_odd_places_are_cut_with_the_channels(place: str) -> None:
    setup, body = ODD_PLACES[place]
    net = holding(setup, body)
    result = prune_and_check(net, (vectors(5),), check_inputs=(vectors(5, seed=1),), pruning_ratio=0.5)
    assert result.model.a.weight.shape == (6, 5)
    assert depgraph.prune(net, vectors(5)).report.verification.status == "equal"
    again = depgraph.Plan.from_json(result.plan.to_json())
    wanted = result.model(vectors(5, seed=2))
    torch.testing.assert_close(depgraph.apply(holding(setup, body), again)(vectors(5, seed=2)), wanted)
    net = holding(setup, body)
    depgraph.apply(net, again, inplace=True)
    torch.testing.assert_close(net(vectors(5, seed=2)), wanted)
    prune_and_check(net, (vectors(5),), pruning_ratio=0.4, importance=random_importance(3))


def test_side_effects_do_not_reach_the_users_model() -> None:
    net = holding(*ODD_PLACES["an empty cache"])
    calls = net.cache.calls
    depgraph.prune(net, vectors(5), max_macs=0.6)
    assert (net.cache.calls, net.cache.table, int(net.cache.seen)) == (calls, None, 0)


def test_a_table_that_makes_a_dim_freezes_it() -> None:
    """What a constant produces is no channel, though weights consume it: a filter bank keeps its bands."""
    net = holding(attributes(bank=lambda: numbers(12, 12)), lambda net, x: x @ net.bank)
    result = prune_and_check(net, (vectors(5),), pruning_ratio=0.5)
    assert result.model.bank.shape == (
        6,
        6,
    )  # but these bands, a linear layer consumes: channels like any other
    loose = holding(
        attributes(bank=lambda: numbers(12, 9)), lambda net, x: x + (x @ net.bank).abs().sum() * 0
    )
    assert depgraph.prune(loose, vectors(5)).model.bank.shape == (6, 9)


class Rotary(nn.Module):
    """Rotary positions from tables made in __init__ and held as plain attributes."""

    def __init__(self):
        super().__init__()
        self.heads, self.width = 2, 6
        angles = torch.arange(7.0)[:, None] / torch.arange(1, 4)
        self.cos, self.sin = (torch.cat([f(angles)] * 2, 1).double() for f in (torch.cos, torch.sin))
        self.enter, self.leave = nn.Linear(5, 12), nn.Linear(12, 3)
        self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def rotate(self, x):
        x = x.unflatten(-1, (self.heads, self.width)).transpose(1, 2)
        a, b = x.chunk(2, -1)
        return x * self.cos[: x.shape[2]] + torch.cat([-b, a], -1) * self.sin[: x.shape[2]]

    def forward(self, x):
        x = self.enter(x)
        weights = (self.rotate(self.q(x)) @ self.rotate(self.k(x)).transpose(2, 3)).softmax(-1)
        v = self.v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.leave(x + (weights @ v).transpose(1, 2).flatten(2))


def test_rotary_tables_made_in_init() -> None:
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    result = prune_and_check(
        fresh(Rotary), (x,), check_inputs=(torch.randn(3, 7, 5).double(),), pruning_ratio=0.5
    )
    small = result.model
    assert small.cos.shape == small.sin.shape == (7, small.width)
    assert small.q.weight.shape[0] == small.heads * small.width < 12


class Slotted(nn.Module):
    """A slot, which the copy protocol of modules forgets."""

    __slots__ = ("rows",)

    def __init__(self):
        super().__init__()
        self.linear, self.rows = nn.Linear(12, 12), -1

    def forward(self, x):
        return self.linear(x).view(self.rows, x.shape[1])


class Missing:
    """Stands for a library that is not installed: whoever asks it for anything is told so."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError(f"import missing (no module named 'missing'), asked for {name}")


MISSING = Missing()


class WithMissing(nn.Module):
    """Names what is missing in a method, a class attribute, a closure and a hook; no call asks it for anything."""

    other = MISSING

    def __init__(self) -> None:
        super().__init__()
        missing = MISSING
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)
        self.ways = {"own": lambda x: x, "missing": lambda x: missing(x).relu()}
        self.register_forward_hook(lambda module, inputs, out: missing(out) if module.b.bias is None else out)

    def forward(self, x: Tensor) -> Tensor:
        if self.b.bias is None:
            return MISSING.function(x)
        return self.b(self.ways["own"](self.a(x)).relu())


def test_a_library_that_is_not_installed_is_not_asked_for_anything() -> None:
    model = fresh(WithMissing)
    result = prune_and_check(model, vectors(6))
    assert result.model.a.out_features < 12


def test_modules_with_slots() -> None:
    net = holding(attributes(slotted=Slotted), lambda net, x: net.slotted(x))
    result = depgraph.prune(net, vectors(5))
    assert result.report.verification.status == "equal"
    assert result.model.slotted.rows == -1
    assert result.model.slotted.linear.weight.shape == (6, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_types(dtype: torch.dtype) -> None:
    """One layer in low precision, the rest in single."""

    def build() -> nn.Module:
        return holding(
            attributes(low=lambda: nn.Linear(12, 12)),
            lambda net, x: x + net.low(x.to(net.low.weight.dtype)).to(x.dtype),
        )

    net = build().float()
    net.low.to(dtype)
    result = depgraph.prune(net, vectors(5).float())
    assert result.report.verification.status == "equal"
    assert result.model.low.weight.dtype == dtype
    assert result.model.low.weight.shape == (6, 6)
    assert_state_matches_plan(net, result.model, result.plan)


def test_models_without_values_or_on_another_device_are_refused() -> None:
    """Before anything changes, and with what to do."""
    with torch.device("meta"):
        empty = Written()
    with pytest.raises(depgraph.InputError, match="meta device"):
        depgraph.prune(empty, vectors(5))
    net = fresh(Written)
    before = snapshot(net)
    with pytest.raises(depgraph.InputError, match="meta"):
        depgraph.prune(net, torch.empty(2, 5, device="meta", dtype=torch.float64))
    assert_untouched(net, before)
