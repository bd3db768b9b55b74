"""Whether a size on shared weights is what it is extracted, and both the masked original, on models of the suites.

Said by three that share nothing: bits of `at` and `extract`; the original with what goes set to zero, in float64 (in float32
where an op of the model has no kernel for it); and where statistics are taken over what goes, the oracle of the tests.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from itertools import islice, zip_longest
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.suites import SUITES, Case, suite  # first: it makes torchvision importable

from checks import as_float64, in_float64, random_importance  # isort: skip
from oracle import largest_deviation  # isort: skip
from outputs import Inputs, call, deviation, tensors  # isort: skip

import depgraph

MOST_PARAMETERS = 12_000_000
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4}
SLOW = ("torchvision", "timm", "diffusion", "detection", "transformers")  # to import: last in each turn
SIZES = ((1, 0.7, 0.5), (1, 0.9, 0.8))  # the second where the first can't be reached

Row = dict[str, Any]


def chosen() -> Iterator[tuple[str, Case]]:
    """Models in turns from all suites: those that continuous integration takes, then others, spread over the suite."""

    def of(name: str) -> Iterator[tuple[str, Case]]:
        cases = suite(name)
        first = SUITES[name].small
        others = [n for n in cases if n not in first]
        spread = [others[i] for k in (8, 2, 1) for i in range(0, len(others), max(1, len(others) // k))]
        yield from ((name, cases[n]) for n in dict.fromkeys((*first, *spread, *others)))

    turns = zip_longest(*(of(n) for n in sorted(SUITES, key=list(SLOW).count)))
    return (found for turn in turns for found in turn if found is not None)


def checked(count: int, say: Callable[[Row], None]) -> list[Row]:
    """A row for each of `count` models that are small enough and that get smaller; `say` is called with each."""
    rows = filter(None, (row_of(name, case) for name, case in chosen()))
    found = []
    for row in islice(rows, count):
        say(row)
        found.append(row)
    return found


def row_of(name: str, case: Case) -> Row | None:
    """What is found of one model; None where it is too large, or nothing of it goes."""
    began = time.process_time()
    row: Row = {"suite": name, "model": case.name}
    try:
        model, inputs = case.build(), case.inputs()
        with torch.no_grad():
            call(model, inputs)  # lazy parameters get their shapes
    except ImportError as error:
        return row | {"wrong": f"can't be built: {error}"}
    if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
        return None
    try:
        elastic = _made(model, inputs)
        if elastic is None:
            return None
        row["sizes"] = elastic.sizes
        row["proofs"] = sorted({p.status for p in elastic.proofs.values()})
        row["wrong"] = "; ".join(
            filter(None, (_problem(elastic, model, size, inputs) for size in elastic.sizes))
        )
    except Exception as error:
        row["wrong"] = f"{type(error).__name__}: {str(error)[:300]}"
    return row | {"s": time.process_time() - began}


def _made(model: nn.Module, inputs: Inputs) -> depgraph.Elastic | None:
    for sizes in SIZES:
        try:
            return depgraph.Elastic(
                model, inputs, sizes=sizes, cost="params", importance=random_importance(1)
            )
        except depgraph.NothingToPruneError:
            return None
        except depgraph.InputError as error:
            if "can't be reached" not in str(error):
                raise
    return None


@torch.no_grad()
def _problem(elastic: depgraph.Elastic, model: nn.Module, size: float, inputs: Inputs) -> str:
    small = elastic.extract(size)
    one, other = _outputs(elastic.at(size), inputs), _outputs(small, inputs)
    same = len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(one, other, strict=True)
    )
    if not same:
        return f"{size:g}: on shared weights it is not what it is extracted"
    if (
        elastic.proofs[size].status == "shapes"
    ):  # values that can't be compared, such as numbers of detections
        return ""
    plan = elastic.plan(size)
    try:
        off = _deviation(in_float64(model), in_float64(small), plan, as_float64(inputs), torch.float64)
    except RuntimeError as error:
        if "float64" not in str(error) and "Double" not in str(error) and "dtype" not in str(error):
            raise
        off = _deviation(model, small, plan, inputs, torch.float32)
    return f"{size:g}: off the masked original by {off:.1e}" if off else ""


def _outputs(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return tensors(call(model, inputs))


def _deviation(
    wide: nn.Module, narrow: nn.Module, plan: depgraph.Plan, inputs: Inputs, dtype: torch.dtype
) -> float:
    """How far the smaller model is off the masked original; 0 where rounding in `dtype` explains it."""
    off = _zeroed_deviation(wide, narrow, plan, inputs)
    if not off <= TOLERANCE[dtype]:
        off = min(off, largest_deviation(wide, SimpleNamespace(model=narrow, plan=plan), inputs))
    return 0.0 if off <= TOLERANCE[dtype] else off


def _zeroed_deviation(model: nn.Module, small: nn.Module, plan: depgraph.Plan, inputs: Inputs) -> float:
    masked = copy.deepcopy(model)
    for name, value in masked.state_dict().items():
        if value.is_floating_point():
            value.mul_(plan.mask(name))
    torch.manual_seed(0)
    expected = call(masked, inputs)
    torch.manual_seed(0)
    found = deviation(expected, call(small, inputs))
    return float("inf") if found is None else found
