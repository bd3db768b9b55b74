"""Ten jobs that people prune for, each from a model of a library to what they do with the smaller one.

    python -m benchmarks.jobs --small                 # four of them: half a minute
    python -m benchmarks.jobs --markdown jobs.md      # all, beside Torch-Pruning on the same code

A job gets `prune`, a function from a model and its inputs to a smaller model, and goes on as its user would: another head, a
fused or exported model, a folder, an adapter. It ends in an assertion about what came out. The other tool is called
as its own documentation begins: with the model, its inputs and a ratio. The exit status is 1 where a job fails with depgraph.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import benchmarks.suites  # noqa: F401  # first: it makes torchvision importable
import depgraph

Prune = Callable[..., Any]
JOBS: dict[str, Callable[[Prune], None]] = {}
OURS = ("pruned while it trains",)  # by a callback of depgraph's own: no other tool is called in it
SMALL = ("another head", "outputs that count", "stock folder", "adapter")


def job(name: str) -> Callable[[Callable[[Prune], None]], Callable[[Prune], None]]:
    """One of the ten, by its name."""

    def add(run: Callable[[Prune], None]) -> Callable[[Prune], None]:
        JOBS[name] = run
        return run

    return add


def image(size: int = 64) -> Tensor:
    """One image."""
    return torch.randn(1, 3, size, size)


def llama() -> Any:
    """A small language model."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def words() -> dict[str, Tensor]:
    """Tokens for it."""
    return {"input_ids": torch.randint(0, 97, (1, 8))}


def trainer_of(model: Any, folder: str, callbacks: Sequence[Any] = ()) -> Any:
    """A Trainer of six steps."""
    import transformers

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 97, (16, 8))]
    arguments = transformers.TrainingArguments(
        f"{folder}/run", max_steps=6, per_device_train_batch_size=2, report_to=[], disable_tqdm=True,
        save_strategy="no", use_cpu=True,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))


@job("another head")
def _(prune: Prune) -> None:
    import timm

    model = timm.create_model("resnet18").eval()
    small = prune(model, image())
    small.reset_classifier(7)
    small(image()).sum().backward()
    assert small(image()).shape == (1, 7)


@job("branches fused")
def _(prune: Prune) -> None:
    import timm
    from timm.utils.model import reparameterize_model

    x = image()
    small = prune(timm.create_model("repvgg_a0").eval(), x)
    before, after = small(x), reparameterize_model(small)(x)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


@job("detector exported")
def _(prune: Prune) -> None:
    from ultralytics import YOLO

    yolo = YOLO("yolov8n.yaml")
    yolo.model = prune(yolo.model.eval(), image())
    with tempfile.TemporaryDirectory() as folder:
        yolo.model.yaml_file = yolo.ckpt_path = f"{folder}/yolov8n.pt"
        yolo.model.pt_path = yolo.ckpt_path
        assert Path(yolo.export(format="onnx", imgsz=64, simplify=False)).stat().st_size > 0


@job("encoder's widths")
def _(prune: Prune) -> None:
    import segmentation_models_pytorch as smp

    small = prune(smp.Unet("resnet18", encoder_weights=None, classes=2).eval(), image())
    widths = [f.shape[1] for f in small.encoder(image())]
    assert list(small.encoder.out_channels) == widths


@job("stock folder")
def _(prune: Prune) -> None:
    from depgraph.integrations.hugging_face import save_pretrained

    x = words()
    small = prune(llama(), x, max_params=0.7, uniform=True)
    with tempfile.TemporaryDirectory() as folder:
        assert save_pretrained(small, f"{folder}/small") == []
        again = type(small).from_pretrained(f"{folder}/small").eval()
    assert torch.equal(again(**x).logits, small(**x).logits)


@job("trained, then a stock folder")
def _(prune: Prune) -> None:
    from depgraph.integrations.hugging_face import save_pretrained

    small = prune(llama(), words(), max_params=0.7, uniform=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(small, folder)
        trainer.train()
        assert save_pretrained(trainer.model, f"{folder}/small") == []


@job("pruned while it trains")
def _(prune: Prune) -> None:
    from depgraph.integrations.hugging_face import load_pretrained, save_pretrained
    from depgraph.integrations.transformers import Pruning

    x = words()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(llama(), folder, [Pruning(x, every=2, steps=2, max_params=0.7)])
        trainer.train()
        save_pretrained(trainer.model, f"{folder}/small")
        again = load_pretrained(type(trainer.model), f"{folder}/small").eval()
    assert torch.equal(again(**x).logits, trainer.model.eval()(**x).logits)


@job("adapter")
def _(prune: Prune) -> None:
    import peft

    x = words()
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "up_proj"])
    small = prune(peft.get_peft_model(llama(), config).eval(), x)
    wanted = small(**x).logits
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(small).unload(), folder).eval()
    assert torch.equal(again(**x).logits, wanted)
    assert torch.allclose(small.merge_and_unload()(**x).logits, wanted, atol=1e-5)


@job("outputs that count")
def _(prune: Prune) -> None:
    import timm

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = timm.create_model("resnet18", features_only=True)
            self.head = nn.Conv2d(512, 6, 1)

        def forward(self, x: Tensor) -> dict[str, Any]:
            features = self.body(x)
            return {"boxes": self.head(features[-1]), "features": features}

    small = prune(Detector().eval(), image(), outputs="boxes")
    assert small(image())["boxes"].shape[1] == 6
    assert small.head.in_channels < 512


@job("in ONNX Runtime")
def _(prune: Prune) -> None:
    import onnxruntime
    import timm

    x = image()
    small = prune(timm.create_model("convnext_atto").eval(), x)
    program = torch.onnx.export(small, (x,), dynamo=True, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        program.save(f"{folder}/small.onnx")
        session = onnxruntime.InferenceSession(f"{folder}/small.onnx")
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert torch.allclose(torch.from_numpy(found), small(x), atol=1e-3)


def with_depgraph(model: nn.Module, inputs: Any, **options: Any) -> Any:
    """The smaller model."""
    options = {"pruning_ratio": 0.5} | options if "max_params" not in options else options
    return depgraph.prune(model, inputs, progress=False, **options).model


def with_torch_pruning(model: nn.Module, inputs: Any, **options: Any) -> Any:
    """The same by Torch-Pruning, with magnitudes; it has no other way to say what the options do."""
    import torch_pruning as tp

    pruner = tp.pruner.MagnitudePruner(
        model, inputs, importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.5
    )
    pruner.step()
    return model


@dataclass(frozen=True)
class Ending:
    """How a job ended: what went wrong, or ""; `missing` where a library is not installed."""

    error: str
    seconds: float
    missing: bool = False


def run(name: str, prune: Prune) -> Ending:
    """One job."""
    torch.manual_seed(0)
    start = time.perf_counter()
    missing, error = False, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            JOBS[name](prune)
    except ImportError as reason:
        missing, error = True, str(reason)
    except Exception as reason:
        text = " ".join(str(reason).split()) or "what came out is not what was asked for"
        error = f"{type(reason).__name__}: {text[:120]}"
    return Ending(error, time.perf_counter() - start, missing)


def lines_of(name: str) -> int:
    """Lines of user code of a job: without its first two, imports and empty lines."""
    found = inspect.getsource(JOBS[name]).splitlines()[2:]
    return sum(bool(line.strip()) and not line.strip().startswith(("import ", "from ")) for line in found)


def main(words_: Sequence[str] | None = None) -> int:
    """Run them and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true", help="four jobs, without the other tool")
    parser.add_argument("--only", nargs="*", choices=[*JOBS], help="these jobs")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    options = parser.parse_args(words_)
    names = options.only or (SMALL if options.small else tuple(JOBS))
    rows, failed = [], False
    for name in names:
        ours = run(name, with_depgraph)
        theirs = None if options.small or name in OURS else run(name, with_torch_pruning)
        failed |= bool(ours.error) and not ours.missing
        rows.append(
            [
                name,
                _told(ours),
                str(lines_of(name)),
                f"{ours.seconds:.1f}",
                "" if theirs is None else _told(theirs),
            ]
        )
        sys.stdout.write(f"{' | '.join(rows[-1])}\n")
        sys.stdout.flush()
    head = ["job", "depgraph", "lines", "seconds", "Torch-Pruning"]
    table = Table(*head, title="jobs")
    for row in rows:
        table.add_row(*row)
    Console(width=160).print(table)
    if options.markdown:
        body = [head, ["---"] * len(head), *rows]
        options.markdown.write_text("".join(f"| {' | '.join(r)} |\n" for r in body))
    return int(failed)


def _told(ending: Ending) -> str:
    if ending.missing:
        return f"not run: {ending.error}"
    return ending.error or "done"


if __name__ == "__main__":
    sys.exit(main())
