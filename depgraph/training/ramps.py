"""How much is removed after each share of the way: one formula each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import cos, isfinite, pi, sin
from typing import Any

from torch import nn

from ..base.checks import function, shown
from ..base.errors import InputError
from ..select import BUDGETS

Ramp = Callable[[float], float]  # share of the way -> share of what is to be removed


RAMPS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda t, share: share * t,
    # Much at first, ever less towards the end: Zhu and Gupta, "To prune, or not to prune", 2017, equation 1 with an
    # initial sparsity of 0.
    "cubic": lambda t, share: share * (1 - (1 - t) ** 3),
    # Each step removes the same share of what is left, as Frankle and Carbin (2019) do.
    "exponential": lambda t, share: 1 - (1 - share) ** t,
    # Slow at both ends.
    "cosine": lambda t, share: share * (1 - cos(pi * t)) / 2,
    # A quarter of a sine: much at first, level at the end.
    "sinusoidal": lambda t, share: share * sin(pi * t / 2),
    # All of it in the first step.
    "one_shot": lambda t, share: share if t > 0 else 0.0,
}


def ramp_of(ramp: str | Ramp) -> Callable[[float, float], float]:
    """``removed(t, share)``: the share that is removed after the share t of the way, where `share` is in the end.

    `ramp` is a name in `RAMPS`, or a function from 0..1 to 0..1 that scales the share; 1 must give 1.
    """
    if isinstance(ramp, str) and ramp in RAMPS:
        return RAMPS[ramp]
    if not callable(ramp):
        raise InputError(f"ramp must be a function or one of {', '.join(RAMPS)}, not {shown(ramp)}")
    function("ramp", ramp, "way")

    def removed(t: float, share: float) -> float:
        way = ramp(t)
        if not isinstance(way, (int, float)) or not 0 <= way <= 1 or not isfinite(way):
            raise InputError(f"ramp({t}) gave {way!r}: a share from 0 to 1 is needed")
        return share * way

    if removed(1.0, 1.0) != 1.0:
        raise InputError("ramp(1.0) must give 1.0: the last step removes everything")
    return removed


@dataclass(frozen=True)
class Schedule:
    """What `prune` is asked for in the end, and on the way.

    Attributes:
        ratios: arguments that hold shares to remove: ``pruning_ratio``, ``scope``, ``threshold``.
        limits: budget -> (what the original has, what is allowed in the end), in seconds or as a count.
        example_inputs: for budgets that are counted on a run.
    """

    ratios: dict[str, Any]
    limits: dict[str, tuple[float, float]]
    example_inputs: Any

    @classmethod
    def read(cls, model: nn.Module, example_inputs: Any, options: dict[str, Any]) -> Schedule:
        """Take the aims out of the arguments of `prune`; 0.5 as `pruning_ratio` where there are none."""
        limits = {}
        for name, kind in BUDGETS.items():
            given = options.pop(name, None)
            if given is not None:
                kind.check(given)
                whole = float(kind.measure(model, example_inputs))
                limits[name] = whole, kind.amount(given, whole)
        pair = options.get("threshold")
        if isinstance(pair, tuple) and not (
            len(pair) == 2 and all(isinstance(v, (int, float)) for v in pair)
        ):
            raise InputError(
                f"threshold must be a number or two (for the beginning and the end), not {pair!r}"
            )
        ratios = {
            n: options.pop(n) for n in ("pruning_ratio", "scope", "threshold") if options.get(n) is not None
        }
        scope = ratios.get("scope")
        scoped = isinstance(scope, (list, tuple)) and any(
            getattr(s, "ratio", None) is not None for s in scope
        )
        if not (limits or scoped or ratios.keys() & {"pruning_ratio", "threshold"}):
            ratios["pruning_ratio"] = 0.5
        return cls(ratios, limits, example_inputs)

    def at(
        self, removed: Callable[[float], float], model: nn.Module | None = None, way: float = 1.0
    ) -> dict[str, Any]:
        """The arguments of `prune` with every share that is to go replaced by ``removed(share)``; {}: nothing is to be done.

        Budgets that `model` keeps already are left out. A pair of thresholds is for the beginning and the end of the `way`.
        """
        asked: dict[str, Any] = {}
        for name, (whole, last) in self.limits.items():
            limit = max(last, whole - whole * removed(1 - last / whole))
            if model is None or BUDGETS[name].measure(model, self.example_inputs) > limit:
                asked[name] = BUDGETS[name].spell(limit)
        ratio, scope = self.ratios.get("pruning_ratio"), self.ratios.get("scope")
        if isinstance(ratio, Mapping):
            asked["pruning_ratio"] = {name: removed(share) for name, share in ratio.items()}
        elif ratio is not None and removed(ratio) > 0:
            asked["pruning_ratio"] = removed(ratio)
        if "threshold" in self.ratios:
            asked["threshold"] = self._threshold(removed, way)
        shares = {i: removed(s.ratio) for i, s in enumerate(scope or ()) if getattr(s, "ratio", None)}
        if scope is not None and (shares or asked):
            scoped = (
                [replace(s, ratio=shares.get(i, s.ratio)) for i, s in enumerate(scope)] if shares else scope
            )
            asked["scope"] = scoped
        return asked

    def _threshold(self, removed: Callable[[float], float], way: float) -> float:
        """A number grows along the ramp; of two the first turns into the second evenly."""
        given = self.ratios["threshold"]
        if not isinstance(given, tuple):
            return float(given * removed(1.0))
        first, last = given
        return float(first + (last - first) * way)
