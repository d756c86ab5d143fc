"""How much each timestep of a trajectory counts in the statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from slimdiff.errors import InputError
from slimdiff.settings import TimestepWeights

# gamma of Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (arXiv 2303.09556).
MIN_SNR = 5.0


def timestep_weigher(kind: TimestepWeights, scheduler: Any) -> Callable[[float], float]:
    """Weight of a timestep, from the scheduler's signal-to-noise ratio `SNR = a / (1 - a)`, a its `alphas_cumprod`.

    `min_snr` is `min(SNR, 5) / SNR` (arXiv 2303.09556, for noise prediction); `inverse_snr` is `1 / SNR`. Both are
    divided by their mean over the timesteps of the scheduler's training.

    Raises:
        InputError: if the scheduler does not say how noisy a timestep is.
    """
    if kind == "uniform":
        return lambda _time: 1.0
    alphas = getattr(scheduler, "alphas_cumprod", None)
    continuous = getattr(getattr(scheduler, "config", {}), "timestep_type", "discrete") == "continuous"
    if alphas is None or continuous:
        raise InputError(
            f"timestep_weights: {kind} needs a scheduler with alphas_cumprod and whole timesteps, which "
            f"{type(scheduler).__name__} is not: use uniform"
        )
    alphas = torch.as_tensor(alphas).double().cpu()
    ratio = (alphas / (1 - alphas).clamp(min=1e-12)).clamp(min=1e-12)
    weights = ratio.clamp(max=MIN_SNR) / ratio if kind == "min_snr" else 1 / ratio
    weights = weights / weights.mean()
    return lambda time: float(weights[min(max(round(time), 0), len(weights) - 1)])
