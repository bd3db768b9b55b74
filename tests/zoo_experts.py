"""Experts chosen by a router: which of them stay is told by what numbers them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from versions import NEW_TORCH
from zoo_attention import STREAM, Block
from zoo_entry import CLASSES, entry, tokens, vector

EXPERTS = "router.weight:0 rise:0 rise:1 fall:0 fall:2"


class Experts(Block):
    """Six experts as stacked weights [6 13 11] and [6 11 13]; `attend` says how the best two of a token are used."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(11, 6)
        self.rise, self.fall = nn.Parameter(torch.randn(6, 13, 11)), nn.Parameter(torch.randn(6, 11, 13))
        self.experts, self.chosen = 6, 2

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.router(x).softmax(-1).topk(self.chosen, -1)
        return weights / weights.sum(-1, keepdim=True), index


@entry(tokens(), STREAM + EXPERTS)
class LookedUpExperts(Experts):
    """The weights of the chosen experts are looked up for each token."""

    def attend(self, x):
        weights, index = self.route(x)
        hidden = torch.einsum("bnkhc,bnc->bnkh", self.rise[index], x).relu()
        return torch.einsum("bnkch,bnkh,bnk->bnc", self.fall[index], hidden, weights)


@entry(tokens(), STREAM + EXPERTS)
class OneHotExperts(Experts):
    """Every expert runs; a one-hot table with the number of experts as an attribute combines them."""

    def attend(self, x):
        weights, index = self.route(x)
        combine = (F.one_hot(index, self.experts) * weights.unsqueeze(-1)).sum(-2)
        hidden = torch.einsum("ehc,bnc->bneh", self.rise, x).relu()
        return torch.einsum("ech,bneh,bne->bnc", self.fall, hidden, combine)


@entry(tokens(), STREAM + EXPERTS)
class ScatteredExperts(Experts):
    """Weights of the chosen experts are scattered into a table of zeros; the best is also looked up in a bias."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Embedding(6, 11)

    def attend(self, x):
        weights, index = self.route(x)
        table = x.new_zeros(*x.shape[:-1], self.experts).scatter(-1, index, weights)
        hidden = torch.einsum("ehc,bnc->bneh", self.rise, x).relu()
        return torch.einsum("ech,bneh,bne->bnc", self.fall, hidden, table) + self.bias(index[..., 0])


@entry(tokens(), STREAM + EXPERTS)
class ExpertsInGroups(Experts):
    """Two groups of three: the better group by the sum of its best two, then the best two experts of it."""

    def attend(self, x):
        scores = self.router(x).sigmoid()
        best = scores.unflatten(-1, (2, self.experts // 2)).topk(2, -1)[0].sum(-1)
        group = torch.zeros_like(best).scatter_(-1, best.topk(1, -1)[1], 1)
        allowed = group.unsqueeze(-1).expand(*group.shape, self.experts // 2).flatten(-2).bool()
        index = scores.masked_fill(~allowed, float("-inf")).topk(2, -1)[1]
        weights = scores.gather(-1, index)
        hidden = torch.einsum("bnkhc,bnc->bnkh", self.rise[index], x).relu()
        return torch.einsum("bnkch,bnkh,bnk->bnc", self.fall[index], hidden, weights)


@(
    entry(tokens(8), "stem.weight router.weight:0 rise:0 rise:1 fall:0 fall:2", dtype=torch.float32)
    if NEW_TORCH
    else lambda cls: cls
)
class SortedExperts(nn.Module):
    """Tokens sorted by expert, counted by a histogram, multiplied in groups; sizes are multiples of 8 for the kernel."""

    def __init__(self):
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(8, 24), nn.Linear(24, 6), nn.Linear(24, CLASSES)
        self.rise, self.fall = nn.Parameter(torch.randn(6, 16, 24)), nn.Parameter(torch.randn(6, 24, 16))
        self.experts = 6

    def forward(self, x):
        x = self.stem(x).flatten(0, 1)
        weights, index = self.router(x).softmax(-1).topk(2, -1)
        ids, order = torch.sort(index.reshape(-1))
        counts = torch.histc(ids.float(), bins=self.experts, min=0, max=self.experts - 1)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        hidden = torch._grouped_mm(x[order // 2], self.rise.transpose(-2, -1), offs=ends).relu()
        out = torch._grouped_mm(hidden, self.fall.transpose(-2, -1), offs=ends)
        out = out * weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        return self.head(x + out[back].unflatten(0, (-1, 2)).sum(1))


@entry(vector(), "stem.weight keys values.weight")
class NearestCode(nn.Module):
    """A vector is replaced by the value of its most similar key: the pairs of key and value are units."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(5, 7), nn.Linear(7, 11)
        self.keys, self.values, self.out = (
            nn.Parameter(torch.randn(13, 11)),
            nn.Embedding(13, 3),
            nn.Linear(3, CLASSES),
        )

    def forward(self, x):
        similar = F.linear(self.head(self.stem(x).relu()), self.keys)
        return self.out(self.values(similar.argmax(-1)))


@entry(vector(), "stem.weight", "table.weight:0")
class NumbersLeave(nn.Module):
    """Positions that are computed with, or compared with a number, hold what they number."""

    def __init__(self):
        super().__init__()
        self.stem, self.table, self.head = nn.Linear(5, 7), nn.Linear(7, 11), nn.Linear(11, CLASSES)

    def forward(self, x):
        y = self.table(self.stem(x).relu())
        return self.head(y * (y.argmax(-1, keepdim=True) == 3)) + y.max(-1).indices.unsqueeze(-1)
