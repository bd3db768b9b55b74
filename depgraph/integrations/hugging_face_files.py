"""Checkpoints of transformers for `depgraph.checkpoint`: the model that a config describes, and how its tensors lie in files.

Names and layouts on disk are those of the published checkpoint; the model may stack, join or split them as it loads. The
library's own conversions are run here on stand-ins (`store/layout.py`), which says where each entry comes from.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.errors import InputError, StoreError, listed
from ..base.switches import same_random_state
from ..store.files import Checkpoint
from ..store.layout import Laid, NotMoved
from ..tracing.tensors import named_tensors
from .hugging_face import class_and_config, differences

CONFIG = "config.json"


def has_config(folder: Path) -> bool:
    """Whether a folder says by itself what its model is."""
    return (folder / CONFIG).is_file()


def maker(folder: Path) -> Callable[[], nn.Module]:
    """What builds the model of a folder by its config.

    Raises:
        InputError: the config names no class, can't be read, or describes packed or quantised weights.
    """
    try:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, config = class_and_config(folder)
    except (StoreError, OSError, ValueError) as error:
        raise InputError(f"{folder / CONFIG} does not build a model: {error}") from error
    quantised = said.get("quantization_config") if isinstance(said, dict) else None
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise InputError(
            f"{folder} has quantised weights ({method or 'quantization_config'}), whose entries can't be taken away one by one: "
            "convert it to bfloat16 first, prune, and quantise the smaller one"
        )
    return lambda: kind._from_config(copy.deepcopy(config))


def laid(model: Any, checkpoint: Checkpoint) -> tuple[dict[str, Laid], dict[str, str], list[str]]:
    """The model's tensors as they lie in the files; what else is stored, with a name as in the model; what its class passes over.

    Raises:
        InputError: a conversion that does more than move entries, by name.
    """
    from transformers import core_model_loading as loading  # noqa: PLC0415  only who uses it needs it
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    by_pattern = {k: c for c in converters for k in c.source_patterns}
    state = dict.fromkeys(model.state_dict(), True)
    prefix = model.base_model_prefix
    ways: dict[str, Any] = {}
    further: dict[str, str] = {}
    for name, one in sorted(checkpoint.stored.items(), key=lambda pair: loading.dot_natural_key(pair[0])):
        new, pattern = loading.rename_source_key(name, renamings, converters, prefix, state)
        if new not in state and name in state:
            new, pattern = loading.rename_source_key(name, [], [], prefix, state)
        if new not in state:
            inside = f"{prefix}."
            further[name] = new.removeprefix(inside) if not hasattr(model, prefix) else new
            continue
        if pattern is not None:
            way = ways.setdefault(new, copy.deepcopy(by_pattern[pattern]))
        else:
            way, pattern = ways.setdefault(new, loading.WeightRenaming(name, new)), name
        way.add_tensor(new, name, pattern, Laid.stored(name, one.shape, one.dtype))
    found: dict[str, Laid] = {}
    problems: list[str] = []
    ties = named_tensors(model)[1]
    for first, way in ways.items():
        try:
            made = way.convert(first, model=model, config=model.config)
        except (NotMoved, ValueError, TypeError, AttributeError, RuntimeError) as error:
            problems.append(f"{first!r} is made from what the files have by {error}")
            continue
        for name, value in made.items():
            value = value[0] if isinstance(value, list) else value
            if not isinstance(value, Laid):
                problems.append(f"{name!r} is made from what the files have by a reshape")
                continue
            found.setdefault(ties.get(name, name), value)
    if problems:
        raise InputError(
            listed(
                f"{checkpoint.folder} has tensors in a form through which a cut can't be followed:", problems
            )
            + "\n  fix: load it and save it with save_pretrained(folder, save_original_format=False), and prune that"
        )
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    passed = [name for name in further if any(p.search(name) for p in ignored)]
    return found, {n: new for n, new in further.items() if n not in passed}, passed


def give_computed(model: Any, stored: Collection[str]) -> None:
    """Parameters that no file has, as their class says, get the values that it computes for them: tables of positions."""
    patterns = [
        re.compile(p)
        for table in ("_keys_to_ignore_on_save", "_keys_to_ignore_on_load_missing")
        for p in getattr(model, table, None) or ()
    ]
    for name, parameter in named_tensors(model)[0].items():
        if name in stored or not parameter.is_meta or not any(p.search(name) for p in patterns):
            continue
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        made = nn.Parameter(torch.full(parameter.shape, float("nan")), parameter.requires_grad)
        module._parameters[last] = made
        try:
            with torch.no_grad(), same_random_state():
                model._init_weights(module)
        finally:
            if not bool(torch.isfinite(module._parameters[last]).all()):
                module._parameters[last] = parameter


def describe(small: Any, folder: Path, shell: Callable[[Callable[[], Any]], nn.Module]) -> list[str]:
    """Write the config of the smaller model into a folder; what a model that is built from it would get wrong.

    Where that is anything, the config is taken away again.
    """
    wrong: list[str] = []
    try:
        copy.deepcopy(small.config).save_pretrained(folder)
        again = shell(maker(folder))
        give_computed(again, [n for n, t in named_tensors(small)[0].items() if t.is_meta])
        wrong += differences(again, small)
    except Exception as error:  # noqa: BLE001  whatever it raises: it does not load
        wrong.append(f"it does not load: {' '.join(str(error).split())[:200]}")
    if wrong:
        (folder / CONFIG).unlink(missing_ok=True)
    return wrong
