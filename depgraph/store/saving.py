"""Model -> folder: everything is looked at before anything is written."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..base.checks import a_path, function, several, whole_number
from ..base.errors import InputError, StoreError, listed
from ..base.version import __version__
from ..config.origin import built_from
from ..elastic import Elastic
from ..plan.names import fitted, in_new_names
from ..plan.plan import Plan
from ..prune import PruneResult
from ..simplify.result import Simplified
from ..surgery.lineage import plans_of
from ..tracing.attributes import held_at, holders, put
from ..tracing.tensors import attribute_tensors, named_tensors, on_one_memory, unwrapped
from .document import FILE_NAME, Document, Size, in_words
from .folders import replacing
from .weights import MODEL, NAMES, OTHER, checksum, write

Tensor = torch.Tensor
SHARD_BYTES = 5_000_000_000


def save(
    model_or_result: nn.Module | PruneResult | Simplified | Elastic,
    folder: str | os.PathLike[str],
    *,
    plans: Sequence[Plan] | Plan | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    beside: Callable[[Path], Any] | None = None,
) -> Path:
    """Write a smaller model into a folder: ``plan.json`` and safetensors, no pickle.

    ``model.safetensors`` has what the ``state_dict`` has, each tied tensor once; ``other.safetensors`` buffers and tables
    that it leaves out. A folder that was saved before is replaced as a whole at the end. Of an `Elastic` the whole model is
    written, once, and beside it the plan of each size and the buffers in which it differs.

    Args:
        model_or_result: what `prune`, `apply` or `load` returned, or an `Elastic`; trained further, cast or moved as you like.
        folder: where to write; made if it is missing. Files of others in a saved folder are kept.
        plans: what made the model of the original, in order, where it is a copy that depgraph has not seen.
        max_shard_bytes: weights that are larger are written into several files with an index.
        beside: called with the new folder before it takes its place, to write more into it (a tokenizer, a config).

    Returns:
        the folder.

    Raises:
        InputError: the plans of this model are not known, or `folder` is not a path.
        StoreError: all that can't be stored, or why the folder, which is as it was, can't be written.
    """
    if beside is not None:
        function("beside", beside, "folder")
    model, made_by = _model_and_plans(model_or_result, plans)
    whole_number("max_shard_bytes", max_shard_bytes, 1)
    path = a_path("folder", folder)
    document, persistent, others = described(model, made_by)
    if isinstance(model_or_result, Elastic):
        others |= _sizes(model_or_result, document, {**persistent, **others})
    try:
        with replacing(path, FILE_NAME) as new:
            document.tensors = write(persistent, new, MODEL, max_shard_bytes)
            document.tensors |= write(others, new, OTHER, max_shard_bytes)
            (new / FILE_NAME).write_text(document.to_text(), encoding="utf-8")
            if beside is not None:
                beside(new)
    except (SafetensorError, UnicodeError) as error:
        raise StoreError(f"{path} can't be written: {error}") from error
    return path


def _model_and_plans(given: Any, plans: Sequence[Plan] | Plan | None) -> tuple[nn.Module, tuple[Plan, ...]]:
    if isinstance(given, Elastic):
        if plans is not None:
            raise InputError("an Elastic knows its plans: leave plans away")
        return given.model, (*given.before, given.order)
    model = given.model if isinstance(given, (PruneResult, Simplified)) else given
    if not isinstance(model, nn.Module):
        raise InputError(f"save takes a model or what prune returned, not {type(model).__name__}")
    if plans is not None:
        given_plans = [plans] if isinstance(plans, Plan) else plans
        return model, tuple(several("plans", given_plans, Plan, "depgraph.Plans"))
    if plans_of(model):
        return model, plans_of(model)
    if isinstance(given, (PruneResult, Simplified)):
        return model, (*given.before, given.plan)
    raise InputError(
        "the plans of this model are not known: it was not returned by prune, apply or load, or is a copy\n"
        "  fix: save the PruneResult, or pass plans=[result.plan]"
    )


def _sizes(elastic: Elastic, document: Document, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Note the sizes of `elastic`, and return what they have of their own, by the names that the folder has for it."""
    stored: dict[str, Tensor] = {}
    for size, plan in elastic.plans.items():
        if size == 1:
            continue
        buffers = elastic.own_buffers(size)
        own = {name: f"sizes.{size!r}.{name}" for name in buffers if name in tensors}
        stored |= {own[name]: buffers[name] for name in own}
        moves = plan.moves
        left = {n: t for n, t in tensors.items() if n not in own and not moves.holds(n)}
        sums = {n: checksum(t, plan.cuts.get(n)) for n, t in left.items()}
        document.sizes.append(Size(size, plan, sums, own))
    return stored


def described(
    model: nn.Module, plans: Sequence[Plan], values_elsewhere: bool = False
) -> tuple[Document, dict[str, Tensor], dict[str, Tensor]]:
    """What plan.json will say, but for its tensors; those that a state_dict has, and the others.

    With `values_elsewhere` tensors on the meta device are in order.

    A `StoreError` lists everything that can't be stored.
    """
    model = unwrapped(model)
    named, ties = named_tensors(model)
    held = {
        name: found
        for name, found in attribute_tensors(model).items()
        if all(isinstance(k, (str, int)) for _, keys in found.places for k in keys)
    }
    plans = [fitted(plan, model) for plan in plans]
    problems = _differences(named, ties, plans, held)
    problems += [
        "the request in a plan can't be written as JSON" for p in plans if _through_json(p.request) is None
    ]
    views = on_one_memory(named)
    tensors = {n: t for n, t in named.items() if n not in views} | {n: h.tensor for n, h in held.items()}
    kept = {n: t for n, t in tensors.items() if not (values_elsewhere and t.is_meta)}
    problems += [p for name, tensor in kept.items() for p in _unfit(name, tensor)]
    document = Document(
        plans=plans,
        ties=ties,
        views=views,
        attribute_tensors={name: found.places for name, found in held.items()},
        frozen=[n for n, p in model.named_parameters() if not p.requires_grad],
        training=([""] if model.training else [])
        + [p for p, m in model.named_modules() if p and m.training != model.training],
        extra_state=_extra_state(model, problems),
        config=_config(model, plans),
        provenance=_provenance(model),
    )
    if problems:
        raise StoreError(listed("this model can't be saved:", problems))
    left_out = _not_persistent(model) | held.keys()
    return (
        document,
        {n: t for n, t in tensors.items() if n not in left_out},
        {n: t for n, t in tensors.items() if n in left_out},
    )


def _differences(
    named: Mapping[str, Tensor], ties: dict[str, str], plans: Sequence[Plan], held: Mapping[str, Any]
) -> list[str]:
    """Where the model is not what its last plan makes."""
    if not plans:
        return []
    last = in_new_names(plans[-1])
    left = {n: last.new_shape(n) for n in last.shapes if not last.drops(n)} | last.added()
    problems = [f"{n!r} is not in its plan" for n in named.keys() - left.keys()]
    problems += [f"{n!r} of its plan is not in it" for n in left.keys() - named.keys() - held.keys()]
    problems += [
        f"{n!r} has shape {tuple(t.shape)}, its plan makes {left[n]}"
        for n, t in named.items()
        if n in left and tuple(t.shape) != left[n]
    ]
    return sorted(problems) + (
        ["it ties other tensors than its plan"]
        if ties != {n: f for n, f in last.aliases.items() if not last.drops(n)}
        else []
    )


def _unfit(name: str, tensor: Tensor) -> list[str]:
    if tensor.is_meta:
        return [f"{name!r} is on the meta device: it has no values"]
    if tensor.layout is not torch.strided:
        return [f"{name!r} is {tensor.layout}"]
    if type(tensor) is not Tensor and not isinstance(tensor, (nn.Parameter, nn.Buffer)):
        return [f"{name!r} is a {type(tensor).__name__}, a subclass whose state may be more than its values"]
    return [] if tensor.dtype in NAMES else [f"{name!r} is {tensor.dtype}"]


def _not_persistent(model: nn.Module) -> set[str]:
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }


def _extra_state(model: nn.Module, problems: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if getattr(type(module), "get_extra_state", None) is nn.Module.get_extra_state:
            continue
        state = module.get_extra_state()
        found[path] = _through_json(state)
        if state is not None and (found[path] is None or found[path] != state):
            problems.append(
                f"the extra state of {path or 'the model'!r} can't be written as JSON: {state!r:.80}"
            )
    return found


def _through_json(value: Any) -> Any:
    """What JSON gives back for `value`; None where it can't hold it."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return None


def _config(model: nn.Module, plans: Iterable[Plan]) -> dict[str, Any] | None:
    """What the model was built from, as it was before the plans changed it; None where it keeps no such object."""
    objects = built_from(model)
    if len(objects) != 1:
        return None
    (name, given), *_ = objects.items()
    held: dict[str, Any] = {name: copy.deepcopy(given)}
    for plan in reversed(list(plans)):
        for repair in reversed(plan.repairs):
            same = held_at(model, (repair.path, repair.name)) is given and repair.keys
            if same and repair.old is not None and _read(held[name], repair.keys) is not None:
                put(held, [name, *repair.keys], repair.old)
        _put_back(model, plan, given, held, name)
    as_dict = getattr(held[name], "to_dict", None)
    if as_dict is not None:
        said = as_dict()
    elif dataclasses.is_dataclass(held[name]):
        said = dataclasses.asdict(held[name])
    else:
        return None
    found = _through_json(in_words(said))  # keys become text, as they do in any JSON of it
    return found if isinstance(found, dict) else None


def _read(holder: Any, keys: Sequence[Any]) -> Any:
    try:
        for key in keys:
            holder = holder[key] if isinstance(holder, tuple) else holders(holder, key)[0][key]
    except (LookupError, TypeError):
        return None
    return holder


def _put_back(model: nn.Module, plan: Plan, given: Any, held: dict[str, Any], name: str) -> None:
    """Put the entries that went with removed children back into the lists of what the model was built from."""
    lost = [(at, int(r.path.rpartition(".")[2]), entry) for r in plan.removals for at, entry in r.entries]
    for at, child, entry in sorted(lost, key=lambda row: row[1]):
        path, attribute, *keys = at
        if held_at(model, (path, attribute)) is given:
            found = _read(held[name], keys)
            if isinstance(found, (list, tuple)):
                put(held, [name, *keys], type(found)([*found[:child], entry, *found[child:]]))


def _provenance(model: nn.Module) -> dict[str, Any]:
    kind = type(model)
    return {
        "depgraph": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "saved": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
