"""Parameters that no run reached, beside executed siblings of the same structure: experts that no token chose.

In a list or dict of modules, one that no run called ranges over the axes that its executed siblings range over. What
the sibling shares with the rest of the model, the other one shares too (the model's hidden width, say). What the
sibling has for itself (the inner width of an expert), the other one has for itself: it loses as many indices, though
not the same ones, so every number that the code computes from sizes holds for both.

Where siblings do not agree on what they share, nothing is guessed: those axes are frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..axes import axes
from ..axes.axes import ATOM, Axis, Reason
from ..axes.op_call import DimFacts, Dims
from ..tracing.attributes import read_attribute
from ..tracing.recorder import SLOT, Node, record_of
from ..tracing.sizes import Expr

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
TIED = "keeps as many indices as its executed sibling, in a module that no run used"
SIBLINGS_DISAGREE = "is not the same in all siblings of a module that no run used"


@dataclass(frozen=True)
class Sibling:
    """A member of a container that no run reached, whole or in part, and an executed one like it (paths)."""

    path: str
    executed: str
    tensors: tuple[str, ...]  # names of those of its tensors that no run reached


def follow_siblings(state: DimFacts, model: nn.Module) -> list[Sibling]:
    """Give the tensors that no run reached the axes of an executed sibling, wherever there is one."""
    family = _Family(state, model)
    found: list[Sibling] = []
    members = _by_container(state, family)
    for path in sorted(members, key=lambda p: -p.count(".")):  # inner ones first: others may follow them
        names = members[path]
        lookalikes = family.executed_lookalikes(path, names)
        if lookalikes and _adopt(state, family, path, lookalikes, names):
            found.append(Sibling(path, lookalikes[0], tuple(names)))
    return found


def _by_container(state: DimFacts, family: _Family) -> dict[str, list[str]]:
    """Member of a container -> its unreached tensors: the innermost container that has an executed member like it."""
    found: dict[str, list[str]] = {}
    for name in state.trace.unreached:
        inner = next((m for m in family.memberships(name) if family.executed_lookalikes(m, [name])), None)
        if inner is not None:
            found.setdefault(inner, []).append(name)
    for path, names in found.items():
        held = [
            n for n in family.tensors(path).values() if n in state.trace.attribute_tensors - family.reached
        ]
        names += [n for n in held if family.executed_lookalikes(path, [*names, n])]
    return found


class _Family:
    """Which members of containers look alike."""

    def __init__(self, state: DimFacts, model: nn.Module) -> None:
        self.state, self.model = state, model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.reached = set(state.trace.tensors)
        self._looks: dict[str, object] = {}
        self._likes: dict[str, list[str]] = {}
        self._shared: dict[str, set[Axis]] = {}
        exprs = [u.expr for u in state.trace.size_uses]
        exprs += [e for _, left, right, _ in state.trace.comparisons for e in (left, right)]
        self.numbers = sorted({a for e in exprs for a in _attributes(e)}, key=str)

    def memberships(self, name: str) -> Iterator[str]:
        """The members of containers that tensor `name` belongs to, innermost first."""
        parts = name.split(".")
        for i in range(len(parts) - 1, -1, -1):
            if isinstance(self.modules.get(".".join(parts[:i])), CONTAINERS):
                yield ".".join(parts[: i + 1])

    def tensors(self, path: str) -> dict[str, str]:
        """Name below `path` -> canonical name, of every tensor of a member."""
        aliases = self.state.trace.aliases
        if path not in self.modules:
            return {"": aliases.get(path, path)}
        module = self.modules[path]
        names = [n for n, _ in module.named_parameters(remove_duplicate=False)]
        names += [n for n, _ in module.named_buffers(remove_duplicate=False)]
        names += [n[len(path) + 1 :] for n in sorted(self.state.trace.attribute_tensors) if _within(n, path)]
        return {n: aliases.get(f"{path}.{n}", f"{path}.{n}") for n in names}

    def looks(self, path: str) -> object:
        """Classes and shapes: equal for members of one structure."""
        if path not in self._looks:
            kinds = (
                [(n, type(m)) for n, m in self.modules[path].named_modules(remove_duplicate=False)]
                if path in self.modules
                else []
            )
            values = self.state.trace.values
            self._looks[path] = (
                kinds,
                [(n, values[c].shape) for n, c in self.tensors(path).items() if c in values],
            )
        return self._looks[path]

    def lookalikes(self, path: str) -> list[str]:
        """The other members of the same container with the same structure and the same numbers in sizes."""
        if path not in self._likes:
            parent, _, key = path.rpartition(".")
            container = self.modules[parent]
            keys = [*container._modules, *container._parameters]
            others = [f"{parent}.{k}" if parent else k for k in keys if k != key]
            self._likes[path] = [
                o for o in others if self.looks(o) == self.looks(path) and self._same_numbers(o, path)
            ]
        return self._likes[path]

    def _same_numbers(self, one: str, other: str) -> bool:
        for _, path, *rest in self.numbers:
            if _within(path, one):
                moved = other + path[len(one) :]
                try:
                    mine, yours = (read_attribute(self.model, (p, *rest)) for p in (path, moved))
                except (AttributeError, KeyError, IndexError):
                    return False
                if mine != yours:
                    return False
        return True

    def executed_lookalikes(self, path: str, names: Iterable[str]) -> list[str]:
        """Siblings of `path` in which the counterparts of all of `names` are known, those that a run reached first."""
        below = {c: n for n, c in self.tensors(path).items()}
        known = self.state.trace.tensors  # what a run reached, and what has followed it since
        found: dict[str, bool] = {}
        for other in self.lookalikes(path):
            theirs = self.tensors(other)
            if all(n in below and theirs[below[n]] in known for n in names):
                found[other] = all(theirs[below[n]] in self.reached for n in names)
        return sorted(found, key=lambda o: not found[o])

    def shared(self, path: str) -> set[Axis]:
        """The atoms that stand anywhere but in the tensors and calls of member `path`."""
        if path not in self._shared:
            found = self._shared[path] = set()
            for node, results in self.state.dims.items():
                place = str(node.target) if node.op == "get_attr" else record_of(node).module
                if not _within(place, path):
                    found.update(a for dims in results for a in _atoms(dims))
        return self._shared[path]


def _atoms(dims: Dims) -> list[Axis]:
    return [a for axis in dims if axis is not None for a in axes.atoms(axis)]


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(root + ".")


def _attributes(expr: Expr) -> Iterator[tuple[Any, ...]]:
    if isinstance(expr, tuple):
        if expr[0] == "attr":
            yield expr
        elif expr[0] != "dim":
            for part in expr[1:]:
                yield from _attributes(part)


def _adopt(state: DimFacts, family: _Family, path: str, lookalikes: list[str], names: list[str]) -> bool:
    """Give the tensors `names` of member `path` axes as in its sibling `lookalikes[0]`; whether that fits."""
    trace, model = state.trace, lookalikes[0]
    mine, theirs = family.tensors(path), family.tensors(model)
    known: dict[Axis, Axis] = {}
    for below, name in mine.items():  # what a partly reached member says of itself
        if name in trace.tensors and theirs[below] in trace.tensors and name != theirs[below]:
            pairs = _aligned(state, theirs[below], name)
            if pairs is None:
                return False
            for a, b in pairs:
                if known.setdefault(a, b) is not b:
                    return False
    wanted = {theirs[b]: n for b, n in mine.items() if n in names}
    for other in lookalikes[1:]:
        _freeze_torn(state, family, model, other, wanted, known)
    copy = _Copy(state, family.shared(model), known)
    made: dict[Node, Node] = {}
    for source, name in wanted.items():
        old = trace.tensors[source]
        with trace.graph.inserting_before(next(n for n in reversed(trace.graph.nodes) if n.op == "output")):
            node = trace.graph.create_node("get_attr", name.replace(".", "_"))
        node.target = name
        node.meta[SLOT] = replace(record_of(old), module=path, source="")
        state.dims[node] = [copy.dims(state.dims[old][0])]
        trace.tensors[name] = made[old] = node
        if name not in trace.attribute_tensors:
            trace.unreached.remove(name)
    for operand, produced, consumed in list(state.weights):
        if operand in made:
            state.weights.append((made[operand], copy.dims(produced), copy.dims(consumed)))
    for product in list(state.products):
        if product.weight in made:
            state.products.append(
                replace(product, weight=made[product.weight], consumed=copy.dims(product.consumed))
            )
    return True


def _aligned(state: DimFacts, one: str, other: str) -> list[tuple[Axis, Axis]] | None:
    """Pairs of atoms that stand at the same places of two tensors, or None where these are built differently."""
    pairs: list[tuple[Axis, Axis]] = []
    dims = (state.dims[state.trace.tensors[n]][0] for n in (one, other))
    for a, b in zip(*dims, strict=True):
        left, right = (axes.atoms(x) if x is not None else [] for x in (a, b))
        if [x.size for x in left] != [x.size for x in right]:
            return None
        pairs += zip(left, right, strict=True)
    return pairs


def _freeze_torn(
    state: DimFacts, family: _Family, model: str, other: str, wanted: Iterable[str], known: dict[Axis, Axis]
) -> None:
    """Freeze what the executed siblings `model` and `other` do not both share, or both have for themselves."""
    theirs, others = family.tensors(model), family.tensors(other)
    below = {c: n for n, c in theirs.items()}
    for name in wanted:
        counterpart = others[below[name]]
        if counterpart not in family.reached:
            continue
        pairs = _aligned(state, name, counterpart)
        if pairs is None:
            torn = [a for n in (name, counterpart) for a in _atoms(state.dims[state.trace.tensors[n]][0])]
        else:
            torn = [
                atom
                for a, b in pairs
                if a is not b and a not in known
                if a in family.shared(model) or b in family.shared(other)
                for atom in (a, b)
            ]
        for atom in torn:
            atom.frozen = atom.frozen or Reason(SIBLINGS_DISAGREE)


class _Copy:
    """Axes of an executed sibling -> those of another: the same where shared, else new ones of equal count."""

    def __init__(self, state: DimFacts, shared: set[Axis], known: dict[Axis, Axis]) -> None:
        self.state, self.shared, self.made = state, shared, dict(known)

    def dims(self, dims: Dims) -> Dims:
        return [None if a is None else self.axis(a) for a in dims]

    def axis(self, axis: Axis) -> Axis:
        axis = axis.find()
        if axis not in self.made:
            self.made[axis] = self._new(axis)
        return self.made[axis].find()

    def _new(self, axis: Axis) -> Axis:
        if axis.kind == ATOM and axis in self.shared:
            return axis
        new = Axis(axis.size, axis.kind, tuple(self.axis(p) for p in axis.parts))
        if axis.kind == ATOM:
            new.frozen = axis.frozen
            if axis.original_axis.find() is not axis:
                new.original_axis = self.made.setdefault(axis.original_axis, Axis(axis.original_axis.size))
            if axis.frozen is None:
                self.state.equal_counts.append(([axis, new], Reason(TIED)))
        if axis.over is not None:
            new.over = self.axis(axis.over)
        return new
