"""The whole way on real data: train, prune to half the MACs and recover, verify, fine-tune, compare.

Run it with `make demo`, or `python examples/demo.py` where depgraph and scikit-learn are installed. It trains a small
residual network on scikit-learn's handwritten digits (1 797 images of 8 x 8 pixels, shipped in its wheel).
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import depgraph

SEED = 7
BATCHES = (1, 64)


class Block(nn.Module):
    """Two convolutions and a residual sum around them; where the shape changes, a 1 x 1 convolution on the way past."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual network of five blocks for images of 8 x 8 pixels and ten classes."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(
            Block(width, width),
            Block(width, width),
            Block(width, 2 * width, stride=2),
            Block(2 * width, 2 * width),
            Block(2 * width, 2 * width),
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(x.mean(dim=(2, 3)))


@dataclass(frozen=True)
class Digits:
    """Images as float tensors [n, 1, 8, 8] in 0..1, labels as int64 [n]."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_data() -> Digits:
    data = load_digits()
    parts = train_test_split(
        data.images.astype("float32") / 16,
        data.target,
        test_size=0.25,
        random_state=SEED,
        stratify=data.target,
    )
    train_x, test_x, train_y, test_y = (torch.tensor(part) for part in parts)
    return Digits(train_x.unsqueeze(1), train_y.long(), test_x.unsqueeze(1), test_y.long())


def train(model: nn.Module, data: Digits, *, epochs: int, rate: float, batch: int = 64) -> None:
    """Train in place with SGD and one cosine cycle of the learning rate, in batches drawn by the global seed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * -(-len(data.train_x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train_x)).split(batch):
            loss = F.cross_entropy(model(data.train_x[rows]), data.train_y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    return (model(data.test_x).argmax(1) == data.test_y).float().mean().item()


@torch.no_grad()
def macs(model: nn.Module) -> int:
    """Multiply-accumulates for one image, by torch's own counter (which counts each as two FLOPs)."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, 8, 8))
    return counter.get_total_flops() // 2


@torch.no_grad()
def latencies(models: list[nn.Module], batch: int, rounds: int = 30) -> list[float]:
    """Milliseconds a call, the median of `rounds` after a warm-up; the models take turns, so noise hits them alike."""
    x = torch.rand(batch, 1, 8, 8)
    times: list[list[float]] = [[] for _ in models]
    for turn in range(rounds + 5):
        for model, record in zip(models, times, strict=True):
            start = time.perf_counter()
            model(x)
            if turn >= 5:
                record.append(1000 * (time.perf_counter() - start))
    return [statistics.median(record) for record in times]


def comparison(dense: nn.Module, pruned: nn.Module, tuned: nn.Module, data: Digits) -> Table:
    """The table: what the network was, what pruning made of it, and what fine-tuning won back."""
    models = [dense, pruned, tuned]
    table = Table(title="digits: the network before and after")
    for column in ("", "before", "pruned", "fine-tuned", "before / after"):
        table.add_column(column, justify="right" if column else "left")

    table.add_row("accuracy on the test images", *(f"{accuracy(model, data):.1%}" for model in models), "")
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    table.add_row("parameters", *(f"{n:,}" for n in sizes), f"{sizes[0] / sizes[-1]:.2f} x")
    work = [macs(model) for model in models]
    table.add_row("MACs per image", *(f"{n:,}" for n in work), f"{work[0] / work[-1]:.2f} x")
    for batch in BATCHES:
        times = latencies(models, batch)
        name = f"latency, batch of {batch}"
        table.add_row(name, *(f"{ms:.2f} ms" for ms in times), f"{times[0] / times[-1]:.2f} x")
    return table


def main() -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the network is tiny: a second thread mostly waits
    console = Console()
    data = load_data()

    console.print(f"training on {len(data.train_x)} images ...")
    model = DigitsNet()
    train(model, data, epochs=10, rate=0.05)

    console.print("pruning to half the MACs, and checking the result against the original ...")
    # Widths that are multiples of 8 run faster; drop round_to and the budget is met more closely still. With images and labels
    # it is known what may go, and what stays is fitted to what the network gave: no training is needed for that.
    batches = list(zip(data.train_x.split(128), data.train_y.split(128), strict=True))
    result = depgraph.prune(
        model, data.train_x[:2], max_macs=0.5, round_to=8, calibration=batches, loss=F.cross_entropy
    )
    pruned = copy.deepcopy(result.model).eval()

    console.print("fine-tuning ...\n")
    train(result.model, data, epochs=5, rate=0.02)

    print(result.report)
    console.print(comparison(model, pruned, result.model, data))


if __name__ == "__main__":
    main()
