"""Attention in every spelling. Heads H = 3 or 4 and widths D differ; removing a head removes a whole head."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_entry import BATCH, CLASSES, TOKENS, entry, tokens


class Block(nn.Module):
    """Residual stream of width 11 around `attend`, then an MLP and a head: what all of these share."""

    def __init__(self, width: int = 11):
        super().__init__()
        self.enter, self.norm, self.last = nn.Linear(5, width), nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.up, self.down = nn.Linear(width, 13), nn.Linear(13, width)

    def forward(self, x):
        x = self.enter(x)
        x = x + self.attend(self.norm(x))
        return self.last(x + self.down(F.gelu(self.up(x))))


STREAM = "enter.weight:0 norm.weight up.weight down.weight last.weight:1 "


@entry(tokens(), STREAM + "qkv.weight proj.weight", keeps="last.weight:0 enter.weight:1")
class PackedView(Block):
    """timm: qkv -> reshape(B, N, 3, H, D) -> permute -> unbind; scale from an attribute."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = 4, 6, 6**-0.5
        self.qkv, self.proj = nn.Linear(11, 72), nn.Linear(24, 11)

    def attend(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


@entry(tokens(12), STREAM.replace("enter.weight:0", "qkv.weight proj.weight"))
class PackedFromShape(nn.Module):
    """The first ViT: head_dim computed as C // heads from x.shape, attention width = stream width."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.scale = 3, (12 // 3) ** -0.5
        self.norm, self.qkv, self.proj = nn.LayerNorm(12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.enter, self.up, self.down, self.last = (
            nn.Linear(12, 12), nn.Linear(12, 13), nn.Linear(13, 12), nn.Linear(12, CLASSES))  # fmt: skip

    def attend(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.proj((scores @ v).transpose(1, 2).reshape(b, n, c))

    def forward(self, x):
        x = self.enter(x)
        x = x + self.attend(self.norm(x))
        return self.last(x + self.down(F.gelu(self.up(x))))


@entry(tokens(), STREAM + "qkv.weight proj.weight")
class PackedChunk(Block):
    """qkv -> chunk(3) -> view(B, N, H, D) each; scaled_dot_product_attention with its default scale."""

    def __init__(self):
        super().__init__()
        self.heads = 4
        self.qkv, self.proj = nn.Linear(11, 84, bias=False), nn.Linear(28, 11)

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@entry(tokens(), STREAM + "q.weight k.weight v.weight proj.weight")
class Separate(Block):
    """q, k, v by three linears; keys and values of different widths; scale written as a number."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(11, 15), nn.Linear(11, 15), nn.Linear(11, 21)
        self.proj = nn.Linear(21, 11)

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = (t.reshape(b, n, 3, -1).permute(0, 2, 1, 3) for t in (self.q(x), self.k(x), self.v(x)))
        out = (q @ k.mT / 2.2).softmax(-1) @ v
        return self.proj(out.permute(0, 2, 1, 3).reshape(b, n, -1))


@entry(tokens(), STREAM + "query.weight key.weight value.weight dense.weight")
class Bert(Block):
    """Hugging Face's old spelling: num_attention_heads, attention_head_size and all_head_size as attributes."""

    def __init__(self):
        super().__init__()
        self.num_attention_heads, self.attention_head_size = 4, 5
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.query, self.key, self.value = (nn.Linear(11, self.all_head_size) for _ in range(3))
        self.dense = nn.Linear(self.all_head_size, 11)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.size()[:-1], self.num_attention_heads, self.attention_head_size).permute(0, 2, 1, 3)

    def attend(self, x):
        q, k, v = (
            self.split_heads(self.query(x)),
            self.split_heads(self.key(x)),
            self.split_heads(self.value(x)),
        )
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(5)
        context = torch.matmul(scores.softmax(-1), v).permute(0, 2, 1, 3).contiguous()
        return self.dense(context.view(*context.size()[:-2], self.all_head_size))


@entry(tokens(), STREAM + "q.weight k.weight v.weight proj.weight")
class HiddenScale(Block):
    """The scale is computed in forward from q.shape[-1]: head width must keep it, or stay."""

    def __init__(self):
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.proj = (
            nn.Linear(11, 24), nn.Linear(11, 24), nn.Linear(11, 24), nn.Linear(24, 11))  # fmt: skip

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, self.heads, 6).transpose(1, 2) for t in (self.q(x), self.k(x), self.v(x)))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


@entry(tokens(12), "up.weight down.weight last.weight:1 attention.in_proj_weight")
class TorchMultihead(nn.Module):
    """nn.MultiheadAttention: heads x width must equal the stream's width."""

    def __init__(self):
        super().__init__()
        self.enter, self.attention = nn.Linear(12, 12), nn.MultiheadAttention(12, 3, batch_first=True)
        self.norm, self.up, self.down, self.last = (
            nn.LayerNorm(12), nn.Linear(12, 17), nn.Linear(17, 12), nn.Linear(12, CLASSES))  # fmt: skip

    def forward(self, x):
        x = self.enter(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.last(x + self.down(F.gelu(self.up(x))))


@entry(tokens(), "enter.weight:0 layers.*.linear1.weight layers.*.linear2.weight last.weight:1")
class TorchEncoder(nn.Module):
    """nn.TransformerEncoder: a fused fast path in eval mode, sequence first, norm first."""

    def __init__(self):
        super().__init__()
        self.enter, self.last = nn.Linear(5, 12), nn.Linear(12, CLASSES)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(12, 3, 13, dropout=0.0, norm_first=first) for first in (True, False)
        )

    def forward(self, x):
        x = self.enter(x.transpose(0, 1))
        for layer in self.layers:
            x = layer(x)
        return self.last(x.transpose(0, 1))


@entry(
    lambda: (torch.randn(BATCH, TOKENS, 5), torch.randn(BATCH, 7, 6)),
    STREAM + "q.weight kv.weight proj.weight",
    keeps="kv.weight:1",
)
class CrossAttention(Block):
    """Queries from one input, packed keys and values from another; sdpa with an explicit scale."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(11, 28), nn.Linear(6, 56), nn.Linear(28, 11)

    def forward(self, x, memory):
        self.norm_memory = memory
        return super().forward(x)

    def attend(self, x):
        b, n, _ = x.shape
        k, v = self.kv(self.norm_memory).view(b, -1, 2, 4, 7).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.q(x).view(b, n, 4, 7).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.4)
        return self.proj(y.transpose(1, 2).reshape(b, n, 28))
