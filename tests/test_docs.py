"""Every Python block of the README and the guides runs, page by page, as one program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_code_on_a_page_runs(page: Path, stated: Any) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    program = "\n".join(blocks)
    exec(compile(program, str(page), "exec"), {"__name__": "__page__"})
