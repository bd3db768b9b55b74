"""Synthetic calibration data, where there are none: the example inputs with noise, fitted to what batch norms remember.

Layers of a smaller model are fitted to what they gave in the original, for which inputs need not look like anything; but they must
reach the units as real ones do. The running statistics of batch norms say how that is.

Source: Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR 2020 (section 3.1: inputs by gradient descent on the distance
between the statistics of activations and those that batch norms keep; there for ranges of quantised values).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..base.inputs import Arguments, each_example
from ..base.progress import track
from ..base.running import WriteGuardMode
from ..base.values import map_tensors, tensor_leaves
from .calibration import Batch
from .watch import prepared, twin

Tensor = torch.Tensor
BATCHES = 4
NUMBERS = 1 << 16  # in the inputs of a batch, about
ROWS = (8, 256)  # of a batch, at least and at most
EXAMPLE = 0.5  # of what an input is, beside noise: by this an entry of it is correlated with the example's
STEPS = 40
RATE = 0.1  # of a step, relative to the noise
BATCH_NORM = "input", "weight", "bias", "running_mean", "running_var"  # first arguments of torch.batch_norm


def synthetic(
    model: nn.Module, example_inputs: Any, seed: int = 0, progress: bool | None = None
) -> list[Batch]:
    """Batches for recovery, made from the first of the example inputs.

    Floating tensors are the example's drawn in by half towards their mean, plus normal noise, so that they vary as before (by 1 where
    they are constant). Where the model has batch norms with running statistics, they are then moved, by `STEPS` steps of Adam, to
    where each norm's input has these statistics. All else stays, and so does what holds zeros and ones beside another input, as masks
    do: where nothing is left to change, the example is the one batch. A batch has more rows than the example where the model
    runs on that: each tensor whose first dim is that of the first tensor is repeated.

    Args:
        model: what they are for; it is run in eval mode.
        example_inputs: as for `prune`.
        seed: decides the draws.
        progress: as for `progress.track`.
    """
    example = each_example(example_inputs)[0]
    several = len(tensor_leaves(example)) > 1  # the only input is no mask
    if not any(_spread(t, several) for t in tensor_leaves(example)):
        return [Batch(example.args, example.kwargs)]
    with prepared(), torch.inference_mode(False):
        larger, (copy, _) = _more_rows(example), twin(model)
        if not _runs(copy, larger):
            larger = example
        dice = torch.Generator().manual_seed(seed)
        return [_batch(copy, larger, several, dice) for _ in track(range(BATCHES), "making inputs", progress)]


def _batch(model: nn.Module, inputs: Arguments, masks: bool, dice: torch.Generator) -> Batch:
    """One batch: noise is added to `inputs`, and fitted."""
    moved: list[tuple[Tensor, float]] = []

    def drawn(t: Tensor) -> Tensor:
        if not (spread := _spread(t, masks)):
            return t.clone()
        mean = t.detach().mean()
        dots = spread * torch.randn(t.shape, generator=dice).to(t)
        new = mean + EXAMPLE * (t.detach() - mean) + (1 - EXAMPLE**2) ** 0.5 * dots
        moved.append((new, spread))
        return new

    made: Arguments = map_tensors(inputs, drawn)
    _fit(model, made, moved)
    return Batch(made.args, made.kwargs)


def _fit(model: nn.Module, inputs: Arguments, moved: list[tuple[Tensor, float]]) -> None:
    """Move tensors of `inputs` to where batch norms are given what they remember; as far as gradients lead."""
    groups: list[dict[str, Any]] = [{"params": [t], "lr": RATE * spread} for t, spread in moved]
    optimizer = torch.optim.Adam(groups)
    leaves = [t for t, _ in moved]
    for _ in range(STEPS):
        for t in leaves:
            t.requires_grad_(True)
        distance = _distance(model, inputs)
        if distance is not None and distance.requires_grad:
            distance.backward(inputs=leaves)
        for t in leaves:
            t.requires_grad_(False)
        found = [t.grad for t in leaves if t.grad is not None]
        fine = bool(found) and all(bool(torch.isfinite(g).all()) for g in found)
        if fine:
            optimizer.step()
        for t in leaves:
            t.grad = None
        if not fine:
            return


def _distance(model: nn.Module, inputs: Arguments) -> Tensor | None:
    """How far what batch norms are given is from what they remember; None where there are none, or the model does not run."""
    with _Statistics() as seen, torch.enable_grad(), WriteGuardMode(model.parameters()):
        try:
            map_tensors(inputs, torch.clone).run(model)  # a model may write into what it is given
        except Exception:  # noqa: BLE001  the user's code may raise anything, also where gradients are asked for
            return None
    if not seen.distances:
        return None
    return torch.stack([d.to(seen.distances[0]) for d in seen.distances]).sum()


class _Statistics(TorchFunctionMode):
    """Notes for each batch norm with running statistics how far its input's are from them."""

    def __init__(self) -> None:
        super().__init__()
        self.distances: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.batch_norm:
            given = {**dict(zip(BATCH_NORM, args, strict=False)), **kwargs}
            self._note(given["input"], given["running_mean"], given["running_var"])
        return func(*args, **kwargs)

    def _note(self, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None) -> None:
        if running_mean is None or running_var is None or x.numel() < 2 * len(running_mean):
            return
        others = [d for d in range(x.dim()) if d != 1]
        variance, mean = torch.var_mean(x.float(), others, correction=0)
        floor = 1e-5 + running_var
        spread = (((variance + 1e-5) / floor).sqrt() - 1).square()
        self.distances.append(((mean - running_mean).square() / floor + spread).mean())


def _spread(t: Tensor, masks: bool) -> float:
    """How large the noise of a tensor is; 0 where it gets none.

    That is: no floating numbers, a mask with -inf, or where there may be `masks` one of zeros and ones.
    """
    if t.layout is not torch.strided or not t.numel() or not t.is_floating_point():
        return 0.0
    if masks and bool((t == 1).any()) and bool(((t == 0) | (t == 1)).all()):
        return 0.0
    found = float(t.detach().double().std(correction=0))
    return (found or 1.0) if math.isfinite(found) else 0.0


def _more_rows(example: Arguments) -> Arguments:
    """The example with its rows repeated, as often as a batch has room."""
    tensors = [t for t in tensor_leaves(example) if t.layout is torch.strided and t.dim()]
    if not tensors or not tensors[0].shape[0]:
        return example
    own = tensors[0].shape[0]
    wanted = NUMBERS * own // max(1, sum(t.numel() for t in tensors))
    times = max(1, -(-min(max(wanted, ROWS[0]), ROWS[1]) // own))

    def repeated(t: Tensor) -> Tensor:
        if t.layout is not torch.strided or not t.dim() or t.shape[0] != own:
            return t.clone()
        return t.repeat(times, *[1] * (t.dim() - 1))

    found: Arguments = map_tensors(example, repeated)
    return found


def _runs(model: nn.Module, inputs: Arguments) -> bool:
    """Whether the model runs on these inputs: it need not take other batches than its example's."""
    try:
        with torch.no_grad(), WriteGuardMode(model.parameters()):
            inputs.run(model)
    except Exception:  # noqa: BLE001  the user's code may raise anything
        return False
    return True
