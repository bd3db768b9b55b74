"""Who competes with whom, and what each group must keep.

A *competition group* is a set of blocks whose units compete: they lose a share of their units together, the lowest scores first.

* `"local"`: every block is a competition group of its own, so each loses the same share.
* `"global"`: all blocks are one competition group.
* `"isomorphic"`: blocks of like structure are a competition group (Fang et al., "Isomorphic Pruning for Vision Models", ECCV 2024):
  heads compete with heads and hidden units with hidden units, since scores of unlike structures do not compare.
* a list of `Scope`: each with a ratio of its own is a competition group.

What `pruning_ratio`, as a number or by names, or the ratio of a `Scope` says of a competition group is what it loses. Budgets decide
about the groups of which nothing is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from ..axes.axes import Axis
from ..base.checks import fraction, shown, whole_number
from ..base.errors import InputError
from ..grouping.graph import DependencyGraph, Group
from ..grouping.naming import NAMING, Name, given_names, named
from ..tracing.recorder import record_of
from .blocks import Block

SCOPES = ("local", "global", "isomorphic")
DEFAULT_RATIO = 0.5  # the default where nothing else is given
MOST = (
    0.9  # the share that a group loses at most where nothing is said of it, as long as budgets can be met so
)


@dataclass(frozen=True)
class Scope:
    """What part of a model loses, and what it keeps.

    Attributes:
        modules: module paths, parameter names, or globs of them (or one of these): the groups whose units these
            produce. Where several scopes name a group, its ratio is that of the last one; floors and caps all hold.
        ratio: the share of the units of these groups, together, that goes, the lowest scores first.
        at_least: units that stay of each group: a number (int), or a share of them (float up to 1).
        at_most_ratio: the largest share of the units of each group that may go.
    """

    modules: Name | Sequence[Name]
    ratio: float | None = None
    at_least: float | None = None
    at_most_ratio: float | None = None


@dataclass
class CompetitionGroup:
    """Blocks (by number) whose units compete; `ratio` is the share that goes, None where budgets decide."""

    blocks: list[int]
    ratio: float | None = None
    name: str = ""


@dataclass
class Rules:
    """What was requested, found in a graph.

    Attributes:
        ratios: axis -> the ratio that the last name of its group says.
        owner: axis -> which of the scopes with a ratio its group belongs to.
        caps: original axis -> how many of its units may go.
        notes: one line per floor or cap of the user's, for errors.
    """

    ratios: dict[Axis, float] = field(default_factory=dict)
    owner: dict[Axis, int] = field(default_factory=dict)
    caps: dict[Axis, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def check_scope(scope: Any, ratio: Any, max_ratio: float | None) -> None:
    """Refuse what is out of range or contradicts itself.

    Raises:
        InputError: naming the argument and what it may be.
    """
    if isinstance(ratio, Mapping):
        if not ratio:
            raise InputError("pruning_ratio={} is empty: give {glob: ratio}, or a number")
        for name, value in ratio.items():
            given_names(f"the keys of pruning_ratio={shown(ratio)}", [name])
            fraction(f"pruning_ratio[{name!r}]", value, zero=True)
    elif ratio is not None:
        fraction("pruning_ratio", ratio)
    if max_ratio is not None:
        fraction("max_ratio", max_ratio, one=True)
    if isinstance(ratio, float) and max_ratio is not None and ratio > max_ratio:
        raise InputError(f"pruning_ratio={ratio} and max_ratio={max_ratio} contradict each other")
    if scope is None or (isinstance(scope, str) and scope in SCOPES):
        if isinstance(ratio, Mapping) and scope not in (None, "local"):
            raise InputError(
                f"scope={scope!r} and a pruning_ratio by names contradict each other: units that compete have one ratio\n"
                "  fix: give each part that competes a depgraph.Scope(modules, ratio=...)"
            )
        return
    if isinstance(scope, (Scope, str)) or not isinstance(scope, Sequence) or not scope:
        raise InputError(
            f"scope must be one of {', '.join(SCOPES)}, or a list of depgraph.Scope, not {scope!r}"
        )
    for one in scope:
        _check_one(one)
    if isinstance(ratio, Mapping):
        raise InputError(
            "a list of scopes and a pruning_ratio by names contradict each other: give one of them"
        )


def _check_one(scope: Any) -> None:
    if not isinstance(scope, Scope):
        raise InputError(f"scope must be a list of depgraph.Scope, not of {scope!r}")
    given_names(f"modules of {shown(scope)}", scope.modules)
    if scope.ratio is scope.at_least is scope.at_most_ratio is None:
        raise InputError(f"{scope} is empty: give ratio, at_least or at_most_ratio")
    if scope.ratio is not None:
        fraction(f"ratio of {scope}", scope.ratio, zero=True)
    if scope.at_most_ratio is not None:
        fraction(f"at_most_ratio of {scope}", scope.at_most_ratio, zero=True, one=True)
    least: Any = scope.at_least
    if isinstance(least, float):
        fraction(f"at_least of {scope}", least, zero=True, one=True)
    elif least is not None:
        whole_number(f"at_least of {scope}", least)
    if scope.ratio is not None and scope.at_most_ratio is not None and scope.ratio > scope.at_most_ratio:
        raise InputError(f"ratio and at_most_ratio of {scope} contradict each other")


def rules_of(
    graph: DependencyGraph, groups: Sequence[Group], scope: Any, ratio: Any, max_ratio: float | None,
    lost: Mapping[Axis, int],
) -> Rules:  # fmt: skip
    """What is asked of each of `groups`.

    Args:
        graph: the dependency graph.
        groups: those that are cut.
        scope: as in `choose`, checked.
        ratio: `pruning_ratio` there.
        max_ratio: the largest share of any group that may go.
        lost: original axis -> units that an earlier plan took: shares count them, too.

    Raises:
        InputError: a name that matches nothing in the model, or none of `groups` though it has a ratio; a floor above
            the units of a group.
    """
    rules = Rules()
    originals: dict[Axis, int] = {}
    for g in groups:
        originals[g.axis.original_axis] = (
            originals.get(g.axis.original_axis, lost.get(g.axis.original_axis, 0)) + g.units
        )
    if max_ratio is not None:
        rules.caps = {p: _share(max_ratio, n) for p, n in originals.items()}
    if isinstance(ratio, Mapping):
        for pattern, value in ratio.items():
            for g in _groups_named(graph, groups, pattern, "pruning_ratio"):
                rules.ratios[g.axis] = float(value)
    for i, one in enumerate(() if scope is None or isinstance(scope, str) else scope):
        patterns = given_names("modules", one.modules)
        needed = "scope" if one.ratio is not None else ""
        found = {g.axis: g for p in patterns for g in _groups_named(graph, groups, p, needed)}
        for a, g in found.items():
            if one.ratio is not None:
                rules.owner[a] = i
            _cap(rules, one, g, originals[g.axis.original_axis])
    rules.caps = {p: max(0, n - lost.get(p, 0)) for p, n in rules.caps.items()}
    return rules


def _groups_named(graph: DependencyGraph, groups: Sequence[Group], pattern: Name, needed: str) -> list[Group]:
    """The group of that name, or those whose units the tensors that `pattern` names produce."""
    if isinstance(pattern, str) and pattern in graph.named:
        hit = {m.name for m in graph.named[pattern].members}
        found = [g for g in groups if g.name == pattern]
    else:
        hit, known = named(graph, pattern)
        if not known:
            raise InputError(f"{needed or 'scope'} matches nothing in this model: {pattern!r}\n{NAMING}")
        hit = {graph.trace.aliases.get(n, n) for n in hit}
        found = [g for g in groups if any(m.name in hit and m.role == "produces" for m in g.members)]
        found = found or [g for g in groups if g.members[0].name in hit]
    if needed and not found:
        reasons = {f.reason for f in graph.frozen if f.name in hit}
        why = "; ".join(sorted(map(str, reasons))[:3]) or "it produces no units of its own"
        raise InputError(f"{needed} names {pattern!r}, where nothing can be removed: {why}")
    return found


def _cap(rules: Rules, scope: Scope, group: Group, units: int) -> None:
    """Hold what `scope` says that `group`, whose original dim has `units`, keeps."""
    may_go = units
    if scope.at_least is not None:
        share = isinstance(scope.at_least, float)
        least = ceil(scope.at_least * units - 1e-9) if share else int(scope.at_least)
        if least > units:
            raise InputError(
                f"at_least={scope.at_least} of {scope} is above the {units} units of {group.name}"
            )
        may_go = units - least
        rules.notes.append(f"{group.name}: at least {least:,} of {units:,} units")
    if scope.at_most_ratio is not None:
        may_go = min(may_go, _share(scope.at_most_ratio, units))
        rules.notes.append(
            f"{group.name}: at most {scope.at_most_ratio:.0%} of {units:,} units may be removed"
        )
    original = group.axis.original_axis
    rules.caps[original] = min(rules.caps.get(original, units), may_go)


def _share(ratio: float, units: int) -> int:
    return int(ratio * units + 1e-9)


def competition_groups(
    graph: DependencyGraph, blocks: Sequence[Block], scope: Any, ratio: Any, rules: Rules, budgets: bool
) -> list[CompetitionGroup]:
    """The competition groups of `blocks`; blocks of which nothing is said stay whole, unless there are `budgets`.

    Args:
        graph: the dependency graph.
        blocks: all of them.
        scope: as in `choose`, checked; without one, units compete where budgets decide, and not otherwise.
        ratio: `pruning_ratio` there.
        rules: what was found of them.
        budgets: whether there are any.
    """
    if isinstance(ratio, Mapping):
        return _by_names(blocks, rules) + _rest(
            graph, blocks, rules.ratios, "global" if budgets else None, None
        )
    if scope is None or isinstance(scope, str):
        number = ratio if ratio is not None or budgets else DEFAULT_RATIO
        return _rest(graph, blocks, {}, scope or ("global" if budgets else "local"), number)
    if ratio is None and not budgets and not rules.owner:
        ratio = DEFAULT_RATIO
    found: dict[int, CompetitionGroup] = {}
    for i, block in enumerate(blocks):
        owners = [rules.owner[g.axis] for g in block.groups if g.axis in rules.owner]
        if owners:
            last = max(owners)
            found.setdefault(last, CompetitionGroup([], scope[last].ratio, f"scope {last}")).blocks.append(i)
    how = "local" if ratio is not None else "global" if budgets else None
    return [*found.values(), *_rest(graph, blocks, rules.owner, how, ratio)]


def _by_names(blocks: Sequence[Block], rules: Rules) -> list[CompetitionGroup]:
    """A competition group for each block that has a ratio by name: the smallest that its groups have, as they go together."""
    found = []
    for i, block in enumerate(blocks):
        ratios = [rules.ratios[g.axis] for g in block.groups if g.axis in rules.ratios]
        if ratios:
            found.append(CompetitionGroup([i], min(ratios)))
    return found


def _rest(
    graph: DependencyGraph,
    blocks: Sequence[Block],
    taken: Mapping[Axis, Any],
    how: str | None,
    ratio: float | None,
) -> list[CompetitionGroup]:
    """The competition groups of the blocks none of whose axes is in `taken`."""
    rest = [i for i, b in enumerate(blocks) if not any(g.axis in taken for g in b.groups)]
    if how is None or not rest:
        return []
    if how == "local":
        return [CompetitionGroup([i], ratio) for i in rest]
    if how == "global":
        return [CompetitionGroup(rest, ratio)]
    alike: dict[object, list[int]] = {}
    for i in rest:
        alike.setdefault(tuple(sorted({structure(graph, g) for g in blocks[i].groups})), []).append(i)
    return [CompetitionGroup(found, ratio) for found in alike.values()]


def structure(graph: DependencyGraph, group: Group) -> tuple[Any, ...]:
    """What a group is made of, without sizes and names: by the ops that its tensors go into, their dims and roles."""
    found = []
    for m in group.members:
        node = graph.trace.tensors[m.name]
        ops = tuple(sorted({str(user.target) for user in node.users}))
        found.append((ops, len(record_of(node).shape), m.dim, m.role, m.rows is not None))
    return tuple(sorted(found))
