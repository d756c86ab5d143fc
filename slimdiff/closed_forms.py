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


def value_output(moment: Tensor, output: Tensor, heads: int) -> HeadBases:
    """Per head, `G_z^1/2 W_o = U S V^T` and `v' = v G_z^-1/2 U_r`, from what `to_out` really receives.

    Args:
        moment: E[z z^T] `[H d, H d]` over all heads.
        output: weight of the output projection, `[out, H d]`.
    """
    d = moment.shape[0] // heads
    blocks = torch.stack([moment[i * d : (i + 1) * d, i * d : (i + 1) * d] for i in range(heads)])
    weight = output.T.reshape(heads, d, -1)
    root, inverse = roots(blocks)
    u, s, _ = torch.linalg.svd(root @ weight, full_matrices=False)
    if s.shape[-1] < d:  # an output narrower than a head: the remaining directions reach nothing
        u = torch.linalg.qr(torch.cat([u, torch.eye(d, dtype=u.dtype).expand(heads, d, d)], -1))[0][..., :d]
        s = torch.nn.functional.pad(s, (0, d - s.shape[-1]))
    return HeadBases(inverse @ u, inverse @ u, _tail(s.square()))


def solve_output(moment: Tensor, output: Tensor, basis: Tensor) -> Tensor:
    """Least squares for the output projection on all heads' kept coordinates at once: `(B^T G B)^+ B^T G W_o`.

    Args:
        moment: `[H d, H d]`; output: `[out, H d]`; basis: `[H, d, r]`.

    Returns:
        `[out, H r]`.
    """
    mixed = torch.block_diag(*basis)
    gram = mixed.T @ moment @ mixed
    _, inverse = roots(gram)
    return (inverse @ (inverse.T @ (mixed.T @ (moment @ output.T)))).T


def feed_forward_order(moment: Tensor, down: Tensor, block: int = 1, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Backward elimination on the output error: the optimal-brain-surgeon form.

    Removing channel i and solving the down projection again costs `|W_i|^2 / [C^-1]_ii`, with W and C^-1 updated after
    each removal. The order is nested, and one pass gives the whole error curve.

    Args:
        moment: E[h h^T] `[n, n]`; down: `[out, n]`; block: channels removed per step (1 is exact; more is faster).
        groups: with more than one, of which each has n / groups neighbouring channels, no group is ever more than one
            channel ahead of another; a step takes at most one channel of each.

    Returns:
        channels from the most to the least worth keeping `[n]`, and the relative error with the first r kept `[n + 1]`.
    """
    n = moment.shape[0]
    inverse = torch.linalg.inv(_ridged(moment))
    weight = down.T.clone()  # [n, out]
    energy = torch.einsum("io,ij,jo->", weight, moment, weight).clamp(min=torch.finfo(moment.dtype).tiny)
    alive = torch.ones(n, dtype=torch.bool)
    removed: list[int] = []
    errors = [0.0]
    while len(removed) < n:
        cost = weight.square().sum(1) / inverse.diagonal().clamp(min=torch.finfo(moment.dtype).tiny)
        gone = _cheapest(cost, alive, block, groups)
        part = torch.linalg.solve(inverse[gone][:, gone], torch.cat([inverse[gone], weight[gone]], 1))
        paid = (weight[gone] * part[:, n:]).sum()
        weight -= inverse[:, gone] @ part[:, n:]
        inverse -= inverse[:, gone] @ part[:, :n]
        alive[gone] = False
        weight[gone] = 0.0
        # The update leaves rounding residue in the removed rows; the diagonal must stay a divisor.
        inverse[gone, :] = 0.0
        inverse[:, gone] = 0.0
        inverse[gone, gone] = 1.0
        # Within a block the total is shared out evenly: only the block's end is exact.
        removed += gone.tolist()
        start = errors[-1]
        errors += [start + float(paid) * (i + 1) / len(gone) for i in range(len(gone))]
    order = torch.tensor(removed[::-1])
    curve = torch.tensor(errors[::-1], dtype=torch.float64) / energy
    return order, curve.clamp(min=0)


def _cheapest(cost: Tensor, alive: Tensor, block: int, groups: int) -> Tensor:
    """Channels to remove next: the cheapest, or the cheapest of those groups that hold most."""
    if groups == 1:
        left = alive.nonzero().flatten()
        return left[torch.topk(cost[left], min(block, len(left)), largest=False).indices]
    held = alive.reshape(groups, -1).sum(1)
    fullest = (held == held.max()).nonzero().flatten()
    best = torch.where(alive, cost, torch.inf).reshape(groups, -1)[fullest].min(1)
    picked = torch.topk(best.values, min(block, len(fullest)), largest=False).indices
    return fullest[picked] * (len(cost) // groups) + best.indices[picked]


def solve_down(moment: Tensor, down: Tensor, kept: Tensor) -> Tensor:
    """The down projection on the kept channels: `(C_SS + eps I)^-1 C_S: W_down`, `[out, r]`."""
    ridged = _ridged(moment)
    return torch.linalg.solve(ridged[kept][:, kept], ridged[kept] @ down.T).T


def _ridged(moment: Tensor) -> Tensor:
    ridge = RIDGE * moment.diagonal().mean().clamp(min=torch.finfo(moment.dtype).tiny)
    return moment + ridge * torch.eye(len(moment), dtype=moment.dtype)


def _tail(energies: Tensor) -> Tensor:
    """Share of the energy that ranks 0..d leave out, over all heads: `[d + 1]` from `[H, d]`."""
    per_rank = energies.sum(0)
    total = per_rank.sum().clamp(min=torch.finfo(energies.dtype).tiny)
    left = torch.flip(torch.cumsum(torch.flip(per_rank, (0,)), 0), (0,)) / total
    return torch.cat([left, left.new_zeros(1)])
