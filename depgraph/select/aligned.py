"""Widths that run fast where a model goes: what ``round_to="auto"`` means.

Measured on layers and whole models in eager torch, ONNX Runtime and OpenVINO (docs/speed-of-widths.md has the figures): a
runtime that lays the channels of two-dimensional convolutions out in blocks takes a slow path where their number is no
multiple of 4, at up to twice the seconds and more. Other layers take about what their work takes, at any width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from ..axes import polynomials
from ..axes.axes import Axis
from ..axes.nodes import is_convolution
from ..axes.ragged import is_ragged
from ..base.checks import whole_number
from ..base.errors import InputError
from ..grouping.graph import DependencyGraph

AUTO = "auto"
STEP = 4
COARSE = 0.25  # steps of a larger share of a width are none: such widths are free
NEAR = 0.01  # of a budget that may stay unused for the sake of speed
LARGEST = 2**31 - 1  # no dim is larger


def check_round_to(given: int | str) -> None:
    """Refuse what `round_to` can't be.

    Raises:
        InputError: it is neither "auto" nor a whole number from 1 on.
    """
    if not isinstance(given, str):
        whole_number("round_to", given, 1, LARGEST)
    elif given != AUTO:
        raise InputError(f"round_to must be {AUTO!r} or a whole number of at least 1, not {given!r}")


def spoken(text: str) -> int | str:
    """`round_to` from a word of the command line."""
    return text if text == AUTO else int(text)


def channels(graph: DependencyGraph) -> Iterator[Axis]:
    """The channels that two-dimensional convolutions read and write, each once."""
    seen: set[Axis] = set()
    for node in graph.trace.graph.nodes:
        if node.op != "call_function" or not is_convolution(node.target):
            continue
        for tensor in (node.args[0], node):
            dims = graph.state.dims[tensor][0] if tensor in graph.state.dims else []
            axis = dims[1].find() if len(dims) == 4 and dims[1] is not None else None
            if axis is not None and axis not in seen and not is_ragged(axis):
                seen.add(axis)
                yield axis


def parameter_dims(graph: DependencyGraph) -> Iterator[Axis]:
    """The axes that dims of parameters range over, each once."""
    seen: set[Axis] = set()
    for name in graph.trace.tensors:
        for axis in graph.dims(name):
            if axis is not None and axis.find() not in seen and not is_ragged(axis):
                seen.add(axis.find())
                yield axis.find()


def aligned(graph: DependencyGraph, kept: Mapping[Axis, int]) -> tuple[int, int]:
    """How many of `channels` shrank, and how many of these are multiples of `STEP`; `kept`: axis -> units that stay."""
    sizes = [(axis.size, polynomials.count(axis, kept)) for axis in channels(graph)]
    now = [(old, sum(n * prod(kept[a] for a in term) for term, n in size.items())) for old, size in sizes]
    return sum(new < old for old, new in now), sum(new < old and new % STEP == 0 for old, new in now)


def nearest(units: int, gone: int) -> int:
    """How many of `units` go, where `gone` are asked for: the number beside it that leaves a multiple of `STEP`, if there is one.

    What is as far from two multiples is as asked: half of a multiple of `STEP` is always half.
    """
    left = units - gone
    off = {1: -1, STEP - 1: 1}.get(left % STEP, 0)
    return gone - off if gone > 0 and left + off >= STEP else gone
