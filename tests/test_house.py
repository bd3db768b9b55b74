"""How the repository is laid out: what may import what outside the package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda f: f.relative_to(TESTS).as_posix())
def test_nothing_here_imports_the_benchmarks(file: Path) -> None:
    """Benchmarks stand on the tests' networks and checks, not the other way round."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    assert [name for name in found if name and name.split(".")[0] == "benchmarks"] == []
