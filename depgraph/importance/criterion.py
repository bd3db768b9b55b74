"""What a criterion is: a function from a group to one score per unit, which may look at the model and at data before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..calibration import Calibration
from ..graph import DependencyGraph, Group

Scores = npt.NDArray[np.float64]
Importance = Callable[[Group], Any]  # scores [units]: a numpy array or a tensor


@runtime_checkable
class Prepared(Protocol):
    """A criterion that looks at the whole model, or at data, once before it scores group by group."""

    def prepare(self, graph: DependencyGraph, calibration: Calibration | None) -> None:
        """Look at `graph` and run `calibration`.

        Raises:
            InputError: it needs calibration data and got none.
        """

    def __call__(self, group: Group) -> Any:
        """Scores [units]; the lowest go first."""
