"""Networks for series."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.layers import mlp


class TemporalConvNet(nn.Module):
    """Weight-normalised causal convolutions whose padding is chopped off again."""

    def __init__(self, channels: int = 6, widths: Sequence[int] = (16, 16, 20)):
        super().__init__()
        self.blocks, self.skips = nn.ModuleList(), nn.ModuleList()
        for i, (a, b) in enumerate(zip((channels, *widths[:-1]), widths, strict=True)):
            d = 2**i
            self.blocks.append(
                nn.ModuleList(
                    nn.utils.parametrizations.weight_norm(nn.Conv1d(c, b, 3, padding=2 * d, dilation=d))
                    for c in (a, b)
                )
            )
            self.skips.append(nn.Conv1d(a, b, 1) if a != b else nn.Identity())
        self.out = nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        for i, (block, skip) in enumerate(zip(self.blocks, self.skips, strict=True)):
            y = x
            for conv in block:
                y = conv(y)[:, :, : -2 * 2**i].relu()
            x = (y + skip(x)).relu()
        return self.out(x[:, :, -1])


class NBeats(nn.Module):
    """Stacked blocks, each subtracts what it explains (backcast) and adds what it predicts (forecast)."""

    def __init__(self, back: int = 20, ahead: int = 5, width: int = 24, blocks: int = 3):
        super().__init__()
        self.back, self.ahead = back, ahead
        self.blocks = nn.ModuleList(mlp(back, width, width, width) for _ in range(blocks))
        self.theta = nn.ModuleList(nn.Linear(width, 8, bias=False) for _ in range(blocks))
        self.back_out = nn.ModuleList(nn.Linear(4, back) for _ in range(blocks))
        self.ahead_out = nn.ModuleList(nn.Linear(4, ahead) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(x.shape[0], self.ahead)
        for block, theta, back, ahead in zip(
            self.blocks, self.theta, self.back_out, self.ahead_out, strict=True
        ):
            a, b = theta(block(x).relu()).split(4, 1)
            x = x - back(a)
            total = total + ahead(b)
        return total


class SparseAttention(nn.Module):
    """Only the queries that differ most from the mean are attended with; the others take the values' mean (Informer)."""

    def __init__(self, width: int, heads: int, top: int = 4):
        super().__init__()
        self.heads, self.top = heads, top
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1)
        index = (scores.amax(-1) - scores.mean(-1)).topk(self.top, -1).indices
        rows = torch.gather(scores, 2, index[..., None].expand(-1, -1, -1, t))
        picked = (rows / math.sqrt(q.shape[-1])).softmax(-1) @ v
        y = v.mean(2, keepdim=True).expand(-1, -1, t, -1).clone()
        y[torch.arange(n)[:, None, None], torch.arange(self.heads)[None, :, None], index] = picked
        return self.out(y.transpose(1, 2).reshape(n, t, -1))


class Informer(nn.Module):
    """Sparse attention, distilling convolutions that halve the sequence, a linear forecast."""

    def __init__(self, channels: int = 6, width: int = 16, heads: int = 4, length: int = 20, ahead: int = 5):
        super().__init__()
        self.embed = nn.Conv1d(channels, width, 3, padding=1, padding_mode="circular")
        self.attention = nn.ModuleList(SparseAttention(width, heads) for _ in range(2))
        self.feed = nn.ModuleList(mlp(width, 24, width, act=nn.GELU) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.distil = nn.Sequential(
            nn.Conv1d(width, width, 3, padding=1), nn.BatchNorm1d(width), nn.ELU(), nn.MaxPool1d(3, 2, 1)
        )
        self.out = nn.Linear(width * (length // 2), ahead)
        rates = torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
        angles = torch.arange(length)[:, None] * rates
        self.register_buffer("position", torch.stack((angles.sin(), angles.cos()), 2).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(1, 2) + self.position[: x.shape[2]]
        for i in range(2):
            x = self.norms[2 * i](x + self.attention[i](x))
            x = self.norms[2 * i + 1](x + self.feed[i](x))
            if i == 0:
                x = self.distil(x.transpose(1, 2)).transpose(1, 2)
        return self.out(x.flatten(1))


class PatchTST(nn.Module):
    """Each channel of a series by itself: patches as tokens, normalised by its own mean and deviation."""

    def __init__(self, patch: int = 4, width: int = 16, heads: int = 4, length: int = 20, ahead: int = 5):
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch, width)
        self.position = nn.Parameter(torch.randn(length // patch, width))
        layer = nn.TransformerEncoderLayer(width, heads, 24, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(width * (length // patch), ahead)

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = x.mean(2, keepdim=True), x.std(2, keepdim=True) + 1e-5
        y = ((x - mean) / deviation).unfold(2, self.patch, self.patch)
        n, c, p, _ = y.shape
        y = self.encoder(self.embed(y).reshape(n * c, p, -1) + self.position)
        return self.out(y.reshape(n, c, -1)) * deviation + mean


class TimesNet(nn.Module):
    """A series folded into rows of its strongest periods (found by a Fourier transform) and convolved in two dims."""

    def __init__(self, channels: int = 6, width: int = 12, length: int = 20, ahead: int = 5, top: int = 2):
        super().__init__()
        self.top, self.length, self.ahead = top, length, ahead
        self.embed = nn.Conv1d(channels, width, 3, padding=1)
        self.convs = nn.Sequential(
            nn.Conv2d(width, 20, 3, padding=1), nn.GELU(), nn.Conv2d(20, width, 3, padding=1)
        )
        self.norm = nn.LayerNorm(width)
        self.time, self.out = nn.Linear(length, ahead), nn.Linear(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(1, 2)
        n, t, c = x.shape
        spectrum = torch.fft.rfft(x, dim=1).abs()
        strength = spectrum.mean(0).mean(-1)
        strength[0] = 0
        _, found = torch.topk(strength, self.top)
        weights = spectrum.mean(-1)[:, found].softmax(1)
        parts = []
        for f in found.tolist():
            period = t // f
            rows = -(-t // period)
            y = F.pad(x, (0, 0, 0, rows * period - t)).reshape(n, rows, period, c).permute(0, 3, 1, 2)
            parts.append(self.convs(y).permute(0, 2, 3, 1).reshape(n, -1, c)[:, :t])
        y = (torch.stack(parts, -1) * weights[:, None, None]).sum(-1)
        y = self.norm(x + y)
        return self.out(self.time(y.transpose(1, 2)).transpose(1, 2))


class SeriesDecomposition(nn.Module):
    """A moving average and its remainder, each through one linear layer (DLinear)."""

    def __init__(self, length: int = 20, ahead: int = 5, hidden: int = 16):
        super().__init__()
        self.average = nn.AvgPool1d(5, 1)
        self.trend, self.season = mlp(length, hidden, ahead), mlp(length, hidden, ahead)

    def forward(self, x: Tensor) -> Tensor:
        padded = torch.cat((x[:, :, :1].repeat(1, 1, 2), x, x[:, :, -1:].repeat(1, 1, 2)), 2)
        trend = self.average(padded)
        return self.trend(trend) + self.season(x - trend)


class InceptionTime(nn.Module):
    """Convolutions of several widths and a pooled branch joined, with residual shortcuts."""

    def __init__(self, channels: int = 6, width: int = 8, classes: int = 5):
        super().__init__()
        self.bottle, self.convs, self.pools, self.norms = (nn.ModuleList() for _ in range(4))
        c = channels
        for _ in range(3):
            self.bottle.append(nn.Conv1d(c, width, 1, bias=False))
            self.convs.append(
                nn.ModuleList(nn.Conv1d(width, width, k, padding=k // 2, bias=False) for k in (9, 5, 3))
            )
            self.pools.append(nn.Conv1d(c, width, 1, bias=False))
            c = 4 * width
            self.norms.append(nn.BatchNorm1d(c))
        self.short = nn.Sequential(nn.Conv1d(channels, c, 1, bias=False), nn.BatchNorm1d(c))
        self.out = nn.Linear(c, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for bottle, convs, pool, norm in zip(self.bottle, self.convs, self.pools, self.norms, strict=True):
            z = bottle(y)
            y = norm(torch.cat([conv(z) for conv in convs] + [pool(F.max_pool1d(y, 3, 1, 1))], 1)).relu()
        return self.out((y + self.short(x)).relu().mean(2))
