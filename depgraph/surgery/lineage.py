"""Which plans have made a model out of the one that its owner's code builds."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from ..plan.names import renamed
from ..plan.plan import Plan
from ..tracing.wrappers import core, plain_names

_plans: WeakKeyDictionary[nn.Module, tuple[Plan, ...]] = WeakKeyDictionary()


def plans_of(model: nn.Module) -> tuple[Plan, ...]:
    """The plans that were applied to get `model`, the first one first; () for a model that no plan is known of.

    A model is known by what it is, not by what it has: of a copy nothing is known. Wrappers around it do not count, and the
    plans have the names without them.
    """
    return _plans.get(core(model), ())


def note(model: nn.Module, small: nn.Module, plan: Plan) -> None:
    """Remember that `plan`, which fits `model`, made `small` of it, as long as `small` is alive."""
    plain = plain_names(model)
    _plans[core(small)] = (*plans_of(model), plan if plain is str else renamed(plan, plain, plain))


def revise(model: nn.Module, small: nn.Module, plan: Plan) -> None:
    """The `plan` that made `small` of `model` says more than it did when that was noted; of a copy nothing is known still."""
    if plans_of(small):
        note(model, small, plan)


def same(model: nn.Module, other: nn.Module) -> None:
    """`model` is what `other` is, from now on: made by the same plans."""
    _plans[core(model)] = plans_of(other)
