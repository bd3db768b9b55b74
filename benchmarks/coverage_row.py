"""One row of the coverage table: depgraph on one model, in a process of its own, with the checks around it."""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from outputs import Inputs, backward_works, call, deviation, shapes
from torch import Tensor, nn

from benchmarks.isolate import Row, isolated
from benchmarks.randomise import randomise
from benchmarks.suites import Case, suite

TOLERANCE = {"float32": 1e-4, "float64": 1e-9}  # largest relative deviation that rounding explains
DEVIATES = "deviates"  # how the reason begins where values differ
CONFIG = "its config"  # how a complaint about a config begins
ALIKE = 40  # characters by which two complaints are known to be the same
LOCKS = 3  # reasons kept in a row


def measure(
    suite_name: str, name: str, limit: float, ratio: float = 0.5, dtype: str = "float32", uniform: bool = True
) -> Row:
    """Prune one model and judge the result.

    Values that deviate in float32 are compared once more in float64, where rounding cannot be the reason.

    Returns:
        `suite`, `name`, `dtype`, `verdict`, `why` (the reason for a verdict other than right) and what `_prune` found.
    """
    outcome = isolated(_prune, suite_name, name, ratio, dtype, uniform, limit=limit)
    row: Row = {"suite": suite_name, "name": name, "dtype": dtype, "traced": None}
    row.update({"seconds": round(outcome.seconds, 2), **outcome.row})
    verdict, why = judge(row, outcome.error, TOLERANCE[dtype])
    row.update(verdict=verdict, why=why)
    if dtype == "float32" and why.startswith(DEVIATES):
        precise = measure(suite_name, name, limit, ratio, "float64", uniform)
        return row if precise["verdict"] == "failed" else precise
    return row


def judge(row: Row, error: str, tolerance: float) -> tuple[str, str]:
    """`right`, `shapes` (right in shapes, values not comparable), `wrong` or `failed`; and why.

    Values are right where the library's own verification says so and the benchmark's, which knows no statistics over
    kept entries, does not object; or where the benchmark's says so alone. A model from which nothing was removed has
    failed, whatever it computes.
    """
    if error or row.get("error"):
        return "failed", error or row["error"]
    if row["params"] >= 1:
        return "failed", "nothing was removed"
    if not row["outputs_kept"] and not (row["verified"] == "equal" and row["ranks_kept"]):
        return "wrong", "outputs changed their shapes"
    if not row["plan_holds"]:
        return "wrong", f"not what the plan keeps: {row['plan_broken_at']}"
    if not row["backward"]:
        return "wrong", "no finite gradients"
    zeroed = row["zeroed_deviation"]
    if row["verified"] == "equal" and row["deviation"] > tolerance:
        return "wrong", f"{DEVIATES} by {row['deviation']:.1e}"
    if zeroed is not None and zeroed > tolerance and row["verified"] == "equal" and not row["statistics"]:
        return "wrong", f"{DEVIATES} from the zeroed original by {zeroed:.1e}"
    if row.get("check"):
        return "wrong", row["check"]
    if row["verified"] == "equal" or (zeroed is not None and zeroed <= tolerance):
        return "right", ""
    return "shapes", f"values not compared ({row['verified']})"


def figures(report: dict[str, Any]) -> Row:
    """What a row takes from `PruneResult.report.to_dict()`: the one place that knows the names in it."""
    verification = report["verification"]
    locks = sorted(report["locks"], key=lambda lock: lock["params"], reverse=True)
    return {
        "groups": report["groups"],
        "reachable_params": report["reachable"]["params"],
        "reachable_macs": report["reachable"]["macs"],
        "params": report["params"]["after"] / report["params"]["before"],
        "macs": report["macs"]["after"] / max(report["macs"]["before"], 1),
        "verified": verification["status"],
        "deviation": verification["max_error"],
        "statistics": list(verification.get("restricted", ())),
        "rewritten": list(report["rewritten"]),
        "locks": [
            {"reason": lock["reason"], "source": _library_path(lock["source"]), "params": lock["params"]}
            for lock in locks[:LOCKS]
        ],
        "reasons": dict(Counter(_general(lock["reason"]) for lock in locks)),
    }


def _general(reason: str) -> str:
    """A reason without what is particular about one place: remarks in brackets, the module, numbers."""
    text = re.sub(r" in [\w.]*[.\d][\w.]*$", "", re.sub(r"\s*\(.*", "", reason))
    return re.sub(r"\d+(\.\d+)?", "n", text)


def _library_path(source: str | None) -> str:
    """A place in a library, or in these benchmarks, without the folder that it lies in."""
    return (source or "").rpartition("site-packages/")[2].rpartition("benchmarks/models/")[2]


def _prune(
    started: Callable[[], None], suite_name: str, name: str, ratio: float, dtype: str, uniform: bool
) -> Row:
    """Body of `measure`: build, prune, check."""
    import depgraph

    case = suite(suite_name)[name]
    model = randomise(case.build(), 0, case.inputs()).to(getattr(torch, dtype))
    inputs = _cast(case.inputs(), getattr(torch, dtype))
    with torch.no_grad():
        wanted = shapes(call(model, inputs))
    started()
    planning = _seconds_to_plan(model, inputs, ratio)
    start = time.process_time()
    try:
        result = depgraph.prune(model, inputs, pruning_ratio=ratio, verify=True)
    except Exception as error:
        text = re.sub(r"[^\s(]*(?:site-packages|benchmarks/models)/", "", " ".join(str(error).split()))
        message = f"{type(error).__name__}: {text[:400]}"
        return {"traced": _traces(model, inputs), "error": message}
    row = {
        "traced": True,
        "seconds": round(time.process_time() - start, 2),
        "planning": planning,
        **figures(result.report.to_dict()),
    }
    started()  # what follows are the benchmark's own checks
    torch.manual_seed(0)  # what forward draws at random is the same here and in the zeroed original
    with torch.no_grad():
        output = call(result.model, inputs)
    broken = _broken_plan(model, result)
    return {
        **row,
        "outputs_kept": [shape[1:] for shape in shapes(output)] == [shape[1:] for shape in wanted],
        # where values decide how long an output is (predicted durations), the masked original is the measure
        "ranks_kept": [len(s) for s in shapes(output)] == [len(s) for s in wanted],
        "class_kept": type(result.model) is type(model),
        "plan_holds": broken is None,
        "plan_broken_at": broken,
        "zeroed_deviation": None if broken else _zeroed_deviation(model, result, inputs, output),
        "backward": backward_works(result.model, inputs),
        **_own_check(case, model, result),
        **(_uniform(started, model, inputs, ratio) if uniform else {}),
        "branches": _branches(started, model, inputs),
    }


def _branches(started: Callable[[], None], model: nn.Module, inputs: Inputs) -> Row:
    """How many branches can go, their share of the parameters, and what is found where half of them went."""
    import depgraph

    started()
    try:
        found = depgraph.branches(model, inputs)
        weights = {name for branch in found for name in branch.weights}
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        row: Row = {
            "count": len(found),
            "params": sum(sizes[n] for n in weights) / max(sum(sizes.values()), 1),
        }
        if not found:
            return row
        half = depgraph.Depth(keep=len(found) // 2, by="magnitude")
        result = depgraph.prune(model, inputs, depth=half)
    except Exception as error:
        return {
            "count": 0,
            "params": 0.0,
            "verified": "failed",
            "why": f"{type(error).__name__}: {error}"[:200],
        }
    before, after = result.report.parameters
    return {
        **row,
        "left": after / before,
        "verified": result.report.verification.status,
        "backward": backward_works(result.model, inputs),
    }


def _uniform(started: Callable[[], None], model: nn.Module, inputs: Inputs, ratio: float) -> Row:
    """Where a model keeps its config: what `uniform=True` leaves of it, and whether config and result agree then.

    They agree where the class, called by the benchmark itself with the config that the result has, makes parameters of
    the result's names and shapes, and computes what the result computes once it has its weights.
    """
    import depgraph

    if not hasattr(getattr(model, "config", None), "to_dict"):
        return {}
    started()
    try:
        result = depgraph.prune(model, inputs, pruning_ratio=ratio, uniform=True)
    except depgraph.NothingToPruneError:
        return {"uniform": {"params": 1.0, "verified": "nothing", "agrees": True, "why": ""}}
    except Exception as error:
        return {"uniform": {"params": None, "verified": "failed", "agrees": False, "why": str(error)[:200]}}
    report = result.report
    why = _disagreement(result.model, inputs)
    params = report.parameters[1] / report.parameters[0]
    return {
        "uniform": {"params": params, "verified": report.verification.status, "agrees": not why, "why": why}
    }


def _disagreement(small: nn.Module, inputs: Inputs) -> str:
    """How a model differs from what its class makes of its config; nothing where it does not."""
    try:
        again = type(small)(copy.deepcopy(small.config)).to(next(small.parameters()).dtype).eval()
        mine, others = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (small, again))
        wrong = [n for n in {**mine, **others} if mine.get(n) != others.get(n)]
        if wrong:
            return f"{len(wrong)} shapes differ, the first of {wrong[0]}"
        again.load_state_dict(small.state_dict())
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            expected = call(small, inputs)
            torch.manual_seed(0)
            found = deviation(expected, call(again, inputs))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "" if found is None or found <= TOLERANCE["float32"] else f"outputs differ by {found:.1e}"


def _seconds_to_plan(model: nn.Module, inputs: Inputs, ratio: float) -> float | None:
    """What tracing, grouping, ranking and planning take, without surgery and verification."""
    import depgraph

    start = time.process_time()
    try:
        graph = depgraph.analyze(model, inputs)
        masks = depgraph.choose(graph, depgraph.scores_of(graph, "l1"), pruning_ratio=ratio)
        depgraph.build_plan(graph, masks)
    except Exception:  # `prune` will say why
        return None
    return round(time.process_time() - start, 2)


def _own_check(case: Case, original: nn.Module, result: Any) -> Row:
    """What the suite's own check says; that a config can't say the weights' shapes is no error where the report says so."""
    text = case.check(result.model) if case.check else ""
    known = result.report.to_dict()["config_mismatches"]
    excused = text.startswith(CONFIG) and bool(known)
    if text and not excused and case.check:  # no fault of pruning where the original has it too
        excused = case.check(original)[:ALIKE] == text[:ALIKE]
    return {"check": "" if excused else text, "config_mismatches": len(known)}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in nested tuples, lists and dicts, in another precision."""
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _traces(model: nn.Module, inputs: Inputs) -> bool:
    """Whether the analysis alone succeeds."""
    import depgraph

    try:
        depgraph.analyze(model, inputs)
    except Exception:
        return False
    return True


def _zeroed_deviation(model: nn.Module, result: Any, inputs: Inputs, output: Any) -> float | None:
    """Largest relative deviation of `output` from the original with the removed entries set to zero.

    A check that shares nothing with the library. It has a meaning where no statistic is taken over a pruned dim; None
    where the outputs cannot be compared (numbers of detections, values that are not finite).
    """
    original = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in original.state_dict().items():
            if value.is_floating_point():
                value.mul_(result.plan.mask(name))
        torch.manual_seed(0)
        expected = call(original, inputs)
    return deviation(expected, output)


def _broken_plan(model: nn.Module, result: Any) -> str | None:
    """The first parameter or buffer that is not the original's entries where the plan's mask is True; None for none.

    Integer buffers are left out: tables of positions are renumbered, not sliced.
    """
    original = model.state_dict()
    for name, value in result.model.state_dict().items():
        if value.is_floating_point() and not torch.equal(
            value.flatten(), original[name][result.plan.mask(name)].flatten()
        ):
            return name
    return None
