"""The networks for 28 x 28 grey images, in plain torch: residual, inverted residual, plain, a vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016, the CIFAR form)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = conv_norm(inputs, outputs, stride=stride)
        self.second = conv_norm(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet20(nn.Module):
    """Three stages of three residual blocks; the first convolution halves the image, which keeps training cheap."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = conv_norm(1, width, stride=2)
        blocks, inputs = [], width
        for stage in range(3):
            for block in range(3):
                outputs = width * 2**stage
                blocks.append(Residual(inputs, outputs, 2 if stage and block == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean(dim=(2, 3)))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = conv_norm(inputs, hidden, kernel=1)
        self.depthwise = conv_norm(hidden, hidden, stride=stride, groups=hidden)
        self.project = conv_norm(hidden, outputs, kernel=1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu6(self.depthwise(F.relu6(self.expand(x))))
        return self.project(hidden) + x if self.residual else self.project(hidden)


class MobileNet(nn.Module):
    """A small MobileNetV2: (outputs, repeats, stride of the first) of each stage below."""

    STAGES = ((24, 2, 1), (40, 3, 2), (64, 3, 2))

    def __init__(self, stem: int = 24, expansion: int = 4, last: int = 256) -> None:
        super().__init__()
        self.stem = conv_norm(1, stem, stride=2)
        blocks, inputs = [], stem
        for outputs, repeats, stride in self.STAGES:
            for repeat in range(repeats):
                blocks.append(InvertedResidual(inputs, outputs, stride if repeat == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = conv_norm(inputs, last, kernel=1)
        self.head = nn.Linear(last, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu6(self.last(self.blocks(F.relu6(self.stem(x)))))
        return self.head(features.mean(dim=(2, 3)))


class VGG(nn.Module):
    """A plain stack with max pooling and two linear layers (Simonyan & Zisserman 2015, with batch norm)."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 64, 128, 128), hidden: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for index, outputs in enumerate(widths):
            layers += [*conv_norm(inputs, outputs), nn.ReLU()]
            if index in {0, 2, 4}:
                layers.append(nn.MaxPool2d(2))
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs * 9, hidden),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(hidden, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class Attention(nn.Module):
    """Self-attention of several heads, whose queries, keys and values are one projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        parts = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))


class TransformerBlock(nn.Module):
    """Attention and two linear layers, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.expand, self.project = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first_norm(x))
        return x + self.project(F.gelu(self.expand(self.second_norm(x))))


class VisionTransformer(nn.Module):
    """Patches of 7 x 7, learned positions, the mean over patches for the classifier (Dosovitskiy et al. 2021)."""

    def __init__(
        self, width: int = 96, depth: int = 6, heads: int = 4, hidden: int = 192, patch: int = 7
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (28 // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))


NETS = {"resnet20": ResNet20, "mobilenet": MobileNet, "vgg": VGG, "vit": VisionTransformer}


def build(name: str, seed: int = 0) -> nn.Module:
    """The named net with freshly drawn weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NETS[name]()
