"""Runs of a model that only count: on fake tensors, without memory and arithmetic, where that goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from ..base.errors import DepgraphError, TraceError, could_not_run
from ..base.inputs import Arguments, each_example
from ..base.running import WriteGuardMode
from ..base.switches import eagerly, quiet_fakes, same_random_state
from ..base.values import map_tensors, tensor_leaves
from ..tracing.caches import nothing_kept
from ..tracing.fakes import Fakes
from ..tracing.tensors import is_elsewhere, named_tensors, skeleton

Found = TypeVar("Found")


def on_stand_ins(
    model: nn.Module,
    example_inputs: Any,
    count: Callable[[nn.Module, list[Arguments]], Found],
    cheap: bool = False,
) -> Found:
    """``count(twin, examples)`` on a copy of `model` in eval mode with fake tensors.

    On real ones where the path through the model depends on data, or where a run is `cheap`: the first fake tensors of a
    process cost seconds of imports. In grad mode where forward itself computes a gradient.
    """
    tensors = list(named_tensors(model)[0].values())
    failure: Exception | None = None
    given = each_example(example_inputs)
    cheap = cheap and not is_elsewhere(tensors, tensor_leaves(given))
    for fake, grad in (
        ((False, False), (False, True)) if cheap else ((True, False), (False, False), (False, True))
    ):
        mode: Any = Fakes() if fake else WriteGuardMode(tensors)
        stand_ins = (
            mode.stand_ins(tensors, tensor_leaves(given)) if fake else {id(t): t.detach() for t in tensors}
        )
        twin = skeleton(model, stand_ins).eval().requires_grad_(False)
        if grad:
            for own, copy in zip(model.parameters(), twin.parameters(), strict=True):
                copy.requires_grad_(own.requires_grad)
        examples = map_tensors(given, mode.given if fake else torch.clone)
        try:
            with (
                same_random_state(),
                nothing_kept(model),
                quiet_fakes(),
                mode,
                torch.set_grad_enabled(grad),
                eagerly(),
            ):
                return count(twin, examples)
        except DepgraphError:
            raise
        except Exception as error:  # noqa: BLE001  any failure of the user's model means: try the next way to run it
            failure = error if failure is None or not grad else failure
    raise TraceError(could_not_run(failure)) from failure
