"""Every exception that depgraph raises on purpose."""

from __future__ import annotations


class DepgraphError(Exception):
    """Base of all errors raised by depgraph. The user's model is as it was when one is raised."""


class InputError(DepgraphError):
    """An argument is missing, contradictory or unusable (a ratio out of range, an unknown name, NaN weights)."""


class TraceError(DepgraphError):
    """The model could not be run on the example inputs; the model's own error is chained to this one."""


class UnknownOpError(DepgraphError):
    """With ``strict=True``: an op has no rule, so its axes could not be followed."""


class NothingToPruneError(DepgraphError):
    """Every axis is frozen; the message lists the largest reasons."""


class BudgetError(DepgraphError):
    """The budget lies below what floors, constraints and frozen axes allow; the message says what can be reached."""


class PlanError(DepgraphError):
    """The plan does not fit the model it is applied to; the message lists every difference."""


class VerificationError(DepgraphError):
    """The smaller model does not compute what the masked original computes. Nothing was returned or changed."""
