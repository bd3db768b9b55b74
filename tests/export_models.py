"""Four small networks of the kinds that people export; torch alone. `Literals` is of the benchmark."""

from __future__ import annotations

import torch
from literals import Literals
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, WORDS, LENGTH = 3, 29, 10


class ConvNet(nn.Module):
    """A residual block with batch norms, a grouped convolution, a gate, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 14, 3, padding=1), nn.BatchNorm2d(14)
        self.grouped, self.back = nn.Conv2d(14, 22, 3, padding=1, groups=2), nn.Conv2d(22, 14, 1)
        self.inner = nn.BatchNorm2d(22)
        self.gate_in, self.gate_out = nn.Conv2d(14, 5, 1), nn.Conv2d(5, 14, 1)
        self.head = nn.Linear(14, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(image)))
        x = x + self.back(F.relu(self.inner(self.grouped(x))))
        x = x * torch.sigmoid(self.gate_out(F.relu(self.gate_in(x.mean((2, 3), keepdim=True)))))
        return self.head(F.max_pool2d(x, 2).mean((2, 3)))


class Vit(nn.Module):
    """Patches by a strided convolution, a class token, positions, two blocks with packed q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 22, 2, stride=2)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 22)), nn.Parameter(torch.randn(1, 13, 22))
        self.blocks = nn.ModuleList(VitBlock() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(22), nn.Linear(22, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class VitBlock(nn.Module):
    """timm's spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 2, 7
        self.first, self.second = nn.LayerNorm(22), nn.LayerNorm(22)
        self.qkv, self.out = nn.Linear(22, 42), nn.Linear(14, 22)
        self.rise, self.fall = nn.Linear(22, 34), nn.Linear(34, 22)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(self.first(x)).reshape(b, n, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.4)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, self.heads * self.width))
        return x + self.fall(F.gelu(self.rise(self.second(x))))


class Bert(nn.Module):
    """Word, position and type embeddings, a mask, norms behind the sums, a head tied to the words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.types = (
            nn.Embedding(WORDS, 22), nn.Embedding(LENGTH, 22), nn.Embedding(2, 22))  # fmt: skip
        self.num_attention_heads, self.attention_head_size = 3, 5
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.query, self.key, self.value = (nn.Linear(22, 15) for _ in range(3))
        self.dense, self.rise, self.fall = nn.Linear(15, 22), nn.Linear(22, 34), nn.Linear(34, 22)
        self.first, self.second, self.third = nn.LayerNorm(22), nn.LayerNorm(22), nn.LayerNorm(22)
        self.decoder = nn.Linear(22, WORDS)
        self.decoder.weight = self.words.weight

    def split(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.num_attention_heads, self.attention_head_size)
        return x.view(shape).permute(0, 2, 1, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.first(self.words(input_ids) + self.places(steps) + self.types(torch.zeros_like(input_ids)))
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        hidden = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -10000.0
        y = ((q @ k.transpose(-1, -2)) * 0.4 + hidden).softmax(-1) @ v
        y = y.permute(0, 2, 1, 3).contiguous()
        x = self.second(x + self.dense(y.view(*y.shape[:-2], self.all_head_size)))
        x = self.third(x + self.fall(F.gelu(self.rise(x))))
        logits = self.decoder(x)
        return {"logits": logits, "best": logits.amax(2)}


class Llama(nn.Module):
    """Grouped queries, rotary positions from a buffer, a causal mask, RMS norms, a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 22), nn.Linear(22, WORDS, bias=False)
        self.queries, self.keys, self.width = 6, 2, 10
        self.q_proj = nn.Linear(22, 60, bias=False)
        self.k_proj, self.v_proj = nn.Linear(22, 20, bias=False), nn.Linear(22, 20, bias=False)
        self.o_proj = nn.Linear(60, 22, bias=False)
        self.gate, self.up, self.down = (
            nn.Linear(22, 34, bias=False), nn.Linear(22, 34, bias=False), nn.Linear(34, 22, bias=False))  # fmt: skip
        self.norms = nn.ModuleList(nn.RMSNorm(22, eps=1e-6) for _ in range(3))
        self.register_buffer("inv_freq", 100.0 ** -(torch.arange(0, 10, 2) / 10), persistent=False)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        one, two = x.chunk(2, -1)
        return x * cos + torch.cat([-two, one], -1) * sin

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        b, n, _ = x.shape
        steps = torch.arange(n, device=x.device, dtype=self.inv_freq.dtype)
        angles = torch.outer(steps, self.inv_freq)
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        y = self.norms[0](x)
        q = self.turned(self.q_proj(y).view(b, n, -1, self.width).transpose(1, 2), cos, sin)
        k = self.turned(self.k_proj(y).view(b, n, -1, self.width).transpose(1, 2), cos, sin)
        v = self.v_proj(y).view(b, n, -1, self.width).transpose(1, 2)
        repeat = self.queries // self.keys
        k, v = (
            t[:, :, None].expand(b, self.keys, repeat, n, self.width).reshape(b, self.queries, n, self.width)
            for t in (k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
        x = x + self.o_proj(y.transpose(1, 2).reshape(b, n, -1))
        y = self.norms[1](x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.norms[2](x))


def image() -> tuple[Tensor]:
    return (torch.randn(2, 3, 8, 6),)


def sentence() -> tuple[Tensor]:
    return (torch.randint(0, WORDS, (2, LENGTH)),)


def masked_sentence() -> dict[str, Tensor]:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 7:] = 0
    return {"input_ids": sentence()[0], "attention_mask": mask}


MODELS = {
    "conv": (ConvNet, image),
    "vit": (Vit, image),
    "bert": (Bert, masked_sentence),
    "llama": (Llama, sentence),
    "literals": (Literals, image),
}
