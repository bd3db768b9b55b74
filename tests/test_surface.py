"""What tools import: every public name is listed by its stage, documented, and says what it takes and raises."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import pytest

import depgraph
from depgraph.base import errors

NAMES = [n for n in depgraph.__all__ if inspect.isfunction(getattr(depgraph, n))]
CLASSES = [n for n in depgraph.__all__ if inspect.isclass(getattr(depgraph, n))]


def own_methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, value in vars(cls).items():
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, cached_property):
            value = value.func
        elif isinstance(value, (classmethod, staticmethod)):
            value = value.__func__
        if inspect.isfunction(value) and not name.startswith("_"):
            yield name, value


def arguments(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def raised(function: Callable[..., Any]) -> set[str]:
    """Names of depgraph's errors that the body raises by itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)]
    return {
        c.func.id
        for c in calls
        if isinstance(c.func, ast.Name) and inspect.isclass(getattr(errors, c.func.id, None))
    }


def missing(function: Callable[..., Any], doc: str, pattern: str) -> list[str]:
    out = [name for name in arguments(function) if not re.search(pattern.format(name), doc, re.MULTILINE)]
    return out + [f"raises {error}" for error in raised(function) if f"{error}:" not in doc]


@pytest.mark.parametrize("name", NAMES)
def test_a_function_says_what_it_takes_and_raises(name: str) -> None:
    function = getattr(depgraph, name)
    doc = inspect.getdoc(function) or ""
    assert doc
    entry = r"^    \**(\w+, )*{0}(, \w+)*: "  # an entry of `Args:`
    assert missing(function, doc, entry) == []
    assert not arguments(function) or "Args:" in doc


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_says_what_it_is_and_what_its_methods_take(name: str) -> None:
    cls = getattr(depgraph, name)
    doc = inspect.getdoc(cls) or ""
    assert cls.__doc__
    assert not doc.startswith(f"{name}("), "made by dataclass"
    mentioned = r"\b{0}\b"
    if "__dataclass_fields__" in vars(cls):
        own = [field for field in cls.__annotations__ if not field.startswith("_")]
        assert [field for field in own if not re.search(mentioned.format(field), doc)] == []
    elif inspect.isfunction(init := vars(cls).get("__init__")) and cls is not depgraph.Prepared:  # a protocol
        assert missing(init, f"{doc}\n{inspect.getdoc(init)}", mentioned) == []
    for method, function in own_methods(cls):
        about = inspect.getdoc(function) or ""
        assert about, f"{name}.{method} has no docstring"
        assert missing(function, about, mentioned) == [], f"{name}.{method}"


def test_every_public_name_stands_in_the_map_of_stages_once() -> None:
    stated = re.findall(
        r"`(\w+)`", (depgraph.__doc__ or "").partition("|---|")[2].partition("These names")[0]
    )
    assert sorted(stated) == sorted(depgraph.__all__)


def test_every_error_is_public() -> None:
    found = {n for n, e in vars(errors).items() if inspect.isclass(e) and issubclass(e, Exception)}
    assert found <= set(depgraph.__all__)
