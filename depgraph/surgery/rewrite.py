"""Numbers in the user's code -> other numbers, and loads of sizes -> the numbers that they were, in one module alone.

The module gets a class of its own, below the one it had, whose methods are the same functions with other constants: the
same decorators, closures, globals and lines. The class can be pickled, and `inspect` shows the source with the new
numbers, which is what scripting compiles. A ``torch.fx.GraphModule`` is its graph: there the arguments of nodes change.
"""

from __future__ import annotations

import copyreg
import linecache
import types
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

from torch import fx, nn
from torch.fx.node import map_aggregate

from ..plan.plan import Rewrite
from ..tracing.literals import (
    LOAD,
    NUMBER,
    Literals,
    class_of,
    innermost,
    is_size,
    methods_of,
    numbers_of,
    replaced,
)

Numbers = tuple[tuple[tuple[str, int], int], ...]  # ((method, position in its code), number), sorted
_classes: WeakValueDictionary[tuple[type[nn.Module], Numbers], Any] = WeakValueDictionary()


def misfit(module: nn.Module, edit: Rewrite) -> str:
    """Why `edit` can't be made in `module`; "" where it can, or is made already."""
    found = methods_of(class_of(module)).get(edit.function)
    where = f"{edit.function} of {edit.path or 'the model'!r}"
    kinds = () if found is None else found[1].kinds
    if found is None or edit.number >= len(kinds) or kinds[edit.number] not in (NUMBER, LOAD):
        return f"the code of {where} holds no number {edit.number}"
    number = numbers_of(module).get((edit.function, edit.number), found[1].values[edit.number])
    if number not in (edit.old, edit.value, None):
        return f"number {edit.number} in the code of {where} is {number}, the plan is for {edit.old}"
    return ""


def rewrite(module: nn.Module, edits: Sequence[Rewrite]) -> None:
    """Let the code of `module` have the numbers of `edits`; no other module of its class changes.

    Raises:
        ValueError: an edit does not fit (`misfit`).
    """
    problems = [text for edit in edits if (text := misfit(module, edit))]
    if problems:
        raise ValueError("; ".join(problems))
    changed = {(e.function, e.number): e.value for e in edits}
    if isinstance(module, fx.GraphModule):
        _rewrite_graph(module, changed)
    else:
        numbers = tuple(sorted({**numbers_of(module), **changed}.items()))
        module.__class__ = _class_with(class_of(module), numbers)


def _class_with(original: type[nn.Module], numbers: Numbers) -> type[nn.Module]:
    """The class below `original` whose methods have other `numbers`: one for each such pair in a process."""
    found = _classes.get((original, numbers))
    if found is None:
        found = _classes[original, numbers] = _made(original, numbers)
    return found


def _made(original: type[nn.Module], numbers: Numbers) -> type[nn.Module]:
    methods = methods_of(original)
    body: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__slots__": (),
        "__original__": original,
        "__numbers__": numbers,
    }
    for name in dict.fromkeys(name for (name, _), _ in numbers):
        function, literals = methods[name]
        values = [dict(numbers).get((name, i), value) for i, value in enumerate(literals.values)]
        new = replaced(function, literals.code(values))
        if new is None:
            raise ValueError(f"a decorator hides the function {name} that it calls")
        _show(innermost(new), literals, values)
        body[name] = new
    metaclass: Any = type(original)
    made: type[nn.Module] = _kind(metaclass)(original.__name__, (original,), body)
    return made


@lru_cache(maxsize=64)
def _kind(metaclass: Any) -> Any:
    """A metaclass whose classes are pickled as what they were made of."""
    kind: Any = types.new_class(metaclass.__name__, (metaclass,))
    copyreg.pickle(kind, lambda made: (_class_with, (made.__original__, made.__numbers__)))
    return kind


def _show(function: Any, literals: Literals, values: Sequence[int | None]) -> None:
    """Let `inspect.getsource` show what `function` does: its source with the new numbers, as a file of no disk."""
    code = function.__code__
    lines = [line.encode() for line in linecache.getlines(code.co_filename)]
    changes = {
        span: new
        for span, old, new in zip(literals.spans, literals.values, values, strict=True)
        if old != new
    }
    for (first, start, last, end), value in sorted(changes.items(), reverse=True):
        text = str(value).encode() + b"\n" * (last - first)
        lines[first - 1 : last] = (lines[first - 1][:start] + text + lines[last - 1][end:]).splitlines(True)
    name = f"<{code.co_filename}, smaller: {id(code)}>"
    shown = [line.decode() for line in lines]
    linecache.cache[name] = (sum(map(len, shown)), None, shown, name)
    function.__wrapped__ = types.FunctionType(
        code.replace(co_filename=name),
        function.__globals__,
        code.co_name,
        function.__defaults__,
        function.__closure__,
    )
    function.__wrapped__.__kwdefaults__ = function.__kwdefaults__
    function.__wrapped__.__annotations__ = function.__annotations__
    function.__wrapped__.__module__ = function.__module__


def _rewrite_graph(module: fx.GraphModule, changed: dict[tuple[str, int], int]) -> None:
    """Each node is one line in the code of a graph, and has its numbers in the order of the text."""
    function, literals = methods_of(type(module))["forward"]
    lines = linecache.getlines(function.__code__.co_filename)
    nodes = {node.name: node for node in module.graph.nodes}
    for line in dict.fromkeys(span[0] for span in literals.spans):
        mine = [i for i, s in enumerate(literals.spans) if s[0] == line and literals.values[i] is not None]
        if any(("forward", i) in changed for i in mine):
            node = nodes[lines[line - 1].split()[0].rstrip(":")]
            numbers = iter([changed.get(("forward", i), literals.values[i]) for i in mine])

            def changing(value: Any, numbers: Iterator[Any] = numbers) -> Any:
                return next(numbers) if type(value) is int and is_size(value) else value

            node.args, node.kwargs = map_aggregate((node.args, dict(node.kwargs)), changing)
    module.recompile()
