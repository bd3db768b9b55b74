"""Folders of transformers models pruned from file to file: names on disk, experts that a model stacks, configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_worker import inputs_of, options
from safetensors.torch import load_file, save_file
from test_checkpoint import contents
from test_checkpoint_ranks import results, run

import depgraph

pytest.importorskip("transformers")
import vision_ops  # noqa: F401  # makes torchvision importable, which transformers imports

from depgraph.integrations import hugging_face

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
INPUTS = {"input_ids": torch.arange(14).reshape(2, 7), "use_cache": False}


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 74, "num_key_value_heads": 2, "head_dim": 12, **options}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def mixtral(**options: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 40, "num_key_value_heads": 2, "num_local_experts": 4, **options}
    return MixtralForCausalLM(MixtralConfig(**sizes)).eval()


def same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert torch.equal(tensor, two[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_uniform_result_loads_by_its_config(tmp_path: Path, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied, dtype="bfloat16").bfloat16()
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    how: dict[str, Any] = {"max_params": 0.8, "uniform": True, "ignore": ["*embed*", "lm_head"]}
    found = depgraph.checkpoint.prune(
        tmp_path / "source", INPUTS, out=tmp_path / "out", verify="structure", **how
    )
    assert found.differences == []
    assert "from_pretrained" in found.load
    wanted = depgraph.prune(hugging_face.from_folder(tmp_path / "source"), INPUTS, **how)
    assert found.plan.to_json() == wanted.plan.to_json()
    small = type(model).from_pretrained(tmp_path / "out")
    same(small, wanted.model)
    assert {t.dtype for t in load_file(next((tmp_path / "out").glob("model-*.safetensors"))).values()} == {
        torch.bfloat16
    }
    assert (tmp_path / "out" / "tokenizer.json").exists()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = {n: p.name for p in (tmp_path / "out").glob("model-*.safetensors") for n in load_file(p)}
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size()
        for f in set(stored.values())
        for t in load_file(tmp_path / "out" / f).values()
    )


@pytest.mark.slow
def test_another_result_loads_with_one_line_of_ours(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "source")
    found = depgraph.checkpoint.prune(
        tmp_path / "source", INPUTS, out=tmp_path / "out", max_params=0.5, verify="structure"
    )
    assert found.differences
    assert not (tmp_path / "out" / "config.json").exists()
    wanted = depgraph.prune(model, INPUTS, max_params=0.5)
    same(hugging_face.load_pretrained(type(model), tmp_path / "out"), wanted.model)


@pytest.mark.slow
@pytest.mark.parametrize("ignore", [(), ("*experts*",), ("*self_attn*", "*embed*")])
def test_experts_that_the_model_stacks(tmp_path: Path, ignore: Any) -> None:
    """On disk each expert has matrices of its own; where experts go, the others close up."""
    model = mixtral()
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    names = {n for p in (tmp_path / "source").glob("*.safetensors") for n in load_file(p)}
    assert any(".experts.3.w1." in n for n in names)
    found = depgraph.checkpoint.prune(
        tmp_path / "source",
        INPUTS,
        out=tmp_path / "out",
        pruning_ratio=0.5,
        uniform=True,
        ignore=list(ignore),
    )
    assert found.differences == []
    wanted = depgraph.prune(model, INPUTS, pruning_ratio=0.5, uniform=True, ignore=list(ignore))
    assert found.plan.to_json() == wanted.plan.to_json()
    same(type(model).from_pretrained(tmp_path / "out"), wanted.model)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [None, 0.5])
def test_layers_whose_experts_the_model_stacks_go(tmp_path: Path, ratio: float | None) -> None:
    """What moves up takes the names of the place it has afterwards, each expert its own."""
    model = mixtral(num_hidden_layers=4)
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    how: dict[str, Any] = {"pruning_ratio": ratio, "uniform": True, "depth": depgraph.Depth(keep=4)}
    found = depgraph.checkpoint.prune(tmp_path / "source", INPUTS, out=tmp_path / "out", **how)
    assert found.differences == []
    wanted = depgraph.prune(model, INPUTS, **how)
    assert found.plan.to_json() == wanted.plan.to_json()
    small = type(model).from_pretrained(tmp_path / "out")
    assert small.config.num_hidden_layers == 2
    same(small, wanted.model)
    names = {n for p in (tmp_path / "out").glob("*.safetensors") for n in load_file(p)}
    assert not any(".layers.2." in n or ".layers.3." in n for n in names)


@pytest.mark.slow
def test_experts_that_the_model_stacks_are_not_recovered(tmp_path: Path) -> None:
    """Which tokens an expert gets is decided by values, so the model is in memory; its other layers get new values."""
    mixtral().save_pretrained(tmp_path / "source")
    data = [
        {
            "input_ids": torch.randint(0, 97, (4, 7), generator=torch.Generator().manual_seed(i)),
            "use_cache": False,
        }
        for i in range(4)
    ]
    found = depgraph.checkpoint.prune(
        tmp_path / "source",
        INPUTS,
        out=tmp_path / "out",
        importance="l1",
        calibration=data,
        recover="reconstruction",
    )
    before, after = found.report.recovery.output
    assert after < before
    assert any("experts" in name and "another layout" in why for name, why in found.report.recovery.skipped)


@pytest.mark.slow
def test_a_base_model_s_files_and_tensors_that_its_class_passes_over(tmp_path: Path) -> None:
    """Files of a whole model, loaded as its trunk: the head, which the model lacks, depends on what is cut."""
    model = llama()
    model.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["LlamaModel"]}))
    with pytest.raises(depgraph.InputError, match=r"'lm_head.weight', as something in the model is cut"):
        depgraph.checkpoint.prune(tmp_path / "source", INPUTS, out=tmp_path / "out")
    state = load_file(tmp_path / "source" / "model.safetensors")
    del state["lm_head.weight"]
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(state, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    found = depgraph.checkpoint.prune(
        tmp_path / "source", INPUTS, out=tmp_path / "out", ignore=["*self_attn*", "*embed*"], uniform=True
    )
    assert found.differences == []
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert (
        "model.layers.0.mlp.up_proj.weight" in written
    )  # the names on disk, with the prefix of the whole model


@pytest.mark.slow
def test_bad_folders_are_refused(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    for given, text in (
        ({**config, "quantization_config": {"quant_method": "gptq"}}, r"quantised weights \(gptq\)"),
        ({**config, "architectures": ["Nothing"]}, "names no class of transformers"),
        ({**config, "hidden_size": 40}, r"does not (fit its|build the) model"),
        ({**config, "hidden_act": "no such thing"}, "does not build the model"),
        ({**config, "model_type": "no such thing"}, "does not build a model"),
    ):
        path.write_text(json.dumps(given))
        with pytest.raises(depgraph.InputError, match=text):
            depgraph.checkpoint.prune(tmp_path / "source", INPUTS, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_several_processes_write_what_one_does(tmp_path: Path) -> None:
    """Names, index, config and files of transformers."""
    model = llama()
    model.save_pretrained(tmp_path / "source", max_shard_size="30KB")
    assert run("llama", 2, tmp_path) == [0, 0]
    found = results(tmp_path, 2)
    wanted = depgraph.checkpoint.prune(
        tmp_path / "source", inputs_of("llama"), out=tmp_path / "alone", **options("llama")
    )
    assert all(one["plan"] == wanted.plan.to_json() and one["streamed"] for one in found)
    assert wanted.load.startswith("from_pretrained")
    one, two = contents(tmp_path / "out"), contents(tmp_path / "alone")
    assert one.keys() == two.keys()
    assert all(
        one[name] == two[name] for name in one.keys() - {"plan.json"}
    )  # which says when it was written
