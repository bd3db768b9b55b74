"""Criteria: from a group to one score per unit. The lowest scores go first."""

from __future__ import annotations

from .magnitude import L1, Importance, Norms, scores_of

__all__ = ["L1", "Importance", "Norms", "scores_of"]
