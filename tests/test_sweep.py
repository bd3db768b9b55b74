"""Sweeps and sensitivity scans against direct calls of `prune`; scores in reports; what an interrupted run leaves."""

from __future__ import annotations

import copy
import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_untouched, snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from two_blocks import Agreement, Net

import depgraph
from depgraph.exploring.records import digest

# ------------------------------------------------------------------------------------------------ score and graph


def test_scores_before_and_after_are_in_the_report(net: nn.Module, x: Tensor) -> None:
    score = Agreement(net, x)
    net.train()
    net.norm.eval()
    modes = [m.training for m in net.modules()]
    result = depgraph.prune(net, x, pruning_ratio=0.3, score=score)
    assert [m.training for m in net.modules()] == modes == [m.training for m in result.model.modules()]
    assert score.calls == 2
    wanted = {"before": score(net.eval()), "after": score(result.model.eval())}
    assert result.report.to_dict()["score"] == wanted
    assert wanted["after"] < -0.01 < wanted["before"] == 0
    assert f"{wanted['after']:.4g}" in str(result.report)


@pytest.mark.parametrize("given", [float("nan"), "high", torch.zeros(2)], ids=["nan", "text", "two numbers"])
def test_a_score_that_is_no_number_is_refused(net: nn.Module, x: Tensor, given: object) -> None:
    with pytest.raises(depgraph.InputError, match="score"):
        depgraph.prune(net, x, score=lambda _: given, inplace=True)
    assert net.up.weight.shape == (19, 11, 3, 3)


def test_prune_goes_on_from_a_graph(net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = depgraph.analyze(net, x, ignore=["wide"])
    wanted = depgraph.prune(net, x, pruning_ratio=0.4, ignore=["wide"]).plan.to_json()
    monkeypatch.setattr(
        importlib.import_module("depgraph.prune"), "analyze", lambda *_, **__: pytest.fail("traced again")
    )
    assert depgraph.prune(net, x, pruning_ratio=0.4, graph=graph).plan.to_json() == wanted


def test_a_graph_of_another_model_is_refused(net: nn.Module, x: Tensor) -> None:
    graph = depgraph.analyze(net, x)
    with pytest.raises(depgraph.InputError, match="another model"):
        depgraph.prune(Net().eval(), x, graph=graph)
    with pytest.raises(depgraph.InputError, match="analyze"):
        depgraph.prune(net, x, graph=graph, ignore=["stem"])


def test_what_a_view_freezes_is_free_in_the_graph(net: nn.Module, x: Tensor) -> None:
    graph = depgraph.analyze(net, x)
    groups = graph.groups
    view = graph.without([groups[0].name], depgraph.Reason("is frozen there"))
    assert view.groups == groups[1:]
    assert graph.groups == groups
    assert str(view.reason(groups[0].axis)) == "is frozen there"
    assert graph.reason(groups[0].axis) is None
    assert view.frozen != graph.frozen
    assert view.trace is graph.trace


# ------------------------------------------------------------------------------------------ figures of the report


class Mixed(nn.Module):
    """Layers whose width stands in dim 0, in dim 1, in an LSTM's gates, and in a parameter of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(23, 13), nn.LayerNorm(13)
        self.memory = nn.LSTM(13, 11, batch_first=True)
        self.mix = nn.Parameter(torch.randn(11, 17))
        self.last = nn.Linear(17, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.memory(self.norm(self.table(tokens)))[0] @ self.mix)


def test_sparsity_of_each_layer() -> None:
    net, tokens = Mixed().eval(), torch.randint(23, (2, 7))
    result = depgraph.prune(net, tokens, pruning_ratio=0.5)
    small = result.model
    layers = {layer["module"]: layer for layer in result.report.to_dict()["layers"]}
    assert list(layers) == ["", "table", "norm", "memory", "last"]
    for name, layer in layers.items():
        own = [sum(p.numel() for p in m.get_submodule(name).parameters(recurse=False)) for m in (net, small)]
        assert layer["params"] == {"before": own[0], "after": own[1], "sparsity": 1 - own[1] / own[0]}
    units = {name: (layer["units"]["before"], layer["units"]["after"]) for name, layer in layers.items()}
    assert units == {"": (17, 9), "table": (13, 7), "norm": (13, 7), "memory": (44, 24), "last": (5, 5)}
    assert sum(layer["params"]["after"] for layer in layers.values()) == depgraph.parameter_count(small)
    assert layers["table"]["units"]["sparsity"] == 1 - 7 / 13


def test_ratios_of_before_and_after(net: nn.Module, x: Tensor) -> None:
    report = depgraph.prune(net, x, pruning_ratio=0.5, latency=True).report
    found = report.to_dict()
    for name in ("params", "macs", "bytes", "latency"):
        assert found["ratios"][name] == found[name]["before"] / found[name]["after"] > 0
        assert f"{found['ratios'][name]:.2f}x" in str(report)
    assert depgraph.prune(net, x).report.to_dict()["ratios"]["latency"] is None
    before, after = math.prod(report.plan.shapes["up.weight"]), report.plan.mask("up.weight").sum()
    row = next(line for line in str(report).splitlines() if "up.weight" in line)
    assert f"{1 - int(after) / before:.1%}" in row


# ----------------------------------------------------------------------------------------------------- the sweep

FIGURES = ("params", "macs", "bytes")


def expected(
    net: nn.Module, x: Tensor, score: Agreement, **asked: float | str
) -> tuple[int, int, int, float]:
    """Parameters, MACs, bytes and score of a direct call."""
    result = depgraph.prune(net, x, **asked)  # type: ignore[arg-type]
    found = result.report.to_dict()
    return (*(found[name]["after"] for name in FIGURES), score(result.model.eval()))


def figures(row: depgraph.Row) -> tuple[int | None, int | None, int | None, float | None]:
    return row.params, row.macs, row.bytes, row.score


@pytest.mark.slow
def test_a_sweep_has_the_figures_of_direct_calls(net: nn.Module, x: Tensor) -> None:
    score, before = Agreement(net, x), snapshot(net)
    found = depgraph.sweep(
        net, x, (0.3, 0.7), budgets={"max_macs": (0.6,), "max_bytes": ("7KB",)}, score=score
    )
    assert_untouched(net, before)
    assert score.calls == 5
    asked = [{"pruning_ratio": 0.3}, {"pruning_ratio": 0.7}, {"max_macs": 0.6}, {"max_bytes": "7KB"}]
    assert [{r.argument: r.value} for r in found.rows] == asked
    assert [figures(r) for r in found.rows] == [expected(net, x, score, **a) for a in asked]
    assert len({figures(r) for r in found.rows}) == 4
    assert figures(found.dense) == (
        depgraph.parameter_count(net), depgraph.count_macs(net, x), depgraph.costs.cost.byte_count(net), 0.0,
    )  # fmt: skip
    assert all(1e-6 < (r.latency or 0) < 1 for r in (found.dense, *found.rows))
    assert found.to_dict()["rows"][1]["params"] == found.rows[1].params


def test_each_model_takes_turns_with_the_dense_one(
    net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = []

    def latencies(models: list[nn.Module], inputs: Tensor) -> list[float]:
        assert inputs is x
        pairs.append([depgraph.parameter_count(m) for m in models])
        return [0.7 / len(pairs), 0.1][: len(models)]

    monkeypatch.setattr(importlib.import_module("depgraph.exploring.sweep"), "latencies", latencies)
    found = depgraph.sweep(net, x, (0.3, 0.6), score=Agreement(net, x))
    assert pairs == [[found.dense.params], *([found.dense.params, r.params] for r in found.rows)]
    assert (found.dense.latency, found.dense.speedup) == (0.7, 1.0)
    assert [r.latency for r in found.rows] == [0.1, 0.1]
    assert [r.speedup for r in found.rows] == [0.7 / 2 / 0.1, 0.7 / 3 / 0.1]
    assert found.left(found.rows[0], "latency") == 1 / (0.7 / 2 / 0.1)
    assert found.left(found.rows[0], "params") == pairs[1][1] / pairs[0][0]
    assert "3.50x" in str(found)


@pytest.mark.slow
def test_a_sweep_traces_and_scores_units_once(
    net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"trace": 0, "scores": 0}
    engine, trace = importlib.import_module("depgraph.prune"), depgraph.trace

    def traced(*args: Any) -> Any:
        counts["trace"] += 1
        return trace(*args)

    def importance(group: depgraph.Group) -> Tensor:
        counts["scores"] += 1
        return torch.arange(group.units) % 3

    monkeypatch.setattr(engine, "trace", traced)
    found = depgraph.sweep(net, x, (0.2, 0.5, 0.8), score=Agreement(net, x), importance=importance)
    assert counts == {"trace": 1, "scores": 3}
    wanted = depgraph.prune(net, x, pruning_ratio=0.8, importance=importance).model.eval()
    assert found.rows[2].score == Agreement(net, x)(wanted)


def test_arguments_of_prune_are_handed_on(net: nn.Module, x: Tensor) -> None:
    found = depgraph.sweep(net, x, (0.6,), score=Agreement(net, x), ignore=["wide"], round_to=4)
    wanted = depgraph.prune(net, x, pruning_ratio=0.6, ignore=["wide"], round_to=4).report.to_dict()
    assert found.rows[0].params == wanted["params"]["after"]
    assert found.rows[0].params != depgraph.prune(net, x, pruning_ratio=0.6).report.parameters[1]


@pytest.mark.slow
def test_rows_that_look_at_data_and_recover(net: nn.Module, x: Tensor) -> None:
    """An iterator that can be read once serves every row, to rank and to recover."""
    batches = [torch.randn(5, 3, 7, 13, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    options = {"importance": "activation_variance", "recover": "reconstruction"}
    score = Agreement(net, x)
    found = depgraph.sweep(net, x, (0.3, 0.6), score=score, calibration=iter(batches), **options)
    wanted = [
        expected(net, x, score, pruning_ratio=r, calibration=batches, **options)  # type: ignore[arg-type]
        for r in (0.3, 0.6)
    ]
    assert [figures(r) for r in found.rows] == wanted
    plain = depgraph.sweep(net, x, (0.3,), score=score, calibration=batches, importance="activation_variance")
    assert plain.rows[0].score != found.rows[0].score


class Tall(nn.Module):
    """Its forward takes another way once fewer than ten channels are left."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (
            nn.Linear(5, 17),
            nn.Linear(17, 13),
            nn.Linear(13, 11),
            nn.Linear(11, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if x.shape[1] < 10:
            x = x + 1
        return self.d(F.relu(self.c(F.relu(self.b(x)))))


@pytest.mark.slow
def test_what_one_row_freezes_is_free_in_the_next() -> None:
    """At 0.8 the comparison would come out differently, and its axis stays; at 0.3 it may go."""
    net, x = Tall().eval(), torch.randn(2, 5)
    score = Agreement(net, x)
    found = depgraph.sweep(net, x, (0.8, 0.3), score=score)
    assert [figures(r) for r in found.rows] == [expected(net, x, score, pruning_ratio=r) for r in (0.8, 0.3)]
    assert depgraph.prune(net, x, pruning_ratio=0.8).model.a.out_features == 17
    assert depgraph.prune(net, x, pruning_ratio=0.3).model.a.out_features == 12


@pytest.mark.slow
def test_a_row_that_fails_says_why_and_the_others_go_on(net: nn.Module, x: Tensor) -> None:
    score = Agreement(net, x, fails_at=3, error=RuntimeError("out of paper"))
    found = depgraph.sweep(net, x, (0.2, 0.4), budgets={"max_params": (0.001,)}, score=score)
    first, second, third = found.rows
    assert first.error is None
    assert second.error == "RuntimeError: out of paper"
    assert (second.params, second.score) == (
        depgraph.prune(net, x, pruning_ratio=0.4).report.parameters[1],
        None,
    )
    assert third.error is not None
    assert third.error.startswith("BudgetError: max_params=")
    assert figures(third) == (None, None, None, None)
    assert "out of paper" in str(found)
    assert "can't be reached" in str(found)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ratios": ()}, "nothing to sweep over"),
        ({"ratios": (0.5, 1.0)}, "between 0 and 1"),
        ({"ratios": ({"up": 0.5},)}, "an entry of ratios"),
        ({"ratios": (float("nan"),)}, "pruning_ratio must be between 0 and 1"),
        ({"budgets": {"max_macs": (0.5, 0.0)}}, "max_macs"),
        ({"budgets": {"max_bytes": ("3 yards",)}}, "max_bytes"),
        ({"budgets": {"max_rows": (0.5,)}}, "unknown budget 'max_rows'"),
        ({"budgets": {"round_to": (4,)}}, "unknown budget 'round_to'"),
        ({"colour": "red"}, "no argument 'colour'"),
        ({"inplace": True}, "sweep sets 'inplace'"),
        ({"score": 3}, "score must be a function"),
        ({"importance": "fame"}, "fame"),
    ],
)
def test_bad_arguments_of_a_sweep(net: nn.Module, x: Tensor, options: dict[str, Any], match: str) -> None:
    before = snapshot(net)
    with pytest.raises(depgraph.InputError, match=match):
        depgraph.sweep(net, x, **{"score": lambda _: 0.0, **options})
    assert_untouched(net, before)


def test_the_smallest_row_that_loses_little() -> None:
    def row(
        value: float, macs: int, params: int, score: float | None, error: str | None = None
    ) -> depgraph.Row:
        return depgraph.Row("pruning_ratio", value, params, macs, 4 * params, None, score, error)

    rows = [
        row(0.1, 90, 70, 0.95),
        row(0.2, 80, 75, 0.91),
        row(0.3, 70, 60, 0.93),
        row(0.4, 60, 50, None, "no"),
    ]
    found = depgraph.Sweep(row(0, 100, 100, 0.96), rows)
    assert found.smallest(drop=0.04) is rows[2]
    assert found.smallest(drop=0.015) is rows[0]
    assert found.smallest(drop=0.055, by="params") is rows[2]
    assert found.smallest(drop=0.001) is None
    with pytest.raises(depgraph.InputError, match="latency"):
        found.smallest(drop=0.1, by="latency")


def test_the_table_of_a_sweep(net: nn.Module, x: Tensor) -> None:
    found = depgraph.sweep(net, x, (0.3,), score=Agreement(net, x))
    (row,), dense, text = found.rows, found.dense, str(found)
    assert row.params
    assert dense.params
    for cell in (f"{row.params:,}", f"{row.params / dense.params:.1%}", f"{row.macs:,}", f"{row.score:.4g}"):
        assert cell in text


# ------------------------------------------------------------------------------------------------- resumed sweeps


def test_ctrl_c_while_the_model_itself_is_scored(net: nn.Module, x: Tensor) -> None:
    score = Agreement(net, x, fails_at=1, error=KeyboardInterrupt())
    net.train()
    net.norm.eval()
    modes, before = [m.training for m in net.modules()], snapshot(net)
    for call in (
        lambda: depgraph.sweep(net, x, score=score), lambda: depgraph.prune(net, x, score=score, inplace=True)
    ):  # fmt: skip
        score.calls = 0
        with pytest.raises(KeyboardInterrupt):
            call()
        assert [m.training for m in net.modules()] == modes
        assert_untouched(net, before)


@pytest.mark.slow
def test_ctrl_c_leaves_the_model_and_the_sweep_goes_on(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    file, ratios = tmp_path / "new folder" / "rows.jsonl", (0.2, 0.4, 0.6)
    net.train()
    interrupted = Agreement(net, x, fails_at=3, error=KeyboardInterrupt())
    net.train()
    before = snapshot(net)
    modes = [m.training for m in net.modules()]
    with pytest.raises(KeyboardInterrupt):
        depgraph.sweep(net, x, ratios, score=interrupted, file=file)
    assert_untouched(net, before)
    assert [m.training for m in net.modules()] == modes
    assert len(file.read_text().splitlines()) == 3  # the header, the dense model, the first ratio

    score = Agreement(net, x)
    found = depgraph.sweep(net, x, ratios, score=score, file=file)
    assert score.calls == 2
    again = depgraph.sweep(net, x, ratios, score=score, file=file)
    assert score.calls == 2
    assert found == again
    whole = depgraph.sweep(net, x, ratios, score=Agreement(net, x))
    assert [figures(r) for r in whole.rows] == [figures(r) for r in found.rows]
    more = depgraph.sweep(net, x, (0.4, 0.5), score=score, file=file)
    assert score.calls == 3
    assert [r.value for r in more.rows] == [0.4, 0.5]


@pytest.mark.slow
def test_failed_rows_are_tried_again(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    failing = Agreement(net, x, fails_at=2, error=MemoryError("full"))
    assert depgraph.sweep(net, x, (0.2,), score=failing, file=file).rows[0].error == "MemoryError: full"
    score = Agreement(net, x)
    assert depgraph.sweep(net, x, (0.2,), score=score, file=file).rows[0].error is None
    assert score.calls == 1
    assert depgraph.sweep(net, x, (0.2,), score=score, file=file).rows[0].error is None
    assert score.calls == 1


def test_a_last_line_cut_short_is_computed_again(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    whole = depgraph.sweep(net, x, (0.2, 0.4), score=Agreement(net, x), file=file, latency=False)
    text = file.read_text()
    file.write_text(text[:-9])
    score = Agreement(net, x)
    assert depgraph.sweep(net, x, (0.2, 0.4), score=score, file=file, latency=False) == whole
    assert score.calls == 1
    assert file.read_text() == text


def with_a_changed_weight(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    with torch.no_grad():
        net.get_parameter("up.weight")[3, 5, 1, 1] += 1e-3
    return net


def other_score(model: nn.Module) -> float:
    return 1.0


def one_score(model: nn.Module) -> float:
    return 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda net, x: (with_a_changed_weight(net), x, {}), "model"),
        (lambda net, x: (net, x + 1, {}), "example_inputs"),
        (lambda net, x: (net, x, {"score": other_score}), "score"),
        (lambda net, x: (net, x, {"round_to": 2}), "arguments"),
        (lambda net, x: (net, x, {"latency": True}), "latency"),
    ],
    ids=["weight", "inputs", "score", "arguments", "latency"],
)
def test_rows_of_another_run_are_refused(
    net: nn.Module, x: Tensor, tmp_path: Path, change: Any, named: str
) -> None:
    file = tmp_path / "rows.jsonl"
    options = {"score": one_score, "latency": False, "file": file, "ratios": (0.2,)}
    depgraph.sweep(net, x, **options)
    text = file.read_text()
    depgraph.sweep(copy.deepcopy(net), x.clone(), **options)  # equal, though not the same
    other, inputs, changed = change(net, x)
    with pytest.raises(depgraph.InputError, match=rf"another run: {named} differ"):
        depgraph.sweep(other, inputs, **{**options, **changed})
    assert file.read_text() == text


@pytest.mark.parametrize("text", ["precious notes\n", '{"a": 1}\n', "no newline"])
def test_other_files_are_left_alone(net: nn.Module, x: Tensor, tmp_path: Path, text: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(text)
    with pytest.raises(depgraph.InputError, match=r"notes\.txt"):
        depgraph.sweep(net, x, score=one_score, file=file)
    assert file.read_text() == text


def test_digests_tell_values_apart_and_nothing_else() -> None:
    values = [
        1, 1.0, "1", True, None, (1, 2), (12,), ("1", "2"), {"a": 1}, {"a": 2}, torch.float16,
        torch.zeros(3), torch.zeros(3, dtype=torch.int32), torch.zeros(1, 3), torch.ones(3),
        torch.ones(3, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.complex64), np.zeros(5), np.zeros(5, np.float32),
        one_score, other_score, Agreement, depgraph.Examples(torch.zeros(3)), depgraph.Examples(torch.ones(3)),
        nn.Linear(2, 3), depgraph.L1(),
    ]  # fmt: skip
    assert len({digest(v) for v in values}) == len(values)
    for value in values:
        assert digest(copy.deepcopy(value)) == digest(value)
    assert digest(torch.arange(6).reshape(2, 3).t()) == digest(torch.arange(6).reshape(2, 3).t().contiguous())


# ------------------------------------------------------------------------------------------------ the model of a row


def test_a_row_gives_the_model_that_was_scored(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    scored: list[nn.Module] = []

    def score(model: nn.Module) -> float:
        scored.append(model)
        return 1.0

    asked: dict[str, Any] = {"importance": "l2", "round_to": 2, "latency": False, "file": tmp_path / "rows"}
    ways = {"ratios": [0.3], "budgets": {"max_macs": [0.6]}}
    found = depgraph.sweep(net, x, score=score, **ways, **asked)
    again = depgraph.sweep(net, x, score=score, **ways, **asked)  # from the file
    assert len(scored) == 3
    for sweep in (found, again):
        for row, model in zip(sweep.rows, scored[1:], strict=True):
            result = sweep.prune(row)
            assert result.report.verification.status == "equal"
            for name, tensor in model.state_dict().items():
                assert torch.equal(result.model.state_dict()[name], tensor), name
    assert found.prune(found.rows[0]).model is not found.prune(found.rows[0]).model


def test_the_model_of_a_row_has_the_values_that_were_won_back(net: nn.Module, x: Tensor) -> None:
    scored: list[nn.Module] = []
    found = depgraph.sweep(
        net,
        x,
        [0.5],
        score=lambda m: scored.append(m) or 1.0,
        latency=False,
        recover="compensation",
        calibration=[x],
    )
    again = found.prune(found.rows[0]).model.state_dict()
    assert all(torch.allclose(again[n], t) for n, t in scored[1].state_dict().items())


def test_only_rows_of_the_sweep_have_models(net: nn.Module, x: Tensor) -> None:
    found = depgraph.sweep(net, x, [0.5], budgets={"max_macs": [1e-6]}, score=lambda _: 1.0, latency=False)
    with pytest.raises(depgraph.InputError, match="there is no model of max_macs=1e-06: BudgetError"):
        found.prune(found.rows[1])
    for other in (found.dense, depgraph.sweep(net, x, [0.4], score=lambda _: 1.0, latency=False).rows[0]):
        with pytest.raises(depgraph.InputError, match="is no row of this sweep"):
            found.prune(other)
    with pytest.raises(depgraph.InputError, match="row must be"):
        found.prune(0.5)
