"""The rows of the coverage benchmark as a table, a summary and a page of Markdown."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from benchmarks.isolate import Row

MUCH = 0.6  # a model with a larger fraction of its parameters left needs an explanation
REASONS = 10  # how many reasons for frozen axes the summary names
COLUMNS = (
    "model",
    "verdict",
    "traced",
    "groups",
    "reachable params",
    "reachable MACs",
    "params left",
    "MACs left",
    "deviation",
    "backward",
    "class kept",
    "s",
)
WORDS = ("model", "verdict", "note")  # columns that are read from the left
PEER_COLUMNS = ("TP: params left", "runs", "outputs kept", "s")


def table(title: str, rows: Sequence[Row], peers: dict[str, Row]) -> Table:
    """A rich table with one line a model."""
    result = Table(title=title)
    for column in _columns(peers):
        result.add_column(column, justify="left" if column in WORDS else "right", no_wrap=column == "model")
    for row in rows:
        style = {"right": None, "shapes": "yellow"}.get(row["verdict"], "red")
        result.add_row(*_cells(row, peers), style=style)
    return result


def markdown(title: str, rows: Sequence[Row], peers: dict[str, Row]) -> str:
    """The same table, with the summary above it, in Markdown."""
    columns = _columns(peers)
    alignment = ["---" if column in WORDS else "---:" for column in columns]
    lines = [_line(columns), _line(alignment)]
    lines += [_line([cell.replace("|", "\\|") for cell in _cells(row, peers)]) for row in rows]
    points = "\n".join(f"* {point}" for point in summary(rows, peers))
    return f"## {title}\n\n{points}\n\n" + "\n".join(lines) + "\n"


def summary(rows: Sequence[Row], peers: dict[str, Row]) -> list[str]:
    """What the table says, in a few sentences."""
    verdicts = Counter(row["verdict"] for row in rows)
    pruned = [row for row in rows if row["verdict"] in ("right", "shapes")]
    points = [
        f"{len(rows)} models: {verdicts['right']} right, {verdicts['shapes']} right in shapes only, "
        f"{verdicts['wrong']} wrong, {verdicts['failed']} failed"
    ]
    if pruned:
        points += [
            *_fractions(pruned),
            *_planning(pruned),
            _classes(pruned),
            *_configs(pruned),
            *_much_left(pruned),
        ]
    points += _reasons(rows)
    points += [
        f"{row['name']} {row['verdict']}: {row['why']}"
        for row in rows
        if row["verdict"] in ("wrong", "failed")
    ]
    return points + _peer_summary([peers[row["name"]] for row in rows if row["name"] in peers])


def _fractions(pruned: Sequence[Row]) -> list[str]:
    """Medians over the models that came out right."""
    medians = {key: statistics.median(row[key] for row in pruned) for key in ("params", "macs", "seconds")}
    deviations = [_deviation(row) or 0.0 for row in pruned if row["verdict"] == "right"]
    points = [
        f"median of parameters left {medians['params']:.3f}, of MACs left {medians['macs']:.3f}; "
        f"median time {medians['seconds']:.1f} s"
    ]
    if deviations:
        points.append(f"largest relative deviation from the masked original {max(deviations):.1e}")
    return points


def _planning(pruned: Sequence[Row]) -> list[str]:
    """How long it takes to trace, group, rank and plan."""
    times = [(row["planning"], row["name"]) for row in pruned if row.get("planning") is not None]
    if not times:
        return []
    median = statistics.median(seconds for seconds, _ in times)
    slowest, name = max(times)
    return [f"trace, groups, ranks and plan: median {median:.1f} s, at most {slowest:.1f} s ({name})"]


def _reasons(rows: Sequence[Row]) -> list[str]:
    """The most frequent reasons for which axes are frozen."""
    places: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for row in rows:
        places.update(row.get("reasons", {}))
        models.update(row.get("reasons", {}).keys())
    return [
        f"frozen: {reason} ({count} places in {models[reason]} models)"
        for reason, count in places.most_common(REASONS)
    ]


def _classes(pruned: Sequence[Row]) -> str:
    """Where a class was not kept."""
    rewritten = {row["name"]: row["rewritten"] for row in pruned if row["rewritten"]}
    changed = [row["name"] for row in pruned if not row["class_kept"]]
    text = f"original class kept in {len(pruned) - len(changed)} of {len(pruned)}"
    if changed:
        text += f" (not in {', '.join(changed)})"
    if rewritten:
        places = "; ".join(
            f"{name}: {', '.join(path or 'the model' for path in paths)}" for name, paths in rewritten.items()
        )
        text += f"; submodules that became a GraphModule in {len(rewritten)} ({places})"
    return text


def _configs(pruned: Sequence[Row]) -> list[str]:
    """How often the config that a model was built from can say the shapes of the smaller one."""
    torn = [row["name"] for row in pruned if row.get("config_mismatches")]
    even = [(row["name"], row["uniform"]) for row in pruned if row.get("uniform")]
    points = []
    if even:
        left = statistics.median(found["params"] for _, found in even if found["params"] is not None)
        agree = [name for name, found in even if found["agrees"]]
        points.append(
            f"with uniform=True, config and weights agree in {len(agree)} of {len(even)} (the class, called with the "
            f"config, makes the result's shapes and computes its outputs), {left:.2f} of the parameters left (median); "
            f"not in {', '.join(name for name, found in even if not found['agrees']) or 'any other'}"
        )
    if not torn:
        return points
    return [
        *points,
        f"in {len(torn)} of {len(pruned)} no config can say all sizes and numbers of the smaller model, since layers built from one "
        f"field have several sizes ({', '.join(torn[:12])}{' ...' if len(torn) > 12 else ''}); in the others it does",
    ]


def _much_left(pruned: Sequence[Row]) -> list[str]:
    """The models that keep more than `MUCH` of their parameters, with what locks them."""
    heavy = sorted((row for row in pruned if row["params"] > MUCH), key=lambda row: -row["params"])
    points = [f"{len(heavy)} with more than {MUCH:g} of their parameters left"]
    return points + [f"{row['name']} ({row['params']:.2f} left): {_locks(row)}" for row in heavy]


def _locks(row: Row) -> str:
    reasons = [
        f"{lock['reason'][:160]} ({lock['params']:,} parameters, {lock['source']})" for lock in row["locks"]
    ]
    return "; ".join(reasons) or "the report names no lock"


def _peer_summary(peers: Sequence[Row]) -> list[str]:
    """How often the peer's call succeeded, by rising demands."""
    if not peers:
        return []
    runs = [row for row in peers if row["runs"] and row["params"] < 1]
    kept = sum(row["outputs_kept"] for row in runs)
    return [
        f"Torch-Pruning, called once with no hints, on {len(peers)} models: {sum(row['ran'] for row in peers)} calls "
        f"returned, {len(runs)} gave a smaller model that runs, {kept} of these kept the shapes of the outputs"
    ]


def _columns(peers: dict[str, Row]) -> tuple[str, ...]:
    return (*COLUMNS, *(PEER_COLUMNS if peers else ()), "note")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row, peers: dict[str, Row]) -> list[str]:
    """The cells of one model."""
    cells = [
        row["name"],
        row["verdict"],
        _yes(row["traced"]),
        str(row.get("groups", "")),
        *(_number(row.get(key)) for key in ("reachable_params", "reachable_macs", "params", "macs")),
        _number(_deviation(row), "{:.0e}"),
        _yes(row.get("backward")),
        _yes(row.get("class_kept")),
        _number(row.get("seconds"), "{:.1f}"),
    ]
    if peers:
        peer = peers.get(row["name"], {})
        cells += [
            _number(peer.get("params")),
            _yes(peer.get("runs")),
            _yes(peer.get("outputs_kept")),
            _number(peer.get("seconds"), "{:.1f}"),
        ]
    return [*cells, _note(row)]


def _deviation(row: Row) -> float | None:
    """The library's figure, or the benchmark's own where the library compared shapes only."""
    if row.get("verified") == "equal":
        return row["deviation"]
    return row["zeroed_deviation"] if row["verdict"] == "right" else None


def _note(row: Row) -> str:
    """Why the verdict is not right, or else what locks most where much is left, or which submodules were rewritten."""
    if row["why"]:
        return row["why"][:100]
    if row["params"] > MUCH and row["locks"]:
        return row["locks"][0]["reason"][:100]
    return f"{len(row['rewritten'])} submodules rewritten" if row["rewritten"] else ""


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return "" if value is None else form.format(value)


def _yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"
