"""Classes of `diffusers.models`, built small: U-Nets, control nets, autoencoders, transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.suites.case import Cases, noise

TIME = torch.tensor([7, 453])
FRACTION = torch.tensor([0.2, 0.7])
Table = dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]]


def _tokens(count: int, *shape: int) -> Tensor:
    """Token numbers below `count`."""
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(9))


def _text(length: int, width: int) -> dict[str, Tensor]:
    """Encoded text for a batch of two."""
    return {"encoder_hidden_states": noise(2, length, width, seed=3)}


def _frame_text() -> dict[str, Tensor]:
    """Encoded text for two clips of three frames."""
    return {"encoder_hidden_states": noise(6, 5, 20, seed=3)}


def _mask(*lengths: int) -> Tensor:
    """A mask over tokens, a row a length, as long as the longest."""
    return (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()


def _places(*sizes: int) -> Tensor:
    """Coordinates `[tokens, len(sizes)]` of a grid in row-major order."""
    grids = torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij")
    return torch.stack([g.flatten() for g in grids], 1).float()


def _rotary(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[length, width]`."""
    angles = torch.arange(length)[:, None] / 10 ** (torch.arange(width // 2) / width)[None]
    angles = angles.repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


CROSS_DOWN = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 20,
    "attention_head_dim": 4,
}
CROSS_UP = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}


def _unet_inputs(**more: Any) -> dict[str, Any]:
    """A latent image, a time and a text."""
    return {"sample": noise(2, 4, 16, 24), "timestep": TIME, **_text(5, 20), **more}


UNETS: Table = {
    "UNet1DModel": (
        {
            "in_channels": 14,
            "out_channels": 14,
            "time_embedding_type": "positional",
            "use_timestep_embedding": True,
            "flip_sin_to_cos": False,
            "freq_shift": 1.0,
            "out_block_type": "OutConv1DBlock",
            "mid_block_type": "MidResTemporalBlock1D",
            "down_block_types": ("DownResnetBlock1D", "DownResnetBlock1D"),
            "up_block_types": ("UpResnetBlock1D",),
            "act_fn": "swish",
            "block_out_channels": (16, 32),
        },
        lambda: {"sample": noise(2, 14, 16), "timestep": TIME},
    ),
    "UNet1DModel-attention": (
        {
            "in_channels": 2,
            "out_channels": 2,
            "extra_in_channels": 64,
            "block_out_channels": (32, 32, 64),
            "sample_size": 64,
        },
        lambda: {"sample": noise(2, 2, 64), "timestep": torch.tensor(7)},
    ),
    "UNet2DModel": (
        {
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        lambda: {"sample": noise(2, 3, 16, 24), "timestep": TIME},
    ),
    "UNet2DModel-resnet": (
        {
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "resnet_time_scale_shift": "scale_shift",
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "num_class_embeds": 7,
            "class_embed_type": None,
        },
        lambda: {"sample": noise(2, 3, 16, 24), "timestep": TIME, "class_labels": torch.tensor([2, 5])},
    ),
    "UNet2DModel-score": (
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "norm_num_groups": None,
            "attention_head_dim": 4,
            "time_embedding_type": "fourier",
            "norm_eps": 1e-6,
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        },
        lambda: {"sample": noise(2, 3, 16, 24), "timestep": TIME},
    ),
    "UNet2DConditionModel": ({**CROSS_DOWN, **CROSS_UP}, _unet_inputs),
    "UNet2DConditionModel-xl": (
        {
            **CROSS_DOWN,
            **CROSS_UP,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (2, 4),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 12,
        },
        lambda: _unet_inputs(
            added_cond_kwargs={"text_embeds": noise(2, 12), "time_ids": noise(2, 6, seed=4).abs()}
        ),
    ),
    "UNet2DConditionModel-kandinsky": (
        {
            **CROSS_DOWN,
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "encoder_hid_dim": 12,
            "encoder_hid_dim_type": "image_proj",
            "addition_embed_type": "image",
            "resnet_time_scale_shift": "scale_shift",
            "class_embed_type": None,
        },
        lambda: {
            "sample": noise(2, 4, 16, 24),
            "timestep": TIME,
            "encoder_hidden_states": None,
            "added_cond_kwargs": {"image_embeds": noise(2, 12)},
        },
    ),
    "UNet3DConditionModel": (
        {
            **CROSS_DOWN,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        lambda: {"sample": noise(2, 4, 3, 16, 24), "timestep": TIME, **_text(5, 20)},
    ),
    "I2VGenXLUNet": (
        {
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 20,
            "attention_head_dim": 4,
        },
        lambda: {
            "sample": noise(2, 4, 3, 32, 64),
            "timestep": TIME,
            "fps": torch.tensor([5, 7]),
            "image_latents": noise(2, 4, 3, 32, 64, seed=5),
            "image_embeddings": noise(2, 20),
            **_text(5, 20),
        },
    ),
    "UNetMotionModel": (
        {
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 20,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
        },
        lambda: {"sample": noise(2, 4, 3, 16, 24), "timestep": TIME, **_frame_text()},
    ),
    "UNetSpatioTemporalConditionModel": (
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "cross_attention_dim": 20,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "num_attention_heads": (2, 4),
            "projection_class_embeddings_input_dim": 24,
            "addition_time_embed_dim": 8,
        },
        lambda: {
            "sample": noise(2, 3, 8, 16, 24),
            "timestep": TIME,
            "added_time_ids": noise(2, 3, seed=5).abs(),
            **_text(1, 20),
        },
    ),
    "Kandinsky3UNet": (
        {
            "time_embedding_dim": 16,
            "groups": 2,
            "attention_head_dim": 4,
            "layers_per_block": 2,
            "block_out_channels": (16, 32),
            "cross_attention_dim": 20,
            "encoder_hid_dim": 12,
        },
        lambda: {**_unet_inputs(), **_text(5, 12), "encoder_attention_mask": _mask(3, 5)},
    ),
    "StableCascadeUNet": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "conditioning_dim": 24,
            "block_out_channels": (16, 24),
            "num_attention_heads": (2, 3),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "clip_text_in_channels": 12,
            "clip_text_pooled_in_channels": 12,
            "clip_image_in_channels": 20,
            "switch_level": (False,),
        },
        lambda: {
            "sample": noise(2, 4, 16, 24),
            "timestep_ratio": FRACTION,
            "clip_text_pooled": noise(2, 1, 12),
            "clip_text": noise(2, 5, 12),
            "clip_img": noise(2, 1, 20),
        },
    ),
    "UVit2DModel": (
        {
            "hidden_size": 32,
            "cond_embed_dim": 12,
            "encoder_hidden_size": 20,
            "vocab_size": 29,
            "codebook_size": 28,
            "in_channels": 16,
            "block_out_channels": 16,
            "block_num_heads": 4,
            "num_res_blocks": 1,
            "micro_cond_encode_dim": 4,
            "micro_cond_embed_dim": 4 * 5,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 24,
        },
        lambda: {
            "input_ids": _tokens(28, 2, 8, 8),
            "pooled_text_emb": noise(2, 12),
            "micro_conds": noise(2, 5).abs(),
            **_text(5, 20),
        },
    ),
    "ControlNetModel": (
        {**CROSS_DOWN, "conditioning_embedding_out_channels": (8, 16)},
        lambda: _unet_inputs(controlnet_cond=noise(2, 3, 32, 48)),
    ),
    "ControlNetUnionModel": (
        {
            **CROSS_DOWN,
            "conditioning_embedding_out_channels": (8, 16),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 12,
            "num_trans_channel": 16,
            "num_trans_head": 2,
            "num_proj_channel": 16,
        },
        lambda: _unet_inputs(
            controlnet_cond=[noise(2, 3, 32, 48)],
            control_type=torch.tensor([[0, 1, 0, 0, 0, 0]] * 2).float(),
            control_type_idx=[1],
            conditioning_scale=[1.0],
            added_cond_kwargs={
                "text_embeds": noise(2, 12),
                "time_ids": noise(2, 6, seed=4).abs(),
                "control_type": torch.tensor([[0, 1, 0, 0, 0, 0]] * 2).float(),
            },
        ),
    ),
    "SparseControlNetModel": (
        {
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 20,
            "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "motion_num_attention_heads": 2,
        },
        lambda: {
            "sample": noise(2, 4, 3, 16, 24),
            "timestep": TIME,
            "controlnet_cond": noise(2, 4, 3, 16, 24, seed=6),
            "conditioning_mask": noise(2, 1, 3, 16, 24, seed=7),
            **_frame_text(),
        },
    ),
    "UNetControlNetXSModel": (
        {
            "block_out_channels": (16, 32),
            "norm_num_groups": 4,
            "cross_attention_dim": 20,
            "num_attention_heads": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "ctrl_block_out_channels": (4, 8),
            "ctrl_conditioning_embedding_out_channels": (2, 4),
            "ctrl_num_attention_heads": 2,
            "ctrl_max_norm_num_groups": 2,
        },
        lambda: _unet_inputs(controlnet_cond=noise(2, 3, 32, 48)),
    ),
    "T2IAdapter": (
        {"channels": [16, 24], "num_res_blocks": 2, "downscale_factor": 4},
        lambda: {"x": noise(2, 3, 32, 48)},
    ),
    "T2IAdapter-light": (
        {"channels": [16, 24], "num_res_blocks": 2, "downscale_factor": 4, "adapter_type": "light_adapter"},
        lambda: {"x": noise(2, 3, 32, 48)},
    ),
}

IMAGE = (2, 3, 32, 48)
CLIP = (1, 3, 9, 16, 24)


def _image() -> dict[str, Any]:
    return {"sample": noise(*IMAGE)}


def _clip() -> dict[str, Any]:
    return {"sample": noise(*CLIP)}


VAE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "norm_num_groups": 4,
}
AUTOENCODERS: Table = {
    "AutoencoderKL": ({**VAE, "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D")}, _image),
    "AutoencoderKLFlux2": (
        {**VAE, "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"), "latent_channels": 4},
        _image,
    ),
    "AsymmetricAutoencoderKL": (
        {
            "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
            "down_block_out_channels": (16, 32),
            "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
            "up_block_out_channels": (16, 32),
            "norm_num_groups": 4,
        },
        lambda: {"sample": noise(*IMAGE), "mask": torch.ones(2, 1, 32, 48)},
    ),
    "AutoencoderTiny": (
        {
            "encoder_block_out_channels": (16, 16),
            "decoder_block_out_channels": (16, 16),
            "num_encoder_blocks": (1, 2),
            "num_decoder_blocks": (2, 1),
        },
        _image,
    ),
    "VQModel": (
        {
            **VAE,
            "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
            "latent_channels": 3,
            "num_vq_embeddings": 29,
        },
        _image,
    ),
    "ConsistencyDecoderVAE": (
        {
            "encoder_block_out_channels": (16, 32),
            "encoder_down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
            "encoder_layers_per_block": 1,
            "encoder_norm_num_groups": 4,
            "decoder_block_out_channels": (16, 32),
            "decoder_down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
            "decoder_up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
            "decoder_layers_per_block": 1,
            "decoder_norm_num_groups": 4,
        },
        lambda: {"sample": noise(1, 3, 32, 48)},
    ),
    "AutoencoderDC": (
        {
            "latent_channels": 4,
            "attention_head_dim": 4,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (16, 16),
            "decoder_block_out_channels": (16, 16),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
            "upsample_block_type": "interpolate",
            "downsample_block_type": "conv",
        },
        _image,
    ),
    "AutoencoderDC-shuffle": (
        {
            "latent_channels": 4,
            "attention_head_dim": 4,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (16, 16),
            "decoder_block_out_channels": (16, 16),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), ()),
            "decoder_qkv_multiscales": ((), ()),
        },
        _image,
    ),
    "AutoencoderKLTemporalDecoder": (
        {
            "block_out_channels": (32, 64),
            "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        },
        lambda: {"sample": noise(3, 3, 32, 48), "num_frames": 3},
    ),
    "AutoencoderKLCogVideoX": (
        {
            "down_block_types": ("CogVideoXDownBlock3D", "CogVideoXDownBlock3D"),
            "up_block_types": ("CogVideoXUpBlock3D", "CogVideoXUpBlock3D"),
            "block_out_channels": (16, 32),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "temporal_compression_ratio": 2,
        },
        _clip,
    ),
    "AutoencoderKLCosmos": (
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (8, 16),
            "decode_block_out_channels": (8, 16),
            "attention_resolutions": (8,),
            "resolution": 32,
            "num_layers": 1,
            "patch_size": 2,
            "spatial_compression_ratio": 4,
            "temporal_compression_ratio": 4,
        },
        lambda: {"sample": noise(1, 3, 9, 32, 32)},
    ),
    "AutoencoderKLHunyuanImage": (
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "spatial_compression_ratio": 2,
            "sample_size": 32,
        },
        _image,
    ),
    "AutoencoderKLHunyuanVideo": (
        {
            "latent_channels": 4,
            "down_block_types": ("HunyuanVideoDownBlock3D", "HunyuanVideoDownBlock3D"),
            "up_block_types": ("HunyuanVideoUpBlock3D", "HunyuanVideoUpBlock3D"),
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "spatial_compression_ratio": 4,
            "temporal_compression_ratio": 4,
        },
        _clip,
    ),
    "AutoencoderKLLTXVideo": (
        {
            "latent_channels": 8,
            "block_out_channels": (8, 8),
            "down_block_types": ("LTXVideoDownBlock3D", "LTXVideoDownBlock3D"),
            "decoder_block_out_channels": (8, 8),
            "layers_per_block": (1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1),
            "spatio_temporal_scaling": (True, True),
            "decoder_spatio_temporal_scaling": (True, True),
            "decoder_inject_noise": (False, False, False),
            "downsample_type": ("conv", "conv"),
            "upsample_residual": (False, False),
            "upsample_factor": (1, 1),
            "patch_size": 2,
        },
        _clip,
    ),
    "AutoencoderKLMagvit": (
        {
            "latent_channels": 4,
            "block_out_channels": [16, 32],
            "down_block_types": ["SpatialDownBlock3D", "SpatialTemporalDownBlock3D"],
            "up_block_types": ["SpatialUpBlock3D", "SpatialTemporalUpBlock3D"],
            "layers_per_block": 1,
            "norm_num_groups": 4,
        },
        _clip,
    ),
    "AutoencoderKLMochi": (
        {
            "encoder_block_out_channels": (32, 32, 32, 32),
            "decoder_block_out_channels": (32, 32, 32, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
            "latent_channels": 4,
            "latents_mean": (0.0,) * 4,
            "latents_std": (1.0,) * 4,
        },
        lambda: {"sample": noise(1, 3, 7, 32, 48)},
    ),
    "AutoencoderKLWan": (
        {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]},
        _clip,
    ),
    "AutoencoderKLWan-residual": (
        {
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 2, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [True, False],
            "is_residual": True,
        },
        _clip,
    ),
    "AutoencoderKLQwenImage": (
        {
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [False],
        },
        lambda: {"sample": noise(1, 3, 1, 16, 24)},
    ),
    "AutoencoderOobleck": (
        {
            "encoder_hidden_size": 12,
            "downsampling_ratios": [2, 4],
            "channel_multiples": [1, 2],
            "decoder_channels": 12,
            "decoder_input_channels": 6,
        },
        lambda: {"sample": noise(2, 2, 240)},
    ),
    "AutoencoderVidTok": (
        {"ch": 16, "ch_mult": [1, 2], "z_channels": 4, "num_res_blocks": 1, "is_causal": False},
        lambda: {"sample": noise(1, 3, 8, 16, 24), "sample_posterior": False},
    ),
}


def _latent(channels: int = 4, text: int = 20, **more: Any) -> dict[str, Any]:
    """A latent image of 8 x 12 pixels, a time and a text."""
    return {"hidden_states": noise(2, channels, 8, 12), "timestep": TIME, **_text(5, text), **more}


def _video(channels: int = 4, text: int = 20, **more: Any) -> dict[str, Any]:
    """A latent clip of 3 frames, a time and a text."""
    return {"hidden_states": noise(2, channels, 3, 8, 12), "timestep": TIME, **_text(5, text), **more}


def _flux(channels: int = 4, **more: Any) -> dict[str, Any]:
    """Packed latents of 3 x 4 patches with coordinates of three dims, a text of five tokens."""
    return {
        "hidden_states": noise(2, 12, channels),
        "timestep": FRACTION,
        **_text(5, 20),
        "img_ids": _places(1, 3, 4),
        "txt_ids": torch.zeros(5, 3),
        **more,
    }


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
FLUX = {**HEADS, "in_channels": 4, "num_single_layers": 2, "joint_attention_dim": 20}
ROPE = {"axes_dims_rope": (4, 4, 8)}
TRANSFORMERS: Table = {
    "DiTTransformer2DModel": (
        {**HEADS, "sample_size": 8, "num_embeds_ada_norm": 8, "norm_num_groups": 4},
        lambda: {
            "hidden_states": noise(2, 4, 8, 8),
            "timestep": torch.tensor([2, 5]),
            "class_labels": torch.tensor([1, 3]),
        },
    ),
    "Transformer2DModel": (
        {**HEADS, "in_channels": 32, "norm_num_groups": 4, "cross_attention_dim": 20},
        lambda: {"hidden_states": noise(2, 32, 6, 10), **_text(5, 20)},
    ),
    "Transformer2DModel-vector": (
        {**HEADS, "sample_size": 6, "num_vector_embeds": 11, "num_embeds_ada_norm": 8},
        lambda: {"hidden_states": _tokens(11, 2, 36), "timestep": torch.tensor(3)},
    ),
    "DualTransformer2DModel": (
        {**HEADS, "in_channels": 32, "norm_num_groups": 4, "cross_attention_dim": 20},
        lambda: {"hidden_states": noise(2, 32, 6, 10), **_text(77 + 257, 20)},
    ),
    "TransformerTemporalModel": (
        {**HEADS, "in_channels": 32, "norm_num_groups": 4},
        lambda: {"hidden_states": noise(6, 32, 5, 7), "num_frames": 3},
    ),
    "PixArtTransformer2DModel": (
        {
            **HEADS,
            "sample_size": 8,
            "cross_attention_dim": 32,
            "caption_channels": 20,
            "num_embeds_ada_norm": 8,
        },
        lambda: {
            **_latent(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "encoder_attention_mask": _mask(3, 5),
        },
    ),
    "SD3Transformer2DModel": (
        {
            **HEADS,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "joint_attention_dim": 20,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 12,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        lambda: _latent(pooled_projections=noise(2, 12)),
    ),
    "SD3ControlNetModel": (
        {
            **HEADS,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "joint_attention_dim": 20,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 12,
        },
        lambda: _latent(pooled_projections=noise(2, 12), controlnet_cond=noise(2, 4, 8, 12, seed=5)),
    ),
    "FluxTransformer2DModel": (
        {**FLUX, **ROPE, "pooled_projection_dim": 12, "guidance_embeds": True},
        lambda: _flux(pooled_projections=noise(2, 12), guidance=FRACTION),
    ),
    "FluxControlNetModel": (
        {**FLUX, **ROPE, "pooled_projection_dim": 12},
        lambda: _flux(pooled_projections=noise(2, 12), controlnet_cond=noise(2, 12, 4, seed=5)),
    ),
    "Flux2Transformer2DModel": (
        {**FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
        lambda: {
            **_flux(guidance=FRACTION),
            "img_ids": _places(1, 3, 4, 1)[None].repeat(2, 1, 1),
            "txt_ids": _places(1, 1, 1, 5)[None].repeat(2, 1, 1),
        },
    ),
    "ChromaTransformer2DModel": (
        {
            **FLUX,
            **ROPE,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 24,
            "approximator_layers": 1,
        },
        _flux,
    ),
    "BriaTransformer2DModel": ({**FLUX, **ROPE}, _flux),
    "LongCatImageTransformer2DModel": ({**FLUX, **ROPE, "pooled_projection_dim": 12}, _flux),
    "OvisImageTransformer2DModel": ({**FLUX, **ROPE, "out_channels": 4}, _flux),
    "AuraFlowTransformer2DModel": (
        {
            "sample_size": 16,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 20,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
        lambda: {**_latent(), "timestep": FRACTION},
    ),
    "HunyuanDiT2DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 32,
            "cross_attention_dim": 20,
            "cross_attention_dim_t5": 24,
            "pooled_projection_dim": 12,
            "text_len": 5,
            "text_len_t5": 7,
            "activation_fn": "gelu-approximate",
        },
        lambda: {
            **_latent(),
            "hidden_states": noise(2, 4, 8, 8),
            "timestep": TIME.float(),
            "text_embedding_mask": _mask(3, 5).float(),
            "encoder_hidden_states_t5": noise(2, 7, 24),
            "text_embedding_mask_t5": _mask(7, 4).float(),
            "image_meta_size": noise(2, 6, seed=5).abs(),
            "style": torch.tensor([0, 0]),
            "image_rotary_emb": _rotary(16, 16),
            "return_dict": True,
        },
    ),
    "LuminaNextDiT2DModel": (
        {
            "sample_size": 16,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 8,
            "cross_attention_dim": 20,
        },
        lambda: {
            **_latent(),
            "encoder_mask": _mask(3, 5),
            "image_rotary_emb": torch.polar(torch.ones(8, 8, 4), noise(8, 8, 4)),
            "cross_attention_kwargs": {},
        },
    ),
    "Lumina2Transformer2DModel": (
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 8,
            "axes_dim_rope": (2, 2, 4),
            "axes_lens": (32, 32, 32),
            "cap_feat_dim": 20,
        },
        lambda: _latent(encoder_attention_mask=_mask(3, 5)),
    ),
    "SanaTransformer2DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 32,
            "caption_channels": 20,
            "sample_size": 8,
        },
        lambda: _latent(encoder_attention_mask=_mask(3, 5)),
    ),
    "SanaControlNetModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 32,
            "caption_channels": 20,
            "sample_size": 8,
        },
        lambda: _latent(encoder_attention_mask=_mask(3, 5), controlnet_cond=noise(2, 4, 8, 12, seed=5)),
    ),
    "SanaVideoTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 32,
            "caption_channels": 20,
            "sample_size": 8,
        },
        lambda: _video(encoder_attention_mask=_mask(3, 5)),
    ),
    "PriorTransformer": (
        {**HEADS, "embedding_dim": 12, "num_embeddings": 7, "additional_embeddings": 4},
        lambda: {
            "hidden_states": noise(2, 12),
            "timestep": TIME,
            "proj_embedding": noise(2, 12, seed=4),
            **_text(7, 12),
            "attention_mask": _mask(7, 4),
        },
    ),
    "CogView3PlusTransformer2DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 20,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "pos_embed_max_size": 16,
            "sample_size": 16,
        },
        lambda: _latent(
            original_size=torch.full((2, 2), 20.0),
            target_size=torch.full((2, 2), 20.0),
            crop_coords=torch.zeros(2, 2),
        ),
    ),
    "CogView4Transformer2DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 20,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "sample_size": 16,
        },
        lambda: _latent(
            original_size=torch.full((2, 2), 20.0),
            target_size=torch.full((2, 2), 20.0),
            crop_coords=torch.zeros(2, 2),
        ),
    ),
    "QwenImageTransformer2DModel": (
        {
            **HEADS,
            **ROPE,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 1,
            "joint_attention_dim": 20,
        },
        lambda: {
            "hidden_states": noise(2, 12, 4),
            "timestep": FRACTION,
            **_text(5, 20),
            "encoder_hidden_states_mask": _mask(5, 5),
            "img_shapes": [[(1, 3, 4)]] * 2,
        },
    ),
    "HiDreamImageTransformer2DModel": (
        {
            **HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "caption_channels": (20, 12),
            "text_emb_dim": 12,
            "axes_dims_rope": (4, 4, 8),
            "max_resolution": (12, 12),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        lambda: {
            "hidden_states": noise(2, 4, 8, 8),
            "timesteps": TIME,
            "encoder_hidden_states_t5": noise(2, 5, 20),
            "encoder_hidden_states_llama3": noise(2, 2, 5, 12),
            "pooled_embeds": noise(2, 12),
        },
    ),
    "OmniGenTransformer2DModel": (
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 40,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 29,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4, "type": "su"},
            "pos_embed_max_size": 16,
            "time_step_dim": 16,
        },
        lambda: {
            "hidden_states": noise(2, 4, 8, 8),
            "timestep": FRACTION,
            "input_ids": _tokens(29, 2, 20),
            "input_img_latents": [noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=2)],
            "input_image_sizes": {0: [[1, 17]], 1: [[2, 18]]},
            "attention_mask": torch.ones(2, 37, 37),
            "position_ids": torch.arange(37)[None].repeat(2, 1),
        },
    ),
    "PRXTransformer2DModel": (
        {
            "in_channels": 4,
            "context_in_dim": 20,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        lambda: {**_latent(), "timestep": FRACTION},
    ),
    "AllegroTransformer3DModel": (
        {
            **HEADS,
            "attention_head_dim": 24,
            "cross_attention_dim": 48,
            "sample_height": 8,
            "sample_width": 12,
            "sample_frames": 3,
            "caption_channels": 20,
        },
        lambda: _video(
            attention_mask=torch.ones(2, 3, 8, 12),
            encoder_attention_mask=_mask(3, 5),
            image_rotary_emb=(
                tuple((c, s) for c, s in [_allegro_table(n) for n in (3, 4, 6)]),
                tuple(_places(3, 4, 6).long()[None].repeat(2, 1, 1).unbind(2)),
            ),
        ),
    ),
    "CogVideoXTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 20,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": 5,
        },
        lambda: {**_video(), "hidden_states": noise(2, 3, 4, 8, 12)},
    ),
    "CogVideoXTransformer3DModel-rotary": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 20,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": 5,
            "use_rotary_positional_embeddings": True,
        },
        lambda: {
            **_video(),
            "hidden_states": noise(2, 3, 4, 8, 12),
            "image_rotary_emb": _rotary(72, 16),
        },
    ),
    "CosmosTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "mlp_ratio": 2.0,
            "text_embed_dim": 20,
            "adaln_lora_dim": 4,
            "max_size": (4, 16, 16),
            "concat_padding_mask": True,
            "encoder_hidden_states_channels": 20,
        },
        lambda: _video(padding_mask=torch.zeros(1, 1, 8, 12), fps=30),
    ),
    "EasyAnimateTransformer3DModel": (
        {
            **HEADS,
            "mmdit_layers": 1,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "time_embed_dim": 8,
            "text_embed_dim": 20,
            "add_norm_text_encoder": True,
        },
        lambda: {**_video(), "inpaint_latents": None, "control_latents": None},
    ),
    "HunyuanVideoTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 20,
            "pooled_projection_dim": 12,
            "rope_axes_dim": (4, 4, 8),
            "guidance_embeds": True,
        },
        lambda: _video(
            encoder_attention_mask=_mask(3, 5), pooled_projections=noise(2, 12), guidance=FRACTION * 1000
        ),
    ),
    "HunyuanImageTransformer2DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 20,
            "rope_axes_dim": (8, 8),
            "patch_size": (2, 2),
        },
        lambda: {**_latent(encoder_attention_mask=_mask(3, 5)), "timestep": TIME.float()},
    ),
    "LTXVideoTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 32,
            "caption_channels": 20,
        },
        lambda: {
            "hidden_states": noise(2, 12 * 3, 4),
            "timestep": TIME,
            **_text(5, 20),
            "encoder_attention_mask": _mask(3, 5),
            "num_frames": 3,
            "height": 3,
            "width": 4,
        },
    ),
    "LatteTransformer3DModel": (
        {
            **HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 8,
            "patch_size": 2,
            "cross_attention_dim": 32,
            "caption_channels": 20,
            "norm_type": "ada_norm_single",
            "num_embeds_ada_norm": 8,
            "norm_elementwise_affine": False,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "video_length": 3,
        },
        lambda: {**_video(), "hidden_states": noise(2, 4, 3, 8, 8)},
    ),
    "MochiTransformer3DModel": (
        {
            **HEADS,
            "pooled_projection_dim": 12,
            "in_channels": 4,
            "text_embed_dim": 24,
            "time_embed_dim": 6,
            "max_sequence_length": 5,
        },
        lambda: _video(text=24, encoder_attention_mask=_mask(3, 5)),
    ),
    "WanTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 20,
            "freq_dim": 16,
            "ffn_dim": 40,
            "rope_max_seq_len": 32,
        },
        _video,
    ),
    "WanVACETransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 20,
            "freq_dim": 16,
            "ffn_dim": 40,
            "rope_max_seq_len": 32,
            "vace_layers": [0],
            "vace_in_channels": 6,
        },
        lambda: _video(
            control_hidden_states=noise(2, 6, 3, 8, 12, seed=5), control_hidden_states_scale=torch.ones(1)
        ),
    ),
    "SkyReelsV2Transformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 20,
            "freq_dim": 16,
            "ffn_dim": 40,
            "rope_max_seq_len": 32,
        },
        _video,
    ),
    "StableAudioDiTModel": (
        {
            "sample_size": 16,
            "in_channels": 6,
            "out_channels": 6,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "cross_attention_dim": 16,
            "time_proj_dim": 8,
            "global_states_input_dim": 12,
            "cross_attention_input_dim": 20,
        },
        lambda: {
            "hidden_states": noise(2, 6, 16),
            "timestep": FRACTION,
            **_text(5, 20),
            "global_hidden_states": noise(2, 1, 12),
            "rotary_embedding": _rotary(17, 4),
        },
    ),
    "T5FilmDecoder": (
        {
            "input_dims": 12,
            "targets_length": 7,
            "d_model": 24,
            "num_layers": 2,
            "num_heads": 3,
            "d_kv": 8,
            "d_ff": 40,
        },
        lambda: {
            "encodings_and_masks": [(noise(2, 5, 24), torch.ones(2, 5))],
            "decoder_input_tokens": noise(2, 7, 12),
            "decoder_noise_time": FRACTION,
        },
    ),
    "Kandinsky5Transformer3DModel": (
        {
            "in_text_dim": 20,
            "in_text_dim2": 12,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 40,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 8),
        },
        lambda: {
            "hidden_states": noise(2, 3, 8, 12, 4),
            "timestep": TIME,
            **_text(5, 20),
            "pooled_projections": noise(2, 12),
            "visual_rope_pos": (torch.arange(3), torch.arange(4), torch.arange(6)),
            "text_rope_pos": torch.arange(5),
        },
    ),
}


def _allegro_table(length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[length, 8]`, their two halves alike."""
    angles = (torch.arange(length)[:, None] / 10 ** (torch.arange(4) / 8)[None]).repeat(1, 2)
    return angles.cos(), angles.sin()


def _build(name: str, arguments: dict[str, Any]) -> nn.Module:
    from diffusers import models

    cls = getattr(models, name.partition("-")[0])
    model: nn.Module = cls(**arguments)
    return model


CASES = Cases()
for _table in (UNETS, AUTOENCODERS, TRANSFORMERS):
    for _name, (_arguments, _inputs) in _table.items():
        _variant = _name.partition("-")[2]
        _note = "built small" + (f"; {_variant}" if _variant else "")
        CASES.add(_name, partial(_build, _name, _arguments), _inputs, _note)
