"""Literals in forward: the module is recorded by torch.fx, its children kept whole, and the number rewritten."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import fx, nn

from .plan import Rewrite
from .tensors import named_tensors, skeleton

# Names under which torch.fx may show a call that the trace saw under another name.
SYNONYMS = {
    "view": {"view"},
    "reshape": {"reshape"},
    "__getitem__": {"getitem"},
    "split": {"split"},
    "split_with_sizes": {"split_with_sizes", "split"},
    "__setitem__": {"setitem"},
}


class _Proxy(fx.Proxy):
    """A proxy that also records what fx's own turns into something else or refuses: ``x += y`` and ``x[i] = y``."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _in_place(name: str) -> Any:
    function = getattr(operator, name)

    def apply(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return apply


for _operator in ("iadd", "isub", "imul", "itruediv", "iand", "ior", "ipow"):
    setattr(_Proxy, f"__{_operator}__", _in_place(_operator))


class _Shallow(fx.Tracer):
    """Records one module: whatever it calls stays a call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def record(module: nn.Module) -> fx.Graph:
    """The graph of one module's own forward. A copy of the module is run, as forward may set attributes.

    Raises:
        Exception: whatever torch.fx raises where forward can't be recorded symbolically.
    """
    if isinstance(module, fx.GraphModule):
        return copy.deepcopy(module.graph)
    tensors, _ = named_tensors(module)
    return _Shallow().trace(skeleton(module, {id(t): t for t in tensors.values()}))


def find_call(graph: fx.Graph, edit: Rewrite) -> fx.Node | None:
    """The node of the call that `edit` names, if it has the literal where the trace saw it."""
    names = SYNONYMS.get(edit.function, {edit.function})
    calls = [n for n in graph.nodes if n.op in ("call_function", "call_method") and _name(n) in names]
    if edit.function == "__getitem__":
        calls = [n for n in calls if not _indexes_sizes(n)]
    if edit.occurrence < len(calls) and literal_at(calls[edit.occurrence], edit.argument) == edit.old:
        return calls[edit.occurrence]
    fitting = [n for n in calls if literal_at(n, edit.argument) == edit.old]
    return fitting[0] if len(fitting) == 1 else None


def _name(node: fx.Node) -> str:
    return (
        node.target
        if isinstance(node.target, str)
        else getattr(node.target, "__name__", "").partition(".")[0]
    )


def _indexes_sizes(node: fx.Node) -> bool:
    """Whether a getitem reads a tuple, such as a shape or the result of split, and not a tensor."""
    return isinstance(node.args[1], int)


def literal_at(node: fx.Node, argument: Iterable[int | str]) -> Any:
    """The number at `argument` (position, then index or slice side) of a call."""
    first, *rest = argument
    value: Any = (
        node.kwargs.get(first)
        if isinstance(first, str)
        else (node.args[first] if len(node.args) > first else None)
    )
    for step in rest:
        if value is None:
            return None
        value = getattr(value, step) if isinstance(step, str) else value[step] if len(value) > step else None
    return value


def _with(value: Any, steps: list[Any], number: int) -> Any:
    if not steps:
        return number
    if isinstance(value, slice):
        parts = {"start": value.start, "stop": value.stop, "step": value.step, steps[0]: number}
        return slice(parts["start"], parts["stop"], parts["step"])
    items = list(value)
    items[steps[0]] = _with(items[steps[0]], steps[1:], number)
    return type(value)(items) if type(value) in (list, tuple) else tuple(items)


def can_rewrite(module: nn.Module, edit: Rewrite) -> bool:
    """Whether the literal of `edit` can be found in a recording of `module`."""
    try:
        return find_call(record(module), edit) is not None
    except Exception:  # noqa: BLE001  forward can't be recorded symbolically
        return False


def rewrite_module(module: nn.Module, edits: list[Rewrite]) -> nn.Module:
    """`module` as a GraphModule in which the literals of `edits` have their new values.

    Children, parameters, buffers, attributes, hooks and the training flag are the module's own. What has its new value
    already was an attribute, and that has been set; where that is so of all, `module` itself is returned.
    """
    graph, changed = record(module), False
    for edit in edits:
        node = find_call(graph, edit)
        if node is None:
            if find_call(graph, replace(edit, old=edit.value)) is not None:
                continue
            raise ValueError(
                f"no call of {edit.function} with the literal {edit.old} in {edit.path or 'the model'}"
            )
        changed = True
        first, *rest = edit.argument
        if isinstance(first, str):
            node.kwargs = {**node.kwargs, first: _with(node.kwargs[first], rest, edit.value)}
        else:
            args = list(node.args)
            args[first] = _with(args[first], rest, edit.value)
            node.args = tuple(args)
    if not changed:
        return module
    rewritten = fx.GraphModule(module, graph, class_name=type(module).__name__)
    own = vars(rewritten)
    for name, value in vars(module).items():
        if name in ("_modules", "_parameters", "_buffers") or "hooks" in name or name not in own:
            own[name] = value
    rewritten.train(module.training)
    return rewritten
