"""Draws the pictures in docs/pictures: `python examples/pictures.py [folder]`, a minute or two.

They show the demo's network on scikit-learn's digits: what each of its groups is worth, the trade-off between accuracy and
cost with and without fine-tuning, the widths at half the MACs, and what one residual stream ties together.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from demo import SEED, DigitsNet, accuracy, load_data, train
from torch import nn

import depgraph
from depgraph import pictures

FOLDER = Path(__file__).parent.parent / "docs" / "pictures"
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    data = load_data()
    model = DigitsNet(width=24)
    train(model, data, epochs=10, rate=0.05)
    x = data.train_x[:2]

    def score(candidate: nn.Module) -> float:
        return accuracy(candidate, data)

    def score_after_training(candidate: nn.Module) -> float:
        if candidate is model:
            return accuracy(model, data)
        torch.manual_seed(SEED)
        tuned = copy.deepcopy(candidate)
        train(tuned, data, epochs=1, rate=0.02)
        return accuracy(tuned, data)

    found = depgraph.sensitivity(model, x, score)
    print(found)
    found.plot(folder / "sensitivity.png")

    swept = {
        name: depgraph.sweep(model, x, budgets={"max_macs": BUDGETS}, score=judge, latency=False)
        for name, judge in (("as pruned", score), ("after one epoch", score_after_training))
    }
    for sweep in swept.values():
        print(sweep)
    pictures.trade_off(swept, folder / "trade-off.png")

    result = depgraph.prune(model, x, max_macs=0.5)
    pictures.widths(result, folder / "widths.png")
    pictures.group(depgraph.analyze(model, x), "stem.weight:0", folder / "group.png")


if __name__ == "__main__":
    main()
