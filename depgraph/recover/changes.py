"""Changes of a model's tensors that can be taken back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..data.consumers import at
from ..plan.plan import Bias
from ..surgery import biases
from ..tracing.tensors import named_tensors
from ..tracing.trace import Trace, trace
from .lockstep import Run
from .pairs import Pair

Tensor = torch.Tensor


class Changes:
    """Writes into the tensors of `model`, and remembers what was there."""

    def __init__(self, model: nn.Module) -> None:
        """Nothing is changed yet."""
        self.model = model
        self.tensors = named_tensors(model)[0]
        self.before: dict[str, Any] = {}
        self.since: dict[str, Any] = {}
        self.biases: list[Bias] = []  # those that the model was given

    def give(self, bias: Bias) -> None:
        """A layer without a bias gets one of zeros."""
        self.tensors[bias.name] = biases.add(self.model, bias)
        self.biases.append(bias)

    def take(self, bias: Bias) -> None:
        """It has none again."""
        biases.take(self.model, bias)
        self.biases.remove(bias)
        for table in (self.tensors, self.before, self.since):
            table.pop(bias.name, None)

    def traced(self, example: Any) -> Trace:
        """A recorded run of the model."""
        return trace(self.model, example)

    def refuses(self, name: str) -> str:
        """Why a tensor can't be changed, or nothing."""
        return ""

    def value(self, name: str) -> Tensor:
        """What tensor `name` holds."""
        return self.tensors[name].detach()

    def version(self, name: str) -> Any:
        """What `write` brings this state of tensor `name` back with."""
        return self.value(name).clone()

    def write(self, name: str, values: Any) -> None:
        """Tensor `name` holds `values`, or is in the state of a version."""
        self.tensors[name].data.copy_(values)

    def set(self, name: str, values: Tensor) -> None:
        """Tensor `name` takes `values`."""
        with torch.no_grad():
            self._remember(name)
            self.write(name, values)

    def add(self, pair: Pair, weight: Tensor | None, constant: Tensor) -> None:
        """Add to the weight of a pair [stacks, rows, columns], and where it has a place for it the constant [stacks, rows]."""
        if weight is not None:
            self._add(pair.name, pair.at, weight)
        if pair.shift is not None:
            self._add(pair.shift.name, pair.shift.at, constant * pair.shift.sign)

    def _add(self, name: str, at: Tensor, values: Tensor) -> None:
        self._remember(name)
        tensor, where = self.value(name), at.flatten().to(values.device)
        flat = tensor.flatten()  # the tensor's own memory, where that is contiguous
        flat[where] = (flat[where].to(values.dtype) + values.flatten()).to(flat.dtype)
        self.write(name, flat.view(tensor.shape))

    def hand_to(self, run: Run, pair: Pair) -> None:
        """Let a run that has begun see the change: its buffers are copies, and the operands of a call may be casts."""
        for name in (pair.name, *([pair.shift.name] if pair.shift is not None else [])):
            run.write(name, self.value(name))
        if run.call is None or run.call.consumer is not pair.small:
            return
        with torch.no_grad():
            operand, tensor = run.call.weight, self.value(pair.name)
            if operand.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
                values = tensor.flatten()[pair.operand.to(tensor.device)]
                for d in [d for d in range(operand.dim()) if operand.stride(d) == 0]:
                    operand, values = operand.narrow(d, 0, 1), values.narrow(d, 0, 1)
                operand.data.copy_(values)
            if pair.shift is not None and pair.shift.argument is not None:
                bias, tensor = at(run.call.args, pair.shift.argument), self.value(pair.shift.name)
                if bias.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
                    bias.data.copy_(tensor.view(bias.shape))

    @staticmethod
    def repeat(run: Run) -> None:
        """A run that stands behind a call of which the weight has changed: the call's result is written anew."""
        call = run.call
        if call is not None and call.stream is not None:
            with torch.no_grad():
                call.out.copy_(call.product.node.target(*call.args))  # type: ignore[operator]

    def begin(self) -> None:
        """What follows can be taken back by itself."""
        self.since = {}

    def take_back(self) -> None:
        """Put back what was there when it began."""
        self._restore(self.since)

    def undo(self) -> None:
        """Put back what was there at first."""
        self._restore(self.before)
        for bias in list(self.biases):
            self.take(bias)

    def _remember(self, name: str) -> None:
        if name not in self.since:
            self.since[name] = self.version(name)
            self.before.setdefault(name, self.since[name])

    def _restore(self, versions: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, version in versions.items():
                self.write(name, version)
