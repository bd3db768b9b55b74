"""Folders of transformers models: loaded by a process that has never seen the original, with and without depgraph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import depgraph

pytest.importorskip("transformers")
import vision_ops  # noqa: F401  # makes torchvision importable, which transformers imports

from depgraph.integrations import hugging_face

pytestmark = pytest.mark.filterwarnings("ignore")

HERE = Path(__file__).parent


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=48, intermediate_size=74, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=10, max_position_embeddings=64, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=97, hidden_size=44, intermediate_size=74, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, num_labels=3,
        )
    ).eval()  # fmt: skip


def words() -> torch.Tensor:
    return torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(3))


def elsewhere(program: str, folder: Path) -> torch.Tensor:
    """What `program` puts into `logits`, run by a process of its own."""
    words_at, logits_at = folder.parent / "words.pt", folder.parent / "logits.pt"
    torch.save(words(), words_at)
    text = (
        f"import sys; sys.path[:0] = [{str(HERE.parent)!r}, {str(HERE)!r}]\nimport torch, vision_ops\n"
        f"words = torch.load({str(words_at)!r}); folder = {str(folder)!r}\n{program}\n"
        f"torch.save(logits.detach(), {str(logits_at)!r})"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(logits_at)


PLAIN = """
sys.modules["depgraph"] = None  # not installed
from transformers import {kind}
logits = {kind}.from_pretrained(folder)(words).logits
"""
OURS = """
from transformers import {kind}
from depgraph.integrations import hugging_face
logits = hugging_face.load_pretrained({kind}, folder).eval()(words).logits
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "kind", "ignore"),
    [
        (llama, "AutoModelForCausalLM", ["*self_attn*"]),
        (bert, "AutoModelForSequenceClassification", ["*attention.self*"]),
    ],
    ids=["llama", "bert"],
)
def test_uniform_widths_load_without_depgraph(
    make: Any, kind: str, ignore: list[str], tmp_path: Path
) -> None:
    result = depgraph.prune(make(), {"input_ids": words()}, pruning_ratio=0.5, ignore=ignore, uniform=True)
    wanted = result.model(words()).logits
    assert sum(p.numel() for p in result.model.parameters()) < 0.9 * sum(
        p.numel() for p in make().parameters()
    )
    says = hugging_face.save_pretrained(result, tmp_path / "saved")
    assert says == []
    assert torch.equal(elsewhere(PLAIN.format(kind=kind), tmp_path / "saved"), wanted)
    assert torch.equal(elsewhere(OURS.format(kind=kind), tmp_path / "saved"), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "kind"),
    [(llama, "LlamaForCausalLM"), (bert, "AutoModelForSequenceClassification")],
    ids=["llama", "bert"],
)
def test_other_widths_load_by_one_line(make: Any, kind: str, tmp_path: Path) -> None:
    """By global scores every layer comes out different; plain from_pretrained must not get a chance to be wrong."""
    uniform = depgraph.prune(
        make(), {"input_ids": words()}, pruning_ratio=0.5, ignore=["*self*"], uniform=True
    )
    hugging_face.save_pretrained(uniform, tmp_path / "saved")  # whose config.json must go
    (tmp_path / "saved" / "tokenizer.json").write_text("{}")
    result = depgraph.prune(make(), {"input_ids": words()}, max_params=0.6, importance="l1")
    says = hugging_face.save_pretrained(result, tmp_path / "saved")
    assert says
    assert sorted(p.name for p in (tmp_path / "saved").iterdir() if p.name != "other.safetensors") == [
        "model.safetensors", "plan.json", "tokenizer.json"]  # fmt: skip
    assert torch.equal(elsewhere(OURS.format(kind=kind), tmp_path / "saved"), result.model(words()).logits)


@pytest.mark.slow
def test_shards_of_a_wrapped_model_load_without_depgraph(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    model = torch.nn.DataParallel(bert())
    result = depgraph.prune(
        model, {"input_ids": words()}, pruning_ratio=0.5, ignore=["*attention.self*"], uniform=True
    )
    assert hugging_face.save_pretrained(result, tmp_path / "saved", max_shard_bytes=20_000) == []
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 1
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(words()).logits, result.model(words()).logits)


@pytest.mark.slow
def test_what_a_config_would_compute_anew_is_noticed(tmp_path: Path) -> None:
    """Half of each head: all widths are equal, but the scale and the rotary frequencies are the original's."""
    result = depgraph.prune(llama(), {"input_ids": words()}, pruning_ratio=0.5, granularity="fine")
    assert result.model.config.head_dim < 10
    says = "\n".join(hugging_face.save_pretrained(result, tmp_path / "saved"))
    assert "self_attn.scaling" in says
    assert "inv_freq" in says


def test_models_of_other_libraries_are_refused(tmp_path: Path) -> None:
    with pytest.raises(depgraph.InputError, match=r"use depgraph\.save"):
        hugging_face.save_pretrained(torch.nn.Linear(2, 3), tmp_path / "saved")


def test_a_config_of_an_unknown_kind_is_our_error(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.Linear(7, 2))
    depgraph.save(depgraph.prune(model, torch.randn(2, 3)), tmp_path / "saved")
    with pytest.raises(depgraph.StoreError, match="none was saved"):
        hugging_face.load_pretrained(AutoModelForCausalLM, tmp_path / "saved")


@pytest.mark.slow
def test_a_small_size_as_assistant_gives_the_tokens_of_the_whole() -> None:
    model, ids = llama(), words()[:1]
    elastic = depgraph.Elastic(model, {"input_ids": ids}, sizes=[1, 0.7], cost="params")
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(hugging_face.generate(elastic, ids, max_new_tokens=12), wanted)
    assert torch.equal(
        hugging_face.generate(elastic, {"input_ids": ids}, size=0.8, max_new_tokens=12), wanted
    )
    for call, text in (
        (
            lambda: hugging_face.generate(elastic, ids, do_sample=True),
            "do_sample=True would give other tokens",
        ),
        (lambda: hugging_face.generate(elastic, words()), "could not generate from these inputs"),
        (lambda: hugging_face.generate(elastic, ids, size=0.1), "there is no size 0.1"),
        (lambda: hugging_face.generate(model, ids), "elastic must be a depgraph.Elastic"),
    ):
        with pytest.raises(depgraph.InputError, match=text):
            call()


@pytest.mark.slow
@pytest.mark.parametrize(("options", "status"), [([], 3), (["--uniform"], 0)], ids=["own widths", "uniform"])
def test_the_command_line_says_whether_a_folder_is_stock(
    options: list[str], status: int, tmp_path: Path
) -> None:
    from depgraph.cli import main

    bert().save_pretrained(tmp_path / "dense")
    words_ = ["prune", str(tmp_path / "dense"), "-i", "input_ids=2x7:int64<97", "--max-params", "0.7"]
    assert main([*words_, "--pretrained", "--out", str(tmp_path / "small"), *options]) == status
    assert (tmp_path / "small" / "config.json").exists() == (status == 0)
