"""Cuts of a model's tensors, pulled back to the stored tensors that they are put together from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..plan.plan import Cut, Indices, Plan
from .layout import Laid, NotMoved, Part, Span


def pulled_back(
    laid: Mapping[str, Laid], cuts: Mapping[str, Cut], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Cut], dict[str, str | None]]:
    """What makes of the files what `cuts` make of the model: cuts of stored tensors, and names that change.

    Where whole stored tensors go (one of the experts that a model stacks), the others close up: each takes the name of the
    one whose place it has now. Those that go have None for a name.

    Args:
        laid: the model's tensors, as they lie in stored ones.
        cuts: of the model's tensors.
        shapes: of the stored tensors.

    Raises:
        NotMoved: no cuts of stored tensors do that, naming the tensor.
    """
    whole: dict[str, Cut] = {}  # an entry as it is, cut as the model's
    names: dict[str, str | None] = {}
    kept: dict[
        str, list[dict[int, Indices]]
    ] = {}  # for each dim: the entries that parts keep, by where the part begins
    for name, tensor in laid.items():
        cut = cuts.get(name)
        only = tensor.parts[0] if len(tensor.parts) == 1 else None
        if only is not None and only == Laid.stored(only.name, shapes[only.name]).parts[0]:
            if cut is not None:
                whole[only.name] = cut
            continue
        at = {part.dims: part.name for part in tensor.parts}
        for part in tensor.parts:
            places = _new_places(part, cut)
            new = None if places is None else at.get(places, "")
            if new == "":
                raise NotMoved(f"{name}: no stored tensor has the place of {part.name} afterwards")
            if names.setdefault(part.name, new) != new:
                raise NotMoved(f"{part.name}: its parts would get different names")
            if new is not None:
                _note_kept(name, part, cut, kept.setdefault(part.name, [{} for _ in shapes[part.name]]))
    found = dict(whole)
    names = {old: new for old, new in names.items() if old != new}
    for name, dims in kept.items():
        shape = tuple(shapes[name])
        keep = [_united(name, pieces) for pieces in dims]
        plain = [None if len(k) == n else k for k, n in zip(keep, shape, strict=True)]
        if any(k is not None for k in plain):
            found[name] = Cut(shape, tuple(plain))
    return found, names


def moved_names(
    laid: Mapping[str, Laid], plan: Plan, known: Mapping[str, str | None]
) -> dict[str, str | None]:
    """Names of stored tensors that change where children of containers go: each takes that of the place it has afterwards.

    Args:
        laid: the model's tensors, as they lie in stored ones.
        plan: what goes.
        known: names that change for other reasons, each to that of another part of the same tensor.

    Returns:
        these and those: a name -> the one it has afterwards; None: it is gone.

    Raises:
        NotMoved: what moves up lies otherwise in its files than what was there, or a stored tensor is a part of both.
    """
    found: dict[str, str | None] = {}
    for name, tensor in laid.items():
        own = [part.name for part in tensor.parts]
        places: dict[str, str] = {}
        if not plan.drops(name):
            new = plan.moves.new(name)
            there = laid[new].parts if new in laid else ()
            if [p.dims for p in there] != [p.dims for p in tensor.parts]:
                raise NotMoved(f"{name}, which becomes {new}")
            places = {mine: other.name for mine, other in zip(own, there, strict=True)}
        for part in own:
            place = known.get(part, part) if places else None
            new_name = None if place is None else places[place]
            if found.setdefault(part, new_name) != new_name:
                raise NotMoved(f"{part}: it is a part of tensors that move differently")
    return {old: new for old, new in found.items() if old != new}


def _new_places(part: Part, cut: Cut | None) -> tuple[Span | int, ...] | None:
    """Where the part is afterwards, in terms of what was there before: the same dims, fixed indices closed up; None: gone."""
    places = list(part.dims)
    for d, at in enumerate(part.dims):
        keep = None if cut is None else cut.keep[d]
        if isinstance(at, int) and keep is not None:
            j = int(np.searchsorted(keep, at))
            if j == len(keep) or keep[j] != at:
                return None
            places[d] = j
    return tuple(places)


def _note_kept(name: str, part: Part, cut: Cut | None, dims: list[dict[int, Indices]]) -> None:
    if cut is not None and (cut.blocks is not None or cut.numbers is not None):
        raise NotMoved(f"{name}, a grouped convolution or a buffer of indices")
    for d, at in enumerate(part.dims):
        keep = None if cut is None else cut.keep[d]
        if isinstance(at, int):
            continue
        own = np.arange(at.place, at.place + at.size)
        mine = own if keep is None else np.intersect1d(own, keep)
        indices = np.asarray((mine - at.place) * at.step + at.first, dtype=np.int64)
        known = dims[at.source].setdefault(at.first, indices)
        if not np.array_equal(known, indices):
            raise NotMoved(f"{part.name}: its parts would keep different entries of dim {at.source}")
    for d, index in part.fixed:
        dims[d][index] = np.array([index], dtype=np.int64)


def _united(name: str, pieces: Mapping[int, Indices]) -> Indices:
    joined = np.sort(np.concatenate(list(pieces.values())))
    if len(joined) > 1 and not bool((np.diff(joined) > 0).all()):
        raise NotMoved(f"{name}: its parts overlap")
    return joined


def check_conversion(
    before: Mapping[str, Laid], after: Mapping[str, Laid], cuts: Mapping[str, Cut], stored: Mapping[str, Cut],
    names: Mapping[str, str | None],
) -> None:  # fmt: skip
    """What a conversion makes of the smaller stored tensors must be the tensors of the smaller model.

    One that takes the halves of a tensor, say, is right where both lost as much, and a change of order where its factors did.

    Args:
        before: the model's tensors, as they lie in stored ones.
        after: those of the smaller model, in the smaller stored ones.
        cuts: of the model's tensors.
        stored: of the stored tensors.
        names: of stored tensors that have another one afterwards; None: they are gone.

    Raises:
        NotMoved: it is not, naming the tensor.
    """
    for name, laid in before.items():
        cut = cuts.get(name)
        for d in range(laid.ndim):
            keep = None if cut is None else cut.keep[d]
            wanted = {}
            for (owner, source), (places, entries) in _columns(laid, d).items():
                new = names.get(owner, owner)
                if new is None:
                    continue
                if keep is not None:
                    entries = entries[np.isin(places, keep)]
                wanted[new, source] = _ranks(
                    entries, keep if source is None else _kept(stored, owner, source)
                )
            found = _columns(after[name], d) if name in after else {}
            if {k: v.tolist() for k, v in wanted.items()} != {k: v[1].tolist() for k, v in found.items()}:
                raise NotMoved(f"{name}: the smaller one is not what its class makes of smaller files")


def _columns(laid: Laid, dim: int) -> dict[tuple[str, int | None], tuple[Indices, Indices]]:
    """What lies along `dim`: for each stored tensor and which of its dims, places in order, and the entries there.

    Of tensors that have one place there (the dim is None) that place.
    """
    spans: dict[tuple[str, int | None], set[Span]] = {}
    for part in laid.parts:
        at = part.dims[dim]
        key = part.name, None if isinstance(at, int) else at.source
        spans.setdefault(key, set()).add(Span(0, at, at, 1) if isinstance(at, int) else at)
    found = {}
    for key, own in spans.items():
        places = np.concatenate([np.arange(at.place, at.place + at.size) for at in own])
        entries = np.concatenate([np.arange(at.first, at.entries.stop, at.step) for at in own])
        order = np.lexsort((entries, places))
        found[key] = places[order], entries[order]
    return found


def _kept(stored: Mapping[str, Cut], name: str, dim: int) -> Indices | None:
    return stored[name].keep[dim] if name in stored else None


def _ranks(entries: Indices, keep: Indices | None) -> Indices:
    return entries if keep is None else np.searchsorted(keep, entries)


def stored_names(laid: Iterable[Laid]) -> set[str]:
    """The stored tensors that some tensor of the model is made of."""
    return {part.name for tensor in laid for part in tensor.parts}
