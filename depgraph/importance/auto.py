"""What `importance="auto"` stands for: the rule of docs/best.md."""

from __future__ import annotations

from typing import Any

from .criterion import Importance

AUTO = "auto"


def is_auto(importance: Any) -> bool:
    """Whether the rule is asked for."""
    return isinstance(importance, str) and importance.lower() == AUTO


def ruled(importance: str | Importance, calibrated: bool, competing: bool = False) -> str | Importance:
    """The criterion that the rule gives, where `importance` asks for it; else `importance` as it is.

    Args:
        importance: as for `prune`.
        calibrated: whether there is calibration data.
        competing: whether units of several groups compete, as under a budget.
    """
    if not is_auto(importance):
        return importance
    if calibrated:
        return "kfac_in_turn"
    return "lamp" if competing else "l1"
