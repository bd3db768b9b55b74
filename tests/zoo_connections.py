"""How layers are wired: adds, concatenations, splits in any order, shuffles, padding, reuse, ties."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_entry import CLASSES, entry, image, tokens, vector, words


def conv(c_in: int, c_out: int, kernel: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)


def conv_bn(c_in: int, c_out: int, kernel: int = 3, **options) -> nn.Sequential:
    return nn.Sequential(conv(c_in, c_out, kernel, bias=False, **options), nn.BatchNorm2d(c_out), nn.SiLU())


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


@entry(image(), "*.weight", keeps="head.weight:0 stem.0.weight:1")
class Plain(nn.Module):
    """Conv, norm, conv, pool, linear: no coupling at all."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = conv_bn(3, 7), conv_bn(7, 11), nn.Linear(11, CLASSES)

    def forward(self, x):
        return self.head(pooled(self.conv(self.stem(x))))


@entry(image(), "stem.0.weight:0 a.0.weight:0 a.0.weight:1 b.weight:0 b.weight:1 bn.* head.weight:1")
class Residual(nn.Module):
    """x + f(x): the stream is one group, the inner width another."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.bn = conv_bn(3, 7), conv_bn(7, 11), conv(11, 7), nn.BatchNorm2d(7)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.bn(self.b(self.a(x))))
        return self.head(pooled(x))


@entry(image(), "body.*.0.weight down.*.weight tail.weight:1", keeps="tail.weight:0")
class ResidualProjection(nn.Module):
    """A stage that widens and strides, with a 1x1 convolution on the shortcut; in-place ReLU and add."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 5)
        self.body = nn.Sequential(conv_bn(5, 7, stride=2), conv_bn(7, 13))
        self.down = nn.Sequential(nn.Conv2d(5, 13, 1, stride=2), nn.BatchNorm2d(13))
        self.act = nn.ReLU(inplace=True)
        self.tail = nn.Linear(13, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        y = self.body(x)
        y += self.down(x)
        return self.tail(self.act(y).mean([-2, -1]))


@entry(image(), "stem.0.weight:0 layers.*.0.weight:0 layers.*.0.weight:1 head.weight:1")
class Dense(nn.Module):
    """DenseNet: every layer reads the concatenation of all earlier ones."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 7)
        self.layers = nn.ModuleList(conv_bn(7 + 5 * i, 5) for i in range(3))
        self.norm, self.head = nn.BatchNorm2d(22), nn.Linear(22, CLASSES)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(pooled(F.relu(self.norm(torch.cat(features, 1)))))


@entry(image(), "one.0.weight:0 three.*.0.weight:0 pool.0.weight:0 tail.weight:1")
class Inception(nn.Module):
    """Parallel branches of different widths, concatenated."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.pool = conv_bn(3, 7), conv_bn(7, 5, 1), conv_bn(7, 11, 1)
        self.three = nn.Sequential(conv_bn(7, 3, 1), conv_bn(3, 13))
        self.tail = nn.Linear(29, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        pool = self.pool(F.max_pool2d(x, 3, 1, 1))
        return self.tail(pooled(torch.cat([self.one(x), self.three(x), pool], dim=1)))


@entry(
    image(3, 8, 12),
    "down*.0.weight:0 middle.0.weight up*.0.weight:1 lift*.weight out.weight:1",
    keeps="out.weight:0",
)
class UNet(nn.Module):
    """Skips over pooling and transposed convolution, concatenated on the way up; a map as output."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.middle = conv_bn(3, 5), conv_bn(5, 7), conv_bn(7, 11)
        self.lift2, self.up2 = nn.ConvTranspose2d(11, 7, 2, stride=2), conv_bn(14, 7)
        self.lift1, self.up1 = nn.ConvTranspose2d(7, 3, 2, stride=2), conv_bn(8, 5)
        self.out = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        d = self.up2(torch.cat([self.lift2(c), b], 1))
        return self.out(self.up1(torch.cat([self.lift1(d), a], 1)))


@entry(image(), "a.0.weight:0 b.0.weight:0 last.0.weight")
class CatOnPixels(nn.Module):
    """Concatenation over height, then over the batch: the channels of both operands are the same."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last, self.head = (
            conv_bn(3, 7),
            conv_bn(3, 7),
            conv_bn(7, 11),
            nn.Linear(11, CLASSES),
        )

    def forward(self, x):
        y = torch.cat([self.a(x), self.b(x)], dim=-2)
        y = torch.cat([y, y.flip(3)], dim=0)
        return self.head(pooled(self.last(y)))


@entry(image(), "a.0.weight:0 b.0.weight:0 c.0.weight d.0.weight head.weight:1")
class SplitAligned(nn.Module):
    """cat(5, 7) then split(5, 7): the borders meet."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = conv_bn(3, 5), conv_bn(3, 7), conv_bn(5, 7), conv_bn(7, 11)
        self.head = nn.Linear(18, CLASSES)

    def forward(self, x):
        first, second = torch.cat([self.a(x), self.b(x)], 1).split([5, 7], dim=1)
        return self.head(torch.cat([pooled(self.d(second)), pooled(self.c(first))], 1))


@entry(image(), "stem.0.weight:0 head.weight:1")
class PadByTensor(nn.Module):
    """A buffer holds how far to pad the pixels: the channels do not care."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = conv_bn(3, 7), nn.Linear(7, CLASSES)
        self.register_buffer("amount", torch.tensor(2))

    def forward(self, x):
        return self.head(pooled(F.pad(self.stem(x), (self.amount, self.amount + 1))))


@entry(image(), "stem.0.weight:0 head.weight:1")
class SplitIntoNothing(nn.Module):
    """split(7, 0) and a slice behind the end: an empty piece asks for nothing."""

    def __init__(self):
        super().__init__()
        self.stem, self.rest = conv_bn(3, 7), 0
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x):
        y = self.stem(x)
        first, second = y.split([y.shape[1], self.rest], dim=1)
        return self.head(pooled(torch.cat([second, first, y[:, y.shape[1] :]], 1)))


@entry(image(), "a.0.weight:0 b.0.weight:0 c.0.weight:0 d.0.weight:0 head.weight:1")
class SplitUnaligned(nn.Module):
    """cat(5, 7) then chunk(2) and slices at other places: pieces of pieces."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = conv_bn(3, 5), conv_bn(3, 7), conv_bn(6, 7), conv_bn(9, 11)
        self.head = nn.Linear(18, CLASSES)

    def forward(self, x):
        y = torch.cat([self.a(x), self.b(x)], 1)
        left, right = y.chunk(2, dim=1)
        z = self.d(y[:, 2:11])
        return self.head(torch.cat([pooled(self.c(left * right.sigmoid())), pooled(z)], 1))


@entry(image(), "stem.0.weight:0 a.0.weight:0 b.0.weight:0 out.0.weight:0 out.0.weight:1")
class SplitBeforeCat(nn.Module):
    """The parts are used, swapped and joined again before the whole is used: order of use must not matter."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 11), conv_bn(4, 7), conv_bn(7, 5)
        self.out, self.head = conv_bn(12, 13), nn.Linear(24, CLASSES)

    def forward(self, x):
        y = self.stem(x)
        first, second = y[:, :4], y[:, 4:]
        swapped = torch.cat([second, first], 1)
        z = self.out(torch.cat([self.a(first), self.b(second)], 1))
        return self.head(torch.cat([pooled(z), pooled(swapped).square()], 1))


@entry(image(), "enter.0.weight:0 steps.*.0.weight:0 leave.0.weight")
class C2f(nn.Module):
    """YOLOv8's block: split, reuse the last part again and again, concatenate all of them."""

    def __init__(self):
        super().__init__()
        self.enter = conv_bn(3, 14)
        self.steps = nn.ModuleList(conv_bn(7, 7) for _ in range(2))
        self.leave, self.head = conv_bn(28, 11, 1), nn.Linear(11, CLASSES)

    def forward(self, x):
        parts = list(self.enter(x).chunk(2, 1))
        for step in self.steps:
            parts.append(parts[-1] + step(parts[-1]))
        return self.head(pooled(self.leave(torch.cat(parts, 1))))


@entry(image(), "a.0.weight:0 b.0.weight:0 c.0.weight:0 d.0.weight:0 join.0.weight:1")
class NestedCat(nn.Module):
    """Concatenations of concatenations, cut at one border and added to a third branch."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = conv_bn(3, 5), conv_bn(3, 7), conv_bn(3, 11), conv_bn(3, 18)
        self.join, self.head = conv_bn(23, 13), nn.Linear(13, CLASSES)

    def forward(self, x):
        inner = torch.cat([self.b(x), self.c(x)], 1)
        outer = torch.cat([self.a(x), inner], 1)
        tail = torch.cat([outer[:, :5], outer[:, 5:] + self.d(x)], 1)
        return self.head(pooled(self.join(tail)))


@entry(image(), "stem.0.weight:0 part.*.weight:0 join.0.weight:1")
class CrossStagePartial(nn.Module):
    """CSP: half of the channels bypass the block; `split` with one number."""

    def __init__(self):
        super().__init__()
        self.stem, self.part = conv_bn(3, 14), nn.Sequential(conv(7, 11), nn.GELU(), conv(11, 7))
        self.join, self.head = conv_bn(14, 13), nn.Linear(13, CLASSES)

    def forward(self, x):
        keep, go = self.stem(x).split(7, 1)
        return self.head(pooled(self.join(torch.cat([keep, go + self.part(go)], 1))))


@entry(image(), "work.*.*.0.weight:0 last.0.weight:0")
class ChannelShuffle(nn.Module):
    """ShuffleNet v2: half passes through, half is worked on, then view, transpose, flatten shuffles them."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.work = nn.ModuleList(nn.Sequential(conv_bn(6, 7, 1), conv_bn(7, 6, 1)) for _ in range(2))
        self.last, self.head = conv_bn(12, 13), nn.Linear(13, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        for work in self.work:
            left, right = x.chunk(2, dim=1)
            x = torch.cat([left, work(right)], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(pooled(self.last(x)))


@entry(image(), "a.0.weight:0 b.0.weight:0")
class ShuffleGroups(nn.Module):
    """ShuffleNet v1: grouped 1x1, nn.ChannelShuffle of three groups, grouped 1x1."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 15), conv_bn(15, 27, 1, groups=3), conv_bn(27, 15, 1, groups=3)
        self.shuffle, self.head = nn.ChannelShuffle(3), nn.Linear(15, CLASSES)

    def forward(self, x):
        return self.head(pooled(self.b(self.shuffle(self.a(self.stem(x))))))


@entry(image(), "stem.0.weight:0 f.0.weight:0 last.weight:1")
class PadShortcut(nn.Module):
    """ResNet's option A: the shortcut is subsampled and padded with zero channels on both sides."""

    def __init__(self):
        super().__init__()
        self.stem, self.f, self.last = conv_bn(3, 7), conv_bn(7, 13, stride=2), nn.Linear(13, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        y = self.f(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3), "constant", 0)
        return self.last(pooled(F.relu(y)))


@entry(image(), "stem.0.weight:0 block.0.weight head.weight:1")
class CalledTwice(nn.Module):
    """One block called twice on its own output: both calls share channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = conv_bn(3, 7), conv_bn(7, 7), nn.Linear(7, CLASSES)

    def forward(self, x):
        return self.head(pooled(self.block(self.block(self.stem(x)))))


@entry(image(), "a.0.weight:0 b.0.weight:0 shared.0.weight")
class SharedBetweenBranches(nn.Module):
    """One block on two branches: their channels are the same because its weight is."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.shared = conv_bn(3, 7), conv_bn(3, 7, 1), conv_bn(7, 11)
        self.head = nn.Linear(22, CLASSES)

    def forward(self, x):
        return self.head(torch.cat([pooled(self.shared(self.a(x))), pooled(self.shared(self.b(x)))], 1))


@entry(words(), "embed.weight:1 up.weight:0 head.weight:1", keeps="embed.weight:0")
class TiedEmbedding(nn.Module):
    """A language model whose head is the embedding; the vocabulary is the output and stays."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(17, 7), nn.Linear(7, 11), nn.Linear(11, 7)
        self.head = nn.Linear(7, 17, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.down(F.gelu(self.up(x))))


@entry(vector(), "enter.weight:0 first.weight second.weight leave.weight:1")
class TiedLinears(nn.Module):
    """Two Linear modules that hold one weight, each with its own bias; and a transposed use of a third."""

    def __init__(self):
        super().__init__()
        self.enter, self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 7)
        self.second.weight = self.first.weight
        self.leave = nn.Linear(7, CLASSES)

    def forward(self, x):
        x = F.gelu(self.first(self.enter(x)))
        return self.leave(F.gelu(self.second(x)))


@entry(tokens(), "encode.weight:0")
class TiedTranspose(nn.Module):
    """An autoencoder that decodes with its encoder's weight, transposed."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(5, 11)
        self.bias = nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return F.linear(torch.tanh(self.encode(x)), self.encode.weight.t(), self.bias)


@entry(image(), "stages.*.0.0.weight:0 heads.*.weight:1", keeps="heads.*.weight:0")
class Pyramid(nn.Module):
    """ModuleList of Sequentials, sums from top to bottom over nearest and bilinear upsampling, several outputs."""

    def __init__(self):
        super().__init__()
        widths = [3, 5, 7, 11]
        pairs = list(pairwise(widths))
        self.stages = nn.ModuleList(
            nn.Sequential(conv_bn(a, b), nn.MaxPool2d(2, ceil_mode=True)) for a, b in pairs
        )
        self.lateral = nn.ModuleList(conv(w, 13, 1) for w in widths[1:])
        self.heads = nn.ModuleDict({"box": conv(13, 4), "score": conv(13, 2)})

    def forward(self, x):
        features = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            features.append(lateral(x))
        for i in (1, 0):
            mode = {"mode": "bilinear", "align_corners": False} if i else {"mode": "nearest"}
            features[i] = features[i] + F.interpolate(features[i + 1], size=features[i].shape[2:], **mode)
        return {name: [head(f) for f in features] for name, head in self.heads.items()}


@entry(image(), "stem.0.weight:0 a.0.weight:0 b.0.weight:0 c.0.weight head.weight:1")
class WeightedSum(nn.Module):
    """BiFPN: branches added with normalised learned weights, one of them through a multiplication by a mask."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.c = conv_bn(3, 5), conv_bn(5, 7), conv_bn(5, 7, 1), conv_bn(7, 11)
        self.w, self.head = nn.Parameter(torch.ones(2)), nn.Linear(11, CLASSES)

    def forward(self, x):
        y = self.stem(x)
        w = F.softmax(self.w, 0)
        mask = (x.sum(1, keepdim=True) > 0).to(x.dtype)
        return self.head(pooled(self.c(w[0] * self.a(y) + w[1] * mask * self.b(y))))
