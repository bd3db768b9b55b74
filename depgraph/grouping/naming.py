"""What users call things: modules, tensors, and globs of them."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .graph import DependencyGraph

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
