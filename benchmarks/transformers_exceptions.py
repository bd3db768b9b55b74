"""What the names of a type's fields do not tell: changes to small configurations, and inputs that can't be guessed."""

from __future__ import annotations

from typing import Any

EFFICIENT = {"width_coefficient": 0.5, "depth_coefficient": 0.3, "hidden_dim": 640}
EFFICIENT |= {"in_channels": [32, 16, 24, 40, 80, 112, 192], "out_channels": [16, 24, 40, 80, 112, 192, 320]}

# What a type's constructor must be given.
GIVEN: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 3, "num_time_features": 2},
    "informer": {"prediction_length": 3, "num_time_features": 2},
    "time_series_transformer": {"prediction_length": 3, "num_time_features": 2},
}
TILES = {"image_grid_pinpoints": [[48, 96], [96, 48]]}
# Changes to a small configuration, wherever it stands.
CONFIGS: dict[str, dict[str, Any]] = {
    "efficientnet": EFFICIENT,
    "align_vision_model": EFFICIENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hiera": {"image_size": [64, 64]},
    "levit": {"image_size": 224, "patch_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lw_detr": {"image_size": 64},
    "lw_detr_vit": {"image_size": 64},
    "mobilevit": {"hidden_sizes": [24, 32, 40]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blip-2": {"image_token_index": 100},
    "llava_next": TILES,
    "llava_next_video": TILES,
    "llava_onevision": TILES,
    "mamba2": {"head_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 128},
}
SERIES = {
    "past_values": ["noise", [2, 10]],
    "past_time_features": ["noise", [2, 10, 2]],
    "past_observed_mask": ["ones", [2, 10]],
    "future_values": ["noise", [2, 3]],
    "future_time_features": ["noise", [2, 3, 2]],
}
# Arguments of forward, as `transformers_tiny.tensor` reads them.
INPUTS: dict[str, dict[str, Any]] = dict.fromkeys(
    ("autoformer", "informer", "time_series_transformer"), SERIES
)
