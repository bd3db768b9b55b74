"""Every Python block of the README and the guides runs, page by page, as one program; made pages are up to date."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ops
from depgraph.importance import CRITERIA

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_code_on_a_page_runs(page: Path, stated: Any) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    program = "\n".join(blocks)
    exec(compile(program, str(page), "exec"), {"__name__": "__page__"})


def test_the_page_of_ops_says_what_the_rules_say() -> None:
    written = ops.PAGE.read_text()
    assert written == ops.page(), "docs/ops.md is out of date: run `python -m benchmarks.ops`"


def test_every_rule_says_what_it_does() -> None:
    rows = [line for line in ops.page().splitlines() if line.startswith("| `")]
    assert [row for row in rows if row.endswith("|  |")] == [], "a rule without a docstring"


def test_the_reasons_on_the_page_of_limits_are_the_reasons_in_the_code() -> None:
    source = "".join(p.read_text() for p in (ROOT / "depgraph").rglob("*.py"))
    cells = [
        line.split(" | ")[0]
        for line in (ROOT / "docs/limits.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    quoted = [text for cell in cells for text in re.findall("`([^`]+)`", cell)]
    assert quoted
    assert [text for text in quoted if text not in source] == []


def test_the_page_of_criteria_says_what_the_criteria_say() -> None:
    lines = (ROOT / "docs/criteria.md").read_text().replace("\\|", "¦").splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `")
    ]
    assert [name.strip("`") for name, *_ in rows] == list(CRITERIA)
    for (_, score, data, compared, _, source), criterion in zip(rows, CRITERIA.values(), strict=True):
        doc = (criterion.__doc__ or "").strip()
        assert (score.replace("¦", "|"), data, compared) == (
            doc.partition("\n")[0],
            criterion.needs,  # type: ignore[attr-defined]
            criterion.normalise,  # type: ignore[attr-defined]
        )
        assert source == "-" or source in " ".join(doc.split())
