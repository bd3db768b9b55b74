"""Layers with habits of their own: convolutions of every kind, gates and scales, raw parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from versions import NEW_TORCH
from zoo_connections import conv, conv_bn, pooled
from zoo_entry import BATCH, CLASSES, entry, image, tokens, vector

# --- convolutions -----------------------------------------------------------------------------------------------


@entry(image(), "stem.0.weight:0 grouped.0.weight:0 last.weight:1")
class GroupedConvolution(nn.Module):
    """Three groups, 5 -> 7 channels each: every group keeps its own best ones."""

    def __init__(self):
        super().__init__()
        self.stem, self.grouped, self.last = conv_bn(3, 15), conv_bn(15, 21, groups=3), nn.Linear(21, CLASSES)

    def forward(self, x):
        return self.last(pooled(self.grouped(self.stem(x))))


@entry(image(), "enter.0.weight:0 grouped.0.weight:0 leave.weight stem.0.weight:0")
class ResNeXt(nn.Module):
    """1x1, grouped 3x3, 1x1 in a residual branch, then a second grouped convolution with other groups."""

    def __init__(self):
        super().__init__()
        self.stem, self.enter, self.grouped = conv_bn(3, 7), conv_bn(7, 10, 1), conv_bn(10, 10, groups=2)
        self.leave, self.other, self.last = conv(10, 7, 1), conv_bn(7, 15), nn.Linear(15, CLASSES)
        self.regroup = conv_bn(15, 15, groups=5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.leave(self.grouped(self.enter(x)))
        return self.last(pooled(self.regroup(self.other(x))))


@entry(image(), "up.0.weight:0 deep.0.weight:0 down.weight last.weight:1")
class InvertedResidual(nn.Module):
    """MobileNet: widen, depthwise, narrow."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.deep = conv_bn(3, 5), conv_bn(5, 13, 1), conv_bn(13, 13, 5, groups=13)
        self.down, self.last = conv(13, 5, 1), nn.Linear(5, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        return self.last(pooled(F.hardswish(x + self.down(self.deep(self.up(x))))))


@entry(image(), "stem.0.weight:0 deep.0.weight:0 last.weight:1")
class DepthwiseMultiplier(nn.Module):
    """Depthwise with three outputs per channel."""

    def __init__(self):
        super().__init__()
        self.stem, self.deep, self.last = conv_bn(3, 7), conv_bn(7, 21, groups=7), nn.Linear(21, CLASSES)

    def forward(self, x):
        return self.last(pooled(self.deep(self.stem(x))))


@entry(image(), "stem.0.weight:0 up.weight:1 norm.weight deep.weight:0 last.weight:1")
class TransposedConvolution(nn.Module):
    """Transposed: its weight is [in, out]; and a depthwise transposed one."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.norm = conv_bn(3, 5), nn.ConvTranspose2d(5, 7, 3, 2, 1, 1), nn.BatchNorm2d(7)
        self.deep, self.last = nn.ConvTranspose2d(7, 7, 2, 2, groups=7), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        return self.last(F.gelu(self.deep(F.gelu(self.norm(self.up(self.stem(x)))))))


@entry(image(), "stem.0.weight:0 up.weight:0 up.weight:1 last.weight:1")
class GroupedTransposed(nn.Module):
    """Grouped and transposed: two groups, 5 -> 7 each."""

    def __init__(self):
        super().__init__()
        self.stem, self.up = conv_bn(3, 10), nn.ConvTranspose2d(10, 14, 2, 2, groups=2)
        self.last = nn.Conv2d(14, 2, 1)

    def forward(self, x):
        return self.last(F.gelu(self.up(self.stem(x))))


@entry(lambda: (torch.randn(BATCH, 3, 16),), "a.weight:0 b.weight:0 c.weight last.weight:1")
class OneDimensional(nn.Module):
    """Conv1d dilated, BatchNorm1d, ConvTranspose1d, average pooling."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = (
            nn.Conv1d(3, 5, 3, dilation=2, padding=2),
            nn.BatchNorm1d(5),
            nn.Conv1d(5, 7, 3),
        )
        self.c, self.last = nn.ConvTranspose1d(7, 11, 4, 2), nn.Linear(11, CLASSES)

    def forward(self, x):
        x = self.b(F.elu(self.norm(self.a(x))))
        return self.last(F.adaptive_avg_pool1d(F.gelu(self.c(F.avg_pool1d(x, 2))), 1).squeeze(-1))


@entry(
    lambda: (torch.randn(BATCH, 3, 4, 8, 6),),
    "a.weight:0 b.weight last.weight:1 norm.weight" if NEW_TORCH else "b.weight last.weight:1",
)
class ThreeDimensional(nn.Module):
    """Conv3d, BatchNorm3d, factorised into space and time."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv3d(3, 5, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(5)
        self.b, self.last = nn.Conv3d(5, 7, (3, 1, 1), padding=(1, 0, 0)), nn.Linear(7, CLASSES)

    def forward(self, x):
        x = F.max_pool3d(F.leaky_relu(self.norm(self.a(x))), (1, 2, 2))
        return self.last(F.adaptive_avg_pool3d(F.gelu(self.b(x)), 1).flatten(1))


@entry(image(), "stem.weight:0 last.weight")
class PReluAndPools(nn.Module):
    """PReLU with a slope per channel, reflection padding, dropout, pooling of both kinds concatenated."""

    def __init__(self):
        super().__init__()
        self.stem, self.act, self.drop = nn.Conv2d(3, 7, 3), nn.PReLU(7), nn.Dropout2d(0.5)
        self.last = nn.Linear(14, CLASSES)

    def forward(self, x):
        x = self.drop(self.act(self.stem(F.pad(x, (1, 1, 1, 1), mode="reflect"))))
        return self.last(torch.cat([F.adaptive_max_pool2d(x, 1), F.adaptive_avg_pool2d(x, 1)], 1).flatten(1))


# --- gates and scales -------------------------------------------------------------------------------------------


@entry(image(), "stem.0.weight:0 reduce.weight expand.weight last.weight:1")
class SqueezeExcite(nn.Module):
    """SE: a gate per channel, computed from the channels themselves."""

    def __init__(self):
        super().__init__()
        self.stem, self.reduce, self.expand = conv_bn(3, 13), nn.Conv2d(13, 5, 1), nn.Conv2d(5, 13, 1)
        self.last = nn.Linear(13, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        gate = self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return self.last(pooled(x * gate.sigmoid()))


@entry(
    lambda: (torch.randn(BATCH, 3, 8, 6), torch.randn(BATCH, 5)), "stem.weight:0 film.weight:0 last.weight:1"
)
class Film(nn.Module):
    """FiLM: scale and shift predicted from a condition, chunked and broadcast over pixels."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.film = conv(3, 7), nn.BatchNorm2d(7, affine=False), nn.Linear(5, 14)
        self.last = nn.Linear(7, CLASSES)

    def forward(self, x, condition):
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)
        return self.last(pooled(F.gelu(self.norm(self.stem(x)) * (1 + scale) + shift)))


@entry(
    lambda: (torch.randn(BATCH, 10, 5), torch.randn(BATCH, 5)),
    "enter.weight:0 modulation.1.weight:0 last.weight:1",
)
class AdaptiveLayerNorm(nn.Module):
    """DiT: six modulation signals from one linear; LayerNorm without parameters; gated residual."""

    def __init__(self):
        super().__init__()
        self.enter, self.norm = nn.Linear(5, 7), nn.LayerNorm(7, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(5, 21))
        self.up, self.down, self.last = nn.Linear(7, 11), nn.Linear(11, 7), nn.Linear(7, CLASSES)

    def forward(self, x, c):
        x = self.enter(x)
        shift, scale, gate = self.modulation(c).chunk(3, dim=-1)
        y = self.norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        return self.last(x + gate.unsqueeze(1) * self.down(F.gelu(self.up(y))))


@entry(image(), "stem.0.weight:0 gated.weight:0 gated.weight:1 last.weight:1")
class GatedConvolution(nn.Module):
    """F.glu over channels: halves go together."""

    def __init__(self):
        super().__init__()
        self.stem, self.gated, self.last = conv_bn(3, 5), conv(5, 14), nn.Linear(7, CLASSES)

    def forward(self, x):
        return self.last(pooled(F.glu(self.gated(self.stem(x)), dim=1)))


@entry(tokens(), "enter.weight:0 packed.weight up.weight gate.weight down*.weight last.weight:1")
class GatedLinears(nn.Module):
    """SwiGLU twice: packed with chunk in reverse order, and as separate gate and up projections."""

    def __init__(self):
        super().__init__()
        self.enter, self.packed, self.down1 = nn.Linear(5, 7), nn.Linear(7, 22), nn.Linear(11, 7)
        self.gate, self.up = nn.Linear(7, 13, bias=False), nn.Linear(7, 13, bias=False)
        self.down2, self.last = nn.Linear(13, 7), nn.Linear(7, CLASSES)

    def forward(self, x):
        x = self.enter(x)
        value, gate = self.packed(x).chunk(2, dim=-1)
        x = x + self.down1(F.silu(gate) * value)
        return self.last(x + self.down2(F.silu(self.gate(x)) * self.up(x)))


@entry(tokens(), "enter.weight:0 gamma up.weight down.weight shift last.weight:1")
class LayerScale(nn.Module):
    """A learned scale per channel on a residual branch, and a learned token shift of shape [1, 1, C]."""

    def __init__(self):
        super().__init__()
        self.enter, self.up, self.down, self.last = (
            nn.Linear(5, 7), nn.Linear(7, 11), nn.Linear(11, 7), nn.Linear(7, CLASSES))  # fmt: skip
        self.gamma, self.shift = nn.Parameter(1e-6 * torch.ones(7)), nn.Parameter(torch.zeros(1, 1, 7))

    def forward(self, x):
        x = self.enter(x) + self.shift
        return self.last(x + self.gamma * self.down(F.gelu(self.up(x))))


# --- raw parameters ---------------------------------------------------------------------------------------------


@entry(tokens(), "w1:0 b1 w2 w3 w4 w5")
class RawParameters(nn.Module):
    """Parameters in F.linear, @, addmm, einsum and torch.matmul, each with another layout."""

    def __init__(self):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(7))
        self.w2, self.w3 = nn.Parameter(torch.randn(7, 11)), nn.Parameter(torch.randn(13, 11))
        self.b3, self.w4 = nn.Parameter(torch.randn(13)), nn.Parameter(torch.randn(5, 13))
        self.w5 = nn.Parameter(torch.randn(5, CLASSES))

    def forward(self, x):
        x = F.gelu(F.linear(x, self.w1, self.b1))
        x = F.gelu(x @ self.w2)
        n, t, c = x.shape
        x = F.gelu(torch.addmm(self.b3, x.reshape(n * t, c), self.w3.t()).view(n, t, -1))
        x = F.gelu(torch.einsum("ntc,dc->ntd", x, self.w4))
        return torch.matmul(x, self.w5)


@entry(tokens(), "experts_in:2 experts_out:1 enter.weight:0 out.weight:1")
class BatchedExperts(nn.Module):
    """All experts of a dense mixture in one parameter [E, in, out], by bmm and einsum."""

    def __init__(self):
        super().__init__()
        self.enter, self.router, self.out = nn.Linear(5, 7), nn.Linear(5, 3), nn.Linear(7, CLASSES)
        self.experts_in, self.experts_out = (
            nn.Parameter(torch.randn(3, 7, 11)), nn.Parameter(torch.randn(3, 11, 7)))  # fmt: skip

    def forward(self, x):
        weights, x = self.router(x).softmax(-1), self.enter(x)
        n, t, c = x.shape
        hidden = torch.bmm(x.reshape(1, n * t, c).expand(3, -1, -1), self.experts_in)
        y = torch.einsum("enh,ehc->nec", F.gelu(hidden), self.experts_out)
        return self.out((y * weights.reshape(n * t, 3, 1)).sum(1)).view(n, t, -1)


@entry(vector(), "a.weight:0 b.weight:0 both.weight:0 last.weight")
class BilinearLayer(nn.Module):
    """nn.Bilinear: two inputs, one weight [out, in1, in2]."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.both, self.last = (
            nn.Linear(5, 7), nn.Linear(5, 11), nn.Bilinear(7, 11, 13), nn.Linear(13, CLASSES))  # fmt: skip

    def forward(self, x):
        return self.last(F.gelu(self.both(self.a(x), F.gelu(self.b(x)))))
