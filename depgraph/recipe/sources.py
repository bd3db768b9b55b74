"""What the words on a command line stand for: models, inputs, functions."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.checks import named_object
from ..base.errors import InputError
from ..integrations import PRETRAINED
from ..store.document import FILE_NAME

INPUT = re.compile(r"(?:(?P<name>\w+)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+?)(?:<(?P<bound>\d+))?)?")
OWN_EXAMPLES = ("example_input_array", "dummy_inputs")  # attributes by which models say what they take


def _named(text: str, what: str) -> Any:
    """The object that ``package.module:name`` names; the present folder is searched first."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    return named_object(what, text)


def function(text: str, what: str) -> Callable[..., Any]:
    """The function that ``package.module:name`` names."""
    found = _named(text, what)
    if not callable(found):
        raise InputError(f"{what} {text!r} is not a function")
    return found


def called(text: str, what: str) -> Any:
    """What the function that ``package.module:name`` names returns."""
    made = function(text, what)
    try:
        return made()
    except Exception as error:  # the user's own code may raise anything
        raise InputError(f"{what} {text!r} raised {type(error).__name__}: {error}") from error


def model_of(text: str) -> nn.Module:
    """The model that a factory ``package.module:function`` returns, that a name stands for, or in a folder; in eval mode."""
    if os.path.isdir(text):
        if (Path(text) / FILE_NAME).exists() and not (Path(text) / "config.json").exists():
            raise InputError(
                f"{text} contains a smaller model: give its original as the model (verify and compare also take the "
                "folder)"
            )
        return pretrained().from_folder(text)
    found = _named(text, "the model")
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise InputError(f"{text!r} is neither a model nor a function that makes one")
        found = called(text, "the model")
    if not isinstance(found, nn.Module):
        raise InputError(f"{text!r} made a {type(found).__name__}, not a torch.nn.Module")
    return found.eval()


def pretrained() -> Any:
    """The integration that knows folders of pretrained models; imported by those who have one."""
    return importlib.import_module(PRETRAINED)


def inputs_of(texts: list[str] | None, model: nn.Module | None) -> Any:
    """Example inputs from their descriptions, or from the model itself where there are none.

    Each of `texts` is ``1x3x224x224``, ``name=1x16:int64<1000`` (a keyword argument of whole numbers below 1000; below 2
    where no bound is given), or one ``package.module:function`` that returns example inputs.
    """
    if not texts:
        for name in OWN_EXAMPLES:
            own = getattr(model, name, None)
            if own is not None:
                return own
        raise InputError(
            "no --input given, and the model has no example inputs: give --input 1x3x224x224, for example"
        )
    if len(texts) == 1 and ":" in texts[0] and INPUT.fullmatch(texts[0]) is None:
        return called(texts[0], "--input")
    generator = torch.Generator().manual_seed(0)
    positional: list[torch.Tensor] = []
    named: dict[str, torch.Tensor] = {}
    for text in texts:
        found = INPUT.fullmatch(text)
        if found is None:
            raise InputError(
                f"--input {text!r} can't be read: give a shape such as 1x3x224x224, input_ids=1x16:int64<1000, or package.module:function"
            )
        tensor = _random(found, generator)
        if found["name"]:
            named[found["name"]] = tensor
        else:
            positional.append(tensor)
    if named and positional:
        raise InputError("--input: give names (keyword arguments) for all or for none")
    return named or tuple(positional)


def _random(found: re.Match[str], generator: torch.Generator) -> torch.Tensor:
    shape = [int(n) for n in found["shape"].split("x")]
    dtype = getattr(torch, found["dtype"] or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"--input {found[0]!r}: torch has no dtype {found['dtype']!r}")
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    bound = 2 if dtype == torch.bool or not found["bound"] else int(found["bound"])
    return torch.randint(bound, shape, generator=generator).to(dtype)
