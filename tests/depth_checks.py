"""The oracle for models from which branches were removed: the original, with what the branches put out replaced by zeros.

Beside `plan.mask` it reads from the plan which modules yield zeros, and the new names of tensors; nothing of how they were found.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from checks import as_float64, in_float64
from oracle import (
    assert_runs_in_both_modes,
    call,
    expected_output,
    is_inexact,
    mark_live_,
    output_tensors,
)
from torch import Tensor, nn

import depgraph


class Kept:
    """The masks of a plan, but for removed modules, whose weights are as they were: their outputs are replaced."""

    def __init__(self, plan: depgraph.Plan):
        self.plan = plan

    def mask(self, name: str) -> Tensor:
        mask = self.plan.mask(name)
        return mask if self.plan.new_name(name) is not None else torch.ones_like(mask)


def silenced(model: nn.Module, plan: depgraph.Plan) -> nn.Module:
    """A copy of `model` whose removed branches put out zeros; they are alive, so they take nothing from the stream."""
    model = copy.deepcopy(model)

    def hook(returns: tuple[int, int] | None) -> Any:
        def zeros(module: nn.Module, args: Any, out: Any) -> Any:
            if returns is None:
                return mark_live_(torch.zeros_like(out))
            return tuple(mark_live_(torch.zeros_like(t)) if i == returns[1] else t for i, t in enumerate(out))

        return zeros

    for removal in plan.removals:
        if removal.leaves in ("zeros", "zero"):
            model.get_submodule(removal.path).register_forward_hook(hook(removal.returns))
    return model


def check_state(original: nn.Module, small: nn.Module, plan: depgraph.Plan) -> None:
    """Every entry of the smaller model is the original's kept entry; what went has no entry kept."""
    before, after = original.state_dict(), small.state_dict()
    names = {plan.new_name(n): n for n in before if plan.new_name(n) is not None}
    assert set(names) == set(after), f"names: {sorted(set(names) ^ set(after))}"
    for name, old in names.items():
        kept = before[old][plan.mask(old)]
        assert after[name].numel() == kept.numel(), name
        assert not is_inexact(kept) or torch.equal(after[name].flatten(), kept), name
    assert not any(bool(plan.mask(n).any()) for n in before if plan.new_name(n) is None)


def check_depth(original: nn.Module, result: Any, inputs: Any, tol: float = 1e-9) -> None:
    """State, and values in float64, against the original whose removed branches put out zeros."""
    plan = depgraph.Plan.from_json(result.plan.to_json())
    check_state(original, result.model, plan)
    wide, small, given = in_float64(original), in_float64(result.model), as_float64(inputs)
    expected = output_tensors(expected_output(silenced(wide, plan), Kept(plan), given))
    with torch.no_grad():
        actual = output_tensors(call(copy.deepcopy(small), given))
    assert [t.shape for t in actual] == [t.shape for t in expected]
    for a, e in zip(actual, expected, strict=True):
        gap = float((a - e).abs().max() / (1 + e.abs().max())) if e.numel() and is_inexact(e) else 0.0
        assert gap <= tol, f"off by {gap:.2e}"
    assert_runs_in_both_modes(small, given, wide)
    replayed = depgraph.apply(original, plan)
    assert all(
        torch.equal(a.isnan(), b.isnan())
        for a, b in zip(replayed.parameters(), result.model.parameters(), strict=True)
    )


def random_depth(seed: int, total: int) -> dict[str, Any]:
    """Options of `prune`: how many of `total` branches stay, what ranks them, and perhaps a ratio for widths."""
    dice = random.Random(seed)
    depth = depgraph.Depth(
        keep=dice.randrange(total), by=dice.choice(("influence", "magnitude")), contiguous=dice.random() < 0.3
    )
    return {"depth": depth, "pruning_ratio": dice.choice((None, None, 0.3, 0.6))}
