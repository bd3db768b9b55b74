"""The most memory that a forward pass holds at once in the tensors that it makes: modelled, and measured.

What is counted are the results of ops that are alive at the same time, views once, in inference: not parameters,
buffers and inputs, which are there all along, nor what a kernel takes for itself while it works.

`memory_cost` reads lifetimes off the recorded graph: a tensor lives from the op that makes it to the last op that reads
it or a view of it, and, as Python holds the arguments of a call until it returns, to the end of the last module call
that it was made outside of and read in. A name in ``forward`` that holds one for longer is not seen: budgets go by
`measure_memory` in the end, which runs the model on fake tensors and asks, at each op, which storages still exist.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from ..axes.nodes import op_name
from ..base.inputs import Arguments
from ..base.running import CallMode
from ..base.values import tensor_leaves
from ..grouping.graph import DependencyGraph
from ..tracing.recorder import Node, record_of
from .size_table import Floats, Integers, SizeTable
from .stand_ins import on_stand_ins

# Ops whose result shares memory with their argument, though their schema does not say so.
SHARING = frozenset({"_unsafe_view", "_reshape_alias"})


class PeakMemory:
    """The largest number of bytes alive at one op, as a function of the counts of the free axes."""

    def __init__(self, table: SizeTable, births: Integers, deaths: Integers) -> None:
        """Each row of `table` is the size of a piece of memory, alive from its birth to its death (numbers of ops)."""
        self.table, self.births, self.deaths = table, births, deaths

    def value(self, counts: Integers) -> int:
        """Bytes at the worst op."""
        return int(self._alive(counts).max(initial=0))

    def slopes(self, counts: Integers) -> Floats:
        """How fast what is alive at the worst op grows with each count."""
        if not len(self.births):
            return np.zeros(len(counts))
        worst = int(self._alive(counts).argmax())
        alive = (self.births <= worst) & (worst <= self.deaths)
        return self.table.slopes(counts, alive.astype(float))

    def _alive(self, counts: Integers) -> Integers:
        """[ops] bytes alive at each op."""
        sizes = self.table.values(counts)
        change = np.zeros(int(self.deaths.max(initial=0)) + 2, dtype=np.int64)
        np.add.at(change, self.births, sizes)
        np.subtract.at(change, self.deaths + 1, sizes)
        return np.cumsum(change)[:-1]


def memory_cost(graph: DependencyGraph) -> PeakMemory:
    """Peak bytes of the activations of one traced forward pass."""
    nodes = [n for n in graph.trace.graph.nodes if n.op == "call_function" and not record_of(n).training]
    at = {n: i for i, n in enumerate(nodes)}
    owner: dict[Node, Node] = {}  # node -> the one that made the memory that it ranges over
    for n in nodes:
        whole = _shared_with(n)
        owner[n] = n if whole is None else owner.get(whole, whole)
    made = [n for n in nodes if owner[n] is n and record_of(n).one_tensor]
    row = {n: i for i, n in enumerate(made)}
    births = np.array([at[n] for n in made], dtype=np.int64)
    deaths = births.copy()
    calls = _Calls(graph.model, nodes)
    for i, n in enumerate(nodes):
        for given in n.all_input_nodes:
            r = row.get(owner.get(given, given))
            if r is not None:
                deaths[r] = max(deaths[r], calls.held_until(i, made[r]))
    for out in graph.trace.outputs:
        r = row.get(owner.get(out, out))
        if r is not None:
            deaths[r] = len(nodes) - 1
    table = SizeTable(graph, len(made))
    for r, n in enumerate(made):
        table.add(graph.state.dims[n][0], record_of(n).dtype.itemsize, r)
    return PeakMemory(table, births, deaths)


def _shared_with(node: Node) -> Node | None:
    """The argument whose memory the result of an op is, or None where it makes its own."""
    if node.target is operator.getitem:
        whole: Any = node.args[0]
        return None if _shared_with(whole) is None and not record_of(whole).one_tensor else whole
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return None
    arguments = [*node.args, *(node.kwargs.get(a.name) for a in schema.arguments[len(node.args) :])]
    says = any(r.alias_info is not None for r in schema.returns)
    for a, value in zip(schema.arguments, arguments, strict=False):
        if isinstance(value, Node) and (
            (says and a.alias_info is not None) or op_name(node.target) in SHARING
        ):
            return value
    return None


class _Calls:
    """When the calls of modules end, in numbers of ops."""

    def __init__(self, model: nn.Module, nodes: list[Node]) -> None:
        self.paths = [_called(model, record_of(n).module) for n in nodes]
        self.ends: list[dict[str, int]] = [{} for _ in nodes]
        open_: dict[str, int] = {}
        for i in range(len(nodes) - 1, -1, -1):
            open_ = {path: open_.get(path, i) for path in self.paths[i]}
            self.ends[i] = open_

    def held_until(self, reader: int, made: Node) -> int:
        """The end of the outermost call that op `reader` is in and that got the result of `made` from outside."""
        inside = record_of(made).module
        for path in self.paths[reader]:
            if inside != path and not inside.startswith(f"{path}."):
                return self.ends[reader][path]
        return reader


def _called(model: nn.Module, path: str) -> list[str]:
    """The modules that are being called while the one at `path` is, the outermost first; containers are not called."""
    parts = path.split(".") if path else []
    found = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return [p for p in found if type(model.get_submodule(p)).forward is not nn.Module.forward]


def measure_memory(model: nn.Module, example_inputs: Any) -> int:
    """Peak bytes of the activations of one forward pass (of that of `Examples` with the most) in eval mode.

    Measured on fake tensors, without arithmetic; on real ones where the path through the model depends on data.
    """

    def peak(twin: nn.Module, examples: list[Arguments]) -> int:
        peaks = []
        for example in examples:
            watch = _Watch([*twin.parameters(), *twin.buffers(), *tensor_leaves(example)])
            with watch:
                example.run(twin)
            peaks.append(watch.peak)
        return max(peaks)

    return on_stand_ins(model, example_inputs, peak)


class _Watch(CallMode):
    """Notes the storages that ops make, and the most bytes that existed at once."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.alive = {k: (ref, n) for k, (ref, n) in self.alive.items() if not ref.expired()}
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.known and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(n for _, n in self.alive.values()))
        return out
