"""Low rank: the bases in head space whose output is closest over the calibrated activations.

Weights are given as `nn.Linear` stores them, `[out, in]`. All computation is float64 on the CPU.
Sources: SlimDiff (arXiv 2509.21498), MoDeGPT (arXiv 2408.09632); the forms in head space are derived in the docstrings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Text moments are singular (77 padded tokens): directions below this share of the largest eigenvalue carry nothing.
CUTOFF = 1e-10


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
    return HeadBases(inverse_q @ u * half, inverse_k @ vt.mT * half, tail_of(s.square()))


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
    return HeadBases(basis, basis, tail_of(s.square()))


def shared_values(paths: Sequence[tuple[Tensor, Tensor, float]]) -> HeadBases:
    """Per head, one basis of values that are read on several paths: streams of tokens, or query heads of one group.

    Alone, a path p with moment G and output W loses least on the eigenvectors of `G W W^T G` in the metric of G
    (`value_output`). Of several the sum has no closed form; with moments that differ by a factor alone, `G = a S`, it
    has, and that is taken: the eigenvectors of `sum a S W W^T S` in the metric of the mean S, each path's own S.

    Args:
        paths: of each: moments `[H, d, d]`, the outputs' weights `[H, d, out]`, and how many tokens take it.
    """
    d = paths[0][0].shape[-1]
    energies = torch.zeros(len(paths[0][0]), d, d, dtype=torch.float64)
    metric = torch.zeros_like(energies)
    for moments, weights, tokens in paths:
        scale = moments.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(moments.dtype).tiny)[:, None, None]
        shape = moments / scale
        read = shape @ weights
        energies += tokens * scale * (read @ read.mT)
        metric += shape / len(paths)
    _, inverse = roots(metric)
    values, vectors = torch.linalg.eigh(inverse.mT @ energies @ inverse)
    basis = torch.linalg.qr(inverse @ vectors.flip(-1)).Q
    return HeadBases(basis, basis, tail_of(values.flip(-1).clamp(min=0)))


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


def tail_of(energies: Tensor) -> Tensor:
    """Share of the energy that ranks 0..d leave out, over all heads: `[d + 1]` from `[H, d]`."""
    per_rank = energies.sum(0)
    total = per_rank.sum().clamp(min=torch.finfo(energies.dtype).tiny)
    left = torch.flip(torch.cumsum(torch.flip(per_rank, (0,)), 0), (0,)) / total
    return torch.cat([left, left.new_zeros(1)])
