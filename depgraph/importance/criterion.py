"""What a criterion is: a function from a group to one score per unit, which may look at the model and at data before."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, Protocol, get_args, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..base.errors import InputError
from ..data.calibration import Calibration
from ..grouping.graph import DependencyGraph, Group, Member, Role

Scores = npt.NDArray[np.float64]
Importance = Callable[[Group], Any]  # scores [units]: a numpy array or a tensor


@runtime_checkable
class Prepared(Protocol):
    """A criterion that looks at the whole model, or at data, once before it scores group by group."""

    def prepare(self, graph: DependencyGraph, calibration: Calibration | None) -> None:
        """Look at `graph` and run `calibration` (None where the user gave none).

        Raises:
            InputError: it needs calibration data and got none.
        """

    def __call__(self, group: Group) -> Any:
        """Scores [units]; the lowest go first."""


def needed(calibration: Calibration | None, what: str) -> Calibration:
    """`calibration`, or an `InputError` that says `what` the criterion needs."""
    if calibration is None:
        raise InputError(f"this importance uses {what}: give calibration=[...], a few batches of inputs")
    return calibration


def counted(group: Group, parameters: Container[str], roles: Sequence[str] = ()) -> list[Member]:
    """The members of `group` in `roles` (all, if none is) that are parameters, the one that it is named after first."""
    members = [m for m in group.members if m.name in parameters]
    first = group.first
    members.sort(key=lambda m: (m.name, m.dim) != (first.name, first.dim))
    return [m for m in members if m.role in roles] or members


def checked_roles(roles: Sequence[str]) -> tuple[str, ...]:
    """`roles` as a tuple, or an `InputError`."""
    known = get_args(Role)
    if isinstance(roles, str) or set(roles) - set(known):
        raise InputError(f"roles must be a list of {', '.join(map(repr, known))}, not {roles!r}")
    return tuple(roles)


# How the scores of a group's members [members, units] become those of its units.
REDUCTIONS: dict[str, Callable[[Scores], Any]] = {
    "sum": lambda s: s.sum(0),
    "mean": lambda s: s.mean(0),
    "max": lambda s: s.max(0),
    # the geometric mean: it orders units as the product does, and neither overflows nor vanishes with many members
    "product": lambda s: np.exp(np.log(np.maximum(s, 1e-300)).mean(0)),
    "first": lambda s: s[0],
}


def reduction(name: str) -> Callable[[Scores], Any]:
    """The one of `REDUCTIONS` that has this name, or an `InputError`."""
    if name not in REDUCTIONS:
        raise InputError(f"reduce must be one of {', '.join(REDUCTIONS)}, not {name!r}")
    return REDUCTIONS[name]
