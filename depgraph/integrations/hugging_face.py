"""Folders of Hugging Face transformers: plain ``from_pretrained`` loads them where the config says all of the model.

A config says one width for all layers, and numbers that are computed from it. A model whose layers came out different, or
that keeps what its config would compute anew (a scale of the original's head width, rotary frequencies that were cut),
loads by `load_pretrained`, which builds the original and cuts it. Both are in one folder, and which it is has been
tried out by loading it before the folder is in its place.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.checks import a_path, of_kind
from ..base.errors import InputError, StoreError
from ..base.running import in_mode
from ..elastic import Elastic
from ..prune import PruneResult
from ..store import load, save
from ..tracing.attributes import INTERNALS
from ..tracing.literals import class_of, numbers_of
from ..tracing.tensors import attribute_tensors, named_tensors
from ..tracing.wrappers import core

STOCK = ("config.json", "generation_config.json")
# The values of fields by which a config chooses code that runs a model; any other may name code to fetch.
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")


def save_pretrained(
    model_or_result: nn.Module | PruneResult, folder: str | os.PathLike[str], **options: Any
) -> list[str]:
    """Write a smaller transformers model into a folder.

    Args:
        model_or_result: as for `depgraph.save`.
        folder: where to write. A tokenizer that was saved there stays.
        options: those of `depgraph.save`.

    Returns:
        [] where ``AutoModel....from_pretrained(folder)`` gives this model without depgraph. Otherwise what it would get
        wrong; the folder then has no ``config.json``, and `load_pretrained` loads it.

    Raises:
        InputError: this is not a transformers model.
        StoreError: as for `depgraph.save`.
    """
    model: Any = model_or_result.model if isinstance(model_or_result, PruneResult) else model_or_result
    model = core(model) if isinstance(model, nn.Module) else model
    if not hasattr(type(model), "from_pretrained") or not hasattr(model, "config"):
        raise InputError(f"{type(model).__name__} is not a transformers model: use depgraph.save")
    wrong: list[str] = []

    def stock(new: Path) -> None:
        kind: Any = class_of(model)
        config: Any = copy.deepcopy(model.config)
        try:
            config.architectures = [kind.__name__]
            config.save_pretrained(new)
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.save_pretrained(new)
            wrong.extend(differences(kind.from_pretrained(new, local_files_only=True), model))
        except Exception as error:  # noqa: BLE001  whatever it raises: it does not load
            wrong.append(f"it does not load: {' '.join(str(error).split())[:200]}")
        if wrong:
            for name in STOCK:
                (new / name).unlink(missing_ok=True)

    save(model_or_result, folder, beside=stock, **options)
    return wrong


def load_pretrained(model_class: Any, folder: str | os.PathLike[str]) -> nn.Module:
    """The model that `save_pretrained` wrote, whatever its widths.

    Args:
        model_class: the class of the model, or one of the ``AutoModel...`` classes. Code that comes with a checkpoint
            is not run.
        folder: what `save_pretrained` wrote.

    Raises:
        StoreError: as for `depgraph.load`.
    """
    from transformers import AutoConfig  # noqa: PLC0415  only who uses it needs it

    def build(config: dict[str, Any]) -> nn.Module:
        config = _without_loaders(config)
        kind = getattr(model_class, "config_class", None)
        if kind is not None:
            return model_class._from_config(kind.from_dict(config))
        known = AutoConfig.for_model(config.pop("model_type", ""), **config)
        return model_class.from_config(known, trust_remote_code=False)

    return load(build, folder)


def generate(
    elastic: Elastic, inputs: torch.Tensor | Mapping[str, Any], *, size: float | None = None, **options: Any
) -> torch.Tensor:
    """The tokens that the whole model generates greedily, of which a small size proposes the next few each time.

    The whole checks all that was proposed in one pass and keeps what it would have said itself, so the tokens are those of
    its own greedy generation. Whether that is faster depends on how often the small size is right: measure it.

    Source: Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", ICML 2023, as
    ``generate(assistant_model=...)`` of transformers does it.

    Args:
        elastic: of a model that generates.
        inputs: token ids [1, length], or what a tokenizer returns.
        size: of the assistant; by default the smallest.
        **options: those of ``generate``, such as ``max_new_tokens``.

    Returns:
        token ids [1, longer].

    Raises:
        InputError: the model does not generate, or not from these inputs; sampling, which would give other tokens.
    """
    of_kind("elastic", elastic, Elastic, "a depgraph.Elastic")
    model: Any = elastic.model
    if not hasattr(model, "generate"):
        raise InputError(f"{type(model).__name__} does not generate")
    if options.get("do_sample"):
        raise InputError("do_sample=True would give other tokens: an assistant is for greedy generation")
    chosen = elastic.sizes[-1] if size is None else size
    assistant = elastic.at(chosen)
    if not all(cut.leads for cut in elastic.plans[chosen].cuts.values()):
        assistant = elastic.extract(chosen)  # what is no view is gathered once, not for each token
    given = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    try:
        with torch.no_grad(), in_mode(assistant, False), in_mode(model, False):
            made: torch.Tensor = model.generate(
                **given, **options, do_sample=False, assistant_model=assistant
            )
            return made
    except ValueError as error:
        raise InputError(f"the model could not generate from these inputs: {error}") from error


def _without_loaders(value: Any) -> Any:
    """A config, or a part of it, without what could choose other code than that of transformers."""
    if isinstance(value, list):
        return [_without_loaders(v) for v in value]
    if not isinstance(value, dict):
        return value
    return {
        k: _without_loaders(v)
        for k, v in value.items()
        if k not in ("auto_map", "custom_pipelines", "name_or_path", "_name_or_path", "_commit_hash")
        and not ("_implementation" in str(k) and v not in IMPLEMENTATIONS)
    }


def from_folder(folder: str | os.PathLike[str]) -> nn.Module:
    """The model in a folder that names its class in ``config.json``; nothing is downloaded, and no code in it is run.

    Raises:
        InputError: the folder names no class of transformers.
        StoreError: it can't be loaded.
    """
    path = a_path("folder", folder)
    kind, config = class_and_config(path)
    try:
        return kind.from_pretrained(path, config=config, local_files_only=True).eval()
    except Exception as error:
        raise StoreError(f"{path} can't be loaded: {type(error).__name__}: {error}") from error


def class_and_config(path: Path) -> tuple[Any, Any]:
    """The class that ``config.json`` in a folder names, and the config; no code in the folder is run.

    Raises:
        InputError: the folder names no class of transformers.
        StoreError: the config can't be read.
    """
    import transformers  # noqa: PLC0415  only who uses it needs it

    try:
        kind = type(
            transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        )
        given, _ = transformers.PreTrainedConfig.get_config_dict(path, local_files_only=True)
        config: Any = kind.from_dict(_without_loaders(given))
        classes = [getattr(transformers, str(n), None) for n in getattr(config, "architectures", None) or ()]
    except Exception as error:
        raise StoreError(f"{path} can't be loaded: {type(error).__name__}: {error}") from error
    found: list[Any] = [
        c for c in classes if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)
    ]
    if not found:
        raise InputError(f"{path}: config.json names no class of transformers (architectures)")
    return found[0], config


def differences(got: nn.Module, wanted: nn.Module) -> list[str]:
    """Where a loaded model is not the one that was saved: tensors, ties, and the numbers that modules hold."""
    problems = []
    (mine, ties), (theirs, other_ties) = named_tensors(got), named_tensors(wanted)
    mine |= {name: held.tensor for name, held in attribute_tensors(got).items()}
    theirs |= {name: held.tensor for name, held in attribute_tensors(wanted).items()}
    for name in {**mine, **theirs}:
        if name not in mine or name not in theirs:
            problems.append(f"{name!r} is only in one of the two")
        elif mine[name].shape != theirs[name].shape:
            problems.append(f"{name!r} gets shape {tuple(mine[name].shape)}, not {tuple(theirs[name].shape)}")
        elif mine[name].is_meta and theirs[name].is_meta:
            continue
        elif mine[name].dtype != theirs[name].dtype or not torch.equal(
            mine[name], theirs[name].to(mine[name].device)
        ):
            problems.append(f"{name!r} gets different values")
    if ties != other_ties:
        problems.append("other tensors are tied")
    loaded = dict(got.named_modules())
    for path, module in wanted.named_modules():
        other = loaded.get(path)
        if numbers_of(module):
            problems.append(
                f"a number in the code of {path or 'the model'!r} was rewritten, which a config cannot express"
            )
        elif other is None or type(other) is not type(module):
            problems.append(f"{path or 'the model'!r} is no {type(module).__name__}")
        if other is None or type(other) is not type(module):
            continue
        numbers, others = _numbers(module), _numbers(other)
        problems += [
            f"{'.'.join(filter(None, (path, name)))} gets {others.get(name)!r}, not {numbers.get(name)!r}"
            for name in numbers.keys() & others.keys()  # from_pretrained and trainers note some of their own
            if numbers[name] != others[name]
        ]
    return problems


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if name not in INTERNALS and type(value) in (int, float, tuple)
    }
