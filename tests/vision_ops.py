"""torchvision's C++ operators in plain torch, so that torchvision imports beside a CPU-only torch.

The torchvision wheel on PyPI links its operators against CUDA; beside a CPU-only torch they cannot be loaded and
`import torchvision` fails. Importing this module *before* torchvision defines the same operators, with the same
schemas, through `torch.library`; torchvision then adds its own fake kernels and autograd formulas to them, so that they
work on fake tensors, under dispatch modes and in backward passes like the originals. Where the compiled operators do
load, this module changes nothing.

Implemented: `nms`, `roi_align` with its backward, and the forward of `deform_conv2d`. The others exist (with fake
kernels where torchvision has them) and raise `NotImplementedError` when they are run on data.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ROI = "Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
SHAPE = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
DEFORM = (
    "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, SymInt stride_w, "
    "SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, SymInt offset_groups, "
    "bool use_mask"
)
SCHEMAS = (
    "_cuda_version() -> int",
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "box_iou_rotated(Tensor boxes1, Tensor boxes2) -> Tensor",
    f"roi_align(Tensor input, {ROI}, int sampling_ratio, bool aligned) -> Tensor",
    f"_roi_align_backward(Tensor grad, {ROI}, {SHAPE}, int sampling_ratio, bool aligned) -> Tensor",
    "qroi_align(Tensor input, Tensor rois, float input_scale, int input_zero_point, float rois_scale, "
    "int rois_zero_point, float spatial_scale, SymInt pooled_height, SymInt pooled_width, int sampling_ratio, "
    "bool aligned) -> Tensor",
    f"roi_pool(Tensor input, {ROI}) -> (Tensor, Tensor)",
    f"_roi_pool_backward(Tensor grad, {ROI.replace(',', ', Tensor argmax,', 1)}, {SHAPE}) -> Tensor",
    f"ps_roi_align(Tensor input, {ROI}, int sampling_ratio) -> (Tensor, Tensor)",
    f"_ps_roi_align_backward(Tensor grad, {ROI.replace(',', ', Tensor channel_mapping,', 1)}, int sampling_ratio, "
    f"{SHAPE}) -> Tensor",
    f"ps_roi_pool(Tensor input, {ROI}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward(Tensor grad, {ROI.replace(',', ', Tensor channel_mapping,', 1)}, {SHAPE}) -> Tensor",
    f"deform_conv2d({DEFORM}) -> Tensor",
    f"_deform_conv2d_backward(Tensor grad, {DEFORM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes `[N, 4]` that no better kept one overlaps by more than `iou_threshold`, best first."""
    order = scores.argsort(descending=True, stable=True)
    x1, y1, x2, y2 = boxes = dets[order].unbind(1)
    area = (x2 - x1) * (y2 - y1)
    kept = []
    alive = torch.ones(len(order), dtype=torch.bool, device=dets.device)
    for i in range(len(order)):
        if not alive[i]:
            continue
        kept.append(i)
        left, top, right, bottom = (side[i] for side in boxes)
        width = (x2.clamp(max=right) - x1.clamp(min=left)).clamp(min=0)
        height = (y2.clamp(max=bottom) - y1.clamp(min=top)).clamp(min=0)
        shared = width * height
        alive &= ~(shared / (area + area[i] - shared) > iou_threshold)
    return order[torch.tensor(kept, dtype=torch.long, device=dets.device)]


def _sampling_matrix(start: Tensor, extent: Tensor, bins: int, size: int, sampling_ratio: int) -> Tensor:
    """Weights `[K, bins, size]` with which each bin of each region averages the pixels along one side of the image.

    `start` and `extent` `[K]` place the regions on that side. Every bin holds `sampling_ratio` equidistant points (as
    many as it covers pixels where the ratio is not positive), each read by linear interpolation: a hat over pixels.
    """
    if sampling_ratio > 0:
        points = torch.full_like(extent, sampling_ratio)
    else:
        points = (extent / bins).ceil()
    most = int(points.max()) if len(points) else 0
    step = torch.arange(most, dtype=start.dtype, device=start.device)
    bin_width = (extent / bins)[:, None, None]
    position = (
        start[:, None, None]
        + torch.arange(bins, dtype=start.dtype, device=start.device)[None, :, None] * bin_width
        + (step + 0.5) * bin_width / points.clamp(min=1)[:, None, None]
    )  # [K, bins, most]
    valid = (position >= -1) & (position <= size) & (step < points[:, None, None])
    pixels = torch.arange(size, dtype=start.dtype, device=start.device)
    hats = (1 - (position.clamp(0, size - 1)[..., None] - pixels).abs()).clamp(min=0)
    return (hats * valid[..., None]).sum(2) / points.clamp(min=1)[:, None, None]


def _roi_matrices(
    rois: Tensor,
    scale: float,
    bins: tuple[int, int],
    size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Tensor, Tensor]:
    """The two sampling matrices of `roi_align`, `[K, bins_h, height]` and `[K, bins_w, width]`."""
    corners = rois[:, 1:] * scale - (0.5 if aligned else 0.0)
    extent = corners[:, 2:] - corners[:, :2]
    if not aligned:
        extent = extent.clamp(min=1)
    columns = _sampling_matrix(corners[:, 0], extent[:, 0], bins[1], size[1], sampling_ratio)
    rows = _sampling_matrix(corners[:, 1], extent[:, 1], bins[0], size[0], sampling_ratio)
    return rows, columns


def roi_align(
    features: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Averages of bilinear samples in each bin of each region: `[N, C, H, W]`, `[K, 5]` to `[K, C, bins_h, bins_w]`.

    Bilinear weights, and their average over a grid of points, factor into a row part and a column part; so the operator
    is a product with one matrix on either side.
    """
    bins, size = (pooled_height, pooled_width), (features.shape[2], features.shape[3])
    rows, columns = _roi_matrices(rois, spatial_scale, bins, size, sampling_ratio, aligned)
    output = features.new_empty((len(rois), features.shape[1], *bins))
    image_of = rois[:, 0].long()
    for image in image_of.unique().tolist():
        mine = image_of == image
        half = torch.einsum("kph,chw->kcpw", rows[mine], features[image])
        output[mine] = torch.einsum("kcpw,kqw->kcpq", half, columns[mine])
    return output


def roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch_size: int,
    channels: int,
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Gradient of `roi_align` for its features `[N, C, H, W]`: the transposed products."""
    bins = (pooled_height, pooled_width)
    rows, columns = _roi_matrices(rois, spatial_scale, bins, (height, width), sampling_ratio, aligned)
    result = grad.new_zeros((batch_size, channels, height, width))
    image_of = rois[:, 0].long()
    for image in image_of.unique().tolist():
        mine = image_of == image
        half = torch.einsum("kcpq,kqw->kcpw", grad[mine], columns[mine])
        result[image] = torch.einsum("kph,kcpw->chw", rows[mine], half)
    return result


def _bilinear(features: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """`features` `[M, C, H, W]` read at positions `y`, `x` `[M, P]`, zero outside: `[M, C, P]`."""
    channels, height, width = features.shape[1:]
    flat = features.flatten(2)
    top, left = y.floor(), x.floor()
    result = features.new_zeros((len(features), channels, y.shape[1]))
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        weight = (1 - (y - row).abs()) * (1 - (x - column).abs())
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
        values = flat.gather(2, index[:, None].expand(-1, channels, -1))
        result += values * (weight * inside)[:, None]
    return result


def deform_conv2d(
    features: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Tensor:
    """Convolution whose kernel taps are displaced by `offset` `[N, 2·offset_groups·kh·kw, H', W']`."""
    batch, channels = features.shape[:2]
    taps_h, taps_w = weight.shape[2:]
    taps, (height, width) = taps_h * taps_w, offset.shape[2:]
    shift = offset.reshape(batch * offset_groups, taps_h, taps_w, 2, height, width)

    def base(size: int, stride: int, pad: int, taps: int, dilation: int) -> Tensor:
        steps = torch.arange(size, device=features.device) * stride - pad
        return (torch.arange(taps, device=features.device) * dilation)[:, None] + steps  # [taps, size]

    rows = base(height, stride_h, pad_h, taps_h, dilation_h)[:, None, :, None]  # [kh, 1, H', 1]
    columns = base(width, stride_w, pad_w, taps_w, dilation_w)[None, :, None, :]  # [1, kw, 1, W']
    y, x = (shift[:, :, :, 0] + rows).flatten(1), (shift[:, :, :, 1] + columns).flatten(1)
    sampled = _bilinear(features.reshape(batch * offset_groups, -1, *features.shape[2:]), y, x)
    if use_mask:
        sampled = sampled * mask.reshape(batch * offset_groups, 1, -1)
    patches = sampled.reshape(batch, groups, channels // groups * taps, height * width)
    kernel = weight.reshape(groups, -1, patches.shape[2])
    result = torch.einsum("ngip,goi->ngop", patches, kernel).reshape(batch, -1, height, width)
    return result + bias[:, None, None]


def _missing(name: str) -> Callable[..., Any]:
    """A kernel for an operator that has no plain-torch implementation here."""

    def kernel(*_: Any) -> Any:
        raise NotImplementedError(
            f"torchvision::{name} has no plain-torch implementation in tests/vision_ops.py"
        )

    return kernel


KERNELS: dict[str, Callable[..., Any]] = {
    "nms": nms,
    "roi_align": roi_align,
    "_roi_align_backward": roi_align_backward,
    "deform_conv2d": deform_conv2d,
}


def _compiled_ops_load(folder: Path) -> bool:
    """Whether torchvision's own operators can be loaded into this torch."""
    libraries = [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]
    try:
        for library in libraries:
            torch.ops.load_library(str(library))
    except OSError:
        return False
    return bool(libraries)


def _define_ops() -> torch.library.Library:
    """Define every operator of `SCHEMAS` with its CPU kernel."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        library.define(schema)
        if name == "_cuda_version":  # takes no tensor, so no device chooses a kernel
            library.impl(name, lambda: -1, "CompositeExplicitAutograd")
        else:
            library.impl(name, KERNELS.get(name, _missing(name)), "CPU")
    return library


@functools.cache
def install() -> torch.library.Library | None:
    """Make `import torchvision` work; nothing happens where it works by itself. Where it is not installed, its operators exist.

    Returns:
        What keeps the definitions alive (the cache holds it), None where nothing had to be defined.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return _define_ops()
    if _compiled_ops_load(Path(spec.origin).parent):
        return None
    library = _define_ops()
    load = torch.ops.load_library

    def load_others(path: str) -> None:
        if not Path(path).name.startswith("_C"):
            load(path)

    with mock.patch.object(torch.ops, "load_library", load_others):
        import torchvision  # noqa: F401  # finds its operators defined and registers fakes and gradients for them
    return library


install()
