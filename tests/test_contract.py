"""The public contract, and what bad input must do: a clear error, and the user's model bit for bit as it was."""

from __future__ import annotations

import copy
import importlib
import json
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import depgraph
from depgraph.base import errors
from depgraph.costs.memory import measure_memory
from depgraph.tracing.wrappers import copied
from depgraph.verify.weights import WHOLE

# --------------------------------------------------------------------------------------------- small networks


class Residual(nn.Module):
    """stem -> two blocks with residual sums -> pooled linear head; the stream is 32 wide, the blocks 48 and 20."""

    def __init__(self, stream: int = 32, middle: int = 48, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stream, 3, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(stream, middle, 3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, stream, 3, padding=1),
        )
        self.second = nn.Sequential(nn.Conv2d(stream, 20, 1), nn.ReLU(), nn.Conv2d(20, stream, 1))
        self.head = nn.Linear(stream, classes)
        self.note = ("a tuple", 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.block(x))
        x = x + self.second(x)
        return self.head(x.mean(dim=(2, 3)))


class Tied(nn.Module):
    """A language model in miniature: the output layer shares the embedding's weight, [vocabulary 23, width 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 16)
        self.up = nn.Linear(16, 40)
        self.down = nn.Linear(40, 16)
        self.out = nn.Linear(16, 23, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.out(x + self.down(F.gelu(self.up(x))))


class Picky(Residual):
    """Refuses what it is given, in its own words."""

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("the moon is not full tonight")


@torch.library.custom_op("depgraph_contract::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    """An op that no library knows a rule for."""
    return x.clone()


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Mysterious(Residual):
    """The unknown op sits on the stream: it must freeze it, and only the block's middle can go."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + mystery(self.stem(x)).mean()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 9, 11, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    return torch.randint(23, (2, 5), generator=torch.Generator().manual_seed(1))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic drawn anew, so that no zero bias or unit variance can hide a wrong index."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point():
                value.copy_(0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
        for name, value in model.named_buffers():
            if name.endswith("running_var"):
                value.abs_().add_(0.5)
    return model


def residual(**widths: int) -> nn.Module:
    return randomised(Residual(**widths)).eval()


# ------------------------------------------------------------------------------------------- what is compared


def as_bytes(value: Tensor) -> bytes | None:
    """Raw memory, so that NaN equals NaN and 0.0 differs from -0.0. None on the meta device, which has no values."""
    if value.is_meta:
        return None
    return value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a pruner could leave changed, in a form that `==` compares exactly."""
    seen: dict[str, Any] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, value in tensors:
        seen[f"tensor {name}"] = (
            id(value),
            value.shape,
            value.stride(),
            value.dtype,
            value.device,
            value.requires_grad,
            value.grad is None,
            as_bytes(value),
        )
    seen["state"] = list(model.state_dict())
    for name, module in model.named_modules(remove_duplicate=False):
        seen[f"class {name}"] = type(module)
        seen[f"training {name}"] = module.training
        seen[f"hooks {name}"] = {kind: list(getattr(module, kind)) for kind in HOOKS}
        seen[f"children {name}"] = {key: id(child) for key, child in module.named_children()}
        seen[f"attributes {name}"] = {
            key: copy.deepcopy(value)
            for key, value in vars(module).items()
            if isinstance(value, (int, float, str, tuple, list, type(None))) and key not in HOOKS
        }
        seen[f"names {name}"] = sorted(vars(module))
        seen[f"forward {name}"] = getattr(module.forward, "__func__", module.forward)
    return seen


def masked(model: nn.Module, plan: depgraph.Plan) -> nn.Module:
    """The original with every removed entry of every parameter and buffer set to zero."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in twin.state_dict(keep_vars=True).items():
            mask = plan.mask(name)
            if not mask.all():
                value.mul_(mask)
    return twin


def assert_replays(pruned: nn.Module, original: nn.Module, plan: depgraph.Plan) -> None:
    """The contract of `mask`: what is left is the original's entries where the mask is True, in order."""
    left, before = pruned.state_dict(), original.state_dict()
    assert list(left) == list(before)
    for name, value in before.items():
        mask = plan.mask(name)
        assert mask.dtype == torch.bool, name
        assert mask.shape == value.shape, name
        torch.testing.assert_close(
            left[name].flatten(), value[mask], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_function(
    pruned: nn.Module, original: nn.Module, plan: depgraph.Plan, *inputs: Tensor
) -> None:
    """In float64: the pruned model computes what the masked original does. Holds without statistics over channels."""
    pruned, twin = copy.deepcopy(pruned).double().eval(), masked(original, plan).double().eval()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    with torch.no_grad():
        torch.testing.assert_close(pruned(*inputs), twin(*inputs), rtol=1e-9, atol=1e-9)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


# -------------------------------------------------------------------------------------------------- bad input


def with_value(name: str, value: float) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = residual()
        with torch.no_grad():
            model.get_parameter(name).flatten()[5] = value
        return model

    return build


def on_meta() -> nn.Module:
    return residual().to("meta")


def mysterious() -> nn.Module:
    return randomised(Mysterious()).eval()


def picky() -> nn.Module:
    return randomised(Picky()).eval()


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


# -------------------------------------------------------------------------------------------- prune: how much


def test_default_is_half_of_each_dim() -> None:
    model = residual()
    before = snapshot(model)
    result = depgraph.prune(model, images())
    assert snapshot(model) == before
    assert type(result.model) is Residual
    assert result.model is not model
    assert shapes(result.model) == {
        name: tuple({32: 16, 48: 24, 20: 10}.get(size, size) for size in shape)
        for name, shape in shapes(model).items()
    }
    assert result.model.stem.out_channels == 16
    assert result.model.block[1].num_features == 24
    assert result.model.head.in_features == 16
    assert_replays(result.model, model, result.plan)
    assert_same_function(result.model, model, result.plan, images(3))


@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_ratio(ratio: float) -> None:
    model = residual()
    result = depgraph.prune(model, images(), pruning_ratio=ratio)
    assert result.model.block[0].out_channels == round(48 * (1 - ratio))
    assert result.model.stem.out_channels == round(32 * (1 - ratio))
    assert_same_function(result.model, model, result.plan, images(3))


def test_l1_keeps_the_large() -> None:
    """The units whose weights were made tiny everywhere are the ones that go."""
    model = residual()
    small = torch.arange(48) % 2 == 0
    with torch.no_grad():
        model.block[0].weight[small] *= 1e-3
        model.block[3].weight[:, small] *= 1e-3
        model.block[1].weight[small] *= 1e-3
        model.block[1].bias[small] *= 1e-3
    plan = depgraph.prune(model, images()).plan
    assert torch.equal(plan.mask("block.1.weight"), ~small)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_max_params_is_met_from_below(budget: float) -> None:
    model = residual()
    result = depgraph.prune(model, images(), max_params=budget)
    left = parameters(result.model) / parameters(model)
    assert budget - 0.04 <= left <= budget
    assert_replays(result.model, model, result.plan)
    assert_same_function(result.model, model, result.plan, images(3))


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_max_macs_is_met_from_below(budget: float) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images())
        return counter.get_total_flops()

    model = residual()
    result = depgraph.prune(model, images(), max_macs=budget)
    left = flops(result.model) / flops(model)
    assert budget - 0.04 <= left <= budget
    assert_same_function(result.model, model, result.plan, images(3))


def test_both_budgets_hold() -> None:
    model = residual()
    result = depgraph.prune(model, images(), max_params=0.6, max_macs=0.4)
    after = result.report.to_dict()
    assert parameters(result.model) <= 0.6 * parameters(model)
    assert "macs" in after


@pytest.mark.parametrize("multiple", [4, 8])
def test_round_to(multiple: int) -> None:
    model = residual(stream=40, middle=56)
    for options in ({"pruning_ratio": 0.4}, {"max_params": 0.5}):
        result = depgraph.prune(model, images(), round_to=multiple, **options)
        assert result.model.stem.out_channels % multiple == 0
        assert result.model.block[0].out_channels % multiple == 0
        assert parameters(result.model) < parameters(model)
        assert_same_function(result.model, model, result.plan, images(3))


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (("block.0",), {"block.0.weight"}),
        (("block.0.weight",), {"block.0.weight"}),
        (("block.1.bias",), {"block.1.bias", "block.1.weight", "block.1.running_mean"}),
        (("block.*",), {"block.0.weight", "block.1.weight", "block.3.weight", "stem.weight", "head.weight"}),
        (("block.?.bias", "stem"), {"stem.bias", "block.1.bias", "block.3.bias", "head.bias"}),
        (("head",), {"head.weight", "stem.bias", "second.2.bias"}),
    ],
    ids=["module", "parameter", "coupled", "glob", "glob and module", "through the sums"],
)
def test_ignore(names: tuple[str, ...], kept: set[str]) -> None:
    """What is ignored keeps its shape, and so does all that must agree with it."""
    model = residual()
    result = depgraph.prune(model, images(), ignore=names)
    for name in kept:
        assert result.plan.mask(name).all(), name
    assert parameters(result.model) < parameters(model)
    assert_same_function(result.model, model, result.plan, images(3))


def test_ignore_takes_one_name_too() -> None:
    result = depgraph.prune(residual(), images(), ignore="stem")
    assert result.model.stem.out_channels == 32
    assert result.model.block[0].out_channels == 24


# --------------------------------------------------------------------------------------- prune: its arguments


def test_inputs_as_tensor_tuple_and_dict() -> None:
    plans = [depgraph.prune(residual(), x).plan for x in (images(), (images(),), {"x": images()})]
    assert plans[0].to_json() == plans[1].to_json() == plans[2].to_json()


def test_inplace_returns_the_same_object() -> None:
    model, reference = residual(), residual()
    kept = model.head
    result = depgraph.prune(model, images(), inplace=True)
    assert result.model is model
    assert result.model.head is kept
    assert parameters(model) < parameters(reference)
    assert_replays(model, reference, result.plan)
    assert_same_function(model, reference, result.plan, images(3))


def test_inplace_and_copy_agree() -> None:
    one = depgraph.prune(residual(), images(), max_macs=0.5)
    two = depgraph.prune(residual(), images(), max_macs=0.5, inplace=True)
    assert one.plan.to_json() == two.plan.to_json()
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name]), name


def test_the_same_call_gives_the_same_plan() -> None:
    plans = {depgraph.prune(residual(), images(), max_macs=0.5).plan.to_json() for _ in range(2)}
    assert len(plans) == 1


def test_random_state_is_not_disturbed() -> None:
    model = residual()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    depgraph.prune(model, images())
    assert torch.equal(torch.rand(4), expected)


# ------------------------------------------------------------------------------------------------ plan, apply


def test_plan_json_round_trip() -> None:
    model = residual()
    plan = depgraph.prune(model, images(), max_macs=0.4).plan
    text = plan.to_json()
    assert isinstance(text, str)
    json.loads(text)
    again = depgraph.Plan.from_json(text)
    assert again.to_json() == text
    for name in model.state_dict():
        assert torch.equal(again.mask(name), plan.mask(name)), name


def test_apply_on_a_fresh_copy_is_the_result() -> None:
    model = residual()
    result = depgraph.prune(model, images(), max_macs=0.5)
    fresh = residual()
    before = snapshot(fresh)
    applied = depgraph.apply(fresh, depgraph.Plan.from_json(result.plan.to_json()))
    assert snapshot(fresh) == before
    assert type(applied) is type(model)
    assert list(applied.state_dict()) == list(result.model.state_dict())
    for name, value in applied.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name]), name
    assert torch.equal(applied(images(3)), result.model(images(3)))
    assert applied.block[0].out_channels == result.model.block[0].out_channels


def test_plan_replays_on_other_weights() -> None:
    """Lottery tickets: the plan of the trained model on the initial one."""
    plan = depgraph.prune(residual(), images()).plan
    initial = randomised(Residual(), seed=5).eval()
    ticket = depgraph.apply(initial, plan)
    assert_replays(ticket, initial, plan)
    assert_same_function(ticket, initial, plan, images(3))


def test_plan_replays_on_a_meta_model() -> None:
    result = depgraph.prune(residual(), images())
    small = depgraph.apply(on_meta(), result.plan)
    assert all(p.is_meta for p in small.parameters())
    assert shapes(small) == shapes(result.model)


def test_mask_of_an_unknown_name_is_an_error() -> None:
    plan = depgraph.prune(residual(), images()).plan
    with pytest.raises((errors.DepgraphError, KeyError), match="nobody"):
        plan.mask("nobody.weight")


# --------------------------------------------------------------------------------------- what the model keeps


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_hooks_still_run(inplace: bool) -> None:
    model = residual()
    calls: list[tuple[int, ...]] = []
    model.block[0].register_forward_hook(lambda _m, _x, y: calls.append(tuple(y.shape)))
    result = depgraph.prune(model, images(), inplace=inplace)
    calls.clear()
    result.model(images())
    assert calls == [(2, 24, 9, 11)]


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_requires_grad_is_kept(inplace: bool) -> None:
    model = residual()
    model.stem.requires_grad_(requires_grad=False)
    model.block[1].weight.requires_grad_(requires_grad=False)
    expected = {name: p.requires_grad for name, p in model.named_parameters()}
    result = depgraph.prune(model, images(), inplace=inplace)
    assert {name: p.requires_grad for name, p in result.model.named_parameters()} == expected
    result.model(images()).sum().backward()
    for name, p in result.model.named_parameters():
        assert (p.grad is not None) == expected[name], name
        assert isinstance(p, nn.Parameter)
        assert p.is_leaf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    model = residual().to(dtype)
    result = depgraph.prune(model, images().to(dtype))
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert result.model.block[1].num_batches_tracked.dtype == torch.int64
    assert result.model.block[0].out_channels == 24
    assert_replays(result.model, model, result.plan)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_training_flags_are_kept(training: bool) -> None:
    model = residual().train(training)
    model.block[1].eval()
    flags = [m.training for m in model.modules()]
    before = snapshot(model)
    result = depgraph.prune(model, images())
    assert [m.training for m in result.model.modules()] == flags
    assert snapshot(model) == before
    assert_same_function(result.model, model, result.plan, images(3))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(mode: Callable[[], Any]) -> None:
    model = residual()
    with mode():
        result = depgraph.prune(model, images())
    assert all(p.requires_grad for p in result.model.parameters())
    assert result.model.block[0].out_channels == 24


def test_frozen_model_is_pruned_all_the_same() -> None:
    model = residual().requires_grad_(requires_grad=False)
    result = depgraph.prune(model, images())
    assert not any(p.requires_grad for p in result.model.parameters())
    assert result.model.block[0].out_channels == 24


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_ties_are_kept(inplace: bool) -> None:
    model = randomised(Tied()).eval()
    reference = copy.deepcopy(model)
    result = depgraph.prune(model, tokens(), inplace=inplace)
    assert result.model.out.weight is result.model.embed.weight
    assert result.model.embed.weight.shape == (23, 8)
    assert result.model.up.weight.shape == (20, 8)
    assert len(list(result.model.parameters())) == len(list(reference.parameters()))
    assert_replays(result.model, reference, result.plan)
    assert_same_function(result.model, reference, result.plan, tokens())


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_parametrizations_are_kept(inplace: bool) -> None:
    model = residual()
    parametrizations.weight_norm(model.block[0])
    parametrizations.weight_norm(model.block[3])
    reference = copy.deepcopy(model)
    result = depgraph.prune(model, images(), inplace=inplace)
    assert parametrize.is_parametrized(result.model.block[0], "weight")
    assert result.model.block[0].weight.shape == (24, 16, 3, 3)
    assert list(result.model.state_dict()) == list(reference.state_dict())
    assert_replays(result.model, reference, result.plan)
    # Magnitudes are norms over the kept entries; the directions follow from them, so the smaller model trains on.
    result.model(images()).sum().backward()
    assert all(p.grad is not None for p in result.model.parameters())


def test_other_attributes_and_subclasses_are_kept() -> None:
    class Special(nn.Linear):
        pass

    model = residual()
    model.head = randomised(Special(32, 10))
    model.colour = "green"
    result = depgraph.prune(model, images())
    assert result.model.colour == "green"
    assert result.model.note == ("a tuple", 3)
    assert type(result.model.head) is Special
    assert type(result.model.head.weight) is nn.Parameter


def test_result_trains_and_copies_and_reloads() -> None:
    result = depgraph.prune(residual(), images())
    again = copy.deepcopy(result.model)
    again.load_state_dict(result.model.state_dict(), strict=True)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    again.train()(images()).square().mean().backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in again.parameters())
    assert all(p.is_contiguous() for p in again.parameters())


def test_a_result_can_be_pruned_again() -> None:
    first = depgraph.prune(residual(), images())
    second = depgraph.prune(first.model, images())
    assert second.model.block[0].out_channels == 12
    assert_same_function(second.model, first.model, second.plan, images(3))


# ----------------------------------------------------------------------------------------------------- report

KEYS = {"params", "macs", "reachable", "groups", "locks", "rewritten", "verification", "widths"}


def test_report_prints_and_is_data() -> None:
    result = depgraph.prune(residual(), images())
    text = str(result.report)
    assert f"{parameters(result.model):,}" in text or str(parameters(result.model)) in text
    data = result.report.to_dict()
    assert set(data) >= KEYS
    json.dumps(data)


def test_report_holds_the_figures() -> None:
    model = residual()
    result = depgraph.prune(model, images())
    data = result.report.to_dict()
    numbers = set(_numbers(data["params"]))
    assert {parameters(model), parameters(result.model)} <= numbers
    assert data["groups"]
    assert not data["rewritten"]
    assert "stem" in json.dumps(data["widths"])


def test_report_says_what_locks() -> None:
    """Silence is a defect: the output's and the input's dims are in the report, with a reason."""
    data = depgraph.prune(residual(), images(), ignore=("block.0",)).report.to_dict()
    locks = json.dumps(data["locks"])
    assert "ignore" in locks
    assert "output" in locks


def test_unverified_result_says_so() -> None:
    checked = depgraph.prune(residual(), images()).report.to_dict()["verification"]
    unchecked = depgraph.prune(residual(), images(), verify=False).report.to_dict()["verification"]
    assert checked != unchecked


def _numbers(data: Any) -> list[float]:
    if isinstance(data, Mapping):
        data = list(data.values())
    if isinstance(data, (list, tuple)):
        return [n for item in data for n in _numbers(item)]
    return [data] if isinstance(data, (int, float)) else []


# ---------------------------------------------------------------------------------------------------- analyze


def test_analyze_leaves_the_model_alone() -> None:
    model = residual().train()
    before = snapshot(model)
    depgraph.analyze(model, images())
    assert snapshot(model) == before


def test_groups_and_frozen() -> None:
    graph = depgraph.analyze(residual(), images())
    assert len(graph.groups) == 3  # the stream, and what is inside each block
    frozen = str(graph.frozen)
    assert graph.frozen
    assert "input" in frozen
    assert "output" in frozen


@pytest.mark.parametrize("indices", [[5], [2, 3, 31], np.array([0, 47]), torch.tensor([46, 1])])
def test_coupled(indices: Any) -> None:
    """Everything that must go with some channels of the block's middle, and nothing else."""
    model = residual()
    graph = depgraph.analyze(model, images())
    gone = torch.zeros(48, dtype=torch.bool)
    gone[torch.as_tensor(indices)] = True
    masks = graph.coupled("block.0.weight", 0, indices)
    touched = {name for name, mask in masks.items() if mask.any()}
    vectors = {f"block.1.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert touched == {"block.0.weight", "block.3.weight"} | vectors
    for name in touched:
        assert masks[name].shape == model.state_dict()[name].shape, name
        assert masks[name].dtype == torch.bool
    assert torch.equal(masks["block.0.weight"], gone.view(-1, 1, 1, 1).expand(48, 32, 3, 3))
    assert torch.equal(masks["block.3.weight"], gone.view(1, -1, 1, 1).expand(32, 48, 3, 3))
    for name in vectors:
        assert torch.equal(masks[name], gone), name


def test_coupled_agrees_from_every_member() -> None:
    graph = depgraph.analyze(residual(), images())
    starts = [
        ("stem.weight", 0),
        ("stem.bias", 0),
        ("block.0.weight", 1),
        ("block.3.weight", 0),
        ("head.weight", 1),
    ]
    answers = [graph.coupled(name, dim, [4, 9]) for name, dim in starts]
    assert {name for name, mask in answers[0].items() if mask.any()} == {
        "stem.weight",
        "stem.bias",
        "block.0.weight",
        "block.3.weight",
        "block.3.bias",
        "second.0.weight",
        "second.2.weight",
        "second.2.bias",
        "head.weight",
    }
    for answer in answers[1:]:
        assert answer.keys() == answers[0].keys()
        assert all(torch.equal(mask, answers[0][name]) for name, mask in answer.items())


@pytest.mark.parametrize(
    ("name", "dim", "indices", "text"),
    [
        ("nobody.weight", 0, [0], "nobody.weight"),
        ("stem.weight", 9, [0], "9"),
        ("stem.weight", 0, [32], "32"),
        ("stem.weight", 0, [-33], "32"),
    ],
)
def test_coupled_refuses_what_is_not_there(name: str, dim: int, indices: list[int], text: str) -> None:
    graph = depgraph.analyze(residual(), images())
    with pytest.raises(errors.DepgraphError, match=text):
        graph.coupled(name, dim, indices)


def test_coupled_refuses_frozen_dims_with_the_reason() -> None:
    graph = depgraph.analyze(residual(), images())
    with pytest.raises(errors.DepgraphError, match=r"head\.weight.*output|output.*head\.weight"):
        graph.coupled("head.weight", 0, [0])


def test_to_networkx() -> None:
    view = depgraph.analyze(residual(), images()).to_networkx()
    assert isinstance(view, nx.Graph)
    assert view.number_of_nodes() > 0
    assert view.number_of_edges() > 0
    text = " ".join(map(str, view.nodes(data=True)))
    assert "block.0.weight" in text


def test_analyze_needs_no_weights() -> None:
    """On the meta device: a model too large to build can be analysed all the same."""
    meta = depgraph.analyze(on_meta(), images().to("meta"))
    real = depgraph.analyze(residual(), images())
    assert len(meta.groups) == len(real.groups)


@pytest.mark.filterwarnings(
    "ignore::FutureWarning"
)  # torch.export warns about its own use of a deprecated name
@pytest.mark.parametrize("form", ["graph module", "exported program"])
def test_graph_modules_and_exported_programs_are_accepted(form: str) -> None:
    """Their literals stand in a graph, so they can always be rewritten."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = (
                nn.Conv2d(3, 12, 3, padding=1),
                nn.Conv2d(12, 12, 1),
                nn.Linear(12 * 20, 5),
            )

        def forward(self, x):
            x = self.a(x)
            return self.out((x + self.b(x)).relu().view(-1, 240))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 4, 5)
    given = torch.fx.symbolic_trace(model) if form == "graph module" else torch.export.export(model, (x,))
    result = depgraph.prune(given, x)
    assert result.report.verification.status == "equal"
    assert result.plan.new_shape("out.weight") == (5, 120)
    assert result.model(x).shape == (2, 5)


def test_what_does_not_verify_is_frozen_and_the_rest_is_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong rule (a gate whose halves are not tied) costs compression; the result is right all the same."""
    from depgraph.rules.registry import REGISTRY

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 14), nn.Linear(7, 11), nn.Linear(11, 3)

        def forward(self, x):
            return self.c(nn.functional.gelu(self.b(nn.functional.glu(self.a(x)))))

    def loose(site):
        x = site.dims(site.args[0])
        left, _ = site.algebra.cut(x[-1], 7)
        return [*x[:-1], left]

    torch.manual_seed(0)
    model, x = Gated().eval(), torch.randn(4, 5)
    monkeypatch.setitem(REGISTRY, "aten::glu", loose)
    result = depgraph.prune(model, x, importance=lambda g: torch.arange(g.units, dtype=torch.float64).flip(0))
    assert result.report.verification.status == "equal"
    assert result.plan.new_shape("c.weight") == (3, 6)
    assert any("stay whole" in note for note in result.report.notes)


class ComplexInPlace(nn.Module):
    """Turns the last 4 of 10 channels as complex numbers: a view of memory whose rows must then be even."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(5, 10), nn.Linear(10, 3)
        self.plain = 6

    def forward(self, x: Tensor) -> Tensor:
        still, turned = self.proj(x).split([self.plain, self.proj.out_features - self.plain], -1)
        pairs = torch.view_as_complex(turned.float().reshape(*x.shape[:-1], -1, 2)) * 1j
        return self.out(torch.cat([still, torch.view_as_real(pairs).flatten(-2).to(x.dtype)], -1))


def test_what_kernels_ask_of_strides_in_the_models_own_type_is_met() -> None:
    """In float64 the cast makes a copy, so that odd rows would only fail in float32: they must be noticed."""
    model, x = ComplexInPlace(), torch.randn(2, 7, 5)
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    assert result.report.verification.status == "equal"
    assert result.model.proj.out_features < 10
    result.model(x)


def test_blocks_that_only_fail_together_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cuts that verify alone and not together: the second stays whole."""
    module = importlib.import_module("depgraph.search")
    honest = module.verify_values

    def picky(model: nn.Module, small: nn.Module, plan: depgraph.Plan, inputs: Any) -> depgraph.Verification:
        if {"block.0.weight", "second.0.weight"} <= set(plan.cuts):
            raise errors.VerificationError("these two do not go together")
        return honest(model, small, plan, inputs)

    monkeypatch.setattr(module, "verify_values", picky)
    result = depgraph.prune(Residual(), torch.randn(2, 3, 8, 6), pruning_ratio=0.5)
    assert ("block.0.weight" in result.plan.cuts) != ("second.0.weight" in result.plan.cuts)


class Clipped(nn.Module):
    """Writes into its weights whenever it runs, through a view of one that it reads only later, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5, max_norm=0.5)
        self.up, self.middle, self.down = nn.Linear(5, 11), nn.Linear(11, 13), nn.Linear(13, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.up(self.embed(x)).tanh())
        self.down.weight.data.t().mul_(0.5)
        self.up.bias.detach().add_(1)
        return self.down(y.tanh())


@pytest.mark.parametrize("limit", [WHOLE, 0])
@pytest.mark.parametrize(("kind", "how"), [(torch.float32, "statistics"), (torch.float64, "statistics"),
                                          (torch.float32, "reconstruction")])  # fmt: skip
def test_weights_that_forward_writes_into_stay(
    limit: int, kind: torch.dtype, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["depgraph.verify.weights"], "WHOLE", limit)
    model, x = Clipped().to(kind).eval(), torch.arange(7)
    before = copy.deepcopy(model.state_dict())
    result = depgraph.prune(model, x, calibration=[x], importance="wanda", recover=how)
    _ = result.report.macs, measure_memory(model, x)
    assert result.report.parameters[1] < result.report.parameters[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
        kept = value[result.plan.mask(name)]
        if how == "statistics":  # there are none here
            assert torch.equal(result.model.state_dict()[name].flatten(), kept), f"the smaller {name}"
    model(x)
    assert all(not torch.equal(v, before[n]) for n, v in model.state_dict().items() if n in WRITTEN)


WRITTEN = ("embed.weight", "up.bias", "down.weight")


class Odd(nn.Module):
    """Attributes that a copy of a module tree has to get right."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(3, 5), nn.BatchNorm1d(5)
        self.same = [self.first, {"again": self.again, "weight": self.first.weight}]
        self.table = {"list": [1, (2, {3})], "names": {"b", "a"}, "empty": set()}
        self.shared = self.table
        self.order = OrderedDict(b=[1], a=self.table["list"])
        self.order.note = "kept"  # type: ignore[attr-defined]
        self.me = [self]


class WithSlots(nn.Module):
    """The copy protocol of modules forgets slots: copies are given them."""

    __slots__ = ("more",)

    def __init__(self) -> None:
        super().__init__()
        self.more = [1, 2]


class OwnState(nn.Module):
    """Says itself what it is copied from."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.layer = threading.Lock(), nn.Linear(3, 2)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


def test_copies_of_module_trees_are_what_deepcopy_makes() -> None:
    model = nn.Sequential(Odd(), WithSlots(), OwnState(), torch.fx.symbolic_trace(nn.Linear(3, 2)))
    made = copied(model, {})
    odd, own = made[0], model[0]
    assert odd is not own
    assert odd.me[0] is odd
    assert odd.same[0] is odd.first
    assert odd.same[1]["again"] is odd.again
    assert odd.same[1]["weight"] is odd.first.weight is not own.first.weight
    assert odd.shared is odd.table is not own.table
    assert odd.order["a"] is odd.table["list"]
    assert (odd.table, odd.order, odd.order.note) == (own.table, own.order, "kept")
    assert not any(odd.table[k] is own.table[k] for k in own.table)
    assert made[1].more == [1, 2]
    assert made[1].more is not model[1].more
    assert made[2].lock is not model[2].lock
    assert made[3](torch.ones(1, 3)).shape == (1, 2)
    for (path, new), (_, old) in zip(made.named_modules(), model.named_modules(), strict=True):
        slow = copy.deepcopy(old)
        assert type(new).__name__ == type(slow).__name__, path
        assert list(vars(new)) == list(vars(slow)), path
        for name, value in vars(old).items():
            assert not isinstance(value, dict | set) or vars(new)[name] is not value, (path, name)
    states = made.state_dict().values(), model.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
