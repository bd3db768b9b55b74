"""Recovery without training: what calibration data alone can win back of a pruned model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..base.checks import a_module, function, of_kind, shown, whole_number
from ..base.errors import InputError
from ..base.inputs import each_example
from ..base.memory import returned_at_once
from ..base.running import WriteGuardMode
from ..base.values import output_leaves
from ..data.calibration import Batch, Calibration
from ..data.synthetic import synthetic
from ..data.watch import prepared, twin
from ..grouping.graph import DependencyGraph
from ..grouping.propagate import propagate
from ..plan.plan import Plan
from ..surgery.lineage import revise
from .biases import give_biases
from .changes import Changes
from .compensation import compensate
from .pairs import Pair, pairs
from .reconstruction import Reconstruction, work_of
from .result import LayerRecovery, Recovery
from .sequence import reconstruct
from .statistics import estimate, has_statistics
from .task import Task

AT_ONCE = 1 << 20  # entries of outputs that are compared at a time
METHODS = ("reconstruction", "compensation", "statistics")
NEW_BIAS = "new_bias"  # beside methods: layers without a bias get one
SYNTHETIC = "synthetic"  # as "auto", with synthetic batches in place of calibration data
How = str | Reconstruction | Sequence[Any] | Callable[..., Any]


OWN = ("model", "small", "plan", "graph", "calibration")  # what a function of the user's is called with


def recover(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    graph: DependencyGraph,
    calibration: Calibration | Iterable[Any] | None,
    how: How = "auto",
    *,
    example_inputs: Any = None,
    progress: bool | None = None,
    room: int | None = None,
) -> Recovery:
    """Win back what `small` lost against `model`, from calibration data, without training. `small` is changed.

    Each method is kept only if it brings the outputs of `small` closer to those of `model` on the batches that are held
    out (the last fifth; with a single batch, on that one), and each layer's change only if it lowers that layer's error.

    Args:
        model: the original; it is not touched.
        small: what ``apply(model, plan)`` returned.
        plan: what was removed.
        graph: the original's, from `analyze`.
        calibration: a `Calibration`, or batches in the form of the example inputs; all of them are held at once; of the
            activations that the models make of them, what fits into a quarter of the free memory (the rest waits in temporary files).
        how: ``"statistics"`` (batch norms), ``"compensation"`` (biases), ``"reconstruction"`` (weights, by least squares),
            or ``"auto"``: reconstruction, compensation where that was not possible, and statistics; a list of these, in
            this order; a `Reconstruction` with options; or a function ``(model, small, plan, graph, calibration)`` of your own.
            ``"synthetic"`` is "auto" where there is no calibration data: on `data.synthetic`. With ``"new_bias"`` in a list, layers
            that have no bias and no batch norm behind them get one where their module keeps an empty place for it and their op is
            given what stands there. `plan` then says so, too.
        example_inputs: those of the trace, where `calibration` is not a `Calibration`; by default its first batch.
        progress: as for `prune`.
        room: how many numbers new biases may have, together; None: no bound.

    Returns:
        what was done where, with each layer's error before and after.

    Raises:
        InputError: no data, bad data, or an unknown method. After this or any other exception `small` is as it was, but
            for what a function of your own has done.
    """
    for name, given in (("model", model), ("small", small)):
        a_module(name, given)
    of_kind("plan", plan, Plan, "a depgraph.Plan")
    of_kind("graph", graph, DependencyGraph, "what depgraph.analyze returned")
    if plan.reorders:
        raise InputError(
            "the plan holds an order: recover with the model whose units are in order as the original"
        )
    if room is not None:
        whole_number("room", room)
    check(how, calibration)
    if on_synthetic(how) and example_inputs is None:
        raise InputError(f"recover={how!r} makes its batches of the example inputs: give example_inputs")
    if callable(how):
        how(model, small, plan, graph, calibration)
        return Recovery(notes=["recovered by a function of the user's"])
    batches = (
        synthetic(model, example_inputs, progress=progress)
        if on_synthetic(how)
        else _batches(calibration, example_inputs, progress)
    )
    example = (batches[0].kwargs or batches[0].args) if example_inputs is None else example_inputs
    task = Task(model, Changes(small), batches, progress=progress)
    if adds_bias(how):
        task.room = math.inf if room is None else room
    with returned_at_once():
        found = carried_out(task, how, graph, plan, example)
    if on_synthetic(how):
        found.notes.append(f"recovered without data, on {len(batches)} synthetic batches")
    return found


def _batches(data: Any, example_inputs: Any, progress: bool | None) -> list[Batch]:
    """The calibration data, as `recover` is given it."""
    if not isinstance(data, Calibration):
        if example_inputs is None and isinstance(data, Iterable) and not isinstance(data, torch.Tensor):
            data = list(data)
        first = data[0] if isinstance(data, list) and data else torch.zeros(1)
        data = Calibration(data, first if example_inputs is None else example_inputs, progress=progress)
    return list(data.batches("reading calibration data"))


def carried_out(task: Task, how: How, graph: DependencyGraph, plan: Plan, example: Any) -> Recovery:
    """As `recover`, of a task, by methods that are known; after an exception its changes are undone."""
    try:
        _run(task, _steps(how), graph, plan, example)
    except BaseException:
        task.changes.undo()
        raise
    if task.changes.biases:
        task.recovery.biases = [bias.name for bias in task.changes.biases]
        plan.biases += task.changes.biases
        revise(task.model, task.changes.model, plan)
    return task.recovery


def check(how: Any, calibration: Any) -> None:
    """Refuse an unknown method, or one that needs data where there is none, before anything is done."""
    if callable(how):
        function("recover", how, *OWN)
        return
    _steps(how)
    if on_synthetic(how) and calibration is not None:
        raise InputError(
            f"recover={how!r} is for where there is no calibration data: give 'auto' in place of '{SYNTHETIC}'"
        )
    if calibration is None and not on_synthetic(how):
        raise InputError(
            f"recover={how!r} needs calibration data: give calibration=[...], batches of inputs, or where there are none '{SYNTHETIC}' in "
            "place of 'auto'"
        )


def adds_bias(how: Any) -> bool:
    """Whether layers without a bias are to get one."""
    return NEW_BIAS in _names(how if isinstance(how, (list, tuple)) else ())


def on_synthetic(how: Any) -> bool:
    """Whether synthetic batches stand for calibration data."""
    return SYNTHETIC in _names(how if isinstance(how, (list, tuple)) else [how])


def _names(steps: Iterable[Any]) -> list[str]:
    return [step for step in steps if isinstance(step, str)]


def _steps(how: Any) -> list[Any]:
    given = list(how) if isinstance(how, (list, tuple)) else [how]
    steps: list[Any] = []
    new = adds_bias(how)
    for step in given:
        if new and isinstance(step, str) and step == NEW_BIAS:
            continue
        if isinstance(step, str) and step in ("auto", SYNTHETIC):
            steps += METHODS
        elif isinstance(step, Reconstruction) or (isinstance(step, str) and step in METHODS):
            steps.append(step)
        else:
            raise InputError(
                f"recover must be 'auto', '{SYNTHETIC}', {', '.join(map(repr, METHODS))}, a list of these (and '{NEW_BIAS}'), a Reconstruction "
                f"or a function, not {shown(step)}"
            )
    if new and all(isinstance(step, str) and step == "statistics" for step in steps):
        raise InputError(
            f"recover={how!r} has nothing that finds values for new biases: give ['{NEW_BIAS}', 'auto'], or 'reconstruction' or "
            "'compensation' in place of 'auto'"
        )
    if not steps:
        raise InputError("recover is an empty list: give at least one method, or None")
    return steps


def _run(task: Task, steps: list[Any], graph: DependencyGraph, plan: Plan, example: Any) -> None:
    recovery, changes = task.recovery, task.changes
    judges = [b for b, held_out in zip(task.batches, task.held_out, strict=True) if held_out] or task.batches
    wanted = [task.aside(_outputs(task.model, b)) for b in judges]

    def judged() -> float | None:
        return _error((w.taken() for w in wanted), (_outputs(changes.model, b) for b in judges))

    error = first = judged()
    found: list[Pair] = []
    if any(step != "statistics" for step in steps):
        every, recovery.skipped = pairs(graph.state, propagate(changes.traced(example)), plan)
        if task.room is not None:
            refused = give_biases(changes, every, graph, plan, example, task.room)
            every, recovery.skipped = pairs(graph.state, propagate(changes.traced(example)), plan)
            recovery.skipped += refused
        recovery.skipped += [(p.name, why) for p in every if p.loses and (why := changes.refuses(p.name))]
        found = [_shifted(p, changes) for p in every if not changes.refuses(p.name)]
    for step in steps:
        done = len(recovery.layers)
        changes.begin()
        _step(step, task, found, graph, len(each_example(example)))
        if not changes.since:
            continue
        new = judged()
        if error is not None and new is not None and not new <= error:
            changes.take_back()
            name = step if isinstance(step, str) else "reconstruction"
            recovery.notes.append(
                f"{name} was undone: the error of the outputs rose from {error:.3g} to {new:.3g}"
            )
            recovery.layers[done:] = [
                replace(layer, kept=False, detail="its method was undone") for layer in recovery.layers[done:]
            ]
        else:
            error = new
    for bias in [b for b in changes.biases if not changes.value(b.name).any()]:
        changes.take(bias)
    recovery.output = None if first is None or error is None else (first, error)


def _fitting(found: list[Pair], task: Task) -> list[Pair]:
    """The pairs for whose solution there is memory; the others are noted."""
    fits = []
    for pair in found:
        needed = work_of(pair)
        if task.memory is None or needed <= task.memory:
            fits.append(pair)
        else:
            why = f"takes {needed / 1e9:.2g} GB to solve, and there is room for {task.memory / 1e9:.2g} GB"
            task.recovery.skipped.append((pair.name, why))
    return fits


def _shifted(pair: Pair, changes: Changes) -> Pair:
    """A pair without the place for its constant, where that can't be changed."""
    return replace(pair, shift=None) if pair.shift is not None and changes.refuses(pair.shift.name) else pair


def _step(step: Any, task: Task, found: list[Pair], graph: DependencyGraph, runs: int) -> None:
    """One method; constants are for layers that were not reconstructed, which has found theirs."""
    if step == "statistics":
        if has_statistics(graph):
            estimate(task)
    elif step == "compensation":
        solved = {r.name for r in task.recovery.layers if r.kept and r.method == "reconstruction"}
        compensate(task, [p for p in found if p.name not in solved])
    else:
        reconstruct(
            task, _fitting(found, task), step if isinstance(step, Reconstruction) else Reconstruction(), runs
        )


def _outputs(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """The floating-point outputs of a model in eval mode; of complex ones both parts."""
    copy, _ = twin(model)
    with prepared(), torch.no_grad(), WriteGuardMode(copy.parameters()):
        out = batch.copy().run(copy)
    found = [t.detach() for t in output_leaves(out)]
    found = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in found]
    return [t for t in found if t.is_floating_point()]


def _error(wanted: Iterable[list[torch.Tensor]], got: Iterable[list[torch.Tensor]]) -> float | None:
    """Squares of the difference over squares of what is wanted, where that is finite.

    None where shapes differ or there is nothing to compare; infinite where `got` is not finite and should be.
    """
    missing = whole = 0.0
    for one, other in zip(wanted, got, strict=True):
        if [t.shape for t in one] != [t.shape for t in other]:
            return None
        for a, b in zip(one, other, strict=True):
            for x, y in zip(a.flatten().split(AT_ONCE), b.flatten().split(AT_ONCE), strict=True):
                fine = torch.isfinite(x)
                x, y = (x, y) if bool(fine.all()) else (x[fine], y[fine])
                x, y = x.double(), y.double()
                missing += float((x - y).square().sum())
                whole += float(x.square().sum())
    if not math.isfinite(missing):
        return math.inf
    return missing / whole if whole else None


__all__ = ["METHODS", "LayerRecovery", "Reconstruction", "Recovery", "check", "recover"]
