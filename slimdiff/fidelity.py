"""How close a slim model is to its dense one: noise prediction on the dense trajectory, and finished images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter
from torch import Tensor
from tqdm import tqdm

from slimdiff.denoising.trajectory import Call
from slimdiff.errors import InputError


def noise_error(
    dense: Callable[[Call], Tensor], slim: Callable[[Call], Tensor], calls: Sequence[Call], progress: str | None = None
) -> dict[str, Any]:
    """Relative mean squared change of the noise prediction, sum |slim - dense|^2 / sum |dense|^2, over recorded calls.

    Args:
        dense, slim: predict for one call, `[B, C, H, W]`.

    Returns:
        `relative_mse` over all calls, and `by_timestep` as `[[t, value], ...]`, falling in t.
    """
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for call in tqdm(calls, desc=progress, disable=progress is None, unit="call"):
        expected = dense(call).double()
        difference = slim(call).double() - expected
        sums[call.timestep][0] += float(difference.square().sum())
        sums[call.timestep][1] += float(expected.square().sum())
    total = [sum(s[0] for s in sums.values()), sum(s[1] for s in sums.values())]
    by_timestep = [[t, sums[t][0] / sums[t][1]] for t in sorted(sums, reverse=True)]
    return {"relative_mse": total[0] / total[1], "by_timestep": by_timestep}


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images, in dB; infinite if they are equal."""
    mse = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if mse == 0 else 10 * float(np.log10(255**2 / mse))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity of uint8 images `[H, W, C]` (Wang et al. 2004: sigma 1.5, K 0.01 and 0.03)."""
    x, y = a.astype(np.float64), b.astype(np.float64)

    def blur(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, sigma=(1.5, 1.5, 0), truncate=3.5)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(score.mean())


def image_fidelity(reference: Sequence[Any], images: Sequence[Any]) -> dict[str, Any]:
    """PSNR over all pixels together (so that one equal pair does not make it infinite), mean SSIM, and the count.

    Args:
        reference, images: PIL images, pairwise of equal size.

    Raises:
        InputError: if the counts or sizes differ.
    """
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(reference, images, strict=False)]
    if len(reference) != len(images) or any(a.shape != b.shape for a, b in pairs):
        raise InputError(
            "the two sets of images differ in number or size: make them from the same prompts and settings"
        )
    together = psnr_db(np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs]))
    return {"psnr_db": together, "ssim": float(np.mean([ssim(a, b) for a, b in pairs])), "count": len(pairs)}
