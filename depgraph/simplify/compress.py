"""Whichever is best: widths, depth, ranks, or one after the other, compared at one budget on data held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..base.checks import shown
from ..base.errors import DepgraphError, InputError, NothingToPruneError, suggestions
from ..comparing import distance
from ..data.calibration import Calibration, Loss, check_batches
from ..depth.request import Depth
from ..grouping.naming import Name
from ..prune import PruneResult, prune
from ..select import BUDGETS
from ..surgery.lineage import plans_of
from .low_rank import factorise
from .result import Simplified, Summary, check_values

KINDS = ("width", "depth", "rank")
HELD_OUT = 4  # one batch of so many is compared on, and not looked at before
Found = PruneResult | Simplified
Step = Callable[[nn.Module, dict[str, Any]], Found]


@torch.inference_mode(False)
def compress(
    model: nn.Module, example_inputs: Any, *, calibration: Iterable[Any], loss: Loss | None = None,
    kinds: Sequence[str] = KINDS, ignore: Name | Sequence[Name] = (), verify: bool = True, progress: bool | None = None,
    **budgets: Any,
) -> Simplified:  # fmt: skip
    """Meet budgets by widths, depth or ranks, or by two of these, whichever comes nearest to the original.

    Each kind is tried alone, then widths together with depth, then each of these for half of the way and ranks for the other
    half. Every model that meets the budgets is recovered without training as far as `prune` does that, and compared on one
    batch in four, which nothing before has looked at: by the loss where there is one, otherwise by |output - original's|² /
    |original's|². The nearest is returned, so it is no worse there than the best single kind.

    Args:
        model: any module; it is not touched.
        example_inputs: as for `prune`.
        calibration: batches as for `prune`, at least two.
        loss: ``loss(output, target)`` -> scalar, likewise.
        kinds: which may be used, of ``"width"``, ``"depth"`` and ``"rank"``.
        ignore: what to leave alone: modules and parameters, as module paths, parameter names, globs of them, or themselves.
        verify: prove each step, as `prune` and `factorise` do.
        progress: show bars on long work; None: on a terminal alone.
        **budgets: as for `prune`: ``max_params=0.7``, ``max_macs=``, ``max_latency=`` ...; at least one.

    Returns:
        the nearest model; the plan of its last step, with those of earlier ones in `before`; a report with a row for each
        way that was tried.

    Raises:
        InputError: there is no budget, fewer than two batches, or an argument is something else.
        BudgetError, NothingToPruneError, ...: no way led to a model; the error is that of the first.
    """
    check_values(model)
    limits = _limits(model, example_inputs, budgets)
    ways = _kinds(kinds)
    check_batches("calibration", calibration)
    batches = list(calibration)
    if len(batches) < 2:
        raise InputError(
            f"compress compares on batches that were held out: give at least two, not {len(batches)}"
        )
    held = set(range(HELD_OUT - 1, len(batches), HELD_OUT)) or {len(batches) - 1}
    seen = [b for i, b in enumerate(batches) if i not in held]
    judge = Calibration([batches[i] for i in sorted(held)], example_inputs, loss, progress)
    cut = partial(
        prune, example_inputs=example_inputs, calibration=seen, loss=loss, ignore=ignore, verify=verify,
        progress=progress,
    )  # fmt: skip

    def widths(given: nn.Module, amounts: dict[str, Any], depth: Depth | None = None) -> Found:
        return cut(given, depth=depth, **amounts)

    def ranks(given: nn.Module, amounts: dict[str, Any]) -> Found:
        return factorise(given, example_inputs, seen, ignore=ignore, verify=verify, **amounts)

    steps: dict[tuple[str, ...], Step] = {
        ("width",): widths, ("depth",): partial(widths, depth=Depth(alone=True)), ("rank",): ranks,
        ("width", "depth"): partial(widths, depth=Depth()),
    }  # fmt: skip
    search = _Search(model, example_inputs, limits, judge)
    wanted = [way for way in steps if set(way) <= set(ways)]
    for way in wanted:
        search.attempt(" and ".join(way), way, steps[way])
    for way in wanted if "rank" in ways else ():
        if way != ("rank",):
            search.attempt(f"{' and '.join(way)}, then rank", (*way, "rank"), steps[way], ranks)
    return search.result()


class _Search:
    """The ways that were tried, and the nearest model among them."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        limits: dict[str, tuple[float, float]],
        judge: Calibration,
    ) -> None:
        """`limits` has what the original has of each budget's cost, and what may be left of it."""
        self.model, self.example_inputs, self.judge = model, example_inputs, judge
        self.limits = limits
        self.rows: list[dict[str, Any]] = []
        self.best: tuple[float, str, Found] | None = None
        self.failed: DepgraphError | None = None
        self.impossible: set[str] = set()  # kinds of which this model has nothing

    def attempt(self, way: str, kinds: Sequence[str], *steps: Step) -> None:
        """Take equal parts of the way to the budgets by each of `steps`, which use these `kinds`, and compare."""
        if self.impossible & set(kinds):
            return
        found: Found | None = None
        try:
            for i, step in enumerate(steps):
                given = self.model if found is None else found.model
                found = step(given, self._amounts((i + 1) / len(steps)))
            assert found is not None  # noqa: S101  there is at least one step
            off = distance(self.model, found.model, self.judge, f"comparing {way}")
        except DepgraphError as error:
            self.failed = self.failed or error
            if len(kinds) == 1 and isinstance(error, NothingToPruneError):
                self.impossible.update(kinds)
            why = " ".join(line.strip() for line in str(error).splitlines()[:2])
            self.rows.append({"way": way, "parameters": "-", "off": "-", "why": why})
            return
        after = sum(p.numel() for p in found.model.parameters())
        self.rows.append({"way": way, "parameters": after, "off": off, "why": ""})
        if self.best is None or off < self.best[0]:
            self.best = off, way, found

    def _amounts(self, share: float) -> dict[str, Any]:
        """The budgets after `share` of the way."""
        return {n: BUDGETS[n].spell(a + (b - a) * share) for n, (a, b) in self.limits.items()}

    def result(self) -> Simplified:
        """The nearest model."""
        if self.best is None:
            assert self.failed is not None  # noqa: S101  every attempt has one outcome
            raise self.failed
        _, way, found = self.best
        notes = [] if isinstance(found, Simplified) else list(found.report.notes)
        report = Summary.of(
            way, self.model, found.model, self.example_inputs, rows=self.rows,
            verification=found.report.verification, notes=notes, figures={"taken": way},
        )  # fmt: skip
        return Simplified(found.model, found.plan, report, found.before or plans_of(self.model))


def _kinds(kinds: Any) -> list[str]:
    given = list(kinds) if isinstance(kinds, (list, tuple, set, frozenset)) else []
    if not given or not all(isinstance(k, str) for k in given):
        raise InputError(f"kinds must be some of {', '.join(KINDS)}, not {shown(kinds)}")
    for kind in given:
        if kind not in KINDS:
            raise InputError(f"unknown kind {kind!r}: {suggestions(kind, KINDS)}")
    return [k for k in KINDS if k in given]


def _limits(model: nn.Module, example_inputs: Any, budgets: dict[str, Any]) -> dict[str, tuple[float, float]]:
    if unknown := sorted(budgets.keys() - BUDGETS.keys()):
        raise InputError(f"compress has no argument {unknown[0]!r}: {suggestions(unknown[0], BUDGETS)}")
    given = {name: amount for name, amount in budgets.items() if amount is not None}
    if not given:
        raise InputError(
            f"compress compares models of one size: give a budget, such as max_params=0.7 ({', '.join(BUDGETS)})"
        )
    found = {}
    for name, amount in given.items():
        whole = float(BUDGETS[name].measure(model, example_inputs))
        found[name] = whole, BUDGETS[name].amount(amount, whole)
    return found
