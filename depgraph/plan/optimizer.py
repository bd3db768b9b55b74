"""Plan, optimizer -> the same optimizer on the smaller model: its momentum is cut like the parameters it belongs to."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..base.checks import a_module, of_kind
from ..base.errors import InputError, PlanError
from ..tracing.tensors import named_tensors
from .names import fitted
from .plan import Cut, Plan

State = dict[Any, Any]


def apply_to_optimizer(
    plan: Plan, optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module
) -> torch.optim.Optimizer:
    """Let `optimizer` continue with `small` where it was with `model`.

    Its parameter groups then hold the parameters of `small`, in the same order and with the same options; those of removed
    modules are gone, and a bias that the plan adds stands behind its weight. Of its state,
    every tensor of the shape of its parameter (momentum, ``exp_avg``, ``exp_avg_sq`` ...) is cut as the plan cuts the
    parameter, also one that has size 1 along some dims (factored second moments); what belongs to no entry (step counts)
    is copied. State that is spread over processes (DTensors) is gathered, cut and spread as the smaller parameter is, one tensor
    after the other, by all of them together. The object stays the same, so schedulers and a ``GradScaler`` that know it continue too. Gradients are not
    carried: call this between a step and the next backward pass. An average of weights is cut like any model:
    ``averaged.module = depgraph.apply(averaged.module, plan)``.

    Args:
        plan: from `model` to `small`.
        optimizer: over parameters of `model`; parameters that `model` does not have (of a loss, say) stay in it.
        model: the original.
        small: what `apply` or `prune` made of it by `plan`, with any weights.

    Returns:
        `optimizer` itself.

    Raises:
        InputError: the optimizer has no parameter of `model`, or a state that can't be cut entry by entry (L-BFGS).
        PlanError: `small` does not have the shapes of the plan. In either case nothing was changed.
    """
    of_kind("plan", plan, Plan, "a depgraph.Plan")
    of_kind("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
    a_module("model", model)
    a_module("small", small)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError(
            "L-BFGS can't be carried over: its history is one vector of all parameters, without the curvature between kept "
            "and removed entries\n  fix: make a new torch.optim.LBFGS(small.parameters())"
        )
    if model is small:
        raise InputError(
            "model and small are the same object: with inplace=True the parameters that the optimizer has no longer exist\n"
            "  fix: prune or apply with inplace=False"
        )
    plan = fitted(plan, model)
    old, (new, aliases) = named_tensors(model)[0], named_tensors(small)
    name_of = {id(t): n for n, t in old.items()}
    known = [id(p) in name_of for group in optimizer.param_groups for p in group["params"]]
    if not any(known):
        raise InputError(
            "the optimizer has no parameter of this model: pass the model that the optimizer was made for\n"
            "  fix: apply_to_optimizer(plan, optimizer, model=the original, small=the pruned one); where the model is sharded by "
            "fully_shard and has run forward, call model.reshard() before"
        )

    moves = plan.moves

    def stays(parameter: torch.Tensor) -> bool:
        return not moves.holds(name_of.get(id(parameter), ""))

    def stand_in(parameter: torch.Tensor) -> torch.Tensor:
        name = name_of.get(id(parameter))
        if name is None:
            return parameter
        now = moves.new(name)
        found = new.get(aliases.get(now, now))
        if found is None or tuple(found.shape) != plan.new_shape(name):
            raise PlanError(
                f"{name!r} has shape {'none' if found is None else tuple(found.shape)} in the smaller model, "
                f"{plan.new_shape(name)} by the plan"
            )
        return found

    added = {bias.weight: moves.new(bias.name) for bias in plan.biases if not moves.holds(bias.weight)}
    if missing := [name for name in added.values() if name not in new]:
        raise PlanError(f"{missing[0]!r}, which the plan adds, is not in the smaller model")

    def stand_ins(parameter: torch.Tensor) -> list[torch.Tensor]:
        bias = added.get(name_of.get(id(parameter), ""))
        return [stand_in(parameter)] if bias is None else [stand_in(parameter), new[bias]]

    groups = [
        [n for p in group["params"] if stays(p) for n in stand_ins(p)] for group in optimizer.param_groups
    ]
    state: defaultdict[torch.Tensor, State] = defaultdict(dict)
    for parameter, entries in optimizer.state.items():
        name = name_of.get(id(parameter))
        if name is None:
            state[parameter] = entries
            continue
        if not stays(parameter):
            continue
        cut = plan.cuts.get(plan.aliases.get(name, name))
        where = f"{type(optimizer).__name__}, {name}"
        small_one = stand_in(parameter)
        state[small_one] = {
            key: _spread(_carried(_whole(value), tuple(parameter.shape), cut, f"{where}: {key!r}"), small_one)
            for key, value in entries.items()
        }
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = parameters
    optimizer.state = state
    return optimizer


def _whole(value: Any) -> Any:
    """All of a tensor, also of one that is spread over processes."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _spread(value: Any, parameter: Any) -> Any:
    """State of the shape of its `parameter`, spread as that is; everything else as it is."""
    if not (isinstance(value, torch.Tensor) and hasattr(parameter, "full_tensor")):
        return value
    if value.shape != parameter.shape or not value.dim():
        return value
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415  it takes long to import

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _carried(value: Any, shape: tuple[int, ...], cut: Cut | None, where: str) -> Any:
    """One entry of the state of a parameter of `shape`, cut or copied."""
    if not isinstance(value, torch.Tensor):
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise InputError(
            f"{where} is a {type(value).__name__}, which can't be cut entry by entry: make a new optimizer for the "
            "smaller model"
        )
    if tuple(value.shape) == shape:
        return value.clone() if cut is None else _fresh(cut.slice(value), value)
    if value.numel() == 1:
        return value.clone()
    sides = len(shape) - value.dim()
    if sides == 0 and all(n in (1, full) for n, full in zip(value.shape, shape, strict=True)):
        return value.clone() if cut is None else _fresh(_along(cut, value, where), value)
    raise InputError(
        f"{where} has shape {tuple(value.shape)} for a parameter of shape {shape}, so it can't be cut like that: make a "
        "new optimizer for the smaller model"
    )


def _along(cut: Cut, value: torch.Tensor, where: str) -> torch.Tensor:
    """The kept entries of a tensor that has size 1 along some dims of the one that is cut."""
    if cut.blocks is not None:
        raise InputError(f"{where} is shared by groups that keep different channels: make a new optimizer")
    keep = tuple(None if n == 1 else k for n, k in zip(value.shape, cut.keep, strict=True))
    return replace(cut, shape=tuple(value.shape), keep=keep).slice(value)


def _fresh(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """`part`, in memory of its own."""
    return part.clone() if part.data_ptr() == whole.data_ptr() else part
