"""Blocks of random networks that map images to images: `Kind(dice, width)`, which sets its width `out`."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEIGHT, WIDTH, BATCH = 8, 4, 2
PIXELS = HEIGHT * WIDTH
WIDTHS = (3, 5, 6, 7, 9, 10, 11, 12, 13, 17)
ACTIVATIONS = (
    nn.GELU,
    nn.SiLU,
    nn.ReLU,
    nn.Hardswish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.LeakyReLU,
    nn.ELU,
)

Dice = random.Random


# --- parts ------------------------------------------------------------------------------------------------------


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of NCHW, written out."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        x = (x - u) / ((x - u).pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


def norm(dice: Dice, width: int) -> nn.Module:
    kinds: list[Any] = [nn.BatchNorm2d] * 3 + [nn.Identity, LayerNorm2d]
    kinds += [lambda w: nn.InstanceNorm2d(w, affine=True), lambda w: nn.GroupNorm(1, w)]
    kinds += [lambda w, g=g: nn.GroupNorm(g, w) for g in (2, 3) if width % g == 0 and width > g]
    return dice.choice(kinds)(width)


def act(dice: Dice) -> nn.Module:
    return dice.choice(ACTIVATIONS)()


def conv(dice: Dice, c_in: int, c_out: int, kernel: int | None = None, **options) -> nn.Conv2d:
    kernel = kernel or dice.choice((1, 3))
    options.setdefault("bias", dice.random() < 0.5)
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)


def conv_act(dice: Dice, c_in: int, c_out: int, **options) -> nn.Sequential:
    return nn.Sequential(conv(dice, c_in, c_out, **options), norm(dice, c_out), act(dice))


def multiple(dice: Dice, of: int) -> int:
    return of * dice.choice((2, 3, 4, 5))


# --- image blocks -----------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """conv, norm, activation."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.out = dice.choice(WIDTHS)
        self.body = conv_act(dice, width, self.out)

    def forward(self, x):
        return self.body(x)


class Residual(nn.Module):
    """x + f(x), the activation after the sum or not at all."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.out, inner = width, dice.choice(WIDTHS)
        self.body = nn.Sequential(conv_act(dice, width, inner), conv(dice, inner, width), norm(dice, width))
        self.act = dice.choice((nn.Identity(), act(dice)))

    def forward(self, x):
        return self.act(x + self.body(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a projection on the shortcut; += in place."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.out, a, b = dice.choice(WIDTHS), dice.choice(WIDTHS), dice.choice(WIDTHS)
        self.body = nn.Sequential(
            conv_act(dice, width, a, kernel=1), conv_act(dice, a, b), conv(dice, b, self.out)
        )
        self.shortcut = conv(dice, width, self.out, 1)

    def forward(self, x):
        y = self.body(x)
        y += self.shortcut(x)
        return F.relu_(y)


class Dense(nn.Module):
    """Every layer reads all earlier ones."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        growth, n = dice.choice((3, 5, 7)), dice.choice((2, 3))
        self.layers = nn.ModuleList(conv_act(dice, width + growth * i, growth) for i in range(n))
        self.out = width + growth * n

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class Inception(nn.Module):
    """Branches side by side."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        widths = [dice.choice(WIDTHS[:6]) for _ in range(3)]
        self.branches = nn.ModuleList(conv_act(dice, width, w) for w in widths)
        self.out = sum(widths)

    def forward(self, x):
        pool = F.avg_pool2d(x, 3, 1, 1)
        return torch.cat([b(pool if i == 2 else x) for i, b in enumerate(self.branches)], dim=1)


class C2f(nn.Module):
    """Split in halves, the last part worked on again and again, all joined."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        half, n, self.out = dice.choice((3, 5, 7)), dice.choice((1, 2)), dice.choice(WIDTHS)
        self.enter, self.leave = (
            conv_act(dice, width, 2 * half),
            conv_act(dice, (2 + n) * half, self.out, kernel=1),
        )
        self.steps, self.add = (
            nn.ModuleList(conv_act(dice, half, half) for _ in range(n)),
            dice.random() < 0.5,
        )

    def forward(self, x):
        parts = list(self.enter(x).chunk(2, 1))
        for step in self.steps:
            y = step(parts[-1])
            parts.append(parts[-1] + y if self.add else y)
        return self.leave(torch.cat(parts, 1))


class Shuffle(nn.Module):
    """Half passes through, half is worked on; then the channels are shuffled."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.half = dice.choice((3, 5, 6, 7))
        self.out = 2 * self.half
        self.enter, self.right = conv_act(dice, width, self.out), conv_act(dice, self.half, self.half)
        self.repeats = dice.choice((1, 2))

    def forward(self, x):
        x = self.enter(x)
        for _ in range(self.repeats):
            left, right = x.chunk(2, 1)
            x = torch.cat([left, self.right(right)], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w)
        return x


class Grouped(nn.Module):
    """A grouped convolution or two, of different groups."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        g, self.out = dice.choice((2, 3)), dice.choice((6, 12, 18))
        inner = 6 * dice.choice((1, 2, 3))
        self.enter = conv_act(dice, width, inner)
        self.body = conv_act(dice, inner, self.out, groups=g)
        self.more = (
            conv_act(dice, self.out, self.out, groups=dice.choice((2, 3))) if dice.random() < 0.4 else None
        )

    def forward(self, x):
        x = self.body(self.enter(x))
        return x if self.more is None else self.more(x)


class Depthwise(nn.Module):
    """Widen, depthwise with a multiplier, narrow, add."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.out, inner, m = width, dice.choice(WIDTHS), dice.choice((1, 1, 2, 3))
        self.body = nn.Sequential(
            conv_act(dice, width, inner, kernel=1),
            conv_act(dice, inner, inner * m, kernel=3, groups=inner),
            conv(dice, inner * m, width, 1),
        )

    def forward(self, x):
        return x + self.body(x)


class SqueezeExcite(nn.Module):
    """A gate per channel from pooled channels."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.out, inner = width, dice.choice(WIDTHS)
        self.gate = nn.Sequential(nn.Linear(width, inner), act(dice), nn.Linear(inner, width), nn.Sigmoid())

    def forward(self, x):
        return x * self.gate(x.mean((2, 3)))[..., None, None]


class Glu(nn.Module):
    """Halves gate each other, in either order."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.out, self.swap = dice.choice(WIDTHS), dice.random() < 0.5
        self.body = conv(dice, width, 2 * self.out)

    def forward(self, x):
        x = self.body(x)
        if not self.swap:
            return F.glu(x, 1)
        gate, value = x.split(x.shape[1] // 2, 1)
        return F.silu(gate) * value


class UNet(nn.Module):
    """Down, work, up by a transposed convolution or interpolation, joined with what was."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        inner, back = dice.choice(WIDTHS), dice.choice(WIDTHS[:5])
        self.down = conv_act(dice, width, inner)
        self.up = nn.ConvTranspose2d(inner, back, 2, 2) if dice.random() < 0.6 else conv(dice, inner, back)
        self.out = width + back

    def forward(self, x):
        y = self.up(self.down(F.max_pool2d(x, 2)))
        return torch.cat([x, y if y.shape[2] == x.shape[2] else F.interpolate(y, scale_factor=2)], 1)


class GroupedTransposed(nn.Module):
    """A grouped transposed convolution that keeps the size."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        g = dice.choice((1, 2, 3))
        inner, self.out = 6 * dice.choice((1, 2)), 6 * dice.choice((1, 2))
        self.enter = conv_act(dice, width, inner)
        self.body = nn.ConvTranspose2d(inner, self.out, 3, padding=1, groups=g)

    def forward(self, x):
        return F.gelu(self.body(self.enter(x)))


class PixelShuffle(nn.Module):
    """Space to depth, a convolution, depth to space."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.out = dice.choice((3, 5, 7))
        self.body = conv_act(dice, 4 * width, 4 * self.out)

    def forward(self, x):
        return F.pixel_shuffle(self.body(F.pixel_unshuffle(x, 2)), 2)


class PadShortcut(nn.Module):
    """A wider branch, the shortcut padded with zero channels on either side or both."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.before, self.after = dice.randrange(4), dice.randrange(1, 4)
        self.out = width + self.before + self.after
        self.body = conv_act(dice, width, self.out)

    def forward(self, x):
        return self.body(x) + F.pad(x, (0, 0, 0, 0, self.before, self.after))


class SplitCat(nn.Module):
    """Cut at random borders, some parts worked on, joined in a random order; borders do not match what was joined."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        total = dice.choice((9, 11, 12, 13))
        borders = sorted(dice.sample(range(1, total), 2))
        self.sizes = [borders[0], borders[1] - borders[0], total - borders[1]]
        self.order = dice.sample(range(3), 3)
        self.enter, self.add = conv_act(dice, width, total), dice.random() < 0.5
        self.work = nn.ModuleList(
            conv_act(dice, s, s) if dice.random() < 0.5 else nn.Identity() for s in self.sizes
        )
        self.out = total

    def forward(self, x):
        x = self.enter(x)
        parts = [f(p) for f, p in zip(self.work, x.split(self.sizes, 1), strict=True)]
        y = torch.cat([parts[i] for i in self.order], 1)
        return x + y if self.add else y


class Film(nn.Module):
    """Scale and shift per channel, predicted from pooled channels."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.out, self.predict = dice.choice(WIDTHS), None
        self.body, self.predict = conv_act(dice, width, self.out), nn.Linear(width, 2 * self.out)

    def forward(self, x):
        scale, shift = self.predict(x.mean((2, 3))).unsqueeze(-1).unsqueeze(-1).chunk(2, 1)
        return self.body(x) * (1 + scale) + shift


class Permuted(nn.Module):
    """Channels flipped, rolled or reordered by a constant, and sometimes added to themselves."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.out, self.kind, self.add = dice.choice(WIDTHS), dice.randrange(3), dice.random() < 0.3
        self.body = conv_act(dice, width, self.out)
        self.register_buffer("order", torch.tensor(dice.sample(range(self.out), self.out)))

    def forward(self, x):
        x = self.body(x)
        y = (x.flip(1), x.roll(2, 1), x[:, self.order])[self.kind]
        return x + y if self.add else y


class Written(nn.Module):
    """Two branches written into slices of a new tensor, one of them changed in place afterwards."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.cut, self.out = dice.choice((3, 5)), dice.choice((11, 13))
        self.a, self.b = conv_act(dice, width, self.cut), conv_act(dice, width, self.out - self.cut)

    def forward(self, x):
        y = x.new_zeros(x.shape[0], self.out, *x.shape[2:])
        y[:, : self.cut] = self.a(x)
        y[:, self.cut :] = self.b(x)
        y[:, : self.cut].mul_(0.7).tanh_()
        return y


class CalledTwice(nn.Module):
    """One convolution used twice, with a norm of its own for each use."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.out, self.conv = width, conv(dice, width, width)
        self.norms, self.act = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2)), act(dice)

    def forward(self, x):
        for n in self.norms:
            x = self.act(n(self.conv(x)))
        return x


class SelectiveKernel(nn.Module):
    """Two branches stacked and weighted by a softmax over them."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.out = dice.choice(WIDTHS)
        self.a, self.b = conv_act(dice, width, self.out, kernel=3), conv_act(dice, width, self.out, kernel=1)
        self.gate = nn.Linear(self.out, 2 * self.out)

    def forward(self, x):
        both = torch.stack([self.a(x), self.b(x)], 1)
        gate = self.gate(both.sum(1).mean((2, 3))).view(x.shape[0], 2, -1).softmax(1)
        first, second = (both * gate[..., None, None]).unbind(1)
        return first + second


class NonLocal(nn.Module):
    """Attention over pixels with 1x1 convolutions, by bmm."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.out, keys, values = width, dice.choice(WIDTHS), dice.choice(WIDTHS)
        self.q, self.k, self.v = (
            conv(dice, width, keys, 1),
            conv(dice, width, keys, 1),
            conv(dice, width, values, 1),
        )
        self.back = conv(dice, values, width, 1)

    def forward(self, x):
        q, k, v = self.q(x).flatten(2), self.k(x).flatten(2), self.v(x).flatten(2)
        scores = torch.bmm(q.transpose(1, 2), k).mul(0.3).softmax(-1)
        y = torch.einsum("bij,bcj->bci", scores, v).view(x.shape[0], -1, *x.shape[2:])
        return x + self.back(y)


class ConvNext(nn.Module):
    """Depthwise, LayerNorm in NHWC, linears, layer scale, add."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.out, inner = width, dice.choice(WIDTHS)
        self.deep, self.norm = conv(dice, width, width, 3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.gamma = nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x):
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class PixelMixer(nn.Module):
    """A linear over pixels; channels pass through."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.out, self.mix = width, nn.Linear(PIXELS, PIXELS)

    def forward(self, x):
        return x + F.gelu(self.mix(x.flatten(2))).view_as(x)


class Repeated(nn.Module):
    """Channels repeated, block by block or one by one, and multiplied with a branch of that width."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.times, self.one_by_one = dice.choice((2, 3)), dice.random() < 0.5
        inner = dice.choice((3, 5))
        self.out = inner * self.times
        self.enter, self.gate = conv_act(dice, width, inner), conv(dice, width, self.out)

    def forward(self, x):
        y = self.enter(x)
        y = y.repeat_interleave(self.times, 1) if self.one_by_one else y.repeat(1, self.times, 1, 1)
        return y * self.gate(x).sigmoid()


class RawParameters(nn.Module):
    """A 1x1 convolution by einsum with a parameter, a weight in F.conv2d, and a scale."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        inner, self.out = dice.choice(WIDTHS), dice.choice(WIDTHS)
        self.first = nn.Parameter(torch.randn(width, inner))
        self.second = nn.Parameter(torch.randn(self.out, inner, 3, 3))
        self.scale = nn.Parameter(torch.ones(1, self.out, 1, 1))

    def forward(self, x):
        x = torch.einsum("bchw,cd->bdhw", x, self.first)
        return F.conv2d(torch.tanh(x), self.second, padding=1) * self.scale


class Gram(nn.Module):
    """A channel attention: softmax of x x^T applied to x."""

    def __init__(self, dice: Dice, width: int):
        super().__init__()
        self.out, self.body = dice.choice(WIDTHS), None
        self.body = conv_act(dice, width, self.out)

    def forward(self, x):
        x = self.body(x)
        y = x.flatten(2)
        return x + ((y @ y.mT / PIXELS).softmax(-1) @ y).view_as(x)


IMAGE_BLOCKS = (
    Plain, Residual, Bottleneck, Dense, Inception, C2f, Shuffle, Grouped, Depthwise, SqueezeExcite, Glu, UNet,
    GroupedTransposed, PixelShuffle, PadShortcut, SplitCat, Film, Permuted, Written, CalledTwice, SelectiveKernel,
    NonLocal, ConvNext, PixelMixer, Repeated, RawParameters, Gram,
)  # fmt: skip
