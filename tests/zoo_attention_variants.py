"""Attention beyond the plain one: shared key heads, rotary positions, windows, whole models, other mixings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_attention import STREAM, Block
from zoo_connections import conv_bn
from zoo_entry import CLASSES, TOKENS, entry, image, tokens, words


@entry(tokens(), STREAM + "q.weight k.weight v.weight proj.weight")
class GroupedQueryExpand(Block):
    """Llama's repeat_kv: two key heads expanded to six query heads, causal mask as a buffer."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.proj = (
            nn.Linear(11, 30), nn.Linear(11, 10), nn.Linear(11, 10), nn.Linear(30, 11))  # fmt: skip
        self.heads, self.kv_heads, self.head_dim = 6, 2, 5
        self.register_buffer("mask", torch.tril(torch.ones(TOKENS, TOKENS)))

    def repeat(self, x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, self.heads // h, n, d).reshape(b, self.heads, n, d)

    def attend(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.head_dim).transpose(1, 2)
        k = self.repeat(self.k(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2))
        v = self.repeat(self.v(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2))
        scores = (q @ k.transpose(2, 3) * 0.45).masked_fill(self.mask[:n, :n] == 0, float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


@entry(tokens(), STREAM + "q.weight k.weight v.weight proj.weight")
class GroupedQueryInterleave(Block):
    """GQA by repeat_interleave over heads, is_causal sdpa with a scale."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.proj = (
            nn.Linear(11, 30), nn.Linear(11, 10), nn.Linear(11, 10), nn.Linear(30, 11))  # fmt: skip

    def attend(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, -1, 5).transpose(1, 2)
        k = self.k(x).view(b, n, -1, 5).transpose(1, 2).repeat_interleave(3, dim=1)
        v = self.v(x).view(b, n, -1, 5).transpose(1, 2).repeat_interleave(3, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.45)
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


@entry(tokens(), STREAM + "q.weight kv.weight proj.weight")
class MultiQuery(Block):
    """One key and value head for all queries, broadcast; and enable_gqa in sdpa."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(11, 20), nn.Linear(11, 10), nn.Linear(40, 11)

    def attend(self, x):
        q = self.q(x).unflatten(-1, (4, 5)).transpose(1, 2)
        k, v = self.kv(x).split(5, -1)
        by_hand = (q @ k[:, None].transpose(-1, -2) * 0.45).softmax(-1) @ v[:, None]
        fused = F.scaled_dot_product_attention(q, k[:, None], v[:, None], scale=0.45, enable_gqa=True)
        return self.proj(torch.cat([y.transpose(1, 2).flatten(2) for y in (by_hand, fused)], -1))


def rotate_half(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


class Rotary(Block):
    """Separate q, k, v of 3 heads x 10; `rotate` turns queries and keys by position."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.proj = (
            nn.Linear(11, 30), nn.Linear(11, 30), nn.Linear(11, 30), nn.Linear(30, 11))  # fmt: skip

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, 3, -1).transpose(1, 2) for t in (self.q(x), self.k(x), self.v(x)))
        q, k = self.rotate(q), self.rotate(k)
        scores = (q @ k.transpose(-1, -2) * 0.3).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).reshape(b, n, -1))


@entry(tokens(), STREAM + "v.weight q.weight k.weight proj.weight")
class RopeHalves(Rotary):
    """Llama's RoPE: tables from an inv_freq buffer, rotate_half."""

    def __init__(self):
        super().__init__()
        self.register_buffer(
            "inv_freq", 1.0 / 100 ** (torch.arange(0, 10, 2).double() / 10), persistent=False
        )

    def rotate(self, x):
        positions = torch.arange(x.shape[2], dtype=x.dtype)
        angles = torch.outer(positions, self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        return x * angles.cos() + rotate_half(x) * angles.sin()


@entry(tokens(), STREAM + "v.weight q.weight k.weight proj.weight")
class RopeTables(Rotary):
    """RoPE with cos and sin tables computed in __init__ and kept as buffers."""

    def __init__(self):
        super().__init__()
        angles = torch.outer(torch.arange(16).double(), 100 ** -(torch.arange(0, 10, 2).double() / 10))
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos())
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin())

    def rotate(self, x):
        n = x.shape[2]
        return x * self.cos[:n] + rotate_half(x) * self.sin[:n]


@entry(tokens(), STREAM + "v.weight q.weight k.weight proj.weight")
class RopeInterleaved(Rotary):
    """GPT-J's RoPE: even and odd entries are pairs, joined by stack and flatten."""

    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 100 ** (torch.arange(0, 10, 2).double() / 10))

    def rotate(self, x):
        angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * self.inv_freq
        even, odd, cos, sin = x[..., ::2], x[..., 1::2], angles.cos(), angles.sin()
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


@entry(tokens(), STREAM + "v.weight proj.weight")
class RopeComplex(Rotary):
    """Meta's RoPE: pairs as complex numbers, multiplied with a complex table."""

    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 100 ** (torch.arange(0, 10, 2).double() / 10))

    def rotate(self, x):
        angles = torch.outer(torch.arange(x.shape[2], dtype=x.dtype), self.inv_freq)
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.view_as_real(turned).flatten(3)


@entry(image(3, 8, 8), "embed.0.weight:0 qkv.weight proj.weight last.weight:1", keeps="bias_table:0")
class ShiftedWindows(nn.Module):
    """Swin: roll, windows of 4 x 4, relative position bias from a table, roll back."""

    def __init__(self):
        super().__init__()
        self.window, self.heads, self.scale = 4, 3, 0.4
        self.embed, self.qkv, self.proj = conv_bn(3, 7), nn.Linear(7, 45), nn.Linear(15, 7)
        self.bias_table, self.last = nn.Parameter(torch.zeros(49, 3)), nn.Linear(7, CLASSES)
        ij = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        offset = ij[:, :, None] - ij[:, None, :] + 3
        self.register_buffer("index", offset[0] * 7 + offset[1])

    def forward(self, x):
        shortcut = self.embed(x).permute(0, 2, 3, 1)
        x = torch.roll(shortcut, (-2, -2), (1, 2))
        b, h, w, c = x.shape
        m = self.window
        x = x.view(b, h // m, m, w // m, m, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, m * m, c)
        q, k, v = self.qkv(x).reshape(x.shape[0], m * m, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.bias_table[self.index.view(-1)].view(m * m, m * m, -1).permute(2, 0, 1)
        y = ((q * self.scale) @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(-1, m * m, self.proj.in_features))
        y = y.view(b, h // m, w // m, m, m, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, c)
        return self.last((shortcut + torch.roll(y, (2, 2), (1, 2))).mean((1, 2)))


@entry(
    image(3, 8, 6), "patch.weight:0 token:2 position:2 qkv.weight proj.weight norm.weight last.weight:1",
    keeps="position:1 patch.weight:1",
)  # fmt: skip
class VisionTransformer(nn.Module):
    """Patches by a strided convolution, class token by expand and cat, position embedding, cls output."""

    def __init__(self):
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 11, 2, 2), nn.Parameter(torch.zeros(1, 1, 11))
        self.position, self.norm = nn.Parameter(torch.zeros(1, 13, 11)), nn.LayerNorm(11)
        self.qkv, self.proj, self.last = nn.Linear(11, 45), nn.Linear(15, 11), nn.Linear(11, CLASSES)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + self.position
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, 3, 5).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.4).transpose(1, 2).reshape(b, n, 15)
        return self.last((x + self.proj(y))[:, 0])


@entry(words(), "word.weight:1 position.weight:1 c_attn.weight c_proj.weight mlp.*.weight",
       keeps="word.weight:0 position.weight:0")  # fmt: skip
class Gpt(nn.Module):
    """nanoGPT: learned positions by arange, split(n_embd), causal buffer, tied head, n_embd = heads x width."""

    def __init__(self):
        super().__init__()
        self.n_embd, self.n_head = 12, 3
        self.word, self.position = nn.Embedding(17, 12), nn.Embedding(23, 12)
        self.norm, self.c_attn, self.c_proj = (
            nn.LayerNorm(12, bias=False),
            nn.Linear(12, 36),
            nn.Linear(12, 12),
        )
        self.mlp = nn.Sequential(nn.Linear(12, 19), nn.GELU(), nn.Linear(19, 12))
        self.register_buffer("bias", torch.tril(torch.ones(23, 23)).view(1, 1, 23, 23))
        self.head = nn.Linear(12, 17, bias=False)
        self.word.weight = self.head.weight

    def forward(self, ids):
        b, t = ids.shape
        x = self.word(ids) + self.position(torch.arange(0, t))
        q, k, v = self.c_attn(self.norm(x)).split(self.n_embd, dim=2)
        q, k, v = (y.view(b, t, self.n_head, self.n_embd // self.n_head).transpose(1, 2) for y in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * 0.5
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf")).softmax(-1)
        x = x + self.c_proj((att @ v).transpose(1, 2).contiguous().view(b, t, self.n_embd))
        return self.head(x + self.mlp(x))


@entry(tokens(), STREAM + "qkv.weight proj.weight")
class QueryKeyNorm(Block):
    """LayerNorm of each head's queries and keys: one weight of size D ties all heads."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(11, 63), nn.Linear(21, 11)
        self.q_norm, self.k_norm = nn.LayerNorm(7), nn.RMSNorm(7, eps=1e-6)

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 3, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = (self.q_norm(q) @ self.k_norm(k).transpose(-1, -2) * 0.4).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


@entry(tokens(), STREAM + "qkv.weight proj.weight")
class CrossCovariance(Block):
    """XCiT: attention between channels; softmax over a pruned dim, a temperature per head."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.temperature = (
            nn.Linear(11, 84),
            nn.Linear(28, 11),
            nn.Parameter(torch.ones(4, 1, 1)),
        )

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, -1).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        y = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(-1) @ v
        return self.proj(y.permute(0, 3, 1, 2).reshape(b, n, -1))


@entry(tokens(), STREAM + "q.weight k.weight v.weight proj.weight")
class LinearAttention(Block):
    """elu + 1 features: f(0) is not 0, and keys are summed over channels."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.proj = (
            nn.Linear(11, 14), nn.Linear(11, 14), nn.Linear(11, 26), nn.Linear(26, 11))  # fmt: skip

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, 2, -1).transpose(1, 2) for t in (self.q(x), self.k(x), self.v(x)))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        memory = torch.einsum("bhnd,bhne->bhde", k, v)
        norm = 1 / torch.einsum("bhnd,bhd->bhn", q, k.sum(2))
        return self.proj(torch.einsum("bhnd,bhde,bhn->bhne", q, memory, norm).transpose(1, 2).flatten(2))


@entry(tokens(), STREAM + "qkv.weight proj.weight")
class TalkingHeads(Block):
    """A linear between heads before and after the softmax: heads are channels of it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(11, 75), nn.Linear(25, 11)
        self.before, self.after = nn.Linear(5, 5), nn.Linear(5, 5)

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 5, 5).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.before((q @ k.transpose(-1, -2) * 0.4).permute(0, 2, 3, 1)).softmax(-2)
        scores = self.after(scores).permute(0, 3, 1, 2)
        return self.proj((scores @ v).transpose(1, 2).reshape(b, n, -1))


@entry(tokens(), STREAM + "q.weight k.weight v.weight proj.weight")
class FoldedHeads(Block):
    """fairseq: heads folded into the batch, view(B * H, N, D), bmm, and back."""

    def __init__(self):
        super().__init__()
        self.heads, self.width = 3, 6
        self.q, self.k, self.v, self.proj = (
            nn.Linear(11, 18), nn.Linear(11, 18), nn.Linear(11, 18), nn.Linear(18, 11))  # fmt: skip

    def fold(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        return x.view(b, n, self.heads, self.width).transpose(1, 2).reshape(b * self.heads, n, self.width)

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = self.fold(self.q(x)), self.fold(self.k(x)), self.fold(self.v(x))
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(0.4).softmax(-1), v)
        return self.proj(
            y.view(b, self.heads, n, self.width).transpose(1, 2).reshape(b, n, self.heads * self.width)
        )


@entry(tokens(), STREAM + "q.weight k_down.weight k_up.weight proj.weight")
class LatentAttention(Block):
    """DeepSeek's MLA: keys and values from one low-rank latent with its norm, a rotary part shared by heads."""

    def __init__(self):
        super().__init__()
        self.q, self.k_down, self.k_norm = nn.Linear(11, 24), nn.Linear(11, 9), nn.RMSNorm(7, eps=1e-6)
        self.k_up, self.proj = nn.Linear(7, 33), nn.Linear(15, 11)

    def attend(self, x):
        b, n, _ = x.shape
        q_plain, q_turn = self.q(x).view(b, n, 3, 8).transpose(1, 2).split([6, 2], dim=-1)
        latent, k_turn = self.k_down(x).split([7, 2], dim=-1)
        k_plain, v = self.k_up(self.k_norm(latent)).view(b, n, 3, 11).transpose(1, 2).split([6, 5], dim=-1)
        q, k = (
            torch.cat([q_plain, q_turn], -1),
            torch.cat([k_plain, k_turn[:, None].expand(-1, 3, -1, -1)], -1),
        )
        y = F.scaled_dot_product_attention(q, k, v, scale=0.35)
        return self.proj(y.transpose(1, 2).reshape(b, n, 15))


@entry(tokens(), "enter.weight:0 keys.weight:0 last.weight:1", keeps="queries:1")
class LearnedQueries(nn.Module):
    """Perceiver, DETR: learned queries are tokens, not channels; a softmax over them and over keys."""

    def __init__(self):
        super().__init__()
        self.enter, self.keys, self.queries = (
            nn.Linear(5, 11),
            nn.Linear(11, 7),
            nn.Parameter(torch.zeros(1, 6, 7)),
        )
        self.last = nn.Linear(11, CLASSES)

    def forward(self, x):
        x = self.enter(x)
        scores = self.queries.expand(x.shape[0], -1, -1) @ self.keys(x).transpose(1, 2)
        return self.last(F.gelu((scores * 0.4).softmax(-1) @ x))
