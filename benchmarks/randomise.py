"""Random values where an untrained network has constants.

A fresh network is full of zeros and ones: biases, norm weights and statistics, layer scales, the last norm of a
residual branch, position tables. A wrong rule that permutes or drops such entries changes nothing that a test could
see, and a zero scale hides the whole branch behind it. `randomise` makes every entry its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from outputs import Inputs, call
from torch import Tensor, nn

SPREAD = 0.2  # relative spread of values that were constant
SMALL = 0.1  # constants below this (layer scales of 1e-6 …) would hide the branch they scale
NARROW = 1e-4  # values that lie this close together count as one
FLOOR = 0.02  # smallest standard deviation for values that were zero


def randomise(model: nn.Module, seed: int, inputs: Inputs | None = None) -> nn.Module:
    """Perturb, in place, what hides errors: constant parameters and the statistics of batch norms.

    Parameters that hold one value throughout become noise around that value: around 1 for norm weights, around 0 for
    biases, of ordinary size for scales that start at almost nothing. Weights so small that their layer would hand on a
    whisper (attention logits that are all zero) are scaled up; other parameters keep their initial values.

    Args:
        model: any module; its own generator state and mode are left alone.
        seed: decides every value.
        inputs: example inputs for one forward pass, in which the running variance of each batch norm is set by
            what it is given (with noise), so that activations keep their scale at any depth. Without inputs the running
            statistics become noise around 0 and 1.

    Returns:
        The same model.
    """
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.numel():
                continue
            if _is_constant(parameter):
                parameter.copy_(_around(parameter, dice))
            elif (
                parameter.dim() > 1
                and parameter.is_floating_point()
                and parameter.numel() > parameter.shape[0]
            ):
                parameter.mul_(_gain(parameter))
        norms = [module for module in model.modules() if _has_statistics(module)]
        for norm in norms:
            _set_statistics(
                norm, torch.zeros_like(norm.running_mean), torch.ones_like(norm.running_var), dice
            )
        if inputs is not None and norms:
            with _calibrating(norms, dice):
                call(model, inputs)
    return model


def _is_constant(parameter: Tensor) -> bool:
    """Whether a floating-point parameter holds one value throughout, or nearly (biases drawn at a scale of 1e-6)."""
    if not parameter.is_floating_point() or parameter.numel() == 0:
        return False
    low, high = parameter.aminmax()
    return float(high - low) <= NARROW


def _around(parameter: Tensor, dice: torch.Generator) -> Tensor:
    """Noise around the one value that `parameter` holds."""
    value = float(parameter.mean())
    uniform = 2 * torch.rand(parameter.shape, generator=dice) - 1
    low, high = parameter.aminmax()
    if low <= 0 <= high:
        fan_in = parameter.numel() // parameter.shape[0] if parameter.dim() > 1 else 1 / SMALL**2
        noise = torch.randn(parameter.shape, generator=dice) * max(fan_in**-0.5, FLOOR)
    elif abs(value) < SMALL:
        noise = SMALL * (1 + uniform / 2) * (1 if value > 0 else -1)
    else:
        noise = value * (1 + SPREAD * uniform)
    return noise.to(parameter)


def _gain(weight: Tensor) -> float:
    """The factor that brings a weight `[out, in, ...]` up to a standard deviation of `1 / sqrt(fan_in)`, at least 1."""
    fan_in = weight.numel() // weight.shape[0]
    return max(1.0, float(fan_in**-0.5 / weight.std().clamp(min=1e-12)))


def _has_statistics(module: nn.Module) -> bool:
    """Whether `module` is a batch norm of any make with running statistics."""
    return all(isinstance(getattr(module, name, None), Tensor) for name in ("running_mean", "running_var"))


def _set_statistics(norm: nn.Module, mean: Tensor, variance: Tensor, dice: torch.Generator) -> None:
    """Store `mean` and `variance` `[C]` with noise on them; the variance stays positive."""
    shift = SPREAD * torch.randn(mean.shape, generator=dice).to(mean)
    factor = 1 + SPREAD * (2 * torch.rand(variance.shape, generator=dice).to(variance) - 1)
    norm.running_mean.copy_(mean + shift * variance.sqrt())
    norm.running_var.copy_(variance * factor)


@contextmanager
def _calibrating(norms: list[nn.Module], dice: torch.Generator) -> Iterator[None]:
    """While this is open, each of `norms` takes its scale from the first input that it is given."""
    seen: set[nn.Module] = set()

    def observe(norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        if norm in seen:
            return
        seen.add(norm)
        x = arguments[0].transpose(0, 1).flatten(1)  # [C, everything else]
        power = x.square().mean(1)
        # Centring each channel, or raising the weak ones, would make a deep untrained network chaotic: every norm would
        # blow up small differences, rounding errors among them.
        _set_statistics(norm, torch.zeros_like(power), power.clamp(min=max(float(power.mean()), 1e-6)), dice)

    hooks = [norm.register_forward_pre_hook(observe) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
