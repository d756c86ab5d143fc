"""Distances of two sets of images by the features of a network, float64 `[N, D]`.

Each set is summed up once, so that a set of real images is not gone through again for every resample of the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 1024
"""Of a kernel matrix, held at a time."""


@dataclass(frozen=True)
class Moments:
    """Of a set of features: `mean [D]`, and `factor [R, D]`, whose Gram matrix is the unbiased covariance."""

    mean: Tensor
    factor: Tensor


def moments(features: Tensor) -> Moments:
    """The mean and covariance of at least two rows."""
    mean = features.mean(0)
    factor = (features - mean) / (len(features) - 1) ** 0.5
    if len(factor) > factor.shape[1]:
        factor = torch.linalg.qr(factor, mode="r").R
    return Moments(mean, factor)


def frechet(one: Moments, other: Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, equation 6), the FID on Inception's features.

    With S = F'F the trace of the root is the sum of the singular values of F1 F2', which is exact for fewer images
    than features too, where the eigenvalues of S1 S2 are lost in rounding.
    """
    root = torch.linalg.svdvals(one.factor @ other.factor.T).sum()
    variances = one.factor.square().sum() + other.factor.square().sum()
    return max(0.0, float((one.mean - other.mean).square().sum() + variances - 2 * root))


@dataclass(frozen=True)
class KernelSums:
    """Of a set of features, and the mean of the kernel over its pairs of two images."""

    features: Tensor
    within: float


def kernel_sums(features: Tensor) -> KernelSums:
    """The mean of the kernel over pairs of two of at least two rows."""
    count = len(features)
    diagonal = float((features.square().sum(1) / features.shape[1] + 1).pow(3).sum())
    return KernelSums(features, (_total(features, features) - diagonal) / (count * (count - 1)))


def kernel_distance(one: KernelSums, other: KernelSums) -> float:
    """The unbiased squared maximum mean discrepancy (Binkowski et al. 2018), the KID, over all images rather than
    random subsets of them, whose mean it is. It may be below zero."""
    between = _total(one.features, other.features) / (len(one.features) * len(other.features))
    return one.within + other.within - 2 * between


def _total(one: Tensor, other: Tensor) -> float:
    """The sum of (x.y / D + 1)^3 over all pairs."""
    from torchmetrics.image.kid import poly_kernel

    return sum(float(poly_kernel(rows, other).sum()) for rows in one.split(_ROWS))
