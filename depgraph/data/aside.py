"""The activations of a run that waits, in a file meanwhile.

A tensor can't be taken from the code that holds it, but the memory behind it can: its storage is written to a file, made empty, and
filled again before the run goes on. That is done with storages that an op of the run made; weights and inputs stay.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..base.shelf import Place, Shelf

Tensor = torch.Tensor


class Waiting:
    """What all runs that wait have together: up to `room` bytes of activations in memory, the rest in files in `folder`."""

    def __init__(self, folder: Path, room: int) -> None:
        """Nothing waits."""
        self.folder, self.room, self.used, self.runs = folder, room, 0, 0
        self.away: dict[int, Activations] = {}  # the address of a storage that is in a file -> whose it is

    def of_a_run(self) -> Activations:
        """Those of one more run."""
        self.runs += 1
        return Activations(self, Shelf(self.folder / f"run-{self.runs}"))


class Activations:
    """The tensors that ops of a run have made, as far as they live."""

    def __init__(self, waiting: Waiting, shelf: Shelf) -> None:
        """None yet; in files they are on the `shelf`."""
        self.waiting, self.shelf = waiting, shelf
        self.made: dict[int, list[weakref.ref[Tensor]]] = {}  # the address of a storage -> tensors on it
        self.away: dict[int, tuple[torch.UntypedStorage, Place]] = {}  # by address
        self.counted = 0

    def need(self, args: Any) -> None:
        """An op is about to be called with `args`: what another run has made and left to all, as a table that is kept, is there from now on."""
        for t in _tensors(args) if self.waiting.away else ():
            address = _address(t)
            if address in self.waiting.away:
                self.waiting.away.pop(address)._leave(address)

    def note(self, args: Any, out: Any) -> None:
        """An op was called with `args` and gave `out`."""
        given = {_address(t) for t in _tensors(args)}
        for t in _tensors(out):
            address = _address(t)
            if address is None or type(t) is not Tensor:
                continue
            living = any(r() is not None for r in self.made.get(address, ()))
            if not living and address in given:
                continue  # a weight, an input, or a view of them
            if not living:
                self.made[address] = []
            self.made[address].append(weakref.ref(t))

    def wait(self) -> None:
        """The run stops: its tensors stay where there is room, else they go into the file."""
        storages = self._living()
        size = sum(s.nbytes() for s in storages)
        if self.waiting.used + size <= self.waiting.room:
            self.counted = size
            self.waiting.used += size
            return
        some = [s for s in storages if s.resizable() and s.nbytes()]
        self.away = {s._cdata: (s, self.shelf.put(_octets(s))) for s in some}
        self.waiting.away |= dict.fromkeys(self.away, self)
        self._empty()

    def go_on(self) -> None:
        """The run continues: all of them are there."""
        self.waiting.used -= self.counted
        self.counted = 0
        self.bring()
        for address in self.away:
            del self.waiting.away[address]
        self.away = {}
        self.shelf.clear()

    def bring(self) -> None:
        """Those in the file are there for a while."""
        for storage, place in self.away.values():
            self._fill(storage, place)

    def take_away(self, changed: bool) -> None:
        """And are gone again; with `changed` values they are written anew."""
        if changed and self.away:
            self.shelf.clear()
            self.away = {n: (s, self.shelf.put(_octets(s))) for n, (s, _) in self.away.items()}
        self._empty()

    def end(self) -> None:
        """The run is over: what it has left to all is there, and the rest is forgotten."""
        living = {storage._cdata for storage in self._living()}
        for address in list(self.away):
            del self.waiting.away[address]
            if address in living:
                self._leave(address)
        self.away = {}
        self.shelf.clear()

    def _empty(self) -> None:
        for storage, _ in self.away.values():
            storage.resize_(0)

    def _leave(self, address: int) -> None:
        self._fill(*self.away.pop(address))

    def _fill(self, storage: torch.UntypedStorage, place: Place) -> None:
        storage.resize_(place.shape[0])
        self.shelf.fill(_octets(storage), place)

    def _living(self) -> list[torch.UntypedStorage]:
        found: dict[int, torch.UntypedStorage] = {}
        for address, refs in list(self.made.items()):
            alive = [r for r in refs if r() is not None]
            if not alive:
                del self.made[address]
                continue
            self.made[address] = alive
            tensor = alive[0]()
            if tensor is not None:
                found[address] = tensor.untyped_storage()
        return list(found.values())


def _tensors(value: Any) -> Iterable[Tensor]:
    return (t for t in pytree.tree_leaves(value) if isinstance(t, Tensor))


def _address(tensor: Tensor) -> int | None:
    """The storage of a tensor on the CPU that has one."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return None
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # a class of its own around others
        return None


def _octets(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)
