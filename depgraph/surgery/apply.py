"""Plan, model -> smaller model: slice tensors, repair the sizes that modules remember, change numbers in code."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..base.checks import a_module, flag, of_kind
from ..base.errors import PlanError, listed
from ..plan.names import fitted
from ..plan.plan import Cut, Plan, Repair
from ..tracing.attributes import INTERNALS, holders, put
from ..tracing.copying import leads_to
from ..tracing.fakes import Shapes
from ..tracing.tensors import attribute_tensors, hooks_of_weights, named_tensors, on_one_memory, skeleton
from ..tracing.wrappers import check_changeable, wrapped
from . import biases, factors, fold
from .lineage import note
from .remove import misfits, put_stand_ins, take_out
from .rewrite import misfit, rewrite
from .zeros import entries_of, keep_zeros, merged, zeroed

# Sizes that modules of torch repeat without using them in forward: attribute -> (tensor, dim).
TABLE: dict[type[nn.Module], dict[str, tuple[str, int]]] = {
    nn.Linear: {"in_features": ("weight", 1), "out_features": ("weight", 0)},
    nn.Embedding: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.EmbeddingBag: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.modules.batchnorm._NormBase: {"num_features": ("weight", 0)},
    nn.GroupNorm: {"num_channels": ("weight", 0)},
    nn.PReLU: {"num_parameters": ("weight", 0)},
    nn.Bilinear: {
        "in1_features": ("weight", 1),
        "in2_features": ("weight", 2),
        "out_features": ("weight", 0),
    },
    nn.RNNCellBase: {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)},
    nn.RNNBase: {"input_size": ("weight_ih_l0", 1)},
}
CONVOLUTION = {
    "in_channels": 1,
    "out_channels": 0,
}  # of what is neither grouped nor transposed, in its weight
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of dims


@torch.inference_mode(False)
def apply(model: nn.Module, plan: Plan, *, inplace: bool = False) -> nn.Module:
    """Make `model` as small as `plan` says.

    Args:
        model: a model with the shapes that the plan was made for; any weights, any device, also meta.
        plan: what stays; also one for the same model in other wrappers (data parallel, compiled), or in none.
        inplace: change `model` itself, instead of a copy.

    Returns:
        The smaller model: of the same class, with parameters that require grad, are tied, and live where they did.
        Where the plan rewrites a number in code, that submodule has a class of its own, below the one it had.

    Raises:
        PlanError: the plan does not fit this model; every difference is listed. Nothing was changed.
    """
    a_module("model", model)
    of_kind("plan", plan, Plan, "a depgraph.Plan")
    flag("inplace", inplace)
    plan, attributes = fitted(plan, model), attribute_tensors(model)
    moves = plan.moves
    tensors = {**named_tensors(model)[0], **{name: h.tensor for name, h in attributes.items()}}
    one = on_one_memory({name: t for name, t in tensors.items() if name not in attributes})
    _check(model, plan, tensors, tensors.keys() - attributes.keys(), one)
    if inplace:  # what fails must fail before anything changes
        check_changeable(model)
        _check_reached(model, {id(tensors[name]) for name in {**plan.cuts, **plan.entries}})
        apply(skeleton(model, {id(t): _without_values(t) for t in tensors.values()}), plan)
    new = {name: _new(tensors[name], plan, name) for name in {**plan.cuts, **plan.entries}}
    entries = merged(entries_of(model), plan)
    if inplace:
        small = model
        assign(model, tensors, new)
        for name in new.keys() & attributes.keys():
            for path, keys in attributes[name].places:
                put(vars(model.get_submodule(path)), list(keys), new[name])
    else:
        gone = {
            id(t): t for name, t in tensors.items() if plan.removals and moves.holds(name)
        }  # not worth a copy
        small = skeleton(model, {**gone, **{id(tensors[name]): tensor for name, tensor in new.items()}})
    made = named_tensors(small)[0]
    for name, first in one.items():
        made[name].data = made[first].data
    for repair in plan.repairs:
        _repair(small, repair)
    for path in dict.fromkeys(r.path for r in plan.rewrites):
        rewrite(small.get_submodule(path), [r for r in plan.rewrites if r.path == path])
    for fusion in plan.fusions:
        fold.fold(small, fusion)
    for moved in plan.scales:
        fold.move(small, moved)
    for factor in plan.factors:
        factors.replace(small, factor)
    for bias in plan.biases:
        biases.add(small, bias)
    put_stand_ins(small, plan.removals)
    take_out(small, plan.removals)
    with Shapes() if any(t.is_meta for t in small.parameters()) else nullcontext():
        recompute(small)
        _repair_standard(small)
    if entries:
        keep_zeros(small, {moves.new(name): bits for name, bits in entries.items() if not moves.holds(name)})
    small = wrapped(small)
    note(model, small, plan)
    return small


def repeated_size(module: nn.Module, attribute: str) -> tuple[str, int] | None:
    """The tensor, and which dim of it, whose size `attribute` of a module of torch repeats; None of any other."""
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1 or attribute not in CONVOLUTION:
            return None
        return "weight", CONVOLUTION[attribute] if not module.transposed else 1 - CONVOLUTION[attribute]
    for kind, rows in TABLE.items():
        if isinstance(module, kind) and attribute in rows:
            return rows[attribute]
    return None


def follows_weight(module: nn.Module, attribute: str) -> bool:
    """Whether `apply` itself sets `attribute` of a module of torch to the size of its tensor."""
    if isinstance(module, nn.modules.conv._ConvNd) and attribute in CONVOLUTION:
        return True
    return any(isinstance(module, kind) and attribute in rows for kind, rows in TABLE.items())


def _check(
    model: nn.Module,
    plan: Plan,
    tensors: dict[str, torch.Tensor],
    registered: set[str],
    one: dict[str, str],
) -> None:
    wrong = [
        f"{name!r} has the memory of {first!r} in this model, and the plan cuts them differently"
        for name, first in one.items()
        if not _alike(plan.cuts.get(name), plan.cuts.get(first))
    ]
    for name, shape in plan.shapes.items():
        if name not in tensors:
            wrong.append(f"{name!r} of the plan is not in this model")
        elif is_lazy(tensors[name]):
            wrong.append(f"{name!r} has no shape yet: call the model once")
        elif tuple(tensors[name].shape) != shape:
            wrong.append(f"{name!r} has shape {tuple(tensors[name].shape)}, the plan is for {shape}")
    wrong += misfits(model, plan.removals)
    unknown = registered - plan.shapes.keys()
    wrong += [f"{name!r} of this model is not in the plan" for name in tensors if name in unknown]
    numbers: dict[tuple[int, Any], Any] = {}
    for repair in plan.repairs:
        where = ".".join(map(str, (*filter(None, [repair.path]), repair.name, *repair.keys)))
        place = held_in(_module(model, repair.path), [repair.name, *repair.keys])
        number = None if place is None else numbers.get((id(place[0]), place[1]), place[2])
        if place is None or type(number) is not int:
            wrong.append(f"{where!r}, which the plan sets, is not a number in this model")
            continue
        if repair.old is not None and number not in (repair.old, repair.value):
            wrong.append(f"{where!r} is {number}, the plan is for {repair.old}")
        numbers[id(place[0]), place[1]] = repair.value
    wrong += [
        f"module {path!r}, whose code the plan changes, is not in this model"
        for path in dict.fromkeys(r.path for r in plan.rewrites)
        if _module(model, path) is None
    ]
    wrong += [
        problem
        for edit in plan.rewrites
        if (module := _module(model, edit.path)) is not None and (problem := misfit(module, edit))
    ]
    wrong += [problem for fusion in plan.fusions if (problem := fold.misfit(model, fusion))]
    wrong += [problem for moved in plan.scales if (problem := fold.misfit_scale(model, moved))]
    wrong += [problem for factor in plan.factors if (problem := factors.misfit(model, factor))]
    there = [
        bias for bias in plan.biases if bias.weight in tensors
    ]  # of a weight that is not the shapes tell
    wrong += [problem for bias in there if (problem := biases.misfit(model, bias))]
    if wrong:
        raise PlanError(
            listed("this plan does not fit this model:", wrong)
            + "\n  fix: apply it to the model that it was made for, with any weights, or make a plan for this one"
        )


def _alike(one: Cut | None, other: Cut | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one.mask(), other.mask())


def _check_reached(model: nn.Module, cut: set[int]) -> None:
    """Refuse to change a model in place whose functions hold tensors that would be replaced."""
    found = [
        f"{'.'.join(filter(None, (path, name)))} holds a tensor that the plan cuts"
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        for function in (value.values() if type(value) is OrderedDict else (value,))
        if isinstance(function, (types.FunctionType, types.MethodType, functools.partial))
        and leads_to(function, cut)
    ]
    if found:
        raise PlanError(
            listed("this model can't be changed in place:", found)
            + "\n  fix: let these functions read the tensor from the module, or leave inplace=True away"
        )


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def held_in(module: nn.Module | None, steps: list[Any]) -> tuple[Any, Any, Any] | None:
    """What holds the number at `steps` from the attributes of `module` on, under which key, and the number."""
    if module is None or steps[0] in INTERNALS:
        return None
    holder: Any = None
    value: Any = vars(module)
    for step in steps:
        holder = value
        try:
            value = holder[step] if isinstance(holder, tuple) else holders(holder, step)[0][step]
        except (LookupError, TypeError):
            return None
    return holder, steps[-1], value


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    data = tensor.detach().to("meta")
    return nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data


def _new(tensor: torch.Tensor, plan: Plan, name: str) -> torch.Tensor:
    cut, kept = plan.cuts.get(name), zeroed(tensor.detach(), plan.entries.get(name))
    data = kept if cut is None else cut.slice(kept)
    if not data.is_meta:
        if data.data_ptr() == tensor.data_ptr() and data.numel():
            data = data.clone()
        layout = LAYOUTS.get(tensor.dim())
        if layout is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout):
            data = data.contiguous(memory_format=layout)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data.requires_grad_(tensor.requires_grad)


def assign(model: nn.Module, tensors: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> None:
    """Put `new` tensors in place of the old ones, wherever a module registers or lists them."""
    swap = {id(tensors[name]): tensor for name, tensor in new.items()}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None and id(tensor) in swap:
                    table[key] = swap[id(tensor)]  # type: ignore[assignment]
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                vars(module)[name] = swap.get(id(value), value)
            elif isinstance(value, list) and any(
                isinstance(v, torch.Tensor) and id(v) in swap for v in value
            ):
                vars(module)[name] = [swap.get(id(v), v) for v in value]


def _repair(model: nn.Module, repair: Repair) -> None:
    """Set one number; a tuple on the way is rebuilt."""
    holder: Any = vars(model.get_submodule(repair.path))
    steps = [repair.name, *repair.keys]
    put(holder, steps, repair.value)


def recompute(model: nn.Module) -> None:
    """Make the weights anew that hooks of ``torch.nn.utils`` (weight_norm, prune ...) keep as plain attributes.

    Without a history, so that the model can be copied; in eval mode, so that no power iteration runs.
    """
    for module in model.modules():
        for hook in hooks_of_weights(module):
            training, module.training = module.training, False
            with torch.no_grad():
                hook(module, ())
            module.training = training


def _readable(module: nn.Module) -> Any:
    """`module`, or where reading a weight computes it and may move its buffers (spectral norm), a copy in eval mode."""
    if not parametrize.is_parametrized(module):
        return module
    return skeleton(module, {id(t): t for t in module.parameters()}).eval()


def _repair_standard(model: nn.Module) -> None:
    kinds = (*TABLE, nn.modules.conv._ConvNd)
    for module in model.modules():
        if not isinstance(module, kinds):
            continue
        with torch.no_grad():
            read = _readable(module)
        for kind, rows in TABLE.items():
            if isinstance(module, kind):
                for attribute, (tensor, dim) in rows.items():
                    value = getattr(read, tensor, None)
                    if isinstance(value, torch.Tensor) and value.dim() > dim and hasattr(module, attribute):
                        _set(module, attribute, value.shape[dim])
        if isinstance(module, nn.modules.conv._ConvNd):
            first, second = read.weight.shape[:2]
            a, b = (
                (second * module.groups, first) if not module.transposed else (first, second * module.groups)
            )
            _set(module, "in_channels", a)
            _set(module, "out_channels", b)
        elif isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            _set(module, "num_features", module.running_mean.shape[0])


def _set(module: nn.Module, attribute: str, value: int) -> None:
    if getattr(module, attribute) != value:
        setattr(module, attribute, value)
