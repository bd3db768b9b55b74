"""The dependency graph as one HTML file to explore: no server, no network, nothing but the file."""

from __future__ import annotations

import html as escapes
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from ..base.checks import a_path, of_kind
from ..grouping.graph import DependencyGraph
from ..grouping.outline import outline
from ..prune import PruneResult
from ..report import reachable


def page_data(source: DependencyGraph | PruneResult) -> dict[str, Any]:
    """What the page shows, as plain data: an `outline`, ``facts``: (label, before, after or None), and ``notes``."""
    facts: list[tuple[str, float, float | None]]
    if isinstance(source, DependencyGraph):
        found, reach, notes = outline(source), reachable(source), []
        facts = [("parameters", sum(p.numel() for p in source.model.parameters()), None)]
    else:
        report = source.report
        found, reach, notes = report.outline, report.reachable, list(report.notes)
        facts = [("parameters", *report.parameters), ("MACs", *report.macs), ("bytes", *report.byte_counts)]
    facts.append(("groups", len(found["groups"]), None))
    facts.append(("parameters that can shrink [%]", round(100 * reach["params"], 1), None))
    facts.append(("MACs that can shrink [%]", round(100 * reach["macs"], 1), None))
    return {**found, "facts": facts, "notes": notes}


def write_html(source: DependencyGraph | PruneResult, path: str | os.PathLike[str]) -> Path:
    """Write a page on which the groups and locks of a model can be searched and clicked through.

    Args:
        source: what `analyze` or `prune` returned; with the latter, shapes before and after are shown.
        path: the file to write; it holds all it needs and asks for nothing from outside.

    Returns:
        the path.
    """
    of_kind(
        "source", source, (DependencyGraph, PruneResult), "what depgraph.analyze or depgraph.prune returned"
    )
    a_path("path", path)
    data = page_data(source)
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no tag can end the script early
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    page = template.replace("{{title}}", escapes.escape(data["title"])).replace("{{data}}", text)
    target = Path(path)
    target.write_text(page, encoding="utf-8")
    return target
