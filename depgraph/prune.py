"""The one call: trace, group, rank, plan, apply, verify, report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import nn

from .base.checks import flag, function, of_kind, shown
from .base.errors import InputError, NothingToPruneError, VerificationError
from .base.inputs import Examples, Outputs, checked_outputs, with_outputs
from .base.running import Score, score_of
from .base.values import all_finite
from .base.weights import Weights
from .comparing import Made, by_loss_or_outputs
from .costs.latency import Timer, pairs_of
from .data.calibration import Calibration, Loss
from .depth.request import Depth, depth_of
from .grouping.graph import GRANULARITIES, DependencyGraph
from .grouping.naming import Name, given_names, name_in, named
from .grouping.propagate import propagate
from .importance import AUTO, Importance, by_cost, is_auto, normalisation, ruled, scores_of
from .plan.plan import Plan
from .recover import Recovery, adds_bias
from .recover import check as check_recovery
from .recover import recover as win_back
from .recover.biases import most_entries
from .report import Report
from .search import Settled, settle
from .select import BUDGETS, Request, Scope, nothing_text
from .select.budgets import read_budgets
from .shorten import Shortened, recovered_values, shorten
from .surgery.apply import apply
from .surgery.lineage import plans_of
from .tracing.tensors import named_tensors, take_values
from .tracing.trace import trace
from .tracing.wrappers import check_changeable


@dataclass(repr=False)
class PruneResult:
    """What `prune` returns.

    Attributes:
        model: the smaller model.
        plan: what was removed; plain data that replays on any model of the original's shapes.
        report: figures before and after; ``print(result.report)``.
        before: the plans that had made the model that was given, where it was itself a result.
    """

    model: nn.Module
    plan: Plan
    report: Report
    before: tuple[Plan, ...] = ()

    def __repr__(self) -> str:
        return str(self.report)


Constraint = Callable[[DependencyGraph], Any]
ROWS_AT_ONCE = 1 << 20  # entries that are looked at together where values are read
OTHER_WAYS = 8  # so many tests in forward are run with the other outcome, too


def analyze(
    model: nn.Module, example_inputs: Any, *, ignore: Name | Sequence[Name] = (), strict: bool = False,
    constraints: Constraint | Sequence[Constraint] = (), granularity: str | None = None, outputs: Outputs | None = None,
) -> DependencyGraph:  # fmt: skip
    """Trace `model` and find what can be removed from it.

    Args:
        model: any module; it is not touched.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or `Examples` of these.
        ignore: what to leave alone: modules and parameters, as module paths, parameter names, globs of them, or themselves.
        strict: raise at an op that no rule covers instead of freezing its axes.
        constraints: functions of the graph, or one, that state what else must hold: `DependencyGraph.lock`, `at_least`,
            `multiple_of` and `equal_counts`.
        granularity: what is cut where one dim is a product, such as heads x width of a head: "coarse", the factor that is in
            most weights (whole heads), or "fine", the one with most units (often the width). By default coarse, and fine
            where a budget can't be met otherwise.
        outputs: what counts of what the model returns, the rest may get smaller with the model: a function of that, or names in it
            (``"logits"``, ``"features.2"``), or a list of names. By default all.

    Returns:
        what can be removed, and why the rest can't.

    Raises:
        InputError: there are no example inputs, `ignore` names nothing of the model, a constraint does not fit the graph,
            or an argument is something else.
        TraceError: the model rejects the inputs.
        UnknownOpError: with `strict`.
    """
    if granularity is not None and (not isinstance(granularity, str) or granularity not in GRANULARITIES):
        raise InputError(f"granularity must be one of {', '.join(GRANULARITIES)}, not {shown(granularity)}")
    flag("strict", strict)
    names, stated = given_names("ignore", ignore), stated_constraints(constraints)
    example_inputs = with_outputs(example_inputs, checked_outputs(outputs))
    return analyzed(as_module(model), example_inputs, names, strict, stated, granularity)


def analyzed(
    model: nn.Module, example_inputs: Any, ignore: Sequence[Name], strict: bool, constraints: Sequence[Constraint],
    granularity: str | None, weights: Weights | None = None,
) -> DependencyGraph:  # fmt: skip
    """As `analyze`; parameters on the meta device have their values in `weights`, where it is given."""
    known: dict[str, Any] = {} if weights is None else {"elsewhere": True}

    def graph_of(**ways: Any) -> DependencyGraph:
        found = trace(model, example_inputs, **ways, **known)
        return DependencyGraph(propagate(found, strict=strict and not ways), model, ignore, granularity)

    graph = graph_of()
    choices = graph.sizes.open_choices()[:OTHER_WAYS]
    literals = graph.meets_literals
    if literals or choices:  # most models have neither, and need only one run
        graph = graph_of(literals=literals, other_ways=choices)
    if graph.meets_literals and not literals:  # on a way that the first run did not take
        graph = graph_of(literals=True, other_ways=choices)
    if weights is not None:
        graph.weights = weights
    return graph.finish(constraints)


def stated_again(
    graph: DependencyGraph, ignore: Sequence[Name], strict: bool, constraints: Sequence[Constraint], granularity: str | None,
) -> dict[str, Any]:  # fmt: skip
    """The arguments of `analyzed` that `graph` was made by, for models of which some modules are others: by names."""
    names = [name_in(graph, n) for n in ignore]
    return {"ignore": names, "strict": strict, "constraints": constraints, "granularity": granularity}


FUNCTIONS = {"latency": ("model", "example_inputs"), "score": ("model",), "loss": ("output", "target")}
# The arguments of `analyze` that calls which prune hand on to it.
OF_ANALYZE = tuple(p.name for p in signature(analyze).parameters.values() if p.kind is p.KEYWORD_ONLY)


def stated_constraints(constraints: Any) -> list[Constraint]:
    """One constraint or several as a list, checked."""
    if isinstance(constraints, (Mapping, str)) or not (
        callable(constraints) or isinstance(constraints, Iterable)
    ):
        raise InputError(f"constraints must be functions of a DependencyGraph, not {shown(constraints)}")
    stated = [constraints] if callable(constraints) else list(constraints)
    for constraint in stated:
        function("constraints", constraint, "graph")
    return stated


def as_module(model: Any) -> Any:
    """An ExportedProgram as a module; anything else as it is."""
    if hasattr(model, "graph_signature") and hasattr(model, "module"):
        return model.module()
    return model


@torch.inference_mode(False)
def prune(
    model: nn.Module, example_inputs: Any, *, pruning_ratio: float | Mapping[str, float] | None = None,
    max_params: float | str | None = None, max_macs: float | str | None = None, max_bytes: float | str | None = None,
    max_latency: float | str | None = None, max_memory: float | str | None = None,
    importance: str | Importance = AUTO, scope: str | Sequence[Scope] | None = None, max_ratio: float | None = None,
    normalise: str | None = None, per_cost: bool | None = None, ignore: Name | Sequence[Name] = (), round_to: int | str = "auto", uniform: bool = False,
    constraints: Constraint | Sequence[Constraint] = (), granularity: str | None = None,
    calibration: Iterable[Any] | None = None, loss: Loss | None = None, recover: Any = None, score: Score | None = None,
    graph: DependencyGraph | None = None, verify: bool = True, inplace: bool = False, progress: bool | None = None,
    strict: bool = False, latency: bool | Timer = False, already_pruned: Plan | None = None, within: Plan | None = None,
    threshold: float | None = None, depth: bool | Depth | None = None, outputs: Outputs | None = None,
    **further_budgets: float | str | None,
) -> PruneResult:  # fmt: skip
    """Make `model` physically smaller, and prove that it is the original with indices taken away.

    Args:
        model: any module. It stays as it is, unless `inplace`.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or `Examples` of these.
        pruning_ratio: share of the indices of each prunable dim to remove, within each group (or, with a `scope`, of all
            that compete). The default is 0.5 where no budget is given. Or a share for each group name, module path,
            parameter name or glob of these, the last match counts: what is not named stays whole, or is decided by budgets.
        max_params: at most so many parameters: a fraction of the original's (a float up to 1) or a number (an int). All
            budgets that are given hold together.
        max_macs: at most so many multiply-accumulates of one forward pass, likewise.
        max_bytes: at most so many bytes of parameters and buffers, likewise, or "3MB".
        max_latency: at most so many seconds of one forward pass on this machine: a fraction, or "12ms" (see `costs/latency.py`).
        max_memory: at most so many bytes in activations at once in one forward pass: a fraction, a number or "3MB" (see
            `costs/memory.py`).
        importance: "auto" (see docs/best.md: `KfacInTurn` with `calibration`, by the loss or by signs at the outputs, whichever has
            the lower loss on held-out batches; magnitude without), a name in `depgraph.importance.CRITERIA`, a criterion from
            there with other arguments, or your own: a function from a `Group` to one score per unit; the lowest go first.
        scope: whose units compete: "local" (each group loses the same share, as a ratio does by default), "global" (as
            budgets do by default), "isomorphic" (groups of like structure), or a list of `Scope`, each with a ratio,
            floors and caps of its own (see `select/scope.py`).
        max_ratio: no group loses a larger share. By default 0.9 where units of several groups compete, or more where
            that is asked for or budgets need it.
        normalise: how scores are made comparable between groups: "mean", "none", "sum", "max" or "standard" (see
            `select/normalise.py`). By default what the criterion says of itself, or "mean".
        per_cost: budgets take the units with the least score per saved cost first, instead of the least score. By default
            what the criterion says of itself, or not.
        ignore: what to leave alone: modules and parameters, as module paths, parameter names, globs of them, or themselves.
        constraints: functions of the graph, or one, that state what else must hold of what goes (see `analyze`).
        granularity: "coarse" or "fine": whether whole heads go, or widths in them (see `analyze`).
        round_to: every parameter dim that shrinks keeps a multiple of this (the groups of a convolution counted together).
            "auto": under budgets, the channels of two-dimensional convolutions that come in multiples of 4 stay in such, as
            exported models run faster so, and a ratio is met to one unit where that makes them such. Widths below 16 are
            free, and all where a hundredth or more of the budget would be left.
        uniform: equal widths in all repeated blocks, and in all sizes that come from one field of the model's config, so that the
            config describes the result.
        verify: compare the result with the masked original before it is returned.
        inplace: change `model` itself, as the last step.
        calibration: batches for criteria that look at data: each in the form of `example_inputs`, or a pair of that
            and a target (see `Calibration`).
        loss: ``loss(output, target)`` -> scalar, for criteria that look at gradients.
        recover: what recovers accuracy from calibration data, without training: ``"auto"``, ``"reconstruction"``,
            ``"compensation"``, ``"statistics"``, a list of these, or a function (see `depgraph.recover`); ``"none"``: nothing.
            ``["new_bias", "auto"]`` also gives a bias to layers that have none, for which budgets leave room. ``"synthetic"``: as "auto",
            where there is no calibration data, on inputs made of the example's (`data.synthetic`). By default ``"auto"`` where
            `importance` is "auto" and there is calibration data, else nothing.
        score: ``score(model)`` -> a number, higher is better, of the model before and after, for the report. The model
            is in eval mode meanwhile.
        graph: what `analyze` returned for this model and these inputs, where several plans are made: nothing is traced
            again, and it stays as it is.
        progress: show bars on long work; None: on a terminal alone.
        strict: raise at an op that no rule covers instead of freezing its axes.
        latency: measure seconds per forward pass before and after, for the report, as `max_latency` does in any case. Or what measures them, there and for
            `max_latency`: ``latency(model, example_inputs)`` -> seconds, such as `integrations.onnx_runtime.latency`, or runs
            on a phone. Models are timed in turns.
        already_pruned: the plan that made `model` of its original, where one is pruned in several steps: ratios, caps and floors
            then count from the original's sizes (`GradualPruner` gives it).
        within: the plan of a larger model that was made of `model`: what that removes goes here, too, so that what the smaller
            one keeps the larger one keeps. One that removes branches needs `depth`.
        threshold: instead of a ratio or budget: the units whose score is below this go, from each group as many as there
            are. Scores are normalised before: 0.1 is a tenth of the group's mean, with ``normalise="none"`` it is the
            score itself.
        depth: also remove branches (see `branches`): True, or a `Depth` that says how many stay and what ranks them. They are
            ranked again after each that goes. Under budgets, branches and widths meet them together: several numbers of
            branches are tried, none among them, and the model is taken whose outputs (with `loss`, whose loss) on the
            calibration data or else the example inputs are best. With a ratio, that share of the branches goes, too. With
            ``Depth(keep=...)`` and neither, widths stay. With `uniform`, branches go by whole layers, so that a config can
            express the result.
        outputs: what counts of what the model returns, the rest may get smaller with the model (see `analyze`).
        **further_budgets: those of `register_budget`, such as ``max_energy=0.5``.

    Returns:
        the smaller model, the plan, and a report.

    Raises:
        InputError: bad arguments, NaN or infinite weights, weights on the meta device.
        TraceError: the model rejects the inputs.
        NothingToPruneError: everything is frozen; the message says by what.
        BudgetError: the budget is below what can be reached.
        VerificationError: the result would not equal the masked original. Nothing was changed.
    """
    arguments = dict(locals())
    asked, recover = importance, recovery_of(recover, importance, calibration)
    importance = by_rule(arguments, further_budgets, calibration is not None)
    request, shorter = Request.of(arguments, further_budgets), depth_of(depth)
    names, stated = given_names("ignore", ignore), stated_constraints(constraints)
    _check_kinds(arguments)
    timer = latency if callable(latency) else None
    if graph is not None and shorter is not None:
        raise InputError(
            "graph has no effect with depth, as each number of branches has a graph of its own: leave it away, and give ignore, "
            "constraints and granularity here"
        )
    if recover is not None:
        check_recovery(recover, calibration)
    if uniform and adds_bias(recover):
        raise InputError(
            "uniform=True makes a model that its stock class can load, and 'new_bias' in recover gives layers a bias that this class "
            "does not build: leave one of the two away"
        )
    model = as_module(model)
    if isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        _check_has_values(model)
        if inplace:
            check_changeable(model)
    if graph is None:
        graph = analyze(
            model,
            example_inputs,
            ignore=names,
            strict=strict,
            constraints=stated,
            granularity=granularity,
            outputs=outputs,
        )
    elif graph.model is not model:
        raise InputError("graph was made from another model: give the model that analyze was called with")
    elif names or strict or stated or granularity or outputs is not None:
        raise InputError(f"{', '.join(OF_ANALYZE)} have no effect on a finished graph: give them to analyze")
    if not isinstance(example_inputs, Examples) or example_inputs.outputs is None:
        example_inputs = with_outputs(example_inputs, graph.trace.counted)
    scored = None if score is None else score_of(score, model)
    data = None if calibration is None else Calibration(calibration, example_inputs, loss, progress)
    notes: list[str] = []
    removed: list[str] = []

    def recovered(small: nn.Module, plan: Plan, graph: DependencyGraph) -> Recovery | None:
        if recover is None:
            return None
        room = _room(request, model, small, example_inputs) if adds_bias(recover) else None
        return win_back(
            model, small, plan, graph, data, recover, example_inputs=example_inputs, progress=progress, room=room
        )  # fmt: skip

    def made(importance: str | Importance, graph: DependencyGraph = graph) -> Made:
        said: list[str] = []
        found = planned(
            graph, example_inputs, request, importance, data, verify, said, asked, timer, adds_bias(recover)
        )
        return Made(found, recovered(found.model, found.plan, found.graph), said)

    if shorter is None:
        by_rule_alone = is_auto(asked) and not callable(recover)
        best = (
            by_loss_or_outputs(made, model, data) if data is not None and by_rule_alone else made(importance)
        )
        (small, plan, proof, graph), won, notes = best
    else:
        of_analyze = stated_again(graph, names, strict, stated, granularity)
        widths = Widths(importance, data, example_inputs, notes, of_analyze, timer, adds_bias(recover))
        found = shortened(graph, shorter, request, widths, asked, verify)
        small, plan, proof = found.model, found.plan, found.verification
        unshifted = found.unshifted.model, found.unshifted.plan
        removed = [b.name for b in found.branches]
        won = recovered(*unshifted, graph)
        if won is not None and small is not unshifted[0]:
            if unshifted[1].biases:
                plan.biases = unshifted[1].biases
                small = apply(model, plan)
            recovered_values(small, unshifted[0], plan)
    before = plans_of(model)
    clocked = latency or "max_latency" in request.budgets
    timed = pairs_of(model, small, example_inputs, timer) if clocked else None
    report = Report.of(
        graph, plan, small, proof, example_inputs,
        notes=notes,
        latency=None if timed is None else (timed.before, timed.after),
        latency_spread=None if timed is None else timed.spread,
        score=None if score is None or scored is None else (scored, score_of(score, small)),
        recovery=won,
        removed=removed,
    )  # fmt: skip
    if inplace:
        small = _taken_over(model, small, plan, won is not None)
    return PruneResult(small, plan, report, before)


def _check_kinds(given: Mapping[str, Any]) -> None:
    """Check those of the arguments of `prune` that must be flags, functions of something, or what `analyze` returned."""
    timed = callable(given["latency"])
    for name in ("verify", "inplace", "strict", *(() if timed else ("latency",))):
        flag(name, given[name])
    for name, takes in FUNCTIONS.items():
        if given[name] is not None and (timed or name != "latency"):
            function(name, given[name], *takes)
    if given["graph"] is not None:
        of_kind("graph", given["graph"], DependencyGraph, "what depgraph.analyze returned")


def planned(
    graph: DependencyGraph, example_inputs: Any, request: Request, importance: str | Importance,
    data: Calibration | None, verify: bool | Weights, notes: list[str], asked: str | Importance | None = None,
    timer: Timer | None = None, new_biases: bool = False,
) -> Settled:  # fmt: skip
    """Score, choose, plan, apply and verify, for `prune` and its likes, whose model may have its values elsewhere.

    Args:
        graph: what `analyze` returned.
        example_inputs: as for `prune`.
        request: its arguments.
        importance: likewise.
        data: for criteria that look at data.
        verify: whether to compare with the masked original; or the source of the weights on which that is done.
        notes: sentences for the report are added.
        asked: what `importance` was chosen by, where that is another.
        timer: what measures seconds for budgets, instead of runs on this machine.
        new_biases: whether budgets leave room for them.

    Raises:
        InputError: NaN or infinite weights, or a bad argument.
        NothingToPruneError: everything is frozen.
        BudgetError: the budget is below what can be reached.
        VerificationError: the result would not equal the masked original.
    """
    asked = importance if asked is None else asked
    check_finite(graph, scored_by(asked, graph))
    widths = Widths(importance, data, example_inputs, notes, timer=timer, new_biases=new_biases)
    found = widths.cut(graph, request, verify)
    _note_choices(found.graph, notes)
    also = {"importance": asked, "granularity": found.graph.granularity}
    found.plan.request = {**request.as_data(), **{k: v for k, v in also.items() if isinstance(v, str)}}
    return found


def shortened(
    graph: DependencyGraph,
    depth: Depth,
    request: Request,
    widths: Widths,
    asked: str | Importance,
    verify: bool | Weights,
) -> Shortened:
    """As `planned`, with fewer branches, too."""
    check_finite(graph, scored_by(asked, graph))
    found = shorten(
        graph,
        widths.example_inputs,
        depth,
        request,
        widths.data,
        widths.ignored(graph),
        verify,
        widths.of_base,
        widths.timer,
    )
    widths.notes.append(found.note)
    _note_choices(graph, widths.notes)
    also = {"importance": asked, "granularity": widths.of_analyze["granularity"], "depth": depth.by}
    found.plan.request = {**request.as_data(), **{k: v for k, v in also.items() if isinstance(v, str)}}
    return found


def _note_choices(graph: DependencyGraph, notes: list[str]) -> None:
    """Name the branches of forward that no example takes."""
    if choices := graph.sizes.open_choices():
        lines = ", ".join(dict.fromkeys(line for line, _ in choices[:5]))
        notes.append(
            f"forward went one of two ways for the example at {lines}{' ...' if len(choices) > 5 else ''}: the other way was "
            "followed without knowing inputs that take it; pass depgraph.Examples with such inputs to have it proved"
        )


@dataclass
class Widths:
    """How widths are cut.

    Attributes:
        importance: the criterion.
        data: for criteria that look at data.
        example_inputs: as for `prune`.
        notes: those of the last cut.
        of_analyze: arguments of `analyze`, for models from which branches went.
        timer: what measures seconds for budgets, instead of runs on this machine.
        new_biases: whether budgets leave room for them.
        weights: where tensors on the meta device have their values.
    """

    importance: str | Importance
    data: Calibration | None
    example_inputs: Any
    notes: list[str]
    of_analyze: dict[str, Any] = field(default_factory=dict)
    timer: Timer | None = None
    new_biases: bool = False
    weights: Weights | None = None

    def cut(self, graph: DependencyGraph, request: Request, verify: bool | Weights) -> Settled:
        """The model of `graph` with the widths that `request` asks for."""
        if not graph.groups:
            raise NothingToPruneError(nothing_text(graph))
        self.notes.clear()
        scores = scores_of(graph, self.importance, calibration=self.data, notes=self.notes)
        targets = read_budgets(graph, self.example_inputs, request, self.timer)
        entries = most_entries(graph) if self.new_biases else 0
        for target in targets.targets:
            if entries and target.kind.stored is not None:
                target.limit -= entries * target.kind.stored(graph.model)
        found = settle(graph, self.example_inputs, scores, request, targets, verify, self.notes)
        if request.threshold is not None and not found.plan.cuts:
            lowest = min(b.scores[0] for b in request.selection(found.graph, scores).blocks if len(b.scores))
            self.notes.append(
                f"no score is below threshold={request.threshold:g}, so nothing was removed: the lowest is {lowest:.3g}"
            )
        return found

    def of_base(self, base: nn.Module, request: Request, verify: bool | Weights) -> Settled:
        """The same of a model with stand-ins for branches that went."""
        try:
            graph = analyzed(base, self.example_inputs, **self.of_analyze, weights=self.weights)
        except InputError as error:
            raise InputError(
                f"without the branches that would go: {error}\n  fix: ignore what constraints are about, so that it stays"
            ) from error
        return self.cut(graph, request, verify)

    def ignored(self, graph: DependencyGraph) -> set[str]:
        """Names of the tensors that stay."""
        return {n for name in self.of_analyze["ignore"] for n in named(graph, name)[0]}


def _room(request: Request, model: nn.Module, small: nn.Module, example_inputs: Any) -> int | None:
    """How many parameters `small` may get by the budgets that count what is stored; None where there is none."""
    left = [
        (kind.amount(given, kind.measure(model, example_inputs)) - kind.measure(small, example_inputs))
        / kind.stored(model)
        for kind, given in request.amounts
        if kind.stored is not None
    ]
    return max(0, int(min(left))) if left else None


def by_rule(
    arguments: dict[str, Any], further_budgets: Mapping[str, Any], calibrated: bool
) -> str | Importance:
    """The criterion for the `arguments` of `prune`, in which `normalise` and `per_cost` become what it says where they are None."""
    importance = ruled(arguments["importance"], calibrated, compete({**arguments, **further_budgets}))
    if arguments["per_cost"] is None:
        arguments["per_cost"] = by_cost(importance) and arguments["normalise"] != "standard"
    if arguments["normalise"] is None:
        arguments["normalise"] = normalisation(importance)
    return importance


def compete(arguments: Mapping[str, Any]) -> bool:
    """Whether units of several groups compete, by the `arguments` of `prune`: under a budget, or a scope that says so."""
    scope = arguments.get("scope")
    wide = isinstance(scope, str) and scope in ("global", "isomorphic")
    return wide or any(arguments.get(name) is not None for name in BUDGETS)


def recovery_of(recover: Any, importance: Any, calibration: Any) -> Any:
    """What `recover` asks for, where nothing is said or "none" is; None for nothing."""
    if recover is None:
        return AUTO if is_auto(importance) and calibration is not None else None
    return None if isinstance(recover, str) and recover == "none" else recover


def _taken_over(model: nn.Module, small: nn.Module, plan: Plan, recovered: bool) -> nn.Module:
    """`model` itself made what `small` is, with its values where they were `recovered`."""
    changed = apply(model, plan, inplace=True)
    if recovered:
        take_values(changed, small)
    return changed


def _check_has_values(model: nn.Module) -> None:
    meta = [n for n, t in named_tensors(model)[0].items() if t.device.type == "meta"]
    if meta:
        raise InputError(
            f"the model is on the meta device ({meta[0]!r}): its weights have no values to score\n"
            "  fix: materialise it first (load it whole where it is offloaded), or plan on the real model and "
            "apply(meta_model, plan)"
        )


def scored_by(importance: str | Importance, graph: DependencyGraph) -> set[str]:
    """The tensors whose values a criterion looks at, as far as it is known."""
    return set() if callable(importance) else {m.name for g in graph.groups for m in g.members}


def check_finite(graph: DependencyGraph, scored: set[str]) -> None:
    """Refuse NaN and infinite weights; those in `scored` are looked at when they are ranked."""
    named = [(n, p) for n, p in graph.model.named_parameters() if n not in scored and p.is_floating_point()]
    bad = [n for n, p in named if not _is_finite(graph.weights, n, p)]
    if bad:
        raise InputError(
            f"NaN or infinite values in {', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}: nothing was pruned"
        )


def _is_finite(weights: Weights, name: str, tensor: torch.Tensor) -> bool:
    if not tensor.is_meta:
        return all_finite(tensor)
    found = weights.kept(f"{name} finite", lambda: [_finite_by_rows(weights, name, tensor)])
    return found is None or bool(found[0])


def _finite_by_rows(weights: Weights, name: str, tensor: torch.Tensor) -> bool:
    if not tensor.numel():
        return True
    if not tensor.dim():
        return all_finite(weights.whole(name))
    step = max(1, ROWS_AT_ONCE // max(1, tensor[0].numel()))
    starts = range(0, tensor.shape[0], step)
    return all(all_finite(weights.rows(name, i, min(i + step, tensor.shape[0]))) for i in starts)


__all__ = ["PruneResult", "VerificationError", "analyze", "prune"]
