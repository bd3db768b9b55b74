"""What a smaller model leads to is its own: no tensor, function, reference or object of the original is read or changed."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import prune_and_check
from torch import Tensor, nn

import depgraph


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 5)
        self.gain = nn.Parameter(torch.rand(5))
        self.inner = nn.Parameter(torch.rand(16))
        self.head: Any = lambda t: t

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)))


def closes_over_self(m: Two) -> None:
    m.head = lambda t: t * m.gain


def closes_over_a_tensor(m: Two) -> None:
    gain = m.gain
    m.head = lambda t: t * gain


def has_a_default(m: Two) -> None:
    def head(t: Tensor, m: Any = m, *, gain: Any = m.gain) -> Tensor:
        return t * m.gain + gain

    m.head = head


def is_decorated(m: Two) -> None:
    def plain(t: Tensor) -> Tensor:
        return t * m.gain

    @functools.wraps(plain)
    def head(t: Tensor) -> Tensor:
        return plain(t)

    m.head = head


def is_partial(m: Two) -> None:
    m.head = functools.partial(lambda gain, t: t * gain(), lambda: m.gain)


def is_in_a_list(m: Two) -> None:
    steps = [lambda t: t * m.gain]
    m.steps = steps
    m.head = lambda t: m.steps[0](steps[0](t))


class Holder:
    def __init__(self, function: Any) -> None:
        self.function = function

    def run(self, t: Tensor) -> Tensor:
        return self.function(t)


def is_in_an_object(m: Two) -> None:
    m.head = Holder(lambda t: t * m.gain).run


def has_a_hook(m: Two) -> None:
    calls = []

    def hook(module: Any, args: Any, out: Tensor) -> Tensor:
        calls.append(1)
        return out * m.inner

    m.a.register_forward_hook(hook)
    m.b.register_forward_hook(lambda module, args, out: out * m.gain)


def is_replaced(m: Two) -> None:
    before = m.b.forward

    def forward(x: Tensor) -> Tensor:
        return before(x * m.inner) * m.gain

    m.b.forward = forward  # type: ignore[method-assign]


def refers_weakly(m: Two) -> None:
    parent = weakref.ref(m)
    m.b.register_forward_hook(lambda module, args, out: out * parent().gain)


def refers_by_a_proxy(m: Two) -> None:
    m.place = [weakref.proxy(m)]
    m.head = lambda t: t * m.place[0].gain


def refers_to_a_method(m: Two) -> None:
    m.scaled = functools.partial(torch.mul, other=m.gain)
    m.method = weakref.WeakMethod(m.b.extra_repr)
    m.head = lambda t: m.scaled(t) * m.method().__self__.bias


def is_memoised(m: Two) -> None:
    m.gain_of = functools.lru_cache(maxsize=3)(lambda: m.gain)
    m.head = lambda t: t * m.gain_of()


WAYS = [closes_over_self, closes_over_a_tensor, has_a_default, is_decorated, is_partial, is_in_a_list, is_in_an_object,
        has_a_hook, is_replaced, refers_weakly, refers_by_a_proxy, refers_to_a_method, is_memoised]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("verify", [True, False])
def test_functions_lead_to_the_model_that_has_them(way: Callable[[Two], None], verify: bool) -> None:
    torch.manual_seed(0)
    model, x = Two().eval(), torch.randn(3, 6)
    way(model)
    wanted = model(x)
    result = depgraph.prune(model, x, verify=verify)
    assert result.model.a.out_features == 8
    assert torch.equal(model(x), wanted)
    masked = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        got = result.model(x)
        for name, tensor in model.state_dict().items():
            tensor.mul_(result.plan.mask(name))
        torch.testing.assert_close(got, model(x))
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
        assert torch.equal(result.model(x), got)
        model.load_state_dict(masked)
        for tensor in result.model.state_dict().values():
            tensor.zero_()
        assert torch.equal(model(x), wanted)
        assert not result.model(x).any()


MODELS: dict[str, Two] = {}


def test_what_can_not_be_re_bound_is_refused_with_the_place() -> None:
    model = Two().eval()
    model.b.register_forward_hook(lambda module, args, out: out * MODELS["it"].gain)
    MODELS["it"] = model
    with pytest.raises(
        depgraph.InputError, match=r"'gain' is read in forward of b, .*test_nothing_shared.py"
    ):
        depgraph.prune(model, torch.randn(2, 6))


class Config:
    """There is one of it: a copy is itself."""

    def __init__(self) -> None:
        self.width, self.table = 16, torch.rand(16)

    def __deepcopy__(self, memo: Any) -> Config:
        return self


class Sizes:
    def __init__(self) -> None:
        self.width, self.table = 16, torch.rand(16)


class Configured(nn.Module):
    def __init__(self, config: Config | Sizes) -> None:
        super().__init__()
        self.config = config
        self.a, self.c, self.b = nn.Linear(6, config.width), nn.Linear(6, 10), nn.Linear(26, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).view(-1, self.config.width) * self.config.table
        return self.b(torch.cat([h, self.c(x)], 1))


def test_objects_that_copy_to_themselves_are_not_changed() -> None:
    config = Config()
    before = dict(vars(config))
    model = Configured(config).eval()
    result = prune_and_check(model, torch.randn(2, 6))
    assert vars(config) == before
    assert type(config.width) is int
    assert result.model.c.out_features == 5


SIZES = {"wide": Sizes(), "list": [16]}


class FillsItsCopies(Configured):
    """A copy takes its sizes from a table that the class keeps, as the original did."""

    def __init__(self) -> None:
        super().__init__(Sizes())
        self.config, self.sizes = SIZES["wide"], SIZES

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("config", "sizes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.config, self.sizes = SIZES["wide"], SIZES

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.sizes["list"][0]


def test_what_copies_are_filled_from_is_not_changed() -> None:
    before, table = dict(vars(SIZES["wide"])), SIZES["wide"].table.clone()
    result = prune_and_check(FillsItsCopies().eval(), torch.randn(2, 6))
    assert type(SIZES["wide"]) is Sizes
    assert vars(SIZES["wide"]) == before
    assert type(SIZES["wide"].width) is type(SIZES["list"][0]) is int
    assert torch.equal(SIZES["wide"].table, table)
    assert result.model.config is SIZES["wide"]
    assert result.model.c.out_features == 5


class OneMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 5)
        self.b.weight = nn.Parameter(self.a.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x)) + self.b(x).sigmoid())


class OneMemoryApart(OneMemory):
    """Two that nothing else ties."""

    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x))) + self.d(self.b(x).sigmoid())


@pytest.mark.parametrize("kind", [OneMemory, OneMemoryApart])
@pytest.mark.parametrize("options", [{}, {"verify": False}, {"inplace": True}])
def test_two_parameters_on_one_memory_stay_one(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    result = depgraph.prune(model, torch.randn(2, 6), **options)
    a, b = result.model.a.weight, result.model.b.weight
    assert a is not b
    assert a.data_ptr() == b.data_ptr()
    assert a.shape[0] == 8
    assert len(list(result.model.parameters())) == len(list(kind().parameters()))
    prune_and_check(kind().eval(), torch.randn(2, 6))


def test_a_plan_that_cuts_one_memory_in_two_ways_does_not_fit() -> None:
    model, x = OneMemoryApart().eval(), torch.randn(2, 6)
    model.b.weight = nn.Parameter(torch.randn(16, 6))
    plan = depgraph.prune(model, x).plan
    model.b.weight.data = model.a.weight.data
    with pytest.raises(depgraph.PlanError, match="cuts them differently"):
        depgraph.apply(model, plan)


def test_in_place_nothing_is_changed_where_something_fails() -> None:
    model = Two().eval()
    inner = model.inner
    model.head = lambda t: t * inner.sum()
    plan = depgraph.prune(model, torch.randn(2, 6), ignore=["inner"]).plan
    state = {n: id(t) for n, t in model.named_parameters()}
    depgraph.apply(copy.deepcopy(model), plan, inplace=True)
    weight = model.a.weight
    model.head = lambda t: t + weight.sum()
    with pytest.raises(depgraph.PlanError, match="head holds a tensor that the plan cuts"):
        depgraph.apply(model, plan, inplace=True)
    assert {n: id(t) for n, t in model.named_parameters()} == state
