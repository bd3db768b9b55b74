"""Damped least squares from sums over samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor
RUN = 1 << 13  # samples of one product: rounding in float32 grows with them
SIDE = 256  # a Gram matrix is made of blocks of at least so many columns, of which one half is the other's mirror


def _add_gram(total: Tensor, x: Tensor) -> None:
    """Add x'x to `total` [stacks, c, c], for x [stacks, n, c]: what is left of the diagonal mirrors what is right of it."""
    width = x.shape[2]
    if width < 2 * SIDE:
        total += x.mT @ x
        return
    half = width // 2
    _add_gram(total[:, :half, :half], x[:, :, :half])
    _add_gram(total[:, half:, half:], x[:, :, half:])
    found = x[:, :, :half].mT @ x[:, :, half:]
    total[:, :half, half:] += found
    total[:, half:, :half] += found.mT


@dataclass
class Sums:
    """Sums over samples of inputs x [stacks, n, c] and of what is to be explained r [stacks, n, m], in float64.

    Attributes:
        xx: [stacks, c, c], the Gram matrix; xr: [stacks, c, m]; x: [stacks, c]; r: [stacks, m].
        rr: [stacks, m], squares of r; count: [stacks], samples.
    """

    xx: Tensor
    xr: Tensor
    x: Tensor
    r: Tensor
    rr: Tensor
    count: Tensor

    @classmethod
    def zero(cls, stacks: int, columns: int, rows: int, device: torch.device) -> Sums:
        """Of no samples."""

        def make(*sizes: int) -> Tensor:
            return torch.zeros(*sizes, dtype=wide(device), device=device)

        return cls(
            make(stacks, columns, columns), make(stacks, columns, rows), make(stacks, columns),
            make(stacks, rows), make(stacks, rows), make(stacks),
        )  # fmt: skip

    def add(self, where: slice, x: Tensor, r: Tensor, gram: bool = True) -> None:
        """Add samples of the stacks `where`; without `gram` the sums of x alone are left as they are.

        Products are of at most `RUN` samples in the type of x and r, float32 or wider, and added up in that of the sums.
        """
        for x_run, r_run in zip(x.split(RUN, 1), r.split(RUN, 1), strict=True):
            if gram:
                _add_gram(self.xx[where], x_run)
                self.x[where] += x_run.sum(1, dtype=self.x.dtype)
                self.count[where] += x_run.shape[1]
            self.xr[where] += x_run.mT @ r_run
            self.r[where] += r_run.sum(1, dtype=self.r.dtype)
            self.rr[where] += r_run.square().sum(1, dtype=self.rr.dtype)

    def plus(self, other: Sums) -> Sums:
        """The sums of both."""
        return Sums(*(a + b for a, b in zip(self._all(), other._all(), strict=True)))

    def rows(self, some: Tensor) -> Sums:
        """The sums for some rows of what is to be explained, of every stack."""
        return Sums(self.xx, self.xr[:, :, some], self.x, self.r[:, some], self.rr[:, some], self.count)

    def finite(self) -> bool:
        """Whether no sum is NaN or infinite."""
        return all(bool(torch.isfinite(t).all()) for t in self._all())

    def _all(self) -> tuple[Tensor, ...]:
        return self.xx, self.xr, self.x, self.r, self.rr, self.count

    def solve(self, damping: float, affine: bool, others: Sums | None = None) -> tuple[Tensor, Tensor]:
        """The change of the weight that explains r best, and of the constant; by samples of `others`, too.

        Minimises ``sum |r - D x - b|^2 + l |D|^2`` with ``l = damping * mean(diag(xx))``: ``D = xr.T (xx + l I)^-1``, with
        `affine` from centred sums, and ``b = mean(r) - D mean(x)``; otherwise b is 0. [stacks, rows, columns] and
        [stacks, rows].
        """
        every = [self] if others is None else [self, others]
        count, x, r, xr = (_summed([getattr(s, name) for s in every]) for name in ("count", "x", "r", "xr"))
        n = count.clamp(min=1)[:, None]

        def gram() -> Tensor:
            made = self.xx.clone() if others is None else self.xx + others.xx
            return made.baddbmm_(x[:, :, None], (x / n)[:, None, :], alpha=-1) if affine else made

        if affine:
            xr = torch.baddbmm(xr, x[:, :, None], (r / n)[:, None, :], alpha=-1)
        xx = gram()
        scale = xx.diagonal(dim1=1, dim2=2).mean(1)
        load = (damping * scale).clamp(min=torch.finfo(xx.dtype).tiny)
        factor, failed = _factored(xx, load)
        while bool(failed.any()):  # too little damping for what rounding left
            load = torch.where(failed > 0, (load * 10).clamp(min=1e-14) + 1e-15 * scale, load)
            factor, failed = _factored(xx.copy_(gram()), load)
        change = torch.cholesky_solve(xr, factor).mT
        constant = torch.zeros_like(r)
        if affine:
            constant = r / n - (change @ (x / n)[:, :, None])[:, :, 0]
        return change, constant

    def error(self, change: Tensor, constant: Tensor) -> Tensor:
        """``sum |r - D x - b|^2`` over these samples, for each row: [stacks, rows]."""
        mixed = (change @ self.xx).sub_(self.xr.mT, alpha=2).mul_(change).sum(-1)
        linear = 2 * constant * ((change @ self.x[:, :, None])[:, :, 0] - self.r)
        return self.rr + mixed + linear + self.count[:, None] * constant.square()


def _summed(some: Sequence[Tensor]) -> Tensor:
    """One tensor as it is, or the sum of two."""
    return some[0] if len(some) == 1 else some[0] + some[1]


def _factored(xx: Tensor, load: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of symmetric matrices with a load on their diagonals, in their memory, and which have none."""
    xx.diagonal(dim1=1, dim2=2).add_(load[:, None])
    lower, failed = xx.mT, torch.empty(len(xx), dtype=torch.int32, device=xx.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    return lower, failed


def wide(device: torch.device) -> torch.dtype:
    """The type that sums are made in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def summed_in(x: Tensor) -> Tensor:
    """`x` in the type that products for sums are made in: float32, or what is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
