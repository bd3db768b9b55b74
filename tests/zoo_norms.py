"""Norms as modules, as functions and written by hand; statistics over channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from zoo_connections import conv, conv_bn, pooled
from zoo_entry import CLASSES, entry, image, tokens, vector


class AroundNorm(nn.Module):
    """conv -> norm -> activation -> residual conv -> head, for norms of NCHW."""

    def __init__(self, width: int):
        super().__init__()
        self.a, self.b, self.head = conv(3, width), conv(width, 11), nn.Linear(11, CLASSES)

    def forward(self, x):
        return self.head(pooled(F.gelu(self.b(F.silu(self.normalise(self.a(x)))))))


@entry(image(), "a.weight:0 b.weight:0 b.weight:1 scale shift")
class FunctionalBatchNorm(AroundNorm):
    """F.batch_norm with parameters and buffers of one's own."""

    def __init__(self):
        super().__init__(7)
        self.scale, self.shift = nn.Parameter(torch.ones(7)), nn.Parameter(torch.zeros(7))
        self.register_buffer("running_mean", torch.zeros(7))
        self.register_buffer("running_var", torch.ones(7))

    def normalise(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.scale, self.shift, False, 0.1, 1e-5)


@entry(image(), "a.weight:0 b.weight:1 scale")
class HandWrittenBatchNorm(AroundNorm):
    """FrozenBatchNorm2d: scale and shift folded from buffers by hand."""

    def __init__(self):
        super().__init__(7)
        self.scale, self.shift = nn.Parameter(torch.ones(7)), nn.Parameter(torch.zeros(7))
        self.register_buffer("running_mean", torch.zeros(7))
        self.register_buffer("running_var", torch.ones(7))

    def normalise(self, x):
        scale = self.scale.view(1, -1, 1, 1) * (self.running_var.view(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.shift.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


@entry(image(), "a.weight:0 b.weight:1", train=True)
class BatchNormWithoutParameters(AroundNorm):
    """Neither affine nor running statistics: the batch's own, in train mode."""

    def __init__(self):
        super().__init__(7)
        self.norm = nn.BatchNorm2d(7, affine=False, track_running_stats=False)

    def normalise(self, x):
        return self.norm(x)


@entry(image(), "a.weight:0 norm.weight norm.bias b.weight:1")
class ChannelsLastLayerNorm(AroundNorm):
    """ConvNeXt's LayerNorm over channels: permute, nn.LayerNorm, permute back."""

    def __init__(self):
        super().__init__(7)
        self.norm = nn.LayerNorm(7)

    def normalise(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@entry(image(), "a.weight:0 scale b.weight:1")
class FunctionalLayerNorm(AroundNorm):
    """F.layer_norm with the shape taken from the tensor, scale only."""

    def __init__(self):
        super().__init__(7)
        self.scale = nn.Parameter(torch.ones(7))

    def normalise(self, x):
        x = x.movedim(1, -1)
        return F.layer_norm(x, x.shape[-1:], self.scale, None, 1e-6).movedim(-1, 1)


@entry(image(), "a.weight:0 scale shift b.weight:1")
class HandWrittenLayerNorm(AroundNorm):
    """LayerNorm2d written out: mean and variance over dim 1."""

    def __init__(self):
        super().__init__(7)
        self.scale, self.shift = nn.Parameter(torch.ones(7)), nn.Parameter(torch.zeros(7))

    def normalise(self, x):
        centred = x - x.mean(1, keepdim=True)
        x = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.scale[:, None, None] * x + self.shift[:, None, None]


@entry(image(), "a.weight:0 norm.weight b.weight:1")
class GroupNorm(AroundNorm):
    """Three groups of five: equal counts in each group, not equal positions."""

    def __init__(self):
        super().__init__(15)
        self.norm = nn.GroupNorm(3, 15)

    def normalise(self, x):
        return self.norm(x)


@entry(image(), "a.weight:0 norm.weight b.weight:1")
class OneGroupNorm(AroundNorm):
    """GroupNorm(1, C): statistics over all channels."""

    def __init__(self):
        super().__init__(7)
        self.norm = nn.GroupNorm(1, 7)

    def normalise(self, x):
        return self.norm(x)


@entry(image(), "a.weight:0 scale b.weight:1")
class FunctionalGroupNorm(AroundNorm):
    """F.group_norm with a literal number of groups."""

    def __init__(self):
        super().__init__(10)
        self.scale, self.shift = nn.Parameter(torch.ones(10)), nn.Parameter(torch.zeros(10))

    def normalise(self, x):
        return F.group_norm(x, 2, self.scale, self.shift)


@entry(image(), "a.weight:0 norm.weight b.weight:1")
class GroupNormPerChannel(AroundNorm):
    """GroupNorm(C, C): each channel by itself; the number of groups is a number of channels."""

    def __init__(self):
        super().__init__(7)
        self.norm = nn.GroupNorm(7, 7)

    def normalise(self, x):
        return self.norm(x)


@entry(image(), "a.weight:0 scale b.weight:1")
class FunctionalGroupNormPerChannel(AroundNorm):
    """The same with that number as a literal in one call, and computed from the channels in another."""

    def __init__(self):
        super().__init__(7)
        self.scale, self.shift = nn.Parameter(torch.ones(7)), nn.Parameter(torch.zeros(7))

    def normalise(self, x):
        return F.group_norm(F.group_norm(x, 7, self.scale, self.shift), x.shape[1])


@entry(image(), "a.weight:0 scale b.weight:1")
class HandWrittenGroupNorm(AroundNorm):
    """Group norm by view(B, G, C // G, H, W), var and mean."""

    def __init__(self):
        super().__init__(15)
        self.groups, self.scale, self.shift = 3, nn.Parameter(torch.ones(15)), nn.Parameter(torch.zeros(15))

    def normalise(self, x):
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w)
        var, mean = torch.var_mean(x, dim=(2, 3, 4), keepdim=True, unbiased=False)
        x = ((x - mean) / (var + 1e-5).sqrt()).view(n, c, h, w)
        return x * self.scale.view(1, c, 1, 1) + self.shift.view(1, c, 1, 1)


@entry(image(), "a.weight:0 norm.weight b.weight:1")
class InstanceNorm(AroundNorm):
    """nn.InstanceNorm2d with affine parameters."""

    def __init__(self):
        super().__init__(7)
        self.norm = nn.InstanceNorm2d(7, affine=True)

    def normalise(self, x):
        return self.norm(x)


@entry(image(), "a.weight:0 b.weight:1")
class FunctionalInstanceNorm(AroundNorm):
    """F.instance_norm, then the same by hand."""

    def __init__(self):
        super().__init__(7)

    def normalise(self, x):
        x = F.instance_norm(x) + x.tanh()
        return (x - x.mean((2, 3), keepdim=True)) / (x.std(dim=(2, 3), keepdim=True) + 1e-5)


@entry(tokens(), "enter.weight:0 norm.weight scale mid.weight leave.weight:1")
class RmsNorms(nn.Module):
    """nn.RMSNorm, Llama's by hand, and F.rms_norm, one after another."""

    def __init__(self):
        super().__init__()
        self.enter, self.norm, self.mid = nn.Linear(5, 7), nn.RMSNorm(7, eps=1e-6), nn.Linear(7, 11)
        self.scale, self.leave = nn.Parameter(torch.ones(11)), nn.Linear(11, CLASSES)

    def forward(self, x):
        x = self.mid(F.gelu(self.norm(self.enter(x))))
        x = self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return self.leave(F.rms_norm(x, (x.size(-1),), eps=1e-6))


@entry(image(), "stem.0.weight:0 beta gamma last.weight:1")
class GlobalResponseNorm(nn.Module):
    """ConvNeXt v2's GRN: an L2 norm over pixels divided by its mean over channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = conv_bn(3, 7), nn.Linear(7, CLASSES)
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, 1, 1, 7)), nn.Parameter(torch.zeros(1, 1, 1, 7))

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        size = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        size = size / (size.mean(dim=-1, keepdim=True) + 1e-6)
        return self.last((x + self.gamma * (x * size) + self.beta).mean((1, 2)))


@entry(image(), "conv.weight last.weight:1 gain")
class StandardisedWeights(nn.Module):
    """NFNet: the convolution's weight is normalised over its inputs at every call."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.last = conv_bn(3, 5), conv(5, 7), nn.Linear(7, CLASSES)
        self.gain = nn.Parameter(torch.ones(7, 1, 1, 1))

    def forward(self, x):
        x, w = self.stem(x), self.conv.weight
        w = F.batch_norm(w.reshape(1, 7, -1), None, None, self.gain.view(-1), training=True).reshape_as(w)
        return self.last(pooled(F.gelu(F.conv2d(x, w, self.conv.bias, padding=1))))


@entry(vector(), "enter.weight:0 leave.weight:1")
class UnitLength(nn.Module):
    """F.normalize and cosine similarity over channels: L2 norms, exact when removed entries are zero."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave, self.probe = nn.Linear(5, 11), nn.Linear(11, CLASSES), nn.Linear(5, 11)

    def forward(self, x):
        y, z = self.enter(x), self.probe(x)
        return self.leave(F.normalize(y, dim=-1)) + F.cosine_similarity(y, z, dim=-1)[:, None]
