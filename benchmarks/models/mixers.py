"""Mixers, experts, linear attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.layers import mlp


class Mixer(nn.Module):
    """MLP-Mixer: one MLP across patches, one across channels."""

    def __init__(self, width: int = 20, patches: int = 24, blocks: int = 2, classes: int = 5):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * blocks + 1))
        self.tokens = nn.ModuleList(mlp(patches, 14, patches, act=nn.GELU) for _ in range(blocks))
        self.channels = nn.ModuleList(mlp(width, 36, width, act=nn.GELU) for _ in range(blocks))
        self.out = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for i, (tokens, channels) in enumerate(zip(self.tokens, self.channels, strict=True)):
            x = x + tokens(self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + channels(self.norms[2 * i + 1](x))
        return self.out(self.norms[-1](x).mean(1))


class GatedMLP(nn.Module):
    """gMLP: half of the channels gate the other half after a projection along the sequence."""

    def __init__(
        self, symbols: int = 19, width: int = 16, hidden: int = 28, length: int = 9, blocks: int = 2
    ):
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.up = nn.ModuleList(nn.Linear(width, hidden) for _ in range(blocks))
        self.gate_norms = nn.ModuleList(nn.LayerNorm(hidden // 2) for _ in range(blocks))
        self.spatial = nn.ModuleList(nn.Conv1d(length, length, 1) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(hidden // 2, width) for _ in range(blocks))
        self.out = nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, up, gate, spatial, down in zip(
            self.norms, self.up, self.gate_norms, self.spatial, self.down, strict=True
        ):
            u, v = F.gelu(up(norm(x))).chunk(2, -1)
            x = x + down(u * spatial(gate(v)))
        return self.out(x)


class FNet(nn.Module):
    """Tokens and channels mixed by a Fourier transform in place of attention."""

    def __init__(self, symbols: int = 19, width: int = 16, blocks: int = 2):
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * blocks))
        self.feed = nn.ModuleList(mlp(width, 28, width, act=nn.GELU) for _ in range(blocks))
        self.out = nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i, feed in enumerate(self.feed):
            x = self.norms[2 * i](x + torch.fft.fft2(x).real)
            x = self.norms[2 * i + 1](x + feed(x))
        return self.out(x)


class RoutedModules(nn.Module):
    """Experts as modules: each sees the tokens that chose it."""

    def __init__(self, width: int = 12, experts: int = 4, hidden: int = 20, top: int = 2):
        super().__init__()
        self.inp, self.out = nn.Linear(6, width), nn.Linear(width, 5)
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(mlp(width, hidden, width) for _ in range(experts))
        self.top = top

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(flat).softmax(-1).topk(self.top, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == i)
            y.index_add_(0, rows, expert(flat[rows]) * weights[rows, place, None])
        return self.out(x + y.view_as(x))


class StackedExperts(nn.Module):
    """Experts as three-dimensional parameters, all computed and weighed (`einsum`) or only those chosen (`bmm`)."""

    def __init__(self, width: int = 12, experts: int = 4, hidden: int = 20, dense: bool = True):
        super().__init__()
        self.inp, self.out = nn.Linear(6, width), nn.Linear(width, 5)
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / 4)
        self.up_bias = nn.Parameter(torch.randn(experts, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / 4)
        self.dense, self.experts = dense, experts

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        weights = self.router(x).softmax(-1)
        if self.dense:
            y = torch.einsum("btd,edh->bteh", x, self.up) + self.up_bias
            y = torch.einsum("bteh,ehd,bte->btd", y.relu(), self.down, weights)
        else:
            flat = x.reshape(-1, x.shape[-1])
            best, chosen = weights.view(-1, self.experts).max(-1)
            y = torch.bmm(flat.unsqueeze(1), self.up[chosen]) + self.up_bias[chosen].unsqueeze(1)
            y = torch.bmm(y.relu(), self.down[chosen]).squeeze(1) * best[:, None]
            y = y.view_as(x)
        return self.out(x + y)


class SwitchExperts(nn.Module):
    """Tokens sent to experts through one-hot dispatch and combine tensors of a fixed capacity."""

    def __init__(self, width: int = 12, experts: int = 4, hidden: int = 20, capacity: int = 6):
        super().__init__()
        self.inp, self.out = nn.Linear(6, width), nn.Linear(width, 5)
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / 4)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / 4)
        self.capacity, self.experts = capacity, experts

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        n, t, d = x.shape
        flat = x.reshape(n * t, d)
        gate, chosen = self.router(flat).softmax(-1).max(-1)
        hot = F.one_hot(chosen, self.experts).to(flat.dtype)
        place = ((hot.cumsum(0) - 1) * hot).sum(-1).long()
        slots = F.one_hot(place.clamp(max=self.capacity - 1), self.capacity).to(flat.dtype)
        slots = slots * (place < self.capacity).to(flat.dtype)[:, None]
        dispatch = torch.einsum("te,tc->tec", hot, slots)
        inside = torch.einsum("tec,td->ecd", dispatch, flat)
        y = torch.bmm(torch.bmm(inside, self.up).relu(), self.down)
        y = torch.einsum("tec,ecd->td", dispatch * gate[:, None, None], y)
        return self.out(x + y.view(n, t, d))


class LinearAttention(nn.Module):
    """Attention without softmax: a positive feature map, keys and values summed first."""

    def __init__(self, symbols: int = 19, width: int = 16, heads: int = 4, blocks: int = 2):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(symbols, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(blocks))
        self.proj = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.out = nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, t, _ = x.shape
        for qkv, proj, norm in zip(self.qkv, self.proj, self.norms, strict=True):
            q, k, v = qkv(norm(x)).view(n, t, 3, self.heads, -1).unbind(2)
            q, k = F.elu(q) + 1, F.elu(k) + 1
            state = torch.einsum("nthd,nthe->nhde", k, v)
            scale = 1 / (torch.einsum("nthd,nhd->nth", q, k.sum(1)) + 1e-6)
            y = torch.einsum("nthd,nhde,nth->nthe", q, state, scale)
            x = x + proj(y.reshape(n, t, -1))
        return self.out(x)


class StateSpace(nn.Module):
    """A selective state-space block: depthwise causal convolution, input-dependent steps, a scan in a loop."""

    def __init__(self, symbols: int = 19, width: int = 12, inner: int = 20, state: int = 4, rank: int = 3):
        super().__init__()
        self.state, self.rank = state, rank
        self.embed, self.norm = nn.Embedding(symbols, width), nn.LayerNorm(width)
        self.inp = nn.Linear(width, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 4, padding=3, groups=inner)
        self.select, self.step = nn.Linear(inner, rank + 2 * state, bias=False), nn.Linear(rank, inner)
        self.a_log = nn.Parameter(torch.log(torch.arange(1, state + 1).float()).repeat(inner, 1))
        self.d = nn.Parameter(torch.ones(inner))
        self.proj, self.out = nn.Linear(inner, width, bias=False), nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        t = x.shape[1]
        u, z = self.inp(self.norm(x)).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., :t]).transpose(1, 2)
        step, b, c = self.select(u).split((self.rank, self.state, self.state), -1)
        step = F.softplus(self.step(step))
        a = torch.exp(step.unsqueeze(-1) * -torch.exp(self.a_log))
        bu = step.unsqueeze(-1) * b.unsqueeze(2) * u.unsqueeze(-1)
        h, found = torch.zeros_like(bu[:, 0]), []
        for i in range(t):
            h = a[:, i] * h + bu[:, i]
            found.append((h * c[:, i].unsqueeze(1)).sum(-1))
        y = (torch.stack(found, 1) + u * self.d) * F.silu(z)
        return self.out(x + self.proj(y))


class LongConvolution(nn.Module):
    """Sequences convolved by as long filters through the Fourier transform, gated (Hyena, S4 style)."""

    def __init__(self, symbols: int = 19, width: int = 12, length: int = 9):
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.inp, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.filter, self.bias = (
            nn.Parameter(torch.randn(width, length) / 3),
            nn.Parameter(torch.randn(width)),
        )
        self.out = nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        t = x.shape[1]
        a, b, v = self.inp(x).transpose(1, 2).chunk(3, 1)
        y = a * v
        spectrum = torch.fft.rfft(y, n=2 * t) * torch.fft.rfft(self.filter, n=2 * t)
        y = torch.fft.irfft(spectrum, n=2 * t)[..., :t] + y * self.bias[:, None]
        return self.out(x + self.proj((y * b).transpose(1, 2)))


class Retention(nn.Module):
    """Attention with a fixed decay a head and group norm in place of softmax (RetNet)."""

    def __init__(self, symbols: int = 19, width: int = 16, heads: int = 4):
        super().__init__()
        self.heads, self.d = heads, width // heads
        self.embed = nn.Embedding(symbols, width)
        self.q, self.k, self.v, self.g = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm, self.proj = nn.GroupNorm(heads, width), nn.Linear(width, width)
        self.register_buffer("decay", torch.log(1 - 2.0 ** (-2 - torch.arange(heads, dtype=torch.float))))
        self.out = nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, t, c = x.shape
        q, k, v = (f(x).view(n, t, self.heads, self.d).transpose(1, 2) for f in (self.q, self.k, self.v))
        apart = torch.arange(t)[:, None] - torch.arange(t)
        mask = torch.where(apart >= 0, torch.exp(self.decay[:, None, None] * apart.clamp(min=0)), 0.0)
        y = (q @ k.transpose(-2, -1) * mask) @ v
        y = self.norm(y.transpose(1, 2).reshape(n * t, c)).view(n, t, c)
        return self.out(x + self.proj(y * F.silu(self.g(x))))
