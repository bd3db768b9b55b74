"""The rows of the coverage benchmark as a table on the screen, as `coverage.json`, and as the page `docs/coverage.md`.

python -m benchmarks.coverage_table      # writes the page from the JSON again
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.isolate import Row

DATA = Path(__file__).with_name("coverage.json")
PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
MUCH = 0.6  # a model with a larger fraction of its parameters left needs an explanation
REASONS = 10  # how many reasons for frozen axes the page names
NAMES = 8  # how many models of a kind it names
PRUNED = ("right", "shapes")
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
KEPT = (
    "name", "dtype", "verdict", "why", "traced", "groups", "reachable_params", "reachable_macs", "params", "macs", "deviation",
    "backward", "class_kept", "seconds", "planning", "rewritten", "locks", "config_mismatches", "uniform", "branches",
)  # fmt: skip
PEER_KEPT = ("params", "runs", "outputs_kept", "seconds")  # what a row of the JSON keeps

HEADING = """# Coverage

`depgraph.prune(model, inputs, pruning_ratio=0.5, verify=True)` on architectures with random weights, each in a process of its
own with one thread and a limit on processor time (`limit` in the rows' file, in seconds). `python -m benchmarks.coverage --write`
measures them and makes this page; every row is in [benchmarks/coverage.json](../benchmarks/coverage.json).

*Right* means: smaller, outputs of the same shapes, every tensor what the plan keeps of the original, gradients finite, and values
equal to those of the original with the removed entries masked, within 0.0001 in float32. That a config cannot express the shapes of
a smaller model, which the report then lists, does not count as wrong where values are equal, nor that an output whose length depends
on values is longer or shorter than the original's. *Params left* and *MACs left* are fractions of the original, *s* the seconds of
the call, *plan* those of tracing, grouping, ranking and planning in it: medians, all four. *Deviation* is the largest relative one
of the suite. *TP* is Torch-Pruning, called once with no hints: in how many models the result is smaller, runs and keeps the shapes of
its outputs. *Branches* is in how many models `depgraph.branches` finds some that can go, of those that were asked.
"""


def table(title: str, rows: Sequence[Row], peers: dict[str, Row]) -> Table:
    """A rich table with one line a model."""
    result = Table(title=title)
    for column in _columns(peers):
        result.add_column(column, justify="left" if column in WORDS else "right", no_wrap=column == "model")
    for row in rows:
        style = {"right": None, "shapes": "yellow"}.get(row["verdict"], "red")
        result.add_row(*_cells(row, peers), style=style)
    return result


def entry(rows: Sequence[Row], peers: dict[str, Row], **about: Any) -> dict[str, Any]:
    """What `coverage.json` keeps of one suite: `about` it, the figures, and a row a model, rounded."""
    models = []
    for row in rows:
        kept = {key: row[key] for key in KEPT if key in row} | {"deviation": _deviation(row)}
        if row.get("params", 0) <= MUCH:
            kept.pop("locks", None)
        peer = peers.get(row["name"])
        models.append(kept | ({"peer": {key: peer[key] for key in PEER_KEPT}} if peer else {}))
    return {**about, "figures": figures(rows, peers), "models": [_rounded(row) for row in models]}


def write(suites: dict[str, dict[str, Any]]) -> None:
    """Put suites into `coverage.json`, where others stay as they are, and write the page."""
    known = json.loads(DATA.read_text()) if DATA.exists() else {}
    DATA.write_text(_text({**known, **suites}))
    write_page()


def write_page() -> None:
    """The page, from what `coverage.json` holds."""
    PAGE.write_text(f"{HEADING}\n{page(json.loads(DATA.read_text()))}")


def figures(rows: Sequence[Row], peers: dict[str, Row]) -> dict[str, Any]:
    """What the rows of a suite come to."""
    verdicts = Counter(row["verdict"] for row in rows)
    pruned = [row for row in rows if row["verdict"] in PRUNED]
    shown = [peers[row["name"]] for row in rows if row["name"] in peers]
    runs = [row for row in shown if row["runs"] and row["params"] < 1]
    even = [(row["name"], row["uniform"]) for row in pruned if row.get("uniform")]
    places, models = Counter[str](), Counter[str]()
    for row in rows:
        places.update(row.get("reasons", {}))
        models.update(row.get("reasons", {}).keys())
    return {
        "models": len(rows),
        **{verdict: verdicts[verdict] for verdict in (*PRUNED, "wrong", "failed")},
        **{key: _median(row.get(key) for row in pruned) for key in ("params", "macs", "seconds", "planning")},
        "slowest_plan": max(
            (row["planning"] for row in pruned if row.get("planning") is not None), default=None
        ),
        "deviation": max((d for row in pruned if (d := _deviation(row)) is not None), default=None),
        "class_kept": sum(row["class_kept"] for row in pruned),
        "config_mismatches": sum(bool(row.get("config_mismatches")) for row in pruned),
        "uniform": {
            "models": len(even),
            "agree": sum(found["agrees"] for _, found in even),
            "not": [name for name, found in even if not found["agrees"]],
            "params": _median(found["params"] for _, found in even),
        },
        "branches": branch_figures(rows),
        "peer": {
            "models": len(shown),
            "ran": sum(row["ran"] for row in shown),
            "smaller": len(runs),
            "kept": sum(row["outputs_kept"] for row in runs),
        },
        "reasons": [[reason, count, models[reason]] for reason, count in places.most_common(REASONS)],
    }


def branch_figures(rows: Sequence[Row]) -> dict[str, Any]:
    """What was found of branches: in how many models, and what became of those from which half of them went."""
    asked = [(row["name"], row["branches"]) for row in rows if row.get("branches")]
    some = [found for _, found in asked if found["count"]]
    tried = [(name, found) for name, found in asked if "verified" in found]
    return {
        "models": len(asked),
        "some": len(some),
        "count": _median(found["count"] for found in some),
        "params": _median(found["params"] for found in some),
        "left": _median(found.get("left") for found in some),
        "equal": sum(
            found["verified"] == "equal" and found["backward"] for _, found in tried if "left" in found
        ),
        "not": [name for name, found in tried if not (found["verified"] == "equal" and found["backward"])],
    }


def page(suites: dict[str, dict[str, Any]]) -> str:
    """What `coverage.json` says, in a table and a few lines."""
    wrong = [
        f"{name}, {row['name']}, {row['verdict']}: {_why(row)}" for name, row in _rows(suites) if row["why"]
    ]
    heavy = f"The models with more than {MUCH:g} of their parameters left, by what locks most of them:"
    frozen = (
        "What freezes axes most often, over all suites (of each the ten most frequent reasons are counted):"
    )
    parts = [
        _suites(suites),
        _list(_points(suites)),
        ["## What is not right, and why"],
        _list(wrong) or ["Nothing."],
        ["## What stays large, and why"],
        [frozen],
        _reasons(suites),
        [heavy],
        _list(_heavy(suites)),
        ["## When and with what"],
        _list([_measured(name, suite) for name, suite in suites.items()]),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part).lstrip() + "\n"


def _suites(suites: dict[str, dict[str, Any]]) -> list[str]:
    """A line a suite."""
    columns = (
        "suite",
        "models",
        "right",
        "shapes only",
        "wrong",
        "failed",
        "params left",
        "MACs left",
        "s",
        "plan, s",
    )
    columns += ("deviation", "class kept", f"> {MUCH:g} left", "TP", "branches")
    lines = [_line(columns), _line(["---", *["---:"] * (len(columns) - 1)])]
    for name, suite in suites.items():
        f, peer, branches = suite["figures"], suite["figures"]["peer"], suite["figures"]["branches"]
        pruned = [row for row in suite["models"] if row["verdict"] in PRUNED]
        cells = [
            name,
            *(str(f[key]) for key in ("models", *PRUNED, "wrong", "failed")),
            *(_number(f[key], "{:.3f}") for key in ("params", "macs")),
            *(_number(f[key], "{:.1f}") for key in ("seconds", "planning")),
            _number(f["deviation"], "{:.0e}"),
            f"{f['class_kept']} of {len(pruned)}",
            str(sum(row["params"] > MUCH for row in pruned)),
            f"{peer['kept']} of {peer['models']}" if peer["models"] else "",
            f"{branches['some']} of {branches['models']}" if branches["models"] else "",
        ]
        lines.append(_line(cells))
    return lines


def _reasons(suites: dict[str, dict[str, Any]]) -> list[str]:
    """The most frequent reasons for which axes are frozen."""
    places, models = Counter[str](), Counter[str]()
    for suite in suites.values():
        for reason, count, of in suite["figures"]["reasons"]:
            places[reason] += count
            models[reason] += of
    most = [_line((reason, str(n), str(models[reason]))) for reason, n in places.most_common(REASONS)]
    return [_line(("reason", "places", "models")), _line(("---", "---:", "---:")), *most]


def _heavy(suites: dict[str, dict[str, Any]]) -> list[str]:
    """The models that keep more than `MUCH` of their parameters, by what locks most of them."""
    found: dict[str, list[tuple[float, str]]] = {}
    for _, row in _rows(suites):
        if row["verdict"] in PRUNED and row["params"] > MUCH:
            reason = (
                row["locks"][0]["reason"].partition(" (")[0] if row["locks"] else "the report names no lock"
            )
            found.setdefault(reason, []).append((row["params"], row["name"]))
    points = []
    for reason, models in sorted(found.items(), key=lambda item: -len(item[1])):
        names = [f"{name} ({left:.2f})" for left, name in sorted(models, reverse=True)]
        more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
        points.append(f"{reason}: {', '.join(names[:NAMES])}{more}")
    return points


def _points(suites: dict[str, dict[str, Any]]) -> list[str]:
    """Where classes are not kept or submodules rewritten, and what is known of configs."""
    pruned = [row for _, row in _rows(suites) if row["verdict"] in PRUNED]
    changed = [row["name"] for row in pruned if not row["class_kept"]]
    rewritten = [f"{row['name']} {len(row['rewritten'])}" for row in pruned if row.get("rewritten")]
    points = []
    if changed:
        points.append(f"The class is not kept in {', '.join(changed)}.")
    if rewritten:
        points.append(f"Numbers in the code of submodules changed in {', '.join(rewritten)} (of how many).")
    for name, suite in suites.items():
        f, even = suite["figures"], suite["figures"]["uniform"]
        if even["models"]:
            points.append(
                f"{name}: the config of {f['config_mismatches']} of {f['right'] + f['shapes']} smaller models cannot express their "
                f"shapes, since layers built from one field have several sizes. With `uniform=True` config and result agree, "
                f"by value, in {even['agree']} of {even['models']} ({_number(even['params'])} of the parameters left; "
                f"not in {', '.join(even['not']) or 'any other'})."
            )
        if (b := suite["figures"]["branches"])["some"]:
            points.append(
                f"{name}: {_number(b['count'], '{:g}')} branches in the median model that has some, {_number(b['params'])} of its "
                f"parameters. Half of them removed by the size of their weights, {_number(b['left'])} of the parameters are left, "
                f"and {b['equal']} of {b['some']} are equal to the masked original (not: {', '.join(b['not']) or 'none'})."
            )
    return points


def _list(points: Sequence[str]) -> list[str]:
    return [f"* {point}" for point in points]


def _rows(suites: dict[str, dict[str, Any]]) -> list[tuple[str, Row]]:
    return [(name, row) for name, suite in suites.items() for row in suite["models"]]


def _why(row: Row) -> str:
    """The first sentence or so of a reason."""
    return row["why"] if len(row["why"]) <= 240 else row["why"][:240].rsplit(" ", 1)[0] + " ..."


def _measured(name: str, suite: dict[str, Any]) -> str:
    versions = ", ".join(f"{library} {version}" for library, version in suite["versions"].items())
    remark = f" {suite['remark']}" if suite.get("remark") else ""
    return f"{name}: {suite['written']}, a limit of {suite['limit']:g} s, {versions}.{remark}"


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return _short(statistics.median(known)) if known else None


def _short(value: float) -> float:
    """Four digits of a number."""
    return float(f"{value:.4g}")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return _short(value) if isinstance(value, float) else value


def _text(suites: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each model."""
    parts = []
    for name, suite in suites.items():
        about = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in suite.items() if key != "models"]
        rows = ",\n".join(json.dumps(row) for row in suite["models"])
        parts.append(f"{json.dumps(name)}: {{\n" + ",\n".join([*about, f'"models": [\n{rows}\n]']) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


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


if __name__ == "__main__":
    write_page()
