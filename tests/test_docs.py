"""Every Python block of the README and the guides runs, page by page, as one program; made pages are up to date."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import vision_ops  # noqa: F401  # makes torchvision importable, which pages on transformers need

import depgraph
from depgraph.importance import CRITERIA
from tools import ops, reference

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


# A block of Python, and what it prints where that stands below it.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
OPTIONAL = "accelerate", "timm", "torch_pruning", "transformers"  # what a page may import; CI has them


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_code_on_a_page_runs(page: Path, stated: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text, names = page.read_text(), {"__name__": "__page__"}
    with warnings.catch_warnings():
        for library in OPTIONAL:
            if re.search(rf"^(?:from|import) {library}\b", text, re.MULTILINE):
                warnings.simplefilter("ignore")  # theirs
                pytest.importorskip(library)
        for block in BLOCK.finditer(text):
            above = "\n" * text[: block.start(1)].count("\n")  # so that errors have the line of the page
            capsys.readouterr()
            exec(compile(above + block[1], str(page.relative_to(ROOT)), "exec"), names)
            if block[2] is not None:
                assert without_noise(capsys.readouterr().out) == without_noise(block[2])


def without_noise(text: str) -> str:
    """What a page says is printed, but for rounding errors and trailing blanks."""
    lines = [re.sub(r"\d\.\de-\d\d", "1e-16", line).rstrip() for line in text.strip().splitlines()]
    return "\n".join(lines)


def test_every_fence_is_closed_and_known() -> None:
    """No block of Python is overlooked by a typing mistake: `py` stands for one that a page says is not run on it."""
    for page in PAGES:
        fences = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)
        assert [f for f in fences[::2] if f not in ("python", "py", "text", "console", "toml")] == [], page
        assert set(fences[1::2]) <= {""}, page
        assert len(fences) % 2 == 0, page


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    text = re.sub(r"^```\w+\n.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [p.relative_to(ROOT / "docs").as_posix() for p in PAGES[1:] if p.name != "README.md"]
    assert [p for p in pages if f"({p})" not in index] == []


@pytest.mark.slow
def test_the_reference_is_built_without_a_warning_and_has_every_public_name(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = reference.build(tmp_path).read_text()
    assert [
        n
        for n in depgraph.__all__
        if n not in ("checkpoint", "graphs", "pictures") and f'id="{n}"' not in page
    ] == []
    assert (tmp_path / "depgraph" / "exploring" / "pictures.html").exists()
    assert [
        n for n in CRITERIA if f"{n}" not in page + (tmp_path / "depgraph/importance.html").read_text()
    ] == []


def test_the_page_of_ops_says_what_the_rules_say() -> None:
    written = ops.PAGE.read_text()
    assert written == ops.page(), "docs/ops.md is out of date: run `python -m tools.ops`"


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
