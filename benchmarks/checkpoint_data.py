"""Criteria that look at data, and recovery, from files and in memory: `python -m benchmarks.checkpoint_data`, `--small` for a tiny Llama.

SmolLM2-135M in float32 (538 MB; `--layers` takes its first ones), with ``memory="300MB"``: the scores of four criteria, and the values that
recovery gives, are compared with those of the model in memory. Both are done in processes of their own, which say what they had
resident at most beyond the libraries.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import benchmarks.suites  # noqa: F401  # makes torchvision importable
import depgraph
from depgraph.checkpoint import pruning
from depgraph.checkpoint.bound import Bound
from depgraph.checkpoint.original import Original
from depgraph.data.calibration import Calibration
from depgraph.importance import scores_of
from depgraph.integrations import hugging_face

CRITERIA = ("activation_mean", "activation_variance", "wanda", "flap")
IGNORED = ["*embed*", "lm_head"]


def peak() -> int:
    """Kilobytes that were resident at most since this program began; what its parent had, which ``ru_maxrss`` takes over, is left out."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def source_of(folder: Path, layers: int | None, small: bool) -> tuple[Path, torch.Tensor]:
    """A folder of the model, and tokens to calibrate with."""
    from transformers import LlamaConfig, LlamaForCausalLM

    source = folder / "source"
    if small:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            tie_word_embeddings=True,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(source)
        return source, torch.randint(0, 97, (4, 1, 32))
    from benchmarks.real import fetch, news

    with safe_open(fetch.cached("smollm2-135m.safetensors", news._dequantise), "pt") as file:
        settings = json.loads(file.metadata()["config"])
        count = layers or settings["num_hidden_layers"]
        beyond = tuple(f"model.layers.{i}." for i in range(count, settings["num_hidden_layers"]))
        names = [n for n in file.keys() if n not in ("tokens", "lm_head.weight") and not n.startswith(beyond)]  # noqa: SIM118
        source.mkdir()
        save_file(
            {n: file.get_tensor(n) for n in names}, source / "model.safetensors", metadata={"format": "pt"}
        )
        tokens = file.get_tensor("tokens").flatten().long()
    settings |= {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": count, "tie_word_embeddings": True,
        "dtype": "float32",
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(settings))
    return source, tokens[: 4 * 64].reshape(4, 1, 64)


def one(way: str, source: Path, tokens: torch.Tensor, out: Path, recover: bool) -> dict[str, Any]:
    """The scores of the criteria, by group, written into a file, and what was resident at most beyond the libraries."""
    import transformers.models.llama.modeling_llama  # noqa: F401  # the library counts as one

    torch.set_num_threads(1)
    batches = [{"input_ids": t, "use_cache": False} for t in tokens]
    inputs = {"input_ids": tokens[0][:, :16], "use_cache": False}
    before = peak()
    options: dict[str, Any] = {
        "importance": "wanda", "recover": "auto", "calibration": batches, "pruning_ratio": 0.2, "ignore": IGNORED, "verify": False,
    }  # fmt: skip
    found: dict[str, Any] = {}
    if recover and way == "files":
        result: Any = depgraph.checkpoint.prune(source, inputs, out=out / way, memory="300MB", **options)
        found["error"] = result.report.recovery.output
    elif recover:
        result = depgraph.prune(hugging_face.from_folder(source), inputs, **options)
        found["error"] = result.report.recovery.output
        save_file(
            {n: p.detach().clone() for n, p in result.model.named_parameters()}, out / "memory.safetensors"
        )
    else:
        calibration = Calibration(batches, inputs)
        if way == "files":
            original = Original.of(source, None)
            weights = original.weights()
            bound = 300_000_000
            weights.check, weights.room = Bound(bound).check, bound // 16
            calibration.memory = bound // 2
            graph = pruning.analyzed(original.model, inputs, IGNORED, False, [], None, weights)
        else:
            graph = depgraph.analyze(hugging_face.from_folder(source), inputs, ignore=IGNORED)
        scores = {
            f"{criterion} {name}": torch.from_numpy(values).clone()
            for criterion in CRITERIA
            for name, values in scores_of(graph, criterion, calibration=calibration).items()
        }
        save_file(scores, out / f"{way}-scores.safetensors")
    found["peak"] = (peak() - before) / 1000
    return found


def deviation(out: Path, recover: bool) -> float:
    """The largest difference of a score, or of a value, relative to the largest of its tensor."""
    names = [out / "files", out / "memory"]
    a, b = (
        ({k: v for p in sorted(names[0].glob("model*.safetensors")) for k, v in load_file(p).items()}, load_file(f"{names[1]}.safetensors"))
        if recover
        else (load_file(f"{n}-scores.safetensors") for n in names)
    )  # fmt: skip
    if a.keys() != b.keys() or not a:
        return float("inf")
    return max(float((a[n].double() - b[n]).abs().max() / b[n].abs().max().clamp(min=1e-30)) for n in b)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="recovery of a tiny Llama, nothing is downloaded"
    )
    parser.add_argument("--layers", type=int, help="the first layers of SmolLM2 alone")
    parser.add_argument("--only", choices=["criteria", "recovery"])
    parser.add_argument(
        "--scratch", type=Path, help="where files are written (default: the system's temporary folder)"
    )
    parser.add_argument("--one", nargs=4, metavar=("WAY", "SOURCE", "OUT", "WHAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        way, source, out, what = arguments.one
        tokens = torch.load(Path(out) / "tokens.pt")
        print(json.dumps(one(way, Path(source), tokens, Path(out), what == "recovery")))
        return 0
    table = Table(
        "what",
        "MB beyond the libraries: files",
        "memory",
        "largest deviation",
        "error of the outputs, before and after",
    )
    failed = False
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        out = Path(name)
        source, tokens = source_of(out, arguments.layers, arguments.small)
        torch.save(tokens, out / "tokens.pt")
        for what in ("criteria", "recovery"):
            if (arguments.only or ("recovery" if arguments.small else what)) != what:
                continue
            found = {}
            for way in ("files", "memory"):
                words = [
                    sys.executable,
                    "-m",
                    "benchmarks.checkpoint_data",
                    "--one",
                    way,
                    str(source),
                    str(out),
                    what,
                ]
                done = subprocess.run(words, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(f"{what}, {way}: {done.stderr[-2000:]}", file=sys.stderr)
                    return 1
                found[way] = json.loads(done.stdout.splitlines()[-1])
                print(what, way, found[way], file=sys.stderr, flush=True)
            apart = deviation(out, what == "recovery")
            failed |= not apart <= 1e-5
            errors = found["files"].get("error")
            table.add_row(
                what, f"{found['files']['peak']:,.0f}", f"{found['memory']['peak']:,.0f}", f"{apart:.1e}",
                "" if errors is None else f"{errors[0]:.4g}, {errors[1]:.4g}",
            )  # fmt: skip
    Console(width=140).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
