"""Data parallel, compiled and sharded models, trainers' modules and adapters."""

from __future__ import annotations

import copy
import importlib.util
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from checks import prune_and_check
from oracle import assert_untouched, snapshot
from small_models import Plain, Written, fresh, pixels, vectors
from torch import nn

import depgraph

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def check_wrapped(wrap: Callable[[nn.Module], nn.Module], inner: str) -> depgraph.PruneResult:
    """The same class, names and values as the unwrapped model, pruned; and it trains."""
    net = fresh(Written)
    bare = depgraph.prune(net, vectors(5))
    model = wrap(fresh(Written)).eval()
    before = snapshot(model)
    result = depgraph.prune(model, vectors(5))
    assert_untouched(model, before)
    assert result.report.verification.status == "equal"
    assert type(result.model) is type(model)
    assert list(result.model.state_dict()) == [f"{inner}.{n}" for n in net.state_dict()]
    for name, tensor in bare.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[f"{inner}.{name}"], tensor), name
        assert torch.equal(result.plan.mask(f"{inner}.{name}"), bare.plan.mask(name)), name
    assert getattr(result.model, inner).width == 7
    x = vectors(5, seed=3)
    torch.testing.assert_close(result.model(x), bare.model(x))
    result.model.train()(x).square().sum().backward()
    bare.model.train()(x).square().sum().backward()
    wanted = {f"{inner}.{n}": p.grad for n, p in bare.model.named_parameters()}
    torch.testing.assert_close({n: p.grad for n, p in result.model.named_parameters()}, wanted)
    assert all(p.grad is None for p in model.parameters())
    return result


def test_data_parallel() -> None:
    check_wrapped(nn.DataParallel, "module")


@pytest.mark.slow
@pytest.mark.parametrize("unused", [False, True])
def test_distributed_data_parallel(unused: bool, one_process: None) -> None:
    def wrap(net: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(
            net, find_unused_parameters=unused, static_graph=not unused
        )

    result = check_wrapped(wrap, "module")
    assert result.model.find_unused_parameters is unused
    model = wrap(fresh(Written))
    before = snapshot(model.module)
    with pytest.raises(depgraph.InputError, match=r"model\.module"):
        depgraph.prune(model, vectors(5), inplace=True)
    assert_untouched(model.module, before)
    model(vectors(5)).sum().backward()  # its reducer is as it was


def test_compiled() -> None:
    check_wrapped(compiled, "_orig_mod")


@pytest.mark.slow
def test_compiled_in_place() -> None:
    """Also when it has compiled code for the sizes it had."""
    for build, x in ((Plain, pixels()[0]), (Written, vectors(5))):
        model, bare = compiled(fresh(build)), fresh(build)
        model(x)
        assert depgraph.prune(model, x, inplace=True).model is model
        torch.testing.assert_close(model(x), depgraph.prune(bare, x).model(x))


def test_wrapped_parts() -> None:
    """One layer compiled, one in DataParallel inside it, a compiled function in between, and a hook on the wrapper."""

    def build() -> nn.Module:
        net = Plain()
        net.b = compiled(nn.DataParallel(net.b))
        net.c = nn.DataParallel(net.c)
        net.c.register_forward_hook(lambda module, inputs, out: out * 2)
        function = torch.compile(lambda t: t.tanh() * 3, backend="eager")
        net.a.register_forward_hook(lambda module, inputs, out: function(out))
        return net

    net = fresh(build)
    result = prune_and_check(net, pixels(), check_inputs=pixels(1), pruning_ratio=0.5)
    small = result.model
    assert [type(m) for m in small.modules()] == [type(m) for m in net.modules()]
    assert small.b.module.out_channels == 6
    assert small.c.module.in_features == 6


def test_compiled_by_its_own_method() -> None:
    """`module.compile()` keeps the class; the copy is not compiled and runs as it is."""
    net = fresh(Plain)
    net.compile(backend="eager")
    net(*pixels())
    assert type(prune_and_check(net, pixels(), pruning_ratio=0.5).model) is Plain


def test_sharded_models_are_refused(one_process: None) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model = fully_shard(fresh(Written).float(), mesh=mesh)
    with pytest.raises(depgraph.InputError, match="sharded"):
        depgraph.prune(model, vectors(5).float())


class Attended(nn.Module):
    """As Lightning's modules: a trainer that must not be asked for too early, a lock, hyperparameters, its own steps."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.hparams = {"width": width, "rate": 1e-3}
        self.lock, self._trainer = threading.Lock(), None
        self.net = nn.Sequential(nn.Linear(5, width), nn.GELU(), nn.Linear(width, 3))

    @property
    def trainer(self):
        if self._trainer is None:
            raise RuntimeError("not attached to a trainer")
        return self._trainer

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return self(batch).square().mean()


def test_modules_with_a_trainer_and_a_lock() -> None:
    """What can't be copied is shared; what must not be touched is not."""
    net = fresh(Attended)
    result = depgraph.prune(net, vectors(5))
    assert result.report.verification.status == "equal"
    assert type(result.model) is Attended
    assert result.model.lock is net.lock
    assert [p.shape for p in result.model.parameters()] == [(6, 5), (6,), (3, 6), (3,)]
    result.model.training_step(vectors(5), 0).backward()


def installed(name: str) -> Any:
    """A library that tests can do without."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    import vision_ops  # noqa: F401  # makes torchvision fit for import, as these libraries import it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


@pytest.mark.slow
def test_lightning() -> None:
    lightning = installed("lightning")

    class Net(lightning.LightningModule):
        def __init__(self, width: int = 12):
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(5, width), nn.GELU(), nn.Linear(width, 3))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            return self(batch).square().mean()

    result = prune_and_check(fresh(Net), (vectors(5),), pruning_ratio=0.5)
    assert type(result.model) is Net
    assert result.model.net[0].out_features == 6


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter beside it."""

    def __init__(self, columns: int, rows: int, rank: int = 4):
        super().__init__()
        self.base_layer = nn.Linear(columns, rows).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(columns, rank, bias=False), nn.Linear(rank, rows, bias=False)
        self.scaling, self.dropout = 2.0, nn.Dropout(0.1)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(self.dropout(x))) * self.scaling

    def merged(self) -> nn.Linear:
        linear = copy.deepcopy(self.base_layer)
        with torch.no_grad():
            linear.weight += self.scaling * self.lora_B.weight @ self.lora_A.weight
        return linear


def test_adapters_follow_their_base_layer() -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(5, 12), nn.GELU(), Adapted(12, 14), nn.GELU(), Adapted(14, 11), nn.Linear(11, 3)
        )

    net = fresh(build)
    small = prune_and_check(net, (vectors(5),), check_inputs=(vectors(5, seed=1),), pruning_ratio=0.5).model
    assert small[2].lora_A.weight.shape == (4, 6)  # the rank stays unless it is named
    assert small[2].lora_B.weight.shape == (7, 4)
    assert small[2].base_layer.weight.shape == (7, 6)
    assert not small[2].base_layer.weight.requires_grad
    whole = small(vectors(5))
    small[2], small[4] = small[2].merged(), small[4].merged()
    torch.testing.assert_close(small(vectors(5)), whole)


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"bias": "lora_only", "lora_dropout": 0.1}], ids=str
)
def test_peft(options: dict[str, Any]) -> None:
    peft = installed("peft")

    def build() -> nn.Module:
        net = nn.Sequential(nn.Linear(5, 12), nn.GELU(), nn.Linear(12, 14), nn.GELU(), nn.Linear(14, 3))
        return peft.get_peft_model(net, peft.LoraConfig(r=6, lora_alpha=9, target_modules=["2"], **options))

    net = fresh(build)
    result = prune_and_check(net, (vectors(5),), check_inputs=(vectors(5, seed=1),), pruning_ratio=0.5)
    small = result.model
    assert type(small) is type(net)
    layer = small.base_model.model[2]
    assert layer.lora_B["default"].weight.shape == (7, 6)  # the rank stays, and an adapter loads again
    assert layer.lora_A["default"].weight.shape[1] == layer.base_layer.in_features
    whole = small(vectors(5))
    torch.testing.assert_close(small.merge_and_unload()(vectors(5)), whole)
