"""A tiny model of every type of transformers that can be built and run offline."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import transformers_tiny
from benchmarks.suites.case import Case, seeded

SMALL = ("llama", "bert", "t5", "mixtral", "whisper", "vit")
STEPS = 3  # tokens to generate
CLOSE = 1e-3  # largest relative deviation of logits between generation with the cache and without


def cases() -> dict[str, Case]:
    """One case a type in the table."""
    return {row.type: _case(row) for row in transformers_tiny.load() if row.model}


def _case(row: transformers_tiny.Tiny) -> Case:
    return Case(
        row.type,
        partial(seeded, partial(transformers_tiny.build, row.type, row.model)),
        partial(transformers_tiny.inputs, row.inputs),
        row.model,
        partial(_check, row),
    )


def _check(row: transformers_tiny.Tiny, model: nn.Module) -> str:
    """What is wrong with the configuration of a pruned model, or with its generation of text."""
    wrong = stale(model)
    if wrong or not row.generates:
        return wrong
    try:
        return generation(model, transformers_tiny.inputs(row.inputs))
    except Exception as error:
        return f"generate() fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def stale(model: nn.Module) -> str:
    """Where the configuration does not give the shapes that the weights have; nothing where no configuration could.

    A model whose layers, built alike, have lost differently many indices can't be built from any configuration.
    """
    have = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if _uneven(have):
        return ""
    try:
        with torch.device("meta"):
            again = type(model)(copy.deepcopy(model.config))
    except Exception as error:
        return f"its config builds no model: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for name, parameter in again.named_parameters():
        if name in have and tuple(parameter.shape) != have[name]:
            return f"its config says {tuple(parameter.shape)} for {name}, which has {have[name]}"
    return ""


def _uneven(shapes: dict[str, tuple[int, ...]]) -> bool:
    alike: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for name, shape in shapes.items():
        alike[re.sub(r"\d+", "*", name)].add(shape)
    return any(len(found) > 1 for found in alike.values())


def generation(model: Any, inputs: dict[str, Any]) -> str:
    """Whether generating with the cache differs from generating without it."""
    dtype = next(model.parameters()).dtype
    inputs = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
        if not k.startswith("decoder_")
    }
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "num_beams": 1}
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
