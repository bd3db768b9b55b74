"""Pictures of what pruning did and of what it could do. matplotlib is needed here alone; each function imports it.

Every function returns the `matplotlib.figure.Figure` that it drew, 1000 pixels wide, and writes it where a path is
given (the suffix says in which format). No window is opened, and matplotlib's own settings and figures stay as they are.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.errors import DepgraphError
from ..grouping.graph import DependencyGraph, Group
from ..report import Report

if TYPE_CHECKING:
    from ..prune import PruneResult
    from .sensitivity import Sensitivity
    from .sweep import Sweep

Piece = tuple[int, str, str]  # column, text, colour
Path_ = str | os.PathLike[str] | None
DPI = 100  # a figure 10 inches wide has 1000 pixels
WIDTH = 10.0
BEFORE, AFTER, LINES = (
    "#c9d3df",
    "#1f6f8b",
    ("#1f6f8b", "#d1495b", "#66a182", "#edae49", "#6d597a", "#8d6b4f", "#222222", "#d38fb0"),
)
FAINT = "#999999"
ROLES = {"produces": "#1f6f8b", "consumes": "#d1495b", "scales": "#4f8a4c"}
TOP = 80  # rows in a picture with a row for each layer or group
TREE = 80  # modules in a picture of the module tree
INDENT = 3  # characters
NAME = 40  # characters of a module's name there
COLUMNS = 125  # characters of its lines


def short(names: Sequence[str], length: int) -> list[str]:
    """Each of `names` in at most `length` characters: the end, which says most, and so much of the start as tells them apart."""
    tails = [(head, length - 1 - head) for head in range(0, length - 1, 3)]
    found = [[n if len(n) <= length else f"{n[:h]}…{n[len(n) - t :]}" for n in names] for h, t in tails]
    return max(found, key=lambda shortened: len(set(shortened)))


def _figure(height: float) -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise DepgraphError(
            "pictures need matplotlib\n  fix: pip install 'depgraph[pictures]' or pip install matplotlib"
        ) from error
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def check_available() -> None:
    """Before a long run whose result is to be drawn.

    Raises:
        DepgraphError: matplotlib is not installed.
    """
    _figure(1.0)


def _saved(figure: Any, path: Path_) -> Any:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
    return figure


def _plain(axes: Any, grid: str) -> None:
    """No box around the data, and a light grid along `grid`."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis=grid, color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend_above(axes: Any, columns: int) -> None:
    """A legend to the right of the title."""
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=columns, frameon=False, fontsize=9
    )


# -------------------------------------------------------------------------------------------------------- widths


def widths(result: PruneResult | Report, path: Path_ = None, top: int = TOP) -> Any:
    """How many units each layer puts out before and after, a bar each, in the order of the model.

    Args:
        result: what `prune` returned, or its report.
        path: where to write it.
        top: at most so many layers: those with the most units.

    Layers that only scale (norms) repeat the width of another one and are left out.
    """
    report = result if isinstance(result, Report) else result.report
    layers = [x for x in report.layers if len(report.plan.shapes.get(x.largest, (1, 1))) > 1]
    layers = layers or report.layers
    chosen = sorted(range(len(layers)), key=lambda i: -layers[i].width[0])[:top]
    shown = [layers[i] for i in sorted(chosen)]
    figure = _figure(1.2 + 0.22 * len(shown))
    axes = figure.add_subplot()
    rows = np.arange(len(shown))
    axes.barh(rows, [x.width[0] for x in shown], height=0.72, color=BEFORE, label="before")
    axes.barh(rows, [x.width[1] for x in shown], height=0.72, color=AFTER, label="after")
    for row, layer in enumerate(shown):
        before, after = layer.width
        text = f"{before:,}" if before == after else f"{before:,} → {after:,}"
        axes.annotate(text, (before, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(rows, short([x.module or "(the model)" for x in shown], 42), fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 1.14 * max((x.width[0] for x in shown), default=1))
    axes.set_xlabel("units put out")
    more = "" if len(shown) == len(layers) else f" (the {len(shown)} widest of {len(layers)} layers)"
    axes.set_title(f"Widths before and after{more}", loc="left", fontsize=11)
    _legend_above(axes, 2)
    _plain(axes, "x")
    axes.tick_params(axis="y", length=0)
    return _saved(figure, path)


# -------------------------------------------------------------------------------------------- score against cost


def trade_off(sweep: Sweep | Mapping[str, Sweep], path: Path_ = None) -> Any:
    """Score against what is left of MACs, parameters and (where it was measured) latency, a line for each argument.

    Args:
        sweep: what `depgraph.sweep` returned, or several of one model to compare (criteria, with and without recovery), by
            the name that each has in the picture. Rows that failed are left out; the picture says how many.
        path: where to write it.
    """
    sweeps = sweep if isinstance(sweep, Mapping) else {"": sweep}
    lines = {}
    for name, one in sweeps.items():
        arguments = list(dict.fromkeys(r.argument for r in one.rows))
        for argument in arguments:
            label = ": ".join(filter(None, (name, argument if not name or len(arguments) > 1 else "")))
            lines[label] = one, [r for r in one.rows if r.argument == argument and r.score is not None]
    costs = {"macs": "MACs", "params": "parameters", "latency": "latency"}
    costs = {k: v for k, v in costs.items() if all(getattr(s.dense, k) for s in sweeps.values())}
    figure = _figure(3.7)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, (key, text) in zip(panels, costs.items(), strict=True):
        for i, (label, (one, rows)) in enumerate(lines.items()):
            shares = [(one.left(r, key), r.score) for r in rows]
            found = sorted((100 * left, score) for left, score in shares if left is not None)
            xs, ys = [f[0] for f in found], [f[1] for f in found]
            axes.plot(xs, ys, marker="o", markersize=4, color=LINES[i % len(LINES)], label=label)
        _dense(axes, [s.dense.score for s in sweeps.values()])
        wholes = dict.fromkeys(_amount(getattr(s.dense, key), key) for s in sweeps.values())
        axes.set_xlabel(f"{text} left [% of {', '.join(wholes)}]")
        axes.set_xlim(0, max(104, axes.get_xlim()[1]))
        _plain(axes, "both")
    panels[0].set_ylabel("score")
    panels[0].legend(fontsize=8, frameon=False, loc="lower right")
    count = sum(len(s.rows) for s in sweeps.values())
    failed = count - sum(len(rows) for _, rows in lines.values())
    note = f" ({failed} of {count} rows failed)" if failed else ""
    figure.suptitle(f"Score against cost{note}", x=0.01, ha="left", fontsize=11)
    return _saved(figure, path)


def _dense(axes: Any, scores: Sequence[float | None]) -> None:
    """The models as they were given, at 100 %."""
    style = {"marker": "*", "markersize": 11, "color": "black", "linestyle": "", "label": "dense"}
    unique = list(dict.fromkeys(scores))
    for score in unique:
        axes.axhline(score, color="#999999", linewidth=0.9, linestyle="--")
    axes.plot([100] * len(unique), unique, **style)


def _amount(value: float, key: str) -> str:
    """``1.82 G``, or ``12.4 ms`` for a latency."""
    if key == "latency":
        return f"{value * 1e3:.3g} ms"
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,}"


# ---------------------------------------------------------------------------------------------------- sensitivity


def sensitivity(found: Sensitivity, path: Path_ = None, top: int = TOP) -> Any:
    """What each group costs when it alone is cut: lines for up to eight groups, a heat map for more.

    Args:
        found: what `depgraph.sensitivity` returned.
        path: where to write it.
        top: at most so many groups: those that cost most.
    """
    loss = found.losses()
    worst = [float(np.nanmax(row)) if np.isfinite(row).any() else np.inf for row in loss]
    order = sorted(range(len(worst)), key=lambda i: -worst[i])[:top]
    shown = sorted(order)
    lines = len(shown) <= 8
    draw = _sensitivity_lines if lines else _sensitivity_map
    figure = _figure(4.2 if lines else 1.5 + 0.24 * len(shown))
    draw(figure, found, shown, loss)
    more = "" if len(shown) == len(worst) else f" (the {len(shown)} of {len(worst)} that cost most)"
    figure.suptitle(f"Score lost when one group alone is cut{more}", x=0.01, ha="left", fontsize=11)
    return _saved(figure, path)


def _sensitivity_lines(figure: Any, found: Sensitivity, shown: Sequence[int], loss: Any) -> None:
    axes = figure.add_subplot()
    names = short([found.groups[g] for g in shown], 40)
    for i, g in enumerate(shown):
        style = {"color": LINES[i % len(LINES)], "linestyle": "-" if i < len(LINES) else "--"}
        axes.plot(
            [0, *found.ratios],
            [0, *loss[g]],
            marker="o",
            markersize=4,
            label=names[i],
            **style,
        )
    axes.set_xlabel("pruning ratio of the group")
    axes.set_ylabel("score lost")
    axes.set_xlim(0, None)
    _plain(axes, "both")
    figure.legend(loc="outside right center", fontsize=8, frameon=False)


def _sensitivity_map(figure: Any, found: Sensitivity, shown: Sequence[int], loss: Any) -> None:
    axes = figure.add_subplot()
    values = loss[list(shown)]
    high = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="OrRd", vmin=0, vmax=high or 1.0)
    axes.set_facecolor("#dddddd")
    axes.set_xticks(range(len(found.ratios)), [f"{r:g}" for r in found.ratios])
    axes.set_yticks(range(len(shown)), short([found.groups[g] for g in shown], 42), fontsize=8)
    axes.set_xlabel("pruning ratio of the group")
    for row in range(len(shown)):
        for column in range(len(found.ratios)):
            value = values[row, column]
            color = "white" if np.isfinite(value) and value > 0.6 * (high or 1.0) else "#333333"
            text = f"{value:.3g}" if np.isfinite(value) else "failed"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    axes.tick_params(length=0)
    figure.colorbar(
        image, ax=axes, label="score lost", shrink=min(1.0, 6 / max(1, len(shown)) + 0.3), pad=0.02
    )


# ------------------------------------------------------------------------------------------------ the module tree


@dataclass
class Line:
    """A module in the drawing of a tree.

    Attributes:
        text: its path below the module that it hangs on.
        depth: how many lines stand above it in the tree.
        parent: the number of the line that it hangs on; None at the top.
        tensors: those of its tensors that are drawn.
    """

    text: str
    depth: int
    parent: int | None
    tensors: list[str]


def group(graph: DependencyGraph, which: Group | str, path: Path_ = None, top: int = TREE) -> Any:
    """The modules and dims that one group ties together, on the module tree.

    Each line is a module and those of its tensors that lose entries, with their shapes; the dims that lose a unit together
    are coloured by what the tensor does with them.

    Args:
        graph: what `analyze` returned.
        which: a group, or its name (as `Group.name` and the report print it).
        path: where to write it.
        top: at most so many modules.

    Raises:
        InputError: the graph has no such group.
    """
    found = graph.group(which.name if isinstance(which, Group) else which)
    roles: dict[str, dict[int, str]] = {}
    share: Counter[tuple[str, int]] = Counter()  # indices of each dim that belong to the group
    for m in found.members:
        roles.setdefault(m.name, {}).setdefault(m.dim, m.role)
        share[m.name, m.dim] += m.indices.size
    order = {name: i for i, name in enumerate(graph.tensors)}
    lines = _tree(sorted(roles, key=order.__getitem__))
    shown = lines[:top]
    column = 3 + max(INDENT * x.depth + min(len(x.text), NAME) for x in shown)
    placed: list[list[Piece]] = []  # a row each; a module whose tensors do not fit has several
    rows = []
    for line in shown:
        rows.append(len(placed))
        placed += _wrapped(
            [_pieces(n, tuple(graph.tensors[n].shape), roles[n], share) for n in line.tensors], column
        )
    height = len(placed) + (len(lines) > top)
    figure = _figure(0.7 + 0.2 * height)
    axes = figure.add_subplot()
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(height - 0.3, -0.7)
    axes.axis("off")
    style = {"family": "monospace", "fontsize": 8.5, "va": "center"}
    for line, row in zip(shown, rows, strict=True):
        indent = INDENT * line.depth
        if line.parent is not None:  # the corner that hangs it on the module above
            xs = [indent - 2.2, indent - 2.2, indent - 0.5]
            axes.plot(xs, [rows[line.parent] + 0.45, row, row], color="#bbbbbb", linewidth=0.9)
        axes.text(indent, row, short([line.text], NAME)[0], weight="bold", **style)
    for row, pieces in enumerate(placed):
        for at, text, color in pieces:
            bold = "bold" if color in ROLES.values() else "normal"
            axes.text(at, row, text, color=color, weight=bold, **style)
    if len(lines) > top:
        axes.text(0, height - 1, f"… and {len(lines) - top} more modules", color="#666666", **style)
    units = f"{found.units:,} units in {len(roles)} tensors"
    axes.set_title(f"Group {short([found.name], 60)[0]}: {units}", loc="left", fontsize=11)
    for role, color in ROLES.items():
        if any(role in r.values() for r in roles.values()):
            axes.plot([], [], marker="s", linestyle="", color=color, label=role)
    _legend_above(axes, 3)
    return _saved(figure, path)


def _tree(names: Sequence[str]) -> list[Line]:
    """The modules of the tensors `names`, each below the one it is part of; a lone child is joined to its parent."""
    below: dict[str, dict[str, None]] = {}
    own: dict[str, list[str]] = {}
    for name in names:
        path = name.rpartition(".")[0]
        own.setdefault(path, []).append(name)
        while path:
            parent = path.rpartition(".")[0]
            below.setdefault(parent, {})[path] = None
            path = parent
    lines = [Line("(the model)", 0, None, own[""])] if "" in own else []

    def walk(path: str, depth: int, parent: int | None) -> None:
        for child in below.get(path, {}):
            start = len(path) + 1 if path else 0
            last = child
            while last not in own and len(below[last]) == 1:
                last = next(iter(below[last]))
            lines.append(Line(last[start:], depth, parent, own.get(last, [])))
            walk(last, depth + 1, len(lines) - 1)

    walk("", 0, None)
    return lines


def _pieces(
    name: str, shape: tuple[int, ...], roles: dict[int, str], share: Mapping[tuple[str, int], int]
) -> list[tuple[str, str]]:
    """``weight [64 × 3]`` in pieces, each with its colour; ``40 of 64`` where only some indices belong to the group."""
    parts = [(f"{short([name.rpartition('.')[2]], 24)[0]} ", "black"), ("[", FAINT)]
    for d, size in enumerate(shape):
        parts += [(" × ", FAINT)] if d else []
        mine = share.get((name, d), size)
        text = str(size) if mine >= size else f"{mine} of {size}"
        parts.append((text, ROLES[roles[d]] if d in roles else FAINT))
    return [*parts, ("]", FAINT)]


def _wrapped(tensors: Sequence[Sequence[tuple[str, str]]], column: int) -> list[list[Piece]]:
    """Rows of (column, text, colour) from `column` on, with as many tensors in each as fit; at least one row."""
    rows: list[list[Piece]] = [[]]
    at = column
    for pieces in tensors:
        length = sum(len(text) for text, _ in pieces)
        if at > column and at + length > COLUMNS:
            rows.append([])
            at = column
        for text, color in pieces:
            rows[-1].append((at, text, color))
            at += len(text)
        at += 3
    return rows
