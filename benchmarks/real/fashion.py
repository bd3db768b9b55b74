"""Fashion-MNIST (60 000 training and 10 000 test images of clothes) and the nets trained on it."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
from depgraph.training.train import soft_loss

from . import fetch, nets

EPOCHS = {"resnet20": 7, "mobilenet": 6, "vgg": 7, "vit": 8}
ADAMW_RATES = {"vit": 2e-3}  # the highest rate of AdamW for nets that SGD does not suit
MEAN, DEVIATION = 0.2860, 0.3530
PADDING = 2
TUNING_IMAGES = 20_000  # a third of an epoch
TUNING_BATCH = 64
TUNING_RATE = 0.01


@dataclass(frozen=True)
class Images:
    """`images` [count, 1, height, width], normalised, and `labels` [count]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, count: int, seed: int) -> Images:
        """`count` of them, drawn without replacement."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return Images(self.images[chosen], self.labels[chosen])

    def part(self, first: int, end: int) -> Images:
        """Those from `first` on, up to `end` but without it."""
        return Images(self.images[first:end], self.labels[first:end])

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """All of them in their order, as (images, labels)."""
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))

    def training_epoch(
        self, size: int, generator: torch.Generator, mirror: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them shuffled, shifted by up to two pixels, mirrored by chance; no batch is cut short."""
        order = torch.randperm(len(self), generator=generator)
        for chosen in order.split(size):
            if len(chosen) == size:
                yield _augmented(self.images[chosen], generator, mirror), self.labels[chosen]


def load() -> tuple[Images, Images]:
    """The training and the test images."""
    folder = fetch.debian("dataset-fashion-mnist") / "usr/share/datasets/fashion-mnist"
    return _read(folder, "train"), _read(folder, "t10k")


def trained(name: str, log: bool = True) -> nn.Module:
    """The named net, trained once and cached; in eval mode."""

    def make(path: Path) -> None:
        train_images, test_images = load()
        net = nets.build(name)
        optimizer = None
        if name in ADAMW_RATES:
            optimizer = torch.optim.AdamW(net.parameters(), ADAMW_RATES[name], weight_decay=0.05)
        train(net, train_images, EPOCHS[name], 0.1, seed=0, log=name if log else None, optimizer=optimizer)
        if log:
            print(f"{name}: test accuracy {accuracy(net, test_images):.4f}", flush=True)
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path)

    net = nets.build(name)
    net.load_state_dict(load_file(fetch.cached(f"trained/fashion-{name}.safetensors", make)))
    return net.eval()


def train(
    net: nn.Module,
    data: Images,
    epochs: int,
    rate: float,
    seed: int,
    mirror: bool = True,
    log: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Batches of 128, a rate that rises for a fifth and then falls, up to that of `optimizer`.

    By default that is SGD up to `rate` with Nesterov momentum and weight decay 5e-4.
    """
    generator = torch.Generator().manual_seed(seed)
    net.train().to(memory_format=torch.channels_last)
    if optimizer is None:
        optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * (len(data) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, optimizer.param_groups[0]["lr"], total_steps=steps, pct_start=0.2, cycle_momentum=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # dropout
        for epoch in range(epochs):
            started, total = time.process_time(), 0.0
            for images, labels in data.training_epoch(128, generator, mirror):
                optimizer.zero_grad()
                loss = F.cross_entropy(net(images.contiguous(memory_format=torch.channels_last)), labels)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
            if log:
                mean = total * 128 / len(data)
                seconds = time.process_time() - started
                print(
                    f"{log}: epoch {epoch + 1}, loss {mean:.4f}, {seconds:.0f} s of processor time",
                    flush=True,
                )
    net.eval().to(memory_format=torch.contiguous_format)


@torch.no_grad()
def answered(teacher: nn.Module, data: Images, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Batches for `distil`: 20 000 of the images, shifted and mirrored, and the teacher's logits of them."""
    teacher.eval().to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    epoch = data.sample(TUNING_IMAGES, seed).training_epoch(TUNING_BATCH, generator, mirror=True)
    images = [batch.contiguous(memory_format=torch.channels_last) for batch, _ in epoch]
    return [(batch, teacher(batch)) for batch in images]


def distil(student: nn.Module, data: list[tuple[Tensor, Tensor]], seed: int) -> None:
    """Once through `data` by SGD, whose rate rises for a fifth and then falls to 0; the loss asks for the teacher's logits.

    It is the loss of ``depgraph.distill(student, teacher, ...)``, with the teacher's logits worked out once for all students.
    """
    optimizer = torch.optim.SGD(
        student.parameters(), TUNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, TUNING_RATE, total_steps=len(data), pct_start=0.2, cycle_momentum=False
    )
    student.to(memory_format=torch.channels_last)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # dropout
        depgraph.finetune(student, data, soft_loss, optimizer=optimizer, scheduler=schedule, progress=False)
    student.to(memory_format=torch.contiguous_format)


@torch.no_grad()
def accuracy(net: nn.Module, data: Images) -> float:
    """The share of images whose class comes first."""
    net.eval()
    right = sum(int((net(images).argmax(1) == labels).sum()) for images, labels in data.batches(100))
    return right / len(data)


def _augmented(images: Tensor, generator: torch.Generator, mirror: bool) -> Tensor:
    count, _, height, width = images.shape
    padded = F.pad(images, (PADDING,) * 4, value=images.min().item())
    down, right = torch.randint(0, 2 * PADDING + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < (0.5 if mirror else 0)
    columns = torch.arange(width)
    columns = torch.where(mirrored, width - 1 - columns, columns) + right
    rows = torch.arange(height) + down
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def _read(folder: Path, part: str) -> Images:
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    images = torch.from_numpy(pixels.astype(np.float32)).div_(255).sub_(MEAN).div_(DEVIATION)
    return Images(images, torch.from_numpy(labels.astype(np.int64)))
