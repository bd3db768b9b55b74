"""The reference of all public names: ``python -m tools.reference`` writes HTML to build/reference from the docstrings."""

from __future__ import annotations

from pathlib import Path

import pdoc.render

FOLDER = Path(__file__).parent.parent / "build" / "reference"
# Modules that are named like a function are no part of it, nor are those that import what is optional.
MODULES = [
    "depgraph",
    "depgraph.importance",
    "depgraph.exploring.pictures",
    "!depgraph.prune",
    "!depgraph.recover",
    "!depgraph.verify",
    "!depgraph.checkpoint.shell",
    "!depgraph.integrations",
]


def build(folder: Path) -> Path:
    """Write the pages to `folder`; the page to begin with."""
    pdoc.render.configure(docformat="google", show_source=False, footer_text="depgraph")
    pdoc.pdoc(*MODULES, output_directory=folder)
    return folder / "depgraph.html"


if __name__ == "__main__":
    print(build(FOLDER))
