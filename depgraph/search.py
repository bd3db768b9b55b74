"""Plan, apply, verify, and the one way back: what fails is frozen and everything is planned again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .axes import axes
from .axes.axes import Reason
from .base.errors import PlanError, VerificationError
from .config.origin import config_mismatches
from .grouping.build import build_plan
from .grouping.graph import DependencyGraph
from .importance import Scores
from .plan.plan import Masks, Plan
from .select import Block, Request
from .select.budgets import Targets
from .surgery.apply import apply
from .verify.verify import Verification
from .verify.verify import verify as verify_values


def settle(
    graph: DependencyGraph,
    example_inputs: Any,
    scores: Mapping[int, Scores],
    request: Request,
    targets: Targets,
    verify: bool,
    notes: list[str],
) -> tuple[nn.Module, Plan, Verification]:
    """Plan, apply and verify. What fails is frozen and everything is planned again: the one way back.

    Two things can fail: a comparison of sizes in the user's code that would come out differently, and the comparison
    with the masked original. The blocks that fail the latter by themselves are found by trying each alone, one that
    fails only together with others by bisection. Plans under budgets that are measured are made until one is settled on.
    """
    failed = 0
    while failed < 20:
        masks = targets.masks(graph, request, scores)
        if _freeze_flipped(graph, masks, notes):
            targets.restart()
            failed += 1
            continue
        plan = build_plan(graph, masks)
        small = apply(graph.model, plan)
        if not targets.settled(graph, masks, small):
            continue
        if request.uniform:
            described = apply(graph.model, build_plan(graph, masks, bold=verify))
            if _freeze_undescribed(graph, masks, described, notes):
                targets.restart()
                failed += 1
                continue
        proof = Verification("skipped", detail="verify=False")
        try:
            if verify:
                small, plan, proof = _proved(graph, masks, small, plan, example_inputs)
                proof = _by_group(graph, masks, proof)
            if not request.uniform or not _freeze_undescribed(graph, masks, small, notes):
                return small, plan, proof
            targets.restart()
            failed += 1
        except VerificationError as error:
            if not _freeze_wrong(graph, masks, request.blocks(graph, scores, masks), example_inputs, notes):
                raise VerificationError(f"{error}\n  nothing was changed or returned") from error
            targets.restart()
            failed += 1
    raise VerificationError("no plan keeps the comparisons of sizes in forward as they are")


def _proved(
    graph: DependencyGraph, masks: Masks, small: nn.Module, plan: Plan, example_inputs: Any
) -> tuple[nn.Module, Plan, Verification]:
    """The smaller model, verified, with as many repairs as verify.

    Numbers of a config that forward reads for purposes that are not seen follow the plan where the outputs allow it.
    """
    bold = build_plan(graph, masks, bold=True)
    if bold.repairs != plan.repairs:
        try:
            other = apply(graph.model, bold)
            return other, bold, verify_values(graph.model, other, bold, example_inputs)
        except (VerificationError, PlanError):  # forward computes with them: they stay
            pass
    return small, plan, verify_values(graph.model, small, plan, example_inputs)


def _by_group(graph: DependencyGraph, masks: Masks, proof: Verification) -> Verification:
    """`proof`, in which groups are unproved, not tensors: those of whose tensors none moves an output."""
    unmoved = set(proof.unproved)
    known = {n for n, _ in graph.model.named_parameters()} & graph.tensors.keys()
    names = [
        g.name
        for g in graph.groups
        if id(g.axis) in masks and (own := {m.name for m in g.members} & known) and own <= unmoved
    ]
    return replace(proof, unproved=tuple(names))


def _freeze_undescribed(graph: DependencyGraph, masks: Masks, small: nn.Module, notes: list[str]) -> bool:
    """Freeze the axes that `masks` cut in parameters which no config can say; whether there were any.

    A number that no config can say (a scale, say, computed from a width) stands for the parameters of its module.
    """
    names = config_mismatches(small, graph.origins)
    owners = tuple(n.rpartition(".")[0] + "." for n in names if n not in graph.tensors)
    found = [n for n in graph.trace.tensors if n in names or n.startswith(owners)]
    dims = [axis for n in found for axis in graph.dims(n) if axis is not None]
    cut = {id(a): a for axis in dims for a in axes.atoms(axis) if id(a) in masks}
    if cut:
        graph.freeze(cut.values(), Reason("has a size that what the model was built from can't say"))
        notes.append(
            f"{', '.join(names[:3])} stay whole: what the model was built from can't say their new sizes"
        )
    return bool(cut)


def flipped(graph: DependencyGraph, masks: Masks) -> list[tuple[set[int], str]]:
    """The comparisons of sizes in forward that `masks` would change: ids of the axes in each, and how it comes out."""
    counts = {id(a): int(masks[id(a)].sum()) if id(a) in masks else a.size for a in graph.sizes.free.values()}
    return graph.sizes.flipped(counts)


def _freeze_flipped(graph: DependencyGraph, masks: Masks, notes: list[str]) -> bool:
    """Freeze the axes of comparisons in forward that `masks` would change; whether there were any."""
    found = flipped(graph, masks)
    for atoms, text in found:
        reason = Reason(f"enters a comparison in forward that would change ({text})")
        graph.freeze([graph.sizes.free[a] for a in atoms], reason)
        notes.append(f"some axes stay whole: a comparison of sizes in forward would have come out as {text}")
    return bool(found)


def _freeze_wrong(
    graph: DependencyGraph, masks: Masks, blocks: Sequence[Block], example_inputs: Any, notes: list[str]
) -> bool:
    """Freeze the blocks that do not verify when cut alone, or else the first that does not with those before it."""

    def problem(cut: Sequence[Block]) -> str:
        plan = build_plan(graph, {a: masks[a] for block in cut for a in block.gone if a in masks})
        try:
            if plan.cuts:
                verify_values(graph.model, apply(graph.model, plan), plan, example_inputs)
        except (VerificationError, PlanError) as error:
            return str(error)
        return ""

    def freeze(block: Block, why: str) -> None:
        names = ", ".join(g.name for g in block.groups[:3])
        graph.freeze([g.axis for g in block.groups], Reason(why))
        notes.append(f"{names} stay whole: the result would not have equalled the masked original")

    alone = [(block, why) for block in blocks if (why := problem([block]))]
    for block, why in alone:
        freeze(block, f"did not verify when cut alone ({why})")
    if not alone and len(blocks) > 1:
        right, wrong = 1, len(blocks)  # so many of the first blocks verify together; so many don't
        while wrong - right > 1:
            middle = (right + wrong) // 2
            right, wrong = (right, middle) if problem(blocks[:middle]) else (middle, wrong)
        alone = [(blocks[wrong - 1], problem(blocks[:wrong]))]
        freeze(alone[0][0], f"did not verify when cut with others ({alone[0][1]})")
    return bool(alone)
