"""Plan, apply, verify, and the one way back: what fails is frozen, in a graph of its own, and everything is planned again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from .axes import axes
from .axes.axes import Reason
from .base.errors import PlanError, VerificationError
from .base.weights import Weights
from .config.origin import config_mismatches
from .config.valid import refusals
from .grouping.build import build_plan, flipped
from .grouping.graph import DependencyGraph
from .grouping.replay import check_program, is_needed
from .importance import Scores
from .plan.plan import Masks, Plan
from .select import Block, Request
from .select.budgets import Targets
from .surgery.apply import apply
from .tracing.sizes import attributes_in
from .verify.verify import Verification
from .verify.verify import verify as verify_values

TRIES = 20  # plans that may fail


class Settled(NamedTuple):
    """The smaller model, its plan, what was proved, and the graph without the groups that failed on the way."""

    model: nn.Module
    plan: Plan
    verification: Verification
    graph: DependencyGraph


class Refused(NamedTuple):
    """Groups that can't be cut, why, and the note about them that goes into the report.

    With `multiple`, they can be cut to multiples of it.
    """

    groups: list[str]
    reason: Reason
    note: str
    multiple: int | None = None

    def view(self, graph: DependencyGraph) -> DependencyGraph:
        """`graph` without these groups, or with multiples of a number of their units."""
        if self.multiple is not None:
            return graph.rounded(self.groups, self.multiple)
        return graph.without(self.groups, self.reason)


def settle(
    graph: DependencyGraph,
    example_inputs: Any,
    scores: Mapping[str, Scores],
    request: Request,
    targets: Targets,
    verify: bool | Weights,
    notes: list[str],
) -> Settled:
    """Plan, apply and verify. What fails is frozen and everything is planned again: the one way back.

    Three things can fail: a comparison of sizes in the user's code that would come out differently, the program that
    the smaller model runs, and the comparison with the masked original. The blocks that fail the latter two by themselves are found by trying each alone, one that
    fails only together with others by bisection. Plans under budgets that are measured are made until one is settled on.
    """
    failed = 0
    while failed < TRIES:
        masks = targets.masks(graph, request, scores)
        found = _tried(graph, masks, example_inputs, scores, request, targets, verify)
        if isinstance(found, Settled):
            return found
        for refused in found:
            graph = refused.view(graph)
            notes.append(refused.note)
        if found:
            targets.restart()
            failed += 1
    raise VerificationError("every plan changes the result of a comparison of sizes in forward")


def _tried(
    graph: DependencyGraph, masks: Masks, example_inputs: Any, scores: Mapping[str, Scores], request: Request,
    targets: Targets, verify: bool | Weights,
) -> Settled | list[Refused]:  # fmt: skip
    """What `masks` lead to: the result, or what must be frozen; nothing of it where a budget asks for another plan."""
    if refused := _flipped(graph, masks):
        return refused
    plan = build_plan(graph, masks)
    small = apply(graph.model, plan)
    if not targets.settled(graph, request, masks, small):
        return []
    if request.uniform:
        described = apply(graph.model, build_plan(graph, masks, assume_unused_config_reads=bool(verify)))
        if refused := _undescribed(graph, masks, described):
            return refused
    proof = Verification("skipped", detail="verify=False")
    try:
        if is_needed(graph, bool(verify)):
            check_program(graph, masks, small, example_inputs)
        if verify:
            small, plan, proof = _proved(graph, masks, small, plan, example_inputs, verify)
            proof = by_group(graph, masks, proof)
    except VerificationError as error:
        if refused := _wrong(graph, masks, request.blocks(graph, scores, masks), example_inputs, verify):
            return refused
        raise VerificationError(f"{error}\n  nothing was changed or returned") from error
    if request.uniform and (refused := _undescribed(graph, masks, small)):
        return refused
    return Settled(small, plan, proof, graph)


def _proved(
    graph: DependencyGraph, masks: Masks, small: nn.Module, plan: Plan, example_inputs: Any,
    verify: bool | Weights,
) -> tuple[nn.Module, Plan, Verification]:  # fmt: skip
    """The smaller model, verified, with as many repairs as verify.

    Numbers of a config that forward reads for purposes that are not seen follow the plan where the outputs allow it.
    """
    fuller = build_plan(graph, masks, assume_unused_config_reads=True)
    if fuller.repairs != plan.repairs:
        try:
            other = apply(graph.model, fuller)
            return other, fuller, _compared(graph, other, fuller, example_inputs, verify)
        except (VerificationError, PlanError):  # forward computes with them: they stay
            pass
    return small, plan, _compared(graph, small, plan, example_inputs, verify)


def _compared(
    graph: DependencyGraph, small: nn.Module, plan: Plan, example_inputs: Any, verify: bool | Weights
) -> Verification:
    """The proof, on the weights that `verify` says."""
    elsewhere: dict[str, Any] = {} if isinstance(verify, bool) else {"weights": verify}
    return verify_values(graph.model, small, plan, example_inputs, **elsewhere)


def by_group(graph: DependencyGraph, masks: Mapping[str, Any], proof: Verification) -> Verification:
    """`proof`, in which groups are unproved, not tensors: those of whose parameters each has kept entries that move no output."""
    known = {n for n, _ in graph.model.named_parameters()} & graph.tensors.keys()
    owned = {g.name: {m.name for m in g.members} & known for g in graph.groups if g.name in masks}
    unmoved = set(proof.unproved)
    return replace(proof, unproved=tuple(name for name, own in owned.items() if own and own <= unmoved))


def _undescribed(graph: DependencyGraph, masks: Masks, small: nn.Module) -> list[Refused]:
    """The groups that `masks` cut in parameters that no config can express.

    A number that no config can express (a scale, say, computed from a width) stands for the parameters of its module.
    """
    if found := _refused_by_config(graph, masks, small):
        return found
    names = config_mismatches(small, graph.origins)
    owners = tuple(n.rpartition(".")[0] + "." for n in names if n not in graph.tensors)
    places = [n for n in graph.trace.tensors if n in names or n.startswith(owners)]
    atoms = [a for n in places for axis in graph.dims(n) if axis is not None for a in axes.atoms(axis)]
    cut = [g.name for a in dict.fromkeys(atoms) if (g := graph.by_axis.get(a)) and g.name in masks]
    note = f"{', '.join(names[:3])} stay whole: the config cannot express their new sizes"
    reason = Reason("has a size the config cannot express")
    return [Refused(cut, reason, note)] if cut else []


def _refused_by_config(graph: DependencyGraph, masks: Masks, small: nn.Module) -> list[Refused]:
    """The groups that `masks` cut behind a field that the config's own checks refuse."""
    found = []
    for refusal in refusals(graph.model, small):
        dims = [
            (name, d)
            for name, exprs in graph.origins.shapes.items()
            for d, expr in enumerate(exprs)
            if refusal.key in attributes_in(expr)
        ]
        cut: dict[str, int] = {}
        for name, d in dims:
            for axis in graph.dims(name)[d : d + 1]:
                for atom in axes.atoms(axis) if axis is not None else ():
                    group = graph.by_axis.get(atom)
                    if group is not None and group.name in masks:
                        cut[group.name] = group.units
        whole = [name for name, units in cut.items() if units == refusal.old]
        field = ".".join(map(str, refusal.key[2:]))
        told = any(name in whole and n % refusal.multiple == 0 for name, _, n in graph.multiples)
        if whole and refusal.multiple < refusal.old and not told:
            note = (
                f"{field} stays a multiple of {refusal.multiple}: the config takes no other ({refusal.error})"
            )
            found.append(Refused(whole, Reason("is a field of the config"), note, refusal.multiple))
        elif cut:
            note = f"{', '.join(list(cut)[:3])} stay whole: the config does not take another {field} ({refusal.error})"
            found.append(Refused(list(cut), Reason("has a size the config does not take"), note))
    return found


def _flipped(graph: DependencyGraph, masks: Masks) -> list[Refused]:
    """The groups in comparisons in forward that `masks` would change."""
    return [
        Refused(
            groups,
            Reason(f"enters a comparison in forward that would have changed ({text})"),
            f"some axes stay whole: a comparison of sizes in forward would have changed ({text})",
        )
        for groups, text in flipped(graph, masks)
    ]


def _wrong(
    graph: DependencyGraph, masks: Masks, blocks: Sequence[Block], example_inputs: Any, verify: bool | Weights
) -> list[Refused]:
    """The blocks that do not verify when cut alone, or else the first that does not with those before it."""

    def problem(cut: Sequence[Block]) -> str:
        mine = {n: masks[n] for block in cut for n in block.names if n in masks}
        plan = build_plan(graph, mine)
        try:
            if plan.cuts:
                small = apply(graph.model, plan)
                if is_needed(graph, bool(verify)):
                    check_program(graph, mine, small, example_inputs)
                if verify:
                    _compared(graph, small, plan, example_inputs, verify)
        except (VerificationError, PlanError) as error:
            return str(error)
        return ""

    def refused(block: Block, why: str) -> Refused:
        note = f"{', '.join(block.names[:3])} stay whole: the result would differ from the masked original"
        return Refused(block.names, Reason(why), note)

    def alone(part: Sequence[Block]) -> list[tuple[Block, str]]:
        """Those of `part` that do not verify when cut alone; where the whole of it does, none of it is looked at."""
        why = problem(part)
        if not why or len(part) == 1:
            return [(part[0], why)] if why else []
        return [found for half in (part[: len(part) // 2], part[len(part) // 2 :]) for found in alone(half)]

    if (found := alone(blocks)) or len(blocks) < 2:
        return [refused(block, f"did not verify when cut alone ({why})") for block, why in found]
    right, wrong = 1, len(blocks)  # so many of the first blocks verify together; so many don't
    while wrong - right > 1:
        middle = (right + wrong) // 2
        right, wrong = (right, middle) if problem(blocks[:middle]) else (middle, wrong)
    why = problem(blocks[:wrong])
    return [refused(blocks[wrong - 1], f"did not verify when cut with others ({why})")]
