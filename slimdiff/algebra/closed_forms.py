"""The algebra: for each group, the smaller weights whose output is closest over the calibrated activations.

Weights are given as `nn.Linear` stores them, `[out, in]`. All computation is float64 on the CPU.
Sources: SlimDiff (arXiv 2509.21498), MoDeGPT (arXiv 2408.09632); the forms in head space are derived in the docstrings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Text moments are singular (77 padded tokens): directions below this share of the largest eigenvalue carry nothing.
CUTOFF = 1e-10
# Ridge on feed-forward moments, as a share of their mean diagonal: dead channels make them singular.
RIDGE = 1e-6
# Feed-forwards of up to so many channels lose one at a time; larger ones this share of the channels left (`1 / STEPS`).
EXACT_CHANNELS = 1024
STEPS = 32
# Ridge of the leverage scores, as a share of the mean diagonal: far smaller, and all channels score alike.
LEVERAGE_RIDGE = 1e-1


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Square root R with `R^T R = G`, and its pseudo-inverse, of a symmetric positive semi-definite `[..., d, d]`."""
    values, vectors = torch.linalg.eigh(moment)
    largest = values[..., -1:].clamp(min=torch.finfo(moment.dtype).tiny)
    kept = values > CUTOFF * largest
    root = torch.where(kept, values.clamp(min=0).sqrt(), 0.0)
    inverse = torch.where(kept, root.clamp(min=torch.finfo(moment.dtype).tiny).reciprocal(), 0.0)
    return root[..., :, None] * vectors.mT, vectors * inverse[..., None, :]


@dataclass
class HeadBases:
    """Per-head bases `left` and `right`, best first, `[H, d, d]`; `tail[r]` is the relative error at rank r.

    For `query_key`, queries become `q left[:, :, :r]` and keys `k right[:, :, :r]`.
    For `value_output`, values become `v left[:, :, :r]`; `right` is unused there, for the output is solved again.
    """

    left: Tensor
    right: Tensor
    tail: Tensor


def query_key(query: Tensor, key: Tensor) -> HeadBases:
    """The best rank-r pair in head space.

    With `G_q = R_q^T R_q`, `G_k = R_k^T R_k` and `R_q R_k^T = U S V^T`:
    `q' = q R_q^-1 U_r S_r^1/2`, `k' = k R_k^-1 V_r S_r^1/2`, the minimiser of `E |q k^T - q' k'^T|^2`
    (equal to the whitened SVD of `W_q W_k^T`, SlimDiff's and MoDeGPT's query-key step, at d_head^3 instead of d_in^3).

    Args:
        query: E[q q^T] `[H, d, d]`.
        key: E[k k^T] `[H, d, d]`, about the mean key of each image.
    """
    root_q, inverse_q = roots(query)
    root_k, inverse_k = roots(key)
    u, s, vt = torch.linalg.svd(root_q @ root_k.mT)
    half = s.sqrt()[:, None, :]
    return HeadBases(inverse_q @ u * half, inverse_k @ vt.mT * half, _tail(s.square()))


def value_output(blocks: Tensor, output: Tensor) -> HeadBases:
    """Per head, `G^1/2 W_o = U S V^T` and `v' = v Q`, where Q spans the columns of `G^-1/2 U_r`.

    Q is orthonormal (the output is solved again on whatever basis it is): weights keep their size, so fp16 does too.

    Args:
        blocks: per head, `[H, d, d]`: E[z z^T] of what `to_out` receives, or E[v v^T] of the values (the papers' form,
            equal to whitening `W_v W_o` by the covariance of the value input).
        output: weight of the output projection, `[out, H d]`.
    """
    heads, d, _ = blocks.shape
    weight = output.T.reshape(heads, d, -1)
    root, inverse = roots(blocks)
    u, s, _ = torch.linalg.svd(root @ weight, full_matrices=False)
    if s.shape[-1] < d:  # an output narrower than a head: the remaining directions reach nothing
        u = torch.linalg.qr(torch.cat([u, torch.eye(d, dtype=u.dtype).expand(heads, d, d)], -1))[0][..., :d]
        s = torch.nn.functional.pad(s, (0, d - s.shape[-1]))
    basis = torch.linalg.qr(inverse @ u).Q
    return HeadBases(basis, basis, _tail(s.square()))


def head_blocks(moment: Tensor, heads: int) -> Tensor:
    """The diagonal blocks `[H, d, d]` of a moment over all heads `[H d, H d]`."""
    d = moment.shape[0] // heads
    return torch.stack([moment[i * d : (i + 1) * d, i * d : (i + 1) * d] for i in range(heads)])


def solve_output(moment: Tensor, output: Tensor, basis: Tensor) -> Tensor:
    """Least squares for the output projection on the kept coordinates: `(B^T G B)^+ B^T G W_o`.

    Args:
        moment: `[H d, H d]`, over all heads at once; or `[H, d, d]`, to solve each head on its own.
        output: `[out, H d]`; basis: `[H, d, r]`.

    Returns:
        `[out, H r]`.
    """
    joint = moment if moment.ndim == 2 else torch.block_diag(*moment)
    mixed = torch.block_diag(*basis)
    gram = mixed.T @ joint @ mixed
    _, inverse = roots(gram)
    return (inverse @ (inverse.T @ (mixed.T @ (joint @ output.T)))).T


def feed_forward_order(
    moment: Tensor, down: Tensor, block: int | None = None, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Backward elimination on the output error: the optimal-brain-surgeon form.

    Removing channel i and solving the down projection again costs `|W_i|^2 / [C^-1]_ii`, with W and C^-1 updated after
    each removal. The order is nested, and the error curve of all its ranks follows from one factor: with C in that
    order `L L^T`, rank r leaves out the rows from r on of `L^T W`.

    Up to `EXACT_CHANNELS` channels one goes per step, in float64. Beyond, `1 / STEPS` of those that are left go at once
    and the updates are float32; C^-1 is computed anew from float64 whenever half of them are gone.

    Args:
        moment: E[h h^T] `[n, n]`, float32 or float64; down: `[out, n]`.
        block: channels removed per step, if not as above.
        groups: with more than one, of which each has n / groups neighbouring channels, no group is ever more than one
            channel ahead of another; a step takes at most one channel of each.

    Returns:
        channels from the most to the least worth keeping `[n]`, and the relative error with the first r kept `[n + 1]`.
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
    return order, _nested_error(moment, down, order, ridge)


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
    return _tail(torch.cat(added)[None])


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


def ridge_leverage_order(moment: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Channels by ridge leverage `[C (C + lambda I)^-1]_ii`, the papers' choice (MoDeGPT).

    Returns:
        as `feed_forward_order`.
    """
    ridged = moment.clone()
    ridged.diagonal().add_(LEVERAGE_RIDGE * _scale(moment))
    order = torch.linalg.solve(ridged, moment).diagonal().argsort(descending=True)
    return order, _nested_error(moment, down, order)


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


def _scale(moment: Tensor) -> float:
    """The mean diagonal; 1 for a group that is silent, whose moment is zero."""
    return float(moment.diagonal().mean()) or 1.0


def _tail(energies: Tensor) -> Tensor:
    """Share of the energy that ranks 0..d leave out, over all heads: `[d + 1]` from `[H, d]`."""
    per_rank = energies.sum(0)
    total = per_rank.sum().clamp(min=torch.finfo(energies.dtype).tiny)
    left = torch.flip(torch.cumsum(torch.flip(per_rank, (0,)), 0), (0,)) / total
    return torch.cat([left, left.new_zeros(1)])
