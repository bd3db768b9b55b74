"""Budgets and options are one table each, which every way to ask reads."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import pytest
from checks import check_result
from torch import Tensor, nn

import depgraph
from depgraph.base.errors import InputError
from depgraph.cli.main import main, number, parser
from depgraph.costs.cost import byte_cost, byte_count, mac_cost
from depgraph.select import BUDGETS, OPTIONS
from tools.options import PAGE, page


@pytest.fixture
def energy() -> Iterator[Any]:
    """`max_energy`: a budget of one's own, in a dozen lines."""

    class Energy:
        def __init__(self, graph: depgraph.DependencyGraph) -> None:
            self.parts = (2e-12, mac_cost(graph)), (1e-10, byte_cost(graph))

        def value(self, counts: Any) -> float:
            return sum(w * part.value(counts) for w, part in self.parts)

        def slopes(self, counts: Any) -> Any:
            return sum(w * part.slopes(counts) for w, part in self.parts)

    def joules(model: nn.Module, x: Any) -> float:
        return 2e-12 * depgraph.count_macs(model, x) + 1e-10 * byte_count(model)

    units = {"J": 1.0, "nJ": 1e-9}
    depgraph.register_budget(depgraph.BudgetKind("max_energy", "joules", Energy, joules, units, bare=False))
    yield joules
    del BUDGETS["max_energy"]


def test_a_budget_of_ones_own_is_found_everywhere(energy: Any, net: nn.Module, x: Tensor) -> None:
    whole = energy(net, x)
    result = depgraph.prune(net, x, max_energy=0.6)
    check_result(net, result, x)
    assert 0.5 * whole < energy(result.model, x) <= 0.6 * whole
    assert result.plan.request["max_energy"] == 0.6

    asked = f"{whole * 0.7e9}nJ"
    assert energy(depgraph.prune(net, x, max_energy=asked).model, x) <= 0.7 * whole

    rows = depgraph.sweep(net, x, budgets={"max_energy": (0.8, 0.5)}, score=lambda m: 1.0, latency=False).rows
    assert [r.error for r in rows] == [None, None]
    assert rows[0].params > rows[1].params

    steps = depgraph.prune_gradually(net, x, steps=2, max_energy=0.5)
    assert energy(steps.model, x) <= 0.5 * whole

    graph = depgraph.analyze(net, x)
    masks = depgraph.choose(graph, depgraph.scores_of(graph), max_energy=0.5)
    assert energy(depgraph.apply(net, depgraph.build_plan(graph, masks)), x) <= 0.55 * whole

    for command in ("prune", "sweep"):
        with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--max-energy" in out.getvalue()
        assert "joules" in out.getvalue()
    options = parser().parse_args(["prune", "m:f", "--max-energy", "50%"])
    assert options.max_energy == "50%"


def test_a_budget_is_registered_once_and_by_a_fitting_name() -> None:
    kind = BUDGETS["max_params"]
    with pytest.raises(InputError, match="already: parameters"):
        depgraph.register_budget(kind)
    with pytest.raises(InputError, match="begins with max_"):
        depgraph.register_budget(depgraph.BudgetKind("energy", "joules", kind.cost, kind.measure))
    with pytest.raises(InputError, match="needs cost"):
        depgraph.register_budget(depgraph.BudgetKind("max_energy", "joules", None, kind.measure))
    with pytest.raises(InputError, match="BudgetKind"):
        depgraph.register_budget("max_energy")  # type: ignore[arg-type]
    assert "max_energy" not in BUDGETS


def test_choose_takes_shares_as_prune_does(net: nn.Module, x: Tensor) -> None:
    graph = depgraph.analyze(net, x)
    scores = depgraph.scores_of(graph)
    params = depgraph.parameter_count(net)
    for given in (0.7, "70%", int(0.7 * params)):
        masks = depgraph.choose(graph, scores, max_params=given)
        small = depgraph.apply(net, depgraph.build_plan(graph, masks))
        assert 0.6 * params < depgraph.parameter_count(small) <= 0.7 * params
    with pytest.raises(InputError, match="max_latency needs runs of the model: use it with prune"):
        depgraph.choose(graph, scores, max_latency=0.5)


@pytest.mark.parametrize(
    ("name", "given", "share", "value"),
    [
        ("max_params", "50%", 0.5, 0),
        ("max_params", "100%", 1.0, 0),
        ("max_macs", "100M", None, 1e8),
        ("max_macs", "1.5 G", None, 1.5e9),
        ("max_params", "7B", None, 7e9),
        ("max_params", 12, None, 12),
        ("max_bytes", "3 MB", None, 3e6),
        ("max_memory", "2GiB", None, 2 << 30),
        ("max_latency", "12ms", None, 0.012),
        ("max_latency", 0.5, 0.5, 0),
    ],
)
def test_amounts(name: str, given: Any, share: float | None, value: float) -> None:
    kind = BUDGETS[name]
    assert kind.amount(given, 1e12) == pytest.approx(share * 1e12 if share is not None else value)


def test_every_unit_by_hand() -> None:
    by_hand = {
        "max_params": "1K=1000 1M=1000000 1G=1000000000 1B=1000000000 1T=1000000000000",
        "max_bytes": "1B=1 1KB=1000 1MB=1000000 1GB=1000000000 1TB=1000000000000 "
        "1KiB=1024 1MiB=1048576 1GiB=1073741824 1TiB=1099511627776",
        "max_latency": "1s=1 1ms=0.001 1us=0.000001",
    }
    for name, rows in by_hand.items():
        pairs = dict(row.split("=") for row in rows.split())
        assert {unit.removeprefix("1") for unit in pairs} == set(BUDGETS[name].units)
        for given, value in pairs.items():
            assert BUDGETS[name].amount(given, 1e15) == pytest.approx(float(value)), given


@pytest.mark.parametrize("name", ["max_params", "max_macs", "max_bytes", "max_memory", "max_latency"])
@pytest.mark.parametrize(
    "given",
    [0, -1, 0.0, 1.5, float("nan"), float("inf"), True, "", "half", "200%", "0%", "-5%", "1e400GB", "1..2MB", [0.5],
     {}, "5 parsec", "GB"],
)  # fmt: skip
def test_amounts_that_can_not_be_read(name: str, given: Any, net: nn.Module, x: Tensor) -> None:
    with pytest.raises(InputError, match=f"(?s)^{name}=.*give a share up to 1"):
        depgraph.prune(net, x, **{name: given})


@pytest.mark.parametrize("given", [10**23, 10**400, "9e200"])
def test_more_than_the_model_has(given: Any, net: nn.Module, x: Tensor) -> None:
    with pytest.raises(InputError, match="max_params"):
        depgraph.prune(net, x, max_params=given)


def test_an_amount_is_spelled_as_it_is_read() -> None:
    for name, value in (("max_params", 123), ("max_memory", 7), ("max_latency", 0.0123456789)):
        kind = BUDGETS[name]
        assert kind.amount(kind.spell(value), 1e9) == pytest.approx(value, rel=1e-12)


def test_an_unknown_argument_names_the_nearest(net: nn.Module, x: Tensor) -> None:
    with pytest.raises(InputError, match=r"unknown argument 'max_mac'.*did you mean 'max_macs'"):
        depgraph.prune(net, x, max_mac=0.5)
    with pytest.raises(InputError, match=r"unknown argument 'roundto'.*'round_to'"):
        depgraph.prune(net, x, roundto=8)
    graph = depgraph.analyze(net, x)
    with pytest.raises(InputError, match=r"unknown argument 'zebra'.*max_params"):
        depgraph.choose(graph, depgraph.scores_of(graph), zebra=1)
    with pytest.raises(InputError, match="did you mean 'pruning_ratio'"):
        depgraph.prune(net, x, ratio=0.5)


@dataclass(frozen=True)
class Asked:
    words: tuple[str, ...]
    name: str
    value: Any


@pytest.mark.parametrize(
    "asked",
    [
        Asked(("--round-to", "8"), "round_to", 8),
        Asked(("--uniform",), "uniform", True),
        Asked(("--per-cost",), "per_cost", True),
        Asked(("--max-ratio", "0.7"), "max_ratio", 0.7),
        Asked(("--normalise", "sum"), "normalise", "sum"),
        Asked(("--threshold", "0.1"), "threshold", 0.1),
        Asked(("--scope", "global"), "scope", "global"),
        Asked(("--max-macs", "50%"), "max_macs", "50%"),
        Asked(("--max-macs", "100M"), "max_macs", "100M"),
        Asked(("--max-macs", "1e6"), "max_macs", 10**6),
    ],
    ids=lambda a: a.name,
)
def test_every_option_is_one_of_the_command_line(asked: Asked) -> None:
    options = parser().parse_args(["prune", "module:function", *asked.words])
    assert getattr(options, asked.name) == asked.value


def test_options_are_arguments_of_prune_and_choose() -> None:
    from inspect import signature

    for function in (depgraph.prune, depgraph.choose):
        names = signature(function).parameters
        assert set(OPTIONS) <= set(names)
        assert {"max_params", "max_macs", "max_bytes", "max_memory"} <= set(names)
    defaults = {name: p.default for name, p in signature(depgraph.choose).parameters.items()}
    assert {name: defaults[name] for name in OPTIONS} == {name: f.default for name, f in OPTIONS.items()}
    assert number("12ms") == "12ms"
    assert number("1e9") == 10**9


def test_the_page_of_options_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run python -m tools.options"
