"""Channels through views, literals, products and patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from zoo_connections import conv, conv_bn, pooled
from zoo_entry import CLASSES, TOKENS, entry, image, tokens, vector

# --- flatten, views and literals --------------------------------------------------------------------------------


@entry(image(), "stem.0.weight:0 head.0.weight:1 head.0.weight:0")
class FlattenChannelsFirst(nn.Module):
    """NCHW flattened into a linear: a channel is a run of pixels."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 7)
        self.head = nn.Sequential(nn.Linear(7 * 12, 11), nn.GELU(), nn.Linear(11, CLASSES))

    def forward(self, x):
        return self.head(torch.flatten(F.max_pool2d(self.stem(x), 2), 1))


@entry(image(), "stem.0.weight:0 head.0.weight:1 head.0.weight:0")
class FlattenChannelsLast(nn.Module):
    """NHWC flattened into a linear: a channel is every C-th index."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 7)
        self.head = nn.Sequential(nn.Linear(12 * 7, 11), nn.GELU(), nn.Linear(11, CLASSES))

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 2).permute(0, 2, 3, 1)
        return self.head(x.reshape(x.size(0), -1))


@entry(image(), "conv1.weight:0 conv2.weight fc1.weight:1 fc1.weight:0 fc2.weight:1", keeps="fc2.weight:0")
class LiteralView(nn.Module):
    """LeNet: x.view(-1, 84) with the number written into forward."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = conv(3, 5), conv(5, 7)
        self.fc1, self.fc2 = nn.Linear(84, 11), nn.Linear(11, CLASSES)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        return self.fc2(F.relu(self.fc1(x.view(-1, 84))))


@entry(image(), "stem.0.weight:0 a.0.weight:0 b.0.weight:0 head.weight:1")
class LiteralSlice(nn.Module):
    """x[:, :6] and narrow(1, 6, 7) with the numbers written into forward."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = (
            conv_bn(3, 13),
            conv_bn(6, 5),
            conv_bn(7, 11),
            nn.Linear(16, CLASSES),
        )

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.cat([pooled(self.a(x[:, :6])), pooled(self.b(x.narrow(1, 6, 7)))], 1))


@entry(image(), "stem.0.weight:0 fc.weight:1")
class AttributeView(nn.Module):
    """The numbers of the view stand in attributes: an int, and a tuple in a dict."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = conv_bn(3, 7), nn.Linear(84, CLASSES)
        self.flat = 84
        self.config = {"shape": (7, 48)}

    def forward(self, x):
        x = self.stem(x)
        x = x.view(-1, *self.config["shape"]).softmax(-1).view(x.shape)
        return self.fc(F.max_pool2d(x, 2).reshape(-1, self.flat))


class FrozenConfig(dict):
    """A dict whose entries are attributes too, and that permits no change of its items."""

    def __init__(self, **entries):
        super().__init__(entries)
        vars(self).update(entries)

    def __setitem__(self, key, value):
        raise TypeError("this config can't be changed")

    def __deepcopy__(self, memo):
        return FrozenConfig(**self)


@entry(image(), "stem.0.weight:0 fc.weight:1")
class ConfigOfItemsAndAttributes(nn.Module):
    """A view's number is read as an attribute of a config that is a dict as well, and once as an item."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = conv_bn(3, 7), nn.Linear(84, CLASSES)
        self.config = FrozenConfig(width=7, flat=84)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 2)
        y = x.new_zeros(x.shape[0], self.config.width, 4, 3)
        y[:, :, :2] = x[:, :, :2]
        y[:, :, 2:] = x[:, :, 2:] * 2
        return self.fc(y.view(-1, self.config["flat"]))


@entry(image(), "stem.0.weight:0 mix.weight last.weight:1", keeps="token.weight")
class MixerTranspose(nn.Module):
    """MLP-Mixer: linear over tokens, then over channels; pixels are fixed."""

    def __init__(self):
        super().__init__()
        self.stem, self.token = conv_bn(3, 7), nn.Linear(48, 48)
        self.mix, self.last = nn.Linear(7, 11), nn.Linear(11, CLASSES)

    def forward(self, x):
        x = self.stem(x).flatten(2)
        x = (x + F.gelu(self.token(x))).transpose(1, 2)
        return self.last(F.gelu(self.mix(x)).mean(1))


@entry(tokens(), "stem.weight:0 mix.weight last.weight:1", keeps="filter")
class FourierFilter(nn.Module):
    """Tokens convolved by learned filters through a transform; real to complex and back, and over both dims."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.last = nn.Linear(5, 7), nn.Linear(7, 11), nn.Linear(11, CLASSES)
        self.filter = nn.Parameter(torch.randn(TOKENS, 1))

    def forward(self, x):
        x = self.stem(x)
        product = torch.fft.rfft(x, dim=1) * torch.fft.rfft(self.filter, dim=0)
        x = torch.fft.irfft(product, n=x.shape[1], dim=1) + torch.fft.fft(x, dim=1).real
        return self.last(F.gelu(self.mix(x)).mean(1))


@entry(tokens(), "stem.weight:0 mix.weight last.weight:1")
class MeanOfSquares(nn.Module):
    """A loss over two hidden tensors is an output: its mean is over the kept entries."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        y = self.mix(x)
        return self.last(x + y), F.mse_loss(x, y), F.smooth_l1_loss(x, y, reduction="none").sum()


# --- expand, repeat, stack, unbind, products --------------------------------------------------------------------


@entry(vector(), "a.weight:0 b.weight:0 mix.weight last.weight:1")
class ExpandAndRepeat(nn.Module):
    """A vector broadcast to tokens by expand and by repeat, one repeated along channels too."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(5, 11)
        self.mix, self.last = nn.Linear(7 + 22, 13), nn.Linear(13, CLASSES)

    def forward(self, x):
        a = self.a(x).unsqueeze(1).expand(-1, 4, -1)
        b = self.b(x)[:, None].repeat(1, 4, 2)
        return self.last(F.gelu(self.mix(torch.cat([a, b], -1))))


@entry(vector(), "a.weight:0 b.weight:0 mix.weight:1 last.weight:1")
class RepeatInterleave(nn.Module):
    """Each channel copied three times, next to itself, and tied to another branch of that order."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.mix, self.last = (
            nn.Linear(5, 7), nn.Linear(5, 21), nn.Linear(21, 11), nn.Linear(11, CLASSES))  # fmt: skip

    def forward(self, x):
        return self.last(F.gelu(self.mix(self.a(x).repeat_interleave(3, dim=1) * self.b(x))))


@entry(image(), "a.0.weight:0 b.0.weight:0 c.0.weight:0 last.weight:1")
class StackAndUnbind(nn.Module):
    """SKNet: branches stacked on a new dim, weighted by a softmax over them, summed, unbound again."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 7), conv_bn(3, 7, 1), conv_bn(7, 11)
        self.gate, self.last = nn.Linear(7, 14), nn.Linear(11, CLASSES)

    def forward(self, x):
        both = torch.stack([self.a(x), self.b(x)], dim=1)
        gate = self.gate(pooled(both.sum(1))).view(-1, 2, 7).softmax(1)
        first, second = (both * gate[..., None, None]).unbind(1)
        return self.last(pooled(self.c(first + second)))


@entry(vector(), "a.weight:0 b.weight:0 last.weight:1")
class StackOnLastDim(nn.Module):
    """Two vectors interleaved by stack on the last dim and flatten."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(14, CLASSES)

    def forward(self, x):
        return self.last(F.gelu(torch.stack((self.a(x), self.b(x)), dim=-1).flatten(1)))


@entry(tokens(), "q.weight:0 k.weight:0 v.weight:0 last.weight:1")
class EinsumAttention(nn.Module):
    """One head of attention in einsum."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.last = (
            nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(5, 11), nn.Linear(11, CLASSES))  # fmt: skip

    def forward(self, x):
        scores = torch.einsum("bic,bjc->bij", self.q(x), self.k(x)) * 0.3
        return self.last(torch.einsum("bij,bjd->bid", scores.softmax(-1), self.v(x)))


@entry(image(), "theta.weight:0 phi.weight:0 g.weight:0 out.weight:1 stem.0.weight:0 last.weight:1")
class NonLocal(nn.Module):
    """Non-local block: bmm of flattened maps, 1x1 convolutions around it."""

    def __init__(self):
        super().__init__()
        self.stem, self.theta, self.phi = conv_bn(3, 7), conv(7, 5, 1), conv(7, 5, 1)
        self.g, self.out, self.last = conv(7, 11, 1), conv(11, 7, 1), nn.Linear(7, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        n, _, h, w = x.shape
        theta, phi = self.theta(x).flatten(2), F.max_pool2d(self.phi(x), 2).flatten(2)
        g = F.max_pool2d(self.g(x), 2).flatten(2)
        attention = torch.bmm(theta.transpose(1, 2), phi).softmax(-1)
        y = torch.bmm(attention, g.transpose(1, 2)).transpose(1, 2).reshape(n, -1, h, w)
        return self.last(pooled(F.gelu(x + self.out(y))))


@entry(vector(), "a.weight:0 b.weight:0 last.weight:1")
class OuterProduct(nn.Module):
    """Bilinear pooling: the outer product of two vectors, flattened into a linear."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Linear(5, 7), nn.Linear(5, 11), nn.Linear(77, CLASSES)

    def forward(self, x):
        a, b = torch.tanh(self.a(x)), torch.tanh(self.b(x))
        return self.last((a[:, :, None] * b[:, None, :]).flatten(1))


@entry(image(), "stem.0.weight:0 last.weight:1")
class GramMatrix(nn.Module):
    """x @ x.T over pixels, flattened into a linear: channels on both of its dims."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = conv_bn(3, 7), nn.Linear(49, CLASSES)

    def forward(self, x):
        x = self.stem(x).flatten(2)
        return self.last(torch.bmm(x, x.transpose(1, 2)).flatten(1) / 48)


@entry(tokens(), "a.weight:0 b.weight:0 last.weight")
class SharedEinsum(nn.Module):
    """einsum with a repeated letter on three operands, contracted and kept."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.w = nn.Linear(5, 7), nn.Linear(5, 7), nn.Parameter(torch.randn(7, 11))
        self.mix, self.last = nn.Linear(11, 13), nn.Linear(13, CLASSES)

    def forward(self, x):
        y = torch.einsum("btc,btc,cd->btd", self.a(x), self.b(x), self.w)
        return self.last(F.gelu(self.mix(y)))


# --- patches ----------------------------------------------------------------------------------------------------


@entry(image(), "stem.0.weight:0 up.weight last.weight:1")
class PixelShuffle(nn.Module):
    """nn.PixelShuffle: four consecutive channels become one."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.shuffle, self.last = (
            conv_bn(3, 5),
            conv(5, 28),
            nn.PixelShuffle(2),
            conv(7, 2),
        )

    def forward(self, x):
        return self.last(F.gelu(self.shuffle(self.up(self.stem(x)))))


@entry(image(), "stem.0.weight:0 mix.weight:1 mix.weight:0 last.weight:1")
class SpaceToDepth(nn.Module):
    """Space to depth by pixel_unshuffle and by the view that YOLO uses, concatenated."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.last = conv_bn(3, 5), conv(40, 11, 1), nn.Linear(11, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        n, c, h, w = x.shape
        y = (
            x.view(n, c, h // 2, 2, w // 2, 2)
            .permute(0, 3, 5, 1, 2, 4)
            .contiguous()
            .view(n, 4 * c, h // 2, w // 2)
        )
        return self.last(pooled(F.gelu(self.mix(torch.cat([y, F.pixel_unshuffle(x, 2)], 1)))))


@entry(image(), "stem.0.weight:0 norm.weight reduce.weight last.weight:1")
class PatchMerging(nn.Module):
    """Swin: four strided slices concatenated on channels, LayerNorm, linear."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.reduce, self.last = (
            conv_bn(3, 5), nn.LayerNorm(20), nn.Linear(20, 11), nn.Linear(11, CLASSES))  # fmt: skip

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.last(F.gelu(self.reduce(self.norm(x))).mean((1, 2)))


@entry(image(), "stem.0.weight:0 mix.weight back.weight:1 last.weight:1")
class UnfoldFold(nn.Module):
    """F.unfold, a linear on patches, F.fold: C x 9 and back."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.back = conv_bn(3, 5), nn.Linear(45, 11), nn.Linear(11, 28)
        self.last = conv(7, 2)

    def forward(self, x):
        patches = F.unfold(self.stem(x), 3, padding=1).transpose(1, 2)
        y = self.back(F.gelu(self.mix(patches))).view(x.shape[0], 8, 6, 28)[:, ::2, ::2].flatten(1, 2)
        return self.last(F.gelu(F.fold(y.transpose(1, 2), (8, 6), 2, stride=2)))


@entry(image(), "stem.0.weight:0 mix.weight last.weight:1")
class TensorUnfold(nn.Module):
    """x.unfold along pixels: sliding windows as a dim of their own."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.last = conv_bn(3, 7), nn.Linear(7, 11), nn.Linear(11, CLASSES)

    def forward(self, x):
        windows = self.stem(x).unfold(2, 4, 4).unfold(3, 3, 3).amax((4, 5))
        return self.last(F.gelu(self.mix(windows.permute(0, 2, 3, 1))).mean((1, 2)))


@entry(tokens(), "enter.weight mix leave.weight:1")
class ComplexMixing(nn.Module):
    """Channels as complex numbers meet a complex weight, as in Fourier operators and diagonal state spaces."""

    def __init__(self):
        super().__init__()
        self.enter, self.mix = nn.Linear(5, 11), nn.Parameter(torch.randn(11, 13, 2))
        self.leave = nn.Linear(13, CLASSES)

    def forward(self, x):
        y = self.enter(x)
        mixed = torch.complex(y, y * 0.5) @ torch.view_as_complex(self.mix)
        return self.leave(mixed.real + mixed.imag)


# --- laid out otherwise -------------------------------------------------------------------------------------------


def _channels_last() -> tuple[torch.Tensor]:
    (x,) = image()()
    return (x.contiguous(memory_format=torch.channels_last),)


@entry(_channels_last, "stem.0.weight:0 body.0.weight:0 head.weight:1")
class PoolsChannelsLast(nn.Module):
    """Adaptive pooling of channels that lie innermost gives the result the same strides, by as_strided_."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = conv_bn(3, 7), conv_bn(7, 11)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(11, CLASSES)

    def forward(self, x):
        return self.head(self.pool(self.body(self.stem(x))).flatten(1))


@entry(tokens(), "enter.weight:0 a.weight:0 b.weight:0 last.weight:1")
class TurnedInPlace(nn.Module):
    """transpose_, t_, unsqueeze_ and squeeze_ of tensors of its own."""

    def __init__(self):
        super().__init__()
        self.enter, self.a, self.b = nn.Linear(5, 7), nn.Conv1d(7, 11, 3, padding=1), nn.Linear(11, 13)
        self.last = nn.Linear(13, CLASSES)

    def forward(self, x):
        x = self.a(self.enter(x).transpose_(1, 2)).unsqueeze_(0).squeeze_(0)
        x = x.mean(2).t_().clone().t_()
        return self.last(self.b(x).relu())


@entry(image(), "stem.0.weight:0 body.weight:0 turned.weight head.weight:1", keeps="head.weight:0")
class Turned(nn.Module):
    """rot90 of the pixels, and of pixels with channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = conv_bn(3, 7), conv(7, 11)
        self.turned, self.head = nn.Linear(11, 13), nn.Linear(13, CLASSES)

    def forward(self, x):
        x = torch.rot90(self.stem(x), 1, (2, 3))
        x = torch.rot90(F.relu(self.body(x)), 3, (1, 3))  # [n, columns, rows, channels], the columns reversed
        return self.head(F.relu(self.turned(x)).mean((1, 2)))


@entry(tokens(), "enter.weight:0 inner.weight last.weight:1")
class SegmentMeans(nn.Module):
    """Runs of tokens become one token each."""

    def __init__(self):
        super().__init__()
        self.enter, self.inner, self.last = nn.Linear(5, 7), nn.Linear(7, 11), nn.Linear(11, CLASSES)
        self.register_buffer("lengths", torch.tensor([3, 5, 2]))

    def forward(self, x):
        x = F.gelu(self.enter(x)).transpose(0, 1).contiguous()
        x = torch.segment_reduce(x, "mean", lengths=self.lengths)
        return self.last(F.gelu(self.inner(x)))
