"""Folders that several write to, that must not go, or that were forged: what is in them stays, nothing else is let in."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import depgraph
from depgraph.store import document, folders


class Small(nn.Module):
    """A function, a cache and a table of functions as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 5)
        self.act: Any = F.relu
        self.acts = {"relu": F.relu, "list": [F.relu]}
        self.held = [nn.Linear(2, 2)]
        self.cache: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.act(self.a(x)))


def pruned() -> depgraph.PruneResult:
    torch.manual_seed(0)
    return depgraph.prune(Small().eval(), torch.randn(2, 6))


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_of_two_that_save_to_one_folder_neither_loses_a_file(tmp_path: Path) -> None:
    result = pruned()
    folder = depgraph.save(result, tmp_path / "saved")
    (folder / "README").write_text("mine")

    def tokenizer(new: Path) -> None:
        (new / "tokenizer.json").write_text("{}")

    other = threading.Thread(target=depgraph.save, args=(result, folder), kwargs={"beside": tokenizer})

    def meanwhile(new: Path) -> None:
        other.start()
        other.join(1)  # without a lock it is done by now

    depgraph.save(result, folder, beside=meanwhile)
    other.join()
    assert {"README", "tokenizer.json", "plan.json", "model.safetensors"} == names(folder)
    assert names(tmp_path) == {"saved"}


def test_parents_are_made_and_links_stay_links(tmp_path: Path) -> None:
    result = pruned()
    folder = depgraph.save(result, tmp_path / "some" / "where" / "saved")
    (tmp_path / "data").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "data").symlink_to(tmp_path / "data")
    (folder / "data").symlink_to(tmp_path / "data")
    depgraph.save(result, folder)
    assert (folder / "data").is_symlink()
    assert (folder / "notes" / "data").is_symlink()


def test_folders_change_names_in_one_step_or_not_at_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "says").write_text(name)
    done = folders._exchange(tmp_path / "a", tmp_path / "b")
    assert type(done) is bool
    assert [(tmp_path / n / "says").read_text() for n in "ab"] == (["b", "a"] if done else ["a", "b"])
    assert not folders._exchange(tmp_path / "a", tmp_path / "nothing")


@pytest.mark.parametrize("exchanges", [True, False])
def test_what_is_written_into_a_folder_while_it_is_replaced_stays(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = pruned()
    folder = depgraph.save(result, tmp_path / "saved")
    (folder / "README").write_text("first")
    (folder / "more").mkdir()
    if not exchanges:
        monkeypatch.setattr(folders, "_exchange", lambda a, b: False)

    def meanwhile(new: Path) -> None:
        (folder / "README").write_text("second")
        (folder / "notes").write_text("new")

    depgraph.save(result, folder, beside=meanwhile)
    assert (folder / "README").read_text() == "second"
    assert {"README", "notes", "more", "plan.json", "model.safetensors"} == names(folder)
    assert names(tmp_path) == {"saved"}


@pytest.mark.parametrize("inner", ["", "below"])
def test_the_working_directory_is_not_taken_away(
    inner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = pruned()
    folder = depgraph.save(result, tmp_path / "saved")
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / inner)
    with pytest.raises(depgraph.StoreError, match="working directory"):
        depgraph.save(result, folder)
    assert Path.cwd() == folder / inner
    assert os.listdir(folder)
    depgraph.save(result, "new")
    depgraph.load(Small, "new")


def test_what_killed_processes_have_left_is_removed(tmp_path: Path) -> None:
    result = pruned()
    folder = depgraph.save(result, tmp_path / "saved")
    left, others = f".saved.{'0' * 32}.part", (f".other.{'0' * 32}.part", ".saved.mine.part")
    for name in (left, *others):
        (tmp_path / name).mkdir()
    depgraph.save(result, folder)
    assert names(tmp_path) == {"saved", *others}
    folder.rename(tmp_path / f".saved.{'1' * 32}.old")  # killed between two renames
    (tmp_path / f".saved.{'1' * 32}.old" / "README").write_text("mine")
    depgraph.save(result, folder)
    assert names(tmp_path) == {"saved", *others}
    assert (folder / "README").read_text() == "mine"


@pytest.mark.parametrize("length", [100, 217, 255, 256])
def test_names_of_every_length(length: int, tmp_path: Path) -> None:
    result, folder = pruned(), tmp_path / ("n" * length)
    if length > 255:
        with pytest.raises(depgraph.StoreError, match="can't be written"):
            depgraph.save(result, folder)
        with pytest.raises(depgraph.StoreError):
            depgraph.load(Small, folder)
    else:
        for _ in range(2):
            depgraph.load(Small, depgraph.save(result, folder))
        assert names(tmp_path) == {folder.name}


@pytest.mark.parametrize("name", ["a\0b", "", 3, None, b"bytes"])
def test_what_is_no_path_is_refused(name: Any) -> None:
    result = pruned()
    for call in (
        lambda: depgraph.save(result, name),
        lambda: depgraph.load(Small, name),
        lambda: depgraph.store.load_plans(name),
    ):
        with pytest.raises(depgraph.InputError, match="folder must be a path"):
            call()
    with pytest.raises(depgraph.InputError, match="can't be found"):
        depgraph.load("..a:b", "somewhere")


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys", [["act"], ["acts", "relu"], ["acts", "list", 0], ["held", 0, "_forward_hooks", 1], ["training"]]
)
def test_no_tensor_takes_the_place_of_what_is_none(keys: list[Any], tmp_path: Path) -> None:
    folder = depgraph.save(pruned(), tmp_path / "saved")
    data = json.loads((folder / "plan.json").read_text())
    del data["sha256"]
    text = json.dumps({**data, "held": {"a.bias": [["", keys]]}})[1:]
    (folder / "plan.json").write_text(f"{document._first_line(text)}\n{text}\n")
    with pytest.raises(depgraph.StoreError, match="the model has no attribute"):
        depgraph.load(Small, folder)


def test_a_cache_that_was_filled_comes_back(tmp_path: Path) -> None:
    result = pruned()
    result.model.cache = torch.ones(3)  # type: ignore[assignment]
    loaded: Any = depgraph.load(Small, depgraph.save(result, tmp_path / "saved"))
    assert torch.equal(loaded.cache, torch.ones(3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_config_names_no_code_to_fetch(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import vision_ops  # noqa: F401  makes torchvision importable, which transformers imports

    from depgraph.integrations import hugging_face

    config = transformers.BertConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    forged = {"_attn_implementation": "somebody/kernel", "_attn_implementation_internal": "somebody/kernel",
              "attn_implementation": {"": "somebody/kernel"}, "experts_implementation": "somebody/kernel",
              "auto_map": {"AutoModel": "somebody/model--code.Model"}}  # fmt: skip
    stock = tmp_path / "stock"
    model.save_pretrained(stock)
    said = json.loads((stock / "config.json").read_text())
    (stock / "config.json").write_text(json.dumps({**said, **forged}))
    assert hugging_face.from_folder(stock).config._attn_implementation == "sdpa"

    folder = depgraph.save(
        depgraph.prune(model, torch.randint(0, 17, (2, 5)), pruning_ratio=0.3, verify=False),
        tmp_path / "ours",
    )
    data = json.loads((folder / "plan.json").read_text())
    del data["sha256"]
    data["config"] |= forged
    text = json.dumps(data)[1:]
    (folder / "plan.json").write_text(f"{document._first_line(text)}\n{text}\n")
    for kind in (transformers.AutoModel, transformers.BertModel):
        assert hugging_face.load_pretrained(kind, folder).config._attn_implementation == "sdpa"

    (stock / "model.safetensors").write_bytes(b"nothing")
    for text, error in (
        (json.dumps(said), depgraph.StoreError), ("{", depgraph.StoreError), ("[]", depgraph.StoreError),
        (json.dumps({**said, "architectures": ["pipeline", 3]}), depgraph.InputError),
        (json.dumps({**said, "model_type": "nothing"}), depgraph.StoreError),
        (json.dumps({**said, "hidden_size": "x"}), depgraph.StoreError),
    ):  # fmt: skip
        (stock / "config.json").write_text(text)
        with pytest.raises(error):
            hugging_face.from_folder(stock)
    with pytest.raises(depgraph.StoreError):
        hugging_face.from_folder(tmp_path / "nowhere")
    with pytest.raises(depgraph.InputError, match="must be a path"):
        hugging_face.from_folder("a\0b")
