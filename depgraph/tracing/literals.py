"""Numbers written in the code of methods: tracked in a run, and changed for one module alone.

A method's source is parsed and compiled again with a mark in the place of every number. What is compiled without marks
must be the very code that runs, so the text is the right one; in the marked code the constants can then be any objects:
tracked numbers while a model is traced, other numbers in a smaller model. Everything else of the function stays:
globals, closure, defaults, decorators, names and lines.
"""

from __future__ import annotations
import __future__

import ast
import functools
import linecache
import types
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from . import sizes
from .recorder import is_written_by_user

Function = types.FunctionType
Span = tuple[int, int, int, int]
MARK = "a number of the user's code"
FUTURE = functools.reduce(
    int.__or__, (getattr(__future__, n).compiler_flag for n in __future__.all_feature_names)
)


@dataclass(frozen=True)
class Literals:
    """The numbers written in one function.

    Attributes:
        values: the numbers, in the order of the text; of an expression of numbers alone, its value.
        spans: for each its first line and column, its last line and the column behind it, as in `ast`.
        marks: the number of each mark.
        marked: the code of the function with ``(MARK, n)`` in the place of mark n.
    """

    values: tuple[int, ...]
    spans: tuple[Span, ...]
    marks: tuple[int, ...]
    marked: types.CodeType

    def code(self, values: Sequence[Any]) -> types.CodeType:
        """The code of the function with `values` in the places of its numbers."""
        filled: types.CodeType = _filled(self.marked, dict(zip(self.marks, values, strict=True)))
        return filled


def _filled(constant: Any, values: dict[int, Any]) -> Any:
    if isinstance(constant, types.CodeType):
        return constant.replace(co_consts=tuple(_filled(c, values) for c in constant.co_consts))
    if isinstance(constant, tuple):
        if len(constant) == 2 and constant[0] == MARK:
            return values[constant[1]]
        return tuple(_filled(c, values) for c in constant)
    if isinstance(constant, frozenset):
        return frozenset(_filled(c, values) for c in constant)
    if isinstance(constant, slice):
        return slice(*(_filled(c, values) for c in (constant.start, constant.stop, constant.step)))
    return constant


def is_size(value: int) -> bool:
    """Whether a number can repeat a size of more than one index, counted from the start or the end."""
    return not -2 < value < 2


class _Marking(ast.NodeTransformer):
    """Puts a mark in the place of each number that can be a size, but not in what is run before the function."""

    def __init__(self) -> None:
        self.inside: list[list[int]] = []  # the marks in each function around the node that is visited
        self.values: list[int] = []
        self.spans: list[Span] = []
        self.functions: dict[tuple[str, int], list[int]] = {}

    def visit(self, node: ast.AST) -> Any:
        """A number, or an expression of numbers alone, becomes a mark."""
        if self.inside and isinstance(node, (ast.Constant, ast.UnaryOp, ast.BinOp)) and _of_numbers(node):
            try:
                value = ast.literal_eval(node) if isinstance(node, ast.Constant) else _value(node)
            except (ArithmeticError, TypeError, ValueError):
                return node
            if type(value) is not int or not is_size(value):
                return node
            for marks in self.inside:
                marks.append(len(self.values))
            self.values.append(value)
            self.spans.append((node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0))
            mark: Any = (MARK, len(self.values) - 1)
            return ast.copy_location(ast.Constant(mark), node)
        return super().visit(node)

    def _function(self, node: Any) -> Any:
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        self.inside.append([])
        node.body = [self.visit(part) for part in node.body]
        self.functions[node.name, first] = self.inside.pop()
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> Any:
        return self._function(node)

    def visit_Lambda(self, node: ast.Lambda) -> Any:
        node.body = self.visit(node.body)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        node.value = None if node.value is None else self.visit(node.value)
        return node

    def visit_match_case(self, node: Any) -> Any:
        node.body = [self.visit(part) for part in node.body]
        return node


def _of_numbers(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return _of_numbers(node.left) and _of_numbers(node.right)
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, (ast.USub, ast.UAdd)) and _of_numbers(node.operand)
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _value(node: ast.expr) -> Any:
    """The value of an expression of numbers; no powers, which could take for ever."""
    if any(isinstance(n, (ast.Pow, ast.LShift)) for n in ast.walk(node)):
        raise ValueError
    return eval(compile(ast.Expression(node), "", "eval"), {})


@functools.lru_cache(maxsize=1024)
def literals_of(code: types.CodeType) -> Literals | None:
    """The numbers written in the function that has `code`; None where its source is not known for sure."""
    place, flags = (code.co_name, code.co_firstlineno), code.co_flags & FUTURE
    file = _read("".join(linecache.getlines(code.co_filename)), code.co_filename, flags)
    if file is None or file.plain.get(place) != code:
        return None
    marking = file.marking
    marks = sorted(marking.functions.get(place, ()), key=marking.spans.__getitem__)
    values, spans = tuple(marking.values[m] for m in marks), tuple(marking.spans[m] for m in marks)
    return Literals(values, spans, tuple(marks), file.marked[place])


@dataclass(frozen=True)
class _File:
    """The functions of a file, compiled as they stand and with marks."""

    plain: dict[tuple[str, int], types.CodeType]
    marked: dict[tuple[str, int], types.CodeType]
    marking: _Marking


@functools.lru_cache(maxsize=32)
def _read(text: str, filename: str, flags: int) -> _File | None:
    marking = _Marking()
    try:
        tree = ast.parse(text)
        plain = _codes(tree, filename, flags)
        return _File(plain, _codes(marking.visit(tree), filename, flags), marking)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return None


def _codes(source: ast.Module, filename: str, flags: int) -> dict[tuple[str, int], types.CodeType]:
    """All code in `source` by name and first line; of two in one place, neither."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ahead = [compile(source, filename, "exec", flags, dont_inherit=True)]
    found: dict[tuple[str, int], list[types.CodeType]] = {}
    while ahead:
        one = ahead.pop()
        found.setdefault((one.co_name, one.co_firstlineno), []).append(one)
        ahead.extend(c for c in one.co_consts if isinstance(c, types.CodeType))
    return {place: several[0] for place, several in found.items() if len(several) == 1}


# ---------------------------------------------------------------------------------------------------- of a module


def methods_of(kind: type[nn.Module]) -> dict[str, tuple[Function, Literals]]:
    """The functions of the user in which numbers stand, by the names under which modules of class `kind` call them."""
    found: dict[str, Any] = {}
    for owner in kind.__mro__:
        for name, value in vars(owner).items():
            found.setdefault(name, value)
    methods = {}
    for name, value in found.items():
        if isinstance(value, Function) and not name.startswith("__"):
            code = innermost(value).__code__
            literals = (
                literals_of(code) if is_written_by_user(code) or issubclass(kind, fx.GraphModule) else None
            )
            if literals is not None and literals.values:
                methods[name] = value, literals
    return methods


def track_literals(model: nn.Module, run: int = 0) -> None:
    """Let the methods of `model`, a copy that nobody else sees, find tracked numbers where numbers are written."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        known = numbers_of(module)
        for name, (function, literals) in methods_of(class_of(module)).items():
            values = [known.get((name, i), value) for i, value in enumerate(literals.values)]
            tracked = [
                sizes.Size(v, ("literal", sizes.OfRun(path, run), name, i, v)) for i, v in enumerate(values)
            ]
            made = replaced(function, literals.code(tracked))
            if made is not None:
                vars(module)[name] = types.MethodType(made, module)


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module has by the code of its owner, whether numbers in it were changed or not."""
    kind: type[nn.Module] = vars(type(module)).get("__original__", type(module))
    return kind


def numbers_of(module: nn.Module) -> dict[tuple[str, int], int]:
    """The numbers in the code of `module` that are not what its owner wrote, by method and position in it."""
    return dict(vars(type(module)).get("__numbers__", ()))


def innermost(function: Any) -> Function:
    """The function that a decorated one calls: `functools.wraps` tells."""
    inner = vars(function).get("__wrapped__")
    return innermost(inner) if isinstance(inner, Function) else function


def replaced(function: Any, code: types.CodeType) -> Function | None:
    """A copy of `function` whose innermost one has `code`; None where a decorator keeps that one where nobody sees."""
    inner = vars(function).get("__wrapped__")
    if not isinstance(inner, Function):
        return _copy(function, code, function.__closure__)
    new = replaced(inner, code)
    cells = function.__closure__ or ()
    if new is None or not any(_content(cell) is inner for cell in cells):
        return None
    made = _copy(
        function,
        function.__code__,
        tuple(types.CellType(new) if _content(cell) is inner else cell for cell in cells),
    )
    made.__wrapped__ = new  # type: ignore[attr-defined]
    return made


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _copy(function: Function, code: types.CodeType, closure: Any) -> Function:
    made = Function(code, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    made.__doc__, made.__annotations__ = function.__doc__, function.__annotations__
    vars(made).update(vars(function))
    return made
