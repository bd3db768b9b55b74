"""Ways to prune a case to its budget: depgraph's recipes and Torch-Pruning's criteria, called alike."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

import depgraph
from benchmarks.real.case import Case, run
from depgraph.importance import Random

OTHER = "Torch-Pruning"
BISECTIONS = 10
TOLERANCE = 0.01
"""Torch-Pruning's ratio is bisected until the cost is at most the budget and at most this much below it."""


@dataclass(frozen=True)
class Method:
    """A named way to prune.

    Attributes:
        tool: "depgraph" or "Torch-Pruning".
        name: of the criterion and what goes with it.
        options: keyword arguments of ``depgraph.prune``, or of Torch-Pruning's pruner.
        data: whether it looks at calibration data.
        labels: whether it gets targets and a loss with them.
        rounds: how often it prunes, each time by the same share of what is left; each round starts from the recovered model before.
    """

    tool: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    data: bool = False
    labels: bool = True
    rounds: int = 1

    def __str__(self) -> str:
        return f"{self.tool}: {self.name}"


@dataclass(frozen=True)
class Pruned:
    """The smaller model and the seconds that making it took."""

    model: nn.Module
    seconds: float


RANDOM = Method("depgraph", "random", {"importance": "random"})
MAGNITUDE = Method("depgraph", "l1", {"importance": "l1"})
_RECOVERED: dict[str, Any] = {"recover": "auto"}
_DEFAULT: dict[str, Any] = {"importance": "auto"}
DEFAULTS = [
    Method("depgraph", "default", _DEFAULT | _RECOVERED, data=True),
    Method("depgraph", "default, without labels", _DEFAULT | _RECOVERED, data=True, labels=False),
    Method("depgraph", "default, without data", _DEFAULT),
    Method("depgraph", "default, synthetic data", _DEFAULT | {"recover": "synthetic"}),
]
"""What `depgraph.prune` does by itself with what it is given: the options only say so."""
PEERS = [
    Method(
        "depgraph",
        "FLAP's scores, compensation",
        {"importance": "flap", "recover": "compensation"},
        data=True,
    ),
    Method("depgraph", "Wanda's scores", {"importance": "wanda"}, data=True),
    Method("depgraph", "element-wise Taylor", {"importance": "taylor_entries"}, data=True),
    Method(
        "depgraph", "element-wise Taylor, recover", {"importance": "taylor_entries"} | _RECOVERED, data=True
    ),
    Method(
        "depgraph",
        "Taylor squared, per cost, recover",
        {"importance": "taylor_squared", "per_cost": True} | _RECOVERED,
        data=True,
    ),
]
"""Criteria of others, on the same units and budget as depgraph's own."""
RECIPES = [
    Method(
        "depgraph", "OBS, global, recover", {"importance": "obs", "scope": "global"} | _RECOVERED, data=True
    ),
    Method(
        "depgraph", "OBS, local, recover", {"importance": "obs", "scope": "local"} | _RECOVERED, data=True
    ),
    Method("depgraph", "L2, local, recover", {"importance": "l2", "scope": "local"} | _RECOVERED, data=True),
    Method(
        "depgraph",
        "L2, local, eights, recover",
        {"importance": "l2", "scope": "local", "round_to": 8} | _RECOVERED,
        data=True,
    ),
]
"""Generic recipes: arguments to ``depgraph.prune``, the same for every model."""
WIDTHS = Method(
    "depgraph",
    "OBS, global, widths, recover",
    {"importance": "obs", "scope": "global", "granularity": "fine"} | _RECOVERED,
    data=True,
)


def recipes(case: Case) -> list[Method]:
    """The default calls, `RECIPES` and `PEERS`; where there may be heads, also the one that cuts widths inside them."""
    own = [*DEFAULTS, *RECIPES, *PEERS]
    return own if case.image else [*own, WIDTHS]


def rivals(case: Case) -> list[Method]:
    """Torch-Pruning's criteria in the scopes that its examples use: each layer by itself, all together, isomorphic."""
    together, isomorphic = {"global_pruning": True}, {"global_pruning": True, "isomorphic": True}
    magnitude = {"importance": "GroupMagnitudeImportance"}
    taylor = {"importance": "GroupTaylorImportance"}
    found = [
        Method(OTHER, "magnitude L2, local", magnitude),
        Method(OTHER, "magnitude L2, isomorphic", magnitude | isomorphic),
        Method(OTHER, "Taylor, local", taylor, data=True),
        Method(OTHER, "Taylor, isomorphic", taylor | isomorphic, data=True),
    ]
    if case.image:
        found += [
            Method(OTHER, "LAMP, global", {"importance": "LAMPImportance"} | together),
            Method(OTHER, "FPGM, local", {"importance": "FPGMImportance"}),
            Method(OTHER, "batch-norm scale, global", {"importance": "BNScaleImportance"} | together),
        ]
    return found


def prune(method: Method, case: Case, seed: int) -> Pruned:
    """The dense model of the case, pruned to its budget; random draws and calibration data follow from the seed."""
    model = case.build()
    if method.options["importance"] == "random":
        method = replace(method, options=method.options | {"importance": Random(seed)})
    batches = case.calibration(seed) if method.data else []
    started = time.perf_counter()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        small = (_depgraph if method.tool == "depgraph" else _torch_pruning)(method, case, model, batches)
    return Pruned(small.eval(), time.perf_counter() - started)


def _depgraph(method: Method, case: Case, model: nn.Module, batches: list[Any]) -> nn.Module:
    options = dict(method.options)
    if method.data and method.labels:
        options |= {"calibration": batches, "loss": case.loss}
    elif method.data:
        options["calibration"] = [inputs for inputs, _ in batches]
    small, whole = model, case.budget.cost(model, case.example())
    for i in range(method.rounds):
        budget = replace(case.budget, share=case.budget.share ** ((i + 1) / method.rounds)).arguments(model)
        if "max_macs" in budget:
            budget["max_macs"] = int(budget["max_macs"] * whole)
        small = depgraph.prune(small, case.example(), progress=False, **budget, **options).model
    return small


def _torch_pruning(method: Method, case: Case, model: nn.Module, batches: list[Any]) -> nn.Module:
    """Torch-Pruning at the ratio whose result comes closest to the budget from below."""
    target = case.budget.share * case.budget.cost(model, case.example())
    gradients = (
        _gradients(model, case.loss, batches)
        if method.options["importance"] == "GroupTaylorImportance"
        else {}
    )
    low, high, best = 0.0, 1.0, None
    ratio = 1 - case.budget.share if case.budget.what == "params" else 1 - case.budget.share**0.5
    for _ in range(BISECTIONS):
        small = _at_ratio(method, case, model, gradients, ratio)
        cost = case.budget.cost(small, case.example())
        if cost <= target:
            best, high = small, ratio
            if cost >= (1 - TOLERANCE) * target:
                break
        else:
            low = ratio
        ratio = (low + high) / 2
    if best is None:
        raise RuntimeError(f"{method}: no ratio was found that meets the budget")
    return best


def _at_ratio(
    method: Method,
    case: Case,
    model: nn.Module,
    gradients: dict[str, torch.Tensor],
    ratio: float,
) -> nn.Module:
    import torch_pruning as tp

    small = copy.deepcopy(model)
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(True)
        parameter.grad = gradients[name].clone() if name in gradients else None
    options = dict(method.options)
    importance = getattr(tp.importance, options.pop("importance"))(**options.pop("with", {}))
    arguments = {**case.hints.arguments(small), **options}
    if "num_heads" in arguments:
        arguments["head_pruning_ratio"] = ratio
    example = case.example()
    pruner = tp.pruner.BasePruner(small, example, importance=importance, pruning_ratio=ratio, **arguments)
    pruner.step()
    case.hints.repair(small, pruner)
    for parameter in small.parameters():
        parameter.grad = None
    return small


def _gradients(
    model: nn.Module, loss: Callable[[Any, Any], torch.Tensor], batches: list[Any]
) -> dict[str, torch.Tensor]:
    """Gradients of the summed loss over the calibration batches, in eval mode, by parameter name."""
    total: dict[str, torch.Tensor] = {}
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for inputs, target in batches:
        value = loss(run(model, inputs), target)
        for (name, _), gradient in zip(
            parameters.items(),
            torch.autograd.grad(value, list(parameters.values()), allow_unused=True),
            strict=True,
        ):
            if gradient is not None:
                total[name] = total[name] + gradient if name in total else gradient
    return total


@torch.no_grad()
def renorm(model: nn.Module, batches: list[Any]) -> bool:
    """Give each batch norm the statistics of calibration data, as anybody may after pruning; whether there are any."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    for inputs, _ in batches if norms else []:
        run(model, inputs)
    model.eval()
    return bool(norms)
