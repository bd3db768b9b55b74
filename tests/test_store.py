"""Folders: what is saved comes back, bit for bit, on every network of the zoo and whatever the factory does."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import math
import os
import pickle
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutated_folders
import pytest
import torch
from checks import random_importance
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import ZOO

import depgraph
from depgraph.store import document, folders, loading, saving, weights


@pytest.mark.parametrize(
    ("shape", "stride", "dense"),
    [((2, 3), (3, 1), True), ((2, 3), (1, 2), True), ((2, 3), (4, 1), False), ((2, 3), (1, 1), False),
     ((2, 3), (0, 1), False), ((2, 1, 3), (3, 99, 1), True), ((0, 3), (3, 1), False), ((), (), True)],
)  # fmt: skip
def test_dense_strides_reach_each_place_once(
    shape: tuple[int, ...], stride: tuple[int, ...], dense: bool
) -> None:
    assert weights.is_dense(shape, stride) is dense


pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def leaves(value: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def run(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    torch.manual_seed(7)
    return leaves(copy.deepcopy(model)(*copy.deepcopy(inputs)))


def octets(t: torch.Tensor) -> bytes:
    t = t.detach().contiguous().reshape(-1)
    return (torch.view_as_real(t).contiguous() if t.is_complex() else t).view(torch.uint8).numpy().tobytes()


def assert_same(got: nn.Module, wanted: nn.Module) -> None:
    """The same classes, modes, names, ties, strides, flags and bytes."""
    assert [(n, type(m).__name__, m.training) for n, m in got.named_modules()] == [
        (n, type(m).__name__, m.training) for n, m in wanted.named_modules()
    ]
    for pairs in ("named_parameters", "named_buffers"):
        first, second = (list(getattr(m, pairs)(remove_duplicate=False)) for m in (got, wanted))
        assert [n for n, _ in first] == [n for n, _ in second]
        for (name, a), (_, b) in zip(first, second, strict=True):
            assert (a.dtype, a.shape, a.stride(), a.requires_grad, type(a)) == (
                b.dtype, b.shape, b.stride(), b.requires_grad, type(b)), name  # fmt: skip
            assert octets(a) == octets(b), name
        for one in range(len(first)):
            for two in range(one):
                assert (first[one][1] is first[two][1]) == (second[one][1] is second[two][1])
    assert list(got.state_dict()) == list(wanted.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_round_trip(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    model, inputs = entry.model(), entry.example()
    result = depgraph.prune(model, inputs, pruning_ratio=0.5, importance=random_importance(3), verify=False)
    if any(t.layout is not torch.strided for t in result.model.state_dict().values()):
        with pytest.raises(depgraph.StoreError, match=r"is torch\.sparse_coo"):
            depgraph.save(result, tmp_path / "saved")
        return
    depgraph.save(result, tmp_path / "saved")
    wanted = run(result.model, inputs)
    for factory in (entry.make, lambda: entry.model(seed=5)):  # on the meta device; and with random values
        loaded = depgraph.load(factory, tmp_path / "saved")
        assert_same(loaded, result.model)
        got = run(loaded, inputs)
        assert len(got) == len(wanted)
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


# ------------------------------------------------------------------------------------------------ what a folder has


class Small(nn.Module):
    def __init__(self, width: int = 14) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)).relu())


def images() -> torch.Tensor:
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2))


def pruned(model: nn.Module | None = None, **options: Any) -> depgraph.PruneResult:
    torch.manual_seed(1)
    return depgraph.prune(Small().eval() if model is None else model, images(), **options)


def test_a_folder_is_json_and_what_the_state_dict_has(tmp_path: Path) -> None:
    result = pruned(pruning_ratio=0.5)
    folder = depgraph.save(result, tmp_path / "a" / "b")
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "plan.json"]
    stored = load_file(folder / "model.safetensors")
    assert {n: octets(t) for n, t in stored.items()} == {
        n: octets(t) for n, t in result.model.state_dict().items()
    }
    says = json.loads((folder / "plan.json").read_text())
    assert says["provenance"]["class"] == "test_store.Small"
    assert says["provenance"]["torch"] == torch.__version__
    assert says["plans"][0]["request"].items() == {"pruning_ratio": 0.5, "importance": "auto"}.items()
    assert [p.to_json() for p in depgraph.load_plans(folder)] == [result.plan.to_json()]


def test_modes_flags_types_and_strides_come_back(tmp_path: Path) -> None:
    result = pruned()
    model = result.model.to(torch.bfloat16).to(memory_format=torch.channels_last)
    model.train().norm.eval()
    model.first.bias.requires_grad_(False)
    depgraph.save(model, tmp_path / "saved")
    loaded = depgraph.load(Small, tmp_path / "saved")
    assert_same(loaded, model)
    assert loaded.first.weight.is_contiguous(memory_format=torch.channels_last)


def test_tensors_with_one_memory_have_one_memory_again(tmp_path: Path) -> None:
    """Not one object, as ties are, but two parameters on the same memory."""

    class Shared(Small):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(5, 5, 1)
            self.two = nn.Conv2d(5, 5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(super().forward(x)))

    result = pruned(Shared().eval(), ignore=["one*", "two*"])
    result.model.two.weight = nn.Parameter(result.model.one.weight.detach())
    depgraph.save(result, tmp_path / "saved")
    loaded = depgraph.load(Shared, tmp_path / "saved")
    assert_same(loaded, result.model)
    assert loaded.one.weight.data_ptr() == loaded.two.weight.data_ptr()
    assert "two.weight" not in load_file(tmp_path / "saved" / "model.safetensors")


def test_shards_have_an_index_and_come_back(tmp_path: Path) -> None:
    result = pruned()
    folder = depgraph.save(result, tmp_path / "saved", max_shard_bytes=200)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(result.model.state_dict())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(folder / file)[name], result.model.state_dict()[name])
    assert index["metadata"]["total_size"] == sum(len(octets(t)) for t in result.model.state_dict().values())
    assert all(
        sum(len(octets(t)) for t in load_file(s).values()) <= 200 or len(load_file(s)) == 1 for s in shards
    )
    assert_same(depgraph.load(Small, folder), result.model)


@pytest.mark.slow
def test_pruned_trained_saved_loaded_and_all_of_it_again(tmp_path: Path) -> None:
    """Three times; the folder has three plans, the last of a loaded model, and together they are one."""
    torch.manual_seed(4)
    original = Small(29).eval()
    model: nn.Module = original
    for step in range(3):
        result = pruned(model, pruning_ratio=0.3)
        with torch.no_grad():
            result.model.first.weight.add_(0.01 * (step + 1))
        depgraph.save(result, tmp_path / "saved")
        model = depgraph.load(lambda: Small(29), tmp_path / "saved")
        assert_same(model, result.model)
    plans = depgraph.load_plans(tmp_path / "saved")
    assert len(plans) == 3
    replayed = depgraph.apply(Small(29), plans[0].then(plans[1]).then(plans[2]))
    assert [t.shape for t in replayed.state_dict().values()] == [t.shape for t in model.state_dict().values()]


def test_a_result_knows_its_past_when_its_model_is_a_copy(tmp_path: Path) -> None:
    second = pruned(pruned().model)
    second.model = copy.deepcopy(second.model)
    depgraph.save(second, tmp_path / "saved")
    assert_same(depgraph.load(Small, tmp_path / "saved"), second.model)
    with pytest.raises(depgraph.InputError, match=r"pass plans="):
        depgraph.save(second.model, tmp_path / "other")
    depgraph.save(second.model, tmp_path / "other", plans=[*second.before, second.plan])
    assert_same(depgraph.load(Small, tmp_path / "other"), second.model)


def test_a_plan_replays_in_place_and_the_model_can_be_saved(tmp_path: Path) -> None:
    model = Small().eval()
    depgraph.apply(model, pruned().plan, inplace=True)
    depgraph.save(model, tmp_path / "saved")
    assert_same(depgraph.load(Small, tmp_path / "saved"), model)


class Nested(nn.Module):
    """A part that is wrapped or not, tied weights, a held table, a number to repair, a literal to rewrite, extra state."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.width, self.steps = 22, 3
        self.body, self.one, self.two = wrap(Small(22)), nn.Conv2d(5, 13, 1), nn.Conv2d(13, 13, 1)
        self.three = nn.Conv2d(13, 13, 1)
        self.three.weight = self.two.weight
        self.table = {"shift": torch.linspace(0, 1, 13)}
        self.flat, self.last = Flat(), nn.Linear(13 * 20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(self.body(x)).relu() + self.table["shift"][:, None, None]
        return self.last(self.flat(self.three(self.two(x).relu())))

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, state: int) -> None:
        self.steps = state


class Flat(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, 260)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def bare(model: nn.Module) -> nn.Module:
    return model


WRAPPERS: list[Callable[[nn.Module], nn.Module]] = [nn.DataParallel, compiled, bare]


@pytest.mark.slow
@pytest.mark.parametrize("loaded_in", WRAPPERS)
@pytest.mark.parametrize("saved_in", WRAPPERS)
def test_wrappers_are_no_part_of_a_folder(saved_in: Any, loaded_in: Any, tmp_path: Path) -> None:
    """Pruned in one wrapper around all of it and one around a part, loaded with others or with none."""

    def build(wrap: Any) -> nn.Module:
        torch.manual_seed(8)
        return wrap(Nested(wrap).eval())

    result = pruned(build(saved_in))
    assert result.plan.cuts
    assert result.plan.rewrites
    wanted = pruned(build(bare)).model
    wanted.steps = wanted.steps + 4
    inner = result.model if saved_in is bare else next(result.model.children())
    inner.steps = 7
    inner.one.bias.requires_grad_(False)
    wanted.one.bias.requires_grad_(False)
    for given in (result, result.model, inner):
        depgraph.save(given, tmp_path / "saved")
        stored = load_file(tmp_path / "saved" / "model.safetensors")
        assert stored.keys() == wanted.state_dict().keys() - {"three.weight", "_extra_state"}
        loaded = depgraph.load(lambda: build(loaded_in), tmp_path / "saved")
        assert type(loaded) is type(build(loaded_in))
        inside = loaded if loaded_in is bare else next(loaded.children())
        assert type(inside.body) is (Small if loaded_in is bare else type(loaded))
        assert inside.steps == 7
        assert torch.equal(loaded(images()), wanted(images()))
        if loaded_in is bare:
            assert_same(loaded, wanted)
    (plan,) = depgraph.load_plans(tmp_path / "saved")
    for replayed in (plan, result.plan):
        assert torch.equal(
            depgraph.apply(build(loaded_in), replayed)(images()), pruned(build(bare)).model(images())
        )
        assert depgraph.verify(build(loaded_in), loaded, replayed, images()).status == "equal"


@pytest.mark.slow
@pytest.mark.parametrize("wrap", WRAPPERS[:2])
def test_a_result_that_was_wrapped_and_pruned_again_keeps_its_past(wrap: Any, tmp_path: Path) -> None:
    second = pruned(wrap(pruned(Small(29).eval()).model))
    assert len(second.before) == 1
    depgraph.save(second, tmp_path / "saved")
    loaded = depgraph.load(lambda: Small(29), tmp_path / "saved")
    assert_same(loaded, next(second.model.children()))
    second.model = copy.deepcopy(second.model)
    depgraph.save(second, tmp_path / "copy")
    assert_same(depgraph.load(lambda: Small(29), tmp_path / "copy"), loaded)
    one, two = depgraph.load_plans(tmp_path / "copy")
    assert [t.shape for t in depgraph.apply(Small(29), one.then(two)).parameters()] == [
        t.shape for t in loaded.parameters()
    ]


def test_a_name_of_the_users_own_is_no_wrapper(tmp_path: Path) -> None:
    """An attribute `module` with a sibling of the same names: nothing is mistaken for it."""

    class Own(Small):
        def __init__(self) -> None:
            super().__init__(14)
            self.module = nn.Module()
            self.module.first, self.module.last = nn.Conv2d(5, 14, 1), nn.Conv2d(14, 5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module.last(self.module.first(super().forward(x)).relu())

    result = pruned(nn.DataParallel(Own().eval()))
    depgraph.save(result, tmp_path / "saved")
    assert_same(depgraph.load(Own, tmp_path / "saved"), result.model.module)
    with pytest.raises(depgraph.PlanError, match="module"):
        depgraph.apply(Small(), result.plan)


def test_a_factory_that_holds_on_to_parameters_is_refused(tmp_path: Path) -> None:
    """What reduces gradients would go on with the parameters that it was made with."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        result = pruned(nn.parallel.DistributedDataParallel(Small().eval()))
        depgraph.save(result, tmp_path / "saved")
        with pytest.raises(depgraph.StoreError, match="wrap what load returns"):
            depgraph.load(lambda: nn.parallel.DistributedDataParallel(Small()), tmp_path / "saved")
        assert_same(depgraph.load(Small, tmp_path / "saved"), result.model.module)
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------ factories


class Asks(Small):
    """Its code needs values while it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = float(torch.linspace(0, 1, 3)[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.strength


class Closes(Small):
    """A table in a closure: no name leads to it."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.arange(5.0)
        self.shift = lambda x: x + table[:, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shift(super().forward(x))


class Remembers(Small):
    """It keeps the device that it was built on."""

    def __init__(self) -> None:
        super().__init__()
        self.device = self.first.weight.device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.ones(5, 1, 1, device=self.device)


class Counts(Small):
    """A table of whole numbers, deep in objects, and a buffer that no state_dict has, both of random values."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = {"order": [torch.tensor([4, 2, 0, 1, 3])], "noise": (torch.rand(5),)}
        self.register_buffer("drawn", torch.rand(14), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(x)).relu() * self.drawn[:, None, None]
        return self.last(hidden)[:, self.tables["order"][0]] + self.tables["noise"][0][:, None, None]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Small, Asks, Closes, Remembers, Counts])
def test_factories_whose_models_need_values_while_they_are_built(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    result = pruned(kind().eval())
    assert result.plan.cuts
    depgraph.save(result, tmp_path / "saved")
    before = torch.get_rng_state()
    loaded = depgraph.load(kind, tmp_path / "saved")
    assert torch.equal(torch.get_rng_state(), before), "the random state has changed"
    assert torch.equal(loaded(images()), result.model(images()))
    assert_same(loaded, result.model)


def test_on_the_meta_device_nothing_is_built_twice_and_nothing_stays_patched(tmp_path: Path) -> None:
    devices = []

    def factory() -> nn.Module:
        model = Small()
        devices.append(model.first.weight.device.type)
        return model

    depgraph.save(pruned(), tmp_path / "saved")
    before = nn.Module.__init__, nn.init.kaiming_uniform_
    depgraph.load(factory, tmp_path / "saved")
    assert devices == ["meta"]
    assert (nn.Module.__init__, nn.init.kaiming_uniform_) == before


def test_a_model_that_somebody_holds_is_not_changed(tmp_path: Path) -> None:
    depgraph.save(pruned(), tmp_path / "saved")
    for device in ("cpu", "meta"):
        held = Small().to(device)
        shapes = [p.shape for p in held.parameters()]
        loaded = depgraph.load(lambda held=held: held, tmp_path / "saved")
        assert loaded is not held
        assert [p.shape for p in held.parameters()] == shapes
        assert {p.device.type for p in held.parameters()} == {device}
        assert torch.isfinite(loaded(images())).all()


@dataclasses.dataclass
class Config:
    width: int = 14


class Configured(Small):
    def __init__(self, config: Config) -> None:
        super().__init__(config.width)
        self.config = config


def test_the_config_that_a_model_was_built_from_is_saved_as_it_was(tmp_path: Path) -> None:
    result = pruned(Configured(Config(22)).eval())
    assert result.model.config.width == 11
    depgraph.save(result, tmp_path / "saved")
    loaded = depgraph.load(lambda config: Configured(Config(**config)), tmp_path / "saved")
    assert_same(loaded, result.model)
    assert loaded.config == result.model.config == Config(11)
    depgraph.save(pruned(), tmp_path / "none")
    with pytest.raises(depgraph.StoreError, match="none was saved"):
        depgraph.load(lambda config: Small(), tmp_path / "none")


@dataclasses.dataclass
class Limited(Config):
    """As configs of state space models, whose steps have no upper bound."""

    limit: tuple[float, ...] = (0.0, float("inf"), -float("inf"))


def test_a_config_may_hold_infinity(tmp_path: Path) -> None:
    result = pruned(Configured(Limited(22)).eval())
    depgraph.save(result, tmp_path / "saved")
    text = (tmp_path / "saved" / "plan.json").read_text()
    assert "Infinity" not in text  # which is no JSON
    loaded = depgraph.load(lambda config: Configured(Limited(**config)), tmp_path / "saved")
    assert_same(loaded, result.model)
    assert loaded.config == Limited(11, [0.0, float("inf"), -float("inf")])


def test_words_for_floats_are_these_three() -> None:
    """A config's own entry of that form, or one that was tampered with, stays what it is."""
    assert document.from_words(document.in_words({"a": [float("inf")], 1: (-float("inf"), 2)})) == {
        "a": [float("inf")],
        1: [-float("inf"), 2],
    }
    assert math.isnan(document.from_words(document.in_words(float("nan"))))
    for own in ("1e3", "x", [1], None, {"$float": "x"}):
        assert document.from_words({"$float": own}) == {"$float": own}


def test_the_config_of_a_model_that_was_pruned_twice_is_the_first_one(tmp_path: Path) -> None:
    once = pruned(Configured(Config(29)).eval(), pruning_ratio=0.3)
    twice = pruned(once.model, pruning_ratio=0.4)
    assert 29 > once.model.config.width > twice.model.config.width
    depgraph.save(twice, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "plan.json").read_text())["config"] == {"width": 29}
    assert_same(depgraph.load(lambda config: Configured(Config(**config)), tmp_path / "saved"), twice.model)


def test_a_factory_by_name_is_what_the_caller_names(tmp_path: Path) -> None:
    result = pruned()
    depgraph.save(result, tmp_path / "saved")
    assert_same(depgraph.load(f"{__name__}:Small", tmp_path / "saved"), result.model)
    for wrong in ("Small", "no_such_module:Small", f"{__name__}:Nobody", 3, Small()):
        with pytest.raises(depgraph.InputError, match="factory"):
            depgraph.load(wrong, tmp_path / "saved")


def test_factories_of_other_models_are_refused_with_every_difference(tmp_path: Path) -> None:
    depgraph.save(pruned(), tmp_path / "saved")
    devices = []

    def other() -> nn.Module:
        model = Small(15)
        devices.append(model.first.weight.device.type)
        return model

    with pytest.raises(depgraph.StoreError) as caught:
        depgraph.load(other, tmp_path / "saved")
    assert devices == ["meta"], "memory was taken for a model that the folder is not of"
    for text in (
        "'first.weight' has shape (15, 3, 3, 3), the plan is for (14, 3, 3, 3)",
        "'last.weight'",
        "'norm.bias'",
    ):
        assert text in str(caught.value)
    for factory in (lambda: 3, lambda: 1 / 0, lambda: nn.Linear(2, 3)):
        with pytest.raises(depgraph.StoreError, match=r"factory"):
            depgraph.load(factory, tmp_path / "saved")


def test_extra_state_comes_back_and_what_json_cannot_say_is_refused(tmp_path: Path) -> None:
    class Stateful(Small):
        state: Any = None

        def get_extra_state(self) -> Any:
            return self.state

        def set_extra_state(self, state: Any) -> None:
            self.state = state

    result = pruned(Stateful().eval())
    result.model.state = {"steps": 9, "names": ["a"]}
    depgraph.save(result, tmp_path / "saved")
    assert depgraph.load(Stateful, tmp_path / "saved").state == {"steps": 9, "names": ["a"]}
    result.model.state = {"steps": (1, object())}
    with pytest.raises(depgraph.StoreError, match="extra state"):
        depgraph.save(result, tmp_path / "saved")


# ------------------------------------------------------------------------------------------------ what is refused


def test_models_that_are_not_what_their_plan_makes_are_refused_with_every_reason(tmp_path: Path) -> None:
    result = pruned()
    result.model.extra = nn.Linear(2, 3)
    result.model.last.weight = nn.Parameter(torch.zeros(5, 3, 1, 1))
    result.model.first.bias = nn.Parameter(torch.zeros(7, device="meta"))
    result.model.norm.running_mean = torch.zeros(7).to_sparse()
    with pytest.raises(depgraph.StoreError) as caught:
        depgraph.save(result, tmp_path / "saved")
    for text in (
        "'extra.weight'",
        "'extra.bias'",
        "'last.weight' has shape (5, 3, 1, 1)",
        "meta device",
        "sparse",
    ):
        assert text in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_weights_were_packed_away_is_refused(tmp_path: Path) -> None:
    """Every tensor that is left has been cut, and those that are gone as well."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(7, 22, bias=False), nn.Linear(22, 3, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x).relu())

    result = depgraph.prune(Packed().eval(), torch.randn(2, 7))
    result.model.first._parameters.clear()
    result.model.first.packed = object()
    with pytest.raises(depgraph.StoreError, match=r"'first\.weight' of its plan is not in it"):
        depgraph.save(result, tmp_path / "saved")


def test_what_json_cannot_say_of_a_plan_is_refused(tmp_path: Path) -> None:
    result = pruned()
    result.plan.request["threshold"] = float("inf")
    with pytest.raises(depgraph.StoreError, match="JSON"):
        depgraph.save(result, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_lazy_modules_are_made_by_a_factory_that_calls_them(tmp_path: Path) -> None:
    def called() -> nn.Module:
        model = nn.Sequential(nn.LazyLinear(22), nn.ReLU(), nn.LazyLinear(3))
        model(torch.zeros(2, 7))
        return model

    x = torch.randn(2, 7)
    result = depgraph.prune(called().eval(), x)
    depgraph.save(result, tmp_path / "saved")
    assert torch.equal(depgraph.load(called, tmp_path / "saved")(x), result.model(x))
    with pytest.raises(depgraph.StoreError, match=r"'2\.weight' has no shape yet: call the model once"):
        depgraph.load(
            lambda: nn.Sequential(nn.LazyLinear(22), nn.ReLU(), nn.LazyLinear(3)), tmp_path / "saved"
        )


def test_hooks_on_the_state_dict_change_nothing(tmp_path: Path) -> None:
    """A folder has the tensors by the names of their modules, whatever a model's own `state_dict` says."""

    class Hooked(Small):
        def __init__(self) -> None:
            super().__init__()
            self._register_state_dict_hook(
                lambda m, state, prefix, meta: {f"x_{n}": t for n, t in state.items()}
            )

    result = pruned(Hooked().eval())
    assert "x_first.weight" in result.model.state_dict()
    depgraph.save(result, tmp_path / "saved")
    loaded = depgraph.load(Hooked, tmp_path / "saved")
    assert {n: octets(t) for n, t in loaded.named_parameters()} == {
        n: octets(t) for n, t in result.model.named_parameters()
    }
    assert loaded.state_dict().keys() == result.model.state_dict().keys()


KINDS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8",
         "uint8", "uint16", "uint32", "uint64", "bool", "complex128", "complex64", "complex32"]  # fmt: skip


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_type_comes_back(tmp_path: Path) -> None:
    """Persistent or not, of no entries, of no dims; and a parameter that is a conjugate."""

    class Typed(Small):
        def __init__(self) -> None:
            super().__init__()
            for name in KINDS:
                dtype = getattr(torch, name)
                self.register_buffer(f"of_{name}", torch.tensor([[1.0, 0.0, 3.0]] * 2).to(dtype))
                self.register_buffer(
                    f"of_{name}_left_out", torch.tensor([5.0, 2.0]).to(dtype), persistent=False
                )
                self.register_buffer(f"of_{name}_empty", torch.zeros(0, 3).to(dtype))
                self.register_buffer(f"of_{name}_scalar", torch.tensor(1.0).to(dtype))
            self.turned = nn.Parameter(torch.view_as_complex(torch.randn(5, 2)).conj())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.turned.abs()[:, None, None]

    result = pruned(Typed().eval())
    depgraph.save(result, tmp_path / "saved")
    loaded = depgraph.load(Typed, tmp_path / "saved")
    assert torch.equal(loaded.turned, result.model.turned)
    loaded.turned = result.model.turned  # the conjugate is computed now, and laid out so
    assert_same(loaded, result.model)


@pytest.mark.slow
def test_folders_that_are_not_ours_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in (".", "file", "link"):
        with pytest.raises(depgraph.StoreError):
            depgraph.save(pruned(), tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "notes.txt"]


def test_files_of_others_in_a_saved_folder_are_kept_and_old_weights_are_not(tmp_path: Path) -> None:
    folder = depgraph.save(pruned(), tmp_path / "saved", max_shard_bytes=200)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("mine")
    depgraph.save(pruned(pruning_ratio=0.3), folder)
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["model.safetensors", "notes", "plan.json", "tokenizer.json"]
    assert (folder / "notes" / "a.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("moment", ["weights", "plan", "rename"])
@pytest.mark.parametrize("kind", ["error", "kill"])
def test_an_interrupted_save_leaves_what_was_there(moment: str, kind: str, tmp_path: Path) -> None:
    first = pruned(pruning_ratio=0.3)
    folder = depgraph.save(first, tmp_path / "saved")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    child = os.fork()
    if child == 0:  # a process of its own, so that it can die

        def stop(*_: Any, **__: Any) -> Any:
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("no space left")

        place, name = {
            "weights": (weights, "save_file"),
            "plan": (saving.Document, "to_text"),
            "rename": (folders, "_put"),
        }[moment]
        setattr(place, name, stop)
        try:
            depgraph.save(pruned(), folder)
        except depgraph.StoreError:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == (signal.SIGKILL if kind == "kill" else 3 << 8)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert_same(depgraph.load(Small, folder), first.model)
    if kind == "error":
        assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    depgraph.save(pruned(), folder)  # what a killed process left is in nobody's way
    assert_same(depgraph.load(Small, folder), pruned().model)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("file", "width"), [("model.safetensors", 29), ("plan.json", 14)])
def test_a_full_disk_leaves_what_was_there(file: str, width: int, tmp_path: Path) -> None:
    """No file can become as large as `file` is, the largest that is written."""
    first = pruned(Small(width).eval())
    folder = depgraph.save(first, tmp_path / "saved")
    room = (folder / file).stat().st_size - 1
    assert all(p.stat().st_size <= room for p in folder.iterdir() if p.name != file)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        try:
            depgraph.save(first, folder)
        except depgraph.StoreError:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 3 << 8
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


@pytest.mark.slow
def test_a_disk_that_says_late_that_it_is_full_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = depgraph.save(pruned(pruning_ratio=0.3), tmp_path / "saved")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fails(why: int) -> Callable[[int], None]:
        def flush(handle: int) -> None:
            raise OSError(why, "late")

        return flush

    for why in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
        monkeypatch.setattr(os, "fsync", fails(why))
        with pytest.raises(depgraph.StoreError, match="late"):
            depgraph.save(pruned(), folder)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.setattr(os, "fsync", fails(errno.EINVAL))  # what file systems say that can't flush
    depgraph.save(pruned(), folder)
    assert_same(depgraph.load(Small, folder), pruned().model)


@pytest.mark.slow
def test_where_folders_cannot_change_places_two_renames_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = depgraph.save(pruned(pruning_ratio=0.3), tmp_path / "saved")
    monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
    second = pruned()
    depgraph.save(second, folder)
    assert_same(depgraph.load(Small, folder), second.model)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    monkeypatch.setattr(folders, "_flush", lambda path: None)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(depgraph.StoreError, match="no"):
        depgraph.save(pruned(pruning_ratio=0.3), folder)
    assert_same(depgraph.load(Small, folder), second.model)


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    folder = depgraph.save(pruned(), tmp_path / "saved", max_shard_bytes=200)
    one, two, *_ = sorted(folder.glob("model-*.safetensors"))
    one.unlink()
    two.write_bytes(two.read_bytes()[:-3])
    (folder / "plan.json").write_text(
        (folder / "plan.json").read_text().replace('"frozen": []', '"frozen": [1]')
    )
    with pytest.raises(depgraph.StoreError) as caught:
        depgraph.load(Small, folder)
    for text in (one.name, two.name, "checksum", "'frozen'"):
        assert text in str(caught.value)


def test_every_damaged_tensor_is_named(tmp_path: Path) -> None:
    folder = depgraph.save(pruned(), tmp_path / "saved")
    stored = load_file(folder / "model.safetensors")
    for name in ("first.bias", "norm.running_var"):
        stored[name] = stored[name] + 1
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(depgraph.StoreError) as caught:
        depgraph.load(Small, folder)
    assert str(caught.value).count("was changed after it was written") == 2
    assert "'first.bias'" in str(caught.value)
    assert "'norm.running_var'" in str(caught.value)


def signed(folder: Path, text: str) -> None:
    """Let plan.json say `text`, with a fitting checksum."""
    (folder / "plan.json").write_text(f"{document._first_line(text)}\n{text}\n")


CLAIMS: list[tuple[dict[str, Any], str]] = [
    ({"held": {"first.bias": [["nowhere", ["table"]]]}}, "no attribute nowhere.table"),
    ({"held": {"first.bias": [["first", ["_parameters", "bias"]]]}}, "no attribute first._parameters.bias"),
    ({"held": {"first.bias": [["first", ["new"]]]}}, "no attribute first.new"),
    ({"held": {"first.bias": [["first", ["stride", 2]]]}}, "no attribute first.stride.2"),
    ({"held": {"other": [["first", ["stride", 0]]]}}, "'other' can't be held"),
    ({"ties": {"first.bias": "norm.bias"}}, "'first.bias' can't be tied to 'norm.bias'"),
    ({"ties": {"new": "nobody"}}, "'new' can't be tied to 'nobody'"),
    ({"ties": {"new": "norm.bias"}}, "the model ties other tensors"),
    ({"views": {"first.bias": "norm.bias"}}, "'first.bias' can't be a view of 'norm.bias'"),
    ({"training": ["nowhere"]}, "module 'nowhere' is not in the model"),
    ({"extra_state": {"nowhere": 3}}, "module 'nowhere' is not in the model"),
    ({"extra_state": {"": 3}}, "the model refuses its extra state"),
    ({"more": 1}, "unknown field 'more'"),
    ({"format": 2}, "has format 2, this version reads 1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("claim", "says"), CLAIMS)
def test_what_a_folder_claims_is_held_against_the_model(
    claim: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = depgraph.save(pruned(), tmp_path / "saved")
    data = json.loads((folder / "plan.json").read_text())
    del data["sha256"]
    signed(folder, json.dumps({**data, **claim})[1:])
    with pytest.raises(depgraph.StoreError, match=re.escape(says)):
        depgraph.load(Small, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "model.safetensors/../../secret",
        "model.safetensors\n",
        "/etc/passwd",
        "plan.json",
        "",
    ],
)
def test_no_path_leads_out_of_a_folder(name: str, tmp_path: Path) -> None:
    """Not even where the folder has a folder by the name of a file."""
    folder = depgraph.save(pruned(), tmp_path / "saved")
    (tmp_path / "secret").write_bytes((folder / "model.safetensors").read_bytes())
    data = json.loads((folder / "plan.json").read_text())
    del data["sha256"]
    for row in data["tensors"].values():
        row["file"] = name
    signed(folder, json.dumps(data)[1:])
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(depgraph.StoreError, match="has an invalid description"):
        depgraph.load(Small, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"frozen": []', '"frozen": [], "frozen": []', "given twice"),
        ('"frozen": []', '"frozen": [NaN]', "NaN is not a number"),
        ('"frozen": []', '"frozen": [-Infinity]', "-Infinity is not a number"),
        ('"frozen": []', '"frozen": ' + "[" * 100000, "not a depgraph plan"),
        ('"frozen": []', '"frozen": ' + "9" * 5000, "not a depgraph plan"),
        ('"shape": [7]', '"shape": [' + "4611686018427387904, " * 100000 + "7]", "has an invalid description"),
        ('"first.bias": [14]', '"first.bias": [' + "4611686018427387904, " * 100000 + "7]", "has an invalid shape"),
        ('"first.bias": [14]', '"first.bias": [-14]', "has an invalid shape"),
    ],
)  # fmt: skip
def test_text_that_json_permits_is_refused_at_once(old: str, new: str, says: str, tmp_path: Path) -> None:
    folder = depgraph.save(pruned(), tmp_path / "saved")
    rest = (folder / "plan.json").read_text().partition("\n")[2].strip()
    assert old in rest
    signed(folder, rest.replace(old, new, 1))
    begin = time.process_time()
    with pytest.raises(depgraph.StoreError, match=re.escape(says)):
        depgraph.load(Small, folder)
    assert time.process_time() - begin < 5


def test_nothing_in_a_folder_is_imported_executed_or_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = depgraph.save(pruned(), tmp_path / "saved")
    (folder / "evil.py").write_text("raise SystemExit('imported')")
    rest = (folder / "plan.json").read_text().partition("\n")[2].replace("test_store.Small", "evil.Model")
    (folder / "plan.json").write_text(f"{document._first_line(rest)}\n{rest}")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    depgraph.load(Small, folder)
    assert "evil" not in sys.modules


@pytest.mark.slow
def test_a_hundred_folders_with_something_wrong(tmp_path: Path) -> None:
    """Bytes, fields, tensors, headers, files: our error, or the very model that was saved."""
    original = tmp_path / "original"
    wanted = mutated_folders.state(mutated_folders.saved(original))
    found = Counter()
    for seed in range(5000, 5100):
        kind, said = mutated_folders.try_seed(seed, original, tmp_path, wanted, alone=lambda work: work())
        assert not said.startswith("WRONG"), (seed, kind, said)
        found[said] += 1
    assert found["refused"] > 80


def test_tensors_are_put_where_the_model_has_a_place_for_them() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = (torch.zeros(1), {"k": [torch.zeros(2), None]}, "text")
            self.cache: dict[str, Any] = {"a": 1}
            self.name = "no tensor"

    model, new = Keeps(), torch.ones(3)
    for place in (
        ("pair", 0),
        ("pair", 1, "k", 0),
        ("pair", 1, "k", 1),
        ("pair", 1, "k", 2),
        ("cache", "a"),
        ("cache", "b"),
    ):
        setter = loading._setter(model, "", place)
        assert setter is not None, place
        setter(new)
        value: Any = vars(model)
        for key in place:
            value = value[key]
        assert value is new, place
    for place in (
        ("pair", 3),
        ("pair", 2),
        ("pair", 1, "k", 4),
        ("pair", 1, "j", 0),
        ("cache", "b", "c"),
        ("other",),
        ("name",),
        ("_parameters", "w"),
    ):
        assert loading._setter(model, "", place) is None, place
    assert loading._setter(model, "inner", ("pair", 0)) is None
