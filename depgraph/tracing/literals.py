"""Numbers written in the code of methods, and loads of sizes: tracked in a run, and changed for one module alone.

A method's source is parsed and compiled again with a mark in the place of every number. What is compiled without marks
must be the very code that runs, so the text is the right one; in the marked code the constants can then be any objects:
tracked numbers while a model is traced, other numbers in a smaller model. A size that is loaded (``h.shape[-1]``,
``h.size(1)``, a variable that holds one) tells in a run where that is, and can become a number there: what is computed with
a size that gets smaller then stays what it was. Where a size goes on from there to code that may not have run (into a
container, an attribute or what is returned) it can't. Everything else of the function stays: globals, closure, defaults,
decorators, names and lines.
"""

from __future__ import annotations
import __future__

import ast
import functools
import linecache
import math
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from . import sizes
from .recorder import COUNTED, is_written_by_user

Function = types.FunctionType
Span = tuple[int, int, int, int]
MARK = "a number of the user's code"
FUTURE = functools.reduce(
    int.__or__, (getattr(__future__, n).compiler_flag for n in __future__.all_feature_names)
)


Asked = tuple[str, str, int]  # the text of a file, its name, and the futures that it is compiled with
# What a mark stands for: a number, a load that can be one, a value that goes on to other code, something that runs or not.
NUMBER, LOAD, PASSED, RUN = range(4)
ANY = "*"  # among names: whatever a variable is


@dataclass(frozen=True)
class Literals:
    """The numbers written in one function, and behind them the sizes that it loads.

    Attributes:
        values: the numbers, in the order of the text; of an expression of numbers alone, its value. Then None for each load
            of a variable or a size, in the order of the text, and for what else is told in a run.
        spans: for each its first line and column, its last line and the column behind it, as in `ast`.
        marks: the number of each mark.
        kinds: what each stands for.
        names: of what runs or not, the attributes that are named there, or ANY; else nothing.
        place: name and first line of the function.
        file: what to compile.
    """

    values: tuple[int | None, ...]
    spans: tuple[Span, ...]
    marks: tuple[int, ...]
    kinds: tuple[int, ...]
    names: tuple[frozenset[str], ...]
    place: tuple[str, int]
    file: Asked

    def code(self, values: Sequence[Any]) -> types.CodeType:
        """The code of the function with `values` in the places of its numbers and loads.

        For a load: None leaves it as it stands, a number is put in its place. Or functions for all that is no number: they
        are called with what is loaded.
        """
        by_mark = dict(zip(self.marks, values, strict=True))
        numbers = frozenset(
            mark
            for mark, kind in zip(self.marks, self.kinds, strict=True)
            if kind == LOAD and type(by_mark[mark]) in (int, sizes.Size)
        )
        told = any(callable(value) for value in values)
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

    Loads have marks, too; those in `numbers` are replaced by theirs. With `told`, all others are given to theirs, as is what
    goes on to other code, and statements and parts of them that may not run are preceded by a call of theirs.
    """

    def __init__(self, told: bool = False, numbers: frozenset[int] = frozenset()) -> None:
        self.told, self.numbers = told, numbers
        self.inside: list[list[int]] = []  # the marks in each function around the node that is visited
        self.own: frozenset[str] | None = None  # the variables of the outermost one in the same class
        self.values: list[int | None] = []
        self.spans: list[Span] = []
        self.kinds: list[int] = []
        self.names: list[frozenset[str]] = []
        self.functions: dict[tuple[str, int], list[int]] = {}

    def visit(self, node: ast.AST) -> Any:
        """A number, or an expression of numbers alone, becomes a mark; what is told gets one where that is asked for."""
        if not self.inside:
            return super().visit(node)
        if isinstance(node, (ast.Constant, ast.UnaryOp, ast.BinOp)) and _of_numbers(node):
            try:
                value = ast.literal_eval(node) if isinstance(node, ast.Constant) else _value(node)
            except (ArithmeticError, TypeError, ValueError):
                return node
            if type(value) is not int or not is_size(value):
                return node
            return self._mark(node, NUMBER, value)[1]
        if isinstance(node, ast.stmt) and not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            return self._after_told(node)
        if isinstance(node, (ast.Name, ast.Subscript, ast.Call)) and self._loads_size(node):
            number, mark = self._mark(node, LOAD)
            load = super().visit(node)
            return mark if number in self.numbers else self._given(mark, load)
        if isinstance(node, (ast.List, ast.Tuple, ast.Dict, ast.Set)) and _is_load(node):
            return self._given(self._mark(node, PASSED)[1], super().visit(node))
        return super().visit(node)

    def _mark(self, node: Any, kind: int, value: int | None = None) -> tuple[int, ast.expr]:
        """The number of a new mark, and the mark."""
        for marks in self.inside:
            marks.append(len(self.values))
        self.values.append(value)
        self.spans.append((node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0))
        self.kinds.append(kind)
        self.names.append(self._named(node) if kind == RUN else frozenset())
        mark: Any = (MARK, len(self.values) - 1)
        return mark[1], ast.copy_location(ast.Constant(mark), node)

    def _named(self, node: ast.AST) -> frozenset[str]:
        """The attributes that code names, and ANY where it calls a variable."""
        found: set[str] = set()
        for n in ast.walk(node):
            if isinstance(n, ast.Attribute):
                found.add(n.attr)
            elif isinstance(n, ast.Constant) and isinstance(n.value, str):  # getattr(self, "name")
                found.add(n.value)
            elif isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in (self.own or ()):
                found.add(ANY)
        return frozenset(found)

    def _given(self, mark: ast.expr, value: Any) -> Any:
        return ast.copy_location(ast.Call(mark, [value], []), value) if self.told else value

    def _part(self, node: ast.expr, kind: int) -> Any:
        """Part of an expression, with a mark around whatever it becomes."""
        if not self.inside:
            return self.visit(node)
        mark = self._mark(node, kind)[1]
        return self._given(mark, self.visit(node))

    def _after_told(self, node: Any) -> Any:
        """A statement, with a call before it that says that it runs; what it puts elsewhere is told."""
        mark = self._mark(node, RUN)[1]
        call = ast.copy_location(
            ast.Expr(self._given(mark, ast.copy_location(ast.Constant(None), node))), node
        )
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        away = isinstance(node, ast.Return) or any(
            isinstance(t, (ast.Attribute, ast.Subscript)) for t in targets
        )
        value = getattr(node, "value", None)
        passed = self._mark(value, PASSED)[1] if away and value is not None else None
        made = super().visit(node)
        if passed is not None:
            made.value = self._given(passed, made.value)
        return [call, made] if self.told and not isinstance(node, (ast.Global, ast.Nonlocal)) else made

    def _loads_size(self, node: ast.Name | ast.Subscript | ast.Call) -> bool:
        """Whether a node is a variable, or ``x.shape[0]`` or ``x.size(0)`` of a variable or an attribute of one."""
        if isinstance(node, ast.Name):
            return isinstance(node.ctx, ast.Load) and node.id in (self.own or ())
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
        known = isinstance(owner, ast.Name) and owner.id in (self.own or ())
        return known and len(given) == 1 and _of_numbers(given[0])

    def _statements(self, statements: list[Any]) -> list[Any]:
        made = map(self.visit, statements)
        return [one for part in made for one in (part if isinstance(part, list) else [part])]

    def _function(self, node: Any) -> Any:
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        around, self.own = self.own, _variables(node) if self.own is None else self.own
        self.inside.append([])
        node.body = self._statements(node.body)
        self.functions[node.name, first] = self.inside.pop()
        self.own = around
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        around, self.own = self.own, None
        made = self.generic_visit(node)
        self.own = around
        return made

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> Any:
        return self._function(node)

    def visit_Lambda(self, node: ast.Lambda) -> Any:
        node.body = self._part(node.body, PASSED)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        node.value = None if node.value is None else self.visit(node.value)
        return node

    def visit_match_case(self, node: Any) -> Any:
        node.body = self._statements(node.body)
        return node

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        node.test = self.visit(node.test)
        node.body, node.orelse = self._part(node.body, RUN), self._part(node.orelse, RUN)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        first, *others = node.values
        node.values = [self.visit(first), *(self._part(other, RUN) for other in others)]
        return node

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        if not isinstance(node.value, ast.Name):
            node.value = self.visit(node.value)
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        if not isinstance(node.func, ast.Name):
            node.func = self.visit(node.func)
        elif self.inside and node.func.id in ("int", "len") and node.func.id not in (self.own or ()):
            node.func = self._given(self._mark(node.func, PASSED)[1], node.func)
        away = isinstance(node.func, ast.Name) and node.func.id == "setattr"
        lists = ast.List, ast.Tuple  # what takes one uses it at once
        arguments: list[Any] = []
        for a in node.args:
            one: Any = self._part if away else self.generic_visit if isinstance(a, lists) else self.visit
            arguments.append(one(a, PASSED) if away else one(a))
        node.args = arguments
        node.keywords = [self.visit(k) for k in node.keywords]
        return node

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        node.value = self.visit(node.value)
        if isinstance(node.slice, ast.Tuple):
            node.slice.elts = [self.visit(e) for e in node.slice.elts]
        else:
            node.slice = self.visit(node.slice)
        return node


def _is_load(node: Any) -> bool:
    return isinstance(getattr(node, "ctx", ast.Load()), ast.Load)


def _variables(function: ast.AST) -> frozenset[str]:
    """The names that a function gives values to, itself or in functions within it, and that are not those of others."""
    nodes = list(ast.walk(function))
    made = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    made |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    return frozenset(made.difference(*(n.names for n in nodes if isinstance(n, (ast.Global, ast.Nonlocal)))))


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
    """The numbers and reads of sizes in the function that has `code`; None where its source is not known for sure."""
    place, flags = (code.co_name, code.co_firstlineno), code.co_flags & FUTURE
    asked = "".join(linecache.getlines(code.co_filename)), code.co_filename, flags
    file = _read(*asked)
    if file is None or file.plain.get(place) != code:
        return None
    marking = file.marking
    marks = sorted(marking.functions.get(place, ()), key=lambda m: (marking.kinds[m], marking.spans[m]))
    return Literals(
        tuple(marking.values[m] for m in marks),
        tuple(marking.spans[m] for m in marks),
        tuple(marks),
        tuple(marking.kinds[m] for m in marks),
        tuple(marking.names[m] for m in marks),
        place,
        asked,
    )


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
    text: str, filename: str, flags: int, told: bool, numbers: frozenset[int]
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
    """The functions of the user that hold numbers or load variables, by the names under which modules of class `kind` call them."""
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


Told = Callable[[sizes.Place, Any], None]


def track_literals(model: nn.Module, run: int, told: Told) -> Callable[[], frozenset[str]]:
    """Let the methods of `model`, a copy that nobody else sees, find tracked numbers where numbers are written.

    Args:
        model: the copy.
        run: the number of the run.
        told: called with the place of a load, and the dim that was loaded, each time; None where it is no dim, or where it
            goes on to code that may not have run.

    Returns:
        what gives the attributes that are named in code that did not run, of methods that ran.
    """
    ran: dict[tuple[str, str], set[int]] = {}
    parts: dict[tuple[str, str], Literals] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        known, inside = numbers_of(module), sizes.OfRun(path, run)
        for name, (function, literals) in methods_of(class_of(module)).items():
            if name in vars(module):  # something of its own is called by that name
                continue
            marks: list[Any] = []
            for i, (value, kind) in enumerate(zip(literals.values, literals.kinds, strict=True)):
                number, place = known.get((name, i), value), (inside, name, i)
                if number is not None:
                    marks.append(sizes.Size(number, ("literal", *place, number)))
                elif isinstance(module, fx.GraphModule):
                    marks.append(None)
                elif kind == RUN:
                    marks.append(_noting(ran.setdefault((inside, name), set()), i))
                else:
                    marks.append(_telling(place, kind, told))
            made = replaced(function, literals.code(marks))
            if made is not None:
                vars(module)[name] = types.MethodType(made, module)
                parts[inside, name] = literals

    def not_run() -> frozenset[str]:
        found: set[str] = set()
        for key, literals in parts.items():
            for i, named in enumerate(literals.names if ran.get(key) else ()):
                found |= set() if i in ran[key] else named
        return frozenset(found)

    return not_run


def _noting(seen: set[int], number: int) -> Callable[[Any], Any]:
    def runs(value: Any) -> Any:
        seen.add(number)
        return value

    return runs


def _telling(place: sizes.Place, kind: int, told: Told) -> Callable[[Any], Any]:
    def load(value: Any) -> Any:
        if type(value) is sizes.Size and value.expr[0] == "dim" and kind == LOAD:
            told(place, value.expr)
            return sizes.Size(sizes.plain(value), (*value.expr[:3], place))
        if kind == PASSED and (value is int or value is len):
            return _whole if value is int else _length
        told(place, None)
        for expr in sizes.expressions_in(value):
            for earlier in sizes.places_in(expr) if type(value) is not sizes.Scalar else ():
                told(earlier, None)
        return value

    return load


def _whole(*given: Any) -> int:
    """``int(...)`` that keeps where a number came from."""
    tracked = len(given) == 1 and type(given[0]) in (sizes.Size, sizes.Scalar)
    return math.trunc(given[0]) if tracked else int(*given)


def _length(given: Any) -> int:
    """``len(...)`` that keeps of which tensor a number is the first size."""
    if not isinstance(given, torch.Tensor) or not given.dim():
        return len(given)
    size = given.size(0)
    if isinstance(size, sizes.Size):
        sizes.tell_lost(size.expr, COUNTED)
    return size


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
