"""Masks of torch.nn.utils.prune, in and out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from ..base.errors import InputError
from ..plan.bits import Bits
from ..surgery.zeros import entries_of, keep_zeros
from ..tracing.tensors import skeleton
from ..tracing.wrappers import wrapped
from .masking import masked
from .result import Simplified, check_values


@torch.inference_mode(False)
def import_masks(model: nn.Module, x: Any = None) -> Simplified:
    """A model that `torch.nn.utils.prune` masked, as one that `mask` made: plain parameters whose zeros stay.

    Args:
        model: with masks of torch's; it is not touched.
        x: example inputs, as for `mask`.

    Returns:
        the masked model, a plan for the model without torch's masks, and a report.

    Raises:
        InputError: no parameter of the model has such a mask.
    """
    check_values(model)
    plain = wrapped(skeleton(model, {}))
    entries: dict[str, Bits] = {}
    for path, module in plain.named_modules():
        hooks = [
            h for h in module._forward_pre_hooks.values() if isinstance(h, torch_prune.BasePruningMethod)
        ]
        for name in dict.fromkeys(h._tensor_name for h in hooks):
            kept = getattr(module, f"{name}_mask") != 0
            torch_prune.remove(module, name)
            entries[f"{path}.{name}" if path else name] = Bits.of(kept)
    if not entries:
        raise InputError(
            "no parameter of this model has a mask of torch.nn.utils.prune: mask it with depgraph.mask"
        )
    sizes = sum(p.numel() for n, p in plain.named_parameters() if n in entries)
    return masked(plain, x, entries, [], {"importance": "torch.nn.utils.prune"}, sizes)


def export_masks(model: nn.Module) -> nn.Module:
    """A copy of a masked model that keeps its zeros by `torch.nn.utils.prune`: ``weight_orig`` and ``weight_mask``.

    Args:
        model: what `mask` returned, or what was pruned of it.

    Raises:
        InputError: the model has no masks.
    """
    check_values(model)
    made = wrapped(skeleton(model, {}))
    entries = entries_of(made)
    if not entries:
        raise InputError("this model has no masks: give the model of a result of depgraph.mask")
    keep_zeros(made, {})
    for name, bits in entries.items():
        path, _, own = name.rpartition(".")
        device = made.get_parameter(name).device
        torch_prune.custom_from_mask(made.get_submodule(path), own, bits.mask().to(device))
    return made
