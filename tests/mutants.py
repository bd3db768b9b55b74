"""Mutants: every op rule broken in one way at a time, and the networks that must notice it.

A mutant changes one statement of one rule (the `same` of a line is dropped, the pieces of a cut are exchanged ...) or
the rule as a whole (it forgets everything, it refuses everything). `verdict` prunes a network under a mutant and says
what objects, in the words that a test would fail with: the group sizes that a tiny network states by hand, what the
zoo says must shrink, an exception, or the oracle.

No list names the statements of a rule: they are found by running the unbroken rule on every network. So a new rule has
its mutants as soon as some network calls its op. `python tests/mutants.py [rule ...]` prints them with their verdicts.
"""

from __future__ import annotations

import linecache
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
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
from depgraph import rules
from depgraph.axes import Axis
from depgraph.rules import REGISTRY, Site

RULES_FOLDER = str(Path(rules.__file__).parent)
PRUNE, PROPAGATE = sys.modules["depgraph.prune"], sys.modules["depgraph.propagate"]

# ------------------------------------------------------------------------------------------------ what can be broken

RULES: dict[str, list[str]] = {}  # the first name that a rule function is registered under -> all of its names
for _name, _function in REGISTRY.items():
    RULES.setdefault(next((label for label in RULES if REGISTRY[label] is _function), _name), []).append(_name)


@dataclass(frozen=True)
class Mutant:
    """One way of breaking one rule; `at` is the (file, line) of a statement, or None for the rule as a whole."""

    rule: str
    way: str
    at: tuple[str, int] | None = None

    def __str__(self) -> str:
        where = f" in {linecache.getline(*self.at).strip()}" if self.at else ""
        return f"{self.rule.removeprefix('aten::')}: {self.way}{where}"


def backwards(split: Callable[..., Any], axis: Axis, lengths: Sequence[int]) -> list[Axis]:
    """Parts of those lengths that stand in the opposite order on the axis."""
    return list(split(axis, list(lengths)[::-1]))[::-1]


def tie(site: Any, parts: Sequence[Axis]) -> None:
    for part in parts[1:]:
        site.inner.unify(part, parts[0])


# kind of statement -> way of breaking it -> function of (site, the statement itself, *its arguments)
WAYS: dict[str, dict[str, Callable[..., Any]]] = {
    "same": {
        "drop same": lambda site, do, a, b: None,
        "lock both": lambda site, do, a, b: [site.inner.freeze(axis, "mutant") for axis in (a, b)],
    },
    "unify": {"drop unify": lambda site, do, a, b: None},
    "lock": {"drop lock": lambda site, do, axis, text: None},
    "fixed": {"free": lambda site, do, size, text: site.fresh(size)},
    "fixed_segment": {"free": lambda site, do, size: Axis(size)},
    "new": {"free": lambda site, do, dim: site.fresh(site.shape[dim])},
    "equal_counts": {
        "drop equal counts": lambda site, do, parts, text: None,
        "tie": lambda site, do, parts, text: tie(site, parts),
    },
    "contract": {"drop contract": lambda site, do, *axes: None},
    "weight": {"drop weight": lambda site, do, *axes: None},
    "macs": {"drop macs": lambda site, do, *factors: None},
    "statistic": {"drop statistic": lambda site, do, *axes: None},
    "reorder": {"keep the order": lambda site, do, axis, order: do(axis, order) and axis},
    "factor": {"swap factors": lambda site, do, axis, n: backwards(site.inner.factors, axis, (n, axis.size // n))},
    "factors": {"swap factors": lambda site, do, axis, lengths: backwards(do, axis, lengths)},
    "segments": {"swap pieces": lambda site, do, axis, lengths: backwards(do, axis, lengths)},
    "cut": {"swap pieces": lambda site, do, axis, at: backwards(site.inner.segments, axis, (at, axis.size - at))},
    "product": {"swap factors": lambda site, do, parts: do(parts[::-1])},
    "concat": {"swap pieces": lambda site, do, parts: do(parts[::-1])},
}
ON_SITE = ("same", "lock", "fixed", "fixed_segment", "new", "equal_counts", "contract", "weight", "macs", "statistic", "reorder")
ON_ALGEBRA = ("unify", "factor", "factors", "segments", "cut")
FUNCTIONS = ("product", "concat")


def forget(site: Site, rule: Callable[..., Any]) -> Any:
    """No relation at all, results of new axes."""
    return [[site.fresh(n) for n in shape] for shape in site.shapes]


def refuse(site: Site, rule: Callable[..., Any]) -> Any:
    """Everything that the op touches is frozen."""
    return site.lock_all("mutant")


def exchange(site: Site, rule: Callable[..., Any]) -> Any:
    """Two dims of one size in the first result change places."""
    out = rule(site)
    first = out[0] if out and isinstance(out[0], list) else out
    for i, a in enumerate(first):
        for j in range(i):
            if a is not None and first[j] is not None and first[j].size == a.size and first[j].find() is not a.find():
                first = [*first]
                first[i], first[j] = first[j], first[i]
                return [first, *out[1:]] if out and isinstance(out[0], list) else first
    return out


def unnoted(name: str) -> Callable[[Site, Callable[..., Any]], Any]:
    """What the rule writes into the state's `name` is taken out again."""

    def run(site: Site, rule: Callable[..., Any]) -> Any:
        noted = getattr(site.state, name)
        before = set(noted)
        out = rule(site)
        for key in set(noted) - before:
            noted.discard(key) if isinstance(noted, set) else noted.pop(key)
        return out

    return run


WHOLE: dict[str, Callable[[Site, Callable[..., Any]], Any]] = {
    "forget": forget, "refuse": refuse, "exchange dims": exchange,
    **{f"note no {name}": unnoted(name) for name in ("filled", "counted", "renumbered")},
}  # fmt: skip


class WatchedAlgebra:
    """The algebra as a rule sees it: its statements go through the breaker."""

    def __init__(self, site: Any, inner: Any) -> None:
        self._site, self._inner = site, inner

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if name not in ON_ALGEBRA:
            return method
        return lambda *args: self._site.breaker.statement(self._site, name, method, args)


class WatchedSite(Site):
    """A `Site` whose statements go through a breaker; what a statement does inside itself is not looked at."""

    def __init__(self, site: Site, breaker: Breaker) -> None:
        super().__init__(site.state, site.algebra, site.node)
        self.inner, self.breaker = site.algebra, breaker
        self.algebra = WatchedAlgebra(self, self.inner)


def _watch(name: str) -> None:
    plain = getattr(Site, name)

    def statement(self: WatchedSite, *args: Any) -> Any:
        if self.algebra is self.inner:
            return plain(self, *args)

        def do(*args: Any) -> Any:
            watched, self.algebra = self.algebra, self.inner
            try:
                return plain(self, *args)
            finally:
                self.algebra = watched

        return self.breaker.statement(self, name, do, args)

    setattr(WatchedSite, name, statement)


for _name in ON_SITE:
    _watch(_name)


class Breaker:
    """Stands between a rule and its site: breaks what `mutant` says or, without one, notes what could be broken."""

    def __init__(self, rule: str, mutant: Mutant | None = None) -> None:
        self.rule, self.mutant = rule, mutant
        self.seen: dict[Mutant, None] = {}

    def statement(self, site: WatchedSite, kind: str, do: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Run a statement, broken if it is the mutant's."""
        at = rule_line()
        for way, broken in WAYS[kind].items():
            mutant = Mutant(self.rule, way, at)
            if mutant == self.mutant:
                return broken(site, do, *args)
            self.seen[mutant] = None
        return do(*args)

    def around(self, rule: Callable[..., Any]) -> Callable[[Site], Any]:
        """`rule` under this breaker."""

        def watched(site: Site) -> Any:
            with self._functions(own := WatchedSite(site, self), rule):
                return rule(own)

        def apply(site: Site) -> Any:
            self.seen.update({Mutant(self.rule, way): None for way in WHOLE})
            if self.mutant is not None and self.mutant.at is None:
                return WHOLE[self.mutant.way](site, rule)
            return watched(site)

        return apply

    @contextmanager
    def _functions(self, site: WatchedSite, rule: Callable[..., Any]) -> Iterator[None]:
        """Watch `product` and `concat` as the rule's module and `Site` call them."""
        places = [(names, n) for names in (rule.__globals__, vars(PROPAGATE)) for n in FUNCTIONS if n in names]
        saved = [(names, n, names[n]) for names, n in places]
        for names, n, plain in saved:
            names[n] = lambda parts, n=n, plain=plain: self.statement(site, n, plain, (list(parts),))
        try:
            yield
        finally:
            for names, n, plain in saved:
                names[n] = plain


def rule_line() -> tuple[str, int]:
    """File and line of the innermost frame that is in depgraph/rules."""
    frame = sys._getframe(1)
    while not frame.f_code.co_filename.startswith(RULES_FOLDER):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


@contextmanager
def under(breakers: Sequence[Breaker]) -> Iterator[None]:
    """The registry with the rules of these breakers replaced."""
    saved = dict(REGISTRY)
    for breaker in breakers:
        broken = breaker.around(saved[breaker.rule])
        REGISTRY.update(dict.fromkeys(RULES[breaker.rule], broken))
    try:
        yield
    finally:
        REGISTRY.update(saved)


# ------------------------------------------------------------------------------------------------ who objects


class Subject:
    """A network that is traced once and then pruned again and again under broken rules."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entry = TINY.get(name) or ZOO[name]
        self.model, self.inputs = self.entry.model(), self.entry.example()
        self.trace = depgraph.trace(self.model, self.inputs)
        self.meta = {node: dict(node.meta) for node in self.trace.graph.nodes}

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """`depgraph` takes the recorded trace instead of making a new one."""
        for node, meta in self.meta.items():  # propagation keeps what it knows there
            node.meta.clear()
            node.meta.update(meta)
        plain = PRUNE.trace
        PRUNE.trace = lambda model, inputs: self.trace
        try:
            yield
        finally:
            PRUNE.trace = plain

    def graph(self) -> Any:
        with self.replayed():
            return depgraph.analyze(self.model, self.inputs)

    @cached_property
    def mutants(self) -> list[Mutant]:
        """All that can be broken in the rules that this network calls."""
        breakers = [Breaker(rule) for rule in RULES]
        with under(breakers):
            self.graph()
        return [m for b in breakers for m in b.seen]

    def facts(self) -> Any:
        """Everything that a plan depends on, in a form that can be compared."""
        graph = self.graph()
        number = {id(g.axis): i for i, g in enumerate(graph.groups)}

        def plain(p: Any) -> list[Any]:
            return sorted((sorted(number.get(a, -1) for a in term), n) for term, n in p.items())

        members = [
            [(m.name, m.dim, m.role, m.rows, m.indices.tobytes()) for m in g.members] for g in graph.groups
        ]
        relations = sorted(str(plain(p)) for p, _ in graph.constraints)
        sizes = graph.sizes
        return members, relations, [
            sorted(str((k, plain(sizes.reduce(p, graph.free)))) for k, p in sizes.attributes.items()),
            [plain(sizes.reduce(x.target, graph.free)) for x in sizes.literals], sorted(graph.state.renumbered),
            [plain(p) for _, factors in graph.state.work for p in [depgraph.axes.count(f, graph.free) for f in factors if isinstance(f, Axis)]],
        ]  # fmt: skip

    @cached_property
    def unbroken(self) -> Any:
        return self.facts()

    @cached_property
    def probes(self) -> list[Callable[[], str]]:
        """The checks that find nothing while no rule is broken."""
        return [check for check in self._checks() if not said_by(check)]

    def _checks(self) -> list[Callable[[], str]]:
        checks = [self._groups] if isinstance(self.entry, Tiny) else []
        checks.append(lambda: self._prune({"pruning_ratio": 0.5}, shrinks=True))
        for seed, options in ((1, {"pruning_ratio": 0.5}), (2, {"pruning_ratio": 0.3}), (3, {"max_params": 0.7})):
            checks.append(
                lambda seed=seed, options=options: self._prune({**options, "importance": random_importance(seed)})
            )
        checks.append(self._macs)
        return checks

    def _groups(self) -> str:
        sizes = tuple(sorted(g.units for g in self.graph().groups))
        return "" if sizes == self.entry.groups else f"groups are {sizes}, should be {self.entry.groups}"

    def _prune(self, options: dict[str, Any], shrinks: bool = False) -> str:
        with self.replayed():
            result = depgraph.prune(self.model, self.inputs, verify=False, **options)
        assert_state_matches_plan(self.model, result.model, result.plan)
        assert_equal_to_masked(self.model, result, self.inputs, tol=1e-9 if self.entry.dtype is torch.float64 else 1e-2)
        return "; ".join(broken_expectations(self.entry, self.model, result.model)) if shrinks else ""

    def _macs(self) -> str:
        graph = self.graph()
        predicted = depgraph.CostModel(graph).macs({a: axis.size for a, axis in graph.free.items()})
        counted = self._counted_macs
        return "" if predicted == counted else f"{predicted} MACs are predicted, torch counts {counted}"

    @cached_property
    def _counted_macs(self) -> int:
        return depgraph.count_macs(self.model, self.inputs)

    def objection(self, mutant: Mutant) -> str | None:
        """What objects to the mutant; "" if nothing does, None if it changes nothing here."""
        unbroken, probes = self.unbroken, self.probes
        with under([Breaker(mutant.rule, mutant)]):
            changed: list[bool] = []
            said = said_by(lambda: "" if changed.append(self.facts() != unbroken) else "")
            if changed == [False]:
                return None
            return said or next(filter(None, map(said_by, probes)), "")


def said_by(check: Callable[[], str]) -> str:
    """What a check objects to, an exception included."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}".splitlines()[0]


@cache
def subjects() -> list[Subject]:
    """Every network, the smallest traces first."""
    return sorted(map(Subject, [*TINY, *ZOO]), key=lambda s: len(s.meta))


@cache
def mutants() -> dict[Mutant, list[Subject]]:
    """Every mutant that some network's rules have, with those networks."""
    found: dict[Mutant, list[Subject]] = {}
    for subject in subjects():
        for mutant in subject.mutants:
            found.setdefault(mutant, []).append(subject)
    return found


@dataclass
class Verdict:
    """`objection` is what some test would say, or "" if the mutant survives; `idle`: it changed nothing anywhere."""

    objection: str = ""
    subject: str = ""
    idle: bool = True
    tried: int = field(default=0)


def verdict(mutant: Mutant) -> Verdict:
    """Try the mutant on the networks that it could matter to until one objects."""
    out = Verdict()
    for subject in mutants()[mutant]:
        said = subject.objection(mutant)
        if said is not None:
            out.idle, out.tried = False, out.tried + 1
        if said:
            out.objection, out.subject = said, subject.name
            break
    return out


# ------------------------------------------------------------------------------------------------ tiny networks


@dataclass(frozen=True)
class Tiny(Entry):
    """A network of a line or two for one op; `groups` are the sizes of all its groups by hand, ascending."""

    groups: tuple[int, ...] = ()


TINY: dict[str, Tiny] = {}


def main(labels: Sequence[str]) -> None:
    """Print every mutant of the rules (all, if none is given) with what objects to it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    everything = mutants()
    for rule in RULES:
        if labels and rule.removeprefix("aten::") not in labels:
            continue
        mine = [m for m in everything if m.rule == rule]
        print(f"{rule}: {len(mine)} mutants" if mine else f"{rule}: NO NETWORK CALLS IT")
        for mutant in mine:
            v = verdict(mutant)
            state = "idle" if v.idle else "killed" if v.objection else "SURVIVES"
            print(f"  {state:8} {str(mutant)[:110]:110} {v.subject} {v.tried}: {v.objection[:90]}")


if __name__ == "__main__":
    main(sys.argv[1:])
