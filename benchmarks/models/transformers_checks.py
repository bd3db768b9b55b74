"""What a pruned model of transformers is held to beside its outputs: its configuration, and text that it generates."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 3  # tokens to generate
CLOSE = 1e-3  # largest relative deviation of logits between generation with the cache and without


def check(inputs: dict[str, Any] | None, model: nn.Module) -> str:
    """What is wrong with the configuration of a pruned model, or with its generation of text from `inputs`."""
    wrong = stale(model)
    if wrong or inputs is None:
        return wrong
    try:
        return generation(model, inputs)
    except Exception as error:
        return f"generate() fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def stale(model: Any) -> str:
    """The numbers in the configuration that should be others for the shapes that the weights have, or nothing.

    A pruned model need not have a configuration: layers may have lost differently many indices, or heads be narrower
    than the width divided by their number. Where changing some numbers, one at a time, leads to one, it should have been
    there.
    """
    try:
        wrong = _differences(model, model.config)
    except Exception as error:
        return f"its config builds no model: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    config, changes = model.config, []
    while wrong:
        step = _step(model, config, wrong)
        if step is None:
            return ""
        config, change, wrong = step
        changes.append(change)
    return f"its config should have {', '.join(changes)}" if changes else ""


def _step(model: Any, config: Any, wrong: dict[str, Any]) -> tuple[Any, str, dict[str, Any]] | None:
    """A configuration with one number changed that brings it closer to the weights, or None."""
    ratios = {
        Fraction(new, old) for pair in wrong.values() for old, new in zip(*pair, strict=True) if old != new
    }
    for place, value in _numbers(config):
        for ratio in sorted(ratios):
            if (value * ratio).denominator == 1:
                changed = copy.deepcopy(config)
                _put(changed, place, int(value * ratio))
                try:
                    rest = _differences(model, changed)
                except Exception:  # no model has this configuration
                    continue
                if len(rest) < len(wrong):
                    return changed, f"{'.'.join(map(str, place))}={int(value * ratio)} for {value}", rest
    return None


def _differences(model: Any, config: Any) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Parameter -> its shape by `config` and the one that it has, where these differ."""
    with torch.device("meta"):
        again = type(model)(copy.deepcopy(config))
    have = {name: tuple(p.shape) for name, p in model.named_parameters()}
    says = {name: tuple(p.shape) for name, p in again.named_parameters()}
    if says.keys() != have.keys():
        raise ValueError("a model with other parameters")
    return {n: (says[n], have[n]) for n in have if says[n] != have[n]}


def _numbers(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Every int above 1 in a configuration, with its place."""
    if type(value) is int and value > 1:
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, (*place, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _numbers(item, (*place, i))
    elif hasattr(value, "to_dict"):
        for key, item in vars(value).items():
            yield from _numbers(item, (*place, key))


def _put(config: Any, place: tuple[Any, ...], number: int) -> None:
    for key in place[:-1]:
        config = config[key] if isinstance(config, (dict, list)) else vars(config)[key]
    table = config if isinstance(config, (dict, list)) else vars(config)
    table[place[-1]] = number


def _special(config: Any) -> list[int]:
    """The tokens that a config gives a meaning of their own."""
    found = {
        n for place, n in _numbers(config) if re.search(r"_token_(id|index)$", str(place[-1])) and n >= 0
    }
    return sorted(found)


def generation(model: Any, inputs: dict[str, Any]) -> str:
    """Whether generating with the cache differs from generating without it."""
    dtype = next(model.parameters()).dtype
    inputs = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
        if not k.startswith("decoder_")
    }
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "num_beams": 1}
    options["suppress_tokens"] = _special(model.config)  # one of an image, say, asks for an image
    runs = [
        model.generate(
            **inputs, **options, use_cache=cached, output_logits=True, return_dict_in_generate=True
        )
        for cached in (True, False)
    ]
    for cached, plain in zip(*(run.logits for run in runs), strict=True):
        scale = float(plain.abs().max().clamp(min=1e-30))
        difference = float((cached - plain).abs().max()) / scale
        if not difference <= CLOSE:
            return f"logits generated with the cache differ by {difference:.1e} from those without"
    return ""
