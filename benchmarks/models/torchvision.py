"""Every model that torchvision lists; the quantizable ones in floating point, as they are before quantization."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import regnet

from benchmarks.suites.case import Cases, noise, tensor_inputs

IMAGE = (2, 3, 104, 104)
# Classification models that insist on a size, or whose auxiliary head in train mode does (Inception).
IMAGE_BY_PREFIX = {
    "vit_": (2, 3, 224, 224),
    "maxvit_": (2, 3, 224, 224),
    "inception": (2, 3, 299, 299),
    "quantized_inception": (2, 3, 299, 299),
}
CLIP = (2, 3, 8, 64, 64)
CLIP_BY_PREFIX = {"s3d": (2, 3, 16, 224, 224), "mvit": (1, 3, 16, 224, 224)}
FRAME = (2, 3, 128, 136)

# Thresholds at zero: with random weights nothing would be detected otherwise. Few candidates: among many, some scores
# lie so close together that rounding decides their order.
RCNN = {
    "min_size": 160,
    "max_size": 224,
    "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_test": 50,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 20,
}
SINGLE_SHOT = {"score_thresh": 0.0, "topk_candidates": 50, "detections_per_img": 20}
RESIZED_SINGLE_SHOT = {**SINGLE_SHOT, "min_size": 160, "max_size": 224}


def _detection_inputs(height: int, width: int, contrast: float) -> tuple[list[Tensor]]:
    """One image around ImageNet's mean colour, in the list that detection models take."""
    mean = torch.tensor([0.48, 0.46, 0.41])[:, None, None]
    return ([mean + contrast * noise(3, height, width)],)


def _starting_with(name: str, table: dict[str, Any], default: Any) -> Any:
    """The entry of `table` whose key `name` starts with."""
    return next((value for prefix, value in table.items() if name.startswith(prefix)), default)


def _get(name: str, **options: Any) -> nn.Module:
    return models.get_model(name, weights=None, **options)


def _classification(name: str) -> None:
    inputs = partial(tensor_inputs, _starting_with(name, IMAGE_BY_PREFIX, IMAGE))
    if name in NARROWED:
        CASES.add(name, NARROWED[name], inputs, "logits; built at half its width")
    else:
        CASES.add(name, partial(_get, name), inputs, "logits")


def _quantizable(name: str) -> None:
    inputs = partial(tensor_inputs, _starting_with(name, IMAGE_BY_PREFIX, IMAGE))
    CASES.add(name, partial(_get, name, quantize=False), inputs, "logits; float, quantizable")


def _segmentation(name: str) -> None:
    build = partial(_get, name, weights_backbone=None)
    CASES.add(name, build, partial(tensor_inputs, IMAGE), "a dict of class maps")


def _video(name: str) -> None:
    shape = _starting_with(name, CLIP_BY_PREFIX, CLIP)
    CASES.add(name, partial(_get, name), partial(tensor_inputs, shape), "logits")


def _optical_flow(name: str) -> None:
    inputs = partial(tensor_inputs, FRAME, FRAME)
    CASES.add(name, partial(_get, name), inputs, "two frames in, twelve refined flows out")


def _detection(name: str) -> None:
    options = {"retinanet": RESIZED_SINGLE_SHOT, "fcos": RESIZED_SINGLE_SHOT, "ssd": SINGLE_SHOT}
    kwargs = _starting_with(name, options, RCNN)
    # SSD300 multiplies by 255 and normalises nothing afterwards: of a full image its scores would be all 0 or 1.
    image = _starting_with(
        name, {"ssd300": (300, 300, 1 / 255), "ssdlite320": (320, 320, 0.2)}, (160, 192, 0.2)
    )
    build = partial(_get, name, weights_backbone=None, **kwargs)
    note = "a list of images in, a list of dicts out; few candidates, score threshold 0, small images"
    CASES.add(name, build, partial(_detection_inputs, *image), note)


def _narrow_vit_h_14() -> nn.Module:
    """ViT-H/14 with half of its width: 158 M parameters in place of 632 M."""
    return models.VisionTransformer(
        224, patch_size=14, num_layers=32, num_heads=16, hidden_dim=640, mlp_dim=2560
    )


def _narrow_regnet_y_128gf() -> nn.Module:
    """RegNetY-128GF with half of its width: 162 M parameters in place of 645 M."""
    block = regnet.BlockParams.from_init_params(
        depth=27, w_0=232, w_a=80.4, w_m=2.52, group_width=132, se_ratio=0.25
    )
    return regnet.RegNet(block, norm_layer=partial(nn.BatchNorm2d, eps=1e-05, momentum=0.1))


NARROWED = {"vit_h_14": _narrow_vit_h_14, "regnet_y_128gf": _narrow_regnet_y_128gf}
CASES = Cases()
for _module, _add in {
    models: _classification,
    models.quantization: _quantizable,
    models.segmentation: _segmentation,
    models.video: _video,
    models.optical_flow: _optical_flow,
    models.detection: _detection,
}.items():
    for _name in models.list_models(module=_module):
        _add(_name)
