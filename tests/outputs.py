"""What a model returned, as a flat list of tensors: shapes, differences, a loss to send backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]


def call(model: nn.Module, inputs: Inputs) -> Any:
    """What `model` returns for example inputs of any form."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def tensors(output: Any) -> list[Tensor]:
    """All tensors in a nested output; dataclass-like outputs are searched through their attributes."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__"):
            found.extend(value for value in vars(leaf).values() if isinstance(value, Tensor))
    return found


def shapes(output: Any) -> list[tuple[int, ...]]:
    """Shapes of all tensors in an output."""
    return [tuple(tensor.shape) for tensor in tensors(output)]


def deviation(expected: Any, output: Any) -> float | None:
    """Largest deviation of a floating-point output, relative to its largest entry; None where it has no meaning."""
    pairs = [
        (a, b) for a, b in zip(tensors(expected), tensors(output), strict=False) if a.is_floating_point()
    ]
    if any(a.shape != b.shape or not bool(a.isfinite().all()) for a, b in pairs):
        return None
    return max(
        (float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs if a.numel()),
        default=None,
    )


def loss(output: Any) -> Tensor | None:
    """Sum over all outputs that carry a gradient, each scaled by its size; None where none does."""
    terms = [t.float().mean() for t in tensors(output) if t.requires_grad and t.numel()]
    return torch.stack(terms).sum() if terms else None


def backward_works(model: nn.Module, inputs: Inputs) -> bool:
    """Whether the loss over all outputs reaches parameters and every gradient is finite."""
    model.zero_grad(set_to_none=True)
    total = loss(call(model, inputs))
    if total is None:
        return False
    total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return bool(gradients) and all(bool(gradient.isfinite().all()) for gradient in gradients)
