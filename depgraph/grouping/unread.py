"""Sizes that modules remember and that forward does not read: they follow what they repeat, or the report names them.

A method other than forward (one that fuses branches, one that puts another head on, an export) reads them later. Such an
attribute repeats the size of something that its module sees: its own tensors and those of its children, what it
computes, what it and its children take and give. Where everything of that size there stays equal, the attribute
follows; where it does not, what the class computes it from may say which it is (see `config/arguments.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..axes import axes, polynomials
from ..axes.axes import Axis
from ..axes.polynomials import Polynomial
from ..base.values import is_plain_object
from ..config.arguments import rebuilt
from ..config.origin import shapes_of
from ..plan.plan import Plan
from ..surgery.apply import follows_weight, repeated_size
from ..tracing.attributes import INTERNALS
from ..tracing.code_reads import read_by_calls, read_elsewhere
from ..tracing.recorder import Node, record_of

if TYPE_CHECKING:
    from .graph import DependencyGraph

Key = tuple[Any, ...]  # ("attr", module path, attribute, *keys), as in sizes.py
SMALLEST = 2  # a lower number is no size that could shrink
LONGEST = 64  # entries of a list that are looked at
CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def unread_sizes(graph: DependencyGraph) -> dict[Key, list[Polynomial]]:
    """Attributes that forward does not read -> the counts of what has their size where their module stands.

    Only those of which some count can change.
    """
    read = read_by_calls(graph.model)
    known = graph.sizes.attributes.keys() | graph.origins.attributes.keys() | graph.trace.reads
    wanted: dict[str, list[dict[Key, int]]] = {}
    for path, module in graph.model.named_modules():
        for name, value in vars(module).items():
            if name in INTERNALS or name in read[type(module)] or follows_weight(module, name):
                continue
            for numbers in _numbers(("attr", path, name), value):
                if not numbers.keys() & known:
                    wanted.setdefault(path, []).append(numbers)
    found: dict[Key, list[Polynomial]] = {}
    for path, seen in _seen(graph, wanted.keys()).items():
        by_size: dict[int, list[Polynomial]] = {}
        for axis in seen.values():
            count = polynomials.count(axis, graph.by_axis)
            counts = by_size.setdefault(axis.size, [])
            if count not in counts:
                counts.append(count)
        for numbers in wanted[path]:
            counted = _as_returned(graph, path, numbers)
            if counted is None and all(n in by_size for n in numbers.values()):
                counted = {key: by_size[n] for key, n in numbers.items()}
            for key, counts in (counted or {}).items():
                if any(term for p in counts for term in p):
                    found[key] = counts
    return found


def _as_returned(
    graph: DependencyGraph, path: str, numbers: dict[Key, int]
) -> dict[Key, list[Polynomial]] | None:
    """The counts of the tensors that the module returns, where `numbers` are one size of each of them, in their order."""
    nodes = graph.trace.returned.get(path, [])
    if len(nodes) != len(numbers):
        return None
    for d in range(-1, -1 - min(len(record_of(n).shape) for n in nodes), -1):
        for dim in (d, -1 - d):
            if [record_of(n).shape[dim] for n in nodes] == list(numbers.values()):
                axes_ = [graph.state.dims[n][0][dim] for n in nodes]
                return {k: [polynomials.count(a, graph.by_axis)] for k, a in zip(numbers, axes_, strict=True)}
    return None


def unread_values(
    graph: DependencyGraph, plan: Plan, counts: Mapping[Axis, int]
) -> tuple[dict[Key, int], list[Key]]:
    """What becomes of `unread_sizes` in `plan`, which keeps `counts`: those that change, and those of which it can't be told.

    The latter only where some method reads them.
    """
    changed: dict[Key, int] = {}
    unclear: list[Key] = []
    for key, found in graph.unread.items():
        values = {int(polynomials.evaluate(p, counts)) for p in found}
        value = values.pop() if len(values) == 1 else _of_part(graph, plan, key)
        value = _of_class(graph, plan, key) if value is None else value
        if value is None:
            kind: type = type(graph.model.get_submodule(key[1]))
            if key[2] in read_elsewhere(kind):
                unclear.append(key)
        elif value != graph.sizes.value(key):
            changed[key] = value
    return changed, unclear


def _of_part(graph: DependencyGraph, plan: Plan, key: Key) -> int | None:
    """What becomes of an attribute that a part of the module has, too, under the same name: of a layer that it wraps."""
    path, name = key[1:3]
    outer, inside = graph.model.get_submodule(path), f"{path}." if path else ""
    found = set()
    for inner, part in outer.named_children() if len(key) == 3 else ():
        repeated = repeated_size(part, name)
        if repeated is not None and getattr(part, name) == getattr(outer, name):
            tensor, dim = repeated
            shape = plan.shapes.get(place := f"{inside}{inner}.{tensor}")
            found.add(None if shape is None else plan.new_shape(place)[dim])
    return found.pop() if len(found) == 1 else None


def _of_class(graph: DependencyGraph, plan: Plan, key: Key) -> int | None:
    """What becomes of an attribute, where the class of its module says from which size it is computed."""
    path = key[1]
    module = graph.model.get_submodule(path)
    kind: type = type(module)
    numbers = tuple((n, v) for n, v in vars(module).items() if type(v) is int)
    alike = kind, tuple(shapes_of(module).items()), numbers
    if alike not in graph.rebuilt:
        graph.rebuilt[alike] = rebuilt(module)
    found = graph.rebuilt[alike]
    inside = f"{path}." if path else ""
    shapes = {name: plan.new_shape(inside + name) for name in shapes_of(module)}
    return None if found is None else found.value(("attr", "", *key[2:]), shapes)


def _numbers(key: Key, value: Any) -> Iterator[dict[Key, int]]:
    """The numbers in an attribute that can be sizes: one, or those of a list, which are sizes all or none.

    Also each entry of a dict, each field of a list of dicts, and the lists that a plain object there holds.
    """
    if type(value) is int and value >= SMALLEST:
        yield {key: value}
    elif type(value) in (list, tuple) and 0 < len(value) <= LONGEST:
        if all(type(v) is int for v in value):
            yield {(*key, i): v for i, v in enumerate(value)}
        elif all(type(v) is dict for v in value):
            for name in value[0]:
                if all(type(v.get(name)) is int for v in value):
                    yield {(*key, i, name): v[name] for i, v in enumerate(value)}
    elif type(value) is dict and len(value) <= LONGEST:
        for name, held in value.items():
            if type(name) in (str, int):
                yield from _numbers((*key, name), held)
    elif is_plain_object(value):
        for name, held in vars(value).items():
            if type(held) in (list, tuple):
                yield from _numbers((*key, name), held)


def _seen(graph: DependencyGraph, wanted: Iterable[str]) -> dict[str, dict[int, Axis]]:
    """Path of a module -> the axes that it sees, by id."""
    seen: dict[str, dict[int, Axis]] = {path: {} for path in wanted}
    outer = _outer(graph.model)
    sized = graph.sizes.ranging.of_tensors

    def add(path: str | None, axis: Axis | None) -> None:
        if path is not None and path in seen and axis is not None:
            axis = axis.find()
            if all(a in sized for a in axes.atoms(axis)):
                seen[path][id(axis)] = axis

    for name in graph.trace.tensors:
        owner = name.rpartition(".")[0]
        for axis in graph.dims(name):
            add(owner, axis)
            add(outer.get(owner), axis)
    for node, results in graph.state.dims.items():
        if node.op == "get_attr":
            continue
        made = record_of(node).module
        for axis in (axis for dims in results for axis in dims):
            add(made, axis)
            for path in _crossed(node, made):
                add(path, axis)
                add(outer.get(path), axis)
    return seen


def _outer(model: nn.Module) -> dict[str, str]:
    """Path of a module -> that of the one that calls it: the next that is no mere list."""
    found: dict[str, str] = {}
    lists = {path for path, module in model.named_modules() if isinstance(module, CONTAINERS)}
    for path, _ in model.named_modules():
        above = path.rpartition(".")[0]
        while above in lists:
            above = above.rpartition(".")[0]
        if path:
            found[path] = above
    return found


def _crossed(node: Node, made: str) -> set[str]:
    """The modules that a result of `node`, which module `made` computed, enters or leaves."""
    inside = set(_around(made))
    found: set[str] = set()
    for user in node.users:
        there = set(_around(record_of(user).module)) if user.op == "call_function" else set()
        found |= inside ^ there
    return found


def _around(path: str) -> Iterator[str]:
    """A module and those that it is in, but for the model itself."""
    while path:
        yield path
        path = path.rpartition(".")[0]
