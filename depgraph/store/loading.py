"""Folder -> model: the original from its owner's code, the plans, the weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..base.checks import a_path, is_number, shown
from ..base.errors import DepgraphError, InputError, StoreError, listed
from ..base.values import is_plain_object
from ..elastic import Elastic
from ..plan.plan import Plan
from ..surgery.apply import apply, assign, recompute
from ..tracing.attributes import INTERNALS, holders, put
from ..tracing.tensors import named_tensors
from ..tracing.wrappers import inner_name, is_distributed, plain_names
from .document import Document, from_words, open_folder
from .factory import build, left_on_meta, resolved, takes_config
from .weights import Entry, read

Tensor = torch.Tensor


class _OtherModel(StoreError, InputError):
    """The folder is of another model than the factory builds: which of the two is wrong only the caller knows."""


def load(
    factory: Callable[..., nn.Module] | str,
    folder: str | os.PathLike[str] | None = None,
    *,
    size: float | None = None,
) -> nn.Module:
    """The model that `save` wrote into `folder`.

    The original is built by `factory` on the meta device, where that gives the same model; what was removed is removed
    from it, and the saved weights take the place of its own. Nothing in the folder is executed, imported or unpickled.

    Args:
        factory: builds the original, with any weights. A function without arguments; one with a single argument is given
            the config that was saved beside the model, as a dict. ``"package.module:function"`` is imported.
        folder: what `save` wrote.
        size: of a folder with an `Elastic`: this size alone, of which alone bytes are read. By default all of it.

    Returns:
        The model, or the `Elastic`: its class, modes, ties and dtypes as they were, on the CPU or where the factory puts it.

    Raises:
        StoreError: all that is wrong: the folder is damaged or not what `save` wrote, or the factory builds another model.
        InputError: `factory` is not a function, or `folder` no path.
    """
    if folder is None and isinstance(factory, (str, os.PathLike)) and os.path.isdir(factory):
        raise InputError(
            "folder must be a path, not None: it holds weights and plans, no code, so give what builds the original, too\n"
            "  fix: load(make_model, folder)"
        )
    make, path = resolved(factory), a_path("folder", folder)
    document = open_folder(path)
    sizes = [1.0, *(s.size for s in document.sizes)] if document.sizes else []
    if size is not None and not (is_number(size) and size in sizes):
        there = f"the sizes {', '.join(f'{s:g}' for s in sizes)}" if sizes else "one size: leave size away"
        raise InputError(f"{path} has no size {shown(size)}, but {there}")
    everything = document
    document = document.whole() if size in (None, 1) else document.at(float(size or 1))
    if takes_config(make):
        if document.config is None:
            raise StoreError(f"the factory takes a config, and none was saved in {path}")
        config, inner = document.config, make

        def make() -> nn.Module:
            return inner(from_words(config))

    loader = _Loader(make, path, document)
    try:
        prepared = loader.prepare("meta")
    except StoreError:  # code that builds a model may need its values, and so may a forward that is recorded
        if loader.built and not any(plan.rewrites for plan in document.plans):
            raise  # a real build would have the same shapes
        prepared = loader.prepare("cpu")
    small = loader.filled(prepared)
    if small is None:
        small = loader.filled(loader.prepare("cpu"))
    if small is None:
        raise StoreError(
            listed(f"{path} can't be loaded: the factory's model has no values for", loader.left)
            + "\n  fix: build these outside torch.device('meta')"
        )
    return small if size is not None or not document.sizes else _elastic(small, path, everything)


def _elastic(whole: nn.Module, folder: Path, document: Document) -> Elastic:
    """The model of all sizes, whose largest is `whole`."""
    problems: list[str] = []
    names = [stored for size in document.sizes for stored in size.own.values()]
    values = read(folder, {n: document.tensors[n] for n in names}, problems)
    if problems:
        raise StoreError(listed(f"{folder} can't be loaded:", problems))
    plans = {size.size: size.plan for size in document.sizes}
    own = {size.size: {n: values[stored] for n, stored in size.own.items()} for size in document.sizes}
    return Elastic.restored(whole, document.plans, plans, own)


def load_plans(folder: str | os.PathLike[str]) -> list[Plan]:
    """The plans in a folder that `save` wrote, in the order in which they are applied; they replay on any such original.

    Args:
        folder: where it is.

    Raises:
        StoreError: the folder is damaged, or not what `save` wrote.
        InputError: `folder` is not a path.
    """
    return open_folder(a_path("folder", folder)).plans


class _Loader:
    def __init__(self, make: Callable[[], nn.Module], folder: Path, document: Document) -> None:
        self.make, self.folder, self.document = make, folder, document
        self.left: list[str] = []
        self.built = False  # the factory has returned a model

    def prepare(self, device: str) -> nn.Module:
        """The smaller model without its values, built on `device`; all that the folder has fits into it."""
        title = f"{self.folder} does not fit the model that the factory builds:"
        model, ours = build(self.make, device)
        self.built = True
        if any(is_distributed(module) for module in model.modules()):
            raise StoreError(
                "the factory returns a DistributedDataParallel, which reduces the gradients of the parameters it was created "
                "with\n  fix: let it return the module, and wrap what load returns"
            )
        try:
            for plan in self.document.plans:
                model, ours = apply(model, plan, inplace=ours), True
        except DepgraphError as error:
            raise _OtherModel(f"{title}\n{error}") from error
        problems = self.differences(*_named(model)) + self.misplaced(model)
        missing = {*self.document.training, *self.document.extra_state} - _paths(model).keys()
        problems += [f"module {path!r:.60} is not in the model" for path in missing]
        if problems:
            raise _OtherModel(listed(title, problems))
        return model

    def filled(self, model: nn.Module) -> nn.Module | None:
        """The model with its tensors, modes and states; None where something in it has no values even then."""
        tensors, (named, _), frozen = self.values, _named(model), set(self.document.frozen)
        paths = _paths(model)
        assign(model, named, {n: _like(named[n], tensors[n], n not in frozen) for n in named})
        for name, places in self.document.attribute_tensors.items():
            for place, keys in places:
                if (setter := _setter(model, paths[place], keys)) is not None:
                    setter(tensors[name])
        self.left = left_on_meta(model)
        if self.left:
            return None
        recompute(model)
        self.set_states(model)
        return model

    def differences(self, named: dict[str, Tensor], ties: dict[str, str]) -> list[str]:
        """Where the model has other parameters and buffers than the folder."""
        document = self.document
        entries = {n: e for n, e in document.tensors.items() if n not in document.attribute_tensors}
        entries |= {n: document.tensors[first] for n, first in document.views.items()}
        problems = [f"{n!r:.80} is in the folder, not in the model" for n in entries.keys() - named.keys()]
        problems += [f"{n!r:.80} is in the model, not in the folder" for n in named.keys() - entries.keys()]
        for name in named.keys() & entries.keys():
            problems += _unlike(name, named[name], entries[name])
        if ties != document.ties:
            problems.append("the model ties other tensors than the folder")
        return sorted(problems)

    def misplaced(self, model: nn.Module) -> list[str]:
        """The attribute tensors of the folder that the model has no place for."""
        paths = _paths(model)
        return [
            f"{name!r:.80}: the model has no attribute {'.'.join(map(str, (place, *keys))):.80}"
            for name, places in self.document.attribute_tensors.items()
            for place, keys in places
            if place not in paths or _setter(model, paths[place], keys) is None
        ]

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """The tensors of the folder."""
        problems: list[str] = []
        tensors = read(self.folder, self.document.tensors, problems)
        if problems:
            raise StoreError(listed(f"{self.folder} can't be loaded:", problems))
        return tensors | {n: tensors[first] for n, first in self.document.views.items()}

    def set_states(self, model: nn.Module) -> None:
        training = "" in self.document.training
        other = {path for path in self.document.training if path}
        plain = plain_names(model)
        for name, module in model.named_modules():
            path = plain(name)
            module.training = training != (path in other)
            if path in self.document.extra_state and inner_name(module) is None:
                try:
                    module.set_extra_state(deepcopy(self.document.extra_state[path]))
                except Exception as error:
                    raise StoreError(f"{path or 'the model'} refuses its extra state: {error}") from error


def _named(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and buffers, and ties between them, in the names without wrappers."""
    (tensors, ties), plain = named_tensors(model), plain_names(model)
    return {plain(n): t for n, t in tensors.items()}, {plain(n): plain(first) for n, first in ties.items()}


def _paths(model: nn.Module) -> dict[str, str]:
    """The path of each module without wrappers -> its path."""
    plain = plain_names(model)
    return {
        plain(path): path
        for path, module in model.named_modules(remove_duplicate=False)
        if inner_name(module) is None
    }


def _unlike(name: str, tensor: Tensor, entry: Entry) -> list[str]:
    if is_lazy(tensor):
        return [f"{name!r} has no shape in the model yet: the factory must call it once"]
    problems = []
    if tuple(tensor.shape) != entry.shape:
        problems.append(f"{name!r} has shape {entry.shape} in the folder, {tuple(tensor.shape)} in the model")
    if tensor.dtype != entry.dtype and _kind(tensor.dtype) != _kind(entry.dtype):
        problems.append(f"{name!r} is {entry.dtype} in the folder, {tensor.dtype} in the model")
    return problems


def _kind(dtype: torch.dtype) -> Any:
    """Floats of every width may stand for each other: a model is built in one and saved in another."""
    return "complex" if dtype.is_complex else "float" if dtype.is_floating_point else dtype


def _like(old: Tensor, value: Tensor, trainable: bool) -> Tensor:
    """`value` as what `old` is: a parameter or a buffer, on its device."""
    value = value if old.is_meta else value.to(old.device)
    if not isinstance(old, nn.Parameter):
        return value
    new = nn.Parameter(value, requires_grad=trainable and (value.is_floating_point() or value.is_complex()))
    vars(new).update(vars(old))
    return new


def _setter(model: nn.Module, path: str, keys: tuple[Any, ...]) -> Callable[[Tensor], Any] | None:
    """What puts a tensor at `keys` from the attributes of a module on; None where there is no place for it.

    A place is where the model has a tensor, a number or nothing yet (None); lists may grow by one, and dicts, as caches do.
    """
    try:
        own = vars(model.get_submodule(path))
    except AttributeError:
        return None
    if keys[0] in INTERNALS or keys[0] not in own:
        return None
    value: Any = own
    for key in keys[:-1]:
        try:
            value = value[key] if isinstance(value, tuple) else holders(value, key)[0][key]
        except (LookupError, TypeError):
            return None
        if not (type(value) in (list, tuple, dict) or is_plain_object(value)):
            return None
    last, there = keys[-1], None
    if isinstance(value, (tuple, list)):
        if last not in range(len(value) + (type(value) is list)):
            return None
        there = value[last] if last < len(value) else None
    else:
        table = value if type(value) is dict else vars(value)
        if table is not value and last not in table:
            return None
        there = table.get(last)
    if not (there is None or isinstance(there, Tensor) or type(there) in (int, float)):
        return None
    if isinstance(value, tuple):
        return lambda t: put(own, list(keys), t)
    if isinstance(value, list):
        return lambda t: value.__setitem__(slice(last, last + 1), [t])
    return lambda t: table.__setitem__(last, t)
