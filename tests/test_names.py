"""Groups are known by names: in scores, masks and counts, in any graph of the model, in any process. Graphs do not change."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checks import check_result
from torch import Tensor, nn
from zoo import ZOO

import depgraph
from depgraph import InputError


class Attention(nn.Module):
    """Packed rows of queries, keys and values: 4 heads of width 6."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.qkv, self.out = nn.Linear(5, 11), nn.Linear(11, 72), nn.Linear(24, 11)
        self.last = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        q, k, v = self.qkv(y).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
        z = (q @ k.transpose(-1, -2)).softmax(-1).matmul(v).transpose(1, 2).flatten(2)
        return self.last(y + self.out(z))


class Pieces(nn.Module):
    """Two pieces of one dim go their own ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(5, 12), nn.Linear(5, 3), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).relu().split([5, 7], -1)
        return self.left(a) + self.right(b)


class Top(nn.Module):
    """Takes the 4 largest of its hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 9), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).topk(4, -1).values)


def chain() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 11), nn.ReLU(), nn.Linear(11, 13), nn.ReLU(), nn.Linear(13, 3))
    return model.double().eval(), torch.randn(4, 5, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------- names


def test_a_group_is_called_after_what_produces_it() -> None:
    graph = depgraph.analyze(*chain())
    assert [g.name for g in graph.groups] == ["0.weight:0", "2.weight:0"]
    assert graph.group("2.weight:0") is graph.groups[1]


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Attention(), {"enter.weight:0": 11, "qkv.weight:0[0:24:6]": 4, "qkv.weight:0[0:6]": 6}),
        (Pieces(), {"stem.weight:0[0:5]": 5, "stem.weight:0[5:12]": 7}),
    ],
)
def test_groups_of_one_dim_are_told_apart_by_where_their_units_begin(
    model: nn.Module, names: dict[str, int]
) -> None:
    x = torch.randn(2, 7, 5)
    found = {g.name: g.units for g in depgraph.analyze(model, x).groups}
    assert {n: u for n, u in found.items() if n in names} == names


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ZOO)[::7])
def test_names_are_unique_and_come_again(name: str) -> None:
    entry = ZOO[name]
    first, second = (
        [g.name for g in depgraph.analyze(entry.model(seed), entry.example()).groups] for seed in (0, 1)
    )
    assert first == second
    assert len(set(first)) == len(first)


def test_scores_and_masks_of_one_graph_fit_another() -> None:
    model, x = chain()
    one, other = depgraph.analyze(model, x), depgraph.analyze(model, x)
    scores = depgraph.scores_of(one, "l2")
    masks = depgraph.choose(other, scores, pruning_ratio=0.5)
    assert sorted(masks) == [g.name for g in other.groups]
    plan = depgraph.build_plan(depgraph.analyze(model, x), masks)
    assert plan.to_json() == depgraph.build_plan(one, masks).to_json()
    small = depgraph.apply(model, plan)
    proof = depgraph.verify(model, small, plan, x)
    check_result(model, depgraph.PruneResult(small, plan, None), x)  # type: ignore[arg-type]
    assert proof.status == "equal"
    assert small[0].out_features == 6


def test_scores_go_from_process_to_process_as_text() -> None:
    code = (
        "import json, torch, depgraph; from test_names import chain\n"
        "graph = depgraph.analyze(*chain())\n"
        "print(json.dumps({n: s.tolist() for n, s in depgraph.scores_of(graph).items()}))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    graph = depgraph.analyze(*chain())
    theirs, mine = json.loads(said.stdout), depgraph.scores_of(graph)
    masks = [depgraph.choose(graph, scores, pruning_ratio=0.4) for scores in (theirs, mine)]
    assert next({n: m.tolist() for n, m in found.items()} for found in masks) == {
        n: m.tolist() for n, m in masks[1].items()
    }


def test_costs_are_asked_by_name() -> None:
    model, x = chain()
    costs = depgraph.CostModel(depgraph.analyze(model, x))
    assert costs.parameters({}) == sum(p.numel() for p in model.parameters())
    assert costs.parameters({"0.weight:0": 10}) == costs.parameters({}) - 5 - 1 - 13
    for counts in (
        {"0.weight": 3},
        {"0.weight:0": 12},
        {"0.weight:0": 1.0},
        {"0.weight:0": None},
        [3],
        {1: 2},
    ):
        with pytest.raises(InputError):
            costs.macs(counts)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- what is handed in


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array, tuple])
def test_masks_may_be_lists_and_tensors(kind: Callable[[Any], Any]) -> None:
    model, x = chain()
    graph = depgraph.analyze(model, x)
    keep = [True] * 6 + [False, True, False, False, True]
    plan = depgraph.build_plan(graph, {"0.weight:0": kind(keep)})
    assert plan.cuts["0.weight"].keep[0].tolist() == np.flatnonzero(keep).tolist()
    assert graph.mask("2.weight", {"0.weight:0": kind(keep)}).tolist() == [keep] * 13
    assert graph.keeps("2.weight", {"0.weight:0": kind(keep)})[0][1].tolist() == np.flatnonzero(keep).tolist()
    assert graph.keeps("4.weight", {"0.weight:0": kind(keep)}) == ([None, None], None)


FULL, LESS = [True] * 11, [True] * 10 + [False]


@pytest.mark.parametrize(
    ("masks", "text"),
    [
        (
            {"0.weight:0": np.array([0, 2, 3])},
            r"must be \[11\] bools, True where a unit stays, not \[3\] int64",
        ),
        ({"0.weight:0": [0, 2, 3]}, r"fix: of indices make one with mask = np.zeros\(11, bool\)"),
        ({"0.weight:0": np.ones(11)}, r"not \[11\] float64"),
        ({"0.weight:0": torch.ones(11, dtype=torch.bfloat16)}, r"not \[11\] float64"),
        ({"0.weight:0": np.ones(11, dtype=int)}, r"not \[11\] int64"),
        ({"0.weight:0": FULL[:10]}, r"not \[10\] bool"),
        ({"0.weight:0": [FULL]}, r"not \[1, 11\] bool"),
        ({"0.weight:0": [FULL, LESS[:3]]}, r"must be \[11\] bools"),
        ({"0.weight:0": None}, r"not \[\] object"),
        ({"0.weight:0": True}, r"not \[\] bool"),
        (
            {"0.weigth:0": LESS},
            r"'0.weigth:0' is not a group of this graph, which has '0.weight:0', '2.weight:0'",
        ),
        ({140317648128480: LESS}, "140317648128480 is not a group"),
        ({None: LESS}, "None is not a group"),
        ({"0.weight:0": [False] * 11}, "the masks of 0.weight:0 remove all indices of a dim in 0.weight"),
        ([LESS], "masks must be a dict by group names, not list"),
        (None, "masks must be a dict"),
    ],
)
def test_what_is_no_mask_is_refused(masks: Any, text: str) -> None:
    graph = depgraph.analyze(*chain())
    for use in (
        lambda: depgraph.build_plan(graph, masks),
        lambda: graph.mask("0.weight", masks),
        lambda: graph.keeps("0.weight", masks),
    ):
        with pytest.raises(InputError, match=text):
            use()


def test_masks_that_break_what_must_hold_are_refused() -> None:
    model, x = chain()
    stated = [
        lambda graph: graph.lock("2.weight:0", "is wired"),
        lambda graph: graph.at_least("0.weight:0", 9),
        lambda graph: graph.multiple_of("0.weight:0", 5),
    ]
    graph = depgraph.analyze(model, x, constraints=stated)
    for mask, text in (
        ({"2.weight:0": [True] * 12 + [False]}, "'2.weight:0' can't lose units: it is wired"),
        ({"0.weight:0": [False] * 3 + FULL[:8]}, "keep 8 indices where 9 must stay"),
        ({"0.weight:0": [False] * 2 + FULL[:9]}, "9 indices of 0.weight:0, which must be a multiple of 5"),
    ):
        with pytest.raises(InputError, match=text):
            depgraph.build_plan(graph, mask)
    assert not depgraph.build_plan(graph, {"2.weight:0": [True] * 13}).cuts
    assert depgraph.build_plan(graph, {"0.weight:0": LESS}).new_shape("0.weight") == (10, 5)
    with pytest.raises(InputError, match="keep 3 indices where 4 must stay"):
        depgraph.build_plan(
            depgraph.analyze(Top(), torch.randn(2, 5)), {"a.weight:0": [True] * 3 + [False] * 6}
        )


def test_masks_of_groups_that_need_equal_counts_fit_together() -> None:
    model, x = nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 9), nn.Linear(9, 3)), torch.randn(2, 5)
    graph = depgraph.analyze(model, x, constraints=lambda g: g.equal_counts(["0.weight:0", "1.weight:0"]))
    less = [True] * 7 + [False] * 2
    with pytest.raises(
        InputError, match=r"'0\.weight:0', '1\.weight:0' contradict each other \(keeps as many"
    ):
        depgraph.build_plan(graph, {"0.weight:0": less})
    assert depgraph.build_plan(graph, {"0.weight:0": less, "1.weight:0": less[::-1]}).cuts


def test_a_piece_may_go_where_no_dim_gets_empty() -> None:
    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(5, 6), nn.Linear(13, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], -1))

    graph = depgraph.analyze(Cat(), torch.randn(2, 5))
    with pytest.raises(InputError, match=r"the masks of a\.weight:0 remove all indices of a dim in a"):
        depgraph.build_plan(graph, {"a.weight:0": [False] * 7})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("2.weight:0"), "scores lack '2.weight:0'"),
        (lambda s: s.update({"2.weight": s["2.weight:0"]}), "'2.weight' is not a group of this graph, which has '2.weight:0'"),
        (lambda s: s.update({"0.weight:0": s["2.weight:0"]}), r"there are scores of shape \(13,\)"),
        (lambda s: s.update({"0.weight:0": s["0.weight:0"] * np.nan}), "there are NaN or infinite scores"),
        (lambda s: s.update({"0.weight:0": s["0.weight:0"] > 1}), "scores of type bool"),
        (lambda s: s.update({"0.weight:0": s["0.weight:0"] * 1j}), "scores of type complex128"),
        (lambda s: s.update({"0.weight:0": ["a"] * 11}), "scores of type <U1"),
        (lambda s: s.update({"0.weight:0": None}), "scores of type object"),
        (lambda s: s.update({"0.weight:0": 3.0}), r"scores of shape \(\)"),
    ],
)  # fmt: skip
def test_what_are_no_scores_is_refused(change: Callable[[dict[str, Any]], Any], text: str) -> None:
    graph = depgraph.analyze(*chain())
    scores: dict[str, Any] = dict(depgraph.scores_of(graph))
    change(scores)
    with pytest.raises(InputError, match=text):
        depgraph.choose(graph, scores)


def test_scores_may_be_lists_tensors_and_whole_numbers() -> None:
    graph = depgraph.analyze(*chain())
    scores = {"0.weight:0": list(range(11)), "2.weight:0": torch.arange(13, dtype=torch.bfloat16)}
    masks = depgraph.choose(graph, scores, pruning_ratio=0.5)
    assert [np.flatnonzero(~m).tolist() for m in masks.values()] == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("0.weigth", 0, [1]), "'0.weigth' is not a parameter or buffer of this model, which has '0.weight'"),
        ((None, 0, [1]), "None is not a parameter or buffer"),
        (("0.weight", 2, [1]), "'0.weight' has 2 dims, and no dim 2"),
        (("0.weight", None, [1]), "no dim None"),
        (("0.weight", True, [1]), "no dim True"),
        (("0.weight", 0.0, [1]), "no dim 0.0"),
        (("0.weight", 0, [11]), "must be whole numbers below 11, not 11"),
        (("0.weight", 0, [-12]), "must be whole numbers below 11, not -12"),
        (("0.weight", 0, [1.5]), "must be whole numbers below 11"),
        (("0.weight", 0, [1.0]), "must be whole numbers below 11"),
        (("0.weight", 0, FULL), "not bools\n  fix: np.flatnonzero"),
        (("0.weight", 0, [[1, 2]]), "must be whole numbers below 11"),
        (("0.weight", 0, [None]), "must be whole numbers below 11"),
        (("0.weight", 0, None), "must be whole numbers below 11, not None"),
        (("0.weight", 0, 3), "must be whole numbers below 11, not 3"),
        (("0.weight", 0, "12"), "must be whole numbers below 11, not '12'"),
    ],
)
def test_what_are_no_indices_is_refused(arguments: tuple[Any, ...], text: str) -> None:
    graph = depgraph.analyze(*chain())
    with pytest.raises(InputError) as caught:
        graph.coupled(*arguments)
    assert text in str(caught.value)


def test_indices_may_be_arrays_and_count_from_the_end() -> None:
    graph = depgraph.analyze(*chain())
    wanted = graph.coupled("0.weight", 0, [1, 10])
    for given in (np.array([1, -1]), torch.tensor([1, 10]), (i for i in (1, 10)), {1, 10}):
        found = graph.coupled("0.weight", -2, given)
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert graph.coupled("0.weight", 0, []) == {}


@pytest.mark.parametrize("name", ["0.weigth", None, 5])
def test_what_is_no_tensor_is_refused(name: Any) -> None:
    graph = depgraph.analyze(*chain())
    for use in (graph.keeps, graph.mask):
        with pytest.raises(InputError, match="is not a parameter or buffer of this model"):
            use(name, {})


# ------------------------------------------------------------------------------------------- a graph does not change


def state_of(graph: depgraph.DependencyGraph) -> list[Any]:
    return [
        [(g.name, g.units, len(g.members)) for g in graph.groups],
        graph.frozen,
        [(len(p), str(why)) for p, why in graph.constraints],
        graph.lock_summary(),
        list(graph.multiples),
        len(graph.state.at_least),
        len(graph.state.equal_counts),
    ]


class Compared(nn.Module):
    """Its forward compares sizes, which a plan would change."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y + 1 if y.shape[-1] > 6 else y
        return self.c(self.b(y).relu())


@pytest.mark.parametrize("options", [{"pruning_ratio": 0.5}, {"max_params": 0.5}, {"uniform": True}])
def test_two_prunes_of_one_graph_are_two_prunes(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = Compared().double().eval(), torch.randn(4, 5, dtype=torch.float64)
    graph = depgraph.analyze(model, x)
    before = state_of(graph)
    results = [depgraph.prune(model, x, graph=graph, **options) for _ in range(2)]
    fresh = depgraph.prune(model, x, **options)
    assert state_of(graph) == before
    for result in results:
        check_result(model, result, x)
        assert result.plan.to_json() == fresh.plan.to_json()
        assert result.report.to_dict()["locks"] == fresh.report.to_dict()["locks"]
    if "pruning_ratio" in options:  # the search froze something, and the report says what
        assert results[1].report.notes
        assert any("enters a comparison" in why.text for why, _ in results[1].report.locks)


def test_what_the_search_does_not_verify_is_free_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = chain()
    graph = depgraph.analyze(model, x)
    before, real = state_of(graph), depgraph.search.verify_values

    def fails(model: nn.Module, small: nn.Module, plan: depgraph.Plan, *rest: Any) -> Any:
        if "0.weight" in plan.cuts:
            raise depgraph.VerificationError("is not equal")
        return real(model, small, plan, *rest)

    monkeypatch.setattr("depgraph.search.verify_values", fails)
    result = depgraph.prune(model, x, graph=graph)
    assert [name for name, *_ in result.report.outline["groups"]] == ["2.weight:0"]
    assert result.report.notes == ["0.weight:0 stay whole: the result would differ from the masked original"]
    assert state_of(graph) == before
    monkeypatch.undo()
    assert depgraph.prune(model, x, graph=graph).model[0].out_features == 6


@pytest.mark.parametrize(
    "state",
    [
        lambda g: g.lock("0.weight:0"),
        lambda g: g.at_least("0.weight:0", 3),
        lambda g: g.multiple_of("0.weight:0", 2),
        lambda g: g.equal_counts(["0.weight:0", "0.weight:0"]),
    ],
)
def test_a_finished_graph_takes_no_statements(state: Callable[[depgraph.DependencyGraph], None]) -> None:
    seen: list[depgraph.DependencyGraph] = []
    graph = depgraph.analyze(*chain(), constraints=seen.append)
    assert seen == [graph]
    before = state_of(graph)
    with pytest.raises(
        InputError, match=r"finished.*\n  fix: analyze\(model, example_inputs, constraints=lambda"
    ):
        state(graph)
    assert state_of(graph) == before


def test_ratios_and_scopes_take_the_names_of_groups() -> None:
    """One piece of one dim is named by its group alone: the others keep all, and what can't shrink says why."""
    model, x = Attention().eval(), torch.randn(2, 7, 5)
    graph = depgraph.analyze(model, x)
    one = next(
        g for g in graph.groups if any(m.name == "qkv.weight" for m in g.members if m.role == "produces")
    )
    result = depgraph.prune(model, x, pruning_ratio={one.name: 0.5})
    check_result(model, result, x)
    assert result.plan.new_shape("qkv.weight") == (36, 11)
    scope = [depgraph.Scope(one.name, ratio=0.5)]
    result = depgraph.prune(model, x, pruning_ratio=0.3, scope=scope)
    check_result(model, result, x)
    assert result.plan.new_shape("qkv.weight")[0] == 36
    with pytest.raises(InputError, match=r"nothing can be removed: is a dim of a model output"):
        depgraph.prune(model, x, pruning_ratio={"last": 0.5})


def test_a_group_and_its_name_are_places() -> None:
    model, x = Pieces(), torch.randn(2, 5)
    for place in ("stem.weight:0[5:12]", lambda g: g.group("stem.weight:0[5:12]")):
        graph = depgraph.analyze(
            model, x, constraints=lambda g, place=place: g.lock(place if isinstance(place, str) else place(g))
        )
        assert [g.name for g in graph.groups] == ["stem.weight:0[0:5]"]


# ------------------------------------------------------------------------------------------------------ networkx


def test_networkx_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import depgraph\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "assert not new & {'networkx', 'rich', 'matplotlib'}, new\n"
        "from torch import nn\n"
        "model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))\n"
        "print(len(depgraph.analyze(model, torch.randn(1, 3)).to_networkx()), 'networkx' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.stdout == "7 True\n", said.stderr
