"""Megabytes and seconds of pruning a checkpoint from file to file: `python -m benchmarks.checkpoint`, `--small` for 200 MB.

A Llama-shaped checkpoint in bfloat16 is generated as a stream, with values drawn at random. Each way of pruning it runs in a process of
its own, which says its peak of resident memory (imports included) and its seconds on one thread. Beside it, in the same run: the
seconds of copying the files and of reading them once more, and pruning in memory where that fits. In full:

* 13.5 GB (7 B): without a proof, and with the proof on drawn weights;
* 1.3 GB: the proof on the values in the files; ours in memory; Torch-Pruning;
* two of the 80 layers of a 70 B model, with its embedding and head, from a sparse file into a sink that counts: what 80 take is
  extrapolated, and said to be so.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import benchmarks.suites  # noqa: F401  # makes torchvision importable
import depgraph
from depgraph.checkpoint import writing
from depgraph.checkpoint.writing import Written, header_of

SIZES: dict[str, dict[str, int]] = {  # hidden, inner, layers, heads, key heads, words
    "small": {"h": 1024, "i": 2816, "n": 6, "a": 16, "k": 16, "v": 8000},
    "1.3 GB": {"h": 2048, "i": 5632, "n": 11, "a": 16, "k": 16, "v": 32000},
    "7B": {"h": 4096, "i": 11008, "n": 32, "a": 32, "k": 32, "v": 32000},
    "70B, 2 layers": {"h": 8192, "i": 28672, "n": 2, "a": 64, "k": 8, "v": 128256},
}
CHUNK = 1 << 24  # bytes that are copied at a time
SHARD = 5_000_000_000
WAYS = ("copy", "skip", "structure", "values", "memory", "torch-pruning", "sink")


def shapes(size: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama by name."""
    h, i, width = size["h"], size["i"], size["h"] // size["a"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size["v"], h)}
    for n in range(size["n"]):
        at = f"model.layers.{n}"
        found |= {
            f"{at}.self_attn.{name}_proj.weight": (width * size["a" if name == "q" else "k"], h)
            for name in "qkv"
        }
        found |= {f"{at}.self_attn.o_proj.weight": (h, width * size["a"]), f"{at}.mlp.gate_proj.weight": (i, h),
                  f"{at}.mlp.up_proj.weight": (i, h), f"{at}.mlp.down_proj.weight": (h, i),
                  f"{at}.input_layernorm.weight": (h,), f"{at}.post_attention_layernorm.weight": (h,)}  # fmt: skip
    return found | {"model.norm.weight": (h,), "lm_head.weight": (size["v"], h)}


def drawn(shape: tuple[int, ...], seed: int) -> Iterator[torch.Tensor]:
    """Values in blocks: one table of normal numbers, begun anew elsewhere for each block."""
    dice = torch.Generator().manual_seed(seed)
    table = torch.randn(1_000_003, generator=dice) * (1 if len(shape) == 1 else 0.5 / shape[1] ** 0.5)
    table = (table.abs() + 0.5 if len(shape) == 1 else table).bfloat16()
    left, count = torch.Size(shape).numel(), 0
    while left:
        begin = (7919 * count) % 500_000
        block = table[begin : begin + min(left, 500_000)].contiguous()
        yield block
        left, count = left - len(block), count + 1


def generate(folder: Path, size: dict[str, int], sparse: bool = False) -> None:
    """The checkpoint, written shard by shard; `sparse`: of zeros, which take no space."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size["h"], "intermediate_size": size["i"],
        "num_hidden_layers": size["n"], "num_attention_heads": size["a"], "num_key_value_heads": size["k"], "vocab_size": size["v"],
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
        "head_dim": size["h"] // size["a"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[list[Written]] = [[]]
    for seed, (name, shape) in enumerate(shapes(size).items()):
        if sum(t.bytes for t in shards[-1]) > SHARD:
            shards.append([])
        shards[-1].append(Written(name, "BF16", shape, lambda shape=shape, seed=seed: drawn(shape, seed)))  # type: ignore[misc]
    table = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        ordered, header = header_of(shard, {"format": "pt"})
        table |= dict.fromkeys((t.name for t in ordered), file)
        with (folder / file).open("wb", buffering=0) as stream:
            stream.write(header)
            if sparse:
                stream.truncate(len(header) + sum(t.bytes for t in ordered))
                continue
            for one in ordered:
                for block in one.blocks():
                    stream.write(block.view(torch.uint8).numpy().tobytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    os.sync()  # or what comes next waits for it


def one(way: str, source: Path, out: Path) -> dict[str, Any]:
    """Seconds and the peak of memory of one way, in this process."""
    torch.set_num_threads(1)
    inputs = {"input_ids": torch.arange(8)[None], "use_cache": False}
    how: dict[str, Any] = {
        "max_params": 0.7,
        "uniform": True,
        "ignore": ["*embed*", "lm_head", "*self_attn*"],
    }
    begin, found = time.perf_counter(), {}
    if way == "copy":
        found["copy"] = copy(source, out)
        begin = time.perf_counter()
        found["read"] = read(source)
    elif way == "memory":
        from depgraph.integrations import hugging_face

        result = depgraph.prune(hugging_face.from_folder(source), inputs, **how)
        hugging_face.save_pretrained(result, out)
    elif way == "torch-pruning":
        torch_pruning(source, out, inputs)
    else:
        if way == "sink":
            counted = [0]
            writing._put = lambda handle, octets: counted.__setitem__(0, counted[0] + len(octets))  # type: ignore[assignment]
        verify = way if way in ("structure", "values") else False
        result_ = depgraph.checkpoint.prune(source, inputs, out=out, verify=verify, memory="8GB", **how)
        proof = result_.report.verification
        found |= {"status": proof.status, "error": proof.max_error, "loads": not result_.differences}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": time.perf_counter() - begin, "peak": peak / 1000, **found}


def copy(source: Path, out: Path) -> float:
    """Seconds of copying all files, until they are on the disk."""
    begin = time.perf_counter()
    out.mkdir()
    for path in source.glob("*.safetensors"):
        with path.open("rb", buffering=0) as given, (out / path.name).open("wb", buffering=0) as taken:
            while block := given.read(CHUNK):
                taken.write(block)
            os.fsync(taken.fileno())
    return time.perf_counter() - begin


def read(source: Path) -> float:
    """Seconds of reading all files."""
    begin = time.perf_counter()
    room = bytearray(CHUNK)
    for path in source.glob("*.safetensors"):
        with path.open("rb", buffering=0) as given:
            while given.readinto(room):
                pass
    return time.perf_counter() - begin


def torch_pruning(source: Path, out: Path, inputs: dict[str, torch.Tensor]) -> None:
    """The inner widths of the same model, cut by Torch-Pruning, which takes the model in memory."""
    import torch_pruning as tp
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    heads = {m.q_proj: m.config.num_attention_heads for m in model.modules() if hasattr(m, "q_proj")}
    pruner = tp.pruner.MetaPruner(
        model, inputs, importance=tp.importance.GroupMagnitudeImportance(p=1), pruning_ratio=0.3, num_heads=heads,
        ignored_layers=[model.lm_head, *(m.o_proj for m in model.modules() if hasattr(m, "o_proj"))],
        output_transform=lambda given: given.logits.sum(),
    )  # fmt: skip
    pruner.step()
    out.mkdir()
    torch.save(model.state_dict(), out / "model.pt")


def elsewhere(way: str, source: Path, scratch: Path) -> dict[str, Any]:
    """`one`, in a process of its own; what it wrote is removed."""
    out = scratch / "out"
    words = [sys.executable, "-m", "benchmarks.checkpoint", "--one", way, str(source), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    for left in (out, scratch / "out.partial"):
        shutil.rmtree(left, ignore_errors=True)
    (scratch / f".{source.name}.sums").unlink(missing_ok=True)
    os.sync()
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def shown(found: dict[str, Any]) -> list[str]:
    if "failed" in found:
        return ["-", "-", found["failed"]]
    facts = [f"{k} {v:.1f} s" for k, v in found.items() if k in ("copy", "read")]
    facts += [found["status"]] if "status" in found else []
    facts += [f"deviation {found['error']:.1e}"] if found.get("error") else []
    return [f"{found['seconds']:.1f}", f"{found['peak']:,.0f}", ", ".join(facts)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="200 MB alone")
    parser.add_argument(
        "--only", choices=[n for n in SIZES if n != "small"], help="one size of the full benchmark"
    )
    parser.add_argument(
        "--scratch", type=Path, help="where files are generated (default: the system's temporary folder)"
    )
    parser.add_argument("--one", nargs=3, metavar=("WAY", "SOURCE", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        way, source, out = arguments.one
        print(json.dumps(one(way, Path(source), Path(out))))
        return 0
    plan: dict[str, tuple[str, ...]] = {
        "1.3 GB": ("copy", "skip", "structure", "values", "memory", "torch-pruning"),
        "7B": ("copy", "skip", "structure"),
        "70B, 2 layers": ("sink",),
    }
    if arguments.small:
        plan = {"small": ("copy", "values")}
    elif arguments.only:
        plan = {arguments.only: plan[arguments.only]}
    table = Table("checkpoint", "GB", "way", "seconds", "peak, MB", "")
    failed = False
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        for name, ways in plan.items():
            source = Path(folder) / "source"
            generate(source, SIZES[name], sparse="sink" in ways)
            gigabytes = sum(p.stat().st_size for p in source.glob("*.safetensors")) / 1e9
            for way in ways:
                found = elsewhere(way, source, Path(folder))
                failed |= "failed" in found and way != "torch-pruning"
                row = shown(found)
                if way == "sink" and "failed" not in found:
                    layer = (
                        2
                        * sum(
                            torch.Size(s).numel() for n, s in shapes(SIZES[name]).items() if ".layers.0." in n
                        )
                        / 1e9
                    )
                    row[2] += (
                        f"; extrapolated by size to 80 layers: {found['seconds'] * (gigabytes + 78 * layer) / gigabytes:,.0f} s"
                    )
                table.add_row(name, f"{gigabytes:.2f}", way, *row)
            shutil.rmtree(source)
    Console(width=160).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
