"""What the default call chooses, beside what it could have chosen: the figures of docs/best.md.

    python -m benchmarks.default_call --small                        # digits, half a minute, no download
    python -m benchmarks.default_call --case demo --share 0.25       # the network of `make demo`
    python -m benchmarks.default_call --case minilm --without-data   # criteria of weights alone
    python -m benchmarks.default_call --case smollm --method default --windows 32

Each row prunes the case to its budget and scores what comes out, with batch norms re-estimated, too, where nothing is recovered.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import depgraph
from benchmarks.real import cases
from benchmarks.real.case import Budget, Case, Hints, run
from benchmarks.real.methods import DEFAULTS, MAGNITUDE, Method, prune, renorm
from depgraph import DependencyGraph, Group, scores_of
from depgraph.base.values import tensor_leaves
from depgraph.importance import L1, L2, KfacInTurn, Random
from examples import demo


class Measured:
    """Scores in turn, times the root of what a group's loss is to what its scores say of it.

    Each group alone loses `share` of its units and is recovered on all batches but the last, where the squared error of the outputs is
    measured. So units of several groups compete by what was measured, and those of one by their scores.
    """

    normalise = "none"
    per_cost = True

    def __init__(self, share: float = 0.4, use_loss: bool = True) -> None:
        self.share, self.base = share, KfacInTurn(use_loss=use_loss)

    def prepare(self, graph: DependencyGraph, calibration: Any) -> None:
        scores = scores_of(graph, self.base, calibration=calibration)
        *fitted, last = [b.args[0] if b.args else b.kwargs for b in calibration.batches("measuring")]
        wanted, factors = self.outputs(graph.model, last), {}
        for name, own in scores.items():
            try:
                small = depgraph.prune(
                    graph.model, last, pruning_ratio={name: self.share}, importance=lambda group: scores.get(group.name, np.zeros(group.units)),
                    calibration=fitted, recover="auto", verify=False, progress=False,
                ).model  # fmt: skip
            except depgraph.DepgraphError:  # it goes with another group
                continue
            lost = sum(
                float((a - b).square().sum()) for a, b in zip(self.outputs(small, last), wanted, strict=True)
            )
            said = float(np.sort(own)[: round(self.share * len(own))].sum())
            factors[name] = (lost / max(said, 1e-30)) ** 0.5
        usual = float(np.exp(np.mean(np.log([max(f, 1e-30) for f in factors.values()] or [1.0]))))
        self.scores = {name: own * factors.get(name, usual) for name, own in scores.items()}

    @staticmethod
    @torch.no_grad()
    def outputs(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
        return tensor_leaves(run(model, inputs))

    def __call__(self, group: Group) -> Any:
        return self.scores[group.name]


_DATA: dict[str, Any] = {"data": True}
_LOSS: dict[str, Any] = {"importance": "kfac_in_turn", "recover": "auto"}
WITH_DATA = [
    *DEFAULTS[:2],
    Method("depgraph", "scores by the loss", _LOSS, **_DATA),
    Method(
        "depgraph",
        "default, by score",
        {"importance": "kfac_obs", "per_cost": False, "recover": "auto"},
        **_DATA,
    ),
    Method(
        "depgraph", "default, local", {"importance": "kfac_obs", "scope": "local", "recover": "auto"}, **_DATA
    ),
    Method("depgraph", "by the loss, 2 rounds", _LOSS, rounds=2, **_DATA),
    Method("depgraph", "by the loss, 4 rounds", _LOSS, rounds=4, **_DATA),
    Method("depgraph", "by the loss, inside heads", _LOSS | {"granularity": "fine"}, **_DATA),
    Method("depgraph", "by the loss, measured", {"importance": Measured(), "recover": "auto"}, **_DATA),
    Method(
        "depgraph", "by signs, measured", {"importance": Measured(use_loss=False), "recover": "auto"}, **_DATA
    ),
    Method("depgraph", "obs, global", {"importance": "obs", "scope": "global", "recover": "auto"}, **_DATA),
    Method("depgraph", "l2, local", {"importance": "l2", "scope": "local", "recover": "auto"}, **_DATA),
]


class Product:
    """sqrt of (norm of what produces a unit) times (norm of what consumes it)."""

    normalise = "mean"

    def __init__(self, norm: type[L1 | L2]) -> None:
        self.sides = norm(roles=["produces", "scales"]), norm(roles=["consumes"])

    def prepare(self, graph: DependencyGraph, calibration: Any) -> None:
        for side in self.sides:
            side.prepare(graph, calibration)

    def __call__(self, group: Group) -> Any:
        return np.sqrt(self.sides[0](group) * self.sides[1](group))


def without_data() -> list[Method]:
    """Criteria of weights alone, in the scopes that suit them."""
    found = [
        *DEFAULTS[2:],
        MAGNITUDE,
        Method("depgraph", "l1, per cost", {"importance": "l1", "per_cost": True}),
    ]
    for name in ("l1", "l2", "fpgm", "consumer_norm", "bn_scale"):
        found.append(Method("depgraph", f"{name}, local", {"importance": name, "scope": "local"}))
    for name in ("l1", "l2"):
        found.append(Method("depgraph", f"{name}, isomorphic", {"importance": name, "scope": "isomorphic"}))
    product = {"importance": Product(L2), "scope": "local"}
    found.append(Method("depgraph", "lamp, per cost", {"importance": "lamp", "per_cost": True}))
    found.append(Method("depgraph", "products of l2, local", product))
    found += [Method("depgraph", f"random, seed {s}", {"importance": Random(s)}) for s in range(2)]
    return found


def the_demo() -> Case:
    """The network of `make demo`, trained as there."""

    @cache
    def data() -> demo.Digits:
        return demo.load_data()

    @cache
    def trained() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(demo.SEED)
            model = demo.DigitsNet()
            demo.train(model, data(), epochs=10, rate=0.05)
        return model

    def calibration(seed: int) -> Any:
        return list(zip(data().train_x.split(128), data().train_y.split(128), strict=True))

    return Case(
        name="demo",
        title="digits, the network of make demo",
        budget=Budget("macs", 0.5),
        build=trained,
        example=lambda: data().train_x[:2],
        calibration=calibration,
        loss=F.cross_entropy,
        score=lambda model: {"accuracy": demo.accuracy(model, data())},
        higher=True,
        hints=Hints(lambda model: {}),
    )


def rows(case: Case, methods: Sequence[Method], seed: int) -> None:
    """One line for each method."""
    print(f"{case.title}, {case.budget.share:g} of the {case.budget.what}, seed {seed}")
    dense = case.build()
    print(_line("dense", case.score(dense)), flush=True)
    for method in methods:
        try:
            pruned = prune(method, case, seed)
        except Exception as error:
            print(f"  {method.name:32} {type(error).__name__}: {str(error)[:80]}", flush=True)
            continue
        text = _line(method.name, case.score(pruned.model))
        ready = copy.deepcopy(pruned.model)
        if "recover" not in method.options and renorm(ready, case.calibration(seed)[:4]):
            text += f"; batch norms re-estimated: {_figures(case.score(ready))}"
        print(f"{text}; {pruned.seconds:.0f} s", flush=True)


def _line(name: str, scores: dict[str, float]) -> str:
    return f"  {name:32} {_figures(scores)}"


def _figures(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="digits alone, nothing is downloaded")
    parser.add_argument("--case", default="demo", choices=["demo", "digits", *cases.names()])
    parser.add_argument(
        "--share", type=float, help="what is left of the cost, instead of the case's own share"
    )
    parser.add_argument(
        "--method", action="append", help="only the methods of this name, or whose names hold it"
    )
    parser.add_argument(
        "--windows",
        type=int,
        default=cases.CALIBRATION_WINDOWS,
        help="how many windows of text the language model is calibrated on (default: %(default)d)",
    )
    parser.add_argument("--without-data", action="store_true", help="criteria of weights alone")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases.CALIBRATION_WINDOWS = options.windows
    started = time.perf_counter()
    named = {"demo": the_demo, "digits": cases.small}
    name = "digits" if options.small else options.case
    case = named[name]() if name in named else cases.case(name)
    if options.share is not None:
        case = replace(case, budget=replace(case.budget, share=options.share))
    methods = (
        without_data() if options.without_data else [*WITH_DATA, *([] if options.small else without_data())]
    )
    if options.method:
        exact = [m for m in methods if m.name in options.method]
        methods = exact or [m for m in methods if any(text in m.name for text in options.method)]
    rows(case, methods, options.seed)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
