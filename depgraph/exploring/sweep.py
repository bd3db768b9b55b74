"""The trade-off curve: one model pruned to many ratios or budgets, each scored."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, cast

from torch import nn

from ..base.checks import a_module, flag, function, of_kind, several
from ..base.errors import DepgraphError, InputError
from ..base.progress import track
from ..base.running import Score, score_of
from ..base.tables import printed, table
from ..costs import cost
from ..costs.latency import latencies
from ..data.calibration import Calibration
from ..grouping.graph import DependencyGraph, Group
from ..importance import AUTO, Importance, Scores, by_cost, normalisation, ruled, scores_of
from ..prune import OF_ANALYZE, PruneResult, analyze, as_module, compete, prune, recovery_of
from ..select import BUDGETS, Request
from ..select.budget_kinds import budget_kind
from ..surgery.apply import apply
from . import pictures
from .records import Records, name_of

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Key = tuple[str, float | str]
OWN = ("pruning_ratio", "score", "graph", "inplace", "latency", "progress")  # not to be passed on to `prune`


@dataclass(frozen=True)
class Row:
    """One model of a sweep.

    Attributes:
        argument, value: what `prune` was asked: ``"pruning_ratio", 0.3`` or ``"max_latency", "12ms"``; ``"dense", 0`` is
            the model as given.
        params, macs, bytes: of the model; MACs are those of one forward pass.
        latency: median seconds of one forward pass on this machine; None where it was not measured.
        score: what the score function gave.
        error: why there is no such model, or no score of it; what could not be measured is then None.
        speedup: how many times faster than the dense model, which took turns with it.
    """

    argument: str
    value: float | str
    params: int | None = None
    macs: int | None = None
    bytes: int | None = None
    latency: float | None = None
    score: float | None = None
    error: str | None = None
    speedup: float | None = None

    @property
    def name(self) -> str:
        """``pruning_ratio=0.3``."""
        value = self.value if isinstance(self.value, str) else f"{self.value:g}"
        return "dense" if self.argument == "dense" else f"{self.argument}={value}"


@dataclass
class Sweep:
    """What `sweep` measured; prints as a table.

    Attributes:
        dense: the model as it was given.
        rows: the pruned models, in the order in which they were asked for.
        title: of the table.
    """

    dense: Row
    rows: list[Row]
    _run: _Run | None = field(default=None, repr=False, compare=False)
    title: str = "sweep"

    def prune(self, row: Row) -> PruneResult:
        """The model of a row with its plan and report: the one that was scored. No argument is repeated.

        A row that a file had from an earlier run is pruned again.

        Args:
            row: one of `rows`, such as `smallest` gives.

        Raises:
            InputError: it is no row of this sweep, there is no such model, or it would not be the one that was measured.
            DepgraphError: what `prune` raises.
        """
        of_kind("row", row, Row, "a row of this sweep")
        if self._run is None or row not in self.rows:
            raise InputError(f"{row.name} is no row of this sweep: give one of its rows")
        if row.params is None:
            raise InputError(f"there is no model of {row.name}: {row.error}")
        result = self._run.again(row.argument, row.value)
        made = cost.parameter_count(result.model)
        if made != row.params:
            raise InputError(
                f"{row.name} had {row.params:,} parameters when it was scored and has {made:,} now: the model, its calibration "
                "or what a latency is measured on is another\n  fix: sweep anew"
            )
        return result

    def smallest(self, drop: float, by: str = "macs") -> Row | None:
        """The row with the least MACs whose score is at most `drop` below that of the dense model; None: there is none.

        Args:
            drop: in units of the score.
            by: ``"macs"``, ``"params"``, ``"bytes"`` or ``"latency"``.

        Raises:
            InputError: `by` is none of these, or was not measured.
        """
        if by not in ("macs", "params", "bytes", "latency") or getattr(self.dense, by) is None:
            raise InputError(f"by must be a measured figure (macs, params, bytes, latency), not {by!r}")
        least = (self.dense.score or 0.0) - drop
        fine = [r for r in self.rows if r.error is None and r.score is not None and r.score >= least]
        return min(fine, key=lambda r: getattr(r, by), default=None)

    def left(self, row: Row, by: str) -> float | None:
        """The share of the dense model's `by` ("macs", "params", "bytes" or "latency") that `row` has; None: unknown."""
        if by == "latency":
            return 1 / row.speedup if row.speedup else None
        now, whole = getattr(row, by), getattr(self.dense, by)
        return now / whole if now is not None and whole else None

    def to_dict(self) -> dict[str, Any]:
        """All rows as plain data."""
        return {"dense": asdict(self.dense), "rows": [asdict(r) for r in self.rows]}

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw score against MACs, parameters and latency; see `pictures.trade_off`. `path` is where to write it."""
        return pictures.trade_off(self, path)

    def __str__(self) -> str:
        timed, scored = self.dense.latency is not None, self.dense.score is not None
        times = ("ms", "speed-up") if timed else ()
        scores = ("score", "change") if scored else ()
        cells = table(self.title, "asked", "parameters", "left", "MACs", "left", *times, *scores)
        for row in (self.dense, *self.rows):
            cells.add_row(row.name, *self._cells(row, timed))
        return printed(cells, *(f"{row.name}: {row.error}" for row in self.rows if row.error))

    def _cells(self, row: Row, timed: bool) -> list[str]:
        cells = []
        for now, by in ((row.params, "params"), (row.macs, "macs")):
            left = self.left(row, by)
            cells += ["-", "-"] if left is None else [f"{now:,}", f"{left:.1%}"]
        if timed:
            seconds, speedup = row.latency, row.speedup
            cells += ["-", "-"] if not seconds or not speedup else [f"{seconds * 1e3:.2f}", f"{speedup:.2f}x"]
        if self.dense.score is None:
            return cells
        if row.score is None:
            return [*cells, "failed", ""]
        return [*cells, f"{row.score:.4g}", f"{row.score - (self.dense.score or 0.0):+.3g}"]


class ScoredOnce:
    """A criterion that scores the groups of one graph once, however often they are asked for.

    Attributes:
        normalise: how the scores of different groups compare, as the criterion says.
        per_cost: whether budgets go by score per saved cost, likewise.
    """

    def __init__(self, importance: str | Importance) -> None:
        """`importance`: as for `prune`."""
        self.importance = importance
        self.normalise, self.per_cost = normalisation(importance), by_cost(importance)
        self.graph: DependencyGraph | None = None
        self.scores: dict[str, Scores] = {}

    def prepare(self, graph: DependencyGraph, calibration: Calibration | None = None) -> None:
        """Score all groups of `graph`, unless that was the last one."""
        if graph is not self.graph:
            self.scores = scores_of(graph, self.importance, calibration=calibration)
            self.graph = graph

    def __call__(self, group: Group) -> Scores:
        """[units] float64."""
        return self.scores[group.name]


def sweep(
    model: nn.Module,
    example_inputs: Any,
    ratios: Sequence[float] | None = None,
    *,
    budgets: Mapping[str, Sequence[float | str]] | None = None,
    score: Score,
    file: str | os.PathLike[str] | None = None,
    latency: bool = True,
    progress: bool | None = None,
    **prune_arguments: Any,
) -> Sweep:
    """Prune `model` to several ratios or budgets, each from the model as it is, and score what comes out.

    The model is traced and its units are scored once; each row has its own plan, and is verified. One that can't be made
    (a budget that can't be reached, a score that fails) says why, and the others continue.

    Args:
        model: any module; it stays as it is, also after an exception or Ctrl-C.
        example_inputs: as for `prune`.
        ratios: values of `pruning_ratio`; by default 0.1 to 0.9, where no `budgets` are given.
        budgets: values for other arguments of `prune`: ``{"max_macs": (0.8, 0.6, 0.4), "max_params": (0.5,)}``.
        score: ``score(model)`` -> a number, higher is better, called with each model in eval mode.
        file: rows are appended to it as they come (JSON lines); those that it has and that did not fail are not computed
            again. It belongs to one model (its values), score function (its name), set of example inputs and of arguments.
        latency: measure seconds of a forward pass on `example_inputs`, each model in turns with the dense one.
        progress: a bar over the rows; None: on a terminal alone.
        prune_arguments: passed on to `prune` for each row: ``importance``, ``ignore``, ``round_to``, ``calibration`` ...

    Raises:
        InputError: bad arguments, or `file` has rows of another run.
        DepgraphError: what `analyze` raises; a score of the dense model that is not a number.
    """
    function("score", score, "model")
    flag("latency", latency)
    a_module("model", model := as_module(model))
    asked = _asked(ratios, budgets, prune_arguments)
    arguments = dict(prune_arguments)
    if isinstance(arguments.get("calibration"), Iterator):
        arguments["calibration"] = list(arguments["calibration"])  # each row reads it
    run = _Run(model, example_inputs, score, latency, arguments)
    subject = {"kind": "sweep", "model": run.model, "example_inputs": example_inputs}
    records = Records(file, {**subject, "score": name_of(score), "latency": latency, "arguments": arguments})
    known = {(r["argument"], r["value"]): Row(**r) for r in records.rows if r["error"] is None}
    for key in track([("dense", 0), *asked], "sweep", progress):
        if key not in known:
            known[key] = run.row(*key)
            records.add(asdict(known[key]))
    return Sweep(known["dense", 0], [known[key] for key in asked], run)


@dataclass
class _Run:
    """What all rows of a sweep share."""

    model: nn.Module
    example_inputs: Any
    score: Score
    latency: bool
    arguments: dict[str, Any]
    made: dict[Key, PruneResult] = field(default_factory=dict)
    scored: dict[str, ScoredOnce] = field(default_factory=dict)

    @cached_property
    def graph(self) -> DependencyGraph:
        """The one trace."""
        own = {k: v for k, v in self.arguments.items() if k in OF_ANALYZE}
        return analyze(self.model, self.example_inputs, **own)

    @cached_property
    def rest(self) -> dict[str, Any]:
        """The arguments of `prune`, but for those of `analyze` and the importance."""
        rest = {k: v for k, v in self.arguments.items() if k not in OF_ANALYZE}
        asked, calibration = rest.pop("importance", AUTO), rest.get("calibration")
        recover = recovery_of(rest.get("recover"), asked, calibration)
        return {**rest, "recover": recover, "progress": False}

    def importance(self, asked: dict[str, Any]) -> ScoredOnce:
        """The criterion of a row with these arguments; each is computed once."""
        calibrated = self.rest.get("calibration") is not None
        criterion = ruled(self.arguments.get("importance", AUTO), calibrated, compete(asked))
        key = criterion if isinstance(criterion, str) else ""
        return self.scored.setdefault(key, ScoredOnce(criterion))

    def pruned(self, argument: str, value: float | str) -> PruneResult:
        """What `prune` makes for one row; all but the model is remembered."""
        asked = {**self.rest, argument: value}
        asked["importance"] = self.importance(asked)
        result = prune(self.model, self.example_inputs, graph=self.graph, **asked)
        self.made[argument, value] = replace(result, model=nn.Module())
        return result

    def again(self, argument: str, value: float | str) -> PruneResult:
        """The model of one row: by its plan, where that is known and says all, as no measurement comes out twice."""
        known = self.made.get((argument, value))
        if known is None or self.rest.get("recover") is not None:
            return self.pruned(argument, value)
        return replace(known, model=apply(self.model, known.plan))

    def row(self, argument: str, value: float | str) -> Row:
        """One row; what fails is said in it, but for bad arguments and a dense model that has no score."""
        if argument == "dense":
            return self._measured(argument, value, self.model, score_of(self.score, self.model))
        _ = self.graph  # what it raises is said of no row
        try:
            small = self.pruned(argument, value).model
        except InputError:
            raise
        except DepgraphError as error:
            return Row(argument, value, error=f"{type(error).__name__}: {error}")
        score, why = None, None
        try:
            score = score_of(self.score, small)
        except Exception as error:  # noqa: BLE001  whatever the user's function raises for this model
            why = f"{type(error).__name__}: {error}"
        return self._measured(argument, value, small, score, why)

    def _measured(
        self,
        argument: str,
        value: float | str,
        model: nn.Module,
        score: float | None,
        error: str | None = None,
    ) -> Row:
        seconds = speedup = None
        if self.latency:
            found = latencies(list(dict.fromkeys((self.model, model))), self.example_inputs)
            seconds, speedup = found[-1], found[0] / found[-1]
        macs = cost.count_macs(model, self.example_inputs)
        params, size = cost.parameter_count(model), cost.byte_count(model)
        return Row(argument, value, params, macs, size, seconds, score, error, speedup)


def _asked(
    ratios: Sequence[float] | None,
    budgets: Mapping[str, Sequence[float | str]] | None,
    arguments: Mapping[str, Any],
) -> list[Key]:
    """(argument, value) of each row, checked."""
    budgets = {} if budgets is None else budgets
    of_kind("budgets", budgets, Mapping, "a dict from names of budgets to lists of amounts")
    if ratios is None:
        ratios = () if budgets else RATIOS
    ratios = several("ratios", ratios, (int, float), "shares between 0 and 1")
    names = inspect.signature(prune).parameters
    for name in arguments:
        if name not in names and name not in BUDGETS:
            raise InputError(f"prune takes no argument {name!r}")
        if name in OWN:
            raise InputError(f"sweep sets {name!r}: it can't be passed on to prune")
    for name in budgets:
        budget_kind(name)
    asked: list[Key] = [("pruning_ratio", r) for r in ratios]
    for name, values in budgets.items():
        amounts = several(f"budgets[{name!r}]", values, (int, float, str), "amounts")
        asked += [(name, value) for value in amounts]
    if not asked:
        raise InputError("nothing to sweep over: give ratios, or budgets with values")
    for name, value in asked:
        if name in BUDGETS:
            Request(budgets={name: value})
        else:
            Request(cast(float, value))
    return list(dict.fromkeys(asked))
