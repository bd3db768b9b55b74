"""A bias for consumers that have none, where that is found by trying to do nothing but to add to their product.

A module that was made without a bias keeps an empty place for it. Zeros are put there, and the model is recorded again: the
place is right if the consumer's op is now given it as its bias, and everything else runs as before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..data.consumers import consumers
from ..grouping.graph import DependencyGraph
from ..grouping.propagate import propagate
from ..plan.plan import Bias, Plan
from ..surgery.biases import empty_places
from ..tracing.recorder import Node
from ..tracing.trace import Trace
from .changes import Changes
from .pairs import Pair, pairs, rows_without_constant

NO_ROOM = "would get a bias, and the budget has no room for it"


def give_biases(changes: Changes, found: list[Pair], graph: DependencyGraph, plan: Plan, example: Any, room: float) -> list[tuple[str, str]]:  # fmt: skip
    """Give the smaller model biases of zeros for the consumers of `found` that have no place for a constant.

    Args:
        changes: of the smaller model.
        found: its consumers.
        graph: the original's.
        plan: what was removed.
        example: what both are recorded with.
        room: how many numbers may be added, to the first ones that there is room for.

    Returns:
        (weight, reason) of those for which there is none.
    """
    trial = _Trial(changes, graph, plan, example)
    ways: dict[str, list[Bias]] = {}
    refused = []
    for pair in found:
        stacks, rows, _ = pair.sizes
        if (
            pair.shift is not None
            or pair.dense.is_recurrent
            or changes.refuses(pair.name)
            or not (places := empty_places(changes.model, pair.name))
        ):
            continue
        if stacks * rows > room:
            refused.append((pair.name, NO_ROOM))
            continue
        room -= stacks * rows
        ways[pair.name] = [Bias(pair.name, place, (stacks * rows,)) for place in places]
    while ways:  # the first place that is left of each
        given = trial.accepted([tried.pop(0) for tried in ways.values()])
        ways = {name: left for name, left in ways.items() if left and name not in given}
    order = {pair.name: i for i, pair in enumerate(found)}
    changes.biases.sort(key=lambda bias: order[bias.weight])
    return refused


def most_entries(graph: DependencyGraph) -> int:
    """How many numbers the new biases of a smaller model have at most: as many as the original's would have."""
    return sum(
        rows_without_constant(graph.state, consumer)
        for consumer in consumers(graph)
        if not (consumer.reason or consumer.is_recurrent) and empty_places(graph.model, consumer.name)
    )


class _Trial:
    """What becomes of biases in a recorded run."""

    def __init__(self, changes: Changes, graph: DependencyGraph, plan: Plan, example: Any) -> None:
        self.changes, self.graph, self.plan, self.example = changes, graph, plan, example
        self.calls = _calls(changes.traced(example), ())

    def accepted(self, tried: list[Bias]) -> set[str]:
        """The weights of those that are nothing but their consumers' biases; these alone stay in the model."""
        for bias in tried:
            self.changes.give(bias)
        try:
            recorded = self.changes.traced(self.example)
        except Exception:  # noqa: BLE001  the module's own code does something else with what stands there
            recorded = None
        if recorded is not None and _calls(recorded, [b.name for b in self.changes.biases]) == self.calls:
            found = pairs(self.graph.state, propagate(recorded), self.plan)[0]
            used = {p.shift.name for p in found if p.shift is not None and p.shift.argument is not None}
            for bias in tried:
                if bias.name not in used:
                    self.changes.take(bias)
            return {b.weight for b in tried if b.name in used}
        for bias in tried:
            self.changes.take(bias)
        half = len(tried) // 2
        return self.accepted(tried[:half]) | self.accepted(tried[half:]) if half else set()


def _calls(recorded: Trace, biases: Iterable[str]) -> list[tuple[str, str, str]]:
    """The calls of a run, without the arguments that are `biases`."""
    names = set(biases)
    numbers = {n: i for i, n in enumerate(n for n in recorded.graph.nodes if n.op == "call_function")}

    def said(value: Any) -> Any:
        if isinstance(value, Node):
            if value in numbers:
                return f"%{numbers[value]}"
            return None if str(value.target) in names else str(value.target)
        if isinstance(value, (list, tuple)):
            return [said(v) for v in value]
        if isinstance(value, dict):
            return {k: said(v) for k, v in value.items()}
        return str(value) if value is not None else None

    def without_trailing(args: Any) -> str:
        made = said(args)
        while made and made[-1] is None:
            made.pop()
        return str(made)

    return [(str(n.target), without_trailing(n.args), str(said(n.kwargs))) for n in numbers]
