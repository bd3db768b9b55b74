"""Every rule is broken in every way that its statements allow, and some network objects; what survives is listed here.

The lists are checked from both sides: a mutant that survives must be in one, and what is in one must exist and survive.
"""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from pathlib import Path
from typing import Any

import mutants as m
import pytest
from mutants import RULES, TINY, Breaker, mutants, said_by, subjects, survivors

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")]

# ------------------------------------------------------------------------------------------------ what survives

SUMMED = "what an op sums over only matters beside a scale such as x / sqrt(d) on its result"
INTEGERS = "an index is made of integers, whose axes are frozen from the start"
MADE = "what the op sums over is a channel because another weight produces it"
FREEZES = "the rule itself freezes all that the op touches"
FIXED = "of the networks' results, only dims that are frozen have one size"
PRODUCED = "what a weight consumes another has produced"
COUNTED = "only the sizes of the pieces are compared, in any order"
INSIDE = "no torch function is known that calls this op by itself, with a size that nothing in the user's call gives"

EQUIVALENT = {  # mutants that no network can tell from the rule
    "scaled_dot_product_attention: lock both in `site.same(k[-2], v[-2])`": "the next line freezes the keys anyway",
    "linear: drop contract in `site.contract(*contracted)`": SUMMED,
    "mm: drop contract in `site.contract(*contracted)`": SUMMED,
    "bmm: drop contract in `site.contract(*contracted)`": SUMMED,
    "mv: drop contract in `site.contract(*contracted)`": SUMMED,
    "dot: drop contract in `site.contract(*contracted)`": SUMMED,
    "cdist: drop contract in `site.contract(*contracted)`": SUMMED,
    "matmul: drop contract in `site.contract(*contracted)`": SUMMED,
    "bilinear: drop contract in `site.contract(*contracted)`": SUMMED,
    "addmm: drop contract in `site.contract(*contracted)`": SUMMED,
    "einsum: drop contract in `site.contract(*contracted)`": SUMMED,
    "_grouped_mm: drop contract in `site.contract(a[1])`": SUMMED,
    "convolution: drop contract in `site.contract(far)`": SUMMED,
    "convolution: drop contract in `site.contract(*inputs)`": SUMMED,
    "sum: drop contract in `site.contract(*gone)`": SUMMED,
    "convolution: swap pieces in `outputs = site.algebra.segments(whole, [o] * groups)`": COUNTED,
    "one_hot: free in `axis = site.new(len(site.shape) - 1)`": "a size inside one_hot is that of what it numbers",
    "scatter: exchange dims": FIXED,
    "split_with_sizes: free in `return [[*x[:d], site.fixed(n, 'has no indices'), *x[d + 1:]] for n in sizes]`": (
        "an empty piece has nothing to lose"
    ),
    "topk: exchange dims": FIXED,
    "dot: drop weight in `site.weight(arguments[weight], [a for k, a in own.items() if k in result], [a for k, a in own.items(`": (
        PRODUCED
    ),
    "cdist: drop weight in `site.weight(arguments[weight], [a for k, a in own.items() if k in result], [a for k, a in own.items(`": (
        PRODUCED
    ),
    "index_select: drop lock in `site.lock(x[d], 'ranges over an index')`": INTEGERS,
    "gather: drop lock in `site.lock(b, 'ranges over an index')`": INTEGERS,
    "masked_select: refuse": FREEZES,
    "arange: refuse": FREEZES,
    "glu: swap pieces in `left, right = site.algebra.cut(axis, axis.size // 2)`": "both halves become the same axis",
    "_grouped_mm: swap factors in `_, run = site.algebra.factor(axis, axis.size // length)`": "any runs of that length will do",
    "group_norm: swap pieces in `blocks = site.algebra.segments(axis, [axis.size // groups] * groups)`": COUNTED,
    "batch_norm: free in `return [x, *(stats if s == sizes else [site.fixed(n, 'is state of a norm') for n in s] for s in site`": (
        "what is not a statistic of each channel is empty"
    ),
    "index: lock both in `middle = site.broadcast(*groups, size=shape)`": "the next lines freeze them anyway",
    "trace: refuse": FREEZES,
    "squeeze: drop floor in `site.at_least(axis, 2)`": "a replay of the smaller model finds that it calls other ops, and keeps the axis",
    "as_strided: swap factors in `counted = product([a for a in (*between, *inner) if a is not None])`": COUNTED,
    "as_strided: free in `between = found[i + 1:] if regular else [site.fixed(steps[k] // step, 'is a number of steps in memor`": (
        "no tensor has a dim of that many, so none is cut"
    ),
    "lstm: drop weight in `site.weight(weight, [rows], [columns])`": "weight_hh consumes the projected channels too",
}  # fmt: skip

# Faults of the library that are known: the tiny networks which show them, to be taken out as they are mended.
FAULTS: dict[str, str] = {}
HIDDEN: dict[str, str] = {}  # mutants that survive because of a fault
SURVIVING = {**EQUIVALENT, **HIDDEN}

# Statements that no network runs.
UNREACHED = {
    "attention.py": {
        "rest = [sums if shape == sizes else [site.fixed(n, 'is state of an attention kernel') for n in shape": (
            "kernels of other devices return numbers for the backward pass"
        ),
    },
    "pointwise.py": {"site.lock(axis, f'goes into {site.node.target}')": "of the ops here, none is known to be given channels"},
    "reduction.py": {
        "return [site.broadcast(site.dims(site.args[0]), site.dims(site.args[1]))]": "max.other is recorded as maximum",
    },
    "registry.py": {"site.same(a, b)": "belongs to the in-place forms of all rules"},
}  # fmt: skip

# ------------------------------------------------------------------------------------------------ tests


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_tiny_networks_hold_while_nothing_is_broken(name: str, request: pytest.FixtureRequest):
    """What objects to mutants must not object to the rules themselves."""
    if name in FAULTS:
        request.applymarker(pytest.mark.xfail(reason=FAULTS[name], strict=True))
    (subject,) = (s for s in subjects() if s.name == name)
    wrong = {what: said_by(check) for what, check in subject.checks().items() if what != "MACs"}
    assert not any(wrong.values()), wrong


@pytest.mark.slow
def test_watching_changes_nothing():
    """A breaker without a mutant leaves every rule as it is."""
    for subject in (m.Subject(name) for name in list(TINY)[::5]):
        with m.under([Breaker(rule) for rule in RULES]):
            assert subject.facts() == subject.unbroken, subject.name


@pytest.mark.parametrize("rule", RULES)
def test_every_mutant_of_a_rule_is_noticed(rule: str):
    mine = [str(mutant) for mutant in mutants() if mutant.rule == rule]
    assert mine, "nothing calls it: add a row to probing_rows.py, or a tiny network to mutants.py"
    alive = {str(mutant) for mutant in survivors(rule)}
    listed = set(mine) & set(SURVIVING)
    assert alive - listed == set(), (
        "nothing objects to these: a row or a network is missing, or they change nothing"
    )
    assert listed - alive == set(), "these are noticed now: take them out of the list"
    assert len(mine) > len(alive), "nothing objects to any way of breaking the rule"


def test_ledgers_name_what_exists():
    names = Counter(map(str, mutants()))
    assert max(names.values()) == 1, "two mutants have one name"
    assert set(SURVIVING) - set(names) == set()
    assert set(FAULTS) - set(TINY) == set()


def relations(tree: ast.AST) -> set[int]:
    """First lines of the innermost statements that hold a call which a mutant could break."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            inner = {
                id(n)
                for s in ast.walk(node)
                if isinstance(s, ast.stmt) and s is not node
                for n in ast.walk(s)
            }
            calls = [n.func for n in ast.walk(node) if isinstance(n, ast.Call) and id(n) not in inner]
            if any(is_relation(f) for f in calls):
                found.add(node.lineno)
    return found


def is_relation(function: Any) -> bool:
    if isinstance(function, ast.Attribute):
        on = ast.unparse(function.value)
        names = (
            {*m.ON_SITE, "broadcast", "regroup", "slice", "join", "lock_all"}
            if on == "site"
            else set(m.ON_ALGEBRA)
        )
        return on in ("site", "site.algebra") and function.attr in names
    return isinstance(function, ast.Name) and function.id in m.FUNCTIONS


@pytest.mark.parametrize(
    "file",
    [f for f in sorted(Path(m.RULES_FOLDER).glob("*.py")) if f.stem != "gradients"],
    ids=lambda f: f.name,
)
def test_every_statement_of_a_rule_runs(file: Path):
    """A statement that no network runs has no mutants: add a tiny network, or a line to UNREACHED."""
    left_out = {
        line
        for function in m.LEFT_OUT
        if inspect.getsourcefile(function) == str(file)
        for lines, first in [inspect.getsourcelines(function)]
        for line in range(first, first + len(lines))
    }
    run = {mutant.at[1] for mutant in mutants() if mutant.at and mutant.at[0] == str(file)}
    idle = {m.statements(str(file))[line] for line in relations(ast.parse(file.read_text())) - run - left_out}
    assert idle == set(UNREACHED.get(file.name, {}))
