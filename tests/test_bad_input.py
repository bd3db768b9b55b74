"""Wrong values for every argument of every public call: refused with a `DepgraphError`, and the model is as it was."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import prune_and_check
from oracle import assert_untouched, snapshot
from torch import nn

import depgraph


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.norm(self.up(x))))


def of_seven(a, b, c, d, e, f, g):
    """A function of another number of arguments than any that depgraph calls."""


WRONG: dict[str, Any] = {
    "None": None, "5": 5, "'x'": "x", "''": "", "[None]": [None], "[]": [], "{}": {}, "{5: 5}": {5: 5}, "object()": object(), "nan": math.nan,
    "inf": math.inf, "-1": -1, "10**23": 10**23, "10**400": 10**400, "1.5": 1.5, "1e400GB": "1e400GB", "function": of_seven, "tensor": torch.ones(2),
    "type": int, "module": nn.ReLU(),
}  # fmt: skip

torch.manual_seed(0)
MODEL = Net().eval()
X = torch.randn(6, 4)
PAIRS = [(X, torch.zeros(6, dtype=torch.long))]
GRAPH = depgraph.analyze(MODEL, X)
SCORES = depgraph.scores_of(GRAPH)
RESULT = depgraph.prune(MODEL, X)


def fine(model: nn.Module) -> float:
    return 1.0


def good_arguments(call: Callable[..., Any], folder: Any) -> dict[str, Any]:
    """What `call` succeeds with: the least that it needs, on models of its own where it changes them."""
    model = copy.deepcopy(MODEL)
    graph = (
        depgraph.analyze(model, X)
        if call in (depgraph.scores_of, depgraph.build_plan, depgraph.choose)
        else None
    )
    student = copy.deepcopy(RESULT.model)
    return {
        depgraph.prune: {"model": model, "example_inputs": X},
        depgraph.analyze: {"model": model, "example_inputs": X},
        depgraph.scores_of: {"graph": graph},
        depgraph.choose: {"graph": graph, "scores": depgraph.scores_of(graph) if graph else None},
        depgraph.build_plan: {"graph": graph, "masks": {}},
        depgraph.apply: {"model": model, "plan": RESULT.plan},
        depgraph.verify: {"model": model, "small": RESULT.model, "plan": RESULT.plan, "example_inputs": X},
        depgraph.save: {"model_or_result": RESULT, "folder": folder / "saved"},
        depgraph.load: {"factory": Net, "folder": folder / "saved"},
        depgraph.load_plans: {"folder": folder / "saved"},
        depgraph.recover: {"model": model, "small": student, "plan": RESULT.plan, "graph": GRAPH, "calibration": [X]},
        depgraph.finetune: {"model": model, "data": PAIRS, "loss": nn.functional.cross_entropy},
        depgraph.distill: {"model": student, "teacher": model, "data": [X]},
        depgraph.prune_gradually: {"model": model, "example_inputs": X, "train": lambda model, step: None, "steps": 1},
        depgraph.sweep: {"model": model, "example_inputs": X, "ratios": (0.5,), "score": fine, "latency": False},
        depgraph.sensitivity: {"model": model, "example_inputs": X, "score": fine, "ratios": (0.5,)},
        depgraph.measure_latency: {"model": model, "example_inputs": X},
        depgraph.count_macs: {"model": model, "example_inputs": X},
        depgraph.trace: {"model": model, "example_inputs": X},
        depgraph.parameter_count: {"model": model},
        depgraph.write_html: {"source": RESULT, "path": folder / "page.html"},
        depgraph.apply_to_optimizer: {"plan": RESULT.plan, "optimizer": torch.optim.SGD(model.parameters(), 0.1), "model": model, "small": student},
        depgraph.rewind: {"plan": RESULT.plan, "model": student, "initial": model.state_dict()},
    }[call]  # fmt: skip


CALLS = {
    "prune": depgraph.prune, "analyze": depgraph.analyze, "scores_of": depgraph.scores_of, "choose": depgraph.choose,
    "build_plan": depgraph.build_plan, "apply": depgraph.apply, "verify": depgraph.verify, "save": depgraph.save,
    "load": depgraph.load, "load_plans": depgraph.load_plans, "recover": depgraph.recover, "finetune": depgraph.finetune,
    "distill": depgraph.distill, "prune_gradually": depgraph.prune_gradually, "sweep": depgraph.sweep,
    "sensitivity": depgraph.sensitivity, "measure_latency": depgraph.measure_latency, "count_macs": depgraph.count_macs,
    "trace": depgraph.trace, "parameter_count": depgraph.parameter_count, "write_html": depgraph.write_html,
    "apply_to_optimizer": depgraph.apply_to_optimizer, "rewind": depgraph.rewind,
}  # fmt: skip

# Files are the system's business: a path that can't be written raises what the system says.
PATHS = {"folder", "file", "path"}
OWN = {
    "score",
    "importance",
    "constraints",
    "ramp",
    "beside",
}  # a module is a function of one argument: what it raises is the user's
TRAINS = {"finetune", "distill"}  # a forward in train mode, before what fails, moves running statistics
ENDLESS = {"epochs", "steps"}  # of which there may be very many


def arguments_of(call: Callable[..., Any]) -> list[str]:
    return [
        name
        for name, p in inspect.signature(call).parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and not name.startswith("_")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "argument"), [(n, a) for n, call in CALLS.items() for a in arguments_of(call)]
)
def test_wrong_values_are_refused(name, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, raw = CALLS[name], []
    if name in ("load", "load_plans"):
        depgraph.save(RESULT, tmp_path / "saved")
    for text, value in WRONG.items():
        if (argument in ENDLESS and text.startswith("10**")) or (argument in OWN and text == "module"):
            continue
        given = good_arguments(call, tmp_path)
        if (name, argument, value) == ("finetune", "loss", None):
            given["data"] = [X]  # what the model takes
        models = [v for k, v in given.items() if isinstance(v, nn.Module) and k != argument]
        before = [snapshot(m) for m in models]
        state = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
        try:
            call(**{**given, argument: value})
        except depgraph.DepgraphError:
            for model, was, values in zip(models, before, state, strict=True):
                if name in TRAINS:
                    parameters = dict(model.named_parameters())
                    assert all(torch.equal(p, values[n]) for n, p in parameters.items())
                    assert not model.training
                    continue
                assert_untouched(model, was)
                assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
        except Exception as error:  # noqa: BLE001  whatever comes out is what this test looks for
            if not (argument in PATHS and isinstance(error, OSError)):
                raw.append(f"{argument}={text}: {type(error).__name__}: {str(error)[:150]}")
    assert not raw, "\n".join(raw)


# ------------------------------------------------------------------------------------------- modules and parameters


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6)), nn.Linear(6, 8)
        self.again = self.one
        self.last = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.two(self.again(x))))


def widths(result: depgraph.PruneResult) -> tuple[int, int, int]:
    m = result.model
    return m.one[0].out_features, m.one[2].out_features, m.two.out_features


@pytest.mark.parametrize(
    ("ignored", "left"),
    [
        (lambda m: m.one, (8, 6, 4)),
        (lambda m: [m.one], (8, 6, 4)),
        (lambda m: (m.one[0], "last"), (8, 3, 8)),
        (lambda m: [m.two.weight], (4, 6, 8)),
        (lambda m: m.one[0].bias, (8, 3, 4)),
        (lambda m: {"two"}, (4, 6, 8)),
        (lambda m: m.last, (4, 3, 8)),
    ],
)
def test_ignore_takes_modules_and_parameters_themselves(ignored, left):
    model = Branches()
    result = prune_and_check(model, X, ignore=ignored(model))
    assert widths(result) == left
    graph = depgraph.analyze(model, X, ignore=ignored(model))
    assert {g.units for g in graph.groups} == {n for n, kept in zip((8, 6, 8), left, strict=True) if kept < n}


def test_ratios_and_scopes_take_modules_and_parameters_themselves():
    model = Branches()
    assert widths(depgraph.prune(model, X, pruning_ratio={model.one: 0.5, "two": 0.25})) == (4, 3, 6)
    assert widths(depgraph.prune(model, X, scope=[depgraph.Scope(model.two, ratio=0.5)])) == (8, 6, 4)


@pytest.mark.parametrize("strange", [nn.Linear(4, 8), nn.Parameter(torch.ones(8)), copy.deepcopy(MODEL).up])
def test_a_module_or_parameter_of_another_model_is_refused(strange):
    for ignored in (strange, [strange], ["up", strange]):
        with pytest.raises(depgraph.InputError, match="is not in the model"):
            depgraph.prune(MODEL, X, ignore=ignored)
    with pytest.raises(depgraph.InputError, match="is not in the model"):
        depgraph.prune(MODEL, X, pruning_ratio={strange: 0.5})
