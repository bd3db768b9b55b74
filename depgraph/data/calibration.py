"""Calibration: the batches that data-driven criteria and recovery run the model on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_structure

from ..base.checks import function
from ..base.errors import InputError
from ..base.inputs import each_example, split_inputs
from ..base.progress import track
from ..base.values import map_tensors, tensor_leaves

Loss = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        args: the positional arguments of the model's forward.
        kwargs: its keyword arguments.
        target: what a loss compares the output with.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any = None

    def copy(self) -> Batch:
        """The same with tensors of its own: a model may write into what it is given."""
        args, kwargs = map_tensors((self.args, self.kwargs), torch.clone)
        return Batch(args, kwargs, self.target)

    def run(self, model: Callable[..., Any]) -> Any:
        """What `model` returns for this batch.

        Raises:
            InputError: it fails.
        """
        try:
            return model(*self.args, **self.kwargs)
        except Exception as error:
            raise InputError(
                f"the model could not be run on a calibration batch: {type(error).__name__}: {error}"
            ) from error


class Calibration:
    """Batches of inputs, or of (inputs, target) pairs, that can be gone through any number of times.

    Each batch has the form of `example_inputs` (a tensor, a tuple of positional arguments or a dict of keyword
    arguments), or is a pair of that and a target. A pair is told from two positional arguments by the example: where
    forward takes two arguments itself, two that are made up alike are these, unless a loss is given, which needs targets.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        example_inputs: Any,
        loss: Loss | None = None,
        progress: bool | None = None,
    ) -> None:
        """Read nothing yet; an iterator that can be read only once is kept as a list when it is first read.

        Args:
            batches: a list, a `DataLoader` ...; a single batch must be put into a list.
            example_inputs: as given to `prune`; they say what a batch looks like, and on which device.
            loss: ``loss(output, target)`` -> scalar tensor. Without one, criteria that need a loss take ``output.loss``
                or ``output["loss"]``, where the model returns one.
            progress: as for `progress.track`.

        Raises:
            InputError: `batches` is not an iterable of batches.
        """
        check_batches("calibration", batches)
        if loss is not None:
            function("loss", loss, "output", "target")
        self._batches: Iterable[Any] = list(batches) if iter(batches) is batches else batches
        first = each_example(example_inputs)[0]
        self._args = first.args
        tensors = tensor_leaves(first)
        self._devices = {t.device for t in tensors}
        # Masks that are added may hold -inf.
        self._infinite = any(bool(torch.isinf(_values(t)).any()) for t in tensors)
        self.loss, self.progress = loss, progress
        self.memory: int | None = (
            None  # bytes that what is computed on the batches may take at once; None: no bound
        )

    def batches(self, text: str = "calibration") -> Generator[Batch, None, None]:
        """Each batch, checked, its tensors copied (a model may write into them).

        Args:
            text: what the progress bar says.

        Raises:
            InputError: there are none, one lies on another device than the example inputs, or holds NaN, or infinity where
                the example inputs hold none.
        """
        empty = True
        for i, given in enumerate(track(self._batches, text, self.progress)):
            empty = False
            yield self._checked(given, i)
        if empty:
            raise InputError("calibration is empty: give at least one batch of inputs")

    def held_out(self) -> Calibration:
        """The batches by which results are judged: those that are held out, a single one itself.

        All are kept as a list from now on, so that they come in one order.
        """
        self._batches = list(self._batches)
        found = copy.copy(self)
        judges = held_out(len(self._batches))
        found._batches = [b for b, held in zip(self._batches, judges, strict=True) if held] or self._batches
        return found

    def has_loss(self, output: Any) -> bool:
        """Whether there is a loss: a function of the user's, or one that the model's `output` brings."""
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        return self.loss is not None or isinstance(own, torch.Tensor)

    def loss_of(self, output: Any, batch: Batch) -> torch.Tensor:
        """The loss of the model's `output` on `batch`: a scalar.

        Raises:
            InputError: there is no loss, the function fails, or what it gives is NaN, infinite or no scalar.
        """
        try:
            return loss_value(self.loss, output, batch.target)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"the loss could not be computed from output {_described(output)} and target {_described(batch.target)}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _checked(self, given: Any, position: int) -> Batch:
        inputs, target = self._split(given)
        try:
            example = split_inputs(inputs)
        except InputError as error:
            raise InputError(f"calibration batch {position}: {error}") from error
        args, kwargs = example.args, example.kwargs
        for tensor in tensor_leaves(example):
            if self._devices and tensor.device not in self._devices:
                known = ", ".join(sorted(map(str, self._devices)))
                raise InputError(
                    f"calibration batch {position} is on {tensor.device}, the example inputs on {known}: "
                    "move the batches to the model's device"
                )
            values = _values(tensor)
            wrong = torch.isnan(values) if self._infinite else ~torch.isfinite(values)
            if bool(wrong.any()):
                raise InputError(f"calibration batch {position} contains NaN or infinite values")
        args, kwargs = map_tensors((args, kwargs), torch.clone)
        return Batch(args, kwargs, target)

    def _split(self, given: Any) -> tuple[Any, Any]:
        """(inputs, target or None) of one batch: see the class."""
        if isinstance(given, (tuple, list)) and len(given) == 2:
            alone = len(self._args) != 2 or tree_structure(given[0]) != tree_structure(self._args[0])
            if self.loss is not None or alone:
                return given[0], given[1]
        if self.loss is not None:
            raise InputError(
                f"with a loss, calibration batches are pairs (inputs, target), not {type(given).__name__}"
            )
        return given, None


def held_out(count: int) -> list[bool]:
    """Which of so many batches nothing is fitted on: the last fifth, at least one where there are two."""
    held = max(1, count // 5) if count > 1 else 0
    return [i >= count - held for i in range(count)]


def _values(tensor: torch.Tensor) -> torch.Tensor:
    """What is stored of a tensor: of a sparse one its values, of one without memory nothing."""
    if tensor.is_meta:
        return torch.zeros(0)
    if tensor.layout == torch.sparse_coo:
        return tensor._values()
    return tensor if tensor.layout == torch.strided else tensor.values()


def _described(value: Any) -> str:
    """The tensors in `value`, by type, shape and device."""
    tensors = [f"{str(t.dtype)[6:]} {list(t.shape)} on {t.device}" for t in tensor_leaves(value)]
    return ", ".join(tensors) or type(value).__name__


def check_batches(name: str, value: Any) -> None:
    """`value` can be gone through batch by batch, as far as can be told, or an `InputError`."""
    if isinstance(value, (torch.Tensor, Mapping, str)) or not isinstance(value, Iterable):
        raise InputError(
            f"{name} must be an iterable of batches, not {type(value).__name__}: put a single batch into a list"
        )


def loss_value(loss: Loss | None, output: Any, target: Any) -> torch.Tensor:
    """The loss of a model's `output`: ``loss(output, target)``, or without one what the output brings as ``loss``.

    Raises:
        InputError: there is no loss, or it is NaN, infinite or no scalar.
    """
    if loss is not None:
        value = loss(output, target)
    else:
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if own is None:
            raise InputError(
                "a loss is needed, and the model returns none: give loss=... (a function of output and target, such "
                "as torch.nn.functional.cross_entropy) and batches that are pairs (inputs, target)"
            )
        value = own
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise InputError(f"the loss must be a tensor of one number, not {value!r}"[:300])
    if not bool(torch.isfinite(value.detach())):
        fine = all(bool(torch.isfinite(_values(t)).all()) for t in tensor_leaves(target))
        fix = "are weights and data finite?" if fine else "its target contains NaN or infinite values"
        raise InputError(f"the loss of a batch is {float(value.detach())}: {fix}")
    return value
