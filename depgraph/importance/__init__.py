"""Criteria: from a group to one score per unit. The lowest scores go first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from ..base.checks import function, of_kind, several, shown
from ..base.errors import InputError
from ..data.calibration import Calibration
from ..grouping.given import unit_scores
from ..grouping.graph import DependencyGraph, Group
from .activation import ActivationMean, ActivationVariance, Flap, InputStatistic, Wanda
from .auto import AUTO, is_auto, ruled
from .criterion import Importance, Prepared, Scores
from .gradient import Fisher, GradientSize, Hessian, Taylor, TaylorEntries, TaylorSamples, TaylorSquared
from .in_turn import KfacInTurn
from .kfac import KfacObs
from .magnitude import L1, L2, ConsumerNorm, GeometricMedian, Lamp, Magnitude, Random, Scale, Spectrum
from .second_order import Correlation, Obs, Redundancy, SecondMoments

# The names that `importance=` takes.
CRITERIA: dict[str, Callable[[], Importance]] = {
    "l1": L1,
    "l2": L2,
    "lamp": Lamp,
    "fpgm": GeometricMedian,
    "bn_scale": Scale,
    "consumer_norm": ConsumerNorm,
    "spectrum": Spectrum,
    "random": Random,
    "gradient": GradientSize,
    "taylor": Taylor,
    "taylor_entries": TaylorEntries,
    "taylor_squared": TaylorSquared,
    "taylor_samples": TaylorSamples,
    "fisher": Fisher,
    "hessian": Hessian,
    "activation_mean": ActivationMean,
    "activation_variance": ActivationVariance,
    "wanda": Wanda,
    "flap": Flap,
    "correlation": Correlation,
    "redundancy": Redundancy,
    "obs": Obs,
    "kfac_obs": KfacObs,
    "kfac_in_turn": KfacInTurn,
}


def criterion_of(
    importance: str | Importance, graph: DependencyGraph, calibration: Calibration | None = None
) -> Importance:
    """The criterion that `importance` names or is, ready to score the groups of `graph`, or an `InputError`."""
    importance = ruled(importance, calibration is not None)
    if isinstance(importance, str):
        if importance.lower() not in CRITERIA:
            raise InputError(
                f"importance must be a function from a group to scores, or one of {', '.join((*CRITERIA, AUTO))}, "
                f"not {importance!r}"
            )
        importance = CRITERIA[importance.lower()]()
    criterion: Any = importance() if isinstance(importance, type) else importance
    if not callable(criterion):
        raise InputError(
            f"importance must be a name, a criterion or a function from a group to scores, not {shown(criterion)}"
        )
    function("importance", criterion, "group")
    if isinstance(criterion, Prepared):
        criterion.prepare(graph, calibration)
    return cast(Importance, criterion)


def normalisation(importance: str | Importance) -> str:
    """How scores of different groups are best made comparable (`select/normalise.py`): what the criterion says, or "mean"."""
    named = CRITERIA.get(importance.lower()) if isinstance(importance, str) else importance
    return str(getattr(named, "normalise", "mean"))


def needs_of(importance: str | Importance) -> str:
    """What a criterion looks at: "inputs" of layers, gradients of a "loss" for all weights, or weights alone."""
    named = CRITERIA.get(importance.lower()) if isinstance(importance, str) else importance
    return str(getattr(named, "needs", "weights"))


def by_cost(importance: str | Importance) -> bool:
    """Whether budgets best take the least score per saved cost first: what the criterion says, or not."""
    named = CRITERIA.get(importance.lower()) if isinstance(importance, str) else importance
    return bool(getattr(named, "per_cost", False))


def scores_of(
    graph: DependencyGraph,
    importance: str | Importance = AUTO,
    groups: Iterable[Group] | None = None,
    calibration: Calibration | None = None,
    notes: list[str] | None = None,
) -> dict[str, Scores]:
    """One score per unit for every group.

    Args:
        graph: the dependency graph.
        importance: "auto", a name in `CRITERIA`, a criterion, or a function from a `Group` to scores ([units], array or tensor).
        groups: the groups to score, by default all.
        calibration: the data that some criteria need.
        notes: what the criterion has to say of its scores is added here.

    Returns:
        group name -> [units] float64.

    Raises:
        InputError: an unknown name, missing data, or scores of the wrong shape, or NaN.
    """
    of_kind("graph", graph, DependencyGraph, "what depgraph.analyze returned")
    if calibration is not None:
        of_kind("calibration", calibration, Calibration, "a depgraph.Calibration")
    if notes is not None:
        of_kind("notes", notes, list, "a list")
    wanted = graph.groups if groups is None else several("groups", groups, Group, "groups of the graph")
    score = criterion_of(importance, graph, calibration)
    found = {g.name: unit_scores(score(g), g) for g in wanted}
    if notes is not None:
        notes += getattr(score, "notes", [])
    return found


__all__ = [
    "AUTO",
    "CRITERIA",
    "L1",
    "L2",
    "ActivationMean",
    "ActivationVariance",
    "ConsumerNorm",
    "Correlation",
    "Fisher",
    "Flap",
    "GeometricMedian",
    "GradientSize",
    "Hessian",
    "Importance",
    "InputStatistic",
    "KfacInTurn",
    "KfacObs",
    "Lamp",
    "Magnitude",
    "Obs",
    "Prepared",
    "Random",
    "Redundancy",
    "Scale",
    "Scores",
    "SecondMoments",
    "Spectrum",
    "Taylor",
    "TaylorEntries",
    "TaylorSamples",
    "TaylorSquared",
    "Wanda",
    "by_cost",
    "criterion_of",
    "is_auto",
    "needs_of",
    "normalisation",
    "ruled",
    "scores_of",
]
