"""Branches that can go: one side of an addition that is computed from the other side, by weights used nowhere else.

They are found in the recorded graph, so blocks of any architecture are: what matters is where numbers come from, not how
modules are called. A branch goes by modules: the last one that puts it out yields zeros, those before it return what they
are given (zeros, too, where the branch writes in place), and where nothing of a child of a container is left, the child goes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

from torch import nn

from ..axes.axes import Axis
from ..axes.nodes import base_name, is_convolution, is_view, writes
from ..axes.op_call import DimFacts
from ..base.inputs import Examples
from ..base.weights import Weights
from ..grouping.propagate import propagate
from ..plan.plan import Removal
from ..surgery.remove import CONTAINERS
from ..tracing.recorder import Node, record_of
from ..tracing.trace import trace

# Ops that make zeros of zeros in their first argument.
KEEPS_ZERO = frozenset(
    {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "permute", "t", "squeeze", "unsqueeze", "expand",
     "clone", "_to_copy", "contiguous", "detach", "alias", "slice", "select", "index_select", "repeat", "roll", "flip",
     "constant_pad_nd", "relu", "relu6", "leaky_relu", "gelu", "silu", "tanh", "hardswish", "elu", "neg", "abs", "dropout",
     "native_dropout", "div", "sum", "mean", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "upsample_nearest2d",
     "upsample_bilinear2d", "pixel_shuffle"}
)  # fmt: skip
SAME = frozenset(
    {"dropout", "alias", "detach", "contiguous", "clone", "lift_fresh"}
)  # in eval mode: its argument
NEVER_NEGATIVE = frozenset({"relu", "relu6", "sigmoid", "softmax", "abs", "square", "exp", "hardsigmoid"})
KEEPS_SIGN = SAME | frozenset(
    {"max_pool2d", "max_pool2d_with_indices", "max_pool1d", "max_pool3d", "avg_pool2d", "adaptive_avg_pool2d",
     "adaptive_max_pool2d", "view", "reshape", "flatten", "transpose", "permute", "mean", "sum"}
)  # fmt: skip


@dataclass(frozen=True)
class Branch:
    """A part of a model that can go: what it adds to a sum becomes zero.

    Attributes:
        name: the module that holds it, or where that holds more, the one of its modules with most parameters.
        weights: names of the parameters that go with it.
        parameters: entries of these.
        macs: multiply-accumulates of one forward pass in it, as the rules count them.
        removals: what a plan holds where it goes.
        output: path of the module that puts it out.
        channels: the dim of that module's output that holds channels.
    """

    name: str
    weights: tuple[str, ...]
    parameters: int
    macs: int
    removals: tuple[Removal, ...] = field(repr=False)
    output: str = field(repr=False)
    channels: int = field(repr=False)


@dataclass
class _Found:
    """A branch in the graph: the sum it is a term of, the term, and the nodes that lie between the sum and its other terms."""

    sum: Node
    term: Node
    inner: set[Node]
    modules: dict[str, Removal]
    output: str


class Residual:
    """A model's branches and where they lie in its recorded run.

    Attributes:
        branches: those that can go.
        refused: of additions that look like one's, why nothing goes there.
        weights: where tensors on the meta device have their values; None: all have their own.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, weights: Weights | None = None) -> None:
        """Record a run of `model` on the (first of the) `example_inputs`."""
        first = example_inputs.examples[0] if isinstance(example_inputs, Examples) else example_inputs
        self.trace = trace(model, first, elsewhere=weights is not None)
        self.weights = weights
        if hasattr(model, "graph_signature") and hasattr(model, "module"):  # an ExportedProgram
            model = model.module()  # type: ignore[operator]
        self.model = model
        self.facts: DimFacts = propagate(self.trace)
        self.nodes = [n for n in self.trace.graph.nodes if n.op != "output" and not _elsewhere(n)]
        self.order = {n: i for i, n in enumerate(self.nodes)}
        self.outputs = set(self.trace.outputs)
        self.live = self._live()
        self.regions: dict[str, set[Node]] = {}
        for n in self.nodes:
            if n.op == "call_function":
                steps = record_of(n).module.split(".")
                for i in range(1, len(steps) + 1):
                    self.regions.setdefault(".".join(steps[:i]), set()).add(n)
        self.modules = dict(model.named_modules())
        self.refused: dict[str, None] = {}
        self.found = sorted(self._found(), key=lambda f: self.order[f.term])
        self.branches = self._described()
        self.term_of = {b.name: f.term for b, f in zip(self.branches, self.found, strict=True)}

    # ------------------------------------------------------------------------------------------------ finding

    def users(self, node: Node) -> list[Node]:
        """The calls that read a node in the recorded run, in eval mode, and on which an output depends."""
        return [u for u in node.users if u in self.live]

    def _live(self) -> set[Node]:
        """What outputs depend on, and what is written somewhere, on which they may depend."""
        ahead = [n for n in self.nodes if n in self.outputs or (n.op == "call_function" and writes(n))]
        found = set(ahead)
        while ahead:
            for a in ahead.pop().all_input_nodes:
                if a in self.order and a not in found:
                    found.add(a)
                    ahead.append(a)
        return found

    def terms(self, total: Node) -> list[Node]:
        """What a sum adds up; a sum that only this one reads is a part of it."""
        found: list[Node] = []
        for a in total.args[:2]:
            if isinstance(a, Node) and _is_sum(a) and self.users(a) == [total] and a not in self.outputs:
                found += self.terms(a)
            elif isinstance(a, Node):
                found.append(a)
        return found

    def _found(self) -> list[_Found]:
        found = []
        for n in self.nodes:
            if not _is_sum(n) or (
                len(users := self.users(n)) == 1 and _is_sum(users[0]) and n not in self.outputs
            ):
                continue
            terms = self.terms(n)
            for term in terms:
                sources = sorted((t for t in terms if t is not term), key=lambda t: -self.order.get(t, -1))
                inner = next((s for t in sources if (s := self._between(t, term))), None)
                if inner is None or terms.count(term) > 1:
                    continue
                made = self._by_modules(n, term, inner)
                if isinstance(made, _Found):
                    found.append(made)
                else:
                    self.refused[f"{_place(n)}: {made}"] = None
        return found

    def _between(self, source: Node, term: Node) -> set[Node] | None:
        """The nodes through which `term` alone is computed from `source`; None where it is not."""
        if source not in self.order or term.op != "call_function":
            return None
        least = self.order[source]
        ahead, seen = [term], {term}
        while ahead:
            for a in ahead.pop().all_input_nodes:
                if a not in seen and self.order.get(a, -1) > least:
                    seen.add(a)
                    ahead.append(a)
        reached = {source}
        for n in sorted(seen, key=lambda n: self.order[n]):
            if any(a in reached for a in n.all_input_nodes):
                reached.add(n)
        if term not in reached:
            return None
        own = {term}  # what nothing else reads: a norm in front of two branches is part of neither
        for n in sorted(reached - {source, term}, key=lambda n: -self.order[n]):
            if n not in self.outputs and all(u in own for u in self.users(n)):
                own.add(n)
        return own

    def _by_modules(self, total: Node, term: Node, inner: set[Node]) -> _Found | str:
        """The branch as modules that go; or why it can't."""
        if term in self.outputs or len(self.users(term)) != 1:
            return "what the branch puts out is used elsewhere"
        feeding = self._feeding(inner)
        mine = inner | feeding
        inside: dict[str, None] = {}
        closed = cache(lambda path: self._closed(path, mine))
        for n in sorted(inner, key=lambda n: self.order[n]):
            steps = record_of(n).module.split(".")
            paths = (".".join(steps[:i]) for i in range(1, len(steps) + 1))
            whole = (p for p in paths if p and closed(p))
            if top := next(whole, ""):
                inside[top] = None
        ends = [p for p in inside if self._returned(p) is not None and self._ends(p, inner, term)]
        weighty = [p for p in inside if any(True for _ in self.modules[p].parameters())]
        if not weighty:
            asked = {record_of(n).module for n in inner}
            again = sorted(
                p for p in asked if len([c for c in self.trace.calls.get(p, ()) if not c.training]) > 1
            )
            if again:
                return f"{', '.join(again[:3])} is called several times: its weights are used elsewhere"
            return "the branch has no module with weights of its own"
        if not ends:
            return "no module of the branch alone puts it out"
        removals: dict[str, Removal] = {}
        copies = any(map(writes, inner))  # what is written in place must not be the stream itself
        for p in dict.fromkeys([*weighty, ends[-1]]):
            returned = self._returned(p)
            if returned is None:
                return f"{p} returns something else than one tensor"
            removals[p] = Removal(p, "zeros" if copies or p == ends[-1] else "input", returned[1])
        held = {n for p in weighty for n in self._tensors_in(p)}
        for name in held:
            node = self.trace.tensors.get(name)
            if node is not None and any(u not in mine for u in self.users(node)):
                return f"{name} is used elsewhere"
        if any(first in held and not _inside(other, weighty) for other, first in self.trace.aliases.items()):
            return "its weights are tied to others"
        if held >= {n for n, _ in self.model.named_parameters()}:
            return "the whole model is in the branch"
        return _Found(total, term, inner, removals, ends[-1])

    def _closed(self, path: str, mine: set[Node]) -> bool:
        """Whether all that module `path` computes goes into itself and `mine`."""
        region = self.regions[path]
        for n in region - mine:
            if n in self.outputs or any(u not in region and u not in mine for u in self.users(n)):
                return False
            if writes(n):
                into = n.args[0]
                while (
                    isinstance(into, Node)
                    and into.op == "call_function"
                    and into not in region
                    and is_view(into)
                ):
                    into = into.args[0]
                own = isinstance(into, Node) and (into in region or set(self.users(into)) <= region | mine)
                if not own:
                    return False
        return True

    def _feeding(self, inner: set[Node]) -> set[Node]:
        """What is computed for `inner` alone: tables of positions, views of weights."""
        found: set[Node] = set()
        ahead = list(inner)
        while ahead:
            for a in ahead.pop().all_input_nodes:
                fits = a.op == "call_function" and a not in self.outputs and a in self.order
                if (
                    fits
                    and a not in inner
                    and a not in found
                    and all(u in inner or u in found for u in self.users(a))
                ):
                    found.add(a)
                    ahead.append(a)
        return found

    def _returned(self, path: str) -> tuple[Node, tuple[int, int] | None] | None:
        """The one tensor that module `path` returns, and where; None where it is called several times, or returns more."""
        calls = [c for c in self.trace.calls.get(path, ()) if not c.training]
        if len(calls) != 1 or calls[0].node is None:
            return None
        node, region = calls[0].node, self.regions.get(path, set())
        leaving = [n for n in region if n in self.outputs or any(u not in region for u in self.users(n))]
        return (node, calls[0].returns) if all(n is node for n in leaving) else None

    def _ends(self, path: str, inner: set[Node], term: Node) -> bool:
        """Whether `term` is zero where what module `path` returns is."""
        returned = self._returned(path)
        zero = {returned[0]} if returned is not None else set()
        for n in sorted(inner, key=lambda n: self.order[n]):
            name, given = base_name(n.target), n.all_input_nodes
            if n in zero or not given:
                continue
            none = name == "mul" and any(a in zero for a in given)
            none = none or (name == "add" and all(a in zero for a in given) and len(given) == 2)
            none = none or (name in KEEPS_ZERO and bool(n.args) and n.args[0] in zero)
            if none:
                zero.add(n)
        return term in zero

    def _tensors_in(self, path: str) -> set[str]:
        inside = f"{path}."
        return {n for n, _ in self.model.named_parameters() if n.startswith(inside)}

    def _described(self) -> list[Branch]:
        work: dict[Node, int] = {}
        for node, factors in self.facts.work:
            own = [f.size if isinstance(f, Axis) else f for f in factors if f is not None]
            work[node] = work.get(node, 0) + prod(own)
        sizes = {n: p.numel() for n, p in self.model.named_parameters()}
        owned = [tuple(sorted({n for p in f.modules for n in self._tensors_in(p)})) for f in self.found]
        made = []
        for f, names in zip(self.found, owned, strict=True):
            common = _common(f.modules)
            others = {n for other in owned if other != names for n in other}
            alone = common and not any(n.startswith(f"{common}.") for n in others)
            nodes = {n for n in f.inner if n in work}
            last = self._last_product(f.output)
            main = max(f.modules, key=lambda p: (sum(sizes[n] for n in self._tensors_in(p)), p == f.output))
            made.append(
                Branch(
                    common if alone else main, names, sum(sizes[n] for n in names), sum(work[n] for n in nodes),
                    tuple(f.modules.values()), f.output, 1 if last else -1,
                )
            )  # fmt: skip
        return made

    def _last_product(self, path: str) -> bool:
        """Whether channels are dim 1 of what module `path` returns: the last op that mixes them there is a convolution."""
        names = [
            n for n in sorted(self.regions[path], key=lambda n: self.order[n]) if n.op == "call_function"
        ]
        for n in reversed(names):
            if is_convolution(n.target) or base_name(n.target) in (
                "batch_norm",
                "group_norm",
                "instance_norm",
            ):
                return True
            if base_name(n.target) in ("linear", "matmul", "addmm", "mm", "bmm", "layer_norm", "rms_norm"):
                return False
        return False

    # ------------------------------------------------------------------------------------------------ children that go

    def children(self, chosen: Iterable[Branch]) -> list[Removal]:
        """The children of containers that return what they are given where the `chosen` branches are zero; the outermost ones."""
        wanted = list(chosen)
        terms = {self.term_of[b.name] for b in wanted}
        touched = {p for b in wanted for r in b.removals for p in prefixes(r.path)}
        gone: list[str] = []
        for path in sorted(touched, key=lambda p: p.count(".")):
            parent = path.rpartition(".")[0]
            if _inside(path, gone) or not isinstance(self.modules.get(parent), CONTAINERS):
                continue
            names = list(self.modules[parent]._modules)
            if names[0].isdigit() and names != [str(i) for i in range(len(names))]:
                continue
            if self._passes_on(path, terms) and self._all_go(path, wanted):
                gone.append(path)
        return [Removal(path, "nothing") for path in gone]

    def children_added(self, chosen: Iterable[Branch]) -> list[Removal]:
        """The children of lists that are a branch as a whole: a loop over the list adds what each of them returns.

        Whether forward is such a loop only a run without them tells.
        """
        found: list[Removal] = []
        for branch in chosen:
            for r in branch.removals:
                parent, _, child = r.path.rpartition(".")
                if (
                    r.path == branch.output
                    and child.isdigit()
                    and isinstance(self.modules.get(parent), nn.ModuleList)
                ):
                    found.append(Removal(r.path, "nothing"))
        return found

    def _passes_on(self, path: str, terms: set[Node]) -> bool:
        returned = self._returned(path)
        if returned is None:
            return False
        end = self._resolved(returned[0], terms)
        return end not in self.regions[path] and end in self.order

    def _resolved(self, node: Node, terms: set[Node]) -> Node:
        """The node whose values `node` has where `terms` are zero."""
        while node.op == "call_function":
            name = base_name(node.target)
            if _is_sum(node):
                left = [t for t in self.terms(node) if t not in terms]
                if len(left) != 1:
                    return node
                node = left[0]
            elif name in SAME and node.args and isinstance(node.args[0], Node):
                node = node.args[0]
            elif name == "relu" and isinstance(node.args[0], Node):
                before = self._resolved(node.args[0], terms)
                if not _never_negative(before):
                    return node
                node = before
            else:
                return node
        return node

    def _all_go(self, path: str, chosen: Sequence[Branch]) -> bool:
        """Whether nothing that is left needs the parameters in module `path`, and all of them were used."""
        region = self.regions[path]
        mine = {n for b in chosen for n in b.weights}
        for name in self._tensors_in(path) - mine:
            node = self.trace.tensors.get(name)
            if node is None or any(u not in region for u in self.users(node)):
                return False
        return not any(
            _inside(first, [path]) and not _inside(n, [path]) for n, first in self.trace.aliases.items()
        )

    def reached(self, terms: set[Node]) -> list[Node]:
        """The outputs that depend on an input where `terms` are zero."""
        found: set[Node] = set()
        for n in self.nodes:
            if n.op == "placeholder" or any(a in found and a not in terms for a in n.all_input_nodes):
                found.add(n)
        return [n for n in self.trace.outputs if n in found]


def _elsewhere(node: Node) -> bool:
    """Whether a node is not of the run in eval mode."""
    return node.op == "call_function" and (record_of(node).training or record_of(node).backward)


def _is_sum(node: Node) -> bool:
    if node.op != "call_function" or base_name(node.target) != "add" or len(node.args) < 2:
        return False
    both = isinstance(node.args[0], Node) and isinstance(node.args[1], Node)
    return bool(both and node.kwargs.get("alpha", 1) == 1 and record_of(node).holds_values)


def _never_negative(node: Node) -> bool:
    while node.op == "call_function":
        name = base_name(node.target)
        if name in NEVER_NEGATIVE:
            return True
        if (name not in KEEPS_SIGN and node.target is not operator.getitem) or not isinstance(
            node.args[0], Node
        ):
            return False
        node = node.args[0]
    return False


def _place(node: Node) -> str:
    seen = record_of(node)
    return f"the sum in {seen.module or 'the model'} ({seen.source})"


def prefixes(path: str) -> list[str]:
    """`path`, and what it lies in, outermost first."""
    steps = path.split(".")
    return [".".join(steps[:i]) for i in range(1, len(steps) + 1)]


def _inside(name: str, paths: Iterable[str]) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in paths)


def _common(paths: Iterable[str]) -> str:
    """The innermost module that holds all of `paths`; one alone is itself."""
    first, *rest = [p.split(".") for p in paths]
    for other in rest:
        same = next(
            (i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b),
            min(len(first), len(other)),
        )
        first = first[:same]
    return ".".join(first)


__all__ = ["Branch", "Residual"]
