"""The page of ops: ``python -m tools.ops`` writes docs/ops.md from the docstrings of the rules."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from depgraph import rules
from depgraph.rules import registry
from depgraph.rules.registry import Rule

PAGE = Path(__file__).parent.parent / "docs" / "ops.md"
POINTWISE = "aten::pointwise"  # no op: the key of the rule for every op that torch tags so
EQUATIONS = "Rules that are an einsum, as in `torch.einsum`: what the result lacks is summed over."

HEAD = """# Ops that are followed

{rules} rules cover {names} ATen ops by name, with all overloads of each; one of them also covers every op that torch tags as
pointwise (`torch.Tag.pointwise`). In-place forms (`add_`) have the rule of their base, ops made of others
(`CompositeImplicitAutograd`) are followed through those, and for what is not listed `depgraph.op_rule` can
[state a rule](your-own-op.md); without one, the axes that an op touches stay whole. The rules are about {lines} lines in
`depgraph/rules/`, docstrings included. `python -m tools.ops` writes this page from them.

Brackets hold the dims of a tensor: the same letter is the same axis, `(g c)` is a product, `...` are dims that pass.
A mean, norm or maximum is a *statistic*: what it is taken over may shrink, and it is taken over the kept entries then.
"""


def page() -> str:
    """The page as it should be."""
    own = {name: rule for name, rule in registry.REGISTRY.items() if name not in registry.STATED}
    rows = _rows(own.items())
    files = [f for f in Path(rules.__file__).parent.glob("*.py") if f.stem != "__init__"]
    lines = sum(len(f.read_text().splitlines()) for f in files)
    names = len(own) - 1
    parts = [HEAD.format(rules=len(rows), names=names, lines=f"{round(lines, -2):,}")]
    for module in dict.fromkeys(module for module, _ in rows):
        equations = module == registry.__name__
        title = "Equations" if equations else module.rpartition(".")[2].capitalize()
        about = EQUATIONS if equations else (sys.modules[module].__doc__ or "").strip()
        parts.append(f"\n## {title}\n\n{about}\n\n| ops | what becomes of the dims |\n| --- | --- |")
        parts += [
            f"| {', '.join(f'`{n}`' for n in ops)} | {f'`{text}`' if equations else text} |"
            for (where, text), ops in rows.items()
            if where == module
        ]
    return "\n".join(parts) + "\n"


def _rows(table: Iterable[tuple[str, Rule]]) -> dict[tuple[str, str], list[str]]:
    """(file of a rule, what it says of itself) -> its ops; rules made from one function stand together."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, rule in sorted(table, key=lambda row: row[1].__module__ == registry.__name__):
        own = rows.setdefault((rule.__module__, _first_line(rule.__doc__)), [])
        if name == POINTWISE:
            own.insert(0, "every op tagged as pointwise")
        else:
            own.append(name.removeprefix("aten::"))
    return rows


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0].replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
