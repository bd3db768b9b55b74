"""Units scored alone and in turn: what is left of three small networks on digits, a table of docs/best.md.

    python -m benchmarks.in_turn --small                    # the perceptron, one budget, one draw of calibration data
    python -m benchmarks.in_turn --network transformer      # minutes

Figures: right answers, and the divergence (KL) of the classes from the dense network's, on images that are not trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
from benchmarks.real import digits, fashion

CRITERIA = ("kfac_obs", "kfac_in_turn")
IMAGES, BATCH = 256, 64


class Layer(nn.Module):
    """A transformer's layer with its norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.before, self.between = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (
            m(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    """Patches of 2 x 2 pixels, three layers of 48 with six heads, the mean of all tokens."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.places = nn.Parameter(torch.randn(16, width) * 0.1)
        self.layers = nn.Sequential(*[Layer(width, 6) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.layers(x)).mean(1))


def perceptron() -> nn.Module:
    """Two hidden layers of 160."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 160), nn.ReLU(), nn.Linear(160, 160), nn.ReLU(), nn.Linear(160, 10)
    )


def network(name: str) -> nn.Module:
    """The named network, trained."""
    if name == "digits":
        return digits.trained()
    torch.manual_seed(0)
    model, epochs = (perceptron(), 15) if name == "perceptron" else (Transformer(), 30)
    images = digits.training()
    steps = epochs * -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for some in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images.images[some]), images.labels[some]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def judged(model: nn.Module, dense: nn.Module, data: fashion.Images) -> tuple[float, float]:
    """Right answers, and the divergence from the dense network."""
    found, wanted = model(data.images).log_softmax(1), dense(data.images).log_softmax(1)
    right = (found.argmax(1) == data.labels).float().mean()
    return float(right), float(F.kl_div(found, wanted, log_target=True, reduction="batchmean"))


def run(name: str, shares: Sequence[float], seeds: int) -> None:
    """A line for each budget and draw of calibration data."""
    dense, data = network(name), digits.held_out()
    print(f"{name}, dense: {judged(dense, dense, data)[0]:.3f}")
    budget = "max_params" if name == "transformer" else "max_macs"
    graph = depgraph.analyze(dense, data.images[:2])
    for share in shares:
        for seed in range(seeds):
            text = f"  {budget}={share:g}, seed {seed}"
            for criterion in CRITERIA:
                small = depgraph.prune(
                    dense,
                    data.images[:2],
                    graph=graph,
                    importance=criterion,
                    calibration=digits.training().sample(IMAGES, seed).batches(BATCH),
                    loss=F.cross_entropy,
                    recover="auto",
                    progress=False,
                    max_params=share if budget == "max_params" else None,
                    max_macs=share if budget == "max_macs" else None,
                ).model
                right, divergence = judged(small, dense, data)
                text += f"; {criterion} {right:.3f}, KL {divergence:.4f}"
            print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="seconds")
    parser.add_argument(
        "--network", action="append", choices=["digits", "perceptron", "transformer"], help="default: all"
    )
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.small:
        run("perceptron", [0.15], 1)
        return
    for name in options.network or ("digits", "perceptron", "transformer"):
        run(name, (0.7, 0.5, 0.3) if name == "transformer" else (0.5, 0.3, 0.15), options.seeds)


if __name__ == "__main__":
    main()
