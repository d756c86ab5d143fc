"""95 % intervals of means, of their difference over the same prompts, and of distances of sets: bootstraps, seeded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 9999
"""Of means."""
SET_RESAMPLES = 200
"""Of sets, whose distances take longer."""
_SEED = 0
Interval = list[float] | None
"""Low and high; None where there is but one image."""


def of_mean(values: Sequence[float], transform: Callable[[float], float] = float) -> Interval:
    """Of the mean of a value per image, through a monotonous function."""
    ends = _percentiles((values,), lambda x, axis=-1: np.mean(x, axis=axis))
    return None if ends is None else sorted(transform(end) for end in ends)


def of_difference(dense: Sequence[float], slim: Sequence[float]) -> Interval:
    """Of mean(slim) - mean(dense), where the images of one prompt and seed are drawn together."""
    return _percentiles((dense, slim), lambda x, y, axis=-1: np.mean(y - x, axis=axis))


def _percentiles(data: tuple[Sequence[float], ...], statistic: Callable[..., Any]) -> Interval:
    if len(data[0]) < 2:
        return None
    arrays = tuple(np.asarray(values, dtype=np.float64) for values in data)
    found = bootstrap(
        arrays,
        statistic,
        paired=True,
        vectorized=True,
        method="percentile",  # defined where all values are equal, too
        n_resamples=RESAMPLES,
        batch=max(1, 10**7 // len(arrays[0])),
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return [float(found.low), float(found.high)]


def of_distances(
    count: int, distances: Callable[[np.ndarray], Sequence[float]], estimates: Sequence[float]
) -> list[list[float]]:
    """Of distances of sets of `count` images, where the images of one prompt and seed are drawn together.

    A resample holds images twice, which alone moves such a distance. So the resamples' distances are centred on the
    estimate.

    Args:
        distances: of the sets with the images of these numbers.
        estimates: the same of the sets themselves.
    """
    draws = np.random.default_rng(_SEED).integers(count, size=(SET_RESAMPLES, count))
    values = np.array([distances(draw) for draw in draws])
    low, high = np.percentile(values - values.mean(0), (2.5, 97.5), axis=0)
    return [[min(value, value + a), max(value, value + b)] for value, a, b in zip(estimates, low, high, strict=True)]
