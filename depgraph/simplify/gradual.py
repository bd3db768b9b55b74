"""Zeros step by step, with training between, on the ramps of gradual pruning, and back where the score falls too far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..base.checks import function, is_number
from ..base.errors import InputError
from ..base.progress import track
from ..base.running import Score, score_of
from ..plan.plan import Plan
from ..surgery.lineage import plans_of
from ..training.ramps import Ramp, ramp_of
from ..training.schedule import Drop, Tried, checked_drop
from .masking import DEFAULT, mask
from .result import Simplified, Summary


@dataclass(repr=False)
class GradualMask(Simplified):
    """What `mask_gradually` returns: a `Simplified` whose plan is from the original, and the steps.

    Attributes:
        history: a `Tried` for each step: how far it went, the weights left, the score after training, whether it was kept.
    """

    history: tuple[Tried, ...] = ()


def mask_gradually(
    model: nn.Module, x: Any = None, *, sparsity: float = DEFAULT, threshold: float | tuple[float, float] | None = None,
    steps: int = 10, ramp: str | Ramp = "cubic", train: Callable[[nn.Module, int], Any] | None = None,
    score: Score | None = None, max_drop: Drop | None = None, backtracks: int = 3, progress: bool | None = None,
    **options: Any,
) -> GradualMask:  # fmt: skip
    """`mask` in several steps with training in between; the arguments of the way are those of `prune_gradually`.

    Args:
        model: stays as it is, also where the call is interrupted.
        x: as for `mask`.
        sparsity: the share of zeros in the end.
        threshold: instead of a share: a number, which is approached along the ramp (``ramp="one_shot"`` fixes it), or two, of
            which the first turns into the second evenly.
        steps: how many steps lead there.
        ramp: "linear", "cubic", "exponential", "cosine", "sinusoidal", "one_shot", or a function from 0..1 to 0..1.
        train: ``train(model, step)``, called after each step (from 0), trains the masked model in place; zeros stay.
        score: ``score(model)`` -> a number, higher is better, of the model after training.
        max_drop: how far the score may fall below the dense model's: a number, or two for the beginning and the end. A model
            below that is given up: the last good one is masked by half of that step, `backtracks` times.
        backtracks: how many tries are left after the first model that was given up.
        progress: show a bar; None: on a terminal alone.
        **options: as for `mask`: scope, importance, pattern of blocks, ignore, calibration, loss.

    Returns:
        the last good model, the plan from the original to it, a report, and the history.

    Raises:
        InputError: as for `mask`, before anything is trained.
    """
    drop = checked_drop(steps, score, max_drop, backtracks, {})
    how_much = _amounts(ramp_of(ramp), sparsity, threshold)
    if train is not None:
        function("train", train, "model", "step")
    mask(model, x, **how_much(1.0), **options)  # what can't be done fails here
    dense = None if score is None else score_of(score, model)
    good, history = mask(model, x, **(how_much(1.0) | {"sparsity": 0.0, "threshold": None}), **options), []
    done, failed, left = 0.0, None, backtracks
    tries = track(range(steps + backtracks + 1), "masking step by step", progress)
    for number in tries:
        if failed is None:
            way = (round(done * steps) + 1) / steps
        else:
            way, left = (done + failed) / 2, left - 1
        if way > 1 or left < 0:
            break
        result = mask(good.model, x, **how_much(way), **options)
        if train is not None:
            train(result.model, number)
        value = None if score is None else score_of(score, result.model)
        kept = (
            drop is None
            or dense is None
            or value is None
            or value >= dense - drop[0] - (drop[1] - drop[0]) * way
        )
        history.append(Tried(way, result.report.parameters[1], value, kept))
        if kept:
            good, done = result, way
        else:
            failed = way
    tries.close()
    lost = [f"step to {t.way:.1%} of the way: score {t.score:.4g}, given up" for t in history if not t.kept]
    plan: Plan = good.plan  # each mask has the zeros of those before
    report: Summary = good.report
    report.notes += lost
    return GradualMask(good.model, plan, report, plans_of(model), tuple(history))


def _amounts(
    removed: Callable[[float, float], float], sparsity: float, threshold: Any
) -> Callable[[float], dict[str, Any]]:
    """The arguments of `mask` after a share of the way."""
    if threshold is None:
        return lambda way: {"sparsity": sparsity if way == 1 else removed(way, sparsity)}
    pair = threshold if isinstance(threshold, tuple) else (threshold,)
    if len(pair) not in (1, 2) or not all(is_number(v) for v in pair):
        raise InputError(
            f"threshold must be a number or two (for the beginning and the end), not {threshold!r}"
        )
    if len(pair) == 1:
        return lambda way: {"threshold": removed(way, 1.0) * pair[0]}
    return lambda way: {"threshold": pair[0] + (pair[1] - pair[0]) * way}
