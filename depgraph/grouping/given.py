"""What users hand in about the groups of a graph (scores, masks, counts, places, indices): checked here, once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ..axes import axes, polynomials
from ..axes.axes import AtomMasks, Axis
from ..base.checks import is_whole
from ..base.errors import InputError, suggestions
from ..tracing.recorder import record_of
from .members import Group, Indices

if TYPE_CHECKING:
    from .graph import DependencyGraph

Place = Group | str  # a group, its name, or a dim: "tensor:dim"
NO_PLACE = "  fix: give a group, its name, or a parameter or buffer name and a dim, as in 'layers.0.weight:0'"


def axis_at(graph: DependencyGraph, place: Place) -> Axis:
    """The axis at `place`.

    Raises:
        InputError: there is no such place in `graph`, or its size is 1.
    """
    if isinstance(place, Group):
        return graph.group(place.name).axis
    name, _, dim = place.rpartition(":") if isinstance(place, str) else ("", "", "")
    dims = graph.dims(name)
    if dim.isdecimal() and int(dim) < len(dims):
        axis = dims[int(dim)]
        if axis is None:
            raise InputError(f"{place!r} has size 1: nothing can be removed from it")
        return axis.find()
    if place in graph.named:
        return graph.named[place].axis
    raise InputError(f"{place!r} is neither a dim that a traced run used nor a group\n{NO_PLACE}")


def checked_scores(graph: DependencyGraph, given: Any) -> dict[str, npt.NDArray[np.float64]]:
    """Group name -> [units] float64, for every group of `graph`.

    Raises:
        InputError: unknown or missing names, scores of the wrong shape or kind, or NaN.
    """
    found = {g.name: unit_scores(s, g, "there are") for g, s in _groups(graph, given, "scores")}
    missing = [g.name for g in graph.groups if g.name not in found]
    if missing:
        raise InputError(f"scores lack {suggestions('', missing)}: every group needs one per unit")
    return found


def unit_scores(given: Any, group: Group, who: str = "importance gave") -> npt.NDArray[np.float64]:
    """Scores of the units of `group` as [units] float64.

    Raises:
        InputError: they are no such scores.
    """
    values = _array(given, f"{who} {type(given).__name__} for {group!r}: one number per unit is needed")
    if values.dtype.kind not in "iuf":
        raise InputError(f"{who} scores of type {values.dtype} for {group!r}: one number per unit is needed")
    if values.shape != (group.units,):
        raise InputError(f"{who} scores of shape {values.shape} for {group!r}: one per unit is needed")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"{who} NaN or infinite scores for {group!r}: are its weights finite?")
    return values


def checked_masks(graph: DependencyGraph, given: Any) -> AtomMasks:
    """The masks of the groups that lose units, by their axes.

    Raises:
        InputError: unknown names, or something else than [units] bools; or masks that leave nothing of a dim, or not what
            a lock, an op or a statement asks for.
    """
    found: dict[Axis, npt.NDArray[np.bool_]] = {}
    for group, mask in _groups(graph, given, "masks"):
        kept = _mask(mask, group)
        if kept.all():
            continue
        if group.axis not in graph.by_axis:
            raise InputError(f"{group.name!r} can't lose units: it {graph.reason(group.axis)}")
        found[group.axis] = kept
    _check_what_stays(graph, found)
    return found


def checked_orders(graph: DependencyGraph, given: Any) -> dict[Axis, Indices]:
    """The orders of the units of groups, by their axes.

    Raises:
        InputError: unknown names, no permutation of the units, or units that must stand as they do.
    """
    found: dict[Axis, Indices] = {}
    for group, order in _groups(graph, given, "order"):
        text = f"the order of {group.name!r} must be the numbers from 0 to {group.units - 1}, each once, not {{}}"
        places = _array(order, text.format(type(order).__name__))
        if places.dtype.kind not in "iu" or not np.array_equal(np.sort(places), np.arange(group.units)):
            raise InputError(text.format(f"{list(places.shape)} {places.dtype}"))
        if group.axis not in graph.by_axis or group.axis in graph.in_order:
            raise InputError(f"the units of {group.name!r} must stand as they do")
        found[group.axis] = places.astype(np.int64)
    return found


def checked_counts(graph: DependencyGraph, given: Any) -> dict[Axis, int]:
    """How many units each group keeps, by its axis; all of one that `given` does not name.

    Raises:
        InputError: unknown names, or no number from 0 to its units.
    """
    counts = {axis: axis.size for axis in graph.by_axis}
    for group, count in _groups(graph, given, "counts"):
        if not is_whole(count) or not 0 <= count <= group.units:
            raise InputError(
                f"the count of {group.name!r} must be a whole number from 0 to {group.units}, not {count!r}"
            )
        if group.axis in counts:
            counts[group.axis] = int(count)
    return counts


def checked_indices(graph: DependencyGraph, name: Any, dim: Any, given: Iterable[int]) -> Indices:
    """`given` as indices (int64, from 0) of a dim of a tensor.

    Raises:
        InputError: there is no such tensor or dim, or they are not indices of it.
    """
    shape = _shape(graph, name)
    if not is_whole(dim) or not -len(shape) <= dim < len(shape):
        raise InputError(f"{name!r} has {len(shape)} dims, and no dim {dim!r}")
    if not graph.dims(name):
        raise InputError(f"no traced run used {name!r}: nothing can be removed from it")
    text = f"indices of {name!r} dim {dim} must be whole numbers below {shape[dim]}"
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise InputError(f"{text}, not {given!r}")
    found = _array(given if isinstance(given, torch.Tensor) else list(given), text)
    found = found.astype(np.int64) if not found.size else found
    if found.dtype == bool:
        raise InputError(f"{text}, not bools\n  fix: np.flatnonzero(mask)")
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise InputError(f"{text}, not {given!r}")
    if found.size and (found.max() >= shape[dim] or found.min() < -shape[dim]):
        raise InputError(f"{text}, not {int(found.max() if found.max() >= shape[dim] else found.min())}")
    return found.astype(np.int64) % shape[dim]


def first_name(graph: DependencyGraph, name: Any) -> str:
    """The first name of tensor `name`.

    Raises:
        InputError: the model has no such tensor.
    """
    _shape(graph, name)
    return graph.trace.aliases.get(name, name)


def _shape(graph: DependencyGraph, name: Any) -> tuple[int, ...]:
    tensor = graph.tensors.get(graph.trace.aliases.get(name, name)) if isinstance(name, str) else None
    if tensor is None:
        raise InputError(
            f"{name!r} is not a parameter or buffer of this model, which has {suggestions(name, graph.tensors)}"
        )
    return tuple(tensor.shape)


def _groups(graph: DependencyGraph, given: Any, what: str) -> list[tuple[Group, Any]]:
    """Each group of `graph` that `given` names, with what is given for it."""
    if not isinstance(given, Mapping):
        raise InputError(f"{what} must be a dict by group names, not {type(given).__name__}")
    return [(graph.group(name), value) for name, value in given.items()]


def _array(given: Any, text: str) -> npt.NDArray[Any]:
    """`given` as a numpy array.

    Raises:
        InputError: it can't be one: `text`.
    """
    try:
        if isinstance(given, torch.Tensor):
            given = given.detach().cpu()
            given = (given.double() if given.is_floating_point() else given).numpy()
        return np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:  # torch and numpy say it with any of these
        raise InputError(text) from error


def _mask(given: Any, group: Group) -> npt.NDArray[np.bool_]:
    text = (
        f"the mask of {group.name!r} must be [{group.units}] bools, True where a unit stays, not {{}}\n"
        f"  fix: of indices make one with mask = np.zeros({group.units}, bool); mask[indices] = True"
    )
    mask = _array(given, text.format(type(given).__name__))
    if mask.dtype != bool or mask.shape != (group.units,):
        raise InputError(text.format(f"{list(mask.shape)} {mask.dtype}"))
    return mask


def _check_what_stays(graph: DependencyGraph, masks: dict[Axis, npt.NDArray[np.bool_]]) -> None:
    if not all(mask.any() for mask in masks.values()):
        for node, results in graph.state.dims.items():
            for axis in (a for dims in results for a in dims if a is not None):
                if axis.size and not axes.kept(axis, masks).any():
                    where = str(node.target) if node.op == "get_attr" else record_of(node).module
                    groups = [graph.by_axis[a].name for a in dict.fromkeys(axes.atoms(axis)) if a in masks]
                    raise InputError(
                        f"the masks of {', '.join(groups)} remove all indices of a dim in {where}"
                    )
    counts = {a: int(masks[a].sum()) if a in masks else a.size for a in graph.by_axis}
    for polynomial, why in graph.constraints:
        if polynomials.evaluate(polynomial, counts):
            atoms = {a for term in polynomial for a in term}
            groups = [g.name for g in graph.groups if g.axis in atoms]
            raise InputError(f"the masks of {suggestions('', groups)} contradict each other ({why})")
    for axis, least in graph.state.at_least:
        if (count := int(axes.kept(axis, masks).sum())) < least:
            groups = [graph.by_axis[a].name for a in dict.fromkeys(axes.atoms(axis)) if a in masks]
            raise InputError(f"the masks of {', '.join(groups)} keep {count} indices where {least} must stay")
    for place, axis, number in graph.multiples:
        count = int(axes.kept(axis, masks).sum())
        if count % number and count != axis.find().size:
            raise InputError(
                f"the masks keep {count} indices of {place}, which must be a multiple of {number}"
            )
