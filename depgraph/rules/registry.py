"""The table of rules, and the notation that most of them are written in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..axes.axes import Axis
from ..axes.nodes import base_name, op_name
from ..axes.op_call import Dims, OpCall
from ..base.errors import InputError

Rule = Callable[[OpCall], Any]
REGISTRY: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ops given as ``"name"`` (ATen, every overload) or ``"namespace::name"``.

    ``"*::name"`` is an op of whatever library declares one of that name: its rule checks that the arguments are called
    as it expects (`OpCall.named`).
    """

    def register(function: Rule) -> Rule:
        for name in names:
            REGISTRY[name if "::" in name else f"aten::{name}"] = function
        return function

    return register


Masked = Callable[..., Any]
STATED: dict[str, Masked | None] = {}  # ops that users stated a rule for -> how to run them with masks


def op_rule(name: str, *, masked: Masked | None = None) -> Callable[[Rule], Rule]:
    """State what an op of your own library does to the dims of its arguments: a decorator for a function of a `OpCall`.

    Without a rule, whatever the op touches is frozen, and so it is where an op changes its arguments in place. A rule is
    believed when groups are made and checked when the result is verified: the op is run on the original with removed
    entries zeroed, and must give what it gives on the smaller tensors.

    Args:
        name: ``"mylib::op"``, as registered with ``torch.library``; every overload.
        masked: how to run the op where removed entries are zero, for an op to which a zero is not the same as an entry
            that is not there (a mean, a norm, a maximum): a function of the op's arguments and of ``masks``, a list with
            a bool tensor of its shape for each tensor argument, False where an entry is removed. By default the op itself.

    Raises:
        InputError: the name has no namespace, or belongs to torch's own ops.
    """
    space, _, rest = name.partition("::")
    if not rest or space in ("aten", "prim", "prims"):
        raise InputError(f"op_rule takes the name of a custom op, such as 'mylib::op', not {name!r}")

    def register(function: Rule) -> Rule:
        REGISTRY[name] = function
        STATED[name] = masked
        return function

    return register


def rule_for(op: Any) -> Rule | None:
    """The rule of an op: its own, that of the op it is the in-place form of, or the pointwise one by torch's tag."""
    schema = getattr(op, "_schema", None)
    if schema is None:
        return None
    found = REGISTRY.get(schema.name)
    if found is None and schema.name.endswith("_") and not schema.name.endswith("__"):
        base = REGISTRY.get(schema.name[:-1])
        if base is not None:
            found = _in_place(base)
    if found is None and op.namespace != "aten":
        found = REGISTRY.get(f"*::{schema.name.partition('::')[2]}")
    if found is None and is_pointwise(op):
        found = REGISTRY["aten::pointwise"]
    return found


def is_pointwise(op: Any) -> bool:
    """Whether torch tags the op, or the op it is the in-place form of, as pointwise."""
    if torch.Tag.pointwise in op.tags:
        return True
    name = base_name(op)
    packet = getattr(torch.ops.aten, name, None) if name != op_name(op) and op.namespace == "aten" else None
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads()
    )


def _in_place(base: Rule) -> Rule:
    def apply(site: OpCall) -> Any:
        out = base(site)
        first: Dims = out[0] if out and isinstance(out[0], list) else out
        for a, b in zip(first, site.dims(site.args[0]), strict=True):
            site.same(a, b)
        return out

    return apply


def equation(text: str, weight: int | None = None) -> Rule:
    """A rule from an einsum: ``equation("...k,mk,m->...m", weight=1)``.

    The same letter is the same axis wherever it stands; a letter that the result lacks is contracted; ``...`` are
    leading dims that broadcast. Trailing operands may be missing in the call.

    Args:
        text: the einsum, an operand for each tensor argument.
        weight: the operand that usually is a weight: its letters in the result are produced by it, the others consumed.
    """
    left, right = text.split("->")
    operands = left.split(",")

    def apply(site: OpCall) -> Dims:
        return contract_as(
            site, [a for a in site.args if isinstance(a, torch.fx.Node)], operands, right, weight
        )

    apply.__doc__ = text
    return apply


def _weight_among(site: OpCall, arguments: list[Any], usual: int | None) -> int | None:
    """The operand that is a weight: the usual one, or where that is none, the only one that is made of parameters alone."""
    made = [i for i, node in enumerate(arguments) if site.state.leaves_of(node)]
    if usual is not None and (usual in made or not made) and usual < len(arguments):
        return usual
    return made[0] if len(made) == 1 < len(arguments) else None


def _other(
    arguments: list[Any], operands: list[str], weight: int, result: str
) -> tuple[Any, tuple[str, str, str] | None]:
    """The activation beside a weight, and the einsum of both; (None, None) where the weight meets several."""
    gone = set(operands[weight]) - set(result)
    others = [i for i in range(min(len(arguments), len(operands))) if i != weight and gone & set(operands[i])]
    if len(others) != 1 or gone - set(operands[others[0]]) - {"."}:
        return None, None
    return arguments[others[0]], (operands[others[0]], operands[weight], result)


def _common_shape(operands: list[Dims]) -> tuple[int, ...]:
    """The shape of dims that broadcast, aligned at the last one."""
    rank = max(map(len, operands), default=0)
    sizes = [[1] * (rank - len(dims)) + [1 if a is None else a.size for a in dims] for dims in operands]
    return tuple(map(max, zip(*sizes, strict=True)))


def contract_as(
    site: OpCall, arguments: list[Any], operands: list[str], result: str, weight: int | None = None
) -> Dims:
    """Apply the einsum `operands` -> `result` (letters, at most one ``...`` each) to tensor `arguments`."""
    bound: dict[str, Axis | None] = {}
    leading: list[Dims] = []
    mine: list[dict[str, Axis | None]] = []
    lead = len(site.shape) - len(result.replace("...", ""))
    for argument, letters in zip(arguments, operands, strict=False):
        dims = site.dims(argument)
        head, _, tail = letters.partition("...") if "..." in letters else (letters, "", "")
        middle = dims[len(head) : len(dims) - len(tail)] if "..." in letters else []
        ends = [*dims[: len(head)], *(dims[len(dims) - len(tail) :] if tail else [])]
        pairs: dict[str, Axis | None] = {}
        for letter, axis in zip(head + tail, ends, strict=True):
            if axis is not None and bound.get(letter) is not None:
                site.same(bound[letter], axis)
            bound[letter] = bound.get(letter) or axis
            pairs[letter] = pairs.get(letter) or axis
        mine.append(pairs)
        if "..." in letters:
            leading.append(middle)
    at = result.find("...")
    shape = site.shape[at : at + lead] if at >= 0 else _common_shape(leading)
    spread = site.broadcast(*leading, size=shape)
    contracted = [axis for letter, axis in bound.items() if letter not in result]
    contracted += [] if at >= 0 else spread
    site.contract(*contracted)
    if len(mine) > 1 and contracted:  # without a sum it is work of another kind
        site.macs(*spread, *bound.values())
    weight = _weight_among(site, arguments[: len(mine)], weight)
    if weight is not None:
        own = mine[weight]
        site.weight(
            arguments[weight],
            [a for k, a in own.items() if k in result],
            [a for k, a in own.items() if k not in result],
            *_other(arguments, operands, weight, result),
        )
    head, _, tail = result.partition("...") if at >= 0 else (result, "", "")
    return [*(bound[k] for k in head), *(spread if at >= 0 else []), *(bound[k] for k in tail)]
