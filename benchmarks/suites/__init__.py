"""The architectures that the benchmarks run on, a file a suite.

    cases = suite("torchvision")
    model, inputs = cases["resnet18"].build(), cases["resnet18"].inputs()

Weights are random and nothing is downloaded. Inputs are as small as each architecture permits; batch, token and pixel
counts differ from channel counts where one can choose. Each file has `cases()`, all of its cases by name, and
`SMALL`, the names of the few that continuous integration has time for.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

import vision_ops  # noqa: F401  # makes torchvision importable, for all that import it

from benchmarks.suites.case import Case

__all__ = ["LIBRARIES", "SUITES", "Case", "Inputs", "call", "suite"]

# The libraries whose versions matter to each suite.
LIBRARIES = {
    "torchvision": ("torchvision",),
    "timm": ("timm",),
    "diffusion": ("diffusers",),
    "detection": ("segmentation-models-pytorch", "monai"),
    "other": (),
    "recurrent": (),
    "graph": ("torch-geometric",),
    "transformers": ("transformers",),
}
SUITES = tuple(LIBRARIES)


@cache
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
    module = import_module(f"benchmarks.suites.{name}")
    cases: dict[str, Case] = module.cases()
    return {k: cases[k] for k in module.SMALL if k in cases} if small else cases
