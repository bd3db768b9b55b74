"""Which plans have made a model out of the one that its owner's code builds."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from .plan import Plan

_plans: WeakKeyDictionary[nn.Module, tuple[Plan, ...]] = WeakKeyDictionary()


def plans_of(model: nn.Module) -> tuple[Plan, ...]:
    """The plans that were applied to get `model`, the first one first; () for a model that no plan is known of.

    A model is known by what it is, not by what it has: of a copy nothing is known.
    """
    return _plans.get(model, ())


def note(model: nn.Module, small: nn.Module, plan: Plan) -> None:
    """Remember that `plan` made `small` of `model`, as long as `small` is alive."""
    _plans[small] = (*plans_of(model), plan)
