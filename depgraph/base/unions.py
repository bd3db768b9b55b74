"""Sets that are joined one pair at a time (union-find)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Unions(Generic[T]):
    """Disjoint sets of `items`, at first one of each."""

    def __init__(self, items: Iterable[T]) -> None:
        """`items`, each by itself."""
        self._parent = {item: item for item in items}

    def root(self, item: T) -> T:
        """The member that stands for the set of `item`."""
        parent = self._parent
        while parent[item] != item:
            parent[item] = item = parent[parent[item]]
        return item

    def join(self, *items: T) -> None:
        """The sets of `items` become one."""
        for item in items[1:]:
            self._parent[self.root(item)] = self.root(items[0])

    def sets(self) -> list[list[T]]:
        """The sets and their members, in the order of the items."""
        found: dict[T, list[T]] = {}
        for item in self._parent:
            found.setdefault(self.root(item), []).append(item)
        return list(found.values())
