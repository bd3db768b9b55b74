"""What an argument may be, each kind checked in one place. Every check raises `InputError`, naming the argument."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from math import inf
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import nn

from .errors import InputError


def shown(value: Any) -> str:
    """`value` as a message names it: its repr, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{type(value).__name__} {text[:60]!r} ..."


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether `value` is a whole number, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole_number(name: str, value: Any, low: int = 0, high: int | None = None) -> int:
    """`value`, where it is a whole number from `low` to `high`."""
    if not is_whole(value) or not low <= value <= (inf if high is None else high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{name} must be a whole number {limits}, not {shown(value)}")
    return int(value)


def number(name: str, value: Any, low: float = -inf, *, above: bool = False) -> float:
    """`value` as a float, where it is finite and at least `low`, or with `above` larger."""
    fine = is_number(value) and -1e300 < value < 1e300 and (value > low if above else value >= low)
    if not fine:
        limits = "" if low == -inf else f" above {low:g}" if above else f" of at least {low:g}"
        raise InputError(f"{name} must be a finite number{limits}, not {shown(value)}")
    return float(value)


def fraction(name: str, value: Any, *, zero: bool = False, one: bool = False) -> float:
    """`value` as a float, where it lies between 0 and 1; `zero` and `one`: these are allowed, too."""
    if not is_number(value) or not (0 < value < 1 or (zero and value == 0) or (one and value == 1)):
        raise InputError(f"{name} must be between 0 and 1, not {shown(value)}")
    return float(value)


def flag(name: str, value: Any) -> None:
    """`value` is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, not {shown(value)}")


def of_kind(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """`value` is a `kind`, which a message calls `what`."""
    if not isinstance(value, kind):
        raise InputError(f"{name} must be {what}, not {shown(value)}")


def a_module(name: str, value: Any) -> None:
    """`value` is a module."""
    of_kind(name, value, nn.Module, "a torch.nn.Module")


def several(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> list[Any]:
    """`value`, an iterable of `kind` (of `what`, in the words of a message), as a list."""
    if (
        isinstance(value, (str, Mapping, nn.Module))
        or not isinstance(value, Iterable)
        or isinstance(value, type)
    ):
        raise InputError(f"{name} must be a list of {what}, not {shown(value)}")
    found = list(value)
    for one in found:
        of_kind(f"an entry of {name}", one, kind, f"one of {what}")
    return found


def function(name: str, value: Any, *takes: str) -> None:
    """`value` can be called with as many positional arguments as `takes` names."""
    call = f"{name}({', '.join(takes)})"
    if not callable(value) or isinstance(value, type):
        raise InputError(f"{name} must be a function, called as {call}, not {shown(value)}")
    try:
        inspect.signature(value.forward if isinstance(value, nn.Module) else value).bind(*takes)
    except TypeError as error:
        raise InputError(f"{name} must be a function, called as {call}: {error}") from error
    except ValueError:  # it is built in, and does not say what it takes
        pass


def needs_an_argument(value: Callable[..., Any]) -> bool:
    """Whether a function can't be called with none."""
    try:
        inspect.signature(value).bind()
    except TypeError:
        return True
    except ValueError:  # it is built in, and does not say what it takes
        pass
    return False


def named_object(name: str, text: str) -> Any:
    """What ``package.module:name`` names; the module is imported."""
    module, _, path = text.partition(":")
    if not module or not path:
        raise InputError(f"{name} must be given as package.module:name, not {shown(text)}")
    try:
        return functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except Exception as error:  # what importing runs may raise anything
        raise InputError(f"{name} {text!r} can't be found: {type(error).__name__}: {error}") from error


def a_path(name: str, value: Any) -> Path:
    """`value`, which names a file or folder, as an absolute path."""
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise InputError(f"{name} must be a path, not {shown(value)}")
    return Path(os.path.abspath(text))
