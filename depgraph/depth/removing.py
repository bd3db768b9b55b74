"""Chosen branches -> a plan without them: stand-ins, children that go, and the numbers and lists that count children."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, product
from typing import Any

import torch
from torch import nn

from ..base.errors import VerificationError
from ..base.inputs import each_example
from ..base.switches import same_random_state, without_warnings
from ..config.origin import build, built_from, outermost
from ..plan.plan import SILENT, Plan, Removal, Repair
from ..surgery.apply import apply
from ..surgery.on_demand import Use
from ..surgery.remove import CHANNELS, CONTAINERS
from ..tracing.attributes import INTERNALS, holders, numbers_in, put
from ..tracing.caches import nothing_kept
from ..tracing.tensors import all_tensors, named_tensors, skeleton
from ..verify.compare import apart
from ..verify.masked import Draws
from ..verify.runs import Setup, run_smaller, silence
from ..verify.weights import DrawnValues
from .branches import Branch, Residual

Place = tuple[Any, ...]  # (module path, attribute, *keys into it)
ALIKE = 1e-3  # of outputs that are computed by the same ops, in the model's own type
MOST_BUILDS = 64  # of a class with other numbers, to find the one that counts layers


def without(
    residual: Residual, chosen: Sequence[Branch], example_inputs: Any, *, compact: bool = True
) -> Plan:
    """The plan that removes the `chosen` branches and nothing else.

    Args:
        residual: the model and where its branches are.
        chosen: some of its branches.
        example_inputs: as for `prune`: the shorter model must run on them, and compute what the model without the branches does.
        compact: take children out of their containers where nothing of them is left; otherwise stand-ins keep all names.
    """
    model = residual.model
    shapes = {n: tuple(t.shape) for n, t in named_tensors(model)[0].items()}
    inside: dict[str, Removal] = {}
    for branch in chosen:
        for r in branch.removals:
            if r.leaves in SILENT or r.path not in inside:
                inside[r.path] = r
    plan = Plan(shapes=shapes, aliases=dict(named_tensors(model)[1]), removals=[*inside.values()])
    numbers = _indices(model, plan.removals)
    plan = replace(plan, repairs=numbers)
    if not compact:
        return plan
    gone, terms = residual.children(chosen), residual.children_added(chosen)
    for removals in ([*gone, *terms], gone) if terms else (gone,):
        if not removals:
            return plan
        fuller = replace(plan, removals=[*plan.removals, *removals])
        fuller.repairs = _indices(model, fuller.removals)
        fuller = _configured(model, fuller)
        try:
            found = apply(model, fuller)
        except Exception:  # noqa: BLE001  code of the user's that runs while modules are copied
            continue
        if not _differs(residual, fuller, found, example_inputs):
            return fuller
    return plan


def usable(residual: Residual, example_inputs: Any) -> list[Branch]:
    """The branches whose modules can be replaced by stand-ins: the rest is noted as refused.

    Where code in a branch needs other sizes than stand-ins give it (it takes a fused projection apart), those inside yield as many channels
    as the modules did, and the last a single zero.
    """
    found = residual.branches
    if residual.weights is None and any(t.is_meta for t in residual.model.parameters()):
        return list(found)

    def problem(chosen: Sequence[Branch]) -> str:
        plan = without(residual, chosen, example_inputs, compact=False)
        return _differs(residual, plan, apply(residual.model, plan), example_inputs)

    if not found or not problem(found):
        return list(found)
    why = {b.name: problem([b]) for b in found}
    for i, b in enumerate(found):
        if why[b.name] and not problem([other := _with_sizes(residual.model, b)]):
            found[i], why[b.name] = other, ""
    residual.refused.update({f"{name}: {text}": None for name, text in why.items() if text})
    return [b for b in found if not why[b.name]]


def _with_sizes(model: nn.Module, branch: Branch) -> Branch:
    """The same branch with stand-ins that do not take their sizes from what they are given."""

    def leaves(r: Removal) -> str:
        if r.path == branch.output:
            return "zero"
        return "channels" if CHANNELS.keys() & vars(model.get_submodule(r.path)).keys() else r.leaves

    return replace(branch, removals=tuple(replace(r, leaves=leaves(r)) for r in branch.removals))


def _differs(residual: Residual, plan: Plan, small: nn.Module, example_inputs: Any) -> str:
    """Why `small` does not compute what the model does where the plan's branches yield zeros; "" where it does.

    Values that are elsewhere are drawn: what code needs of a module depends on sizes.
    """
    model = residual.model
    tensors = all_tensors(model)
    silent = skeleton(model, {id(t): t for t in tensors.values()})
    silence(silent, plan)
    drawn = None
    if residual.weights is not None:
        drawn = DrawnValues(tensors, {n for n, t in tensors.items() if t.is_meta})
        drawn.room = residual.weights.room
    for example in each_example(example_inputs):
        run = Setup(example, values=drawn)
        run.named[id(small)] = {plan.moves.old(n): t for n, t in all_tensors(small).items()}
        with same_random_state(), nothing_kept(model):
            try:
                expected = run_smaller(silent, silent, Plan(), run, Draws(), Use())
            except Exception as error:  # noqa: BLE001  the user's code, without a branch
                return f"without it the model fails ({type(error).__name__})"
            try:
                off = apart(run_smaller(small, small, Plan(), run, Draws(), Use()), expected)
                if drawn is None:
                    with torch.no_grad(), without_warnings():
                        example.run(small)  # by the kernels that the user's own calls take, too
            except Exception as problem:  # noqa: BLE001  code around a module that asks for what a stand-in lacks
                name = "" if isinstance(problem, VerificationError) else f"{type(problem).__name__}: "
                return f"code around it needs its module ({name}{problem})"
        if not off <= ALIKE:
            return "the model without its module computes something else than with zeros in its place"
    return ""


# ------------------------------------------------------------------------------------------- numbers of children


def _indices(model: nn.Module, removals: Sequence[Removal]) -> list[Repair]:
    """Attributes in which the children of a container keep their own number, where what is numbered before them went.

    Such as the place of a layer's keys and values in a cache: places stay without gaps.
    """
    gone = {r.path for r in removals if r.leaves == "nothing"}
    removed = [r.path for r in removals]
    repairs = []
    for path, container in model.named_modules():
        inside = f"{path}." if path else ""
        if not isinstance(container, CONTAINERS) or not any(p.startswith(inside) for p in removed):
            continue
        for (inner, attribute), numbers in numbered(container).items():
            left = 0
            for i in range(len(container)):
                owner = ".".join(filter(None, (f"{inside}{i}", inner)))
                went = f"{inside}{i}" in gone or (i in numbers and any(is_in(owner, p) for p in removed))
                if i in numbers and not went and left != i:
                    repairs.append(Repair(owner, attribute, (), left, i))
                left += not went
    return repairs


def numbered(container: nn.Module) -> dict[tuple[str, str], dict[int, int]]:
    """(path in a child, attribute) -> the numbers there by child, where each is the child's own."""
    found: dict[tuple[str, str], dict[int, int]] = {}
    for i, child in enumerate(container.children()):
        for inner, module in child.named_modules():
            for name, value in vars(module).items():
                if type(value) is int and name not in INTERNALS:
                    found.setdefault((inner, name), {})[i] = value
    return {
        at: numbers
        for at, numbers in found.items()
        if len(numbers) > 1 and all(i == n for i, n in numbers.items())
    }


def is_in(path: str, other: str) -> bool:
    """Whether module `path` is `other`, or in it."""
    return path == other or path.startswith(f"{other}.")


def _configured(model: nn.Module, plan: Plan) -> Plan:
    """`plan` with what the model was built from: numbers that count children, and lists with an entry for each.

    A number counts the children of a container if the class, called with another one, makes so many of them.
    """
    lost: dict[str, list[int]] = {}
    for r in plan.removals:
        parent, _, child = r.path.rpartition(".")
        if r.leaves == "nothing" and child.isdigit():
            lost.setdefault(parent, []).append(int(child))
    repairs, entries = list(plan.repairs), {r.path: list(r.entries) for r in plan.removals}
    for path, module in outermost(model):
        inside = f"{path}." if path else ""
        mine = {p: gone for p, gone in lost.items() if p.startswith(inside) and p != path}
        if not mine:
            continue
        given = built_from(module)
        sizes = {p: len(model.get_submodule(p)) for p in mine}  # type: ignore[arg-type]
        choices = [[k for k, v in numbers_in(given) if v == sizes[p]] for p in mine]
        for fields in islice(product(*choices), MOST_BUILDS):
            if len(set(fields)) < len(fields):
                continue
            chosen = dict(zip(mine, fields, strict=True))
            lists = {p: list(_lists(given, f, sizes[p])) for p, f in chosen.items()}
            tries = (lists, {}) if any(lists.values()) else ({},)
            fitting = next((t for t in tries if _builds(module, given, chosen, mine, sizes, t, inside)), None)
            if fitting is None:
                continue
            for p, (name, *keys) in chosen.items():
                repairs.append(Repair(path, name, tuple(keys), sizes[p] - len(mine[p]), sizes[p]))
                for at in fitting.get(p, ()):
                    held = _read(given, at)
                    for i in mine[p]:
                        entries[f"{p}.{i}"].append(((path, *at), held[i]))
            break
    removals = [
        replace(r, entries=tuple(entries[r.path])) if r.leaves == "nothing" else r for r in plan.removals
    ]
    return replace(plan, repairs=repairs, removals=removals)


def _builds(
    module: nn.Module, given: dict[str, Any], chosen: dict[str, Place], lost: dict[str, list[int]],
    sizes: dict[str, int], lists: dict[str, list[Place]], inside: str,
) -> bool:  # fmt: skip
    """Whether the class of `module`, called with other numbers and shorter lists, makes the containers that are left."""
    try:
        arguments = {name: copy.deepcopy(value) for name, value in given.items()}
    except Exception:  # noqa: BLE001  what can't be copied can't be used
        return False
    for p, (name, *keys) in chosen.items():
        for at in lists.get(p, ()):
            held = _read(arguments, at)
            left = type(held)(e for i, e in enumerate(held) if i not in lost[p])
            arguments[at[0]] = put(arguments[at[0]], list(at[1:]), left)
        arguments[name] = put(arguments[name], list(keys), sizes[p] - len(lost[p]))
    twin = build(type(module), arguments)[0]
    if twin is None:
        return False
    made, own = dict(twin.named_modules()), dict(module.named_modules())
    for p, gone in lost.items():
        there = made.get(p.removeprefix(inside))
        if not isinstance(there, CONTAINERS) or len(there) != sizes[p] - len(gone):
            return False
    others = {n: len(m) for n, m in own.items() if isinstance(m, CONTAINERS) and inside + n not in lost}
    plan = Plan(removals=[Removal(f"{p}.{i}", "nothing") for p, gone in lost.items() for i in gone])
    left = {inside + n: p.shape for n, p in module.named_parameters()}
    shapes = {plan.moves.new(n): s for n, s in left.items() if not plan.moves.holds(n)}
    for n, size in others.items():
        name = inside + n
        if not plan.moves.holds(name):
            there = made.get(plan.moves.new(name).removeprefix(inside))
            if there is None or len(there) != size:
                return False
    return {inside + n: p.shape for n, p in twin.named_parameters()} == shapes


def _lists(given: dict[str, Any], field: Place, size: int) -> Iterator[Place]:
    """The lists of `size` plain entries in the object that holds `field`."""
    name, *keys = field
    if not keys:
        return
    holder = _read(given, (name, *keys[:-1]))
    table = vars(holder) if hasattr(holder, "__dict__") else holder if isinstance(holder, dict) else {}
    for k, v in table.items():
        plain = isinstance(v, (list, tuple)) and len(v) == size
        if plain and all(isinstance(e, (bool, int, float, str, type(None))) for e in v):
            yield (*field[:-1], k)


def _read(given: Any, place: Place) -> Any:
    value = given
    for step in place:
        value = value[step] if isinstance(value, tuple) else holders(value, step)[0][step]
    return value
