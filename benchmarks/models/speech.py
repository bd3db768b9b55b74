"""Networks for speech and sound."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.layers import mlp


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
