"""Example inputs: what users give, as positional and keyword arguments, one set for each run of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .errors import InputError
from .values import map_tensors, tensor_leaves

Outputs = Callable[[Any], Any] | str | Sequence[str]


@dataclass(frozen=True)
class Arguments:
    """One call of a model.

    Attributes:
        args, kwargs: what it is given.
        method: which method is called; "": the model itself.
        outputs: what counts of what it returns, see `Examples`; None: everything that it gives away.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    method: str = ""
    outputs: Outputs | None = None

    def run(self, model: torch.nn.Module) -> Any:
        """What `model` returns.

        Raises:
            InputError: it has no such method.
        """
        if not self.method:
            return model(*self.args, **self.kwargs)
        method = getattr(model, self.method, None)
        if not callable(method):
            raise InputError(
                f"{type(model).__name__} has no method {self.method!r} that an example could be for"
            )
        return method(*self.args, **self.kwargs)

    def counting(self, returned: Any) -> Any:
        """What counts of what a call `returned`.

        Raises:
            InputError: what was asked for is not there, or has no tensors.
        """
        if self.outputs is None:
            return returned
        if callable(self.outputs):
            try:
                found = self.outputs(returned)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                raise InputError(f"outputs failed on what the model returns: {text}") from error
        else:
            paths = [self.outputs] if isinstance(self.outputs, str) else list(self.outputs)
            found = [_at(returned, path) for path in paths]
        if not tensor_leaves(found):
            raise InputError(
                "outputs has no tensors: it must give those that count, of what the model returns"
            )
        return found


def _at(value: Any, path: str) -> Any:
    """What is at `path` (keys, positions and attributes, between dots) of what a model returned."""
    way = ""
    for step in path.split("."):
        if isinstance(value, Mapping):
            names = [str(k) for k in value]
            found = next((v for k, v in value.items() if str(k) == step), None)
        elif isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            names = [str(i) for i in range(len(value))]
            found = value[int(step)] if step in names else None
        else:
            fields = getattr(value, "_fields", None)
            names = list(fields) if fields else list(getattr(value, "__dict__", ()))
            found = getattr(value, step, None) if step in names else None
        if found is None:
            there = ", ".join(names[:20]) or f"a {type(value).__name__}, which has no parts"
            raise InputError(
                f"outputs={path!r}: there is no {step!r} in {way or 'what the model returns'}, but {there}"
            )
        value, way = found, f"{way}.{step}" if way else step
    return value


class Examples:
    """Several example inputs, where one run does not show all that a model does: ``Examples(x, (x, y), {"z": z})``.

    Each is a tensor, a tuple of positional arguments or a dict of keyword arguments. The model is traced on each, and
    checked on each: branches that depend on the input, experts that one batch chooses and another does not. Methods other than
    forward are examples by their names: ``Examples(x, encode=x, embed=(ids, mask))``.
    """

    def __init__(self, *examples: Any, outputs: Outputs | None = None, **methods: Any) -> None:
        """Each of `examples` as it would be given alone.

        Args:
            *examples: what the model itself is called with.
            outputs: what counts of what the model returns, the rest may get smaller: a function of that, or names in it
                (keys, positions and attributes, with dots between: ``"logits"``, ``"features.2"``), or one.
            **methods: name of a method -> what it is called with, in the same forms; all that it returns counts.

        Raises:
            InputError: there are none, one is itself `Examples`, or `outputs` is something else.
        """
        if not examples and not methods:
            raise InputError("Examples() has no example inputs: pass each as you would pass it alone")
        if any(isinstance(e, Examples) for e in (*examples, *methods.values())):
            raise InputError("Examples cannot contain Examples: pass all of them to one")
        self.examples, self.methods, self.outputs = examples, methods, checked_outputs(outputs)

    def __repr__(self) -> str:
        return f"Examples({len(self.examples) + len(self.methods)})"


def checked_outputs(outputs: Any) -> Any:
    """`outputs` as `Examples` takes it.

    Raises:
        InputError: it is neither a function nor names.
    """
    names = [outputs] if isinstance(outputs, str) else outputs
    listed = isinstance(names, (list, tuple)) and names and all(isinstance(n, str) and n for n in names)
    if outputs is None or (callable(outputs) and not isinstance(outputs, type)) or listed:
        return outputs
    raise InputError(
        f"outputs must be a function of what the model returns, or names in it such as 'logits' or ['features.2'], not {outputs!r}"
    )


def with_outputs(example_inputs: Any, outputs: Any) -> Any:
    """`example_inputs`, of which `outputs` say what counts.

    Raises:
        InputError: they say so themselves already; as for `checked_outputs`.
    """
    if outputs is None:
        return example_inputs
    if not isinstance(example_inputs, Examples):
        split_inputs(example_inputs)
        return Examples(example_inputs, outputs=outputs)
    if example_inputs.outputs is not None:
        raise InputError("outputs is given twice: in Examples and beside it")
    return Examples(*example_inputs.examples, outputs=outputs, **example_inputs.methods)


def split_inputs(example_inputs: Any) -> Arguments:
    """Positional and keyword arguments from a tensor, a tuple (or list) of arguments, or a dict of keyword arguments."""
    if example_inputs is None or (
        isinstance(example_inputs, (tuple, list, dict)) and not len(example_inputs)
    ):
        raise InputError(
            "no example inputs: pass a tensor, a tuple of positional arguments or a dict of keyword arguments "
            "that the model's forward accepts"
        )
    if isinstance(example_inputs, Mapping):
        return Arguments((), dict(example_inputs))
    if isinstance(example_inputs, (tuple, list)):
        return Arguments(tuple(example_inputs))
    return Arguments((example_inputs,))


def each_example(example_inputs: Any) -> list[Arguments]:
    """The arguments of every run: one, or as many as `Examples` holds."""
    if isinstance(example_inputs, Examples):
        own = [replace(split_inputs(e), outputs=example_inputs.outputs) for e in example_inputs.examples]
        return own + [replace(split_inputs(e), method=name) for name, e in example_inputs.methods.items()]
    return [split_inputs(example_inputs)]


def fresh_inputs(example_inputs: Any) -> Arguments:
    """The arguments of one run, copied: a model may write into them."""
    arguments: Arguments = map_tensors(split_inputs(example_inputs), torch.clone)
    return arguments
