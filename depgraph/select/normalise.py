"""Scores of different groups made comparable: the one step between a criterion and the choice of units.

With s the scores of an original dim (all its fragments together), n how many there are:

| name       | becomes                    | meaning |
|------------|----------------------------|---------|
| `none`     | s                          | scores that are comparable as they are: an estimate of the loss that a unit causes |
| `mean`     | s / mean abs(s)            | the average unit of every group counts the same (the default) |
| `sum`      | s / sum abs(s)             | groups count the same, so units of wide groups count less |
| `max`      | s / max abs(s)             | the best unit of every group counts the same |
| `standard` | (s - mean s) / std s       | standardised, as FLAP does it (An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024) |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..base.errors import InputError
from ..importance import Scores

NORMALISATIONS = ("none", "mean", "sum", "max", "standard")


def normalised(
    scores: Mapping[str, Scores], together: Sequence[Sequence[str]], how: str
) -> dict[str, Scores]:
    """Scores on one scale for each list of groups (by name) in `together`; see the module docstring.

    Raises:
        InputError: `how` is none of `NORMALISATIONS`.
    """
    if how not in NORMALISATIONS:
        raise InputError(f"normalise must be one of {', '.join(NORMALISATIONS)}, not {how!r}")
    out: dict[str, Scores] = {}
    for names in together:
        offset, scale = _scale(np.concatenate([scores[a] for a in names]), how)
        for a in names:
            out[a] = (scores[a] - offset) / scale
    return out


def _scale(values: Scores, how: str) -> tuple[float, float]:
    """What is taken off scores, and what they are then divided by."""
    if how == "none":
        return 0.0, 1.0
    if how == "standard":
        return float(values.mean()), float(values.std()) or 1.0
    size = np.abs(values)
    found = size.max() if how == "max" else size.sum() if how == "sum" else size.mean()
    return 0.0, float(found) or 1.0
