"""Recovery of a smaller model that is not in memory: its values are read from the original's files, changed ones from another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..base.shelf import Place, Shelf
from ..base.weights import Weights
from ..data.calibration import Calibration
from ..grouping.graph import DependencyGraph
from ..plan.plan import Cut, Plan
from ..recover import carried_out
from ..recover.changes import Changes
from ..recover.result import Recovery
from ..recover.task import Task
from ..store.layout import Laid
from ..surgery.on_demand import OnDemand, Recent, standing_in
from ..tracing.tensors import named_tensors
from ..tracing.trace import Trace, trace
from .bound import give_back
from .source import FromFiles, is_plain
from .writing import BLOCK

Tensor = torch.Tensor
Blocks = Callable[[], Iterator[Tensor]]
ELSEWHERE = "is in the files in another layout, into which new values can't be written"


class Smaller:
    """A `Weights` of the smaller model: what the plan leaves of the original's values, but for those that were changed."""

    def __init__(self, original: FromFiles, cuts: Mapping[str, Cut], shelf: Shelf) -> None:
        """Read what `cuts` leave of the `original`; new values are on the `shelf`."""
        self.original, self.cuts, self.shelf = original, cuts, shelf
        self.room = original.room
        self.changed: dict[str, Place] = {}

    def whole(self, name: str) -> Tensor:
        """All values of tensor `name`, in the type of the files."""
        if name in self.changed:
            return self.shelf.get(self.changed[name])
        found, cut = self.original.whole(name), self.cuts.get(name)
        return found if cut is None else cut.slice(found)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Some entries along dim 0."""
        cut = self.cuts.get(name)
        if name in self.changed:
            return self.shelf.rows(self.changed[name], first, last)
        if cut is None:
            return self.original.rows(name, first, last)
        if cut.blocks is not None or cut.numbers is not None:
            return self.whole(name)[first:last]
        kept = cut.keep[0]
        if kept is None:
            return _columns(self.original.rows(name, first, last), cut)
        some = torch.from_numpy(kept[first:last])
        begin = int(some[0])
        return _columns(self.original.rows(name, begin, int(some[-1]) + 1).index_select(0, some - begin), cut)

    def at(self, name: str, index: Tensor) -> Tensor:
        """The entries `index` [n] along dim 0, likewise."""
        cut = self.cuts.get(name)
        if name in self.changed or (cut is not None and (cut.blocks is not None or cut.numbers is not None)):
            return self.whole(name).index_select(0, index)
        if cut is None:
            return self.original.at(name, index)
        kept = cut.keep[0]
        return _columns(self.original.at(name, index if kept is None else torch.from_numpy(kept)[index]), cut)

    def kept(self, key: str, compute: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """Computed anew."""
        return compute()

    def put(self, name: str, values: Tensor) -> Tensor:
        """Tensor `name` has new `values`; what is left of them in the type of the files."""
        stored = values.to(self.original.laid[name].dtype)
        self.changed[name] = self.shelf.put(stored)
        return stored

    def refuses(self, name: str) -> str:
        """Why a tensor can't have new values, or nothing."""
        laid, cut = self.original.laid.get(name), self.cuts.get(name)
        plain = laid is not None and len(laid.parts) == 1 and is_plain(laid.parts[0], laid)
        return "" if plain and (cut is None or cut.numbers is None) else ELSEWHERE

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The new values of tensor `name`, block by block."""
        place = self.changed[name]
        if not place.shape:
            yield self.shelf.get(place)
            return
        row = max(1, torch.Size(place.shape[1:]).numel() * place.dtype.itemsize)
        step = max(1, BLOCK // row)
        for first in range(0, place.shape[0], step):
            yield self.shelf.rows(place, first, min(first + step, place.shape[0]))

    def written(self) -> dict[str, Blocks]:
        """What gives the new values of each tensor that was changed."""
        return {name: partial(self.blocks, name) for name in self.changed}

    def before(self, others: Weights) -> Weights:
        """As `others`, but for changed tensors, of which there is what the plan leaves of the original."""
        return _Before(Smaller(self.original, self.cuts, self.shelf), set(self.changed), others)


class _Before:
    """A `Weights` of which some tensors are another's."""

    def __init__(self, some: Weights, names: set[str], others: Weights) -> None:
        self.some, self.names, self.others, self.room = some, names, others, others.room

    def _of(self, name: str) -> Weights:
        return self.some if name in self.names else self.others

    def whole(self, name: str) -> Tensor:
        return self._of(name).whole(name)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        return self._of(name).rows(name, first, last)

    def at(self, name: str, index: Tensor) -> Tensor:
        return self._of(name).at(name, index)

    def kept(self, key: str, compute: Callable[[], Sequence[Any]]) -> Sequence[Any] | None:
        return self.others.kept(key, compute)


@dataclass
class Recovered:
    """What recovery did, and the values that it gave."""

    report: Recovery
    values: Smaller


def recovered(
    graph: DependencyGraph, small: nn.Module, plan: Plan, data: Calibration, how: Any, example_inputs: Any, weights: FromFiles,
    folder: Path, progress: bool | None,
) -> Recovered:  # fmt: skip
    """As `recover`, of a model whose values are in files; new ones are written into `folder`."""
    weights.checkpoint.close()  # its buffer was for what is read in large blocks
    values = Smaller(weights, plan.cuts, Shelf(folder / "values"))
    batches = list(data.batches("reading calibration data"))
    if graph.weights is weights:
        changes: Changes = ChangesElsewhere(small, values, Recent(weights.room))
        task = Task(graph.running, changes, batches, progress=progress, memory=data.memory, folder=folder)
        return Recovered(carried_out(task, how, graph, plan, example_inputs), values)
    changes = ChangesHere(small, values)
    found = carried_out(
        Task(graph.model, changes, batches, progress=progress), how, graph, plan, example_inputs
    )
    for name in changes.before:
        values.put(name, changes.value(name))
    return Recovered(found, values)


def _columns(found: Tensor, cut: Cut) -> Tensor:
    for d, kept in enumerate(cut.keep):
        if d and kept is not None:
            found = found.index_select(d, torch.from_numpy(kept))
    return found


class _Version(NamedTuple):
    place: Place | None
    held: Tensor | None


class ChangesElsewhere(Changes):
    """Changes of a smaller model whose values are elsewhere: new ones are written beside them, in the type of the files."""

    def __init__(self, shell: nn.Module, source: Smaller, use: Recent) -> None:
        """Run `shell` with the values of `source`, those used last kept by `use`."""
        super().__init__(standing_in(shell, source, use))
        self.shell, self.source, self.use = shell, source, use

    def traced(self, example: Any) -> Trace:
        """A recorded run of the shell."""
        return trace(self.shell, example, elsewhere=True)

    def refuses(self, name: str) -> str:
        """Why a tensor can't be changed, or nothing."""
        return self.source.refuses(name)

    def value(self, name: str) -> Tensor:
        """What tensor `name` holds: read, and kept for as long as `use` has room."""
        tensor = self.tensors[name]
        return self.use.made(tensor.weight).data if isinstance(tensor, OnDemand) else tensor.detach()

    def version(self, name: str) -> Any:
        """Where its values are."""
        held = self.tensors[name]
        return _Version(
            self.source.changed.get(name), None if isinstance(held, OnDemand) else held.detach().clone()
        )

    def write(self, name: str, values: Any) -> None:
        """Put new values beside the others, rounded to the type of the files, or return to a version."""
        tensor = self.tensors[name]
        if isinstance(values, _Version):
            self.source.changed.pop(name, None)
            if values.place is not None:
                self.source.changed[name] = values.place
            if isinstance(tensor, OnDemand):
                self.use.forget(tensor.weight)
            elif values.held is not None:
                tensor.data.copy_(values.held)
            return
        give_back()  # what it was solved with
        stored = self.source.put(name, values)
        self.value(name).copy_(stored)  # runs that have begun hold this very tensor


class ChangesHere(Changes):
    """Changes of a smaller model in memory, whose files are to have the new values."""

    def __init__(self, model: nn.Module, source: Smaller) -> None:
        """Nothing is changed yet."""
        super().__init__(model)
        self.source = source

    def refuses(self, name: str) -> str:
        """Why a tensor can't be changed, or nothing."""
        return self.source.refuses(name)


def stored_as(laid: Mapping[str, Laid], model: nn.Module, changed: Mapping[str, Any]) -> dict[str, Any]:
    """What is `changed` of a model's tensors, by the names that the files have for these, and for tied ones."""
    own = {name: laid[name].parts[0].name for name in changed}
    ties = named_tensors(model)[1]
    return {own[n]: c for n, c in changed.items()} | {
        n: changed[first] for n, first in ties.items() if first in changed
    }
