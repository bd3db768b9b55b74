"""What every test of a pruned model has in common: random importances, and all of the oracle's checks in one place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from oracle import (
    assert_equal_to_masked,
    assert_runs_in_both_modes,
    assert_state_matches_plan,
    assert_trains,
    assert_untouched,
    snapshot,
)
from torch import Tensor, nn

import depgraph
from depgraph.data.calibration import Calibration
from depgraph.data.consumers import Consumer, consumers
from depgraph.data.watch import Call, Watch


def observe(
    model: nn.Module,
    what: depgraph.DependencyGraph | list[Consumer],
    calibration: Calibration,
    visit: Callable[[Consumer, Tensor], Any],
    windows: bool = True,
) -> None:
    """Run `model` on the batches; each piece of the inputs of each consumer goes to `visit`."""

    def each(call: Call) -> None:
        for _, inputs in call.inputs(windows):
            visit(call.consumer, inputs)

    wanted = consumers(what) if isinstance(what, depgraph.DependencyGraph) else what
    Watch(model, wanted, each).run_all(calibration, "observing")


def units_of(group: Any) -> int:
    """The number of units of a group, whether it is kept as a number or as a sequence."""
    return group.units if isinstance(group.units, int) else len(group.units)


def random_importance(seed: int) -> Callable[[Any], Tensor]:
    """Scores that have nothing to do with the weights: positions that L1 would not choose."""
    dice = torch.Generator().manual_seed(seed)
    return lambda group: torch.rand(units_of(group), generator=dice)


def prune_and_check(
    model: nn.Module, inputs: Any, *, check_inputs: Any = None, tol: float = 1e-9, **options: Any
) -> depgraph.PruneResult:
    """Prune without the library's own verification, then hold the result against the oracle.

    `check_inputs` are the inputs that the results are compared on, `inputs` unless given.
    """
    before, original = snapshot(model), copy.deepcopy(model)
    result = depgraph.prune(model, inputs, verify=False, **options)
    assert_untouched(model, before)
    assert [m.training for m in model.modules()] == [m.training for m in result.model.modules()] or rewritten(
        result
    )
    check_result(original, result, inputs if check_inputs is None else check_inputs, tol)
    return result


def check_result(original: nn.Module, result: Any, inputs: Any, tol: float = 1e-9) -> None:
    """State, values and gradients; low precision is compared in float64 with the same masks."""
    assert_state_matches_plan(original, result.model, result.plan)
    wide_original, wide = in_float64(original), InFloat64(result)
    assert_equal_to_masked(wide_original, wide, as_float64(inputs), tol)
    assert_trains(wide.model, as_float64(inputs), wide_original)
    assert_runs_in_both_modes(wide.model, as_float64(inputs), wide_original)


class InFloat64:
    """A result with its model in float64 and the same plan."""

    def __init__(self, result: Any):
        self.model, self.plan = in_float64(result.model), result.plan


def in_float64(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def as_float64(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {key: as_float64(value) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(as_float64(value) for value in inputs)
    return inputs.double() if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs


def rewritten(result: Any) -> list[str]:
    """Names of the submodules in whose code numbers were changed."""
    return [
        item if isinstance(item, str) else item.get("module", "")
        for item in result.report.to_dict()["rewritten"]
    ]
