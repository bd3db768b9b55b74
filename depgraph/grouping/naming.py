"""What users call things: modules, tensors, globs of them, groups and dims."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ..axes.axes import Axis
from ..base.errors import InputError
from .members import Group

if TYPE_CHECKING:
    from .graph import DependencyGraph

Place = Group | str  # a group, or a dim: "tensor:dim"
NAMING = (
    "  fix: use a module path, a parameter or buffer name, or a glob of them, as named_modules() and "
    "named_parameters() print them"
)


def named(graph: DependencyGraph, pattern: str) -> tuple[set[str], bool]:
    """The tensors that `pattern` names, and whether it names anything at all (a module without tensors, say).

    A module path stands for all tensors in it, and so does each module whose path a glob matches.
    """
    modules = [path for path, _ in graph.model.named_modules(remove_duplicate=False)]
    paths = {path for path in modules if fnmatchcase(path, pattern)}

    def inside(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:i]) in paths for i in range(len(parts)))

    hit = {n for n in (*graph.tensors, *graph.trace.aliases) if fnmatchcase(n, pattern) or inside(n)}
    return hit, bool(hit or paths)


def axis_at(graph: DependencyGraph, place: Place) -> Axis:
    """The axis at `place`.

    Raises:
        InputError: there is no such place in `graph`, or its size is 1.
    """
    if isinstance(place, Group):
        if graph.by_axis.get(place.key) is not place:
            raise InputError(f"{place!r} is no group of this graph")
        return place.axis
    name, _, dim = str(place).rpartition(":")
    dims = graph.dims(name)
    if not dim.isdigit() or int(dim) >= len(dims):
        raise InputError(
            f"{place!r} is no dim that a traced run used\n"
            "  fix: give a group, or a parameter or buffer name and a dim, as in 'layers.0.weight:0'"
        )
    axis = dims[int(dim)]
    if axis is None:
        raise InputError(f"{place!r} has size 1: nothing of it can go")
    return axis.find()
