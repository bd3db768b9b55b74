"""Lottery tickets: the plan found on trained weights, applied to the weights of before."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..base.checks import a_module, of_kind
from ..base.errors import PlanError, listed
from ..plan.names import fitted, names_in
from ..plan.plan import Plan
from ..surgery.zeros import entries_of, keep_zeros, merged, zeroed
from ..tracing.tensors import named_tensors, skeleton
from ..tracing.wrappers import wrapped


def rewind(plan: Plan, initial: nn.Module | Mapping[str, torch.Tensor], model: nn.Module) -> nn.Module:
    """The pruned model with the kept entries of earlier weights, to be trained again.

    Source: Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019; early instead of initial weights: Frankle et
    al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020.

    Args:
        plan: from the original to `model`.
        initial: the original before training, or its ``state_dict()``. Buffers in it (running statistics) go back, too.
        model: the pruned model. It is not touched.

    Returns:
        a copy of `model` with those values, in its types and on its devices. Buffers that a state dict lacks stay.

    Raises:
        PlanError: `initial` lacks a parameter or has one of another shape, or `model` is not what the plan makes.
    """
    of_kind("plan", plan, Plan, "a depgraph.Plan")
    of_kind("initial", initial, (nn.Module, Mapping), "a model or a state dict")
    a_module("model", model)
    plan, (tensors, ties) = fitted(plan, model), named_tensors(model)
    name_of = names_in(model, [*tensors, *ties])  # of weights from before the model was wrapped, too
    early_ones = named_tensors(initial)[0] if isinstance(initial, nn.Module) else initial
    renamed = {name_of(n): t for n, t in early_ones.items() if isinstance(t, torch.Tensor)}
    found = {plan.aliases.get(n, n): t for n, t in renamed.items()}
    required = {n for n, t in tensors.items() if isinstance(t, nn.Parameter)}
    entries = {**merged({}, plan), **entries_of(model)}
    problems, new = [], {}
    moves = plan.moves
    for new_name, now in tensors.items():
        name = moves.old(new_name)
        early = found.get(name)
        if early is None:
            if new_name in required:
                problems.append(f"{name!r} is not among the initial weights")
            continue
        shape, cut = plan.shapes.get(name), plan.cuts.get(name)
        if shape != tuple(early.shape):
            problems.append(f"{name!r} had the initial shape {tuple(early.shape)}, the plan is for {shape}")
        elif plan.new_shape(name) != tuple(now.shape):
            problems.append(f"{name!r} has shape {tuple(now.shape)}, the plan makes {plan.new_shape(name)}")
        else:
            kept = early.detach() if cut is None else cut.slice(early.detach())
            kept = zeroed(kept, entries.get(name))
            value = kept.to(now.device, now.dtype, copy=True)
            new[id(now)] = nn.Parameter(value, now.requires_grad) if new_name in required else value
    if problems:
        raise PlanError(listed("these weights can't be rewound to", problems))
    made = skeleton(model, new)
    if entries:
        keep_zeros(made, entries)
    return wrapped(made)
