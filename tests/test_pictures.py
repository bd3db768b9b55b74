"""What the pictures hold: the numbers of the data that they were drawn from, and every file is one that opens."""

from __future__ import annotations

import struct
import sys
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph import pictures
from depgraph.exploring.pictures import AFTER, BEFORE, ROLES, short
from depgraph.report import Layer

pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex


def png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG whose every chunk has the right checksum and which has an end."""
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds, size = 8, [], (0, 0)
    while at < len(raw):
        (length,) = struct.unpack(">I", raw[at : at + 4])
        kind, data = raw[at + 4 : at + 8], raw[at + 8 : at + 8 + length]
        assert struct.unpack(">I", raw[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + data)
        if kind == b"IHDR":
            size = struct.unpack(">II", data[:8])
        kinds.append(kind)
        at += 12 + length
    assert kinds[-1] == b"IEND"
    return size


def assert_inside(figure: Any) -> None:
    """No text is cut off at an edge, and none of a row's texts lies on another."""
    FigureCanvasAgg(figure).draw()
    width, height = figure.bbox.width, figure.bbox.height
    boxes = []
    for axes in figure.axes:
        labels = [*axes.get_yticklabels(), axes.xaxis.label, axes.yaxis.label]
        shown = [
            t
            for t in (*axes.texts, *(labels if axes.axison else ()), axes._left_title)
            if t.get_text().strip()
        ]
        boxes += [(t.get_window_extent(), t.get_text()) for t in shown]
    for box, text in boxes:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    rows: dict[int, list[tuple[float, float, str]]] = {}
    for box, text in boxes:
        rows.setdefault(round(box.y0), []).append((box.x0, box.x1, text))
    for row in rows.values():
        for (_, end, left), (start, _, right) in pairwise(sorted(row)):
            assert end <= start + 1, (left, right)


def texts_of(axes: Any) -> list[str]:
    return [t.get_text() for t in axes.texts]


# --------------------------------------------------------------------------------------------------------- widths


def bars(axes: Any, color: str) -> list[float]:
    return [p.get_width() for p in axes.patches if to_hex(p.get_facecolor()) == color]


def test_the_bars_are_the_widths_of_both_models(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    result = depgraph.prune(net, x, pruning_ratio=0.4)
    figure = pictures.widths(result, tmp_path / "deep" / "widths.png")
    assert png_size(tmp_path / "deep" / "widths.png")[0] == 1000
    (axes,) = figure.axes
    layers = ["stem", "up", "down", "wide", "narrow", "head"]
    for model, color in ((net, BEFORE), (result.model, AFTER)):
        assert bars(axes, color) == [model.get_submodule(n).weight.shape[0] for n in layers]
    assert [t.get_text() for t in axes.get_yticklabels()] == layers
    assert texts_of(axes) == ["11 → 7", "19 → 12", "11 → 7", "29 → 18", "11 → 7", "5"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first layer on top
    again = pictures.widths(result.report)
    assert bars(again.axes[0], AFTER) == bars(axes, AFTER)


def test_many_layers_are_the_widest_in_the_order_of_the_model(
    net: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    report = depgraph.prune(net, x).report
    sizes = [(37 * i) % 307 + 2 for i in range(300)]
    name = "a_module_with_a_long_name." * 3
    report.__dict__["layers"] = [Layer(f"{name}{i}", (1, 1), (n, n // 2)) for i, n in enumerate(sizes)]
    figure = pictures.widths(report, tmp_path / "many.png", top=50)
    width, height = png_size(tmp_path / "many.png")
    assert (width, 1000 < height < 1500) == (1000, True)
    (axes,) = figure.axes
    chosen = sorted(sorted(range(300), key=lambda i: -sizes[i])[:50])
    assert bars(axes, BEFORE) == [sizes[i] for i in chosen]
    assert bars(axes, AFTER) == [sizes[i] // 2 for i in chosen]
    labels = [t.get_text() for t in axes.get_yticklabels()]
    assert_inside(figure)
    assert labels[7].endswith(f".{chosen[7]}")
    assert max(map(len, labels)) <= 42
    assert "the 50 widest of 300 layers" in axes.get_title(loc="left")


def test_short_names_can_be_told_apart() -> None:
    assert short(["abc", "abcdefghij"], 7) == ["abc", "…efghij"]
    layers = [f"encoder.layer.{i}.attention.self.query.weight" for i in range(12)]
    assert short(layers, 33)[3] == "…er.3.attention.self.query.weight"
    blocks = [f"{side}_blocks.0.transformer.attention.query" for side in ("down", "mid", "up")]
    assert short(blocks, 20) == ["dow….attention.query", "mid….attention.query", "up_….attention.query"]
    for names, length in ((layers, 30), (blocks, 20), (layers, 12)):
        found = short(names, length)
        assert max(map(len, found)) <= length
    assert len(set(short(layers, 30))) == 12


# ------------------------------------------------------------------------------------------------------ trade-off


def row(
    argument: str, value: float, macs: int, params: int, seconds: float | None, score: float | None
) -> Any:
    speedup = (
        0.005 / seconds if seconds else None
    )  # measured beside a dense model that was slower at the time
    error = None if score else "no"
    return depgraph.Row(argument, value, params, macs, 4 * params, seconds, score, error, speedup)


def test_the_curve_has_each_row_at_its_place(tmp_path: Path) -> None:
    rows = [
        row("pruning_ratio", 0.1, 800, 90, 0.003, 0.9),
        row("pruning_ratio", 0.5, 300, 40, 0.002, 0.7),
        row("pruning_ratio", 0.7, 200, 30, 0.001, None),
        row("max_macs", 0.6, 600, 80, 0.0028, 0.85),
    ]
    sweep = depgraph.Sweep(row("dense", 0, 1000, 200, 0.004, 0.95), rows)
    figure = sweep.plot(tmp_path / "curve.png")
    assert png_size(tmp_path / "curve.png") == (1000, 370)
    found = [{line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes]
    assert found[0]["pruning_ratio"] == [[30.0, 0.7], [80.0, 0.9]]
    assert found[0]["max_macs"] == [[60.0, 0.85]]
    assert found[0]["dense"] == [[100.0, 0.95]]
    assert found[1]["pruning_ratio"] == [[20.0, 0.7], [45.0, 0.9]]
    assert np.allclose(found[2]["pruning_ratio"], [[40.0, 0.7], [60.0, 0.9]])
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["MACs left [% of 1 k]", "parameters left [% of 200]", "latency left [% of 4 ms]"]
    assert "1 of 4 rows failed" in figure.get_suptitle()


def test_several_sweeps_in_one_picture() -> None:
    one = depgraph.Sweep(row("dense", 0, 10, 9, None, 0.9), [row("max_macs", 0.1, 8, 8, None, 0.5)])
    both = [row("max_macs", 0.1, 7, 8, None, 0.4), row("max_params", 0.1, 6, 8, None, 0.3)]
    two = depgraph.Sweep(row("dense", 0, 10, 9, 0.1, 0.95), both)
    axes = pictures.trade_off({"l1": one, "taylor": two}).axes
    found = {line.get_label(): line.get_xydata().tolist() for line in axes[0].lines}
    assert len(axes) == 2
    assert found["l1"] == [[80, 0.5]]
    assert found["taylor: max_macs"] == [[70, 0.4]]
    assert found["taylor: max_params"] == [[60, 0.3]]
    assert found["dense"] == [[100, 0.9], [100, 0.95]]


def test_no_panel_for_a_latency_that_was_not_measured() -> None:
    sweep = depgraph.Sweep(row("dense", 0, 9, 9, None, 0.9), [row("pruning_ratio", 0.1, 8, 8, None, 0.5)])
    assert len(sweep.plot().axes) == 2


def test_a_sweep_of_which_all_rows_failed() -> None:
    sweep = depgraph.Sweep(row("dense", 0, 9, 9, None, 0.9), [row("pruning_ratio", 0.1, 8, 8, None, None)])
    assert "1 of 1 rows failed" in sweep.plot().get_suptitle()


# ---------------------------------------------------------------------------------------------------- sensitivity


def scan(groups: int, ratios: tuple[float, ...] = (0.2, 0.5, 0.7)) -> depgraph.Sensitivity:
    names = [f"layers.{i}.weight:0" for i in range(groups)]
    scores = 0.9 - np.outer(1 + (np.arange(groups) * 7) % max(groups, 1), ratios) / (2 * groups)
    return depgraph.Sensitivity(0.9, names, [n[:-2] for n in names], ratios, scores)


def test_a_few_groups_are_lines(tmp_path: Path) -> None:
    found = scan(3)
    figure = found.plot(tmp_path / "lines.png")
    assert png_size(tmp_path / "lines.png")[0] == 1000
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == found.groups
    for line, losses in zip(lines, found.losses(), strict=True):
        assert line.get_xdata().tolist() == [0, 0.2, 0.5, 0.7]
        assert line.get_ydata().tolist() == [0, *losses]


def test_many_groups_are_a_map_of_those_that_cost_most(tmp_path: Path) -> None:
    found = scan(300)
    found.scores[17, 1] = np.nan
    figure = pictures.sensitivity(found, tmp_path / "map.png", top=40)
    width, height = png_size(tmp_path / "map.png")
    assert (width, 900 < height < 1300) == (1000, True)
    axes = figure.axes[0]
    worst = np.nanmax(found.losses(), axis=1)
    chosen = sorted(np.argsort(-worst, kind="stable")[:40])
    shown = axes.images[0].get_array()
    assert np.ma.allequal(shown, np.ma.masked_invalid(found.losses()[chosen]))
    assert [t.get_text() for t in axes.get_yticklabels()] == [found.groups[i] for i in chosen]
    assert texts_of(axes)[:3] == [f"{v:.3g}" for v in found.losses()[chosen[0]]]
    assert "the 40 of 300 that cost most" in figure.get_suptitle()
    assert_inside(figure)


def test_what_failed_is_in_the_map() -> None:
    found = scan(11)
    found.scores[4] = np.nan
    axes = pictures.sensitivity(found).axes[0]
    assert texts_of(axes)[12:15] == ["failed"] * 3
    assert axes.images[0].get_array().mask[4].all()


# --------------------------------------------------------------------------------------------------------- a group


def drawn(axes: Any) -> dict[str, list[tuple[str, str]]]:
    """Module -> (text, colour) of the pieces beside it, left to right; rows by their height in the picture."""
    rows: dict[float, list[tuple[float, str, str]]] = {}
    for t in axes.texts:
        x, y = t.get_position()
        rows.setdefault(y, []).append((x, t.get_text(), to_hex(t.get_color())))
    found = {}
    for y in sorted(rows):
        first, *rest = sorted(rows[y])
        found[first[1]] = [(text, color) for _, text, color in rest]
    return found


def coloured(pieces: list[tuple[str, str]]) -> list[tuple[str, str]]:
    role = {color: name for name, color in ROLES.items()}
    return [(text, role[color]) for text, color in pieces if color in role]


def test_a_group_on_the_module_tree(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    graph = depgraph.analyze(net, x)
    figure = pictures.group(graph, "stem.weight:0", tmp_path / "group.png")
    assert png_size(tmp_path / "group.png")[0] == 1000
    (axes,) = figure.axes
    found = drawn(axes)
    assert list(found) == ["stem", "norm", "up", "down", "wide", "narrow", "head"]
    assert "".join(text for text, _ in found["up"]) == "weight [19 × 11 × 3 × 3]"
    assert {module: coloured(pieces) for module, pieces in found.items()} == {
        "stem": [("11", "produces"), ("11", "scales")], "norm": [("11", "scales")] * 4, "up": [("11", "consumes")],
        "down": [("11", "produces"), ("11", "scales")], "wide": [("11", "consumes")],
        "narrow": [("11", "produces"), ("11", "scales")], "head": [("11", "consumes")],
    }  # fmt: skip
    assert axes.get_title(loc="left") == "Group stem.weight:0: 11 units in 13 tensors"
    with pytest.raises(depgraph.InputError, match=r"'stem' is not a group.*stem\.weight:0"):
        pictures.group(graph, "stem")


class Nested(nn.Module):
    """Two groups joined by cat, in modules within modules, and a parameter of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleDict({"deep": nn.ModuleDict({"er": nn.Linear(3, 7)})})
        self.right = nn.Linear(3, 5)
        self.scale = nn.Parameter(torch.ones(12))
        self.out = nn.ModuleList([nn.Linear(12, 2), nn.Linear(12, 2)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.left["deep"]["er"](x), self.right(x)), -1) * self.scale
        return self.out[0](x) + self.out[1](x)


def test_a_group_that_has_a_part_of_a_dim() -> None:
    graph = depgraph.analyze(Nested().eval(), torch.randn(2, 3))
    found = drawn(pictures.group(graph, "left.deep.er.weight:0").axes[0])
    assert list(found) == ["(the model)", "left.deep.er", "out", "0", "1"]
    assert coloured(found["(the model)"]) == [("7 of 12", "scales")]
    assert coloured(found["0"]) == coloured(found["1"]) == [("7 of 12", "consumes")]
    assert coloured(found["left.deep.er"]) == [("7", "produces"), ("7", "scales")]
    assert found["out"] == []


class Wide(nn.Module):
    """Tensors of five dims and names that do not fit beside one another."""

    def __init__(self) -> None:
        super().__init__()
        self.a_module_whose_name_is_far_too_long_for_its_column = nn.ModuleDict(
            {"also_long": nn.Conv3d(3, 1234, 1)}
        )
        self.out = nn.Conv3d(1234, 2, 1)
        names = [f"factor_number_{i}_of_the_lot" for i in range(9)]
        for name in names:
            setattr(self, name, nn.Parameter(torch.ones(1, 1234, 1, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a_module_whose_name_is_far_too_long_for_its_column["also_long"](x)
        for i in range(9):
            x = x * getattr(self, f"factor_number_{i}_of_the_lot")
        return self.out(x)


def test_tensors_that_do_not_fit_beside_one_another() -> None:
    graph = depgraph.analyze(Wide().eval(), torch.randn(1, 3, 2, 2, 2))
    figure = pictures.group(graph, graph.groups[0])
    assert_inside(figure)
    assert texts_of(figure.axes[0]).count("1234") == 9 + 2 + 1


def test_a_group_of_many_modules(tmp_path: Path) -> None:
    layers = [nn.Linear(7, 7) for _ in range(100)]

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.layers, self.out = nn.Linear(3, 7), nn.ModuleList(layers), nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            for layer in self.layers:
                x = x + layer(x).relu()
            return self.out(x)

    graph = depgraph.analyze(Chain().eval(), torch.randn(2, 3))
    figure = pictures.group(graph, graph.groups[0], tmp_path / "many.png", top=30)
    assert "… and 73 more modules" in texts_of(figure.axes[0])  # enter, layers, 100 of them, out
    assert png_size(tmp_path / "many.png")[1] < 800
    assert_inside(figure)


# ----------------------------------------------------------------------------------------------------- matplotlib


def test_without_matplotlib_the_error_says_what_to_install(
    net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(depgraph.DepgraphError, match=r"pip install 'depgraph\[pictures\]'"):
        pictures.widths(depgraph.prune(net, x))


def test_matplotlib_is_left_as_it_was(net: nn.Module, x: Tensor) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    pictures.widths(depgraph.prune(net, x))
    assert dict(mpl.rcParams) == before
