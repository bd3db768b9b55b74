"""The parts of a selection, each against what is written out by hand: floors, blocks, their steps."""

from __future__ import annotations

import ast
import importlib
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.axes.axes import Axis, Reason, concat, product
from depgraph.base.errors import InputError
from depgraph.select import Request
from depgraph.select.aligned import check_round_to
from depgraph.select.blocks import Block, Sequencer, find_blocks
from depgraph.select.floors import Floors
from depgraph.select.selection import Selection


def fragments(*sizes: int) -> list[Axis]:
    """Axes that are parts of one original dim."""
    found = [Axis(n) for n in sizes]
    whole = Axis(sum(sizes) + 1)
    for axis in found:
        axis.original_axis = whole
    return found


def floors_of(dims: list[Axis], chosen: list[Axis], *at_least: tuple[Axis, int]) -> Floors:
    state = SimpleNamespace(dims={"node": [[None, *dims]]}, at_least=at_least)
    return Floors(SimpleNamespace(state=state), chosen)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ floors


def test_a_unit_stays_of_each_dim_and_of_what_makes_up_one() -> None:
    own, hidden = Axis(5), Axis(6)  # the second is the dim of no tensor that ops give
    alone, heads, width, p, q, r, s, outer, inner = fragments(3, 4, 5, 6, 7, 8, 9, 2, 3)
    fixed = Axis(4)
    dims = [own, alone, product([heads, width]), concat([p, q]), concat([r, product([outer, inner])]),
            concat([s, fixed])]  # fmt: skip
    chosen = [own, hidden, alone, heads, width, p, q, r, s, outer, inner]
    floors = floors_of(dims, chosen)
    ones = {own, hidden, alone, heads, width, outer, inner}
    assert floors.least == {a: int(a in ones) for a in chosen}
    assert floors.needs == [[p, q]]
    assert floors_of([concat([p, q]), p], [p, q]).needs == []  # what has a floor of its own needs no other


def test_what_a_minimum_holds_of_each_part() -> None:
    atom, heads, free_heads, free_width, piece = Axis(10), Axis(4), Axis(4), Axis(5), Axis(6)
    wide, fixed = product([heads, Axis(5)]), Axis(5)
    floors = floors_of(
        [], [atom, heads, free_heads, free_width, piece],
        (atom, 7), (atom, 3), (wide, 12), (product([free_heads, free_width]), 2), (concat([piece, fixed]), 3),
    )  # fmt: skip
    # The larger of two; 12 of 20 are 3 heads of 5; factors that may both shrink, and pieces, stay whole.
    assert floors.least == {atom: 7, heads: 3, free_heads: 4, free_width: 5, piece: 6}
    assert floors_of([], [heads], (wide, 11)).least == {heads: 3}
    assert floors_of([], [heads], (wide, 10)).least == {heads: 2}


def test_where_parts_of_a_dim_are_of_several_blocks_the_largest_keeps_a_unit() -> None:
    p, q, r, s = fragments(6, 7, 8, 9)
    floors = floors_of([concat([p, q]), concat([r, s])], [p, q, r, s])
    floors.spread({p: 0, q: 0, r: 1, s: 2})
    assert floors.least == {p: 0, q: 0, r: 0, s: 1}
    assert floors.needs == [[p, q]]


# ------------------------------------------------------------------------------------------------------ blocks


def group(axis: Axis, name: str = "") -> Any:
    return SimpleNamespace(axis=axis, units=axis.size, name=name)


def ordered(
    moves: list[dict[Axis, int]], scores: dict[Axis, list[float]], caps: dict[Axis, int], floors: Any
) -> Block:
    block = Block([group(a) for a in scores], moves)
    ranked = {a: np.array(s, dtype=float) for a, s in scores.items()}
    Sequencer(ranked, floors).order(block, caps)
    return block


def test_blocks_are_what_constraints_and_original_dims_join() -> None:
    a, b, alone = Axis(4), Axis(4), Axis(4)
    c, d = fragments(3, 5)
    relation = {(a,): 1, (b,): -1}
    found = find_blocks(
        [group(x, n) for x, n in ((a, "a"), (c, "c"), (b, "b"), (alone, "e"), (d, "d"))], [relation]
    )  # type: ignore[list-item]
    assert sorted((sorted(block.names), rules) for block, rules in found) == [
        (["a", "b"], [relation]), (["c", "d"], []), (["e"], []),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("caps", "times"), [({}, 6), ({0: 5}, 2), ({0: 4}, 2), ({0: 3}, 1), ({1: 4}, 4), ({0: 9, 1: 3}, 3)]
)
def test_one_move_is_taken_as_often_as_floors_and_caps_allow(caps: dict[int, int], times: int) -> None:
    """Two of the one with each of the other: the average score of three units a step."""
    a, b = Axis(13), Axis(7)
    scores = {a: [float(i + 1) for i in range(13)], b: [10.0 * (i + 1) for i in range(7)]}
    floors = SimpleNamespace(least={a: 1, b: 0}, needs=[])  # one stays in any case
    block = ordered([{a: 2, b: 1}], scores, {(a, b)[i]: n for i, n in caps.items()}, floors)
    assert block.gone[a].tolist() == [2 * i for i in range(times + 1)]
    assert block.gone[b].tolist() == list(range(times + 1))
    assert block.taken.tolist() == [3] * times
    wanted = [
        (1 + 2 + 10) / 3,
        (3 + 4 + 20) / 3,
        (5 + 6 + 30) / 3,
        (7 + 8 + 40) / 3,
        (9 + 10 + 50) / 3,
        (11 + 12 + 60) / 3,
    ]
    assert block.scores == pytest.approx(wanted[:times])


def test_a_cap_counts_all_fragments_of_a_dim() -> None:
    p, q = fragments(6, 6)
    floors = SimpleNamespace(least={p: 1, q: 1}, needs=[])
    block = ordered([{p: 1, q: 1}], {p: [1.0] * 6, q: [1.0] * 6}, {p.original_axis: 5}, floors)
    assert block.gone[p].tolist() == block.gone[q].tolist() == [0, 1, 2]


def test_of_several_moves_the_cheapest_goes_first() -> None:
    p, q = fragments(3, 5)
    scores, moves = {p: [1.0, 5.0, 9.0], q: [2.0, 3.0, 4.0, 6.0, 7.0]}, [{p: 1}, {q: 1}]
    free = SimpleNamespace(least={p: 0, q: 0}, needs=[[p, q]])
    block = ordered(moves, scores, {}, free)
    assert block.gone[p].tolist() == [0, 1, 1, 1, 1, 2, 2, 2]  # the last unit of both stays
    assert block.gone[q].tolist() == [0, 0, 1, 2, 3, 3, 4, 5]
    assert block.scores.tolist() == [1, 2, 3, 4, 5, 6, 7]
    block = ordered(moves, scores, {p.original_axis: 3}, free)
    assert (block.gone[p].tolist(), block.gone[q].tolist()) == ([0, 1, 1, 1], [0, 0, 1, 2])
    block = ordered(moves, scores, {}, SimpleNamespace(least={p: 0, q: 3}, needs=[[p, q]]))
    assert (block.gone[p].tolist(), block.gone[q].tolist()) == ([0, 1, 1, 1, 2, 3], [0, 0, 1, 2, 2, 2])


# ------------------------------------------------------------------------------------------------ a whole selection


class Chain(nn.Sequential):
    """Linear layers of these widths."""

    def __init__(self, *widths: int) -> None:
        sizes = [5, *widths, 3]
        super().__init__(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


class Joined(nn.Module):
    """Two convolutions side by side into a third."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.left, self.right, self.last = (
            nn.Conv2d(3, left, 1),
            nn.Conv2d(3, right, 1),
            nn.Conv2d(left + right, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x), self.right(x)], 1))


def graph_of(*widths: int) -> depgraph.DependencyGraph:
    return depgraph.analyze(Chain(*widths).eval(), torch.randn(2, 5))


def ramps(graph: depgraph.DependencyGraph) -> dict[str, np.ndarray]:
    return {g.name: np.arange(1.0, g.units + 1) for g in graph.groups}


def test_a_ratio_counts_what_went_before() -> None:
    """Of 10 and 2 that are gone a half is 6, so 4 more go; 14 that are gone are more than a half of 24."""
    graph = graph_of(10)
    (g,) = graph.groups
    for lost, ratio, left in ((2, 0.5, 6), (0, 0.5, 5), (14, 0.5, None), (4, 0.9, 2)):
        found = Selection(graph, ramps(graph), ratio=ratio, lost={g.axis.original_axis: lost}).choose()
        assert (
            found == {} if left is None else found[g.name].tolist() == [False] * (10 - left) + [True] * left
        )


def test_units_that_compete_lose_a_share_of_what_all_had() -> None:
    """Of 10 + 8, and 2 + 4 that are gone, a half is 12: the 6 lowest go."""
    graph = graph_of(10, 8)
    one, other = sorted(graph.groups, key=lambda g: -g.units)
    lost = {one.axis.original_axis: 2, other.axis.original_axis: 4}
    scores = {one.name: np.arange(10.0), other.name: np.arange(8.0) + 1.5}
    found = Selection(graph, scores, ratio=0.5, scope="global", normalise="none", lost=lost).choose()
    assert {n: int((~m).sum()) for n, m in found.items()} == {
        one.name: 4,
        other.name: 2,
    }  # 0 1 [1.5] 2 [2.5] 3


def test_what_a_tie_joins_goes_in_step() -> None:
    graph = graph_of(10, 10, 7)
    a, b = (graph.dims(f"{i}.bias")[0].find() for i in (0, 1))  # type: ignore[union-attr]
    apart = Selection(graph, ramps(graph)).blocks
    tied = Selection(graph, ramps(graph), ties=[({(a,): 1, (b,): -1}, Reason("are equal"))]).blocks
    assert sorted(len(block.groups) for block in apart) == [1, 1, 1]
    assert sorted(len(block.groups) for block in tied) == [1, 2]


def test_widths_that_are_asked_to_be_multiples_are_such_after_each_step() -> None:
    graph = graph_of(22)
    assert Selection(graph, ramps(graph), 4).blocks[0].allowed.tolist() == [0, 2, 6, 10, 14, 18]
    assert Selection(graph, ramps(graph), 1).blocks[0].allowed.tolist() == list(range(22))
    assert Selection(graph, ramps(graph), "auto").blocks[0].allowed.tolist() == list(
        range(22)
    )  # no convolution


@pytest.mark.parametrize(
    ("left", "right", "wanted"),
    [
        (24, 28, [range(0, 24, 4), range(0, 28, 4)]),
        (22, 26, [range(22), range(26)]),  # each for itself, though 48 are twelve times 4
        (24, 26, [range(0, 24, 4), range(26)]),
        (12, 8, [range(12), range(8)]),  # a step of 4 would be more than a quarter
    ],
)
def test_channels_that_come_in_fours_stay_so(left: int, right: int, wanted: list[range]) -> None:
    graph = depgraph.analyze(Joined(left, right).eval(), torch.randn(1, 3, 2, 2))
    selection = Selection(graph, ramps(graph), "auto")
    found = {block.units: block.allowed.tolist() for block in selection.blocks}
    assert found == {n: list(steps) for n, steps in zip((left, right), wanted, strict=True)}


# --------------------------------------------------------------------------------------------------- the request


@pytest.mark.parametrize("wrong", ["nicely", "", None, ["mean"], 1])
def test_a_request_is_refused_when_it_is_made(wrong: Any) -> None:
    with pytest.raises(InputError, match="normalise must be one of none, mean, sum, max, standard, not"):
        Request(normalise=wrong)


def test_the_largest_multiple_is_the_largest_dim() -> None:
    check_round_to(2_147_483_647)
    with pytest.raises(InputError, match="round_to"):
        check_round_to(2_147_483_648)


def test_a_package_lists_what_others_take_from_it() -> None:
    """Whatever a module of depgraph imports from `depgraph.select` is in its `__all__`."""
    root, listed = Path(depgraph.__file__).parent, importlib.import_module("depgraph.select").__all__
    for path in root.rglob("*.py"):
        text = path.read_text()
        if "select import" not in text or path.is_relative_to(root / "select"):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module in ("select", "depgraph.select"):
                assert {alias.name for alias in node.names} <= set(listed), path
