"""Sizes that are put into a tensor only to decide something: a heuristic that computes and then branches on a bool.

Such numbers need not stay what they are. It is enough that every decision comes out as it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..tracing.recorder import Node, record_of
from ..tracing.size_uses import ScalarUse
from ..tracing.trace import Trace


@dataclass
class Decision:
    """A tensor with sizes in it that leads to nothing but bools read by Python."""

    table: Node
    uses: list[ScalarUse]
    reads: list[Node]

    def stands(self, trace: Trace, numbers: Sequence[float]) -> bool:
        """Whether all bools come out as they did with `numbers` in the places of the uses."""
        table = trace.constants[str(self.table.target)].clone()
        for use, number in zip(self.uses, numbers, strict=True):
            table.view(-1)[use.index] = number
        return all(
            torch.equal(_evaluate(trace, read, {}), _evaluate(trace, read, {self.table: table}))
            for read in self.reads
        )


def decision(trace: Trace, table: Node) -> Decision | None:
    """The decision that the constant `table` is made for, without its uses; None where it leads to anything else."""
    if trace.fake or table.op != "get_attr" or record_of(table).kind != "constant":
        return None
    reads, seen, ahead = [], {table}, [table]
    while ahead:
        node = ahead.pop()
        for user in node.users:
            schema = getattr(user.target, "_schema", None)
            if schema is None or schema.is_mutable:
                return None
            if not record_of(user).shapes:
                if record_of(node).dtypes[:1] != (torch.bool,):
                    return None
                reads.append(node)
            elif user not in seen:
                seen.add(user)
                ahead.append(user)
    beside = {n for node in seen - {table} for n in node.all_input_nodes} - seen
    if not all(str(n.target) in trace.constants for n in beside):
        return None
    found = Decision(table, [], reads)
    try:
        return found if found.stands(trace, []) else None
    except RuntimeError:  # a tensor of a function that torch maps over a batch can't be used outside
        return None


def _evaluate(trace: Trace, node: Node, given: dict[Node, torch.Tensor]) -> torch.Tensor:
    if node in given:
        return given[node]
    if node.op == "get_attr":
        return trace.constants[str(node.target)]
    args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: _evaluate(trace, n, given))
    result: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return result
