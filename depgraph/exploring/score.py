"""Scores of a model: the number by which users judge what a pruning cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
from torch import nn

from ..errors import InputError

Score = Callable[[nn.Module], Any]  # a number; higher is better


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """`model` in train or eval mode; afterwards each module is in the mode it was in, also after an exception."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, before in modes:
            module.training = before


def score_of(score: Score, model: nn.Module) -> float:
    """What `score` says of `model`, which is in eval mode meanwhile.

    Args:
        score: ``score(model)`` -> a number (a float, or a tensor of one entry); higher is better: an accuracy, or the
            negative of a loss.
        model: handed to `score` as it is.

    Raises:
        InputError: `score` is no function, or gave no finite number.
    """
    if not callable(score):
        raise InputError(f"score must be a function from a model to a number, not {score!r}")
    with in_mode(model, False):
        given = score(model)
    try:
        value = float(given.detach() if isinstance(given, torch.Tensor) else given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"score must give a number, not {given!r}"[:300]) from error
    if not isfinite(value):
        raise InputError(f"score gave {value}: a finite number is needed")
    return value
