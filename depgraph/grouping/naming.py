"""What users call things: modules, tensors, and globs of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..base.checks import of_kind, shown
from ..base.errors import InputError

if TYPE_CHECKING:
    from .graph import DependencyGraph

Name = str | nn.Module | torch.Tensor  # a module or tensor, by its name or itself, or a glob of names
NAMING = (
    "  fix: use a module path, a parameter or buffer name, or a glob of them, as named_modules() and "
    "named_parameters() print them; or the module or parameter itself"
)


def given_names(argument: str, given: Any) -> tuple[Name, ...]:
    """One name or several as a tuple.

    Raises:
        InputError: it is something else; `argument` is what the message calls it.
    """
    names = (given,) if isinstance(given, Name) else given
    if not isinstance(names, Iterable) or isinstance(names, Mapping):
        raise InputError(f"{argument} must be a list of names, not {shown(given)}\n{NAMING}")
    names = tuple(names)
    for name in names:
        of_kind(argument, name, Name, f"made of names\n{NAMING}\n ")  # type: ignore[arg-type]
    return names


def name_in(graph: DependencyGraph, given: Name) -> str:
    """What `graph` calls a module or parameter, or `given` itself, where that is a name.

    Raises:
        InputError: it is none of the model's.
    """
    if isinstance(given, str):
        return given
    model = graph.model
    known = (
        model.named_modules(remove_duplicate=False) if isinstance(given, nn.Module) else graph.tensors.items()
    )
    for name, one in known:
        if one is given:
            return name
    raise InputError(f"this {type(given).__name__} is not in the model: {shown(given)}\n{NAMING}")


def named(graph: DependencyGraph, given: Name) -> tuple[set[str], bool]:
    """The tensors that `given` names, and whether it names anything at all (a module without tensors, say).

    A module path stands for all tensors in it, and so does each module whose path a glob matches.
    """
    pattern = name_in(graph, given)
    modules = [path for path, _ in graph.model.named_modules(remove_duplicate=False)]
    paths = {path for path in modules if fnmatchcase(path, pattern)}

    def inside(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:i]) in paths for i in range(len(parts)))

    hit = {n for n in (*graph.tensors, *graph.trace.aliases) if fnmatchcase(n, pattern) or inside(n)}
    return hit, bool(hit or paths)
