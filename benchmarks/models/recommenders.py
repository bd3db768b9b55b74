"""Recommenders and networks for tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.layers import mlp


class DLRM(nn.Module):
    """Bags of embeddings and dense features interact by dot products of all pairs."""

    def __init__(self, tables: Sequence[int] = (11, 13, 17), width: int = 12):
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(n, width, mode="sum") for n in tables)
        self.bottom = mlp(7, 20, width)
        pairs = (len(tables) + 1) * len(tables) // 2
        self.top = mlp(width + pairs, 24, 16, 1)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        rows = [x] + [table(sparse[:, i]) for i, table in enumerate(self.tables)]
        stacked = torch.stack(rows, 1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))
        i, j = torch.tril_indices(len(rows), len(rows), -1)
        return self.top(torch.cat((x, products[:, i, j]), 1)).sigmoid()


class DeepFM(nn.Module):
    """Linear terms, a factorisation machine and an MLP over the same embeddings."""

    def __init__(self, fields: Sequence[int] = (11, 13, 17), width: int = 8):
        super().__init__()
        self.embed, self.linear = nn.Embedding(sum(fields), width), nn.Embedding(sum(fields), 1)
        self.register_buffer("offsets", torch.tensor([0, *fields[:-1]]).cumsum(0))
        self.deep = nn.Sequential(
            nn.Linear(len(fields) * width, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 1)
        )
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.offsets
        e = self.embed(x)
        cross = 0.5 * (e.sum(1).square() - e.square().sum(1)).sum(1, keepdim=True)
        deep = self.deep(e.view(-1, x.shape[1] * self.width))
        return torch.sigmoid(self.linear(x).sum(1) + cross + deep)


class CrossNetwork(nn.Module):
    """Deep and cross network: x0 * (w x) + x beside an MLP, joined."""

    def __init__(self, fields: Sequence[int] = (11, 13), width: int = 6, dense: int = 7):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, width) for n in fields)
        size = len(fields) * width + dense
        self.cross = nn.ModuleList(nn.Linear(size, size) for _ in range(2))
        self.deep = mlp(size, 24, 16)
        self.out = nn.Linear(size + 16, 1)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x0 = torch.cat([table(sparse[:, i]) for i, table in enumerate(self.tables)] + [dense], 1)
        x = x0
        for layer in self.cross:
            x = x0 * layer(x) + x
        return self.out(torch.cat((x, self.deep(x0)), 1))


class TwoTower(nn.Module):
    """Users and items in one space, cosine scores with a temperature."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.user, self.item = nn.Embedding(11, 16), nn.Embedding(13, 16)
        self.left, self.right = mlp(16, 24, width), mlp(16, 20, width)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        a = F.normalize(self.left(self.user(users)), dim=-1)
        b = F.normalize(self.right(self.item(items)), dim=-1)
        return a @ b.t() * self.temperature.exp()


class NeuralCF(nn.Module):
    """Neural collaborative filtering: an element-wise product beside an MLP."""

    def __init__(self):
        super().__init__()
        self.gmf = nn.ModuleList([nn.Embedding(11, 10), nn.Embedding(13, 10)])
        self.mlp = nn.ModuleList([nn.Embedding(11, 12), nn.Embedding(13, 12)])
        self.deep, self.out = mlp(24, 20, 14), nn.Linear(24, 1)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        product = self.gmf[0](users) * self.gmf[1](items)
        deep = self.deep(torch.cat((self.mlp[0](users), self.mlp[1](items)), -1)).relu()
        return self.out(torch.cat((product, deep), -1)).sigmoid()


class SequenceRecommender(nn.Module):
    """Self-attention over a history; scores by the tied item table (SASRec)."""

    def __init__(self, items: int = 19, width: int = 16, length: int = 9):
        super().__init__()
        self.items = nn.Embedding(items, width, padding_idx=0)
        self.place = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 2, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        mask = torch.triu(torch.ones(t, t, dtype=torch.bool), 1)
        y = self.encoder(self.items(x) + self.place(torch.arange(t)), mask=mask)
        return y @ self.items.weight.t()


class FeatureTransformer(nn.Module):
    """Numbers and categories of a table as tokens (FT-Transformer)."""

    def __init__(self, numbers: int = 5, categories: Sequence[int] = (7, 3), width: int = 16):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(numbers, width)),
            nn.Parameter(torch.randn(numbers, width)),
        )
        self.tables = nn.ModuleList(nn.Embedding(n, width) for n in categories)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        layer = nn.TransformerEncoderLayer(width, 4, 24, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        tokens = x[:, :, None] * self.weight + self.bias
        more = torch.stack([table(c[:, i]) for i, table in enumerate(self.tables)], 1)
        y = torch.cat((self.cls.expand(x.shape[0], -1, -1), tokens, more), 1)
        return self.out(self.encoder(y)[:, 0])


class TabNetStep(nn.Module):
    """Feature selection by a sparse mask, gated linear blocks, a sum over steps."""

    def __init__(self, features: int = 12, width: int = 10, steps: int = 2):
        super().__init__()
        self.norm = nn.BatchNorm1d(features)
        self.shared = nn.Linear(features, 4 * width)
        self.own = nn.ModuleList(nn.Linear(2 * width, 4 * width) for _ in range(steps + 1))
        self.attend = nn.ModuleList(
            nn.Sequential(nn.Linear(width, features), nn.BatchNorm1d(features)) for _ in range(steps)
        )
        self.width, self.out = width, nn.Linear(width, 3)

    def transform(self, x: Tensor, i: int) -> Tensor:
        """Two gated blocks, the second with a shortcut."""
        x = F.glu(self.shared(x))
        return (x + F.glu(self.own[i](x))) * math.sqrt(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        prior, total = torch.ones_like(x), 0
        a = self.transform(x, 0)[:, self.width :]
        for i, attend in enumerate(self.attend):
            mask = torch.softmax(attend(a) * prior, -1)
            prior = prior * (1.3 - mask)
            y = self.transform(mask * x, i + 1)
            total = total + y[:, : self.width].relu()
            a = y[:, self.width :]
        return self.out(total)
