"""What a user can hand in wrongly is refused and touches nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract_models import (
    Residual,
    Tied,
    images,
    mystery,
    on_meta,
    parameters,
    picky,
    randomised,
    residual,
    snapshot,
)
from torch import Tensor, nn

import depgraph
from depgraph.base import errors


class Mysterious(Residual):
    """The unknown op sits on the stream: it must freeze it, and only the block's middle can go."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + mystery(self.stem(x)).mean()


def with_value(name: str, value: float) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = residual()
        with torch.no_grad():
            model.get_parameter(name).flatten()[5] = value
        return model

    return build


def mysterious() -> nn.Module:
    return randomised(Mysterious()).eval()


def one_linear() -> nn.Module:
    """Its in-dim is the model's input and its out-dim the model's output: nothing in it may go."""
    return randomised(nn.Linear(7, 5)).eval()


Bad = tuple[Callable[[], nn.Module], Any, dict[str, Any], type[Exception], str]


BAD_INPUT: dict[str, Bad] = {
    # what the model is given
    "no inputs: None": (residual, None, {}, errors.InputError, "example.inputs"),
    "no inputs: empty tuple": (residual, (), {}, errors.InputError, "example.inputs"),
    "no inputs: empty dict": (residual, {}, {}, errors.InputError, "example.inputs"),
    "not a model": (lambda: residual().stem.weight, images(), {}, errors.InputError, "nn.Module|Parameter"),
    "inputs of another shape": (residual, torch.randn(2, 5, 9, 11), {}, errors.DepgraphError, "5"),
    "too many inputs": (residual, (images(), images()), {}, errors.DepgraphError, "positional argument"),
    "inputs by a wrong name": (residual, {"picture": images()}, {}, errors.DepgraphError, "picture"),
    "the model's own error": (picky, images(), {}, errors.DepgraphError, "the moon is not full tonight"),
    # how much
    "ratio 0": (residual, images(), {"pruning_ratio": 0.0}, errors.InputError, "pruning_ratio"),
    "ratio 1": (residual, images(), {"pruning_ratio": 1.0}, errors.InputError, "pruning_ratio"),
    "ratio negative": (residual, images(), {"pruning_ratio": -0.5}, errors.InputError, "pruning_ratio"),
    "ratio NaN": (residual, images(), {"pruning_ratio": float("nan")}, errors.InputError, "pruning_ratio"),
    "ratio as text": (residual, images(), {"pruning_ratio": "half"}, errors.InputError, "pruning_ratio"),
    "more MACs than there are": (residual, images(), {"max_macs": 1.5}, errors.DepgraphError, "max_macs"),
    "no MACs": (residual, images(), {"max_macs": 0.0}, errors.DepgraphError, "max_macs"),
    "parameters negative": (residual, images(), {"max_params": -0.5}, errors.DepgraphError, "max_params"),
    "ratio and budget": (
        residual,
        images(),
        {"pruning_ratio": 0.5, "max_params": 0.5},
        errors.InputError,
        "pruning_ratio.*max_params|max_params.*pruning_ratio",
    ),
    "parameters out of reach": (residual, images(), {"max_params": 1e-4}, errors.BudgetError, r"\d"),
    "MACs out of reach": (residual, images(), {"max_macs": 1e-4}, errors.BudgetError, r"\d"),
    "out of reach for what is ignored": (
        residual,
        images(),
        {"max_params": 0.5, "ignore": ("block.0",)},
        errors.BudgetError,
        r"\d",
    ),
    "round_to 0": (residual, images(), {"round_to": 0}, errors.InputError, "round_to"),
    # what
    "unknown name": (residual, images(), {"ignore": ("blocks.7",)}, errors.InputError, "blocks.7"),
    "unknown glob": (residual, images(), {"ignore": ("encoder.*",)}, errors.InputError, r"encoder\.\*"),
    "unknown importance": (
        residual,
        images(),
        {"importance": "charm"},
        errors.InputError,
        "charm.*l1|l1.*charm",
    ),
    "NaN weights": (
        with_value("block.0.weight", float("nan")),
        images(),
        {},
        errors.DepgraphError,
        "block.0.weight",
    ),
    "infinite weights": (
        with_value("head.weight", float("inf")),
        images(),
        {},
        errors.DepgraphError,
        "head.weight",
    ),
    "no weights": (on_meta, images().to("meta"), {}, errors.DepgraphError, "meta"),
    "nothing to prune": (one_linear, torch.randn(2, 7), {}, errors.NothingToPruneError, r"\w"),
    "all ignored": (residual, images(), {"ignore": ("*",)}, errors.NothingToPruneError, "ignore"),
    "unknown op, strict": (mysterious, images(), {"strict": True}, errors.UnknownOpError, "mystery"),
}


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_and_touches_nothing(case: str, inplace: bool) -> None:
    build, inputs, options, error, text = BAD_INPUT[case]
    model = build()
    before = snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=f"(?s){text}") as caught:
        depgraph.prune(model, inputs, inplace=inplace, **options)
    assert isinstance(caught.value, errors.DepgraphError)
    assert len(caught.value.args) == 1, "a second string slipped into the exception's arguments"
    if before is not None:
        assert snapshot(model) == before


def test_bad_input_leaves_a_model_in_use_as_it_was() -> None:
    """Train mode, hooks, gradients and a frozen layer: the states that a careless `eval()` or retrace would disturb."""
    model = residual().train()
    model.stem.requires_grad_(requires_grad=False)
    calls: list[str] = []
    model.block.register_forward_hook(lambda *_: calls.append("forward"))
    model(images()).sum().backward()
    calls.clear()
    before = snapshot(model)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for options in ({"max_params": 1e-4}, {"ignore": ("nobody",)}, {"max_macs": 1.5}):
        with pytest.raises(errors.DepgraphError):
            depgraph.prune(model, images(), inplace=True, **options)
    assert snapshot(model) == before
    for name, grad in grads.items():
        assert torch.equal(model.get_parameter(name).grad, grad)


def test_the_models_own_error_is_the_cause() -> None:
    with pytest.raises(errors.DepgraphError) as caught:
        depgraph.prune(picky(), images())
    chain, error = [], caught.value
    while error is not None:
        chain.append(type(error))
        error = error.__cause__
    assert ValueError in chain


def test_budget_error_says_what_can_be_reached() -> None:
    """The floor that the message names is a budget that works."""
    with pytest.raises(errors.BudgetError, match="max_params") as caught:
        depgraph.prune(residual(), images(), max_params=1e-4)
    found = re.search(r"([\d,]+) remain", str(caught.value))
    assert found, caught.value
    floor = int(found[1].replace(",", ""))
    assert parameters(depgraph.prune(residual(), images(), max_params=floor).model) <= floor
    with pytest.raises(errors.BudgetError):
        depgraph.prune(residual(), images(), max_params=floor - 1)


def test_plan_for_another_model_is_refused() -> None:
    plan = depgraph.prune(residual(), images()).plan
    for other in (residual(stream=24), Tied(), residual(classes=7)):
        before = snapshot(other)
        with pytest.raises(errors.PlanError, match=r"weight"):
            depgraph.apply(other, plan)
        assert snapshot(other) == before


def test_plan_is_not_applied_twice() -> None:
    result = depgraph.prune(residual(), images())
    with pytest.raises(errors.PlanError):
        depgraph.apply(result.model, result.plan)


@pytest.mark.parametrize("text", ["", "{}", "[1, 2]", '{"version": 999}'])
def test_broken_plan_text_is_refused(text: str) -> None:
    with pytest.raises(errors.PlanError):
        depgraph.Plan.from_json(text)


def test_unknown_names_are_reported_together() -> None:
    with pytest.raises(errors.InputError) as caught:
        depgraph.prune(residual(), images(), ignore=("nobody", "stem", "neither.weight"))
    assert "nobody" in str(caught.value)
    assert "neither.weight" in str(caught.value)


def test_unknown_op_freezes_and_is_reported() -> None:
    """Without `strict` the op costs compression only: the stream stays, the middle goes, the report says why."""
    model = mysterious()
    result = depgraph.prune(model, images())
    assert result.model.stem.out_channels == model.stem.out_channels
    assert result.model.block[0].out_channels == model.block[0].out_channels // 2
    assert "mystery" in json.dumps(result.report.to_dict(), default=str)


def test_errors_share_one_base() -> None:
    names = ("Trace", "Input", "Budget", "Plan", "UnknownOp", "Verification", "NothingToPrune")
    for name in names:
        error = getattr(errors, f"{name}Error")
        assert issubclass(error, depgraph.DepgraphError)
        assert error.__doc__
    assert issubclass(depgraph.DepgraphError, Exception)
