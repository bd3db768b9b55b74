"""Mutants: every op rule broken in one way at a time, and the networks that must notice it.

A mutant changes one statement of one rule (the `same` of a line is dropped, the pieces of a cut are exchanged ...) or
the rule as a whole (it forgets everything, it refuses everything). `verdict` prunes a network under a mutant and says
what objected, in the words that a test would fail with: the oracle, an exception, what the zoo says must shrink, or the
group sizes that a tiny network below states by hand.

The statements of a rule are not listed anywhere: they are found by running the unbroken rule on every network, so a new
rule has its mutants as soon as some network calls its op. `python tests/mutants.py [rule ...]` prints all of them.
"""

from __future__ import annotations

import ast
import functools
import linecache
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from checks import random_importance
from oracle import assert_equal_to_masked, assert_state_matches_plan
from torch import nn
from zoo import ZOO, broken_expectations
from zoo_entry import BATCH, CLASSES, Entry, image, tokens, vector

import depgraph
from depgraph import axes, build, propagate, rules, trace
from depgraph.rules.registry import REGISTRY

# ------------------------------------------------------------------------------------------------ tiny networks


@dataclass(frozen=True)
class Tiny(Entry):
    """A network of a line or two for one op; `groups` are the sizes of all its groups, by hand, ascending."""

    groups: tuple[int, ...] = ()


class Short(nn.Module):
    """Layers and parameters by name, and a function of (self, *inputs)."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs):
        return self.run(self, *inputs)


TINY: dict[str, Tiny] = {}


def tiny(name: str, groups: Sequence[int], inputs: Callable[[], tuple], **parts: Callable[[], Any]):
    """Decorator: the function becomes the forward of a network with these parts."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        make = lambda: Short(run, **{key: part() for key, part in parts.items()})  # noqa: E731
        TINY[name] = Tiny(make, inputs, groups=tuple(groups))
        return run

    return register


def lin(a: int, b: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(a, b, **options)


def par(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape))


# ------------------------------------------------------------------------------------------------------ rules

RULES: dict[str, list[str]] = {}  # the first name that a rule is registered under -> all of its names
for _name, _function in REGISTRY.items():
    _label = next((label for label in RULES if REGISTRY[label] is _function), _name)
    RULES.setdefault(_label, []).append(_name)

RULES_FOLDER = str(Path(rules.__file__).parent)
Statement = tuple[str, int]  # file and line


@dataclass(frozen=True)
class Mutant:
    """One way of breaking one rule; `at` is the statement, or None for the rule as a whole."""

    rule: str
    way: str
    at: Statement | None = None

    def __str__(self) -> str:
        where = f" at {linecache.getline(*self.at).strip()}" if self.at else ""
        return f"{self.rule.removeprefix('aten::')}: {self.way}{where}"


def swapped(function: Callable[..., Any], axis: axes.Axis, lengths: Sequence[int]) -> list[axes.Axis]:
    """The parts of those lengths, read in the opposite order."""
    return list(function(axis, list(lengths)[::-1]))[::-1]


# kind of statement -> way of breaking it -> (site, the unbroken statement, its arguments) -> its result
WAYS: dict[str, dict[str, Callable[..., Any]]] = {
    "same": {
        "drop same": lambda site, do, a, b: None,
        "lock instead of same": lambda site, do, a, b: (site.algebra.freeze(a, "x"), site.algebra.freeze(b, "x")),
    },
    "lock": {"drop lock": lambda site, do, axis, text: None},
    "fixed": {"free instead of fixed": lambda site, do, size, text: site.fresh(size)},
    "fixed_segment": {"free instead of fixed": lambda site, do, size: axes.Axis(size)},
    "new": {"free instead of fixed": lambda site, do, dim: site.fresh(site.shape[dim])},
    "equal_counts": {
        "drop equal counts": lambda site, do, parts, text: None,
        "tie instead of equal counts": lambda site, do, parts, text: [
            site.algebra.unify(p, parts[0]) for p in parts[1:]
        ],
    },
    "contract": {"drop contract": lambda site, do, *parts: None},
    "weight": {"drop weight": lambda site, do, *parts: None},
    "macs": {"drop macs": lambda site, do, *factors: None},
    "reorder": {"keep the order": lambda site, do, axis, order: axis},
    "unify": {"drop unify": lambda site, do, a, b: None},
    "factor": {
        "swap factors": lambda site, do, axis, n: swapped(
            site.algebra.factors, axis, (n, axis.size // n) if n not in (1, axis.size) else (axis.size,)
        )
        if n not in (1, axis.size)
        else do(axis, n)
    },
    "factors": {"swap factors": lambda site, do, axis, lengths: swapped(do, axis, lengths)},
    "segments": {"swap pieces": lambda site, do, axis, lengths: swapped(do, axis, lengths)},
    "cut": {
        "swap pieces": lambda site, do, axis, at: swapped(
            site.algebra.segments, axis, (at, axis.size - at)
        )
    },
    "product": {"swap factors": lambda site, do, parts: do(list(parts)[::-1])},
    "concat": {"swap pieces": lambda site, do, parts: do(list(parts)[::-1])},
}
SITE = ("same", "lock", "fixed", "fixed_segment", "new", "equal_counts", "contract", "weight", "macs", "reorder")
ALGEBRA = ("unify", "factor", "factors", "segments", "cut")
FUNCTIONS = ("product", "concat")


class Breaker:
    """Stands between a rule and its `Site`: breaks what `mutant` says, or only notes which statements there are."""

    def __init__(self, rule: str, mutant: Mutant | None) -> None:
        self.rule, self.mutant = rule, mutant
        self.seen: set[Mutant] = set()

    def statement(self, site: Any, kind: str, do: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run a statement of kind `kind`: broken if it is the mutant's."""
        at = place()
        for way, broken in WAYS[kind].items():
            mutant = Mutant(self.rule, way, at)
            if self.mutant is None:
                self.seen.add(mutant)
            elif mutant == self.mutant:
                return broken(site, do, *args)
        return do(*args)

    def wrap(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """The rule as it runs under this breaker."""

        def apply(site: propagate.Site) -> Any:
            if self.mutant is None:
                self.seen |= {Mutant(self.rule, way) for way in WHOLE}
            way = self.mutant.way if self.mutant is not None and self.mutant.at is None else ""
            if way:
                return WHOLE[way](site, rule)
            watched = WatchedSite(site.state, site.algebra, site.node)
            watched.breaker = self
            watched.watched_algebra = WatchedAlgebra(watched)
            with watched.watched(), self.functions(watched, rule):
                return rule(watched)

        return apply

    @contextmanager
    def functions(self, site: Any, rule: Callable[..., Any]) -> Iterator[None]:
        """`product` and `concat` as the rule's module and `Site` call them, watched."""
        saved = [(g, n, g[n]) for g in (rule.__globals__, vars(sys.modules[propagate_module])) for n in FUNCTIONS if n in g]
        for names, name, plain in saved:
            names[name] = lambda parts, name=name, plain=plain: self.statement(site, name, plain, (list(parts),))
        try:
            yield
        finally:
            for names, name, plain in saved:
                names[name] = plain
