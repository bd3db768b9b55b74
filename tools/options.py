"""The page of options and budgets: ``python -m tools.options`` writes docs/options.md from the tables that the code reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from depgraph.select import BUDGETS, OPTIONS

PAGE = Path(__file__).parent.parent / "docs" / "options.md"
HEAD = """# Budgets and options

Two tables in the code say what can be asked for: `BUDGETS` in `depgraph/select/budget_kinds.py`, to which
`depgraph.register_budget` adds, and the fields of `Request` in `depgraph/select/request.py`. `prune`, `choose`, `sweep`,
`prune_gradually`, the command line and this page, which `python -m tools.options` writes, read them.

A budget is a share of what the model has (`0.5` or `"50%"`), or an amount. All budgets that are given hold together.
A budget of your own is one entry:

```python
import depgraph
from depgraph.costs.cost import byte_cost, byte_count


class Flash:  # a cost is a function of how many units of each group are left
    def __init__(self, graph):
        self.bytes = byte_cost(graph)

    def value(self, counts):
        return 1.1 * self.bytes.value(counts)

    def slopes(self, counts):
        return 1.1 * self.bytes.slopes(counts)


pages = depgraph.BudgetKind(
    "max_flash",
    "bytes in flash memory",
    Flash,
    lambda model, inputs: 1.1 * byte_count(model),
    {"KB": 1000, "MB": 1000000},
)
depgraph.register_budget(pages)  # depgraph.prune(model, inputs, max_flash="300KB")
```
"""


def page() -> str:
    """The page as it should be."""
    budgets = [
        f"| `{b.name}` | `--{b.name.replace('_', '-')}` | {b.what} | {', '.join(f'`{u}`' for u in b.units)} "
        f"| {'exact' if b.exact else f'{b.near:.0%} below'} |"
        for b in BUDGETS.values()
    ]
    options = [
        f"| `{name}` | {_flag(name, f.metadata)} | {f.metadata['text']} | `{f.default!r}` |"
        for name, f in OPTIONS.items()
    ]
    return "\n".join(
        [
            HEAD,
            "## Budgets\n",
            "| argument | command line | at most so many | units | near enough |",
            "| --- | --- | --- | --- | --- |",
            *budgets,
            "\n## Options\n",
            "| argument | command line | what it does | default |",
            "| --- | --- | --- | --- |",
            *options,
            "",
        ]
    )


def _flag(name: str, about: Mapping[str, object]) -> str:
    if about["kind"] is None:
        return ""
    return "`--ratio`" if name == "pruning_ratio" else f"`--{name.replace('_', '-')}`"


if __name__ == "__main__":
    PAGE.write_text(page())
