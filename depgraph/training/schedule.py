"""Iterative pruning: a little at a time with training in between, and back where the score falls too far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..base.checks import function, is_number, whole_number
from ..base.errors import InputError, PlanError
from ..base.progress import track
from ..base.running import Score, score_of
from ..costs import cost
from ..costs.latency import latencies
from ..grouping.build import build_plan
from ..plan.plan import Plan
from ..prune import OF_ANALYZE, PruneResult, analyze, as_module, prune
from ..report import Report
from ..select import BUDGETS, OPTIONS
from ..surgery.apply import apply
from ..surgery.lineage import plans_of
from ..tracing.tensors import named_tensors
from ..verify.verify import Verification
from .ramps import Ramp, Schedule, ramp_of

Drop = float | tuple[float, float]


@dataclass(repr=False)
class GradualResult(PruneResult):
    """What a step of `GradualPruner` returns: a `PruneResult` whose plan and report are about the original.

    Attributes:
        before: the plans that had made the original, where it was itself a result.
        done: nothing is left to do: this is the model to keep. Otherwise it is to be trained and given to the next step.
        history: the steps that have been judged.
    """

    done: bool = False
    history: tuple[Tried, ...] = ()


@dataclass(frozen=True)
class Tried:
    """A step that was made.

    Attributes:
        way: how far along the ramp it went, 0 to 1.
        parameters: what its model had.
        score: after training; None without a score function.
        kept: whether the score was good enough.
    """

    way: float
    parameters: int
    score: float | None
    kept: bool


@dataclass
class _State:
    """A model on the way, and the plan that made it of the original."""

    model: nn.Module
    plan: Plan
    way: float = 0.0
    score: float | None = None
    report: Report | None = None  # of the cut that made it


class GradualPruner:
    """Prunes step by step, inside any training loop.

    Each call of `step` judges the model that was trained since the last one, and makes it smaller::

        pruner = depgraph.GradualPruner(model, example_inputs, steps=5, max_macs=0.5, score=accuracy, max_drop=0.01)
        while not (result := pruner.step(model, optimizer)).done:
            model = result.model
            train(model, optimizer)
        model = result.model

    Every model on the way is a new one: the one given stays as it was, also where the loop is interrupted. With `max_drop`
    a model whose score is below the dense one's minus that is given up: the pruner goes back to the last good model, with
    its optimizer's state, and halves the step, `backtracks` times. What it returns at the end is the last good model.
    `history` has a `Tried` for each step that has been judged.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, *, steps: int = 10, ramp: str | Ramp = "cubic",
        score: Score | None = None, max_drop: Drop | None = None, backtracks: int = 3, **options: Any,
    ) -> None:  # fmt: skip
        """Check that the end of the way can be reached.

        Args:
            model: the original.
            example_inputs: as for `prune`.
            steps: how many steps lead to the aim.
            ramp: how much is gone after each: "linear", "cubic", "exponential", "cosine", "one_shot" (see `ramps.py`), or a
                function from the share of the way to the share of what is to go.
            score: ``score(model)`` -> a number, higher is better.
            max_drop: how far the score may fall below the dense model's: a number, or two for the beginning and the end of
                the way, linear in between. Without one every step is kept.
            backtracks: how many tries are left after the first model that was given up; each goes half as far.
            **options: as for `prune`. A ratio, budget or threshold is the aim of the last step, ratios and budgets of the
                original's size. A threshold that is a pair begins at the first number and ends at the second; one that
                stays needs ``ramp="one_shot"``.

        Raises:
            InputError: bad arguments.
            BudgetError: the aim can't be reached. Like all that `prune` raises, before anything is trained.
        """
        self._drop = checked_drop(steps, score, max_drop, backtracks, options)
        self._original = model = as_module(model)
        self.example_inputs, self.steps, self.score = example_inputs, steps, score
        self._removed = ramp_of(ramp)
        self._each = {n: options.pop(n) for n in OF_ANALYZE if n in options}
        self._graph = analyze(model, example_inputs, **self._each)
        self._aims = Schedule.read(model, example_inputs, options)
        self._options = options
        self._probe()
        self._good = _State(model, build_plan(self._graph, {}))
        self._trial: _State | None = None
        self._saved: _Saved | None = None
        self._dense: float | None = None
        self._bad: float | None = None
        self._left = backtracks
        self._failed: dict[str, tuple[int, ...]] = {}
        self.history: list[Tried] = []

    @property
    def model(self) -> nn.Module:
        """The last good model."""
        return self._good.model

    @property
    def plan(self) -> Plan:
        """From the original to the last good model."""
        return self._good.plan

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> GradualResult:
        """Judge `model`, go back if need be, and prune further.

        Args:
            model: what the last step returned, trained; at first the original.
            optimizer: continues with the smaller model, its state cut like the parameters (`apply_to_optimizer`); after a
                step back it has the state that it had with the last good model. Learning rates stay as they are.

        Returns:
            the next model to train, or, with ``done``, the one to keep.

        Raises:
            InputError: `model` is not the one that the last step returned, or has other shapes.
        """
        self._judge(as_module(model), optimizer)
        while (way := self._next()) is not None:
            asked = self._aims.at(partial(self._removed, way), self._good.model, way)
            result = self._cut(asked) if asked else None
            if result is None or not (result.plan.cuts or "threshold" in asked):
                self._good.way = way  # too little for a single unit
                continue
            plan = self._good.plan.then(result.plan)
            if self._bad is not None and self._failed == _sizes(plan):  # the model that was given up, again
                self._bad = way
                continue
            trial = _State(result.model, plan, way, None, result.report)
            found = self._result(trial, done=False)
            if optimizer is not None:
                self._saved = _Saved(optimizer)
                result.plan.apply_to_optimizer(optimizer, self._good.model, result.model)
            self._trial = trial  # last: what fails before leaves the step to be made again
            return found
        return self._result(self._good, done=True)

    def state_dict(self) -> dict[str, Any]:
        """Where the pruner is, as plain data for a checkpoint beside that of the model being trained (see `resume`)."""
        now = self._trial or self._good
        return {
            "plan": now.plan.to_json(), "way": now.way, "dense": self._dense, "bad": self._bad,
            "left": self._left, "history": [astuple(t) for t in self.history],
        }  # fmt: skip

    def resume(self, state: Mapping[str, Any]) -> nn.Module:
        """Go on from what `state_dict` gave, in a new pruner of the same original and arguments.

        A step that was on trial then counts as good: what it would go back to is not in the checkpoint.

        Args:
            state: from `state_dict`.

        Returns:
            the model to train on, with the original's weights: load those of the checkpoint.

        Raises:
            PlanError: the state is about another model, or is no such state.
        """
        try:
            plan, way = Plan.from_json(state["plan"]), float(state["way"])
            dense, bad, left = state["dense"], state["bad"], state["left"]
            history = [Tried(*t) for t in state["history"]]
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"this is not the state of a GradualPruner: {type(error).__name__}: {error}"
            ) from error
        model = apply(self._original, plan) if plan.cuts else self._original
        self._good, self._trial = _State(model, plan, way), None
        self._dense, self._bad, self._left, self.history = dense, bad, left, history
        return model

    # ------------------------------------------------------------------------------------------------ the way

    def _probe(self) -> None:
        """Plan the last step as if it were the only one: what can't be reached fails here."""
        cheap = {n: v for n, v in self._options.items() if n in OPTIONS or n == "progress"}
        last = self._aims.at(lambda share: share)
        asked = {n: v for n, v in last.items() if n not in BUDGETS or BUDGETS[n].compare is None}
        if asked or not last:  # seconds would have to be measured
            prune(
                self._original, self.example_inputs, graph=self._graph, verify=False,
                importance=lambda group: np.ones(group.units), **cheap, **asked,
            )  # fmt: skip

    def _cut(self, asked: dict[str, Any]) -> PruneResult:
        good = self._good
        if good.model is self._original:
            return prune(good.model, self.example_inputs, graph=self._graph, **self._options, **asked)
        return prune(
            good.model, self.example_inputs, already_pruned=good.plan, **self._each, **self._options, **asked
        )

    def _next(self) -> float | None:
        """The next share of the way to go to; None at the end."""
        if self._bad is not None:
            if self._left <= 0:
                return None
            self._left -= 1
            return (self._good.way + self._bad) / 2
        done = int(self._good.way * self.steps + 1e-9)
        return None if done >= self.steps else (done + 1) / self.steps

    def _judge(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Keep the model that was trained, or give it up."""
        if self._trial is None:
            if model is not self._good.model:
                raise InputError("step takes the model that the last step returned, or the original at first")
            if self.score is not None and self._dense is None:
                self._dense = score_of(self.score, model)
            return
        for name, tensor in named_tensors(model)[0].items():
            if name in self._trial.plan.shapes and tuple(tensor.shape) != self._trial.plan.new_shape(name):
                raise InputError(
                    f"{name!r} has shape {tuple(tensor.shape)}, and {self._trial.plan.new_shape(name)} in what the last "
                    "step returned: train that model, and give it to the next step"
                )
        # Where the score raises, nothing has changed.
        score = None if self.score is None else score_of(self.score, model)
        trial, self._trial = replace(self._trial, model=model, score=score), None
        kept = self._is_good(trial)
        self.history.append(Tried(trial.way, cost.parameter_count(model), trial.score, kept))
        if kept:
            self._good = trial
            return
        self._bad, self._failed = trial.way, _sizes(trial.plan)
        if optimizer is not None and self._saved is not None:
            self._saved.restore(optimizer)

    def _is_good(self, trial: _State) -> bool:
        if self._drop is None or trial.score is None or self._dense is None:
            return True
        first, last = self._drop
        return trial.score >= self._dense - (first + (last - first) * trial.way)

    # ---------------------------------------------------------------------------------------------- the report

    def _result(self, state: _State, done: bool) -> GradualResult:
        """`state` with a report on it and the original."""
        last = state.report
        lost = [
            f"step to {t.way:.1%} of the way: score {t.score:.4g}, given up"
            for t in self.history
            if not t.kept
        ]
        found: dict[str, Any] = {
            "notes": [*([] if last is None else last.notes), *lost],
            "score": None if self._dense is None or state.score is None else (self._dense, state.score),
        }  # fmt: skip
        if last is None:
            text = "the step was made before the checkpoint" if state.plan.cuts else "nothing was removed"
            proof = Verification("skipped", detail=text)
        else:
            proof = replace(last.verification, detail=f"the last step; {last.verification.detail}")
            found["recovery"] = last.recovery
            if last.latency is not None:
                found["latency"] = tuple(latencies([self._original, state.model], self.example_inputs))
        report = Report.of(self._graph, state.plan, state.model, proof, self.example_inputs, **found)
        before, history = plans_of(self._original), tuple(self.history)
        return GradualResult(state.model, state.plan, report, before, done, history)


class _Saved:
    """What an optimizer had before it went on with a smaller model."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.parameters = [list(group["params"]) for group in optimizer.param_groups]
        self.state = optimizer.state  # carrying it over puts another mapping in its place

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Give it back."""
        for group, parameters in zip(optimizer.param_groups, self.parameters, strict=True):
            group["params"] = parameters
        optimizer.state = self.state


def prune_gradually(
    model: nn.Module, example_inputs: Any, *, steps: int = 10, ramp: str | Ramp = "cubic",
    train: Callable[[nn.Module, int], Any] | None = None, score: Score | None = None, max_drop: Drop | None = None,
    backtracks: int = 3, progress: bool | None = None, **options: Any,
) -> GradualResult:  # fmt: skip
    """Prune in several steps with training in between: `GradualPruner` in a loop.

    Args:
        model: stays as it is, also where the call is interrupted.
        example_inputs: as for `prune`.
        steps: how many steps lead to the aim.
        ramp: as for `GradualPruner`.
        train: ``train(model, step)``, called after each step (from 0), trains the model in place.
        score: ``score(model)`` -> a number, higher is better, of the model after training.
        max_drop: how far the score may fall, as for `GradualPruner`: models below that are given up.
        backtracks: how many tries with half the step are left then.
        progress: show a bar; None: on a terminal alone.
        **options: as for `prune`, such as ``max_macs=0.5``.

    Returns:
        the last good model, the plan from the original to it, a report, and the history.

    Raises:
        InputError, BudgetError ...: as for `prune`, before anything is trained.
    """
    if train is not None:
        function("train", train, "model", "step")
    pruner = GradualPruner(
        model, example_inputs, steps=steps, ramp=ramp, score=score, max_drop=max_drop, backtracks=backtracks,
        progress=progress, **options,
    )  # fmt: skip

    result = pruner.step(model)
    unfinished = iter(lambda: result.done, True)
    for number, _ in enumerate(track(unfinished, "pruning step by step", progress, steps)):
        if train is not None:
            train(result.model, number)
        result = pruner.step(result.model)
    return result


def _sizes(plan: Plan) -> dict[str, tuple[int, ...]]:
    return {name: cut.new_shape for name, cut in plan.cuts.items()}


def checked_drop(
    steps: Any, score: Any, max_drop: Any, backtracks: Any, options: dict[str, Any]
) -> tuple[float, float] | None:
    """`max_drop` for the beginning and the end, where it and the other arguments can be taken."""
    whole_number("steps", steps, 1)
    whole_number("backtracks", backtracks)
    refused = {"inplace", "graph", "already_pruned"} & options.keys()
    if refused:
        raise InputError(f"pruning step by step does not take {', '.join(sorted(refused))}")
    if score is not None:
        function("score", score, "model")
    if max_drop is None:
        return None
    if score is None:
        raise InputError("max_drop needs a score function")
    drops = max_drop if isinstance(max_drop, tuple) else (max_drop,)
    if len(drops) not in (1, 2) or any(not is_number(d) or not 0 <= d < float("inf") for d in drops):
        raise InputError(
            f"max_drop must be a number of at least 0, or two (for the beginning and the end), not {max_drop!r}"
        )
    return drops[0], drops[-1]
