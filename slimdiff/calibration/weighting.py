"""How much each timestep of a trajectory counts in the statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from slimdiff.errors import InputError
from slimdiff.settings import TimestepWeights

# gamma of Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (arXiv 2303.09556).
MIN_SNR = 5.0

LEAST_SNR = 1e-6
"""Below it, a timestep has no signal. Of usual schedulers the least is 5e-3."""


def timestep_weigher(kind: TimestepWeights, scheduler: Any) -> Callable[[float], float]:
    """Weight of a timestep, from the scheduler's signal-to-noise ratio `SNR = a / (1 - a)`, a its `alphas_cumprod`.

    `min_snr` is `min(SNR, 5) / SNR` (arXiv 2303.09556, for noise prediction); `inverse_snr` is `1 / SNR`. Both are
    divided by their mean over the timesteps of the scheduler's training, and interpolated between those.

    Raises:
        InputError: if the scheduler does not say how noisy a timestep is, or, for `inverse_snr`, has one almost without
            signal, which would outweigh all others. The weigher raises it for a time that training did not have.
    """
    if kind == "uniform":
        return lambda _time: 1.0
    alphas = getattr(scheduler, "alphas_cumprod", None)
    config = dict(getattr(scheduler, "config", {}))
    other = config.get("timestep_type") == "continuous" or config.get("use_flow_sigmas")
    if alphas is None or other or config.get("prediction_type") == "flow_prediction":
        raise InputError(
            f"timestep_weights: {kind} needs a scheduler whose timesteps are those of its alphas_cumprod, which "
            f"{type(scheduler).__name__}'s are not: use uniform"
        )
    alphas = torch.as_tensor(alphas).double().cpu()
    ratio = (alphas / (1 - alphas).clamp(min=1e-12)).clamp(min=1e-12)
    if kind == "inverse_snr" and float(ratio.min()) < LEAST_SNR:
        raise InputError(
            f"timestep_weights: inverse_snr weighs one timestep alone: the least SNR of {type(scheduler).__name__} is "
            f"{float(ratio.min()):.1g}: use min_snr or uniform"
        )
    weights = ratio.clamp(max=MIN_SNR) / ratio if kind == "min_snr" else 1 / ratio
    table = (weights / weights.mean()).numpy()
    last = len(table) - 1

    def weigh(time: float) -> float:
        if not -0.5 <= time < last + 1.5:
            raise InputError(
                f"timestep_weights: {kind} knows {type(scheduler).__name__}'s timesteps from 0 to {last}, and the "
                f"denoiser was called at {time:g}: use uniform"
            )
        return float(np.interp(time, range(last + 1), table))

    return weigh
