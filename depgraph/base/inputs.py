"""Example inputs: what users give, as positional and keyword arguments, one set for each run of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .errors import InputError
from .values import map_tensors

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Examples:
    """Several example inputs, where one run does not show all that a model does: ``Examples(x, (x, y), {"z": z})``.

    Each is a tensor, a tuple of positional arguments or a dict of keyword arguments. The model is traced on each, and
    checked on each: branches that depend on the input, experts that one batch chooses and another does not.
    """

    def __init__(self, *examples: Any) -> None:
        """Each of `examples` as it would be given alone.

        Raises:
            InputError: there are none, or one is itself `Examples`.
        """
        if not examples:
            raise InputError("Examples() has no example inputs: pass each as you would pass it alone")
        if any(isinstance(e, Examples) for e in examples):
            raise InputError("Examples cannot contain Examples: pass all of them to one")
        self.examples = examples

    def __repr__(self) -> str:
        return f"Examples({len(self.examples)})"


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
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def each_example(example_inputs: Any) -> list[Arguments]:
    """The arguments of every run: one, or as many as `Examples` holds."""
    if isinstance(example_inputs, Examples):
        return [split_inputs(e) for e in example_inputs.examples]
    return [split_inputs(example_inputs)]


def fresh_inputs(example_inputs: Any) -> Arguments:
    """The arguments of one run, copied: a model may write into them."""
    arguments: Arguments = map_tensors(split_inputs(example_inputs), torch.clone)
    return arguments
