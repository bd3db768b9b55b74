"""Pages that name files and what is in them: each file is there, and has what it is said to have."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import depgraph

ROOT = Path(__file__).parent.parent
PAGES = ["docs/where-things-are.md", "docs/glossary.md", "CONTRIBUTING.md"]
# `file`, `folder/` or `file: name, Class.name`
REFERENCE = re.compile(r"`(Makefile|[\w./-]+(?:\.(?:py|md|toml|txt|yml|yaml|json)|/))(?:: ([\w., ]+))?`")
WORDS = 25  # the most that a newcomer should have to learn


def found(reference: str) -> Path | None:
    """The file or folder that a page means: from the package's folder, or from the root."""
    places = [base / reference for base in (ROOT / "depgraph", ROOT) if (base / reference).exists()]
    return places[0] if places else None


def names_in(file: Path) -> set[str]:
    """What a module defines: functions, classes, assigned names, and ``Class.name`` of what classes define."""

    def names(body: list[ast.stmt]) -> set[str]:
        out = set()
        for s in body:
            if isinstance(s, (ast.FunctionDef, ast.ClassDef)):
                out.add(s.name)
            if isinstance(s, ast.ClassDef):
                out |= {f"{s.name}.{n}" for n in names(s.body)}
            targets = (
                s.targets if isinstance(s, ast.Assign) else [s.target] if isinstance(s, ast.AnnAssign) else []
            )
            out |= {t.id for t in targets if isinstance(t, ast.Name)}
        return out

    return names(ast.parse(file.read_text()).body)


def wrong_references(text: str) -> list[str]:
    """The references in `text` that lead nowhere."""
    wrong = []
    for file, names in REFERENCE.findall(text):
        place = found(file)
        if place is None:
            wrong.append(file)
        elif names:
            wrong += [f"{file}: {n}" for n in re.split(", ?", names) if n not in names_in(place)]
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_refers_to_is_there(page: str) -> None:
    text = (ROOT / page).read_text()
    assert len(REFERENCE.findall(text)) > 5
    assert wrong_references(text) == []


def test_a_reference_that_leads_nowhere_is_noticed() -> None:
    text = "`base/errors.py: InputError` `base/error.py` `prune.py: analyze, prunes` `rules/` `rule/` `report.py: Report.nothing`"
    assert wrong_references(text) == [
        "base/error.py",
        "prune.py: prunes",
        "rule/",
        "report.py: Report.nothing",
    ]


def test_each_question_is_answered_by_a_reference_or_a_link() -> None:
    rows = [r for r in (ROOT / PAGES[0]).read_text().splitlines() if r.startswith("| ")]
    answers = [r.strip("| ").rpartition(" | ")[2] for r in rows]
    assert [a for a in answers if a not in ("touch", "answer") and not re.search(r"`[\w./-]+|\]\(", a)] == []


def folders_in(text: str, line: str) -> list[str]:
    """The folders and modules that begin the lines of a list or table, in order."""
    cells = [m[1] for m in re.finditer(line, text, re.MULTILINE)]
    return [n.rstrip("/").removesuffix(".py") for cell in cells for n in re.findall(r"`([\w./]+)`", cell)]


def test_the_folders_are_listed_in_the_order_that_is_checked() -> None:
    contract = (ROOT / "pyproject.toml").read_text().partition("layers = [")[2].partition("]")[0]
    order = [n for n in reversed(re.findall(r'"(\w+)"', contract)) if n != "__main__"]
    assert folders_in(depgraph.__doc__ or "", r"^\* ((?:`\w+`(?:, )?)+): ") == order
    table = (ROOT / "docs/how-it-works.md").read_text().partition("| folder |")[2].partition("```")[0]
    assert folders_in(table, r"^\| ((?:`[\w./]+`(?:, )?)+) \|") == order


def test_the_glossary_stays_short_and_each_word_has_a_file() -> None:
    rows = [r for r in (ROOT / "docs/glossary.md").read_text().splitlines() if r.startswith("| ")]
    words = [r.strip("| ").split(" | ") for r in rows if not r.startswith("| word |")]
    assert 0 < len(words) <= WORDS
    assert [w for w, _, file in words if not REFERENCE.search(file)] == []
