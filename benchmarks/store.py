"""Seconds and megabytes of saving and loading a pruned ResNet-50: `python -m benchmarks.store`, `--small` for a ResNet-18.

What is measured, in seconds of processor time on one thread, each the median of several runs that take turns:

* `load_state_dict` of tensors in memory into a model that is ready: what no loader can do without;
* the same from a file, by safetensors and by torch;
* building the model by its code, which `load_state_dict` needs and `depgraph.load` has in it;
* `depgraph.load`: builds the original, cuts it, reads the file, checks every byte.

Peak memory is of a process that does nothing else, beyond what it had after its imports.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import benchmarks.suites  # noqa: F401  # makes torchvision importable
import depgraph

RATIOS = (0.1, 0.5)
MEGABYTE = 1 << 20


def factory(name: str) -> Callable[[], torch.nn.Module]:
    """The function of torchvision that builds a model with random weights."""
    import torchvision

    made: Callable[[], torch.nn.Module] = getattr(torchvision.models, name)
    return made


def medians(works: dict[str, Callable[[], object]], times: int) -> dict[str, float]:
    """Seconds of each of `works`: the median of `times`, all taking turns so that noise meets them alike."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(times):
        for name, work in works.items():
            begin = time.process_time()
            work()
            found[name].append(time.process_time() - begin)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def measured(name: str, ratio: float, folder: Path, times: int) -> dict[str, float]:
    """Seconds of each way, for one model and ratio."""
    make = factory(name)
    torch.manual_seed(0)
    model = make().eval()
    result = depgraph.prune(model, torch.randn(1, 3, 64, 64), pruning_ratio=ratio, verify=False)
    saved = depgraph.save(result, folder / f"{ratio}")
    torch.save(result.model.state_dict(), folder / "weights.pt")
    ready, state = result.model, {n: t.clone() for n, t in result.model.state_dict().items()}
    weights = saved / "model.safetensors"
    loaded = depgraph.load(make, saved)
    assert all(torch.equal(t, state[n]) for n, t in loaded.state_dict().items())
    works: dict[str, Callable[[], object]] = {
        "load_state_dict, from memory": lambda: ready.load_state_dict(state),
        "load_state_dict, safetensors": lambda: ready.load_state_dict(load_file(weights)),
        "load_state_dict, torch.load": lambda: ready.load_state_dict(torch.load(folder / "weights.pt")),
        "building the original": make,
        "the same on the meta device": lambda: on_meta(make),
        "depgraph.load": lambda: depgraph.load(make, saved),
        "depgraph.save": lambda: depgraph.save(result, saved),
    }
    return {"megabytes": weights.stat().st_size / MEGABYTE, **medians(works, times)}


def on_meta(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return make()


def peak(name: str, folder: Path) -> float:
    """Megabytes that a process takes to load a folder."""
    program = f"from benchmarks.store import loaded_in_megabytes; print(loaded_in_megabytes({name!r}, {str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def loaded_in_megabytes(name: str, folder: str) -> float:
    make = factory(name)
    return peak_beyond(lambda: depgraph.load(make, folder))


def peak_beyond(work: Callable[[], object]) -> float:
    """Megabytes that were resident at most during a call, beyond those before it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = _kilobytes("VmRSS")
    work()
    return (_kilobytes("VmHWM") - before) / 1024


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a ResNet-18, fewer runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name, times = ("resnet18", 5) if arguments.small else ("resnet50", 25)
    table = Table("milliseconds", *(f"{name}, ratio {ratio}" for ratio in RATIOS))
    with tempfile.TemporaryDirectory() as scratch:
        found = [measured(name, ratio, Path(scratch), times) for ratio in RATIOS]
        peaks = [peak(name, Path(scratch) / f"{ratio}") for ratio in RATIOS]
    for row in list(found[0])[1:]:
        table.add_row(row, *(f"{1e3 * f[row]:.1f}" for f in found))
    table.add_section()
    ready = ("load_state_dict, from memory", "load_state_dict, safetensors", "load_state_dict, torch.load")
    for row in ready:
        table.add_row(f"depgraph.load / {row}", *(f"{f['depgraph.load'] / f[row]:.2f}" for f in found))
    for row in ready:
        whole = (f["depgraph.load"] / (f[row] + f["building the original"]) for f in found)
        table.add_row(f"depgraph.load / (building + {row})", *(f"{ratio:.2f}" for ratio in whole))
    table.add_section()
    table.add_row("weights, megabytes", *(f"{f['megabytes']:.0f}" for f in found))
    table.add_row("peak of loading, megabytes", *(f"{p:.0f}" for p in peaks))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
