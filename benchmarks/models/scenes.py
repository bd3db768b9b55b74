"""Networks for scenes, fields and sets of points."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.layers import mlp


class RadianceField(nn.Module):
    """NeRF: encoded points through a deep MLP with a skip, density and colour, composed along the ray."""

    def __init__(self, width: int = 24, bands: int = 3):
        super().__init__()
        self.bands = bands
        size = 3 + 6 * bands
        self.first = nn.ModuleList(
            [
                nn.Linear(size, width),
                nn.Linear(width, width),
                nn.Linear(width + size, width),
                nn.Linear(width, width),
            ]
        )
        self.density, self.feature = nn.Linear(width, 1), nn.Linear(width, width)
        self.view, self.colour = nn.Linear(width + size, 16), nn.Linear(16, 3)

    def encode(self, x: Tensor) -> Tensor:
        scales = 2.0 ** torch.arange(self.bands, dtype=x.dtype)
        angles = (x[..., None, :] * scales[:, None]).flatten(-2)
        return torch.cat((x, angles.sin(), angles.cos()), -1)

    def forward(self, points: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        p, v = self.encode(points), self.encode(views)
        y = p
        for i, layer in enumerate(self.first):
            y = layer(torch.cat((y, p), -1) if i == 2 else y).relu()
        density = self.density(y).squeeze(-1).relu()
        v = v.unsqueeze(1).expand(-1, points.shape[1], -1)
        colour = self.colour(self.view(torch.cat((self.feature(y), v), -1)).relu()).sigmoid()
        alpha = 1 - torch.exp(-density * 0.1)
        through = torch.cumprod(torch.cat((torch.ones_like(alpha[:, :1]), 1 - alpha + 1e-10), 1), 1)[:, :-1]
        weights = alpha * through
        return (weights[..., None] * colour).sum(1), weights.sum(1)


class Sine(nn.Module):
    """A linear layer and a sine of a fixed frequency."""

    def __init__(self, a: int, b: int, omega: float = 3.0):
        super().__init__()
        self.linear, self.omega = nn.Linear(a, b), omega

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * self.linear(x))


class Siren(nn.Module):
    """Coordinates to values through sines."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.net = nn.Sequential(Sine(2, width), Sine(width, width), Sine(width, width), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class HashGrid(nn.Module):
    """Trilinear features from hashed tables of several resolutions, then a small MLP."""

    def __init__(self, levels: int = 3, rows: int = 32, features: int = 4):
        super().__init__()
        self.rows = rows
        self.tables = nn.ModuleList(nn.Embedding(rows, features) for _ in range(levels))
        self.net = mlp(levels * features, 20, 20, 3)
        self.register_buffer("corners", torch.tensor([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)]))
        self.register_buffer("primes", torch.tensor([1, 2654435761, 805459861]))

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for level, table in enumerate(self.tables):
            scaled = x.sigmoid() * 4 * 2**level
            base = scaled.floor()
            offset = scaled - base
            cells = base.long().unsqueeze(1) + self.corners
            hashed = cells * self.primes
            index = (hashed[..., 0] ^ hashed[..., 1] ^ hashed[..., 2]) % self.rows
            share = torch.where(self.corners.bool(), offset.unsqueeze(1), 1 - offset.unsqueeze(1)).prod(-1)
            found.append((table(index) * share.unsqueeze(-1)).sum(1))
        return self.net(torch.cat(found, 1))


class PointNet(nn.Module):
    """A learned transform of the points, shared MLPs, a maximum over points."""

    def __init__(self, classes: int = 5, width: int = 16):
        super().__init__()
        self.align = nn.Sequential(
            nn.Conv1d(3, width, 1), nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, 20, 1)
        )
        self.matrix = nn.Linear(20, 9)
        self.first = nn.Sequential(nn.Conv1d(3, width, 1), nn.BatchNorm1d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv1d(width, 28, 1), nn.BatchNorm1d(28))
        self.part = nn.Sequential(nn.Conv1d(28 + width, 24, 1), nn.ReLU(), nn.Conv1d(24, classes, 1))
        self.out = nn.Sequential(nn.Linear(28, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, classes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n, _, p = x.shape
        matrix = self.matrix(self.align(x).max(2)[0]).view(n, 3, 3) + torch.eye(3).to(x)
        y = self.first(torch.bmm(x.transpose(1, 2), matrix).transpose(1, 2))
        whole = self.second(y).max(2)[0]
        parts = self.part(torch.cat((y, whole[:, :, None].repeat(1, 1, p)), 1))
        return self.out(whole), parts


class PointNetPlus(nn.Module):
    """Farthest-point sampling, neighbourhoods by distance, a maximum in each (PointNet++)."""

    def __init__(self, classes: int = 5):
        super().__init__()
        self.first, self.second = mlp(3, 16, 20), mlp(23, 24, 28)
        self.out = mlp(28, 16, classes)

    @staticmethod
    def gather(x: Tensor, index: Tensor) -> Tensor:
        """Rows `index` of `[n, p, c]`."""
        rows = torch.arange(x.shape[0]).view(-1, *[1] * (index.dim() - 1))
        return x[rows, index]

    def sample(self, x: Tensor, count: int) -> Tensor:
        """Numbers of `count` points, each the farthest from those before it."""
        n, p, _ = x.shape
        distance = torch.full((n, p), 1e9, dtype=x.dtype)
        last, found = torch.zeros(n, dtype=torch.long), []
        for _ in range(count):
            found.append(last)
            distance = torch.minimum(distance, (x - self.gather(x, last[:, None])).square().sum(-1))
            last = distance.argmax(1)
        return torch.stack(found, 1)

    def stage(self, x: Tensor, features: Tensor | None, count: int, near: int, net: nn.Module):
        """Fewer points, each with what its neighbours have."""
        centre = self.gather(x, self.sample(x, count))
        index = torch.cdist(centre, x).topk(near, largest=False).indices
        local = self.gather(x, index) - centre[:, :, None]
        if features is not None:
            local = torch.cat((local, self.gather(features, index)), -1)
        return centre, net(local).amax(2)

    def forward(self, x: Tensor) -> Tensor:
        x, features = self.stage(x, None, 9, 4, self.first)
        _, features = self.stage(x, features, 5, 3, self.second)
        return self.out(features.amax(1))


class SetAttention(nn.Module):
    """Attention from one set to another with a feed-forward step (set transformer)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.width = heads, width
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(y), self.v(y)
        size = self.width // self.heads
        qs, ks, vs = (torch.cat(z.split(size, 2), 0) for z in (q, k, v))
        weights = torch.softmax(qs.bmm(ks.transpose(1, 2)) / math.sqrt(self.width), 2)
        y = torch.cat((qs + weights.bmm(vs)).split(q.size(0), 0), 2)
        return y + F.relu(self.out(y))


class SetTransformer(nn.Module):
    """Induced points, then pooling by learned seeds."""

    def __init__(self, width: int = 16, heads: int = 4, induced: int = 5, classes: int = 3):
        super().__init__()
        self.inp = nn.Linear(6, width)
        self.points = nn.Parameter(torch.randn(1, induced, width))
        self.seeds = nn.Parameter(torch.randn(1, 2, width))
        self.a, self.b, self.pool = (SetAttention(width, heads) for _ in range(3))
        self.out = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        n = x.shape[0]
        h = self.a(self.points.repeat(n, 1, 1), x)
        x = self.b(x, h)
        return self.out(self.pool(self.seeds.repeat(n, 1, 1), x))


class PerceiverIO(nn.Module):
    """Learned latents read the input, think, and are read by output queries."""

    def __init__(self, channels: int = 6, width: int = 20, latents: int = 5, classes: int = 3):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.queries = nn.Parameter(torch.randn(4, 12))
        self.read = nn.MultiheadAttention(width, 2, kdim=channels, vdim=channels, batch_first=True)
        self.think = nn.ModuleList(nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(2))
        self.feed = nn.ModuleList(mlp(width, 28, width, act=nn.GELU) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.write = nn.MultiheadAttention(12, 2, kdim=width, vdim=width, batch_first=True)
        self.out = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        z = self.latents.expand(n, -1, -1)
        z = z + self.read(z, x, x, need_weights=False)[0]
        for i in range(2):
            y = self.norms[2 * i](z)
            z = z + self.think[i](y, y, y, need_weights=False)[0]
            z = z + self.feed[i](self.norms[2 * i + 1](z))
        q = self.queries.expand(n, -1, -1)
        return self.out(q + self.write(q, z, z, need_weights=False)[0])
