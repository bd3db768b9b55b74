"""The smallest model of every timm file."""

from __future__ import annotations

from functools import partial

from benchmarks import timm_smallest
from benchmarks.suites.case import Case, seeded, tensor_inputs

SMALL = (
    "test_resnet",
    "test_vit",
    "test_convnext",
    "test_byobnet",
    "test_efficientnet",
    "test_mambaout",
)


def cases() -> dict[str, Case]:
    """One case a timm file."""
    return {
        row.name: Case(
            row.name,
            partial(seeded, partial(timm_smallest.build, row.name)),
            partial(tensor_inputs, (timm_smallest.BATCH, *row.image)),
            f"{row.module}: logits",
        )
        for row in timm_smallest.load()
    }
