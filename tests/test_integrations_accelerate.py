"""Models that accelerate has offloaded: the smaller one is that of the same model in memory, bit for bit."""

from __future__ import annotations

import copy
import gc
import importlib
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph import InputError

pytest.importorskip("accelerate")
import accelerate
import vision_ops  # noqa: F401  # makes torchvision importable, which transformers imports

from depgraph.integrations.accelerate import in_memory, prune

pytestmark = pytest.mark.filterwarnings(
    "ignore:The following device_map keys do not match"
)  # parameters of the root

X = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Norms with statistics, a buffer that is not saved, a parameter of the root's own, one without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.body = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5))
        self.gain = nn.Parameter(torch.rand(5))
        self.register_buffer("scale", torch.rand(16), persistent=False)
        self.table = torch.rand(5)  # neither parameter nor buffer
        self.body[0].weight.requires_grad_(False)
        self.norm.running_mean, self.norm.running_var = torch.rand(16), torch.rand(16) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3)) * self.scale
        return self.body(x) * self.gain + self.table


class Tied(nn.Module):
    """Two layers on one weight, which only its code says."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = nn.Linear(12, 8), nn.Linear(8, 12)
        self.a, self.b = nn.Linear(8, 12), nn.Linear(8, 12)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.a(x) + self.b(x.relu()) + self.other(x)


def net() -> nn.Module:
    torch.manual_seed(3)
    return Net().eval()


def tied() -> nn.Module:
    torch.manual_seed(3)
    return Tied().eval()


def llama(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=74, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=10, max_position_embeddings=64, use_cache=False, **{"tie_word_embeddings": True, **options},
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def by_part(model: nn.Module, *devices: str) -> dict[str, str]:
    """Each part of the model on one of the devices, in turns, and of a transformers model each layer."""
    inner = getattr(model, "model", None)
    names = [n for n, _ in (*model.named_parameters(recurse=False), *model.named_buffers(recurse=False))]
    names += [n for n, _ in model.named_children() if n != "model"]
    if inner is not None:
        names += [f"model.{n}" for n, _ in inner.named_children() if n != "layers"]
        names += [f"model.layers.{i}" for i in range(len(inner.layers))]
    return {name: devices[i % len(devices)] for i, name in enumerate(names)}


def on_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model)


def on_cpu_with_buffers(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, offload_buffers=True)


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, folder / "disk", offload_buffers=True)


def in_blocks(model: nn.Module, folder: Path) -> nn.Module:
    """Whole parts are brought by one hook, which a class name asks for."""
    return accelerate.cpu_offload(model, preload_module_classes=["Sequential", "LlamaDecoderLayer"])


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.dispatch_model(model, by_part(model, "cpu", "disk"), offload_dir=folder / "parts")


def all_dispatched(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.dispatch_model(model, by_part(model, "disk"), offload_dir=folder / "all")


WAYS = [on_cpu, on_cpu_with_buffers, on_disk, in_blocks, dispatched, all_dispatched]
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
Way = Callable[[nn.Module, Path], nn.Module]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def assert_same(got: nn.Module, wanted: nn.Module) -> None:
    """The same tensors in the same places, tied alike, and no hook or device of accelerate's."""
    mine, theirs = state(got), state(wanted)
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name
        assert (mine[name].dtype, mine[name].requires_grad) == (tensor.dtype, tensor.requires_grad), name
    assert list(dict(got.named_parameters())) == list(dict(wanted.named_parameters()))
    assert set(got.state_dict()) == set(wanted.state_dict())
    for a, b in zip(got.modules(), wanted.modules(), strict=True):
        assert set(vars(a)) == set(vars(b))


def assert_as_in_memory(model: nn.Module, wanted: nn.Module, inputs: Any, **options: Any) -> Any:
    got, expected = prune(model, inputs, **options), depgraph.prune(wanted, inputs, **options)
    assert got.plan.to_json() == expected.plan.to_json()
    assert got.plan.cuts
    assert got.report.verification.status == expected.report.verification.status == "equal"
    assert_same(got.model, expected.model)
    return got


def ids_of(model: nn.Module) -> list[int]:
    own = [id(v) for m in model.modules() for v in vars(m).values()]
    return own + [id(t) for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())]


@each_way
def test_the_smaller_model_is_that_of_the_model_in_memory(way: Way, tmp_path: Path) -> None:
    model = way(net(), tmp_path)
    assert any(p.is_meta for p in model.parameters())
    assert_as_in_memory(model, net(), X)


@each_way
@pytest.mark.parametrize("runs", [0, 1], ids=["fresh", "after_a_run"])
def test_tied_weights_of_a_transformer_stay_tied(way: Way, runs: int, tmp_path: Path) -> None:
    model = way(llama(), tmp_path)
    for _ in range(runs):  # after which accelerate has untied what it had left tied
        model(IDS)
    assert not runs or model.lm_head.weight is not model.model.embed_tokens.weight
    whole = in_memory(model)
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    assert_same(whole, llama())


@pytest.mark.parametrize("way", [on_disk, dispatched], ids=lambda f: f.__name__)
def test_a_smaller_transformer_is_that_of_the_one_in_memory(way: Way, tmp_path: Path) -> None:
    result = assert_as_in_memory(way(llama(), tmp_path), llama(), {"input_ids": IDS}, max_params=0.7)
    assert result.model.lm_head.weight is result.model.model.embed_tokens.weight


@pytest.mark.parametrize("way", [on_cpu, in_blocks, dispatched, all_dispatched], ids=lambda f: f.__name__)
def test_weights_that_only_code_has_tied_stay_tied(way: Way, tmp_path: Path) -> None:
    x = torch.randn(3, 12)
    model = way(tied(), tmp_path)
    model(x)
    assert model.a.weight is not model.b.weight
    result = assert_as_in_memory(model, tied(), x)
    assert result.model.a.weight is result.model.b.weight


def test_weights_that_differ_are_not_tied(tmp_path: Path) -> None:
    """A config says that they are one, yet they were trained apart."""
    apart = llama()
    apart.lm_head.weight = nn.Parameter(apart.lm_head.weight.detach() * 2)
    model = on_disk(copy.deepcopy(apart), tmp_path)
    assert_same(in_memory(model), apart)


def test_what_is_equal_by_chance_is_not_tied(tmp_path: Path) -> None:
    """Buffers, zeros and layers that are copies of one another are not one for having the same values."""
    model = tied()
    model.copy = copy.deepcopy(model.other)
    for layer in (model.a, model.b, model.other):
        nn.init.zeros_(layer.bias)
        nn.init.ones_(layer.weight)
    model.register_buffer("like_a", model.a.weight.detach().clone())
    model.last = copy.deepcopy(model.copy)
    for way in WAYS:
        whole = in_memory(way(copy.deepcopy(model), tmp_path / way.__name__))
        names = {n for n, _ in whole.named_parameters()}
        assert {f"{n}.{t}" for n in ("a", "other", "copy", "last") for t in ("weight", "bias")} <= names, way


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_with_a_device_map(dtype: torch.dtype, tmp_path: Path) -> None:
    """Its weights were never in the model; it reads them from the checkpoint's files, in another type if asked."""
    whole = llama()
    whole.save_pretrained(tmp_path / "checkpoint")
    places = {name: "cpu" if name.endswith("1") else "disk" for name in by_part(whole, "")}
    load = {"pretrained_model_name_or_path": tmp_path / "checkpoint", "dtype": dtype}
    model = type(whole).from_pretrained(**load, device_map=places, offload_folder=tmp_path / "offload").eval()
    assert model.model.embed_tokens.weight.is_meta
    assert_as_in_memory(model, type(whole).from_pretrained(**load).eval(), {"input_ids": IDS})


@each_way
def test_the_model_given_stays_as_it_is(way: Way, tmp_path: Path) -> None:
    model = way(net(), tmp_path)
    wanted, before = model(X), ids_of(model)
    values = {n: t.clone() for n, t in state(model).items() if not t.is_meta}
    empty = [n for n, t in state(model).items() if t.is_meta]
    result = prune(model, X)
    assert ids_of(model) == before
    assert [n for n, t in state(model).items() if t.is_meta] == empty != []
    assert all(torch.equal(state(model)[n], t) for n, t in values.items())
    with torch.no_grad():
        for tensor in state(result.model).values():  # that of the smaller model is its own
            tensor.zero_()
    assert torch.equal(model(X), wanted)


def test_values_in_memory_are_not_copied(tmp_path: Path) -> None:
    def memory(tensors: dict[str, Tensor]) -> dict[str, int]:
        return {n: t.data_ptr() for n, t in tensors.items() if not t.is_meta}

    values = net().state_dict()
    model = accelerate.cpu_offload(net(), state_dict=values)
    held = {**memory(values), **memory(state(model))}
    assert memory(state(in_memory(model))) == {n: held[n] for n in state(model)}
    parts = dispatched(net(), tmp_path)
    there = memory(state(parts))
    assert there
    assert there.items() <= memory(state(in_memory(parts))).items()


def test_values_of_another_type_become_that_of_the_model() -> None:
    wide = {n: t.double() if t.is_floating_point() else t for n, t in net().state_dict().items()}
    assert_same(in_memory(accelerate.cpu_offload(net(), state_dict=wide)), net())


def test_a_copy_in_memory_is_a_model_like_any_other(tmp_path: Path) -> None:
    model = dispatched(net(), tmp_path)
    whole = in_memory(model)
    assert_same(whole, net())
    assert torch.equal(whole(X), model(X))
    assert whole.to("cpu") is whole  # which a dispatched model refuses
    parts = on_cpu(net(), tmp_path)
    parts.norm.running_mean += 1  # a buffer in memory is newer than the one that was put aside
    assert torch.equal(in_memory(parts).norm.running_mean, parts.norm.running_mean)
    with torch.inference_mode():
        assert not any(t.is_inference() for t in state(in_memory(model)).values())
    died = weakref.ref(model)
    del model
    gc.collect()
    assert died() is None  # nothing in the copy leads to it


def test_modules_keep_a_forward_of_their_own_and_their_mode() -> None:
    model = net().train()
    model.norm.eval()
    model.body[1].forward = lambda x: x.relu() + 1
    wanted = copy.deepcopy(model)
    whole = in_memory(accelerate.cpu_offload(model))
    assert [m.training for m in whole.modules()] == [m.training for m in wanted.modules()]
    assert torch.equal(whole.eval()(X), wanted.eval()(X))


def test_parameters_of_a_class_of_their_own_stay_so_in_memory(tmp_path: Path) -> None:
    class Own(nn.Parameter):
        pass

    model = net()
    model.conv.weight = Own(model.conv.weight.detach())
    model = accelerate.dispatch_model(
        model, by_part(model, "disk", "disk", "cpu"), offload_dir=tmp_path / "disk"
    )
    assert model.norm.weight.is_meta
    assert type(in_memory(model).conv.weight) is Own


def test_a_wrapper_around_the_model_comes_back(tmp_path: Path) -> None:
    result = assert_as_in_memory(nn.DataParallel(on_disk(net(), tmp_path)), nn.DataParallel(net()), X)
    assert type(result.model) is nn.DataParallel


def test_a_traced_graph_of_modules(tmp_path: Path) -> None:
    model = dispatched(torch.fx.symbolic_trace(net()), tmp_path)
    wanted = model(X)
    assert_as_in_memory(model, torch.fx.symbolic_trace(net()), X)
    assert torch.equal(model(X), wanted)


def test_the_smaller_model_is_placed(tmp_path: Path) -> None:
    """In place or not; what was placed can be pruned again."""
    wanted = depgraph.prune(net(), X)
    placed = []

    def in_place(model: nn.Module) -> None:
        dispatched(model, tmp_path)
        placed.append(model)

    def returned(model: nn.Module) -> nn.Module:
        placed.append(accelerate.cpu_offload(copy.deepcopy(model)))
        return placed[-1]

    for i, place in enumerate((in_place, returned)):
        result = prune(on_cpu(net(), tmp_path), X, place=place)
        assert result.model is placed[i]
        assert result.model.conv.weight.is_meta or result.model.norm.weight.is_meta
        assert result.plan.to_json() == wanted.plan.to_json()
        assert torch.equal(result.model(X), wanted.model(X))
        again = prune(result.model, X)
        assert_same(again.model, depgraph.prune(wanted.model, X).model)


def test_what_can_not_be_pruned_is_refused(tmp_path: Path) -> None:
    model = on_cpu(net(), tmp_path)
    with pytest.raises(InputError, match=r"no hook on this Net\n  fix: depgraph\.prune takes it as it is"):
        prune(net(), X)
    with pytest.raises(InputError, match=r"model must be a torch\.nn\.Module"):
        prune("net", X)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"place must be a function, called as place\(model\), not 'cpu'"):
        prune(model, X, place="cpu")  # type: ignore[arg-type]
    graph = depgraph.analyze(net(), X)
    for name, value in {"inplace": True, "graph": graph}.items():
        with pytest.raises(InputError, match=f"^{name} can't be given here") as error:
            prune(model, X, **{name: value})
        assert "`place` says where" in str(error.value)
    with pytest.raises(InputError, match="no example inputs"):
        prune(model, None)
    with pytest.raises(InputError, match="the model is on cpu, the example inputs on meta"):
        prune(model, X.to("meta"))


def test_quantised_weights_are_refused() -> None:
    class Packed(nn.Parameter):
        pass

    model = net()
    model.body[2].weight = Packed(model.body[2].weight.detach())
    accelerate.cpu_offload(model)
    with pytest.raises(InputError, match=r"^body\.2\.weight \(Packed\): quantised") as error:
        prune(model, X)
    assert "prune the model in floating point first" in str(error.value)


def test_what_can_not_be_copied_is_refused() -> None:
    class Own(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("Own is not for copying")

    model = net()
    model.body[2] = Own(24, 5)
    with pytest.raises(InputError, match="Net can't be copied: RuntimeError: Own is not for copying"):
        prune(accelerate.cpu_offload(model), X)


def test_options_are_those_of_prune(tmp_path: Path) -> None:
    options = {"max_params": 0.6, "importance": "wanda", "ignore": ["conv"], "recover": "auto"}
    model = on_disk(net(), tmp_path)
    assert_as_in_memory(model, net(), X, calibration=[torch.randn(4, 3, 7, 7) for _ in range(2)], **options)
    inputs = depgraph.Examples(X, (X[:1],))
    assert_as_in_memory(model, net(), inputs, pruning_ratio=0.3)


def test_without_accelerate_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate.hooks", None)
    monkeypatch.delitem(sys.modules, "depgraph.integrations.accelerate")
    with pytest.raises(depgraph.DepgraphError, match="fix: pip install accelerate"):
        importlib.import_module("depgraph.integrations.accelerate")
