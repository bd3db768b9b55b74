"""Networks composed at random from the patterns of the zoo: stem, image blocks, perhaps token blocks, a head.

A block is a class `Kind(dice, width)` that sets `self.out`, the width it gives; image blocks keep the map's size,
token blocks the number of tokens and the width. `random_network(seed)` is a function of the seed alone.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from random_image_blocks import BATCH, HEIGHT, IMAGE_BLOCKS, PIXELS, WIDTH, WIDTHS, Dice, Plain, conv_act
from random_token_blocks import TOKEN_BLOCKS
from torch import Tensor, nn
from zoo_entry import ready

# --- heads and whole networks -----------------------------------------------------------------------------------


class Head(nn.Module):
    """Pooled, flattened, or a map; one output or a dict of two."""

    def __init__(self, dice: Dice, width: int, from_tokens: bool):
        super().__init__()
        self.kind = dice.choice(("mean", "flatten", "last", "two"))
        self.from_tokens, inner = from_tokens, dice.choice(WIDTHS)
        self.hidden = nn.Linear(width * (PIXELS if self.kind == "flatten" else 1), inner)
        self.out, self.other = nn.Linear(inner, 3), nn.Linear(width, 2)
        if self.kind != "two":
            del self.other

    def forward(self, x):
        if self.kind == "flatten":
            return self.out(F.gelu(self.hidden(x.flatten(1))))
        if not self.from_tokens:
            x = x.flatten(2).transpose(1, 2)
        pooled = x[:, -1] if self.kind == "last" else x.mean(1)
        y = self.out(F.gelu(self.hidden(pooled)))
        return {"y": y, "map": self.other(x)} if self.kind == "two" else y


class RandomNetwork(nn.Module):
    """stem -> image blocks -> (tokens + position -> token blocks) -> head."""

    def __init__(self, dice: Dice):
        super().__init__()
        width = dice.choice(WIDTHS)
        self.stem = conv_act(dice, 3, width)
        blocks = []
        for kind in dice.choices(IMAGE_BLOCKS, k=dice.choice((1, 2, 2, 3, 4))):
            blocks.append(kind(dice, width))
            width = blocks[-1].out
            if width > 24:
                blocks.append(Plain(dice, width))
                width = blocks[-1].out
        self.blocks, self.position, tokens = nn.ModuleList(blocks), None, []
        if dice.random() < 0.45:
            self.position = nn.Parameter(torch.zeros(1, PIXELS, width)) if dice.random() < 0.5 else None
            tokens = [kind(dice, width) for kind in dice.choices(TOKEN_BLOCKS, k=dice.choice((1, 2, 3)))]
        self.tokens = nn.ModuleList(tokens)
        self.head = Head(dice, width, bool(tokens))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        if len(self.tokens):
            x = x.flatten(2).transpose(1, 2)
            x = x if self.position is None else x + self.position
            for block in self.tokens:
                x = block(x)
        return self.head(x)

    @property
    def kinds(self) -> list[str]:
        """The names of its blocks in order."""
        return [type(b).__name__ for b in (*self.blocks, *self.tokens)]


def random_network(seed: int) -> tuple[RandomNetwork, tuple[Tensor, ...]]:
    """The network of that seed in float64 with random weights, and an example input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ready(RandomNetwork(random.Random(seed)), seed)
        return model, (torch.randn(BATCH, 3, HEIGHT, WIDTH, dtype=torch.float64),)


def random_options(seed: int, model: nn.Module) -> dict[str, Any]:
    """A pruning ratio for that seed, which factors are cut and, for every third, parameters that must stay as they are."""
    dice = random.Random(-1 - seed)
    ratio = dice.choice((0.2, 0.35, 0.5, 0.5, 0.7, 0.9))
    names = [name for name, _ in model.named_parameters()]
    ignored = dice.sample(names, dice.choice((0, 0, 0, 0, 1, 2)))
    return {
        "pruning_ratio": ratio,
        "ignore": ignored,
        "granularity": dice.choice((None, "coarse", "fine")),
    }
