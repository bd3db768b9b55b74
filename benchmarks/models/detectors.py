"""Detectors in plain torch, in the styles that users have: one-stage grids, anchors, centres, queries."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5


def _conv(c_in: int, c_out: int, k: int = 1, s: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    """Convolution, batch norm and SiLU."""
    layers: list[nn.Module] = [
        nn.Conv2d(c_in, c_out, k, s, k // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out),
    ]
    return nn.Sequential(*layers, *([nn.SiLU(inplace=True)] if act else []))


class Bottleneck(nn.Module):
    """Two convolutions, with a shortcut where widths agree."""

    def __init__(self, c_in: int, c_out: int, shortcut: bool = True, expansion: float = 0.5, k: int = 3):
        super().__init__()
        hidden = int(c_out * expansion)
        self.cv1, self.cv2 = _conv(c_in, hidden, k), _conv(hidden, c_out, k)
        self.add = shortcut and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class CSP(nn.Module):
    """Two branches of half the width, one through bottlenecks, joined by a convolution (C3)."""

    def __init__(self, c_in: int, c_out: int, n: int = 1, shortcut: bool = True, k: int = 3):
        super().__init__()
        hidden = c_out // 2
        self.left, self.right = _conv(c_in, hidden), _conv(c_in, hidden)
        self.body = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, 1.0, k) for _ in range(n)))
        self.join = _conv(2 * hidden, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat((self.body(self.left(x)), self.right(x)), 1))


class SplitReuse(nn.Module):
    """One convolution cut in two halves; each bottleneck's output joins the concatenation (C2f; C3k2 with `deep`)."""

    def __init__(self, c_in: int, c_out: int, n: int = 1, shortcut: bool = True, deep: bool = False):
        super().__init__()
        self.hidden = c_out // 2
        self.first = _conv(c_in, 2 * self.hidden)
        self.join = _conv((2 + n) * self.hidden, c_out)
        self.body = nn.ModuleList(
            CSP(self.hidden, self.hidden, 2, shortcut)
            if deep
            else Bottleneck(self.hidden, self.hidden, shortcut)
            for _ in range(n)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.body:
            parts.append(block(parts[-1]))
        return self.join(torch.cat(parts, 1))


class SplitReuseSizes(SplitReuse):
    """The same with the halves named by their sizes."""

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).split((self.hidden, self.hidden), 1))
        parts.extend(block(parts[-1]) for block in self.body)
        return self.join(torch.cat(parts, 1))


class PyramidPooling(nn.Module):
    """Repeated pooling, all stages joined (SPPF)."""

    def __init__(self, c_in: int, c_out: int, k: int = 5):
        super().__init__()
        self.first, self.join = _conv(c_in, c_in // 2), _conv(c_in // 2 * 4, c_out)
        self.pool = nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        stages = [self.first(x)]
        for _ in range(3):
            stages.append(self.pool(stages[-1]))
        return self.join(torch.cat(stages, 1))


class ParallelPooling(nn.Module):
    """Pools of several widths beside each other (SPP)."""

    def __init__(self, c_in: int, c_out: int, ks: Sequence[int] = (5, 9, 13)):
        super().__init__()
        self.first, self.join = _conv(c_in, c_in // 2), _conv(c_in // 2 * (len(ks) + 1), c_out)
        self.pools = nn.ModuleList(nn.MaxPool2d(k, 1, k // 2) for k in ks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.join(torch.cat([x] + [pool(x) for pool in self.pools], 1))


class PixelAttention(nn.Module):
    """Attention over pixels with narrow keys and a depthwise position branch."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.key_dim = self.head_dim // 2
        self.scale = self.key_dim**-0.5
        self.qkv = _conv(width, width + 2 * heads * self.key_dim, act=False)
        self.proj, self.pe = _conv(width, width, act=False), _conv(width, width, 3, groups=width, act=False)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        n = h * w
        qkv = self.qkv(x).view(b, self.heads, self.key_dim * 2 + self.head_dim, n)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.head_dim], dim=2)
        weights = ((q.transpose(-2, -1) @ k) * self.scale).softmax(-1)
        y = (v @ weights.transpose(-2, -1)).view(b, c, h, w)
        return self.proj(y + self.pe(v.reshape(b, c, h, w)))


class AttentionSplit(nn.Module):
    """Half of the channels go through attention and a feed-forward pair (C2PSA)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.c = width // 2
        self.first, self.join = _conv(width, 2 * self.c), _conv(2 * self.c, width)
        self.attention = PixelAttention(self.c, heads)
        self.feed = nn.Sequential(_conv(self.c, 2 * self.c), _conv(2 * self.c, self.c, act=False))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).split((self.c, self.c), dim=1)
        b = b + self.attention(b)
        b = b + self.feed(b)
        return self.join(torch.cat((a, b), 1))


def _grid(features: Sequence[Tensor], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Centres `[cells, 2]` and strides `[cells, 1]` of all cells of a pyramid."""
    points, steps = [], []
    for x, stride in zip(features, strides, strict=True):
        h, w = x.shape[-2:]
        ys = torch.arange(h, dtype=x.dtype, device=x.device) + 0.5
        xs = torch.arange(w, dtype=x.dtype, device=x.device) + 0.5
        gy, gx = torch.meshgrid(ys, xs, indexing="ij")
        points.append(torch.stack((gx, gy), -1).view(-1, 2))
        steps.append(torch.full((h * w, 1), stride, dtype=x.dtype, device=x.device))
    return torch.cat(points), torch.cat(steps)


class DistributionHead(nn.Module):
    """Anchor-free head: box sides as distributions over bins, decoded to boxes (YOLOv8 style)."""

    def __init__(self, widths: Sequence[int], strides: Sequence[int], bins: int = 8, light: bool = False):
        super().__init__()
        self.bins, self.strides, self.outputs = bins, strides, CLASSES + 4 * bins
        box, cls = max(widths[0] // 4, bins * 2), max(widths[0], CLASSES)
        self.box = nn.ModuleList(
            nn.Sequential(_conv(c, box, 3), _conv(box, box, 3), nn.Conv2d(box, 4 * bins, 1)) for c in widths
        )
        self.cls = nn.ModuleList(
            nn.Sequential(
                *(
                    [_conv(c, c, 3, groups=c), _conv(c, cls), _conv(cls, cls, 3, groups=cls), _conv(cls, cls)]
                    if light
                    else [_conv(c, cls, 3), _conv(cls, cls, 3)]
                ),
                nn.Conv2d(cls, CLASSES, 1),
            )
            for c in widths
        )
        self.project = nn.Conv2d(bins, 1, 1, bias=False)
        self.project.weight.data.copy_(torch.arange(bins, dtype=torch.float).view(1, bins, 1, 1))
        self.project.requires_grad_(False)

    def forward(self, features: list[Tensor]) -> Tensor:
        raw = [torch.cat((b(x), c(x)), 1) for x, b, c in zip(features, self.box, self.cls, strict=True)]
        n = raw[0].shape[0]
        flat = torch.cat([x.view(n, self.outputs, -1) for x in raw], 2)
        box, cls = flat.split((4 * self.bins, CLASSES), 1)
        a = box.shape[-1]
        sides = self.project(box.view(n, 4, self.bins, a).transpose(2, 1).softmax(1)).view(n, 4, a)
        points, steps = _grid(features, self.strides)
        near, far = sides.chunk(2, 1)
        low, high = points.t()[None] - near, points.t()[None] + far
        boxes = torch.cat(((low + high) / 2, high - low), 1) * steps.t()
        return torch.cat((boxes, cls.sigmoid()), 1)


class AnchorHead(nn.Module):
    """Three anchors a cell, each with a box, an objectness and classes, decoded on the grid (YOLOv3/v5 style)."""

    def __init__(self, widths: Sequence[int], strides: Sequence[int]):
        super().__init__()
        self.no, self.na, self.strides = CLASSES + 5, 3, strides
        anchors = torch.arange(1, 1 + 2 * self.na * len(widths)).float().view(len(widths), self.na, 2)
        self.register_buffer("anchors", anchors)
        self.m = nn.ModuleList(nn.Conv2d(c, self.no * self.na, 1) for c in widths)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        raw, decoded = [], []
        for i, x in enumerate(features):
            y = self.m[i](x)
            n, _, h, w = y.shape
            y = y.view(n, self.na, self.no, h, w).permute(0, 1, 3, 4, 2).contiguous()
            raw.append(y)
            ys, xs = torch.arange(h).to(y), torch.arange(w).to(y)
            gy, gx = torch.meshgrid(ys, xs, indexing="ij")
            grid = torch.stack((gx, gy), 2).expand(1, self.na, h, w, 2) - 0.5
            sizes = (self.anchors[i] * self.strides[i]).view(1, self.na, 1, 1, 2)
            xy, wh, rest = y.sigmoid().split((2, 2, self.no - 4), 4)
            xy, wh = (xy * 2 + grid) * self.strides[i], (wh * 2) ** 2 * sizes
            decoded.append(torch.cat((xy, wh, rest), 4).view(n, self.na * h * w, self.no))
        return torch.cat(decoded, 1), raw


class PathAggregation(nn.Module):
    """A backbone of four stages, a pyramid down and up again, and a head."""

    def __init__(self, block: type[nn.Module], head: nn.Module | None = None, spp: type[nn.Module] = PyramidPooling,
                 width: int = 16, psa: bool = False, **options: bool):  # fmt: skip
        super().__init__()
        w = width
        self.stem = nn.Sequential(_conv(3, w // 2, 3, 2), _conv(w // 2, w, 3, 2), block(w, w, 1, **options))
        self.p3 = nn.Sequential(_conv(w, 2 * w, 3, 2), block(2 * w, 2 * w, 2, **options))
        self.p4 = nn.Sequential(_conv(2 * w, 4 * w, 3, 2), block(4 * w, 4 * w, 2, **options))
        self.p5 = nn.Sequential(
            _conv(4 * w, 8 * w, 3, 2), block(8 * w, 8 * w, 1, **options), spp(8 * w, 8 * w)
        )
        if psa:
            self.p5.append(AttentionSplit(8 * w, 4))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.n4, self.n3 = block(12 * w, 4 * w, 1, shortcut=False), block(6 * w, 2 * w, 1, shortcut=False)
        self.d4, self.d5 = _conv(2 * w, 2 * w, 3, 2), _conv(4 * w, 4 * w, 3, 2)
        self.m4, self.m5 = block(6 * w, 4 * w, 1, shortcut=False), block(12 * w, 8 * w, 1, shortcut=False)
        self.head = head or AnchorHead((2 * w, 4 * w, 8 * w), (8, 16, 32))

    def forward(self, x: Tensor):
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.n4(torch.cat((self.up(p5), p4), 1))
        n3 = self.n3(torch.cat((self.up(n4), p3), 1))
        m4 = self.m4(torch.cat((self.d4(n3), n4), 1))
        m5 = self.m5(torch.cat((self.d5(m4), p5), 1))
        return self.head([n3, m4, m5])


class EndToEnd(nn.Module):
    """A one-stage detector with the best candidates chosen in forward, as exporters and YOLOv10 do."""

    def __init__(self, net: nn.Module, keep: int = 20):
        super().__init__()
        self.net, self.keep = net, keep

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores = self.net(x).transpose(1, 2).split((4, CLASSES), -1)
        best, index = scores.amax(-1).topk(self.keep, -1)
        boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        scores = scores.gather(1, index[..., None].expand(-1, -1, CLASSES))
        best, flat = scores.flatten(1).topk(self.keep)
        return boxes.gather(1, (flat // CLASSES)[..., None].expand(-1, -1, 4)), best, flat % CLASSES


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes `[n, 4]` and `[m, 4]` as corners."""
    low, high = torch.max(a[:, None, :2], b[:, :2]), torch.min(a[:, None, 2:], b[:, 2:])
    inner = (high - low).clamp(min=0).prod(2)
    areas = [(x[:, 2:] - x[:, :2]).prod(1) for x in (a, b)]
    return inner / (areas[0][:, None] + areas[1] - inner + 1e-9)


class Suppressed(nn.Module):
    """A one-stage detector with greedy non-maximum suppression in plain torch."""

    def __init__(self, net: nn.Module, threshold: float = 0.3, keep: int = 12):
        super().__init__()
        self.net, self.threshold, self.keep = net, threshold, keep

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        found = []
        for image in self.net(x):
            centre, size = image[:2].t(), image[2:4].t()
            boxes = torch.cat((centre - size / 2, centre + size / 2), 1)
            scores, labels = image[4:].max(0)
            order = scores.argsort(descending=True)[: 4 * self.keep]
            kept = []
            while order.numel() and len(kept) < self.keep:
                kept.append(order[0])
                order = order[1:][_overlap(boxes[order[:1]], boxes[order[1:]])[0] < self.threshold]
            index = torch.stack(kept)
            found.append({"boxes": boxes[index], "scores": scores[index], "labels": labels[index]})
        return found


class DarkNet(nn.Module):
    """YOLOv3 style: residual stages, a head a scale, upsampled concatenation."""

    def __init__(self, w: int = 8):
        super().__init__()
        act = nn.LeakyReLU(0.1)

        def unit(a: int, b: int, k: int = 1, s: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(a, b, k, s, k // 2, bias=False), nn.BatchNorm2d(b), act)

        class Residual(nn.Module):
            def __init__(self, c: int):
                super().__init__()
                self.body = nn.Sequential(unit(c, c // 2), unit(c // 2, c, 3))

            def forward(self, x: Tensor) -> Tensor:
                return x + self.body(x)

        self.stem = nn.Sequential(unit(3, w, 3), unit(w, 2 * w, 3, 2), Residual(2 * w))
        self.stages = nn.ModuleList(
            nn.Sequential(unit(2 * w << i, 4 * w << i, 3, 2), Residual(4 * w << i), Residual(4 * w << i))
            for i in range(3)
        )
        wide = [4 * w, 8 * w, 16 * w]
        self.necks, self.outs, self.laterals = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        extra = 0
        for c in reversed(wide):
            self.necks.append(nn.Sequential(unit(c + extra, c // 2), unit(c // 2, c, 3), unit(c, c // 2)))
            self.outs.append(nn.Sequential(unit(c // 2, c, 3), nn.Conv2d(c, 3 * (5 + CLASSES), 1)))
            self.laterals.append(unit(c // 2, c // 4))
            extra = c // 4

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        kept = []
        for stage in self.stages:
            x = stage(x)
            kept.append(x)
        found, carried = [], None
        for i, level in enumerate(reversed(kept)):
            y = level if carried is None else torch.cat([carried, level], 1)
            y = self.necks[i](y)
            out = self.outs[i](y)
            n, _, h, w = out.shape
            found.append(out.reshape(n, 3, 5 + CLASSES, h, w).permute(0, 3, 4, 1, 2))
            carried = F.interpolate(self.laterals[i](y), scale_factor=2)
        return found


class Stages(nn.Module):
    """A plain residual backbone that returns its last three stages."""

    def __init__(self, w: int = 16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, w, 7, 4, 3, bias=False), nn.BatchNorm2d(w), nn.ReLU())
        self.blocks, self.downs = nn.ModuleList(), nn.ModuleList()
        for i in range(3):
            a, b = w << i, w << (i + 1)
            self.blocks.append(
                nn.Sequential(
                    nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, b, 3, 1, 1)
                )
            )
            self.downs.append(nn.Conv2d(a, b, 1, 2))
        self.widths = [w << (i + 1) for i in range(3)]

    def forward(self, x: Tensor) -> list[Tensor]:
        x, found = self.stem(x), []
        for block, down in zip(self.blocks, self.downs, strict=True):
            x = F.relu(block(x) + down(x))
            found.append(x)
        return found


class FeaturePyramid(nn.Module):
    """Lateral 1 x 1 convolutions, sums from the top down, a smoothing convolution a level."""

    def __init__(self, widths: Sequence[int], out: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, out, 1) for c in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(out, out, 3, padding=1) for _ in widths)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        levels = [layer(x) for layer, x in zip(self.lateral, features, strict=True)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], size=levels[i - 1].shape[-2:])
        return [layer(x) for layer, x in zip(self.smooth, levels, strict=True)]


class WeightedPyramid(nn.Module):
    """Fusion with learned weights a connection and separable convolutions (BiFPN)."""

    def __init__(self, widths: Sequence[int], out: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, out, 1) for c in widths)
        self.w_down, self.w_up = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 3))
        self.fuse = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(out, out, 3, padding=1, groups=out), nn.Conv2d(out, out, 1), nn.BatchNorm2d(out)
            )
            for _ in range(4)
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        p3, p4, p5 = (layer(x) for layer, x in zip(self.lateral, features, strict=True))
        down, up = self.w_down.relu(), self.w_up.relu()
        down, up = down / (down.sum(1, keepdim=True) + 1e-4), up / (up.sum(1, keepdim=True) + 1e-4)
        t4 = self.fuse[0](F.silu(down[0, 0] * p4 + down[0, 1] * F.interpolate(p5, size=p4.shape[-2:])))
        o3 = self.fuse[1](F.silu(down[1, 0] * p3 + down[1, 1] * F.interpolate(t4, size=p3.shape[-2:])))
        o4 = self.fuse[2](F.silu(up[0, 0] * p4 + up[0, 1] * t4 + up[0, 2] * F.max_pool2d(o3, 2)))
        o5 = self.fuse[3](F.silu(up[1, 0] * p5 + up[1, 1] * F.max_pool2d(o4, 2)))
        return [o3, o4, o5]


class CentreNet(nn.Module):
    """Heat maps of centres with sizes and offsets; peaks are found by a max pool and top-k."""

    def __init__(self, w: int = 16, keep: int = 10):
        super().__init__()
        self.body, self.keep = Stages(w), keep
        widths = self.body.widths
        self.ups = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(b, a, 4, 2, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        )
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Conv2d(widths[0], 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, c, 1))
                for name, c in (("heat", CLASSES), ("size", 2), ("offset", 2))
            }
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.body(x)
        y = features[-1]
        for i in range(len(self.ups) - 1, -1, -1):
            y = self.ups[i](y) + features[i]
        out = {name: head(y) for name, head in self.heads.items()}
        heat = out["heat"].sigmoid()
        heat = heat * (F.max_pool2d(heat, 3, 1, 1) == heat)
        n, _, h, w = heat.shape
        scores, index = heat.view(n, -1).topk(self.keep)
        cell = index % (h * w)
        size, offset = (
            out[k].flatten(2).transpose(1, 2).gather(1, cell[..., None].expand(-1, -1, 2))
            for k in ("size", "offset")
        )
        centre = torch.stack((cell % w, cell // w), -1) + offset
        return torch.cat((centre - size / 2, centre + size / 2), -1), scores, index // (h * w)


class PointHead(nn.Module):
    """Classes, box sides and centre-ness from towers shared by all levels (FCOS); a scale a level."""

    def __init__(self, w: int = 16, out: int = 24, pyramid: type[nn.Module] = FeaturePyramid):
        super().__init__()
        self.body = Stages(w)
        self.pyramid = pyramid(self.body.widths, out)

        def tower() -> nn.Sequential:
            return nn.Sequential(
                *(
                    layer
                    for _ in range(2)
                    for layer in (nn.Conv2d(out, out, 3, padding=1), nn.GroupNorm(4, out), nn.ReLU())
                )
            )

        self.cls_tower, self.box_tower = tower(), tower()
        self.cls, self.box = nn.Conv2d(out, CLASSES, 3, padding=1), nn.Conv2d(out, 4, 3, padding=1)
        self.centre = nn.Conv2d(out, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cls, box, centre = [], [], []
        for i, level in enumerate(self.pyramid(self.body(x))):
            c, b = self.cls_tower(level), self.box_tower(level)
            cls.append(self.cls(c).flatten(2))
            box.append((self.scales[i] * self.box(b)).exp().flatten(2))
            centre.append(self.centre(b).flatten(2))
        return torch.cat(cls, 2), torch.cat(box, 2), torch.cat(centre, 2)


class SingleShot(nn.Module):
    """Default boxes on several maps, an L2 norm with a scale on the first, boxes decoded and the best ones kept."""

    def __init__(self, w: int = 16, anchors: int = 4, keep: int = 15):
        super().__init__()
        self.body, self.keep, self.anchors = Stages(w), keep, anchors
        widths = self.body.widths
        self.scale = nn.Parameter(torch.full((widths[0],), 20.0))
        self.extra = nn.Sequential(
            nn.Conv2d(widths[-1], 24, 1), nn.ReLU(), nn.Conv2d(24, 48, 3, 2, 1), nn.ReLU()
        )
        widths = [*widths, 48]
        self.loc = nn.ModuleList(nn.Conv2d(c, anchors * 4, 3, padding=1) for c in widths)
        self.conf = nn.ModuleList(nn.Conv2d(c, anchors * CLASSES, 3, padding=1) for c in widths)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.body(x)
        maps[0] = F.normalize(maps[0], dim=1) * self.scale[None, :, None, None]
        maps.append(self.extra(maps[-1]))
        n = x.shape[0]
        loc = torch.cat(
            [m(f).permute(0, 2, 3, 1).reshape(n, -1, 4) for m, f in zip(self.loc, maps, strict=True)], 1
        )
        conf = torch.cat(
            [m(f).permute(0, 2, 3, 1).reshape(n, -1, CLASSES) for m, f in zip(self.conf, maps, strict=True)],
            1,
        )
        scores = conf.softmax(-1)[..., 1:].amax(-1)
        best, index = scores.topk(self.keep, 1)
        return loc.gather(1, index[..., None].expand(-1, -1, 4)), best


class QueryDetector(nn.Module):
    """A transformer over pixels and learned object queries (DETR)."""

    def __init__(self, w: int = 8, width: int = 32, heads: int = 4, queries: int = 7):
        super().__init__()
        self.body = Stages(w)
        self.project = nn.Conv2d(self.body.widths[-1], width, 1)
        self.transformer = nn.Transformer(width, heads, 2, 2, 48, batch_first=True, dropout=0.0)
        self.query = nn.Parameter(torch.rand(queries, width))
        self.row, self.column = (
            nn.Parameter(torch.rand(50, width // 2)),
            nn.Parameter(torch.rand(50, width // 2)),
        )
        self.cls = nn.Linear(width, CLASSES + 1)
        self.box = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.project(self.body(x)[-1])
        n, _, h, w = y.shape
        position = torch.cat(
            (
                self.column[:w].unsqueeze(0).repeat(h, 1, 1),
                self.row[:h].unsqueeze(1).repeat(1, w, 1),
            ),
            -1,
        ).flatten(0, 1)
        y = self.transformer(position + y.flatten(2).transpose(1, 2), self.query.expand(n, -1, -1))
        return {"logits": self.cls(y), "boxes": self.box(y).sigmoid()}


class DeformableAttention(nn.Module):
    """Each query reads a few sampled points of every level (multi-scale deformable attention in plain torch)."""

    def __init__(self, width: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query: Tensor, reference: Tensor, flat: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        n, q, c = query.shape
        value = self.value(flat).view(n, flat.shape[1], self.heads, c // self.heads)
        offsets = self.offsets(query).view(n, q, self.heads, self.levels, self.points, 2)
        weights = self.weights(query).view(n, q, self.heads, self.levels * self.points).softmax(-1)
        places = (reference[:, :, None, None, None, :] + 0.1 * offsets.tanh()) * 2 - 1
        sampled = []
        for level, part in enumerate(value.split([h * w for h, w in sizes], 1)):
            h, w = sizes[level]
            image = part.flatten(2).transpose(1, 2).reshape(n * self.heads, c // self.heads, h, w)
            grid = places[:, :, :, level].transpose(1, 2).flatten(0, 1)
            sampled.append(F.grid_sample(image, grid, align_corners=False))
        weights = weights.transpose(1, 2).reshape(n * self.heads, 1, q, self.levels * self.points)
        mixed = (torch.stack(sampled, -2).flatten(-2) * weights).sum(-1)
        return self.out(mixed.view(n, c, q).transpose(1, 2))


class DeformableDetector(nn.Module):
    """Queries refined by deformable attention over three levels; boxes are corrected layer by layer."""

    def __init__(self, w: int = 8, width: int = 24, queries: int = 7, layers: int = 2):
        super().__init__()
        self.body = Stages(w)
        self.project = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, width, 1), nn.GroupNorm(4, width)) for c in self.body.widths
        )
        self.level = nn.Parameter(torch.randn(3, width))
        self.query = nn.Embedding(queries, 2 * width)
        self.reference = nn.Linear(width, 2)
        self.cross = nn.ModuleList(DeformableAttention(width, 4, 3, 2) for _ in range(layers))
        self.own = nn.ModuleList(nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 * layers))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 40), nn.ReLU(), nn.Linear(40, width)) for _ in range(layers)
        )
        self.box = nn.ModuleList(nn.Linear(width, 4) for _ in range(layers))
        self.cls = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = [p(f) for p, f in zip(self.project, self.body(x), strict=True)]
        sizes = [(f.shape[2], f.shape[3]) for f in maps]
        flat = torch.cat([f.flatten(2).transpose(1, 2) + self.level[i] for i, f in enumerate(maps)], 1)
        position, y = self.query.weight.chunk(2, -1)
        y = y.unsqueeze(0).expand(x.shape[0], -1, -1)
        reference = self.reference(position).sigmoid().unsqueeze(0).expand(x.shape[0], -1, -1)
        boxes = torch.cat((reference, torch.full_like(reference, 0.1)), -1)
        for i, (cross, own, feed) in enumerate(zip(self.cross, self.own, self.feed, strict=True)):
            q = y + position
            y = self.norms[3 * i](y + own(q, q, y)[0])
            y = self.norms[3 * i + 1](y + cross(y + position, boxes[..., :2], flat, sizes))
            y = self.norms[3 * i + 2](y + feed(y))
            boxes = (self.box[i](y) + torch.logit(boxes, 1e-3)).sigmoid()
        return {"logits": self.cls(y), "boxes": boxes}


class MaskQueries(nn.Module):
    """Queries whose embeddings are multiplied with pixel embeddings to masks (MaskFormer)."""

    def __init__(self, w: int = 8, width: int = 24, queries: int = 7):
        super().__init__()
        self.body = Stages(w)
        self.pyramid = FeaturePyramid(self.body.widths, width)
        layer = nn.TransformerDecoderLayer(width, 4, 40, batch_first=True, dropout=0.0)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.query = nn.Embedding(queries, width)
        self.cls, self.mask = nn.Linear(width, CLASSES + 1), nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        levels = self.pyramid(self.body(x))
        memory = levels[-1].flatten(2).permute(0, 2, 1)
        y = self.decoder(self.query.weight[None].repeat(x.shape[0], 1, 1), memory)
        return self.cls(y), torch.einsum("bqc,bchw->bqhw", self.mask(y), levels[0])


class TwoStage(nn.Module):
    """Proposals by objectness; their features are cut out by bilinear sampling in plain torch, then classified."""

    def __init__(self, w: int = 8, out: int = 24, keep: int = 6, side: int = 4):
        super().__init__()
        self.body, self.keep, self.side = Stages(w), keep, side
        self.pyramid = FeaturePyramid(self.body.widths, out)
        self.rpn = nn.Sequential(nn.Conv2d(out, out, 3, padding=1), nn.ReLU())
        self.objectness, self.delta = nn.Conv2d(out, 1, 1), nn.Conv2d(out, 4, 1)
        self.head = nn.Sequential(nn.Linear(out * side * side, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU())
        self.cls, self.box = nn.Linear(40, CLASSES), nn.Linear(40, 4 * CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        level = self.pyramid(self.body(x))[0]
        y = self.rpn(level)
        n = x.shape[0]
        index = self.objectness(y).flatten(1).topk(self.keep, 1).indices
        boxes = self.delta(y).flatten(2).sigmoid().gather(2, index[:, None].expand(-1, 4, -1))
        centre, size = boxes[:, :2].transpose(1, 2) * 2 - 1, boxes[:, 2:].transpose(1, 2)
        steps = torch.linspace(-1, 1, self.side).to(level)
        window = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)
        grid = centre[:, :, None, None] + size[:, :, None, None] * window
        regions = F.grid_sample(level, grid.flatten(1, 2), align_corners=False)
        regions = regions.view(n, -1, self.keep, self.side, self.side).transpose(1, 2).flatten(2)
        y = self.head(regions)
        return self.cls(y), self.box(y)


class AtrousPyramid(nn.Module):
    """DeepLabv3+: parallel dilated convolutions with an image-level branch, joined with low-level features."""

    def __init__(self, w: int = 8, out: int = 24):
        super().__init__()
        self.body = Stages(w)
        low, _, top = self.body.widths
        self.branches = nn.ModuleList(
            [_conv(top, out), *(nn.Conv2d(top, out, 3, padding=d, dilation=d) for d in (2, 3, 5))]
        )
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(top, out, 1), nn.ReLU())
        self.join, self.low = _conv(5 * out, out), _conv(low, 12)
        self.cls = nn.Sequential(_conv(out + 12, out, 3), nn.Conv2d(out, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        low, _, top = self.body(x)
        parts = [branch(top) for branch in self.branches]
        parts.append(F.interpolate(self.pooled(top), size=top.shape[-2:], mode="bilinear"))
        y = F.interpolate(self.join(torch.cat(parts, 1)), size=low.shape[-2:], mode="bilinear")
        y = self.cls(torch.cat((y, self.low(low)), 1))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


class HandUNet(nn.Module):
    """The U-Net that everybody writes: double convolutions, pads to the skip's size, concatenation."""

    def __init__(self, w: int = 8, bilinear: bool = False):
        super().__init__()

        def double(a: int, b: int) -> nn.Sequential:
            layers = []
            for c in (a, b):
                layers += [
                    nn.Conv2d(c, b, 3, padding=1, bias=False),
                    nn.BatchNorm2d(b),
                    nn.ReLU(inplace=True),
                ]
            return nn.Sequential(*layers)

        self.inc = double(3, w)
        self.downs = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), double(w << i, w << (i + 1))) for i in range(3)
        )
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(w << (i + 1), w << i, 1))
            if bilinear
            else nn.ConvTranspose2d(w << (i + 1), w << i, 2, 2)
            for i in (2, 1, 0)
        )
        self.convs = nn.ModuleList(double(w << (i + 1), w << i) for i in (2, 1, 0))
        self.out = nn.Conv2d(w, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.inc(x)]
        for down in self.downs:
            skips.append(down(skips[-1]))
        y = skips.pop()
        for up, conv in zip(self.ups, self.convs, strict=True):
            y, skip = up(y), skips.pop()
            dy, dx = skip.shape[2] - y.shape[2], skip.shape[3] - y.shape[3]
            y = F.pad(y, (dx // 2, dx - dx // 2, dy // 2, dy - dy // 2))
            y = conv(torch.cat((skip, y), 1))
        return self.out(y)


class HighResolution(nn.Module):
    """Two resolutions side by side, exchanged by sums (HRNet)."""

    def __init__(self, w: int = 12):
        super().__init__()
        self.stem = _conv(3, w, 3, 2)
        self.split = _conv(w, 2 * w, 3, 2)
        self.high = nn.ModuleList(Bottleneck(w, w) for _ in range(2))
        self.low = nn.ModuleList(Bottleneck(2 * w, 2 * w) for _ in range(2))
        self.up = nn.ModuleList(_conv(2 * w, w, act=False) for _ in range(2))
        self.down = nn.ModuleList(_conv(w, 2 * w, 3, 2, act=False) for _ in range(2))
        self.out = nn.Conv2d(3 * w, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.stem(x)
        low = self.split(high)
        for i in range(2):
            a, b = self.high[i](high), self.low[i](low)
            high = F.relu(a + F.interpolate(self.up[i](b), scale_factor=2))
            low = F.relu(b + self.down[i](a))
        return self.out(torch.cat((high, F.interpolate(low, scale_factor=2, mode="bilinear")), 1))


class Hourglass(nn.Module):
    """Two stacked hourglasses with intermediate heat maps fed back (pose estimation)."""

    def __init__(self, w: int = 16, joints: int = 5):
        super().__init__()
        self.stem = _conv(3, w, 3, 2)
        self.down = nn.ModuleList(Bottleneck(w, w) for _ in range(4))
        self.up = nn.ModuleList(Bottleneck(w, w) for _ in range(4))
        self.heat = nn.ModuleList(nn.Conv2d(w, joints, 1) for _ in range(2))
        self.back, self.feed = nn.Conv2d(joints, w, 1), nn.Conv2d(w, w, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, found = self.stem(x), []
        for i in range(2):
            a = self.down[2 * i](F.max_pool2d(x, 2))
            b = self.down[2 * i + 1](F.max_pool2d(a, 2))
            y = self.up[2 * i](F.interpolate(b, scale_factor=2) + a)
            y = self.up[2 * i + 1](F.interpolate(y, scale_factor=2) + x)
            found.append(self.heat[i](y))
            x = x + self.feed(y) + self.back(found[-1])
        return found


class ProtoMasks(nn.Module):
    """Prototype masks combined by coefficients a cell (YOLACT style)."""

    def __init__(self, w: int = 8, out: int = 24, protos: int = 6):
        super().__init__()
        self.body = Stages(w)
        self.pyramid = FeaturePyramid(self.body.widths, out)
        self.proto = nn.Sequential(
            nn.Conv2d(out, out, 3, padding=1),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(out, protos, 1),
        )
        self.tower = nn.Sequential(nn.Conv2d(out, out, 3, padding=1), nn.ReLU())
        self.coefficients, self.cls = nn.Conv2d(out, protos, 1), nn.Conv2d(out, CLASSES, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        levels = self.pyramid(self.body(x))
        proto = self.proto(levels[0]).relu().permute(0, 2, 3, 1)
        towers = [self.tower(level) for level in levels]
        cls = torch.cat([self.cls(t).flatten(2) for t in towers], 2).softmax(1)
        coefficients = torch.cat([self.coefficients(t).tanh().flatten(2) for t in towers], 2)
        best = cls[:, 1:].amax(1).topk(4, 1).indices
        picked = coefficients.gather(2, best[:, None].expand(-1, coefficients.shape[1], -1))
        return (proto @ picked[:, None]).sigmoid(), cls.gather(2, best[:, None].expand(-1, CLASSES, -1))
