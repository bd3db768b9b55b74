"""Criteria: from a group to one score per unit. The lowest scores go first."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from ..calibration import Calibration
from ..errors import InputError
from ..graph import DependencyGraph, Group
from .criterion import Importance, Prepared, Scores
from .magnitude import L1, Norms

# The names that `importance=` takes.
CRITERIA: dict[str, Callable[[], Importance]] = {"l1": L1}


def criterion_of(
    importance: str | Importance, graph: DependencyGraph, calibration: Calibration | None = None
) -> Importance:
    """The criterion that `importance` names or is, ready to score the groups of `graph`.

    Raises:
        InputError: no criterion has this name, or it needs calibration data.
    """
    if isinstance(importance, str):
        if importance.lower() not in CRITERIA:
            raise InputError(
                f"importance must be a function from a group to scores or one of {', '.join(CRITERIA)}, not {importance!r}"
            )
        importance = CRITERIA[importance.lower()]()
    if isinstance(importance, Prepared):
        importance.prepare(graph, calibration)
    return importance


def scores_of(
    graph: DependencyGraph,
    importance: str | Importance = "l1",
    groups: Iterable[Group] | None = None,
    calibration: Calibration | None = None,
) -> dict[int, Scores]:
    """One score per unit for every group.

    Args:
        graph: the dependency graph.
        importance: a name in `CRITERIA`, or a function from a `Group` to scores ([units], numpy array or tensor).
        groups: the groups to score, by default all.
        calibration: the data that some criteria need.

    Returns:
        id of the group's axis -> [units] float64.

    Raises:
        InputError: an unknown name, missing data, or scores of the wrong shape, or NaN.
    """
    score = criterion_of(importance, graph, calibration)
    found = {}
    for group in graph.groups if groups is None else groups:
        given = score(group)
        values = (
            given.detach().double().cpu().numpy()
            if isinstance(given, torch.Tensor)
            else np.asarray(given, dtype=float)
        )
        if values.shape != (group.units,):
            raise InputError(
                f"importance gave scores of shape {values.shape} for {group!r}: one per unit is needed"
            )
        if not np.isfinite(values).all():
            raise InputError(f"importance gave NaN or infinite scores for {group!r}: are its weights finite?")
        found[id(group.axis)] = values
    return found


__all__ = ["CRITERIA", "L1", "Importance", "Norms", "Prepared", "Scores", "criterion_of", "scores_of"]
