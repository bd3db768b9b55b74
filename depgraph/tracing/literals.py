"""Numbers written in the code of methods, and reads of sizes: tracked in a run, and changed for one module alone.

A method's source is parsed and compiled again with a mark in the place of every number. What is compiled without marks
must be the very code that runs, so the text is the right one; in the marked code the constants can then be any objects:
tracked numbers while a model is traced, other numbers in a smaller model. A read of a size (``h.shape[-1]``, ``h.size(1)``)
tells in a run where it stands, and can become a number: what is computed from a size that gets smaller then stays what it
was. Everything else of the function stays: globals, closure, defaults, decorators, names and lines.
"""

from __future__ import annotations
import __future__

import ast
import functools
import linecache
import types
import warnings
from collections.abc import Callable, Sequence
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


Asked = tuple[str, str, int]  # the text of a file, its name, and the futures that it is compiled with


@dataclass(frozen=True)
class Literals:
    """The numbers written in one function, and behind them the sizes that it reads.

    Attributes:
        values: the numbers, in the order of the text; of an expression of numbers alone, its value. Then None for each read
            of a size, in the order of the text.
        spans: for each its first line and column, its last line and the column behind it, as in `ast`.
        marks: the number of each mark.
        place: name and first line of the function.
        file: what to compile.
    """

    values: tuple[int | None, ...]
    spans: tuple[Span, ...]
    marks: tuple[int, ...]
    place: tuple[str, int]
    file: Asked

    def code(self, values: Sequence[Any]) -> types.CodeType:
        """The code of the function with `values` in the places of its numbers and reads.

        For a read: None leaves it as it stands, a number is put in its place, and a function is called with what it reads.
        """
        by_mark = dict(zip(self.marks, values, strict=True))
        reads = {
            mark: by_mark[mark] for mark, old in zip(self.marks, self.values, strict=True) if old is None
        }
        told = frozenset(mark for mark, value in reads.items() if callable(value))
        numbers = frozenset(mark for mark, value in reads.items() if value is not None) - told
        filled: types.CodeType = _filled(_marked(*self.file, told, numbers)[self.place], by_mark)
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
    """Puts a mark in the place of each number that can be a size, but not in what is run before the function.

    Reads of sizes have marks, too; those in `numbers` are replaced by theirs, those in `told` are given to it.
    """

    def __init__(self, told: frozenset[int] = frozenset(), numbers: frozenset[int] = frozenset()) -> None:
        self.told, self.numbers = told, numbers
        self.inside: list[list[int]] = []  # the marks in each function around the node that is visited
        self.values: list[int | None] = []
        self.spans: list[Span] = []
        self.functions: dict[tuple[str, int], list[int]] = {}

    def visit(self, node: ast.AST) -> Any:
        """A number, or an expression of numbers alone, becomes a mark; a read of a size gets one where that is asked for."""
        if self.inside and isinstance(node, (ast.Constant, ast.UnaryOp, ast.BinOp)) and _of_numbers(node):
            try:
                value = ast.literal_eval(node) if isinstance(node, ast.Constant) else _value(node)
            except (ArithmeticError, TypeError, ValueError):
                return node
            return self._mark(node, value)[1] if type(value) is int and is_size(value) else node
        if self.inside and isinstance(node, (ast.Subscript, ast.Call)) and _reads_size(node):
            number, mark = self._mark(node, None)
            read = super().visit(node)
            if number in self.told:
                return ast.copy_location(ast.Call(mark, [read], []), node)
            return mark if number in self.numbers else read
        return super().visit(node)

    def _mark(self, node: Any, value: int | None) -> tuple[int, ast.expr]:
        """The number of a new mark, and the mark."""
        for marks in self.inside:
            marks.append(len(self.values))
        self.values.append(value)
        self.spans.append((node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0))
        mark: Any = (MARK, len(self.values) - 1)
        return mark[1], ast.copy_location(ast.Constant(mark), node)

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


def _reads_size(node: ast.Subscript | ast.Call) -> bool:
    """Whether a node is ``x.shape[0]`` or ``x.size(0)`` of a variable or an attribute, whatever the number is."""
    if isinstance(node, ast.Subscript):
        read, name, given = node.value, "shape", [node.slice]
        plain = isinstance(node.ctx, ast.Load)
    else:
        read, name, given = node.func, "size", [*node.args, *(k.value for k in node.keywords)]
        plain = all(k.arg == "dim" for k in node.keywords)
    if not (plain and isinstance(read, ast.Attribute) and read.attr == name):
        return False
    owner = read.value
    while isinstance(owner, ast.Attribute):
        owner = owner.value
    return isinstance(owner, ast.Name) and len(given) == 1 and _of_numbers(given[0])


def _value(node: ast.expr) -> Any:
    """The value of an expression of numbers; no powers, which could take for ever."""
    if any(isinstance(n, (ast.Pow, ast.LShift)) for n in ast.walk(node)):
        raise ValueError
    return eval(compile(ast.Expression(node), "", "eval"), {})


@functools.lru_cache(maxsize=1024)
def literals_of(code: types.CodeType) -> Literals | None:
    """The numbers and reads of sizes in the function that has `code`; None where its source is not known for sure."""
    place, flags = (code.co_name, code.co_firstlineno), code.co_flags & FUTURE
    asked = "".join(linecache.getlines(code.co_filename)), code.co_filename, flags
    file = _read(*asked)
    if file is None or file.plain.get(place) != code:
        return None
    marking = file.marking
    marks = sorted(
        marking.functions.get(place, ()), key=lambda m: (marking.values[m] is None, marking.spans[m])
    )
    values, spans = tuple(marking.values[m] for m in marks), tuple(marking.spans[m] for m in marks)
    return Literals(values, spans, tuple(marks), place, asked)


@dataclass(frozen=True)
class _File:
    """The functions of a file, compiled as they stand, and the marks in them."""

    plain: dict[tuple[str, int], types.CodeType]
    marking: _Marking


@functools.lru_cache(maxsize=32)
def _read(text: str, filename: str, flags: int) -> _File | None:
    marking = _Marking()
    try:
        tree = ast.parse(text)
        plain = _codes(tree, filename, flags)
        marking.visit(tree)
        return _File(plain, marking)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return None


@functools.lru_cache(maxsize=64)
def _marked(
    text: str, filename: str, flags: int, told: frozenset[int], numbers: frozenset[int]
) -> dict[tuple[str, int], types.CodeType]:
    """The functions of a file that `_read` could read, with marks: ``(MARK, n)`` in the place of mark n."""
    return _codes(_Marking(told, numbers).visit(ast.parse(text)), filename, flags)


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


def track_literals(model: nn.Module, run: int, told: Callable[[sizes.Place, sizes.Expr], None]) -> None:
    """Let the methods of `model`, a copy that nobody else sees, find tracked numbers where numbers are written.

    Args:
        model: the copy.
        run: the number of the run.
        told: called with the place of a read of a size, and what was read, each time.
    """
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        known = numbers_of(module)
        for name, (function, literals) in methods_of(class_of(module)).items():
            marks: list[Any] = []
            for i, value in enumerate(literals.values):
                number = known.get((name, i), value)
                place = sizes.OfRun(path, run), name, i
                if number is not None:
                    marks.append(sizes.Size(number, ("literal", *place, number)))
                else:
                    marks.append(None if isinstance(module, fx.GraphModule) else _telling(place, told))
            made = replaced(function, literals.code(marks))
            if made is not None:
                vars(module)[name] = types.MethodType(made, module)


def _telling(place: sizes.Place, told: Callable[[sizes.Place, Any], None]) -> Callable[[Any], Any]:
    def read(size: Any) -> Any:
        if type(size) is not sizes.Size or size.expr[0] != "dim":
            return size
        told(place, size.expr)
        return sizes.Size(sizes.plain(size), (*size.expr[:3], place))

    return read


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
