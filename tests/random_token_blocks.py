"""Blocks of random networks that map tokens to tokens: `Kind(dice, width)`, of the same width after as before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from random_image_blocks import PIXELS, WIDTHS, Dice, act
from torch import Tensor, nn
from zoo_attention_variants import rotate_half

# --- token blocks -----------------------------------------------------------------------------------------------


def token_norm(dice: Dice, width: int) -> nn.Module:
    return dice.choice((nn.LayerNorm(width), nn.RMSNorm(width, eps=1e-6), nn.LayerNorm(width, bias=False)))


class Mlp(nn.Module):
    """Up, activation, down, add."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        inner = dice.choice(WIDTHS)
        self.body = nn.Sequential(
            token_norm(dice, width), nn.Linear(width, inner), act(dice), nn.Linear(inner, width)
        )

    def forward(self, x):
        return x + self.body(x)


class SwiGlu(nn.Module):
    """Gate and value packed or separate."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        inner, self.packed = dice.choice(WIDTHS), dice.random() < 0.5
        self.norm, self.up, self.down = (
            token_norm(dice, width),
            nn.Linear(width, 2 * inner),
            nn.Linear(inner, width),
        )
        self.gate, self.value = nn.Linear(width, inner), nn.Linear(width, inner)
        for unused in ("gate", "value") if self.packed else ("up",):
            delattr(self, unused)

    def forward(self, x):
        y = self.norm(x)
        gate, value = self.up(y).chunk(2, -1) if self.packed else (self.gate(y), self.value(y))
        return x + self.down(F.silu(gate) * value)


class Mixer(nn.Module):
    """A linear over tokens."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.norm, self.mix = token_norm(dice, width), nn.Linear(PIXELS, PIXELS)

    def forward(self, x):
        return x + self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)


class Recurrent(nn.Module):
    """An LSTM or GRU over the first tokens, added to all."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        hidden, kind = dice.choice(WIDTHS), dice.choice((nn.LSTM, nn.GRU))
        both = dice.random() < 0.5
        self.rnn = kind(width, hidden, batch_first=True, bidirectional=both)
        self.back = nn.Linear(hidden * (1 + both), width)

    def forward(self, x):
        return x + self.back(self.rnn(x[:, :5])[0]).mean(1, keepdim=True)


class Attention(nn.Module):
    """Attention in a random spelling: how q, k, v are made, how heads are made, how scores become outputs."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.heads, self.width = dice.choice((2, 3, 4)), dice.choice((4, 6, 10))
        self.make = dice.choice(
            ("packed view", "packed chunk", "separate", "expand", "interleave", "one key head")
        )
        self.mix = dice.choice(("matmul", "sdpa", "einsum", "bmm"))
        self.turn = dice.choice(("none", "none", "halves", "interleaved", "norm"))
        self.kv_heads = {"expand": 2, "interleave": 2, "one key head": 1}.get(self.make, self.heads)
        self.heads *= 2 if self.make in ("expand", "interleave") else 1
        inner, kv = self.heads * self.width, self.kv_heads * self.width
        self.norm, self.proj = token_norm(dice, width), nn.Linear(inner, width)
        if self.make.startswith("packed"):
            self.qkv = nn.Linear(width, 3 * inner)
        else:
            self.q, self.k, self.v = nn.Linear(width, inner), nn.Linear(width, kv), nn.Linear(width, kv)
        if self.turn == "norm":
            self.q_norm, self.k_norm = nn.RMSNorm(self.width, eps=1e-6), nn.RMSNorm(self.width, eps=1e-6)
        elif self.turn != "none":
            self.register_buffer("inv_freq", 0.1 ** (torch.arange(0, self.width, 2) / self.width))

    def heads_of(self, x: Tensor, heads: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], heads, self.width).transpose(1, 2)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        b, n, _ = x.shape
        if self.make == "packed view":
            return self.qkv(x).reshape(b, n, 3, self.heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)
        if self.make == "packed chunk":
            return tuple(self.heads_of(t, self.heads) for t in self.qkv(x).chunk(3, -1))
        q = self.heads_of(self.q(x), self.heads)
        k, v = self.heads_of(self.k(x), self.kv_heads), self.heads_of(self.v(x), self.kv_heads)
        if self.make == "expand":
            shape = (b, self.kv_heads, self.heads // self.kv_heads, n, self.width)
            k, v = (t[:, :, None].expand(shape).reshape(b, self.heads, n, self.width) for t in (k, v))
        elif self.make == "interleave":
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        elif self.make == "one key head":
            k, v = (t.expand(-1, self.heads, -1, -1) for t in (k, v))
        return q, k, v

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[2], dtype=x.dtype), self.inv_freq)
        if self.turn == "halves":
            angles = torch.cat((angles, angles), -1)
            return x * angles.cos() + rotate_half(x) * angles.sin()
        even, odd, cos, sin = x[..., ::2], x[..., 1::2], angles.cos(), angles.sin()
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.mix == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, scale=0.3)
        if self.mix == "matmul":
            return (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v
        if self.mix == "einsum":
            return torch.einsum(
                "bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) * 0.3).softmax(-1), v
            )
        b, h, n, d = q.shape
        q, k, v = (t.reshape(b * h, n, d) for t in (q, k, v))
        return torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(0.3).softmax(-1), v).view(b, h, n, d)

    def forward(self, x):
        q, k, v = self.project(self.norm(x))
        if self.turn == "norm":
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.turn != "none":
            q, k = self.turned(q), self.turned(k)
        return x + self.proj(self.mixed(q, k, v).transpose(1, 2).reshape(*x.shape[:2], -1))

    def extra_repr(self) -> str:
        return f"{self.make}, {self.mix}, {self.turn}, {self.heads} x {self.width}"


class CrossCovariance(nn.Module):
    """XCiT: attention between the channels of each head."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.heads, inner = dice.choice((2, 3)), 5
        self.norm = token_norm(dice, width)
        self.qkv, self.proj = nn.Linear(width, 3 * self.heads * inner), nn.Linear(self.heads * inner, width)
        self.temperature = nn.Parameter(torch.ones(self.heads, 1, 1))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature
        return x + self.proj((scores.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(b, n, -1))


TOKEN_BLOCKS = (Mlp, SwiGlu, Mixer, Recurrent, Attention, Attention, Attention, CrossCovariance)
