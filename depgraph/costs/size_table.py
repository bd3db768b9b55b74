"""Sums of products of sizes, as functions of how many indices each free axis keeps.

Everything that a plan is charged for is such a sum: parameters, multiply-accumulates, bytes of a tensor. A table has
one sum a row; it is evaluated at once for all rows, and so are its slopes, which say what one unit of an axis costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..axes import polynomials
from ..axes.axes import Axis
from ..grouping.graph import DependencyGraph

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_Padded = tuple[Integers, Integers, Integers]


class SizeTable:
    """Rows of sums of ``constant * product of sizes``; sizes are polynomials in the counts of the free axes."""

    def __init__(self, graph: DependencyGraph, rows: int = 1) -> None:
        """`rows` empty sums over the free axes of `graph`."""
        self.index = {a: i for i, a in enumerate(graph.by_axis)}
        self.full: Integers = np.array([a.size for a in self.index], dtype=np.int64)
        self._fixed: Integers = np.zeros(rows, dtype=np.int64)
        self._sizes: dict[Axis, int] = {}  # an axis that varies -> its number
        self._constant: dict[Axis, int] = {}  # one that does not -> its size
        self._monomials: list[tuple[int, int, tuple[int, ...]]] = []  # size, coefficient, free axes
        self._terms: list[tuple[int, int, list[int]]] = []  # row, constant, sizes
        self._arrays: tuple[_Padded, _Padded] | None = None

    def add(self, dims: Sequence[Axis | int | None], scale: int = 1, row: int = 0) -> None:
        """Add `scale` times the product of `dims` to a row; a dim of None has size 1."""
        constant, varying = scale, []
        for dim in dims:
            if isinstance(dim, Axis):
                size, number = self._size(dim.find())
                constant *= size
                varying += number
            elif dim is not None:
                constant *= int(dim)
        if varying:
            self._terms.append((row, constant, varying))
        else:
            self._fixed[row] += constant
        self._arrays = None

    def _size(self, axis: Axis) -> tuple[int, list[int]]:
        """The size of an axis that does not vary and [], or 1 and [the number of one that does]."""
        if axis not in self._sizes and axis not in self._constant:
            p = polynomials.count(axis, self.index)
            if set(p) <= {()}:
                self._constant[axis] = p.get((), 0)
            else:
                number = self._sizes[axis] = len(self._sizes)
                self._monomials += [(number, n, tuple(self.index[a] for a in t)) for t, n in p.items()]
        return (self._constant[axis], []) if axis in self._constant else (1, [self._sizes[axis]])

    def vector(self, counts: Mapping[Axis, int]) -> Integers:
        """`counts` as a vector over the free axes."""
        return np.array([counts[a] for a in self.index], dtype=np.int64)

    def values(self, counts: Integers) -> Integers:
        """[rows] int64: every sum at `counts` ([free axes])."""
        monomials, (owners, constants, factors) = self._padded()
        out = self._fixed.copy()
        np.add.at(out, owners, constants * self._sizes_at(counts, monomials)[factors].prod(1))
        return out

    def slopes(self, counts: Integers, weights: Floats) -> Floats:
        """[free axes]: how fast the sum of the rows, weighted by `weights` ([rows]), grows with each count."""
        monomials, (owners, constants, factors) = self._padded()
        sizes = self._sizes_at(counts, monomials).astype(float)
        per_size = _product_slopes(sizes, factors, weights[owners] * constants)
        numbers, coefficients, atoms = monomials
        per_count = _product_slopes(
            np.append(counts, 1).astype(float), atoms, per_size[numbers] * coefficients
        )
        return per_count[:-1]

    def _padded(self) -> tuple[_Padded, _Padded]:
        """The monomials and the terms as arrays, padded with a last count, and a last size, that is 1."""
        if self._arrays is None:
            self._arrays = _padded(self._monomials, len(self.full)), _padded(self._terms, len(self._sizes))
        return self._arrays

    def _sizes_at(self, counts: Integers, monomials: _Padded) -> Integers:
        numbers, coefficients, atoms = monomials
        out = np.zeros(len(self._sizes) + 1, dtype=np.int64)
        np.add.at(out, numbers, coefficients * np.append(counts, 1)[atoms].prod(1))
        out[-1] = 1
        return out


def _padded(terms: Sequence[tuple[int, int, Sequence[int]]], one: int) -> _Padded:
    """(owners [n], constants [n], factors [n, most factors]) of n terms; `one` fills the places of missing factors."""
    width = max((len(t[2]) for t in terms), default=1)
    factors = np.full((len(terms), width), one, dtype=np.int64)
    for i, (_, _, found) in enumerate(terms):
        factors[i, : len(found)] = found
    owners, constants = (np.array([t[k] for t in terms], dtype=np.int64) for k in (0, 1))
    return owners, constants, factors


def _product_slopes(sizes: Floats, factors: Integers, weights: Floats) -> Floats:
    """[sizes]: the derivative of the weighted sum of products of `sizes` by each size."""
    found = sizes[factors]
    out = np.zeros(len(sizes))
    for column in range(factors.shape[1]):
        others = np.delete(found, column, axis=1).prod(1)
        np.add.at(out, factors[:, column], weights * others)
    return out
