"""Every exception that depgraph raises on purpose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any


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
    """The budget lies below what floors, constraints and frozen axes allow; the message says what can be reached.

    Attributes:
        over: the least that can be reached, as a multiple of the budget, where that is known.
    """

    def __init__(self, text: str, over: float = float("inf")) -> None:
        """`text` is the message."""
        super().__init__(text)
        self.over = over


class PlanError(InputError):
    """The plan does not fit the model it is applied to; the message lists every difference."""


class StoreError(DepgraphError):
    """A folder can't be written, or what is in it can't be loaded; the message lists everything that is wrong."""


class VerificationError(DepgraphError):
    """The smaller model does not compute what the masked original computes. Nothing was returned or changed."""


def could_not_run(error: BaseException | None) -> str:
    """The text of a `TraceError`: `error` is what the model itself raised on the example inputs."""
    return (
        f"the model could not be run on the example inputs: {type(error).__name__}: {error}\n"
        "  fix: call model(*example_inputs) yourself first; pass a tuple for positional arguments, a dict for "
        "keyword arguments, on the model's device"
    )


def listed(title: str, problems: Sequence[str], most: int = 20) -> str:
    """A message: `title`, and a line for each problem; of more than `most` the number."""
    more = [f"  ... and {len(problems) - most} more"] if len(problems) > most else []
    return "\n".join([title, *(f"  - {p}" for p in problems[:most]), *more])


def suggestions(name: Any, known: Iterable[str], most: int = 8) -> str:
    """The names in `known`, those that are most like `name` first; of more than `most` the number."""
    names = list(known)
    close = likely(str(name), names)
    found = list(dict.fromkeys([*close, *names]))
    text = ", ".join(map(repr, found[:most])) or "none"
    return text + (f" ... ({len(found)} in all)" if len(found) > most else "")


def likely(name: str, known: Iterable[str]) -> list[str]:
    """What may have been meant by `name`, of the names in `known`: those that hold it first, then those spelt like it."""
    names = list(known)
    return [n for n in names if len(name) > 2 and name.lower() in n.lower()][:3] + get_close_matches(
        name, names
    )
