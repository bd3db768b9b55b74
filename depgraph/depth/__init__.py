"""Which branches of a model can go, which go first, and how many."""

from __future__ import annotations

from typing import Any

from torch import nn

from .branches import Branch, Residual
from .removing import usable


def branches(model: nn.Module, example_inputs: Any) -> list[Branch]:
    """The branches of `model` that can go, in the order in which they are run.

    A branch is one side of an addition that is computed from the other side, by weights that are used nowhere else: the
    attention and the feed-forward part of each layer of a transformer, the convolutions of a residual block without a
    projection. In a model that normalises after the sum (post-norm), the norm is no part of it.

    Args:
        model: any module; it is not touched.
        example_inputs: as for `prune`; with `Examples`, branches are looked for in the run on the first.

    Returns:
        the branches; an empty list where there are none.

    Raises:
        InputError: as for `analyze`.
        TraceError: the model rejects the inputs.
    """
    residual = Residual(model, example_inputs)
    return usable(residual, example_inputs)


__all__ = ["Branch", "branches"]
