"""Least squares from streamed sums, drawn towards what is known by a ridge that other data choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""What `solve` chooses from."""


@dataclass
class Sums:
    """Sums for a least squares with a constant: `[n]`, `[m]`, `[n, n]` and `[n, m]`."""

    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, n: int, m: int, like: Tensor) -> Sums:
        x, y, xx, xy = (torch.zeros(shape, device=like.device) for shape in ((n,), (m,), (n, n), (n, m)))
        return cls(x, y, xx, xy)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Columns of `x [n, P]` and `y [m, P]`."""
        self.x += x.sum(1)
        self.y += y.sum(1)
        self.xx.addmm_(x, x.T)
        self.xy.addmm_(x, y.T)
        self.count += x.shape[1]

    def __add__(self, other: Sums) -> Sums:
        x, y, xx, xy = self.x + other.x, self.y + other.y, self.xx + other.xx, self.xy + other.xy
        return Sums(x, y, xx, xy, self.count + other.count)

    def through_zero(self) -> Sums:
        """The same with means of zero: what is fitted to that has no constant."""
        return Sums(torch.zeros_like(self.x), torch.zeros_like(self.y), self.xx, self.xy, self.count)

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means of x and y, and the centred E[x x^T] and E[x y^T], float64."""
        x, y, xx, xy = (t.double() / self.count for t in (self.x, self.y, self.xx, self.xy))
        return x, y, xx.addr_(x, x, alpha=-1), xy.addr_(x, y, alpha=-1)

    def fit(self, ridge: float, prior: Tensor) -> tuple[Tensor, Tensor]:
        """`W [n, m]` and `c [m]` of y = W^T x + c, W drawn towards `prior`, float64.

        The ridge is a share of the mean E[x^2], constant part included: what is centred away leaves rounding behind.
        """
        x, y, xx, xy = self.centred()
        weight = ridge * (self.xx.diagonal().double().mean() / self.count).clamp(min=1e-300)
        xx.diagonal().add_(weight)
        solved = torch.cholesky_solve(xy.add_(weight * prior.to(xy)), torch.linalg.cholesky(xx))
        return solved, y - solved.T @ x

    def error(self, weight: Tensor, constant: Tensor) -> float:
        """E|y - W^T x - c|^2, less what does not depend on W and c."""
        x, y, xx, xy = self.centred()
        spread = (weight * (xx @ weight - 2 * xy)).sum()
        return float(spread + (y - weight.T @ x - constant).square().sum())


def solve(
    halves: Sequence[Sums], prior: Tensor, ridge: float | None, *, constant: bool = True
) -> tuple[Tensor, Tensor]:
    """`W [n, m]` and `c [m]` of y = W^T x + c by least squares over two halves of the data, float64 on the CPU.

    Args:
        prior: what W is drawn towards, `[n, m]`.
        ridge: how much, as a share of the mean E[x^2]; if not given, the one of `RIDGES` whose solution on the first
            half errs least on the second. With little data that is a large one, and W stays close to the prior.
        constant: whether there is a c; else it is zero.
    """
    first, second = halves if constant else [half.through_zero() for half in halves]
    if ridge is None:
        ridge = RIDGES[-1]
        if first.count and second.count:
            ridge = min(RIDGES, key=lambda r: second.error(*first.fit(r, prior)))
    solved, left = (first + second).fit(ridge, prior)
    return solved.cpu(), left.cpu()
