"""The architectures that the benchmarks run on, suite by suite; `benchmarks/models` has them.

    cases = suite("torchvision")
    model, inputs = cases["resnet18"].build(), cases["resnet18"].inputs()

Weights are random and nothing is downloaded. Inputs are as small as each architecture permits; batch, token and pixel
counts differ from channel counts where one can choose.
"""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import vision_ops  # noqa: F401  # makes torchvision importable, for all that import it

from benchmarks.suites.case import Case, Cases

__all__ = ["SUITES", "Case", "Cases", "suite"]


class Suite(NamedTuple):
    """The libraries whose versions matter to a suite, and the few cases that continuous integration has time for."""

    libraries: tuple[str, ...]
    small: tuple[str, ...]


SUITES = {
    "torchvision": Suite(
        ("torchvision",),
        ("resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "mobilenet_v3_small", "googlenet", "densenet121"),
    ),
    "timm": Suite(
        ("timm",),
        ("test_resnet", "test_vit", "test_convnext", "test_byobnet", "test_efficientnet", "test_mambaout"),
    ),
    "diffusion": Suite(
        ("diffusers",), ("UNet2DModel", "AutoencoderKL", "DiTTransformer2DModel", "FluxTransformer2DModel")
    ),
    "detection": Suite(
        ("segmentation-models-pytorch", "monai"), ("yolo_v8", "detr", "unet", "smp_Unet", "monai_UNet")
    ),
    "other": Suite((), ("conformer", "wavenet", "stylegan", "moe_modules", "pointnet", "dlrm")),
    "recurrent": Suite(
        (),
        (
            "lstm_classifier",
            "gru_packed",
            "bilstm_tagger",
            "gru_by_hand",
            "seq2seq_attention",
            "selective_scan",
        ),
    ),
    "graph": Suite(
        ("torch-geometric",), ("gcn", "gat", "conv_sage", "conv_pna", "hetero_sage", "hand_scatter")
    ),
    "transformers": Suite(("transformers",), ("llama", "bert", "t5", "mixtral", "whisper", "vit")),
}


def suite(name: str, small: bool = False) -> dict[str, Case]:
    """The cases of one suite by name.

    Args:
        name: one of `SUITES`.
        small: only the few that continuous integration has time for.

    Raises:
        ValueError: there is no such suite.
    """
    if name not in SUITES:
        raise ValueError(f"there is no suite {name!r}; there are {', '.join(SUITES)}")
    cases: Cases = import_module(f"benchmarks.models.{name}").CASES
    return {k: cases[k] for k in SUITES[name].small} if small else cases
