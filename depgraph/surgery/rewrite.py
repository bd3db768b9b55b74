"""Literals in forward: the module is recorded by torch.fx, its children kept whole, and the number rewritten."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import new_class
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from ..plan.plan import Rewrite
from ..tracing.tensors import named_tensors, skeleton

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


class Rewritten(fx.GraphModule):
    """A module with a recorded forward in which literals were rewritten, and with all else that it had.

    It is of the original's class too, so methods other than forward, properties and ``isinstance`` are what they were. A
    plain GraphModule keeps, in copies and pickles, only what forward reads, and pickles its code to record it once
    more, in-place operations as others. Here both keep every child, attribute and hook, and the graph as it is.

    Attributes:
        original: the class that the module had before.
    """

    original: type[nn.Module]

    @classmethod
    def made_of(cls, state: dict[str, Any], graph: fx.Graph, original: type[nn.Module]) -> Rewritten:
        """A module of class `original` with the attributes `state`, and a forward that runs `graph`."""
        made = _empty(original)
        made._fill(state, graph)
        return made

    def _fill(self, state: dict[str, Any], graph: fx.Graph) -> None:
        vars(self).update(state)
        self.graph = graph  # generates the code of forward

    def _state(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_graph"}

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewritten:
        made = memo[id(self)] = _empty(self.original)
        made._fill(copy.deepcopy(self._state(), memo), copy.deepcopy(self.graph))
        return made

    def __copy__(self) -> Rewritten:
        return self.made_of(self._state(), copy.deepcopy(self.graph), self.original)

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (self.original,), (self._state(), _to_rows(self.graph), self.graph._codegen)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()

    def __setstate__(self, saved: tuple[dict[str, Any], list[_Row], Any]) -> None:
        state, rows, codegen = saved
        self._fill(state, _from_rows(rows, codegen))


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module has by the code of its owner, whether its forward was rewritten or not."""
    return module.original if isinstance(module, Rewritten) else type(module)


def _empty(original: type[nn.Module]) -> Rewritten:
    """A module of a class of its own, since a GraphModule writes its forward into its class; no constructor is called."""
    bare = next(k for k in original.__mro__ if "_wrapped_call" not in vars(k))  # no forward written there
    kind = new_class(
        original.__name__, (Rewritten, bare), exec_body=lambda body: body.update(original=original)
    )
    kind.__module__, kind.__qualname__ = original.__module__, original.__qualname__
    made: Rewritten = object.__new__(kind)
    vars(made).update(vars(fx.GraphModule({}, fx.Graph())))
    return made


@dataclass(frozen=True)
class _Result:
    """Stands for the node of that name in the arguments of another."""

    name: str


_Row = tuple[str, str, Any, Any, Any, Any]  # name, op, target, args, kwargs, type


def _to_rows(graph: fx.Graph) -> list[_Row]:
    """The nodes of a graph as data; pickled as they are, a chain of nodes would be a recursion as deep as it is long."""

    def named(arguments: Any) -> Any:
        def stand_in(a: Any) -> Any:
            return _Result(a.name) if isinstance(a, fx.Node) else a

        return map_aggregate(arguments, stand_in)

    return [(n.name, n.op, n.target, named(n.args), named(n.kwargs), n.type) for n in graph.nodes]


def _from_rows(rows: list[_Row], codegen: Any) -> fx.Graph:
    graph, nodes = fx.Graph(), dict[str, fx.Node]()

    def found(arguments: Any) -> Any:
        return map_aggregate(arguments, lambda a: nodes[a.name] if isinstance(a, _Result) else a)

    for name, op, target, args, kwargs, kind in rows:
        nodes[name] = graph.create_node(op, target, found(args), found(kwargs), name, kind)
    graph.set_codegen(codegen)
    return graph


class _Shallow(fx.Tracer):
    """Records one module: whatever it calls stays a call, and what is computed with its buffers is recorded too."""

    proxy_buffer_attributes = True

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
    try:
        graph = _traced(module, None)
    except fx.proxy.TraceError:  # a branch on the training flag is fine where both sides record alike
        graph = _traced(module, True)
        if str(graph) != str(_traced(module, False)):
            raise
    made = [
        n.target for n in graph.nodes if n.op == "get_attr" and str(n.target).startswith("_tensor_constant")
    ]
    if made and not hasattr(module, str(made[0])):
        raise ValueError(
            "forward creates a tensor, which a recording would turn into a constant on one device"
        )
    return graph


def _traced(module: nn.Module, training: bool | None) -> fx.Graph:
    """The graph of forward with the training flag fixed, or read in each call (None)."""
    tensors, _ = named_tensors(module)
    twin, tracer = skeleton(module, {id(t): t for t in tensors.values()}), _Shallow()
    if training is None:
        for path, part in twin.named_modules():
            if not isinstance(part, torch.jit.ScriptModule):
                part.__class__ = type(type(part).__name__, (type(part),), {"training": _flag(tracer, path)})
    else:
        twin.train(training)
    return tracer.trace(twin)


def _flag(tracer: fx.Tracer, path: str) -> property:
    """The training flag of the module at `path`, as a node that reads it."""
    name = f"{path}.training" if path else "training"
    return property(lambda module: tracer.create_proxy("get_attr", name, (), {}))


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
    state = {name: value for name, value in vars(module).items() if name != "_graph"}
    return Rewritten.made_of(state, graph, class_of(module))
