"""Equal widths."""

from __future__ import annotations

from ..graph import DependencyGraph
from .factors import Tie


def ties(graph: DependencyGraph) -> list[Tie]:
    """None yet."""
    return []
