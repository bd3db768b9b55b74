"""Branches that go from files: the plan, the bytes and the recovery of the model in memory."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vision_ops  # noqa: F401  # makes torchvision importable, which transformers needs
from depth_checks import check_depth
from test_checkpoint import _equal_folders, contents, same, stored
from test_depth import IMAGE, TOKENS, Decoder, Fused, ResNet, decoder, gated, ready
from torch import Tensor, nn

import depgraph
from depgraph import Depth, checkpoint
from depgraph.checkpoint import writing
from depgraph.plan.plan import Removal
from depgraph.store.layout import Laid, NotMoved
from depgraph.store.pulled import moved_names

WIDE = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def layers() -> Decoder:
    return decoder("plain", "loud", "plain", "loud", "plain")


def resnet() -> nn.Module:
    return ready(ResNet())


def fused() -> nn.Module:
    return ready(Fused())


def gates() -> nn.Module:
    return ready(gated())


class Two(nn.Module):
    """Returns its features, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rise, self.last = nn.Linear(5, 12).double(), nn.Linear(12, 3).double()

    def forward(self, x: Tensor) -> Any:
        features = self.rise(x).relu()
        return {"logits": self.last(features), "features": features}


def score(out: Tensor, target: Tensor) -> Tensor:
    return (out.flatten(1)[:, :3] - target).square().mean()


def calibration(x: Tensor) -> list[Any]:
    dice = torch.Generator().manual_seed(3)
    return [
        (torch.randn(x.shape, generator=dice, dtype=x.dtype), torch.randn(len(x), 3, generator=dice, dtype=x.dtype))
        for _ in range(3)
    ]  # fmt: skip


def both(folder: Path, factory: Any, x: Any, **options: Any) -> tuple[Any, Any]:
    """From files and in memory, compared: plan, values, report."""
    model = factory()
    source = stored(model, folder / "source", 2)
    before = contents(source)
    found = checkpoint.prune(source, x, out=folder / "out", factory=factory, **options)
    wanted = depgraph.prune(model, x, **options)
    assert json.loads(found.plan.to_json()) == json.loads(wanted.plan.to_json())
    small = depgraph.load(factory, folder / "out")
    same(small, wanted.model)
    assert contents(source) == before
    assert found.report.removed == wanted.report.removed
    assert found.report.parameters == wanted.report.parameters
    assert found.report.verification.status == wanted.report.verification.status == "equal"
    with torch.no_grad():
        assert torch.equal(small(x), wanted.model(x))
    if found.report.recovery is None:
        check_depth(model, SimpleNamespace(model=small, plan=found.plan), x)
    return found, wanted


@pytest.mark.parametrize(("factory", "x"), [(layers, TOKENS), (resnet, IMAGE), (fused, WIDE), (gates, IMAGE)])
@pytest.mark.parametrize("ratio", [None, 0.4])
def test_plan_and_bytes_are_those_of_memory(
    tmp_path: Path, factory: Any, x: Tensor, ratio: float | None
) -> None:
    found, _ = both(tmp_path, factory, x, depth=Depth(keep=1), pruning_ratio=ratio)
    assert found.report.removed
    assert bool(found.plan.cuts) == (ratio is not None)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["influence", "taylor", "loss", "magnitude"])
@pytest.mark.parametrize("contiguous", [False, True])
def test_branches_are_ranked_as_in_memory(tmp_path: Path, by: str, contiguous: bool) -> None:
    data: dict[str, Any] = {"calibration": calibration(TOKENS), "loss": score}
    depth = Depth(keep=4, by=by, contiguous=contiguous)
    both(tmp_path, layers, TOKENS, depth=depth, importance="l1", **data)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [None, 0.3])
def test_what_follows_is_recovered_as_in_memory(tmp_path: Path, ratio: float | None) -> None:
    data: dict[str, Any] = {"calibration": [x for x, _ in calibration(TOKENS)], "importance": "obs"}
    found, wanted = both(
        tmp_path, layers, TOKENS, depth=Depth(keep=5), pruning_ratio=ratio, recover="auto", **data
    )
    assert str(found.report.recovery) == str(wanted.report.recovery)


@pytest.mark.slow
def test_whole_layers_go_with_their_number_in_the_config(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model, tokens = LlamaForCausalLM(config).eval(), torch.randint(0, 50, (2, 7))
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    options: dict[str, Any] = {"depth": Depth(keep=4, alone=True), "uniform": True}
    found = checkpoint.prune(tmp_path / "source", tokens, out=tmp_path / "out", **options)
    wanted = depgraph.prune(model, tokens, **options)
    assert found.load.startswith("from_pretrained")
    small = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert small.config.num_hidden_layers == 2
    same(small, wanted.model)
    text = [m.generate(tokens[:, :3], max_new_tokens=5, do_sample=False) for m in (small, wanted.model)]
    assert torch.equal(*text)
    again = checkpoint.prune(
        tmp_path / "out", tokens, out=tmp_path / "less", depth=Depth(keep=2), uniform=True
    )
    assert again.load.startswith("from_pretrained")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "less").config.num_hidden_layers == 1


def test_what_moves_up_must_lie_in_its_files_as_what_was_there() -> None:
    plan = depgraph.Plan(removals=[Removal("layers.0", "nothing")])
    laid = {f"layers.{i}.w": Laid.stored(f"model.layers.{i}.w", (2, 3)) for i in range(3)}
    assert moved_names(laid, plan, {}) == {
        "model.layers.0.w": None,
        "model.layers.1.w": "model.layers.0.w",
        "model.layers.2.w": "model.layers.1.w",
    }
    for wrong in (Laid.stored("model.layers.1.w", (3, 2)), Laid.stored("model.layers.2.w", (2, 3))):
        with pytest.raises(NotMoved, match=r"layers.*(which becomes|move differently)"):
            moved_names(laid | {"layers.1.w": wrong}, plan, {})


def test_branches_alone_meet_a_budget(tmp_path: Path) -> None:
    both(tmp_path, layers, TOKENS, depth=Depth(by="magnitude", alone=True), max_params=0.7)


def test_what_compares_whole_models_is_refused(tmp_path: Path) -> None:
    source = stored(layers(), tmp_path / "source")
    with pytest.raises(depgraph.InputError, match=r"not in memory here\n  fix: give Depth\(keep"):
        checkpoint.prune(source, TOKENS, out=tmp_path / "out", factory=layers, depth=True, max_params=0.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("by", ["influence", "magnitude"])
def test_a_forecast_counts_what_goes(tmp_path: Path, by: str) -> None:
    source = stored(layers(), tmp_path / "source")
    options: dict[str, Any] = {
        "out": tmp_path / "out",
        "factory": layers,
        "depth": Depth(keep=4, by=by, alone=True),
    }
    told = checkpoint.prune(source, TOKENS, dry_run=True, **options)
    assert told.parameters[1] < told.parameters[0]
    found = checkpoint.prune(source, TOKENS, **options)
    assert found.report.removed


@pytest.mark.slow
def test_a_run_that_ended_while_it_wrote_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stored(layers(), tmp_path / "source", 3)
    options: dict[str, Any] = {"factory": layers, "depth": Depth(keep=3), "pruning_ratio": 0.3}
    written, append = [0], writing._append

    def ends(*given: Any) -> Any:
        written[0] += 1
        if written[0] == 9:
            raise KeyboardInterrupt
        return append(*given)

    with monkeypatch.context() as broken:
        broken.setattr(writing, "_append", ends)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(source, TOKENS, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    checkpoint.prune(source, TOKENS, out=tmp_path / "out", **options)
    checkpoint.prune(source, TOKENS, out=tmp_path / "other", **options)
    _equal_folders(tmp_path / "out", tmp_path / "other")


def test_a_larger_plan_is_kept_to(tmp_path: Path) -> None:
    larger = depgraph.prune(fused(), WIDE, pruning_ratio=0.2).plan
    both(tmp_path, fused, WIDE, pruning_ratio=0.5, within=larger)


def test_outputs_that_do_not_count_may_shrink(tmp_path: Path) -> None:
    source = stored(Two(), tmp_path / "source")
    options: dict[str, Any] = {"pruning_ratio": 0.5, "outputs": "logits"}
    found = checkpoint.prune(source, WIDE, out=tmp_path / "out", factory=Two, **options)
    wanted = depgraph.prune(Two(), WIDE, **options)
    assert found.plan.cuts
    assert found.plan.to_json() == wanted.plan.to_json()
    same(depgraph.load(Two, tmp_path / "out"), wanted.model)
