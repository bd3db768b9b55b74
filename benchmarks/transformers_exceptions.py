"""What the names of a type's fields do not tell: changes to small configurations, and inputs that can't be guessed."""

from __future__ import annotations

from typing import Any

EFFICIENT = {"width_coefficient": 0.5, "depth_coefficient": 0.3, "hidden_dim": 640}
EFFICIENT |= {"in_channels": [32, 16, 24, 40, 80, 112, 192], "out_channels": [16, 24, 40, 80, 112, 192, 320]}

# What a type's constructor must be given.
GIVEN: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 3},
    "informer": {"prediction_length": 3},
    "time_series_transformer": {"prediction_length": 3},
}
# Changes to a small configuration, wherever it stands.
CONFIGS: dict[str, dict[str, Any]] = {
    "efficientnet": EFFICIENT,
    "align_vision_model": EFFICIENT,
}
# Arguments of forward, as `transformers_tiny.tensor` reads them.
INPUTS: dict[str, dict[str, Any]] = {}
