"""One model of many widths beside separate ones: `python -m benchmarks.elastic`, `--small` for digits and a ResNet-18.

* **Accuracy**: a trained net made elastic and trained by the sandwich rule for some steps, beside one model for each smaller
  size, pruned from the same net and distilled from it, with the same number of steps in all. Statistics of batch norms
  are estimated anew for both. `--case digits`, or on Fashion-MNIST `resnet20` and `mobilenet`.
* **Cascade**: on data that was neither trained nor calibrated on, with a drop of at most half a point asked for. With `--depth`
  smaller sizes leave out branches, too, and are shares of the latency at batch 1; that alone is measured then.
* **Storage**: bytes of the one folder, and of separate ones. Bytes that loading a size reads, as the system counts them.
* **Switching**: seconds from a call of `switch` until it returns, and what a call of a size costs beyond that of the plain
  module, for a ResNet.
* **Suites** (`--suites N`, alone): every size of N models of the suites on shared weights, extracted, and the masked original.
* **Assistant** (`--assistant`, alone): SmolLM2 with its own half as assistant: tokens beside its own greedy ones, and seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import benchmarks.suites  # noqa: F401  # makes torchvision importable
import depgraph
from benchmarks import elastic_suites
from benchmarks.real import digits, fashion, nets
from depgraph.costs.latency import latencies
from depgraph.data.calibration import Calibration
from depgraph.recover.changes import Changes
from depgraph.recover.statistics import estimate
from depgraph.recover.task import Task

SIZES = (1.0, 0.5, 0.25)
DEEP_SIZES = (1.0, 0.6, 0.4)  # of the latency at batch 1, of which some is the same for any width
Batches = list[tuple[Tensor, Tensor]]


def optimised(model: nn.Module, steps: int, rate: float, loss_of: Callable[[int], Tensor]) -> None:
    """SGD with Nesterov momentum, whose rate rises for a fifth and then falls to 0."""
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.2, cycle_momentum=False
    )
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(step).backward()
        optimizer.step()
        schedule.step()
    model.eval().to(memory_format=torch.contiguous_format)


@cache
def trained(case: str, images: int | None, epochs: int | None) -> nn.Module:
    """The dense net of a case on Fashion-MNIST, the same for all seeds; that of benchmarks.quality without `epochs`."""
    if epochs is None:
        return fashion.trained(case)
    dense = nets.build(case)
    fashion.train(dense, fashion_parts(images)[0], epochs, rate=0.1, seed=0, log=case)
    return dense


@cache
def fashion_parts(images: int | None) -> tuple[fashion.Images, fashion.Images, fashion.Images]:
    """What is trained on, what is held out, and test images: halves of those that no net has seen.

    Of `images` to train on, a fifth as many are held out.
    """
    training, test = fashion.load()
    held_out, test = test.part(0, 5_000), test.part(5_000, 10_000)
    if images is None:
        return training, held_out, test
    return training.sample(images, 0), held_out.sample(images // 5, 0), test


def batches_of(data: fashion.Images, steps: int, seed: int, mirror: bool) -> Batches:
    """So many shuffled and shifted batches."""
    generator = torch.Generator().manual_seed(seed)
    epochs = itertools.chain.from_iterable(
        data.training_epoch(64, generator, mirror) for _ in itertools.count()
    )
    return [(x.contiguous(memory_format=torch.channels_last), y) for x, y in itertools.islice(epochs, steps)]


def restated(model: nn.Module, example: Tensor, data: Batches) -> None:
    """Statistics of batch norms, estimated as `Elastic.estimate_statistics` does."""
    batches = list(Calibration(data, example).batches())
    estimate(Task(model, Changes(model), batches))


def separate(dense: nn.Module, example: Tensor, size: float, data: Batches, rate: float) -> nn.Module:
    """One size by itself: pruned, then distilled from the dense model as a smaller size is in the sandwich."""
    small = depgraph.prune(dense, example, max_macs=size, verify=False).model

    def loss(step: int) -> Tensor:
        x, _ = data[step]
        with torch.no_grad():
            aim = dense(x)
        return depgraph.training.train.soft_loss(small(x), aim, 1.0)

    optimised(small, len(data), rate, loss)
    restated(small, example, data[:8])
    return small


def accuracies(
    case: str, seed: int, steps: int, images: int | None, epochs: int | None, depth: bool
) -> dict[str, Any]:
    """Rows of one seed."""
    if case == "digits":
        dense, training, test, rate, mirror = (
            digits.trained(),
            digits.training(),
            digits.held_out(),
            0.02,
            False,
        )
        example, held_out, tested = torch.zeros(1, 1, 8, 8), digits.training().sample(400, 9), test
    else:
        training, held_out, tested = fashion_parts(images)
        test = fashion.load()[1] if images is None else tested
        dense = trained(case, images, epochs)
        rate, mirror = 0.02, True
        example = torch.zeros(1, 1, 28, 28)
    dense = dense.eval()
    data = batches_of(training, steps, seed, mirror)
    if depth:
        seen = [x for x, _ in data[:8]]
        elastic = depgraph.Elastic(
            dense, example, sizes=DEEP_SIZES, cost="latency", depth=True, calibration=seen
        )
    else:
        elastic = depgraph.Elastic(dense, example, sizes=SIZES)
    optimised(elastic, steps, rate, lambda step: elastic.sandwich(data[step], F.cross_entropy))
    elastic.estimate_statistics(data[:8])
    half = steps // 2
    alone = {
        size: separate(dense, example, size, data[i * half : (i + 1) * half], rate)
        for i, size in enumerate(() if depth else SIZES[1:])
    }
    row: dict[str, Any] = {"case": case, "seed": seed, "steps": steps, "dense": fashion.accuracy(dense, test)}
    row |= {f"elastic {size:g}": fashion.accuracy(elastic.at(size), test) for size in elastic.sizes}
    row |= {f"separate {size:g}": fashion.accuracy(model, test) for size, model in alone.items()}
    return row | cascaded(elastic, held_out, tested) | stored(elastic, [dense, *alone.values()])


@torch.no_grad()
def cascaded(elastic: depgraph.Elastic, held_out: fashion.Images, test: fashion.Images) -> dict[str, Any]:
    """The cascade on the test images, with a batch of one and with batches of 100."""
    cascade = elastic.cascade(threshold="auto", calibration=held_out.batches(50), drop=0.005)
    whole = elastic.at(1)
    row: dict[str, Any] = {"cascade sizes": cascade.sizes, "cascade bound": cascade.report.bound}  # type: ignore[union-attr]
    answers = torch.cat([cascade(x).argmax(1) for x, _ in test.batches(100)])
    row["cascade"] = float((answers == test.labels).float().mean())
    row["cascade, whole"] = fashion.accuracy(whole, test)
    for size, count in ((1, 300), (100, len(test))):
        times: list[list[float]] = [[], []]
        for x, _ in test.part(0, count).batches(size):
            for run, found in ((cascade, times[0]), (whole, times[1])):
                start = time.perf_counter()
                run(x)
                found.append(time.perf_counter() - start)
        row[f"cascade speed-up, batch {size}"] = sum(times[1]) / sum(times[0])
    return row


def stored(elastic: depgraph.Elastic, models: list[nn.Module]) -> dict[str, Any]:
    """Bytes of weights on the disk, of one folder and of one for each size."""

    def size(folder: Path) -> int:
        return sum(p.stat().st_size for p in folder.glob("*.safetensors"))

    with tempfile.TemporaryDirectory() as temporary:
        one = size(depgraph.save(elastic, Path(temporary) / "elastic"))
        whole = sum(t.numel() * t.element_size() for t in models[0].state_dict().values())
        each = [sum(t.numel() * t.element_size() for t in m.state_dict().values()) for m in models]
    return {"bytes": one, "bytes of the whole": whole, "bytes of separate ones": sum(each)}


def read_bytes() -> int:
    """What this process has read by calls, as the system counts it."""
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["rchar"])


def loading(make: Callable[[], nn.Module], example: Tensor) -> dict[str, Any]:
    """Bytes read by loading each size, beside the bytes of its tensors, and what else every load reads."""
    elastic = depgraph.Elastic(make().eval(), example, sizes=SIZES, cost="params")
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = depgraph.save(elastic, Path(temporary) / "elastic")
        rest = (folder / "plan.json").stat().st_size
        for file in folder.glob("*.safetensors"):
            with file.open("rb") as stream:
                rest += 8 + int.from_bytes(stream.read(8), "little")
        depgraph.load(make, folder, size=SIZES[-1])  # imports
        for size in SIZES:
            before = read_bytes()
            small = depgraph.load(make, folder, size=size)
            row[f"read {size:g}"] = read_bytes() - before - rest
            row[f"has {size:g}"] = sum(t.numel() * t.element_size() for t in small.state_dict().values())
    return row


def switching(make: Callable[[], nn.Module], example: Tensor) -> dict[str, Any]:
    """Milliseconds of a switch, and of a call of each size on shared weights and as a plain module."""
    elastic = depgraph.Elastic(make().eval(), example, sizes=SIZES).eval()
    times = []
    for size in SIZES * 20:
        start = time.perf_counter()
        elastic.switch(size)
        times.append(time.perf_counter() - start)
    row: dict[str, Any] = {
        "switch, median [ms]": statistics.median(times) * 1e3,
        "switch, worst [ms]": max(times) * 1e3,
    }
    for size in SIZES[1:]:
        shared, plain = latencies([elastic.at(size), elastic.extract(size)], example)
        row |= {f"call of {size:g}, shared [ms]": shared * 1e3, f"call of {size:g}, plain [ms]": plain * 1e3}
    return row


def assistant(tokens: int) -> dict[str, Any]:
    """SmolLM2-135M and its own half."""
    from benchmarks.real import news
    from depgraph.integrations import hugging_face

    model: Any = news.smollm().language_model
    ids = news.windows()[0][:1, :64]
    elastic = depgraph.Elastic(
        model, {"input_ids": ids[:, :16]}, sizes=(1, 0.5), cost="params", granularity="fine"
    )
    found: dict[str, Any] = {}
    runs = {
        "greedy": lambda: elastic.model.generate(ids, do_sample=False, max_new_tokens=tokens),
        "with assistant": lambda: hugging_face.generate(elastic, ids, max_new_tokens=tokens),
    }
    for name, run in runs.items():
        start = time.perf_counter()
        found[name] = run()
        found[f"{name} [s]"] = time.perf_counter() - start
    same = torch.equal(found.pop("greedy"), found.pop("with assistant"))
    return {"tokens": tokens, "identical": same, **found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--case", choices=["digits", "resnet20", "mobilenet"], action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--images", type=int, help="train on so many images, and hold out a fifth as many")
    parser.add_argument(
        "--epochs", type=int, help="of the dense net; by default that of benchmarks.quality is used"
    )
    parser.add_argument(
        "--depth", action="store_true", help="sizes that leave out branches: the cascade alone"
    )
    parser.add_argument("--no-resnet", action="store_true")
    parser.add_argument("--assistant", action="store_true")
    parser.add_argument(
        "--suites",
        type=int,
        metavar="N",
        help="alone: every size of N models of the suites, held against the masked original",
    )
    options = parser.parse_args()

    def say(row: dict[str, Any]) -> None:
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)

    torch.set_num_threads(1)
    suites = 3 if options.small and not options.case else options.suites or 0
    rows = elastic_suites.checked(suites, say) if suites else []
    if rows:
        say({"models": len(rows), "wrong": [r["model"] for r in rows if r["wrong"]]})
    if options.suites:
        sys.exit(any(r["wrong"] for r in rows))
    cases = options.case or (["digits"] if options.small else ["resnet20", "mobilenet"])
    seeds, steps = (1, 150) if options.small else (options.seeds, options.steps)
    for case in cases if not options.assistant else ():
        for seed in range(seeds):
            say(accuracies(case, seed, steps, options.images, options.epochs, options.depth))
    if not (options.no_resnet or options.assistant):
        import torchvision

        make = torchvision.models.resnet18 if options.small else torchvision.models.resnet50
        say(loading(make, torch.zeros(1, 3, 64, 64)))
        say(switching(make, torch.zeros(1, 3, 64 if options.small else 224, 64 if options.small else 224)))
    if options.assistant:
        say(assistant(64))


if __name__ == "__main__":
    main()
