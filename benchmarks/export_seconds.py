"""Whether pruned models are faster where they are exported to, with default settings: `benchmarks.exports --seconds`.

Ten architectures of timm in the image size that they were made for are pruned to half of their MACs by
``prune(model, x, max_macs=0.5)``. Dense and pruned models run in turns on one thread, and what counts is the processor time
of that thread: on a busy machine the clock on the wall says little. The table has the median of dense / pruned over the
turns and, in brackets, its middle half; `free` is the same with ``round_to=1``.
"""

from __future__ import annotations

import gc
import io
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import benchmarks.suites  # noqa: F401  # first: it makes torchvision importable
import depgraph

MODELS = (
    "mobilenetv3_small_100", "convnext_atto", "resnet18", "mobilenetv2_100", "efficientnet_lite0", "regnety_002",
    "vit_tiny_patch16_224", "ghostnet_100", "densenet121", "repvgg_a0",
)  # fmt: skip
SMALL = MODELS[:1]
WAYS = ("ONNX Runtime", "OpenVINO", "eager", "compiled")
SECONDS = 1.5  # of a processor for each table cell, at least TURNS turns
TURNS = 7
Run = Callable[[], Any]


def exported(model: nn.Module, x: Tensor) -> bytes:
    """`model` as ONNX."""
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        export: Any = torch.onnx.export
        export(model, (x,), file, dynamo=False)
    return file.getvalue()


def in_onnx_runtime(model: nn.Module, x: Tensor) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(exported(model, x), options, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feeds)


def in_openvino(model: nn.Module, x: Tensor) -> Run:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(
        core.read_model(io.BytesIO(exported(model, x))), "CPU", settings
    ).create_infer_request()
    return lambda: request.infer([x.numpy()])


def in_torch(model: nn.Module, x: Tensor) -> Run:
    def run() -> None:
        with torch.inference_mode():
            model(x)

    return run


def compiled(model: nn.Module, x: Tensor) -> Run:
    return in_torch(torch.compile(model), x)


RUNS = dict(zip(WAYS, (in_onnx_runtime, in_openvino, in_torch, compiled), strict=True))


def ratios(runs: Sequence[Run]) -> list[np.ndarray]:
    """[turns] seconds of the first of `runs` over those of each other, of the processor."""
    clock = time.process_time  # OpenVINO works on a thread of its own
    for run in (*runs, *runs):
        run()
    times: list[list[float]] = []
    end = clock() + SECONDS
    while len(times) < TURNS or clock() < end:
        times.append([])
        for run in runs:
            start = clock()
            run()
            times[-1].append(clock() - start)
    seconds = np.array(times)
    return [seconds[:, 0] / seconds[:, i] for i in range(1, len(runs))]


def show(found: np.ndarray) -> str:
    """The median and the middle half."""
    low, middle, high = np.quantile(found, (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def measure(name: str, ways: Sequence[str], console: Console) -> dict[str, Any]:
    """One row: way -> how many times faster the default is, and free widths are."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    x = torch.randn(1, *model.default_cfg["input_size"])
    results = [depgraph.prune(model, x, max_macs=0.5, verify=False, **how) for how in ({}, {"round_to": 1})]
    figures = results[0].report.to_dict()
    row: dict[str, Any] = {
        "name": name, "macs": figures["macs"]["after"] / figures["macs"]["before"], "channels": figures["channels"],
    }  # fmt: skip
    for way in ways:
        found = ratios([RUNS[way](m, x) for m in (model, *(r.model for r in results))])
        row[way] = found
        text = f"{name} | {way} | {show(found[0])} | free {show(found[1])} | {len(found[0])} turns"
        console.print(text, markup=False, highlight=False)
        torch.compiler.reset()
        gc.collect()
    return row


def run(names: Sequence[str], ways: Sequence[str], console: Console) -> tuple[list[list[str]], bool]:
    """A header and a line for each model, and whether none is slower than dense in ONNX Runtime."""
    lines = [["model", "MACs left", "multiples of 4", *(f"{w}{k}" for w in ways for k in ("", ", free"))]]
    medians: dict[str, list[float]] = {w: [] for w in ways}
    for name in names:
        row = measure(name, ways, console)
        channels = row["channels"]
        lines.append([name, f"{row['macs']:.3f}", f"{channels['multiples']} of {channels['shrunk']}"])
        for way in ways:
            medians[way].append(float(np.median(row[way][0])))
            lines[-1] += [show(found) for found in row[way]]
    if len(names) > 1:
        ends = [f"{np.median(medians[w]):.2f}, least {min(medians[w]):.2f}" for w in ways]
        lines.append(["median", "", "", *(cell for end in ends for cell in (end, ""))])
    shown = Table(*lines[0])
    for line in lines[1:]:
        shown.add_row(*line)
    console.print(shown)
    return lines, all(min(found) >= 1 for found in medians.values() if found)
