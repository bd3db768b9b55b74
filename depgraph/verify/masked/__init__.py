"""Running a model with a mask beside every tensor: what it computes when removed entries are zero."""

from __future__ import annotations

from . import contraction, movement, quantisation, statistics  # noqa: F401  their handlers register themselves
from .draws import Draws
from .run import HANDLERS, MaskedRun, Unfollowed, Widened

__all__ = ["HANDLERS", "Draws", "MaskedRun", "Unfollowed", "Widened"]
