"""A checkpoint pruned from file to file: the same plan and the same bytes as in memory, at bounded memory, or refused."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

import depgraph
from depgraph import Cut
from depgraph.checkpoint import outcome, pruning, writing
from depgraph.checkpoint.source import FromFiles, Notes
from depgraph.store.files import opened
from depgraph.store.layout import Folded, Laid, NotMoved
from depgraph.store.pulled import _united, check_conversion, pulled_back

HERE = Path(__file__).parent


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.head = nn.Linear(24, 5)
        self.register_buffer("table", torch.arange(24.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3))
        return self.head(y * self.table)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = (
            nn.Embedding(50, 16),
            nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16)),
        )
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x)
        return self.head(y + self.block(y))


class Half(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.bfloat16()


class Double(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.double()


class Tabled(Tied):
    """A table of more entries than runs without weights make, and tensors computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(3, 1 << 21).cumsum(1), persistent=False)
        self.register_buffer("norms", torch.zeros(50))
        self.norms.copy_(self.head.weight.detach().to("cpu").norm(dim=1))
        self.norm = self.head.weight.detach().norm()


class FrozenNorm(nn.Module):
    """Takes its numbers from a batch norm, as buffers."""

    def __init__(self, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        for name, tensor in norm.state_dict().items():
            if name != "num_batches_tracked":
                self.register_buffer(name, torch.ones(tensor.shape))
                self.get_buffer(name).copy_(tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)  # type: ignore[arg-type]


def frozen_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), FrozenNorm(nn.BatchNorm1d(24)), nn.ReLU(), nn.Linear(24, 3))


def weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 24)), nn.ReLU(), nn.Linear(24, 3))


def spectral_norm() -> nn.Module:
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 24))
    return nn.Sequential(first, nn.ReLU(), nn.utils.spectral_norm(nn.Linear(24, 3)))


def masked() -> nn.Module:
    first = nn.Linear(6, 24)
    prune.random_unstructured(first, "weight", 0.3)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(24, 3))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3))


class Unsaved(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("norms", torch.zeros(50), persistent=False)
        self.norms.copy_(self.head.weight.detach().norm(dim=1))


class Averaged(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.averages = [p.detach().clone() for p in self.block.parameters()]


class Choosing(nn.Module):
    """Which rows go through the second layer is decided by values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 20), nn.Linear(20, 20), nn.Linear(20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).relu()
        rows = y.sum(1).nonzero().flatten()
        if int(rows.sum()) >= 0:
            y = y.index_add(0, rows, self.b(y[rows]))
        return self.c(y)


class Hollow(Tied):
    """Some parameters have no entries: padding of a size that a config sets to 0, and a number alone."""

    def __init__(self) -> None:
        super().__init__()
        self.padding, self.none = nn.Parameter(torch.zeros(0, 7)), nn.Parameter(torch.zeros(7, 0))
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return super().forward(words) * self.factor + self.padding.sum() + self.none.sum()


class Placed(nn.Module):
    """Its constructor makes tables where its parameters are, runs parts to find sizes, copies layers and sets values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        with torch.no_grad():
            side = self.stem(torch.zeros(1, 3, 8, 8)).shape[-1]
        weight = self.stem[0].weight
        self.place = nn.Parameter(torch.zeros(side, 1))
        nn.init.trunc_normal_(self.place, std=0.02)
        self.first = nn.Linear(16, 24)
        self.second = copy.deepcopy(self.first)
        self.first.weight.kept = "as it is"  # type: ignore[attr-defined]
        self.second.bias.data = torch.zeros(24)
        mask = torch.ones(side, side, device=weight.device).tril()
        self.register_buffer("mask", mask.masked_fill(mask == 0, -1.0), persistent=False)
        self.register_buffer("steps", torch.zeros(side), persistent=False)
        self.steps.copy_(torch.arange(side).type_as(self.place).to(weight.device) / side)
        self.register_buffer("shift", weight.new_full((1, side), 0.1) + torch.zeros_like(self.place), False)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = ((self.stem(x) * self.steps + self.place + self.shift) * self.mask).mean((2, 3))
        return self.head((self.first(y) + self.second(y)).relu())


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WORDS = torch.arange(12).reshape(2, 6)
MODELS: dict[Any, Any] = {
    Convolutional: IMAGES,
    Placed: IMAGES,
    Tied: WORDS,
    Half: WORDS,
    Double: WORDS,
    Hollow: WORDS,
}
CRITERIA = ("l1", "l2", "lamp", "consumer_norm", "fpgm", "random")


def made(kind: Any) -> nn.Module:
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.startswith("norm.running"):
                buffer.uniform_(0.5, 1.5)
    return model


def stored(model: nn.Module, folder: Path, shards: int = 1) -> Path:
    """The model's ``state_dict`` in a folder of safetensors files; the second name of a tied tensor is left out."""
    folder.mkdir()
    seen: set[int] = set()
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            state[name] = tensor.detach().clone()
        seen.add(id(tensor))
    names = list(state)
    files = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    )
    table = {}
    for i, file in enumerate(files):
        own = names[i::shards]
        save_file({n: state[n] for n in own}, folder / file, metadata={"format": "pt"})
        table |= dict.fromkeys(own, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": table})
        )
    (folder / "README.md").write_text("mine")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def same(a: nn.Module, b: nn.Module) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert torch.equal(tensor, two[name]), name


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shards", [1, 3])
def test_plan_and_bytes_are_those_of_memory(tmp_path: Path, kind: Any, shards: int) -> None:
    model, x = made(kind), MODELS[kind]
    source = stored(model, tmp_path / "source", shards)
    before = contents(source)
    found = depgraph.checkpoint.prune(source, x, out=tmp_path / "out", factory=kind, pruning_ratio=0.5)
    wanted = depgraph.prune(model, x, pruning_ratio=0.5)
    assert found.plan.to_json() == wanted.plan.to_json()
    small = depgraph.load(kind, tmp_path / "out")
    same(small, wanted.model)
    assert contents(source) == before
    assert found.report.verification.status == wanted.report.verification.status == "equal"
    assert found.report.parameters == wanted.report.parameters
    assert found.report.macs == wanted.report.macs
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert not list(tmp_path.glob("*.partial"))
    if kind is not Half:  # in float64: how products of other sizes round depends on the processor
        wide = x.double() if x.is_floating_point() else x
        small = SimpleNamespace(model=small.double(), plan=found.plan)
        oracle.assert_equal_to_masked(model.double(), small, wide)


@pytest.mark.parametrize("factory", [frozen_norm, weight_norm, spectral_norm, masked, on_meta])
def test_buffers_that_come_from_parameters_have_their_values_from_the_files(
    tmp_path: Path, factory: Any
) -> None:
    def filled() -> nn.Module:
        return factory() if factory is not on_meta else on_meta().to_empty(device="cpu")

    torch.manual_seed(0)
    model, x = filled().eval(), torch.randn(4, 6)
    with torch.no_grad():
        for _, tensor in sorted(model.state_dict().items()):
            if tensor.is_floating_point() and (factory is on_meta or tensor.dim() == 1):
                tensor.uniform_(0.5, 1.5)
    source = stored(model, tmp_path / "source")
    found = depgraph.checkpoint.prune(source, x, out=tmp_path / "out", factory=factory, pruning_ratio=0.5)
    wanted = depgraph.prune(model, x, pruning_ratio=0.5)
    assert found.plan.to_json() == wanted.plan.to_json()
    assert found.report.verification.status == "equal"
    small = depgraph.load(filled, tmp_path / "out")
    same(small, wanted.model)
    assert torch.equal(small(x), wanted.model(x))
    with torch.no_grad():  # hooks make weights anew, without a history, which the oracle could not copy
        for one in (model.double(), small.double()):
            one(x.double())
    oracle.assert_equal_to_masked(model, SimpleNamespace(model=small, plan=found.plan), x.double())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria_that_look_at_weights(tmp_path: Path, criterion: str) -> None:
    model = made(Tied)
    source = stored(model, tmp_path / "source")
    found = depgraph.checkpoint.prune(
        source, WORDS, out=tmp_path / "out", factory=Tied, max_params=0.6, importance=criterion, verify=False
    )
    wanted = depgraph.prune(model, WORDS, max_params=0.6, importance=criterion, verify=False)
    assert found.plan.to_json() == wanted.plan.to_json()
    same(depgraph.load(Tied, tmp_path / "out"), wanted.model)


def test_scales_of_batch_norms(tmp_path: Path) -> None:
    model = made(Convolutional)
    nn.init.uniform_(model.norm.weight)
    source = stored(model, tmp_path / "source")
    options: dict[str, Any] = {
        "importance": "bn_scale",
        "scope": "global",
        "pruning_ratio": 0.4,
        "round_to": 2,
    }
    found = depgraph.checkpoint.prune(source, IMAGES, out=tmp_path / "out", factory=Convolutional, **options)
    assert found.plan.to_json() == depgraph.prune(model, IMAGES, **options).plan.to_json()


def test_files_are_what_safetensors_writes(tmp_path: Path) -> None:
    source = stored(made(Convolutional), tmp_path / "source")
    depgraph.checkpoint.prune(source, IMAGES, out=tmp_path / "out", factory=Convolutional)
    written = tmp_path / "out" / "model.safetensors"
    save_file(load_file(written), tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert written.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_another_ratio_needs_no_second_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Tied)
    source = stored(model, tmp_path / "source")
    depgraph.checkpoint.prune(source, WORDS, out=tmp_path / "a", factory=Tied, verify=False)
    notes = tmp_path / ".source.sums"
    assert notes.stat().st_size < 20_000
    read: list[str] = []
    real = depgraph.store.files.Checkpoint.rows

    def rows(self: Any, name: str, first: int, last: int) -> Any:
        read.append(name)
        return real(self, name, first, last)

    monkeypatch.setattr(depgraph.store.files.Checkpoint, "rows", rows)
    monkeypatch.setattr(pruning, "written", lambda original, weights, found, *rest: found)
    found = depgraph.checkpoint.prune(
        source, WORDS, out=tmp_path / "b", factory=Tied, pruning_ratio=0.3, verify=False
    )
    assert not read
    assert found.plan.to_json() == depgraph.prune(model, WORDS, pruning_ratio=0.3).plan.to_json()
    with torch.no_grad():
        model.head.weight.mul_(torch.linspace(3, 0, 16))  # other files: the notes say nothing of them
    stored(model, tmp_path / "other").joinpath("model.safetensors").replace(source / "model.safetensors")
    found = depgraph.checkpoint.prune(
        source, WORDS, out=tmp_path / "b", factory=Tied, pruning_ratio=0.3, verify=False
    )
    assert read
    assert found.plan.to_json() == depgraph.prune(model, WORDS, pruning_ratio=0.3).plan.to_json()


def test_dry_run_reads_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stored(made(Tied), tmp_path / "source")
    monkeypatch.setattr(
        depgraph.store.files.Checkpoint, "_read", lambda *_: pytest.fail("a value was read"), raising=True
    )
    found = depgraph.checkpoint.prune(
        source, WORDS, out=tmp_path / "out", factory=Tied, pruning_ratio=0.5, dry_run=True
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    exact = depgraph.prune(made(Tied), WORDS, pruning_ratio=0.5)
    assert found.parameters == exact.report.parameters
    assert found.bytes_read == exact.report.byte_counts[0]
    assert found.bytes_written == exact.report.byte_counts[1]
    assert found.memory > 0
    assert found.free > 0
    assert "GB" in str(found)


# ------------------------------------------------------------------------------------------------------- bad input


def _rename(source: Path) -> None:
    state = load_file(source / "model.safetensors")
    state["more.weight"] = torch.ones(3)
    save_file(state, source / "model.safetensors")


def _without(source: Path) -> None:
    state = load_file(source / "model.safetensors")
    del state["block.0.weight"]
    save_file(state, source / "model.safetensors")


def _other_shape(source: Path) -> None:
    state = load_file(source / "model.safetensors")
    state["block.0.weight"] = torch.ones(3, 4)
    save_file(state, source / "model.safetensors")


def _changed(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        state = load_file(source / "model.safetensors")
        state[name] = value(state[name])
        save_file(state, source / "model.safetensors")

    return change


def _set(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor[2, 3] = value
    return tensor


def _pickled(source: Path) -> None:
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()


def _cut_short(source: Path) -> None:
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-10])


BAD = {
    "no files": (lambda source: (source / "model.safetensors").unlink(), "no .safetensors files"),
    "pickles": (_pickled, "convert them to safetensors first"),
    "cut short": (_cut_short, "cut short"),
    "damaged": (lambda source: (source / "model.safetensors").write_bytes(b"\x05" + bytes(7) + b"{nope"), "damaged"),
    "a tensor is missing": (_without, "'block.0.weight' of the model is in none of its files"),
    "another shape": (_other_shape, r"'block.0.weight' has shape \(3, 4\) in the files, \(40, 16\) in the model"),
    "a tensor too many": (_rename, "'more.weight', as something in the model is cut"),
    "nan": (_changed("block.0.weight", lambda t: _set(t, float("nan"))), r"block.0.weight\[2, 3\] is nan, offset 35"),
    "infinite": (_changed("block.2.weight", lambda t: _set(t, -float("inf"))), r"block.2.weight\[2, 3\] is -inf, offset 83"),
    "fp8": (_changed("block.0.weight", lambda t: t.to(torch.float8_e4m3fn)), "'block.0.weight' in model.safetensors is F8_E4M3"),
    "int8": (_changed("block.0.weight", lambda t: t.to(torch.int8)), "'block.0.weight' is torch.int8 in the files"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_refused_by_name(tmp_path: Path, case: str) -> None:
    spoil, text = BAD[case]
    source = stored(made(Tied), tmp_path / "source")
    spoil(source)
    with pytest.raises(depgraph.InputError, match=text):
        depgraph.checkpoint.prune(source, WORDS, out=tmp_path / "out", factory=Tied)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))


def _missing_shard(source: Path) -> None:
    (source / "model-00002-of-00003.safetensors").unlink()


def _no_index(source: Path) -> None:
    (source / "model.safetensors.index.json").unlink()
    _missing_shard(source)


def _twice(source: Path) -> None:
    state = load_file(source / "model-00001-of-00003.safetensors")
    other = source / "model-00002-of-00003.safetensors"
    save_file({**load_file(other), **state}, other)


def _swapped(source: Path) -> None:
    path = source / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    first, second = list(data["weight_map"])[:2]
    table = data["weight_map"]
    table[first], table[second] = table[second], table[first]
    if table[first] == table[second]:
        table[first] = "model-00003-of-00003.safetensors"
    path.write_text(json.dumps(data))


def _forgetful_of(name: str) -> Callable[[Path], None]:
    def forget(source: Path) -> None:
        path = source / "model.safetensors.index.json"
        data = json.loads(path.read_text())
        del data["weight_map"][name]
        path.write_text(json.dumps(data))

    return forget


def _outside(source: Path) -> None:
    path = source / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    data["weight_map"]["block.0.bias"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(data))


BAD_SHARDS = {
    "missing": (_missing_shard, "model-00002-of-00003.safetensors is missing"),
    "missing without an index": (_no_index, "file 2 of 3 is missing"),
    "twice": (_twice, "is in model-00001-of-00003.safetensors and in model-00002-of-00003.safetensors"),
    "swapped": (_swapped, "says that '.*' is in .*, and it is"),
    "a file not in the index": (
        _forgetful_of("block.0.bias"),
        "model-00003-of-00003.safetensors is not in model.safetensors.index.json",
    ),
    "one tensor not in the index": (
        _forgetful_of("embed.weight"),
        "'embed.weight' in .* is not in model.safetensors.index.json",
    ),
    "outside": (_outside, "names files that are not in the folder"),
    "no json": (lambda source: (source / "model.safetensors.index.json").write_text("{"), "is damaged"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shards_are_refused_by_name(tmp_path: Path, case: str) -> None:
    spoil, text = BAD_SHARDS[case]
    source = stored(made(Tied), tmp_path / "source", shards=3)
    spoil(source)
    with pytest.raises(depgraph.InputError, match=text):
        depgraph.checkpoint.prune(source, WORDS, out=tmp_path / "out", factory=Tied)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))


ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"memory": "6 apples"}, "memory must be a number of bytes"),
    ({"memory": 0}, "memory must be a number of bytes"),
    ({"memory": "1MB"}, "is too little: this takes about"),
    ({"verify": True}, "verify must be 'values', 'structure' or False"),
    ({"max_latency": 0.5}, "max_latency needs a model that runs"),
    ({"importance": "wanda"}, "give calibration|uses the inputs of layers"),
    ({"factory": lambda: 3}, "must return a torch.nn.Module"),
    ({"factory": Unsaved}, "'norms' of the model is in none of its files"),
    ({"factory": Averaged}, "'averages.0' has values of its own"),
    ({"factory": lambda: 1 / 0}, "does not build the model: ZeroDivisionError"),
    ({"factory": None}, "has no config.json that says what its model is"),
    ({"pruning_ratio": 1.5}, "pruning_ratio"),
    ({"max_foo": 0.5}, "unknown argument 'max_foo'"),
    ({"dry_run": 1}, "dry_run must be True or False"),
]


@pytest.mark.parametrize(("given", "text"), ARGUMENTS, ids=[t[:30] for _, t in ARGUMENTS])
def test_bad_arguments_are_refused(tmp_path: Path, given: dict[str, Any], text: str) -> None:
    source = stored(made(Tied), tmp_path / "source")
    with pytest.raises(depgraph.InputError, match=text):
        depgraph.checkpoint.prune(source, WORDS, **{"out": tmp_path / "out", "factory": Tied, **given})
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_places_that_are_taken_are_refused(tmp_path: Path) -> None:
    source = stored(made(Tied), tmp_path / "source")
    before = contents(source)
    for out, text in (
        (source, "exists"),
        (source / "inside", "lies in the checkpoint"),
        (tmp_path / "file", "exists"),
    ):
        (tmp_path / "file").write_text("")
        with pytest.raises(depgraph.InputError, match=text):
            depgraph.checkpoint.prune(source, WORDS, out=out, factory=Tied)
    with pytest.raises(depgraph.InputError, match="is not a folder"):
        depgraph.checkpoint.prune(tmp_path / "nothing", WORDS, out=tmp_path / "out", factory=Tied)
    assert contents(source) == before


def test_too_little_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stored(made(Tied), tmp_path / "source")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(depgraph.InputError, match="GB left: nothing was written"):
        depgraph.checkpoint.prune(source, WORDS, out=tmp_path / "out", factory=Tied)
    assert not (tmp_path / "out").exists()


def test_tensors_that_the_model_lacks_stay_where_nothing_near_them_is_cut(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = Tied(), nn.Linear(50, 50)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.right(self.left(x))

    source = stored(made(Two), tmp_path / "source")
    state = load_file(source / "model.safetensors")
    save_file({**state, "right.scale": torch.ones(3)}, source / "model.safetensors")
    with pytest.raises(depgraph.InputError, match="can't keep them"):  # ours has the model's tensors alone
        depgraph.checkpoint.prune(source, WORDS, out=tmp_path / "out", factory=Two)
    save_file({**state, "left.block.0.scale": torch.ones(3)}, source / "model.safetensors")
    with pytest.raises(
        depgraph.InputError, match=r"'left.block.0.scale', as something in 'left.block.0' is cut"
    ):
        depgraph.checkpoint.prune(source, WORDS, out=tmp_path / "out", factory=Two)


def test_a_wrong_file_does_not_get_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stored(made(Tied), tmp_path / "source")
    real = writing.cut_blocks

    def wrong(rows: Any, whole: Any, shape: Any, size: int, cut: Any) -> Any:
        for block in real(rows, whole, shape, size, cut):
            yield block.flip(0) if tuple(shape) == (40, 16) else block

    monkeypatch.setattr(outcome, "cut_blocks", wrong)
    with pytest.raises(depgraph.VerificationError, match="what was written is removed"):
        depgraph.checkpoint.prune(source, WORDS, out=tmp_path / "out", factory=Tied)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["source"]
    found = depgraph.checkpoint.prune(source, WORDS, out=tmp_path / "out", factory=Tied, verify="structure")
    assert found.report.verification.status == "equal"  # says nothing of the files


# ------------------------------------------------------------------------------------------- runs that were stopped


def test_a_run_that_failed_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SYNC", 1)
    source = stored(made(Convolutional), tmp_path / "source", shards=3)
    how: dict[str, Any] = {"factory": Convolutional, "verify": False}
    depgraph.checkpoint.prune(source, IMAGES, out=tmp_path / "whole", **how)
    real, streamed = writing._append, []

    def fails(handle: int, octets: Any, name: str, sums: dict[str, int]) -> None:
        if len(streamed) == 4:
            os.write(handle, b"half of it")
            raise OSError(28, "No space left on device")
        streamed.append(name)
        real(handle, octets, name, sums)

    monkeypatch.setattr(writing, "_append", fails)
    with pytest.raises(depgraph.StoreError, match="the same call continues there"):
        depgraph.checkpoint.prune(source, IMAGES, out=tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").is_dir()
    again: list[str] = []

    def counted(handle: int, octets: Any, name: str, sums: dict[str, int]) -> None:
        again.append(name)
        real(handle, octets, name, sums)

    monkeypatch.setattr(writing, "_append", counted)
    depgraph.checkpoint.prune(source, IMAGES, out=tmp_path / "out", **how)
    assert not set(again) & set(streamed)
    _equal_folders(tmp_path / "out", tmp_path / "whole")


def test_tensors_of_many_blocks_are_those_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "BLOCK", 200)
    source = stored(made(Convolutional), tmp_path / "source")
    depgraph.checkpoint.prune(source, IMAGES, out=tmp_path / "out", factory=Convolutional, pruning_ratio=0.3)
    wanted = depgraph.prune(made(Convolutional), IMAGES, pruning_ratio=0.3).model
    same(depgraph.load(Convolutional, tmp_path / "out"), wanted)  # which looks at checksums, too


def test_a_file_whose_last_bytes_are_not_on_the_disk_does_not_get_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(handle: int) -> None:
        raise OSError(5, "Input/output error")

    source = stored(made(Tied), tmp_path / "source")
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(depgraph.StoreError, match="Input/output error"):
        depgraph.checkpoint.prune(source, WORDS, out=tmp_path / "out", factory=Tied, verify=False)
    assert not (tmp_path / "out").exists()


def _equal_folders(a: Path, b: Path) -> None:
    one, two = contents(a), contents(b)
    assert one.keys() == two.keys()
    for name in one.keys() - {"plan.json"}:  # which says when it was written
        assert one[name] == two[name], name


def test_what_was_left_of_another_request_is_not_continued(tmp_path: Path) -> None:
    source = stored(made(Tied), tmp_path / "source")
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / "model.safetensors.partial").write_bytes(b"x" * 10_000)
    (left / "journal.jsonl").write_text('{"fingerprint": "another"}\n{"file": "model.safetensors"}\n')
    depgraph.checkpoint.prune(source, WORDS, out=tmp_path / "out", factory=Tied, verify=False)
    same(depgraph.load(Tied, tmp_path / "out"), depgraph.prune(made(Tied), WORDS, verify=False).model)


KILLS = 30


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_run_that_is_killed_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stored(made(Convolutional), tmp_path / "source", shards=3)
    before = contents(source)
    how: dict[str, Any] = {"factory": Convolutional, "verify": False}
    real, pieces, last = writing._put, 0, math.inf

    def slow(handle: int, octets: Any) -> None:
        nonlocal pieces
        for i in range(0, len(octets), 64):
            if (pieces := pieces + 1) > last:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.0005)
            real(handle, memoryview(octets)[i : i + 64])

    monkeypatch.setattr(writing, "_put", slow)
    monkeypatch.setattr(writing, "SYNC", 1)
    depgraph.checkpoint.prune(source, IMAGES, out=tmp_path / "whole", **how)
    total, pieces = pieces, 0
    dice, out, kills, midway, longest = random.Random(0), tmp_path / "out", 0, 0, 0.3
    while kills < KILLS or not out.exists():
        if out.exists():
            _equal_folders(out, tmp_path / "whole")
            shutil.rmtree(out)
        # Every other run ends while it writes, however slow the machine is; the others at any moment.
        writes = kills < KILLS and kills % 2 == 0
        last = dice.randrange(total) if writes else math.inf
        child = os.fork()
        if not child:
            try:
                depgraph.checkpoint.prune(source, IMAGES, out=out, **how)
            finally:
                os._exit(0)
        begin = time.monotonic()
        end = begin + (dice.random() * longest if kills < KILLS and not writes else 600)
        while (gone := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
            time.sleep(0.001)
        if gone == (0, 0):
            os.kill(child, signal.SIGKILL)
            gone = os.waitpid(child, 0)
        if os.WIFSIGNALED(gone[1]):
            kills += 1
            midway += (tmp_path / "out.partial").exists()
        else:
            longest = max(longest, time.monotonic() - begin)
    assert midway >= KILLS // 2
    _equal_folders(out, tmp_path / "whole")
    assert contents(source) == before


MEMORY = """
import sys, resource
sys.path[:0] = [{root!r}, {here!r}]
import torch
from torch import nn
import depgraph

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(1024, 8192), nn.ReLU(), nn.Linear(8192, 1024)) for _ in range(12))
    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x

x = torch.randn(1, 1024)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = depgraph.checkpoint.prune({source!r}, x, out={out!r}, factory=Wide, verify={verify!r})
print(found.report.verification.status)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("verify", ["values", False])
def test_memory_is_bounded(tmp_path: Path, verify: Any) -> None:
    """805 MB of weights, with fewer than 350 MB beyond the imports."""
    source = tmp_path / "source"
    source.mkdir()
    dice = torch.Generator().manual_seed(0)
    for i in range(12):
        state = {
            f"layers.{i}.0.weight": torch.randn(8192, 1024, generator=dice) / 32,
            f"layers.{i}.0.bias": torch.zeros(8192),
            f"layers.{i}.2.weight": torch.randn(1024, 8192, generator=dice) / 90,
            f"layers.{i}.2.bias": torch.zeros(1024),
        }
        save_file(state, source / f"model-{i + 1:05}-of-00012.safetensors")
    text = MEMORY.format(
        root=str(HERE.parent), here=str(HERE), source=str(source), out=str(tmp_path / "out"), verify=verify
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    status, kilobytes = done.stdout.split()
    assert status == ("equal" if verify else "skipped")
    assert int(kilobytes) < 350_000


# ---------------------------------------------------------------------------------------------- layouts on disk


def test_where_entries_come_from() -> None:
    """What functions of torch make of stand-ins is what they make of tensors."""
    values = {n: torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i, n in enumerate("abc")}
    stands = {n: Laid.stored(n, t.shape) for n, t in values.items()}

    def mixed(t: Any) -> Any:
        joined = torch.cat([torch.stack([t["a"], t["b"]]), torch.stack([t["c"], t["a"]])], dim=1)
        left, right = torch.chunk(joined.transpose(1, 2).contiguous(), 2, dim=2)
        return torch.cat([right.squeeze(0), left], dim=1).unbind(0)[1]

    assert torch.equal(evaluated(mixed(stands), values), mixed(values))


def evaluated(laid: Any, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a stand-in says, of the values of stored tensors."""
    assert isinstance(laid, Laid)
    made_ = torch.full(tuple(laid.shape), float("nan"))
    for part in laid.parts:
        source = values[part.name]
        for d, index in sorted(part.fixed, reverse=True):
            source = source.select(d, index)
        key = tuple(at if isinstance(at, int) else slice(at.place, at.place + at.size) for at in part.dims)
        spans = [at for at in part.dims if not isinstance(at, int)]
        piece = source.permute([at.source for at in spans])
        for d, at in enumerate(spans):
            piece = piece.index_select(d, torch.arange(at.size) * at.step + at.first)
        assert torch.isnan(made_[key]).all(), "two parts have one place"
        made_[key] = piece
    return made_


def interleaved(t: Any, dim: int = 0) -> Any:
    shape = list(t.shape)
    shape[dim : dim + 1] = [shape[dim] // 2, 2]
    return t.reshape(shape).transpose(dim, dim + 1).reshape(t.shape).contiguous()


def rotated(t: Any, heads: int) -> Any:
    rows, width = t.shape
    return t.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


ORDERS = {
    "interleaved": lambda t: interleaved(t["a"]),
    "columns": lambda t: interleaved(t["a"], 1),
    "halves": lambda t: interleaved(t["b"]).chunk(2, 0)[1],
    "twice": lambda t: interleaved(interleaved(t["a"])),
    "back": lambda t: t["a"].reshape(2, 6, 8).transpose(0, 1).reshape(12, 8),
    "heads": lambda t: rotated(t["a"], 3),
    "of a fused one": lambda t: rotated(t["b"].chunk(3)[1], 2),
    "of two": lambda t: rotated(torch.cat([t["a"], t["b"]]), 4),
    "stacked": lambda t: interleaved(torch.stack([t["a"], t["a"]]), 1),
    "and transposed": lambda t: t["a"].reshape(3, 4, 2, 4).permute(2, 3, 1, 0).reshape(8, -1),
    "one more dim": lambda t: t["a"].reshape(1, 12, 8).transpose(1, 2).squeeze(0),
}


@pytest.mark.parametrize("order", ORDERS)
def test_changes_of_order_are_followed(tmp_path: Path, order: str) -> None:
    values = {
        n: torch.randn(rows, 8, generator=torch.Generator().manual_seed(i))
        for i, (n, rows) in enumerate({"a": 12, "b": 12}.items())
    }
    stands = {n: Laid.stored(n, t.shape) for n, t in values.items()}
    laid, wanted = ORDERS[order](stands), ORDERS[order](values)
    assert torch.equal(evaluated(laid, values), wanted)
    save_file(values, tmp_path / "model.safetensors")
    checkpoint = opened(tmp_path)
    made_ = {"it": torch.empty(wanted.shape, device="meta")}
    weights = FromFiles(checkpoint, {"it": laid}, made_, Notes(checkpoint, {"it": laid}))
    assert torch.equal(weights.stored("it"), wanted)
    assert torch.equal(weights.rows("it", 1, len(wanted) - 1), wanted[1:-1])
    checkpoint.close()


def test_single_numbers_are_stacked(tmp_path: Path) -> None:
    """Such as a scale of each expert."""
    save_file({n: torch.tensor(v) for n, v in (("a", 2.0), ("b", 3.0))}, tmp_path / "model.safetensors")
    checkpoint = opened(tmp_path)
    laid = {"it": torch.stack([Laid.stored(n, ()) for n in "ab"])}  # type: ignore[misc]
    weights = FromFiles(
        checkpoint,
        laid,
        {"it": torch.empty(2, device="meta")},
        Notes(checkpoint, laid),  # type: ignore[arg-type]
    )
    assert weights.stored("it").tolist() == [2.0, 3.0]
    assert weights.rows("it", 1, 2).tolist() == [3.0]
    checkpoint.close()


def test_what_does_more_than_move_entries_is_refused() -> None:
    stand = Laid.stored("a", (4, 6))
    for spoil in (
        lambda t: torch.reshape(t, (6, 4)),
        lambda t: t * 2,
        lambda t: t[0],
        lambda t: t.view(3, 8),
        lambda t: t.view(4, 3),
    ):
        with pytest.raises((NotMoved, TypeError)):
            spoil(stand)
    assert type(stand.view(24)) is Folded  # no tensor of the files, unless it is taken apart again
    with pytest.raises(NotMoved, match=r"Tensor\.chunk of a reshaped tensor"):
        stand.view(24).chunk(2)


def pulled(order: Any, small_order: Any, keep: list[int]) -> None:
    """The rows that are kept of a stored tensor, put in order again, are those kept of the tensor in order."""
    values = {"a": torch.arange(96.0).reshape(12, 8)}
    laid = order({"a": Laid.stored("a", (12, 8))})
    cuts = {"it": Cut((12, 8), (np.array(keep), None))}
    stored, names = pulled_back({"it": laid}, cuts, {"a": (12, 8)})
    left = {"a": stored["a"].slice(values["a"])}
    after = small_order({"a": Laid.stored("a", left["a"].shape)})
    check_conversion({"it": laid}, {"it": after}, cuts, stored, names)
    assert torch.equal(small_order(left), cuts["it"].slice(order(values)))


def test_cuts_go_back_through_changes_of_order() -> None:
    pulled(ORDERS["interleaved"], ORDERS["interleaved"], [1, 2, 5, 7, 8, 11])
    pulled(ORDERS["heads"], lambda t: rotated(t["a"], 2), [0, 1, 2, 3, 8, 9, 10, 11])
    pulled(ORDERS["heads"], ORDERS["heads"], [1, 3, 4, 6, 8, 10])
    for keep in ([0, 1, 2, 3], [1, 2, 5, 7, 8, 10]):  # not the same of both halves
        with pytest.raises(
            NotMoved, match="it: the smaller one is not what its class makes of smaller files"
        ):
            pulled(ORDERS["interleaved"], ORDERS["interleaved"], keep)


def test_rows_that_are_stacked_from_one_tensor_come_out_as_they_are() -> None:
    def stack(rows: int) -> Any:
        return torch.stack([*reversed(torch.chunk(Laid.stored("a", (rows, 8)), 2))])

    cuts = {"x": Cut((2, 6, 8), (None, np.array([0, 2, 5]), None))}
    stored = {"a": Cut((12, 8), (np.array([0, 2, 5, 6, 8, 11]), None))}
    check_conversion({"x": stack(12)}, {"x": stack(6)}, cuts, stored, {})
    stored = {"a": Cut((12, 8), (np.array([0, 2, 4, 6, 8, 11]), None))}
    with pytest.raises(NotMoved, match="x: the smaller one"):
        check_conversion({"x": stack(12)}, {"x": stack(6)}, cuts, stored, {})


def test_halves_that_lost_unlike_counts_are_not_what_is_loaded() -> None:
    first, second = Laid.stored("a", (12, 8)).chunk(2)
    cuts = {"x": Cut((6, 8), (np.array([0, 1]), None)), "y": Cut((6, 8), (np.array([0, 1, 2, 3]), None))}
    stored, names = pulled_back({"x": first, "y": second}, cuts, {"a": (12, 8)})
    after = dict(zip("xy", Laid.stored("a", (6, 8)).chunk(2), strict=True))
    with pytest.raises(NotMoved, match="x: the smaller one"):
        check_conversion({"x": first, "y": second}, after, cuts, stored, names)


def test_cuts_of_stacked_experts_are_pulled_back() -> None:
    shapes = {f"{i}.{n}": (6, 5) for i in range(3) for n in ("gate", "up")}
    stands = {n: Laid.stored(n, s) for n, s in shapes.items()}
    fused = torch.cat([torch.stack([stands[f"{i}.{n}"] for i in range(3)]) for n in ("gate", "up")], dim=1)
    keep = (np.array([0, 2]), np.array([1, 2, 5, 7, 8, 11]), np.array([0, 3]))
    cuts, names = pulled_back({"fused": fused}, {"fused": Cut((3, 12, 5), keep)}, shapes)
    assert names == {"1.gate": None, "1.up": None, "2.gate": "1.gate", "2.up": "1.up"}
    values = {
        n: torch.randn(s, generator=torch.Generator().manual_seed(i))
        for i, (n, s) in enumerate(shapes.items())
    }
    whole = torch.cat([torch.stack([values[f"{i}.{n}"] for i in range(3)]) for n in ("gate", "up")], dim=1)
    left = {new: cuts[n].slice(values[n]) for n in values if (new := names.get(n, n)) is not None}
    small = torch.cat([torch.stack([left[f"{i}.{n}"] for i in range(2)]) for n in ("gate", "up")], dim=1)
    assert torch.equal(small, Cut((3, 12, 5), keep).slice(whole))


def test_headers_that_lie_are_refused(tmp_path: Path) -> None:
    def write(data: dict[str, Any], size: int) -> None:
        text = json.dumps(data).encode()
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))

    for data, size, text in (
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
            4,
            "has 4 bytes, which is not what F32",
        ),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 400, "its header says"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8, "leaves a gap before 'a'"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "damaged"),
        ({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, 1, "only with a scale"),
        ({"a": [1]}, 4, "damaged"),
    ):
        write(data, size)
        with pytest.raises(depgraph.InputError, match=text):
            opened(tmp_path)


def test_what_a_process_had_before_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is held against what is resident now, not against an earlier peak."""
    source = stored(made(Tied), tmp_path / "source")
    monkeypatch.setattr(outcome, "resident", lambda: 10**13)
    found = depgraph.checkpoint.prune(
        source, WORDS, out=tmp_path / "out", factory=Tied, memory="4GB", verify=False
    )
    assert found.peak_memory == 10**13


def test_constructors_find_parameters_where_they_put_them(tmp_path: Path) -> None:
    """So their tables have values, and none of the parameters has."""
    shell, model = depgraph.checkpoint.shell(stored(made(Placed), tmp_path / "source"), Placed), made(Placed)
    assert all(p.is_meta and type(p) is nn.Parameter for p in shell.parameters())
    for name, buffer in model.named_buffers():
        assert torch.equal(shell.get_buffer(name), buffer), name
    assert shell.first.weight.kept == "as it is"
    assert not vars(shell.second.weight)
    assert [p.requires_grad for p in shell.parameters()] == [p.requires_grad for p in model.parameters()]


def test_tables_of_any_size_have_values(tmp_path: Path) -> None:
    shell = depgraph.checkpoint.shell(stored(made(Tabled), tmp_path / "source"), Tabled)
    assert torch.equal(shell.table, made(Tabled).table)
    assert torch.equal(shell.norms, made(Tabled).norms)
    assert shell.norm.is_meta


def test_forward_that_decides_by_values_needs_them_in_memory(tmp_path: Path) -> None:
    source = stored(made(Choosing), tmp_path / "source")
    found = depgraph.checkpoint.prune(source, torch.ones(2, 6), out=tmp_path / "out", factory=Choosing)
    wanted = depgraph.prune(made(Choosing), torch.ones(2, 6))
    assert found.plan.to_json() == wanted.plan.to_json()
    same(depgraph.load(Choosing, tmp_path / "out"), wanted.model)


def test_and_is_refused_where_they_do_not_fit(tmp_path: Path) -> None:
    source = stored(made(Choosing), tmp_path / "source")
    with pytest.raises(
        depgraph.TraceError,
        match=r"it was run without values, as memory=1e-06 GB allows; with them it would take 7\.5e-06 GB",
    ):
        depgraph.checkpoint.prune(
            source, torch.ones(2, 6), out=tmp_path / "out", factory=Choosing, memory="1KB"
        )


def test_parts_that_overlap_are_not_moved() -> None:
    assert list(_united("a", {2: np.array([2, 5]), 0: np.array([0, 1])})) == [0, 1, 2, 5]
    for overlap in ({0: [3], 3: [3]}, {0: [0, 3, 4], 3: [3]}, {0: [1, 1]}):
        with pytest.raises(NotMoved, match="a: its parts overlap"):
            _united("a", {first: np.array(piece) for first, piece in overlap.items()})
