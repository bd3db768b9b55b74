"""Changes of a model's tensors that can be taken back."""

from __future__ import annotations

import torch
from torch import nn

from ..tracing.tensors import named_tensors
from .lockstep import Run
from .pairs import Pair

Tensor = torch.Tensor


class Changes:
    """Writes into the tensors of `model`, and remembers what was there."""

    def __init__(self, model: nn.Module) -> None:
        """Nothing is changed yet."""
        self.model = model
        self.tensors = named_tensors(model)[0]
        self.before: dict[str, Tensor] = {}
        self.since: dict[str, Tensor] = {}

    def set(self, name: str, values: Tensor) -> None:
        """Tensor `name` takes `values`."""
        with torch.no_grad():
            tensor = self.tensors[name]
            self._remember(name)
            tensor.data.copy_(values)

    def add(self, pair: Pair, weight: Tensor | None, constant: Tensor) -> None:
        """Add to the weight of a pair [stacks, rows, columns], and where it has a place for it the constant [stacks, rows]."""
        if weight is not None:
            self._add(pair.name, pair.at, weight)
        if pair.shift is not None:
            self._add(pair.shift.name, pair.shift.at, constant * pair.shift.sign)

    def _add(self, name: str, at: Tensor, values: Tensor) -> None:
        tensor, where = self.tensors[name].data, at.flatten().to(values.device)
        self._remember(name)
        flat = tensor.flatten()  # the tensor's own memory, where that is contiguous
        flat[where] = (flat[where].to(values.dtype) + values.flatten()).to(flat.dtype)
        tensor.copy_(flat.view(tensor.shape))

    def hand_to(self, run: Run, pair: Pair) -> None:
        """Let a run that has begun see the change: its buffers are copies, and the operands of a call may be casts."""
        for name in (pair.name, *([pair.shift.name] if pair.shift is not None else [])):
            run.write(name, self.tensors[name].detach())
        if run.call is None or run.call.consumer is not pair.small:
            return
        with torch.no_grad():
            operand, tensor = run.call.weight, self.tensors[pair.name].detach()
            if operand.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
                values = tensor.flatten()[pair.operand.to(tensor.device)]
                for d in [d for d in range(operand.dim()) if operand.stride(d) == 0]:
                    operand, values = operand.narrow(d, 0, 1), values.narrow(d, 0, 1)
                operand.copy_(values)
            if pair.shift is not None and pair.shift.argument is not None:
                bias, tensor = run.call.args[pair.shift.argument], self.tensors[pair.shift.name].detach()
                if bias.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
                    bias.copy_(tensor.view(bias.shape))

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

    def _remember(self, name: str) -> None:
        if name not in self.since:
            values = self.tensors[name].detach().clone()
            self.since[name] = values
            self.before.setdefault(name, values)

    def _restore(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in values.items():
                self.tensors[name].data.copy_(tensor)
