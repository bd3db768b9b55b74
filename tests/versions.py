"""What the torch that the tests run on lacks: 2.6 is the oldest that the library supports."""

from __future__ import annotations

import pytest
import torch

NEW_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
on_new_torch = pytest.mark.skipif(
    not NEW_TORCH, reason="needs an op, a tool or a tracer that torch 2.6 lacks"
)
