"""Damped least squares from sums over samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


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
        """Add samples of the stacks `where`; without `gram` the sums of x alone are left as they are."""
        if gram:
            self.xx[where] += x.mT @ x
            self.x[where] += x.sum(1)
            self.count[where] += x.shape[1]
        self.xr[where] += x.mT @ r
        self.r[where] += r.sum(1)
        self.rr[where] += r.square().sum(1)

    def plus(self, other: Sums) -> Sums:
        """The sums of both."""
        return Sums(*(a + b for a, b in zip(self._all(), other._all(), strict=True)))

    def finite(self) -> bool:
        """Whether no sum is NaN or infinite."""
        return all(bool(torch.isfinite(t).all()) for t in self._all())

    def _all(self) -> tuple[Tensor, ...]:
        return self.xx, self.xr, self.x, self.r, self.rr, self.count

    def solve(self, damping: float, affine: bool) -> tuple[Tensor, Tensor]:
        """The change of the weight that explains r best, and of the constant.

        Minimises ``sum |r - D x - b|^2 + l |D|^2`` with ``l = damping * mean(diag(xx))``: ``D = xr.T (xx + l I)^-1``, with
        `affine` from centred sums, and ``b = mean(r) - D mean(x)``; otherwise b is 0. [stacks, rows, columns] and
        [stacks, rows].
        """
        n = self.count.clamp(min=1)[:, None]
        xx, xr = self.xx, self.xr
        if affine:
            xx = xx - self.x[:, :, None] * (self.x / n)[:, None, :]
            xr = xr - self.x[:, :, None] * (self.r / n)[:, None, :]
        scale = xx.diagonal(dim1=1, dim2=2).mean(1)
        load = (damping * scale).clamp(min=torch.finfo(xx.dtype).tiny)
        eye = torch.eye(xx.shape[1], dtype=xx.dtype, device=xx.device)
        factor, failed = torch.linalg.cholesky_ex(xx + load[:, None, None] * eye)
        while bool(failed.any()):  # too little damping for what rounding left
            load = torch.where(failed > 0, (load * 10).clamp(min=1e-14) + 1e-15 * scale, load)
            factor, failed = torch.linalg.cholesky_ex(xx + load[:, None, None] * eye)
        change = torch.cholesky_solve(xr, factor).mT
        constant = torch.zeros_like(self.r)
        if affine:
            constant = self.r / n - (change @ (self.x / n)[:, :, None])[:, :, 0]
        return change, constant

    def error(self, change: Tensor, constant: Tensor) -> Tensor:
        """``sum |r - D x - b|^2`` over these samples, for each row: [stacks, rows]."""
        mixed = (change * (change @ self.xx - 2 * self.xr.mT)).sum(-1)
        linear = 2 * constant * ((change @ self.x[:, :, None])[:, :, 0] - self.r)
        return self.rr + mixed + linear + self.count[:, None] * constant.square()


def wide(device: torch.device) -> torch.dtype:
    """The type that sums are made in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
