"""Networks in plain torch as users write them: speech, series, scenes, sets, recommenders, games, generators."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*sizes: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of `sizes` with an activation between them."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


# --- speech and sound --------------------------------------------------------------------------------------------


class RelativeAttention(nn.Module):
    """Self-attention with sinusoidal relative positions and two learned biases a head."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.d = heads, width // heads
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.position, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.u, self.w = nn.Parameter(torch.zeros(heads, self.d)), nn.Parameter(torch.zeros(heads, self.d))
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, self.heads, self.d)
        k = self.k(x).view(n, t, self.heads, self.d).transpose(1, 2)
        v = self.v(x).view(n, t, self.heads, self.d).transpose(1, 2)
        steps = torch.arange(t - 1, -t, -1, dtype=x.dtype)
        rates = torch.exp(torch.arange(0, self.width, 2, dtype=x.dtype) * (-math.log(1e4) / self.width))
        table = torch.cat((torch.sin(steps[:, None] * rates), torch.cos(steps[:, None] * rates)), 1)
        p = self.position(table).view(2 * t - 1, self.heads, self.d).permute(1, 2, 0)
        content = (q + self.u).transpose(1, 2) @ k.transpose(-2, -1)
        place = (q + self.w).transpose(1, 2) @ p
        place = (
            F.pad(place, (1, 0)).view(n, self.heads, 2 * t, t)[:, :, 1:].reshape(n, self.heads, t, 2 * t - 1)
        )
        weights = ((content + place[..., :t]) / math.sqrt(self.d)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, t, self.heads * self.d))


class Conformer(nn.Module):
    """Subsampling convolutions, then blocks of half feed-forward, attention, convolution, half feed-forward."""

    def __init__(self, mels: int = 20, width: int = 24, heads: int = 4, blocks: int = 2, classes: int = 11):
        super().__init__()
        self.sub = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU()
        )
        self.inp = nn.Linear(width * (mels // 4), width)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            self.blocks.append(
                nn.ModuleDict(
                    {
                        "ff1": nn.Sequential(nn.LayerNorm(width), mlp(width, 4 * width, width, act=nn.SiLU)),
                        "norm": nn.LayerNorm(width),
                        "att": RelativeAttention(width, heads),
                        "cnorm": nn.LayerNorm(width),
                        "conv": nn.Sequential(
                            nn.Conv1d(width, 2 * width, 1),
                            nn.GLU(1),
                            nn.Conv1d(width, width, 7, padding=3, groups=width),
                            nn.BatchNorm1d(width),
                            nn.SiLU(),
                            nn.Conv1d(width, width, 1),
                        ),
                        "ff2": nn.Sequential(nn.LayerNorm(width), mlp(width, 4 * width, width, act=nn.SiLU)),
                        "last": nn.LayerNorm(width),
                    }
                )
            )
        self.out = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.sub(x.unsqueeze(1))
        n, c, t, f = x.shape
        x = self.inp(x.permute(0, 2, 1, 3).reshape(n, t, c * f))
        for b in self.blocks:
            x = x + 0.5 * b["ff1"](x)
            x = x + b["att"](b["norm"](x))
            x = x + b["conv"](b["cnorm"](x).transpose(1, 2)).transpose(1, 2)
            x = b["last"](x + 0.5 * b["ff2"](x))
        return self.out(x).log_softmax(-1)


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, residual and skip sums."""

    def __init__(self, levels: int = 17, width: int = 12, skip: int = 20, layers: int = 4):
        super().__init__()
        self.embed = nn.Embedding(levels, width)
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(layers))
        self.res = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.skips = nn.ModuleList(nn.Conv1d(width, skip, 1) for _ in range(layers))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(skip, skip, 1), nn.ReLU(), nn.Conv1d(skip, levels, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(1, 2)
        total = 0
        for i, (gate, res, skip) in enumerate(zip(self.gates, self.res, self.skips, strict=True)):
            a, b = gate(F.pad(x, (2**i, 0))).chunk(2, 1)
            y = torch.tanh(a) * torch.sigmoid(b)
            total = total + skip(y)
            x = x + res(y)
        return self.end(total)


class Tacotron(nn.Module):
    """Text encoder, location-sensitive attention in a loop over frames, a convolutional post-net."""

    def __init__(self, symbols: int = 19, width: int = 16, mels: int = 10, frames: int = 5):
        super().__init__()
        self.frames, self.mels, self.width = frames, mels, width
        self.embed = nn.Embedding(symbols, width)
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv1d(width, width, 5, padding=2), nn.BatchNorm1d(width), nn.ReLU())
            for _ in range(2)
        )
        self.lstm = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
        self.prenet = mlp(mels, 12, 12)
        self.attend = nn.LSTMCell(12 + width, 20)
        self.query, self.memory = nn.Linear(20, 14, bias=False), nn.Linear(width, 14, bias=False)
        self.place = nn.Conv1d(2, 6, 5, padding=2, bias=False)
        self.place_dense, self.energy = nn.Linear(6, 14, bias=False), nn.Linear(14, 1)
        self.decode = nn.LSTMCell(20 + width, 20)
        self.mel, self.stop = nn.Linear(20 + width, mels), nn.Linear(20 + width, 1)
        self.post = nn.Sequential(
            nn.Conv1d(mels, 18, 5, padding=2),
            nn.BatchNorm1d(18),
            nn.Tanh(),
            nn.Conv1d(18, mels, 5, padding=2),
        )

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embed(text).transpose(1, 2)
        for conv in self.convs:
            x = conv(x)
        memory, _ = self.lstm(x.transpose(1, 2))
        keys = self.memory(memory)
        n, t, _ = memory.shape
        frame = memory.new_zeros(n, self.mels)
        h1 = c1 = h2 = c2 = memory.new_zeros(n, 20)
        context = memory.new_zeros(n, memory.shape[2])
        weights = total = memory.new_zeros(n, t)
        mels, stops = [], []
        for _ in range(self.frames):
            h1, c1 = self.attend(torch.cat((self.prenet(frame), context), 1), (h1, c1))
            place = self.place_dense(self.place(torch.stack((weights, total), 1)).transpose(1, 2))
            energy = self.energy(torch.tanh(self.query(h1).unsqueeze(1) + keys + place)).squeeze(2)
            weights = energy.softmax(1)
            total = total + weights
            context = torch.bmm(weights.unsqueeze(1), memory).squeeze(1)
            h2, c2 = self.decode(torch.cat((h1, context), 1), (h2, c2))
            both = torch.cat((h2, context), 1)
            frame = self.mel(both)
            mels.append(frame)
            stops.append(self.stop(both))
        mel = torch.stack(mels, 2)
        return mel, mel + self.post(mel), torch.cat(stops, 1)


class Wav2Letter(nn.Module):
    """One-dimensional convolutions over features, no recurrence."""

    def __init__(self, mels: int = 20, classes: int = 11):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(mels, 24, 11, 2, 5),
            nn.Hardtanh(0, 20),
            nn.Conv1d(24, 28, 7, padding=3),
            nn.Hardtanh(0, 20),
            nn.Conv1d(28, 32, 1),
            nn.Hardtanh(0, 20),
            nn.Conv1d(32, classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.transpose(1, 2)).log_softmax(1)


class DeepSpeech2(nn.Module):
    """Two-dimensional convolutions, bidirectional GRUs whose directions are summed, batch norm over features."""

    def __init__(self, mels: int = 20, width: int = 16, classes: int = 11):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 8, (11, 5), (2, 2), (5, 2)), nn.BatchNorm2d(8), nn.Hardtanh(0, 20),
            nn.Conv2d(8, 8, (7, 5), (2, 1), (3, 2)), nn.BatchNorm2d(8), nn.Hardtanh(0, 20),
        )  # fmt: skip
        features = 8 * (mels // 4)
        self.rnns = nn.ModuleList(
            nn.GRU(features if i == 0 else width, width, bidirectional=True) for i in range(2)
        )
        self.norms = nn.ModuleList([nn.Identity(), nn.BatchNorm1d(width)])
        self.out = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, classes, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.transpose(1, 2).unsqueeze(1))
        n, c, f, t = x.shape
        x = x.view(n, c * f, t).permute(2, 0, 1)
        for i, (rnn, norm) in enumerate(zip(self.rnns, self.norms, strict=True)):
            if i:
                x = norm(x.reshape(t * n, -1)).view(t, n, -1)
            x, _ = rnn(x)
            x = x.view(t, n, 2, -1).sum(2)
        return self.out(x.reshape(t * n, -1)).view(t, n, -1).transpose(0, 1)


class Transducer(nn.Module):
    """RNN-T: an encoder, a prediction network and a joiner that broadcasts one against the other."""

    def __init__(self, mels: int = 20, width: int = 16, symbols: int = 11):
        super().__init__()
        self.encoder = nn.LSTM(mels, width, 2, batch_first=True)
        self.embed, self.predictor = nn.Embedding(symbols, 12), nn.GRU(12, 14, batch_first=True)
        self.left, self.right = nn.Linear(width, 18), nn.Linear(14, 18)
        self.join = nn.Linear(18, symbols + 1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        a = self.left(self.encoder(x)[0])
        b = self.right(self.predictor(F.pad(self.embed(text), (0, 0, 1, 0)))[0])
        return self.join(torch.tanh(a.unsqueeze(2) + b.unsqueeze(1))).log_softmax(-1)


class TasNet(nn.Module):
    """Separation: learned filters, a masking network over them, an overlap-add decoder."""

    def __init__(self, filters: int = 24, width: int = 16, speakers: int = 2):
        super().__init__()
        self.speakers = speakers
        self.encoder = nn.Conv1d(1, filters, 16, 8, bias=False)
        self.norm, self.inp = nn.GroupNorm(1, filters), nn.Conv1d(filters, width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, 32, 1), nn.PReLU(), nn.GroupNorm(1, 32),
                nn.Conv1d(32, 32, 3, padding=2**i, dilation=2**i, groups=32), nn.PReLU(), nn.GroupNorm(1, 32),
                nn.Conv1d(32, width, 1),
            )
            for i in range(2)
        )  # fmt: skip
        self.mask = nn.Conv1d(width, filters * speakers, 1)
        self.decoder = nn.ConvTranspose1d(filters, 1, 16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.encoder(x.unsqueeze(1)).relu()
        y = self.inp(self.norm(mixed))
        for block in self.blocks:
            y = y + block(y)
        n, c, t = mixed.shape
        masks = self.mask(y).view(n, self.speakers, c, t).sigmoid()
        separate = mixed.unsqueeze(1) * masks
        return self.decoder(separate.view(n * self.speakers, c, t)).view(n, self.speakers, -1)


class KeywordSpotter(nn.Module):
    """A short-time Fourier transform in forward, then depthwise separable convolutions."""

    def __init__(self, classes: int = 7):
        super().__init__()
        self.register_buffer("window", torch.hann_window(32))
        self.net = nn.Sequential(
            nn.Conv2d(1, 12, 5, 2, 2), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 20, 1), nn.BatchNorm2d(20), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.out = nn.Linear(20, classes)

    def forward(self, x: Tensor) -> Tensor:
        power = torch.stft(x, 32, 16, window=self.window, return_complex=True).abs().square()
        return self.out(self.net((power + 1e-5).log().unsqueeze(1)).flatten(1))


class TimeDelay(nn.Module):
    """x-vector style speaker embedding: dilated frames, statistics pooling (mean and deviation), an embedding."""

    def __init__(self, mels: int = 20, width: int = 24, speakers: int = 9):
        super().__init__()
        self.frames = nn.Sequential(
            nn.Conv1d(mels, width, 5, padding=2), nn.ReLU(), nn.BatchNorm1d(width),
            nn.Conv1d(width, width, 3, dilation=2, padding=2), nn.ReLU(), nn.BatchNorm1d(width),
            nn.Conv1d(width, 36, 1), nn.ReLU(),
        )  # fmt: skip
        self.embed = nn.Linear(72, 20)
        self.out = nn.Linear(20, speakers, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.frames(x.transpose(1, 2))
        e = F.normalize(self.embed(torch.cat((y.mean(2), y.std(2)), 1)), dim=1)
        return e @ F.normalize(self.out.weight, dim=1).t()


# --- series ------------------------------------------------------------------------------------------------------


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


# --- scenes, fields, point sets ------------------------------------------------------------------------------------


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


# --- recommenders, tables ------------------------------------------------------------------------------------------


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


# --- mixers, experts, linear attention ----------------------------------------------------------------------------


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


# --- control, games ------------------------------------------------------------------------------------------------


class ActorCritic(nn.Module):
    """A shared trunk with the mean and log deviation of an action and a value."""

    def __init__(self, state: int = 9, actions: int = 3):
        super().__init__()
        self.trunk = mlp(state, 24, 20, act=nn.Tanh)
        self.actor, self.critic = nn.Linear(20, actions), mlp(20, 14, 1, act=nn.Tanh)
        self.log_std = nn.Parameter(torch.zeros(actions))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.trunk(x).tanh()
        mean = self.actor(y)
        return mean, self.log_std.exp().expand_as(mean), self.critic(y).squeeze(-1)


class DuelingQ(nn.Module):
    """Frames to action values: a state value plus advantages less their mean."""

    def __init__(self, actions: int = 5):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(4, 12, 8, 4),
            nn.ReLU(),
            nn.Conv2d(12, 16, 4, 2),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3),
            nn.ReLU(),
        )
        self.value, self.advantage = mlp(16 * 3 * 5, 24, 1), mlp(16 * 3 * 5, 20, actions)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x / 4).view(x.size(0), -1)
        advantage = self.advantage(y)
        return self.value(y) + advantage - advantage.mean(1, keepdim=True)


class DistributionalQ(nn.Module):
    """Action values as distributions over atoms (Rainbow), with noisy linear layers."""

    def __init__(self, state: int = 9, actions: int = 3, atoms: int = 7, width: int = 20):
        super().__init__()
        self.actions, self.atoms = actions, atoms
        self.inp = nn.Linear(state, width)
        self.mu, self.sigma = (
            nn.Parameter(torch.randn(24, width) / 4),
            nn.Parameter(torch.full((24, width), 0.1)),
        )
        self.register_buffer("noise", torch.randn(24, width))
        self.out = nn.Linear(24, actions * atoms)
        self.register_buffer("support", torch.linspace(-1, 1, atoms))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inp(x).relu()
        y = F.linear(y, self.mu + self.sigma * self.noise).relu()
        p = self.out(y).view(-1, self.actions, self.atoms).softmax(-1)
        return (p * self.support).sum(-1)


class GameTower(nn.Module):
    """AlphaZero: a residual tower with a policy and a value head."""

    def __init__(self, planes: int = 5, width: int = 16, blocks: int = 2, board: int = 5):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(planes, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
            )
            for _ in range(blocks)
        )  # fmt: skip
        self.policy = nn.Sequential(
            nn.Conv2d(width, 2, 1),
            nn.BatchNorm2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * board**2, board**2 + 1),
        )
        self.value = nn.Sequential(
            nn.Conv2d(width, 1, 1), nn.BatchNorm2d(1), nn.ReLU(), nn.Flatten(),
            nn.Linear(board**2, 20), nn.ReLU(), nn.Linear(20, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.policy(x), self.value(x)


class WorldModel(nn.Module):
    """A latent state with stochastic classes rolled forward by a GRU cell (Dreamer)."""

    def __init__(self, state: int = 9, action: int = 3, width: int = 16, groups: int = 3, classes: int = 4):
        super().__init__()
        self.groups, self.classes, self.width = groups, classes, width
        self.encode = mlp(state, 20, 14)
        self.cell = nn.GRUCell(18, width)
        self.mix = nn.Sequential(nn.Linear(groups * classes + action, 18), nn.ELU())
        self.prior, self.post = mlp(width, 20, groups * classes), mlp(width + 14, 20, groups * classes)
        self.decode, self.reward = (
            mlp(width + groups * classes, 22, state),
            mlp(width + groups * classes, 10, 1),
        )

    def forward(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, t, _ = states.shape
        h, z = states.new_zeros(n, self.width), states.new_zeros(n, self.groups * self.classes)
        found, priors = [], []
        for i in range(t):
            h = self.cell(self.mix(torch.cat((z, actions[:, i]), 1)), h)
            priors.append(self.prior(h))
            logits = self.post(torch.cat((h, self.encode(states[:, i])), 1))
            z = logits.view(n, self.groups, self.classes).softmax(-1).flatten(1)
            found.append(torch.cat((h, z), 1))
        y = torch.stack(found, 1)
        return self.decode(y), self.reward(y), torch.stack(priors, 1)


# --- images: super-resolution, text, pairs, capsules, flows, generators ---------------------------------------------


class EDSR(nn.Module):
    """Residual blocks without norms, a global skip, pixel shuffle."""

    def __init__(self, width: int = 16, blocks: int = 3, scale: int = 2):
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
            )
            for _ in range(blocks)
        )
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.Sequential(nn.Conv2d(width, width * scale**2, 3, padding=1), nn.PixelShuffle(scale))
        self.tail = nn.Conv2d(width, 3, 3, padding=1)
        self.register_buffer("mean", torch.tensor([0.45, 0.44, 0.40]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x - self.mean)
        y = x
        for block in self.body:
            y = y + 0.1 * block(y)
        return self.tail(self.up(x + self.last(y))) + self.mean


class ESPCN(nn.Module):
    """Convolutions at low resolution and one pixel shuffle at the end."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 20, 5, padding=2), nn.Tanh(), nn.Conv2d(20, 12, 3, padding=1), nn.Tanh(),
            nn.Conv2d(12, 9, 3, padding=1), nn.PixelShuffle(3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).sigmoid()


class ChannelAttentionSR(nn.Module):
    """Dense blocks with channel attention, nearest upsampling (RCAN, ESRGAN)."""

    def __init__(self, width: int = 12, growth: int = 8):
        super().__init__()
        self.head, self.tail = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.dense = nn.ModuleList(nn.Conv2d(width + i * growth, growth, 3, padding=1) for i in range(3))
        self.join = nn.Conv2d(width + 3 * growth, width, 1)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 6, 1), nn.ReLU(), nn.Conv2d(6, width, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        parts = [x]
        for conv in self.dense:
            parts.append(F.leaky_relu(conv(torch.cat(parts, 1)), 0.2))
        y = self.join(torch.cat(parts, 1))
        y = x + 0.2 * y * self.squeeze(y)
        return self.tail(F.interpolate(y, scale_factor=2, mode="nearest"))


class CRNN(nn.Module):
    """Text lines: convolutions squeeze the height away, two recurrent layers read the width."""

    def __init__(self, classes: int = 13):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d((2, 1)),
            nn.Conv2d(16, 20, (4, 3), padding=(0, 1)), nn.ReLU(),
        )  # fmt: skip
        self.rnn = nn.LSTM(20, 18, 2, bidirectional=True)
        self.out = nn.Linear(36, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).squeeze(2).permute(2, 0, 1)
        return self.out(self.rnn(x)[0]).log_softmax(2)


def _small_encoder(out: int, width: int = 16) -> nn.Sequential:
    """Three strided convolutions and a projection."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, out),
    )  # fmt: skip


class Siamese(nn.Module):
    """One encoder for both images; their absolute difference is judged."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = _small_encoder(20), mlp(20, 12, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head((self.encoder(a) - self.encoder(b)).abs()).sigmoid()


class Triplet(nn.Module):
    """Normalised embeddings of three images and the distances between them."""

    def __init__(self):
        super().__init__()
        self.encoder, self.project = _small_encoder(20), nn.Linear(20, 12)

    def forward(self, a: Tensor, p: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        a, p, n = (F.normalize(self.project(self.encoder(x).relu()), dim=1) for x in (a, p, n))
        return F.pairwise_distance(a, p), F.pairwise_distance(a, n)


class Contrastive(nn.Module):
    """Images and texts in one space (CLIP style): all-pairs scores."""

    def __init__(self, width: int = 14):
        super().__init__()
        self.image = _small_encoder(width)
        self.embed = nn.Embedding(19, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.text = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.project = nn.Parameter(torch.randn(16, width) / 4)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        a = self.image(images)
        y = self.text(self.embed(text))
        b = y[torch.arange(y.shape[0]), text.argmax(-1)] @ self.project
        a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
        return self.scale.exp() * a @ b.t()


class CapsuleNet(nn.Module):
    """Primary capsules, routing by agreement in three rounds, lengths as scores, a decoder."""

    def __init__(self, classes: int = 4, primary: int = 6, d_in: int = 4, d_out: int = 8):
        super().__init__()
        self.d_in = d_in
        self.conv, self.primary = nn.Conv2d(1, 16, 5, 2), nn.Conv2d(16, primary * d_in, 3, 2)
        self.weight = nn.Parameter(torch.randn(classes, primary * 3 * 4, d_out, d_in) / 4)
        self.decoder = mlp(classes * d_out, 24, 12)

    @staticmethod
    def squash(x: Tensor) -> Tensor:
        """Shorten vectors to below one."""
        square = x.square().sum(-1, keepdim=True)
        return square / (1 + square) * x / (square + 1e-8).sqrt()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.primary(self.conv(x).relu())
        n, c, h, w = x.shape
        u = self.squash(
            x.view(n, c // self.d_in, self.d_in, h, w).permute(0, 1, 3, 4, 2).reshape(n, -1, self.d_in)
        )
        votes = torch.einsum("jiod,nid->njio", self.weight, u)
        logits = torch.zeros(n, *self.weight.shape[:2]).to(x)
        for _ in range(3):
            v = self.squash((logits.softmax(1).unsqueeze(-1) * votes).sum(2))
            logits = logits + (votes * v.unsqueeze(2)).sum(-1)
        return v.norm(dim=-1), self.decoder(v.flatten(1))


class ODENet(nn.Module):
    """A field integrated with a fixed number of Runge-Kutta steps; time joins as a channel."""

    def __init__(self, width: int = 14, steps: int = 3):
        super().__init__()
        self.steps = steps
        self.inp, self.out = nn.Linear(6, width), nn.Linear(width, 5)
        self.first, self.second = nn.Linear(width + 1, 20), nn.Linear(20, width)

    def field(self, t: float, x: Tensor) -> Tensor:
        """The derivative at time `t`."""
        time = torch.full_like(x[:, :1], t)
        return self.second(torch.tanh(self.first(torch.cat((x, time), 1))))

    def forward(self, x: Tensor) -> Tensor:
        x, h = self.inp(x), 1 / self.steps
        for i in range(self.steps):
            t = i * h
            a = self.field(t, x)
            b = self.field(t + h / 2, x + h / 2 * a)
            c = self.field(t + h / 2, x + h / 2 * b)
            d = self.field(t + h, x + h * c)
            x = x + h / 6 * (a + 2 * b + 2 * c + d)
        return self.out(x)


class DEQ(nn.Module):
    """A layer iterated until it settles (data-dependent number of steps)."""

    def __init__(self, width: int = 14):
        super().__init__()
        self.inp, self.out = nn.Linear(6, width), nn.Linear(width, 5)
        self.first, self.second, self.norm = nn.Linear(width, 20), nn.Linear(20, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        z = torch.zeros_like(x)
        for _ in range(6):
            new = self.norm(x + 0.1 * self.second(self.first(z).relu()))
            z = new
        return self.out(z)


class VAE(nn.Module):
    """Convolutional encoder to mean and log variance, a sample, a transposed decoder."""

    def __init__(self, latent: int = 6):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU(), nn.Flatten()
        )
        self.mean, self.log_var = nn.Linear(16 * 4 * 6, latent), nn.Linear(16 * 4 * 6, latent)
        self.inp = nn.Linear(latent, 16 * 4 * 6)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(16, 12, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(12, 1, 4, 2, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.encoder(x)
        mean, log_var = self.mean(y), self.log_var(y)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp() if self.training else mean
        return self.decoder(self.inp(z).relu().view(-1, 16, 4, 6)), mean, log_var


class VectorQuantised(nn.Module):
    """VQ-VAE: nearest codes by distance, straight-through gradients, commitment loss as an output."""

    def __init__(self, codes: int = 11, width: int = 12, code: int = 8):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, code, 1),
        )
        self.codes = nn.Embedding(codes, code)
        self.decoder = nn.Sequential(
            nn.Conv2d(code, width, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(width, 1, 4, 2, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.encoder(x).permute(0, 2, 3, 1).contiguous()
        flat = z.view(-1, z.shape[-1])
        w = self.codes.weight
        distance = flat.square().sum(1, keepdim=True) + w.square().sum(1) - 2 * flat @ w.t()
        index = distance.argmin(1)
        q = self.codes(index).view(z.shape)
        loss = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(q.detach(), z)
        q = z + (q - z).detach()
        return self.decoder(q.permute(0, 3, 1, 2)), loss, index


class DCGAN(nn.Module):
    """Generator and discriminator in one module: noise to image to score."""

    def __init__(self, latent: int = 10, width: int = 8):
        super().__init__()
        w = width
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(latent, 4 * w, 4, 1, 0, bias=False), nn.BatchNorm2d(4 * w), nn.ReLU(),
            nn.ConvTranspose2d(4 * w, 2 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * w), nn.ReLU(),
            nn.ConvTranspose2d(2 * w, 3, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, w, 4, 2, 1, bias=False), nn.LeakyReLU(0.2),
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(w, 2 * w, 4, 2, 1)), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * w, 1, 4),
        )  # fmt: skip

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        image = self.generator(z)
        return image, self.discriminator(image).view(-1)


class Modulated(nn.Module):
    """A convolution whose weights are scaled by a style a sample, run as one grouped convolution over the batch."""

    def __init__(self, a: int, b: int, style: int, k: int = 3, demodulate: bool = True, up: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, b, a, k, k) / 6)
        self.style, self.bias = nn.Linear(style, a), nn.Parameter(torch.zeros(b))
        self.demodulate, self.up, self.k, self.out = demodulate, up, k, b

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
        n, c, h, wd = x.shape
        weight = self.weight * self.style(w).view(n, 1, c, 1, 1)
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        y = F.conv2d(
            x.reshape(1, n * c, h, wd),
            weight.view(n * self.out, c, self.k, self.k),
            None,
            1,
            self.k // 2,
            1,
            n,
        )
        return y.view(n, self.out, y.shape[2], y.shape[3]) + self.bias.view(1, -1, 1, 1)


class StyleGenerator(nn.Module):
    """A mapping network, a learned constant, modulated convolutions and summed images (StyleGAN2)."""

    def __init__(self, latent: int = 10, width: int = 14):
        super().__init__()
        self.mapping = mlp(latent, 16, 16, act=nn.SELU)
        self.constant = nn.Parameter(torch.randn(1, width, 4, 6))
        self.convs = nn.ModuleList(
            [Modulated(width, width, 16), Modulated(width, 10, 16, up=True), Modulated(10, 10, 16)]
        )
        self.images = nn.ModuleList([Modulated(width, 3, 16, 1, False), Modulated(10, 3, 16, 1, False)])

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8))
        x = self.constant.repeat(z.shape[0], 1, 1, 1)
        x = F.leaky_relu(self.convs[0](x, w), 0.2)
        image = self.images[0](x, w)
        x = F.leaky_relu(self.convs[1](x, w), 0.2)
        x = F.leaky_relu(self.convs[2](x, w), 0.2)
        return F.interpolate(image, scale_factor=2) + self.images[1](x, w)


class AdaIN(nn.Module):
    """Style transfer: content features take the mean and deviation of the style's."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(3, width, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.ReflectionPad2d(1), nn.Conv2d(width, 20, 3), nn.ReLU(),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(20, width, 3), nn.ReLU(), nn.Upsample(scale_factor=2),
            nn.ReflectionPad2d(1), nn.Conv2d(width, 3, 3),
        )  # fmt: skip

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        a, b = self.encoder(content), self.encoder(style)
        stats = [(x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True) + 1e-5) for x in (a, b)]
        return self.decoder((a - stats[0][0]) / stats[0][1] * stats[1][1] + stats[1][0])


class CycleGenerator(nn.Module):
    """Instance norms, reflection pads, residual blocks, transposed convolutions."""

    def __init__(self, width: int = 8):
        super().__init__()
        w = width
        self.inp = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(3, w, 7), nn.InstanceNorm2d(w), nn.ReLU(),
            nn.Conv2d(w, 2 * w, 3, 2, 1), nn.InstanceNorm2d(2 * w), nn.ReLU(),
        )  # fmt: skip
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReflectionPad2d(1), nn.Conv2d(2 * w, 2 * w, 3), nn.InstanceNorm2d(2 * w, affine=True), nn.ReLU(),
                nn.ReflectionPad2d(1), nn.Conv2d(2 * w, 2 * w, 3), nn.InstanceNorm2d(2 * w),
            )
            for _ in range(2)
        )  # fmt: skip
        self.out = nn.Sequential(
            nn.ConvTranspose2d(2 * w, w, 3, 2, 1, 1),
            nn.InstanceNorm2d(w),
            nn.ReLU(),
            nn.Conv2d(w, 3, 7, padding=3),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


class RealNVP(nn.Module):
    """Affine couplings with alternating checker masks; the log determinant is an output."""

    def __init__(self, size: int = 6, width: int = 20, layers: int = 3):
        super().__init__()
        self.register_buffer(
            "masks", torch.stack([(torch.arange(size) + i) % 2 for i in range(layers)]).float()
        )
        self.scale = nn.ModuleList(mlp(size, width, size) for _ in range(layers))
        self.shift = nn.ModuleList(mlp(size, width, size) for _ in range(layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.shape[0])
        for mask, scale, shift in zip(self.masks, self.scale, self.shift, strict=True):
            kept = x * mask
            s = torch.tanh(scale(kept)) * (1 - mask)
            x = kept + (1 - mask) * (x * s.exp() + shift(kept))
            log_det = log_det + s.sum(1)
        return x, log_det


class Glow(nn.Module):
    """Squeeze, activation norm, an invertible 1 x 1 convolution, couplings of channel halves."""

    def __init__(self, channels: int = 3, width: int = 20, steps: int = 2):
        super().__init__()
        c = 4 * channels
        self.log_scale, self.shift = (nn.Parameter(torch.zeros(steps, c)) for _ in range(2))
        self.mix = nn.ParameterList(nn.Parameter(torch.linalg.qr(torch.randn(c, c))[0]) for _ in range(steps))
        self.nets = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c // 2, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(),
                nn.Conv2d(width, c, 3, padding=1),
            )
            for _ in range(steps)
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)
        log_det = x.new_zeros(n)
        for i, (mix, net) in enumerate(zip(self.mix, self.nets, strict=True)):
            x = (x + self.shift[i][:, None, None]) * self.log_scale[i].exp()[:, None, None]
            x = F.conv2d(x, mix[:, :, None, None])
            log_det = log_det + (self.log_scale[i].sum() + torch.linalg.slogdet(mix)[1]) * (h * w // 4)
            a, b = x.chunk(2, 1)
            s, t = net(a).chunk(2, 1)
            s = torch.sigmoid(s + 2)
            x = torch.cat((a, (b + t) * s), 1)
            log_det = log_det + s.log().flatten(1).sum(1)
        return x, log_det


class MaskedAutoregressive(nn.Module):
    """MADE: masks on the weights keep each output from seeing later inputs."""

    def __init__(self, size: int = 6, width: int = 20):
        super().__init__()
        self.first, self.second = nn.Linear(size, width), nn.Linear(width, size)
        order, hidden = torch.arange(size), torch.arange(width) % (size - 1)
        self.register_buffer("a", (hidden[:, None] >= order).float())
        self.register_buffer("b", (order[:, None] > hidden).float())

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.first.weight * self.a, self.first.bias).relu()
        return F.linear(y, self.second.weight * self.b, self.second.bias)


class EnergyHopfield(nn.Module):
    """Denoising by attention to stored patterns (modern Hopfield)."""

    def __init__(self, size: int = 12, patterns: int = 7, width: int = 16):
        super().__init__()
        self.patterns = nn.Parameter(torch.randn(patterns, size))
        self.q, self.k, self.v = nn.Linear(size, width), nn.Linear(size, width), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            weights = (self.q(x) @ self.k(self.patterns).t() * 0.5).softmax(-1)
            x = weights @ self.v(self.patterns)
        return x


class KANLayer(nn.Module):
    """A learned spline a connection: radial bases of every input, one coefficient an output, input and basis."""

    def __init__(self, a: int, b: int, bases: int = 5):
        super().__init__()
        self.register_buffer("grid", torch.linspace(-2, 2, bases))
        self.weight = nn.Parameter(torch.randn(b, a, bases) / 5)
        self.base, self.norm = nn.Linear(a, b), nn.LayerNorm(a)

    def forward(self, x: Tensor) -> Tensor:
        bases = torch.exp(-((self.norm(x).unsqueeze(-1) - self.grid) ** 2))
        return torch.einsum("nab,oab->no", bases, self.weight) + self.base(F.silu(x))


class KAN(nn.Module):
    """Three spline layers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(KANLayer(6, 14), KANLayer(14, 12), KANLayer(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class FourierOperator(nn.Module):
    """Fourier neural operator: complex weights on the lowest frequencies beside a pointwise path."""

    def __init__(self, width: int = 10, modes: int = 4, layers: int = 2):
        super().__init__()
        self.modes = modes
        self.inp, self.out = nn.Linear(3, width), mlp(width, 18, 1, act=nn.GELU)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(2, width, width, modes, modes, dtype=torch.cfloat) / width)
            for _ in range(layers)
        )
        self.skips = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x).permute(0, 3, 1, 2)
        m = self.modes
        for weight, skip in zip(self.weights, self.skips, strict=True):
            spectrum = torch.fft.rfft2(x)
            out = torch.zeros_like(spectrum)
            weight = weight.to(spectrum.dtype)
            out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :m, :m], weight[0])
            out[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, -m:, :m], weight[1])
            x = F.gelu(torch.fft.irfft2(out, s=x.shape[-2:]) + skip(x))
        return self.out(x.permute(0, 2, 3, 1))


class DeepONet(nn.Module):
    """A branch for the function, a trunk for the place, a dot product."""

    def __init__(self, sensors: int = 9, width: int = 16):
        super().__init__()
        self.branch, self.trunk = mlp(sensors, 20, width, act=nn.Tanh), mlp(2, 20, width, act=nn.Tanh)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("bp,bqp->bq", self.branch(u), self.trunk(y)) + self.bias


class Pix2Struct(nn.Module):
    """Patches by unfold, tokens, and images again by fold."""

    def __init__(self, width: int = 20, patch: int = 4):
        super().__init__()
        self.patch = patch
        self.inp, self.out = nn.Linear(3 * patch**2, width), nn.Linear(width, 3 * patch**2)
        self.mix = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), mlp(width, 32, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.inp(F.unfold(x, self.patch, stride=self.patch).transpose(1, 2))
        for mix in self.mix:
            tokens = tokens + mix(tokens)
        return F.fold(self.out(tokens).transpose(1, 2), x.shape[-2:], self.patch, stride=self.patch)


class MaskedImageModel(nn.Module):
    """Masked autoencoder: random patches are dropped by argsort, mask tokens restored by gather."""

    def __init__(self, width: int = 20, small: int = 12, patches: int = 24, keep: int = 8):
        super().__init__()
        self.keep = keep
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(torch.randn(1, patches, width))
        layer = nn.TransformerEncoderLayer(width, 4, 28, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.narrow, self.token = nn.Linear(width, small), nn.Parameter(torch.randn(1, 1, small))
        self.place = nn.Parameter(torch.randn(1, patches, small))
        layer = nn.TransformerEncoderLayer(small, 2, 20, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(small, 48)

    def forward(self, x: Tensor, dice: Tensor) -> Tensor:
        y = self.embed(x).flatten(2).transpose(1, 2) + self.position
        n, t, c = y.shape
        order = dice.argsort(1)
        back = order.argsort(1)
        y = self.encoder(torch.gather(y, 1, order[:, : self.keep, None].expand(-1, -1, c)))
        y = self.narrow(y)
        y = torch.cat((y, self.token.expand(n, t - self.keep, -1)), 1)
        y = torch.gather(y, 1, back[:, :, None].expand(-1, -1, y.shape[2]))
        return self.out(self.decoder(y + self.place))


class PointerNetwork(nn.Module):
    """Pointer network: an LSTM reads points, attention scores over them choose the next one, greedily."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.inp, self.encoder = nn.Linear(2, width), nn.LSTM(width, width, batch_first=True)
        self.cell = nn.LSTMCell(width, width)
        self.a, self.b, self.v = nn.Linear(width, 14), nn.Linear(width, 14), nn.Linear(14, 1)
        self.start = nn.Parameter(torch.randn(1, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.inp(x)
        memory, (h, c) = self.encoder(y)
        h, c, step = h[0], c[0], self.start.expand(x.shape[0], -1)
        used = torch.zeros(x.shape[:2], dtype=torch.bool)
        scores, chosen = [], []
        for _ in range(x.shape[1]):
            h, c = self.cell(step, (h, c))
            energy = self.v(torch.tanh(self.a(memory) + self.b(h)[:, None])).squeeze(-1)
            energy = energy.masked_fill(used, -1e4)
            index = energy.argmax(1)
            used = used.scatter(1, index[:, None], True)
            step = y[torch.arange(x.shape[0]), index]
            scores.append(energy)
            chosen.append(index)
        return torch.stack(scores, 1), torch.stack(chosen, 1)
