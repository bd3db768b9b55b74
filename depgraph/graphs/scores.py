"""One score for each edge: the lowest go."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from ..base.errors import InputError
from ..base.running import in_mode
from ..base.switches import same_random_state
from .data import ONE, Kind, edges_of, nodes_of

Tensor = torch.Tensor
CRITERIA = ("agreement", "gradient", "degree", "random")
SEED = 0


def _arguments(model: nn.Module, data: Any) -> dict[str, Any] | None:
    """The arguments of forward that the data have by name; None where it takes the data themselves."""
    parameters = [
        p
        for p in signature(model.forward).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    names = [p.name for p in parameters]
    if "edge_index" not in names and "edge_index_dict" not in names:
        return None
    found = {}
    for p in parameters:
        value = getattr(data, p.name, None)
        if value is not None:
            found[p.name] = value
        elif p.default is Parameter.empty:
            raise InputError(f"forward needs {p.name!r}, which the data do not have")
    return found


def run_on(model: nn.Module, data: Any, **given: Any) -> Any:
    """What the model gives for the data."""
    arguments = _arguments(model, data)
    try:
        return model(data) if arguments is None else model(**{**arguments, **given})
    except Exception as error:
        raise InputError(
            f"the model could not be run on the data: {type(error).__name__}: {error}"
        ) from error


def scores_of(
    model: nn.Module, data: Any, by: Any, loss: Any, kinds: list[Kind]
) -> dict[Kind, npt.NDArray[np.float64]]:
    """One score for each edge."""
    if not isinstance(by, str):
        return _own(by(data), data, kinds)
    if by == "random":
        dice = np.random.default_rng(SEED)
        return {k: dice.random(edges_of(data, k).shape[1]) for k in kinds}
    if by == "degree":
        return {k: _by_degree(data, k) for k in kinds}
    with same_random_state(), in_mode(model, False):
        if by == "gradient":
            return {ONE: _by_gradient(model, data, loss, kinds)}
        with torch.no_grad():
            output = run_on(model, data)
    return {k: _agreement(output, data, k) for k in kinds}


def _own(given: Any, data: Any, kinds: list[Kind]) -> dict[Kind, npt.NDArray[np.float64]]:
    found = {}
    for kind in kinds:
        value = given if kind == ONE else given.get(kind) if isinstance(given, Mapping) else None
        count = edges_of(data, kind).shape[1]
        scores = (
            np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=float)
            if value is not None
            else np.empty(0)
        )
        if scores.shape != (count,) or np.isnan(scores).any():
            raise InputError(
                f"by must return {count} numbers, one for each edge{'' if kind == ONE else ' ' + ' '.join(kind)}"
            )
        found[kind] = scores
    return found


def _by_degree(data: Any, kind: Kind) -> npt.NDArray[np.float64]:
    source, target = edges_of(data, kind).cpu().numpy()
    first, second = nodes_of(data, kind)
    out, into = np.bincount(source, minlength=first), np.bincount(target, minlength=second)
    if kind[0] == kind[2]:
        out = into = out + into
    return np.asarray(1 / np.sqrt(out[source] * into[target]))


def _agreement(output: Any, data: Any, kind: Kind) -> npt.NDArray[np.float64]:
    ends = []
    for name, count in zip((kind[0], kind[2]), nodes_of(data, kind), strict=True):
        found = output if kind == ONE else output.get(name) if isinstance(output, Mapping) else None
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != count:
            raise InputError(
                'by="agreement" needs an output [nodes, classes] for both ends of each edge'
                + (f", and {name!r} has none" if name else "")
                + '\n  fix: choose by="degree" or by="random", or a function of the data'
            )
        ends.append(found.double().softmax(-1))
    source, target = edges_of(data, kind)
    return np.asarray((ends[0][source] * ends[1][target]).sqrt().sum(-1).cpu())


def _by_gradient(model: nn.Module, data: Any, loss: Any, kinds: list[Kind]) -> npt.NDArray[np.float64]:
    arguments = _arguments(model, data)
    takes = signature(model.forward).parameters
    if kinds != [ONE] or arguments is None or "edge_weight" not in takes:
        raise InputError(
            'by="gradient" needs a forward(x, edge_index, edge_weight, ...): gradients are taken of the weights of edges\n'
            '  fix: choose by="agreement", or a function of the data'
        )
    given = arguments.get("edge_weight")
    real = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    edges = data.edge_index
    weight = torch.ones(edges.shape[1], dtype=real, device=edges.device) if given is None else given
    weight = weight.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = _loss(run_on(model, data, edge_weight=weight), data, loss)
        (gradient,) = torch.autograd.grad(value, weight, allow_unused=True)
    if gradient is None:
        raise InputError('the loss does not depend on edge_weight: choose by="agreement"')
    score = (gradient * weight.detach()).abs()
    return np.asarray(score.reshape(len(score), -1).sum(1).double().cpu())


def _loss(output: Any, data: Any, loss: Any) -> Tensor:
    if loss is not None:
        return torch.as_tensor(loss(output, data))
    if not isinstance(output, Tensor):
        raise InputError("the model returns more than one tensor: give loss(output, data)")
    labels, chosen = getattr(data, "y", None), getattr(data, "train_mask", None)
    if isinstance(labels, Tensor) and labels.shape == output.shape[:1] and not labels.is_floating_point():
        some = slice(None) if chosen is None else chosen
        return F.cross_entropy(output[some], labels[some])
    return output.square().mean() / 2
