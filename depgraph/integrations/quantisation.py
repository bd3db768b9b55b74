"""Quantised weights, by torchao."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from ..base.errors import InputError

KINDS = {
    "int8": "Int8WeightOnlyConfig",
    "int8_dynamic": "Int8DynamicActivationInt8WeightConfig",
    "int4": "Int4WeightOnlyConfig",
}


def quantise(model: nn.Module, kind: str = "int8") -> nn.Module:
    """Quantise the weights of linear layers of `model`, in place.

    Args:
        model: in eval mode. Prune it before: a quantised model can't be pruned.
        kind: ``"int8"`` or ``"int4"`` (weights alone), or ``"int8_dynamic"`` (what is multiplied, too).

    Returns:
        `model`.

    Raises:
        InputError: another kind, or torchao is not installed.
    """
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    try:
        quantization: Any = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise InputError("quantising needs torchao: pip install torchao") from error
    quantization.quantize_(model, getattr(quantization, KINDS[kind])())
    return model
