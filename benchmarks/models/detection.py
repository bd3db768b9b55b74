"""Detection and dense prediction: hand-written detectors, segmentation-models-pytorch, MONAI."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.models import detectors as d
from benchmarks.suites.case import Cases, Inputs, noise, tensor_inputs

IMAGE = (2, 3, 64, 96)


def _path(block: type[nn.Module], bins: bool = True, **options: Any) -> nn.Module:
    """A path-aggregation detector, with a distribution head where `bins`."""
    light = options.pop("light", False)
    head = d.DistributionHead((32, 64, 128), (8, 16, 32), light=light) if bins else None
    return d.PathAggregation(block, head, **options)


HAND: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "yolo_v3": (d.DarkNet, "raw grids of three scales"),
    "yolo_v4": (partial(_path, d.CSP, bins=False, spp=d.ParallelPooling), "decoded anchors and raw grids"),
    "yolo_v5": (partial(_path, d.CSP, bins=False), "decoded anchors and raw grids"),
    "yolo_v8": (partial(_path, d.SplitReuse), "decoded boxes and scores"),
    "yolo_v8_split": (partial(_path, d.SplitReuseSizes), "halves by their sizes"),
    "yolo_v8_nms": (lambda: d.Suppressed(_path(d.SplitReuse)), "greedy suppression in plain torch"),
    "yolo_v10": (lambda: d.EndToEnd(_path(d.SplitReuse, light=True)), "top-k in forward, depthwise head"),
    "yolo_v11": (partial(_path, d.SplitReuse, deep=True, psa=True, light=True), "attention over pixels"),
    "centernet": (d.CentreNet, "peaks by max pool and top-k"),
    "fcos": (d.PointHead, "towers shared by the levels"),
    "efficientdet": (partial(d.PointHead, pyramid=d.WeightedPyramid), "weighted pyramid"),
    "ssd": (d.SingleShot, "default boxes, top-k"),
    "detr": (d.QueryDetector, "nn.Transformer with learned queries"),
    "deformable_detr": (d.DeformableDetector, "sampled points of three levels"),
    "maskformer": (d.MaskQueries, "queries times pixels"),
    "two_stage": (d.TwoStage, "regions by bilinear sampling"),
    "yolact": (d.ProtoMasks, "prototype masks"),
    "deeplab_v3plus": (d.AtrousPyramid, "class maps"),
    "unet": (d.HandUNet, "class maps"),
    "unet_bilinear": (partial(d.HandUNet, bilinear=True), "class maps"),
    "hrnet": (d.HighResolution, "class maps"),
    "hourglass": (d.Hourglass, "two sets of heat maps"),
}


# Of segmentation-models-pytorch: architecture, encoder, further arguments.
SMP: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Unet": ("Unet", "resnet18", {}),
    "Unet_scse": ("Unet", "mobilenet_v2", {"decoder_attention_type": "scse"}),
    "Unet_classes": ("Unet", "efficientnet-b0", {"aux_params": {"classes": 4}}),
    "UnetPlusPlus": ("UnetPlusPlus", "resnet18", {}),
    "MAnet": ("MAnet", "resnet18", {}),
    "Linknet": ("Linknet", "resnet18", {}),
    "FPN": ("FPN", "resnet18", {}),
    "FPN_cat": ("FPN", "densenet121", {"decoder_merge_policy": "cat"}),
    "PSPNet": ("PSPNet", "resnet18", {}),
    "PAN": ("PAN", "resnet18", {}),
    "DeepLabV3": ("DeepLabV3", "resnet18", {}),
    "DeepLabV3Plus": ("DeepLabV3Plus", "timm-mobilenetv3_small_100", {}),
    "UPerNet": ("UPerNet", "resnet18", {}),
    "Segformer": ("Segformer", "mit_b0", {}),
    "DPT": ("DPT", "tu-vit_tiny_patch16_224", {"dynamic_img_size": True}),
}


SMP_IMAGES = {"DPT": (2, 3, 224, 224), "PAN": (2, 3, 128, 192)}


def _smp_build(architecture: str, encoder: str, options: dict[str, Any]) -> nn.Module:
    import segmentation_models_pytorch as smp

    model: nn.Module = getattr(smp, architecture)(encoder, encoder_weights=None, classes=5, **options)
    return model


CUBE = (2, 1, 32, 32, 48)
SQUARE = (2, 1, 64, 96)


def _shapes(*shapes: tuple[int, ...]) -> Callable[[], Inputs]:
    return partial(tensor_inputs, *shapes)


UNET = {"in_channels": 1, "out_channels": 3, "channels": (8, 16, 24), "strides": (2, 2)}
DYN = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "kernel_size": [3, 3, 3],
    "strides": [1, 2, 2],
    "upsample_kernel_size": [2, 2],
    "filters": [8, 12, 16],
}
VIT = {"hidden_size": 48, "mlp_dim": 64, "num_heads": 4}
DIFFUSION = {
    "spatial_dims": 2,
    "in_channels": 1,
    "num_res_blocks": 1,
    "channels": (16, 32),
    "attention_levels": (False, True),
    "norm_num_groups": 4,
    "num_head_channels": 8,
}
# Of monai.networks.nets: class, arguments, inputs.
MONAI: dict[str, tuple[str, dict[str, Any], Callable[[], Inputs]]] = {
    "UNet": ("UNet", {**UNET, "spatial_dims": 3, "num_res_units": 2}, _shapes(CUBE)),
    "UNet_plain": ("UNet", {**UNET, "spatial_dims": 2, "norm": "BATCH"}, _shapes(SQUARE)),
    "AttentionUnet": ("AttentionUnet", {**UNET, "spatial_dims": 3}, _shapes(CUBE)),
    "AutoEncoder": (
        "AutoEncoder",
        {**UNET, "spatial_dims": 3, "strides": (2, 2, 1), "inter_channels": (16, 16), "num_res_units": 1},
        _shapes(CUBE),
    ),
    "VarAutoEncoder": (
        "VarAutoEncoder",
        {
            "spatial_dims": 2,
            "in_shape": (1, 32, 48),
            "out_channels": 1,
            "latent_size": 6,
            "channels": (8, 16),
            "strides": (2, 2),
            "use_mean_at_inference": True,
        },
        _shapes((2, 1, 32, 48)),
    ),
    "BasicUNet": ("BasicUNet", {"features": (8, 8, 12, 16, 24, 8)}, _shapes(CUBE)),
    "BasicUNetPlusPlus": (
        "BasicUNetPlusPlus",
        {"features": (8, 8, 12, 16, 24, 8)},
        _shapes((1, 1, 32, 32, 32)),
    ),
    "FlexibleUNet": (
        "FlexibleUNet",
        {
            "in_channels": 1,
            "out_channels": 3,
            "backbone": "efficientnet-b0",
            "decoder_channels": (32, 24, 16, 12, 8),
        },
        _shapes(SQUARE),
    ),
    "DynUNet": ("DynUNet", DYN, _shapes(CUBE)),
    "DynUNet_residual": ("DynUNet", {**DYN, "res_block": True, "deep_supervision": False}, _shapes(CUBE)),
    "UNETR": (
        "UNETR",
        {"in_channels": 1, "out_channels": 3, "img_size": (32, 32, 48), "feature_size": 8, **VIT},
        _shapes(CUBE),
    ),
    "SwinUNETR": (
        "SwinUNETR",
        {"in_channels": 1, "out_channels": 3, "feature_size": 12},
        _shapes((1, 1, 32, 32, 64)),
    ),
    "SwinUNETR_v2": (
        "SwinUNETR",
        {"in_channels": 1, "out_channels": 3, "feature_size": 12, "use_v2": True, "spatial_dims": 2},
        _shapes(SQUARE),
    ),
    "SegResNet": ("SegResNet", {"init_filters": 8}, _shapes((1, 1, 16, 16, 24))),
    "SegResNet_batch": (
        "SegResNet",
        {"init_filters": 8, "norm": "batch", "upsample_mode": "deconv"},
        _shapes(CUBE),
    ),
    "SegResNetDS": ("SegResNetDS", {"init_filters": 8, "dsdepth": 2}, _shapes((1, 1, 32, 32, 48))),
    "SegResNetVAE": (
        "SegResNetVAE",
        {"input_image_size": (16, 16, 24), "vae_estimate_std": False, "vae_nz": 12},
        _shapes((1, 1, 16, 16, 24)),
    ),
    "VNet": ("VNet", {}, _shapes((1, 1, 32, 32, 48))),
    "HighResNet": ("HighResNet", {}, _shapes((1, 1, 16, 16, 24))),
    "DenseNet": (
        "DenseNet",
        {
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": 5,
            "init_features": 16,
            "growth_rate": 8,
            "block_config": (2, 3),
        },
        _shapes(CUBE),
    ),
    "EfficientNetBN": (
        "EfficientNetBN",
        {
            "model_name": "efficientnet-b0",
            "pretrained": False,
            "spatial_dims": 3,
            "in_channels": 1,
            "num_classes": 5,
        },
        _shapes((2, 1, 32, 32, 48)),
    ),
    "SEResNet50": ("SEResNet50", {"spatial_dims": 2, "in_channels": 1, "num_classes": 5}, _shapes(SQUARE)),
    "resnet18": ("resnet18", {"n_input_channels": 1, "num_classes": 5, "widen_factor": 0.5}, _shapes(CUBE)),
    "MedNeXt": (
        "MedNeXt",
        {"init_filters": 8, "kernel_size": 3, "blocks_down": (1, 1, 1, 1), "blocks_up": (1, 1, 1, 1)},
        _shapes((1, 1, 32, 32, 48)),
    ),
    "AHNet": ("AHNet", {"spatial_dims": 2, "upsample_mode": "nearest"}, _shapes((1, 1, 128, 128))),
    "HoVerNet": ("HoVerNet", {"out_classes": 3}, _shapes((1, 3, 256, 256))),
    "Quicknat": ("Quicknat", {"num_classes": 4, "num_filters": 12}, _shapes(SQUARE)),
    "DAF3D": ("DAF3D", {"in_channels": 1, "out_channels": 2}, _shapes((1, 1, 32, 32, 32))),
    "ViT": (
        "ViT",
        {
            "in_channels": 1,
            "img_size": (32, 32, 48),
            "patch_size": 16,
            "num_layers": 2,
            "classification": True,
            **VIT,
        },
        _shapes(CUBE),
    ),
    "ViTAutoEnc": (
        "ViTAutoEnc",
        {"in_channels": 1, "img_size": (32, 32, 48), "patch_size": 16, "num_layers": 2, **VIT},
        _shapes(CUBE),
    ),
    "LocalNet": (
        "LocalNet",
        {"spatial_dims": 3, "in_channels": 2, "num_channel_initial": 8, "extract_levels": (0, 1, 2)},
        _shapes((1, 2, 16, 16, 24)),
    ),
    "RegUNet": (
        "RegUNet",
        {"spatial_dims": 3, "in_channels": 2, "num_channel_initial": 8, "depth": 2},
        _shapes((1, 2, 16, 16, 24)),
    ),
    "GlobalNet": (
        "GlobalNet",
        {
            "image_size": (16, 16, 24),
            "spatial_dims": 3,
            "in_channels": 2,
            "num_channel_initial": 8,
            "depth": 2,
        },
        _shapes((2, 2, 16, 16, 24)),
    ),
    "VoxelMorph": ("VoxelMorph", {"spatial_dims": 2}, _shapes((2, 1, 64, 96), (2, 1, 64, 96))),
    "Generator": (
        "Generator",
        {"latent_shape": (12,), "start_shape": (16, 4, 6), "channels": (16, 8, 1), "strides": (2, 2, 1)},
        _shapes((2, 12)),
    ),
    "Critic": (
        "Critic",
        {"in_shape": (1, 32, 48), "channels": (8, 16), "strides": (2, 2)},
        _shapes((2, 1, 32, 48)),
    ),
    "Classifier": (
        "Classifier",
        {"in_shape": (1, 32, 48), "classes": 5, "channels": (8, 16), "strides": (2, 2)},
        _shapes((2, 1, 32, 48)),
    ),
    "PatchDiscriminator": (
        "PatchDiscriminator",
        {"spatial_dims": 2, "channels": 8, "in_channels": 1},
        _shapes(SQUARE),
    ),
    "VQVAE": (
        "VQVAE",
        {
            "spatial_dims": 2,
            "in_channels": 1,
            "out_channels": 1,
            "channels": (12, 16),
            "num_res_layers": 1,
            "num_res_channels": (12, 16),
            "downsample_parameters": ((2, 4, 1, 1),) * 2,
            "upsample_parameters": ((2, 4, 1, 1, 0),) * 2,
            "num_embeddings": 11,
            "embedding_dim": 8,
        },
        _shapes(SQUARE),
    ),
    "AutoencoderKL": (
        "AutoencoderKL",
        {
            "spatial_dims": 3,
            "num_res_blocks": (1, 1),
            "channels": (16, 16),
            "attention_levels": (False, True),
            "norm_num_groups": 4,
        },
        _shapes((1, 1, 16, 16, 24)),
    ),
    "SPADENet": (
        "SPADENet",
        {
            "spatial_dims": 2,
            "in_channels": 1,
            "out_channels": 1,
            "label_nc": 3,
            "input_shape": [32, 48],
            "channels": [8, 12],
            "z_dim": 6,
            "is_vae": False,
            "spade_intermediate_channels": 12,
        },
        _shapes((2, 3, 32, 48)),
    ),
    "DiffusionModelUNet": (
        "DiffusionModelUNet",
        {**DIFFUSION, "out_channels": 1, "with_conditioning": True, "cross_attention_dim": 12},
        lambda: (noise(2, 1, 16, 24), torch.tensor([3, 141]), noise(2, 5, 12)),
    ),
    "SPADEDiffusionModelUNet": (
        "SPADEDiffusionModelUNet",
        {**DIFFUSION, "out_channels": 1, "label_nc": 3, "spade_intermediate_channels": 12},
        lambda: (noise(2, 1, 16, 24), torch.tensor([3, 141]), noise(2, 3, 16, 24)),
    ),
    "ControlNet": (
        "ControlNet",
        {**DIFFUSION, "conditioning_embedding_num_channels": (8,)},
        lambda: (noise(2, 1, 16, 24), torch.tensor([3, 141]), noise(2, 1, 16, 24, seed=5)),
    ),
    "DecoderOnlyTransformer": (
        "DecoderOnlyTransformer",
        {
            "num_tokens": 11,
            "max_seq_len": 16,
            "attn_layers_dim": 24,
            "attn_layers_depth": 2,
            "attn_layers_heads": 4,
        },
        lambda: (torch.arange(14).reshape(2, 7) % 11,),
    ),
    "MILModel": (
        "MILModel",
        {"num_classes": 5, "mil_mode": "att_trans", "pretrained": False, "backbone": None},
        _shapes((2, 3, 3, 64, 64)),
    ),
}


def _monai_build(name: str, options: dict[str, Any]) -> nn.Module:
    from monai.networks import nets

    model: nn.Module = getattr(nets, name)(**options)
    return model


CASES = Cases()
for _name, (_network, _note) in HAND.items():
    CASES.add(_name, _network, _shapes(IMAGE), _note)
for _name, _row in SMP.items():
    _image = SMP_IMAGES.get(_name, IMAGE)
    CASES.add(f"smp_{_name}", partial(_smp_build, *_row), _shapes(_image), f"{_row[1]} encoder, class maps")
for _name, (_class, _options, _inputs) in MONAI.items():
    CASES.add(f"monai_{_name}", partial(_monai_build, _class, _options), _inputs, "built small")
