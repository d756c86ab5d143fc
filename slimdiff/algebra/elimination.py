"""Elimination: which channels are worth keeping, and the layer behind them solved again on those.

Weights are given as `nn.Linear` stores them, `[out, in]`. All computation is on the CPU, in float64 unless said.
Sources: the optimal brain surgeon's elimination; ridge leverage is MoDeGPT's (arXiv 2408.09632).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slimdiff.algebra.low_rank import tail_of

# Ridge on the channels' moments, as a share of their mean diagonal: dead channels make them singular.
RIDGE = 1e-6
# Up to this number of channels one goes at a time; of more, this share of the channels left (`1 / STEPS`).
EXACT_CHANNELS = 1024
STEPS = 32
# Ridge of the leverage scores, as a share of the mean diagonal: far smaller, and all channels score alike.
LEVERAGE_RIDGE = 1e-1


class ChannelOrder(NamedTuple):
    """Channels from the most to the least worth keeping `[n]`; `tail[r]`: the relative error with the first r kept."""

    order: Tensor
    tail: Tensor


def elimination_order(moment: Tensor, down: Tensor, block: int | None = None, groups: int = 1) -> ChannelOrder:
    """Backward elimination on the output error: the optimal-brain-surgeon form.

    Removing channel i and solving the down projection again costs `|W_i|^2 / [C^-1]_ii`, with W and C^-1 updated after
    each removal. The order is nested, and the error curve of all its ranks follows from one factor: with C in that
    order `L L^T`, rank r leaves out the rows from r on of `L^T W`.

    Up to `EXACT_CHANNELS` channels one goes per step, in float64. Beyond, `1 / STEPS` of those that are left go at once
    and the updates are float32; C^-1 is computed anew from float64 whenever half of them are gone.

    Args:
        moment: E[h h^T] `[n, n]`, float32 or float64; down: `[out, n]`.
        block: channels removed per step, if not as above.
        groups: with more than one, each of n / groups neighbouring channels, no group is ever more than one
            channel ahead of another; a step takes at most one channel of each.
    """
    n = moment.shape[0]
    precision = torch.float64 if n <= EXACT_CHANNELS else torch.float32
    weight = down.T.to(precision, copy=True)  # [n, out]
    alive, ridge = torch.arange(n), RIDGE
    removed: list[Tensor] = []
    while len(alive):
        factor, ridge = _cholesky(moment, alive, ridge)
        inverse = factor.to(precision)
        del factor
        torch.cholesky_inverse(inverse, out=inverse)
        step = block or (1 if n <= EXACT_CHANNELS else max(1, len(alive) // STEPS))
        gone, left, weight = _remove(inverse, weight, len(alive) - len(alive) // 2, step, alive * groups // n)
        removed.append(alive[gone])
        alive = alive[left]
        del inverse
    order = torch.cat(removed).flip(0)
    return ChannelOrder(order, _nested_error(moment, down, order, ridge))


def _nested_error(moment: Tensor, down: Tensor, order: Tensor, ridge: float = RIDGE) -> Tensor:
    """Relative error with the first r channels of an order kept, `[n + 1]`.

    With C in that order `L L^T`, channels are made orthogonal one by one: row i of `L^T W` is what channel i adds.
    """
    if not moment.any():  # where nothing arrives, nothing can be lost: what follows would be the errors of the ridge
        return torch.zeros(len(order) + 1, dtype=torch.float64)
    precision = torch.float64 if len(order) <= EXACT_CHANNELS else torch.float32
    factor, weight = _cholesky(moment, order, ridge)[0].to(precision), down.to(precision).T[order]
    # L^T is upper triangular: its rows from `start` on read nothing before.
    blocks = [(start, min(start + EXACT_CHANNELS, len(order))) for start in range(0, len(order), EXACT_CHANNELS)]
    added = [
        (factor[start:, start:end].T @ weight[start:]).square_().sum(1, dtype=torch.float64) for start, end in blocks
    ]
    return tail_of(torch.cat(added)[None])


def _remove(inverse: Tensor, weight: Tensor, count: int, step: int, owner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Remove the `count` channels that cost least, `step` at a time. Both matrices may be overwritten.

    Returns:
        the channels, first to go first; those that are left, in their order; and their rows of the weight.
    """
    tiny = torch.finfo(inverse.dtype).tiny
    names = torch.arange(len(inverse))
    left = torch.ones(len(inverse), dtype=torch.bool)
    gone: list[Tensor] = []
    while count:
        if left.sum() <= 0.8 * len(left):  # updates cost the square of what they run over: leave out what is gone
            kept = left.nonzero()[:, 0]
            inverse, weight = inverse[kept[:, None], kept], weight[kept]
            names, owner, left = names[kept], owner[kept], left[kept]
        cost = weight.square().sum(1) / inverse.diagonal().clamp(min=tiny)
        cost[~left] = torch.inf
        least = _cheapest(cost, left, owner, min(step, count))
        rows = inverse[least]  # and, as the inverse is symmetric, its columns
        part = torch.linalg.solve(rows[:, least], torch.cat([rows, weight[least]], 1))
        weight.addmm_(rows.T, part[:, len(inverse) :], alpha=-1)
        inverse.addmm_(rows.T, part[:, : len(inverse)], alpha=-1)
        left[least] = False
        gone.append(names[least])
        count -= len(least)
    return torch.cat(gone), names[left], weight[left]


def _cholesky(moment: Tensor, order: Tensor, ridge: float = RIDGE) -> tuple[Tensor, float]:
    """The lower Cholesky factor of a moment's rows and columns in an order, and the ridge that it took.

    Sums in float32 can be indefinite by more than the usual ridge, above all with fewer tokens than channels: then the
    ridge is raised tenfold until they are not. Beside the moment there is never more than one matrix of its size.
    """
    while True:
        # LAPACK works column by column: the transposed view of a symmetric matrix is factored where it lies.
        factor = moment[order[:, None], order].double().mT
        factor.diagonal().add_(ridge * _scale(moment))
        failed = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed:
            return factor, ridge
        del factor
        ridge *= 10


def leverage_order(moment: Tensor, down: Tensor) -> ChannelOrder:
    """Channels by ridge leverage `[C (C + lambda I)^-1]_ii`, the papers' choice (MoDeGPT)."""
    ridged = moment.clone()
    ridged.diagonal().add_(LEVERAGE_RIDGE * _scale(moment))
    order = torch.linalg.solve(ridged, moment).diagonal().argsort(descending=True)
    return ChannelOrder(order, _nested_error(moment, down, order))


def _cheapest(cost: Tensor, left: Tensor, owner: Tensor, step: int) -> Tensor:
    """Channels to remove next: of those groups that hold most, the cheapest; the cheapest at all if there is one group.

    Args:
        cost: infinite where `left` is false; owner: each channel's group.
    """
    held = torch.bincount(owner[left], minlength=int(owner.max()) + 1)
    if len(held) == 1:
        return torch.topk(cost, step, largest=False).indices
    best = torch.full((len(held),), torch.inf, dtype=cost.dtype).scatter_reduce(0, owner, cost, "amin")
    best[held < held.max()] = torch.inf
    groups = torch.topk(best, min(step, int((held == held.max()).sum())), largest=False).indices
    return torch.where(owner == groups[:, None], cost, torch.inf).argmin(1)


def solve_down(moment: Tensor, down: Tensor, kept: Tensor) -> Tensor:
    """The down projection on the kept channels: `(C_SS + eps I)^-1 C_S: W_down`, `[out, r]`."""
    factor, ridge = _cholesky(moment, kept)
    # In parts: a copy of all kept rows would be as large as the moment.
    cross = torch.cat([moment[rows] @ down.T for rows in kept.split(EXACT_CHANNELS)])
    cross.add_(down.T[kept], alpha=ridge * _scale(moment))
    return torch.cholesky_solve(cross, factor).T


def without(moment: Tensor, down: Tensor, first: int) -> tuple[Tensor, float]:
    """The moment of all but the first inputs, of what those do not say already.

    With C and `down` parted into the first inputs a and the others h: what h leaves when the best affine map from a is
    taken off has the moment `C_hh - C_ha C_aa^-1 C_ah`, and its loss is the output's least error with a's weights
    solved again.

    Returns:
        that moment, and the share of the output's energy that it carries: errors relative to the one times it are
        relative to the other.
    """
    factor, _ = _cholesky(moment, torch.arange(first))
    half = torch.linalg.solve_triangular(factor, moment[:first, first:], upper=False)
    left = moment[first:, first:] - half.T @ half
    weight = down[:, first:]
    whole, part = ((w @ c * w).sum().clamp(min=0.0) for w, c in ((down, moment), (weight, left)))
    return left, float(part / whole) if whole else 1.0


def closest_to_one(moment: Tensor, mean: Tensor, kept: Tensor) -> Tensor:
    """`d [r]` with the least E|1 - d^T x|^2 over the kept channels x, from their moment about the mean and the mean."""
    factor, _ = _cholesky(moment, kept)
    solution = torch.cholesky_solve(mean[kept, None], factor)[:, 0]
    return solution / (1 + mean[kept] @ solution)


def _scale(moment: Tensor) -> float:
    """The mean diagonal; 1 for a group that is silent, whose moment is zero."""
    return float(moment.diagonal().mean()) or 1.0
