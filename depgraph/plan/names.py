"""Plans in the names of a model: wrappers put ``module`` or ``_orig_mod`` into names, and a plan is as good without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations

from torch import nn

from ..tracing.tensors import attribute_tensors, named_tensors
from ..tracing.wrappers import NAMES, inner_name, plain_names
from .plan import Plan, Scale


def renamed(plan: Plan, tensor: Callable[[str], str], module: Callable[[str], str]) -> Plan:
    """`plan` with other names of tensors, and other paths of modules."""
    return Plan(
        {tensor(name): cut for name, cut in plan.cuts.items()},
        {tensor(name): shape for name, shape in plan.shapes.items()},
        {tensor(name): tensor(first) for name, first in plan.aliases.items()},
        [replace(r, path=module(r.path)) for r in plan.repairs],
        [replace(r, path=module(r.path)) for r in plan.rewrites],
        {tensor(name): bits for name, bits in plan.entries.items()},
        [replace(f, layer=module(f.layer), norm=module(f.norm)) for f in plan.fusions],
        [
            Scale(tensor(s.scale), None if s.shift is None else tensor(s.shift), tuple(map(module, s.layers)))
            for s in plan.scales
        ],
        [replace(f, layer=module(f.layer)) for f in plan.factors],
        plan.request,
        [
            replace(
                r,
                path=module(r.path),
                entries=tuple(((module(str(at[0])), *at[1:]), entry) for at, entry in r.entries),
            )
            for r in plan.removals
        ],
        [replace(b, weight=tensor(b.weight)) for b in plan.biases],
    )


def in_new_names(plan: Plan) -> Plan:
    """`plan` without its removals, in the names that tensors and modules have once these are made."""
    moves = plan.moves
    left = replace(
        plan,
        cuts={n: c for n, c in plan.cuts.items() if not moves.holds(n)},
        shapes={n: s for n, s in plan.shapes.items() if not moves.holds(n)},
        aliases={n: f for n, f in plan.aliases.items() if not moves.holds(n)},
        repairs=[r for r in plan.repairs if not moves.holds(r.path)],
        rewrites=[r for r in plan.rewrites if not moves.holds(r.path)],
        removals=[],
        biases=[b for b in plan.biases if not moves.holds(b.weight)],
    )
    return renamed(left, moves.new, moves.new) if plan.removals else plan


def fitted(plan: Plan, model: nn.Module) -> Plan:
    """`plan` in the names of `model`, where it was made for the same one in other wrappers, or in none.

    Returns:
        `plan`, where its names are those of the model already, or no other ones fit better.
    """
    (tensors, ties), attributes = named_tensors(model), attribute_tensors(model)
    there = {*tensors, *ties, *attributes}
    if plan.shapes.keys() <= there:
        return plan
    plain = plain_names(model)
    paths = {plain(p): p for p, m in model.named_modules(remove_duplicate=False) if inner_name(m) is None}
    paths |= {path: path for path in paths.values()}
    found = renamed(plan, names_in(model, there), lambda path: _resolved(path, paths))
    better = len(found.shapes.keys() & there) > len(plan.shapes.keys() & there)
    return found if better and len(found.shapes) == len(plan.shapes) else plan


def names_in(model: nn.Module, tensors: Iterable[str]) -> Callable[[str], str]:
    """What makes of a name the one of `tensors`, names in `model`, that it is with other wrappers; else it stays."""
    there, plain = list(tensors), plain_names(model)
    names = {plain(name): name for name in there} | {name: name for name in there}
    return lambda name: _resolved(name, names)


def _resolved(name: str, there: dict[str, str]) -> str:
    """What `there` has for `name`, or for the one way to leave wrappers out of it; else `name`."""
    steps = name.split(".")
    spots = [i for i, step in enumerate(steps) if step in NAMES][:8]
    for count in range(len(spots) + 1):
        left = [[s for i, s in enumerate(steps) if i not in out] for out in combinations(spots, count)]
        found = {there[text] for rest in left if (text := ".".join(rest)) in there}
        if len(found) == 1:
            return found.pop()
    return name
