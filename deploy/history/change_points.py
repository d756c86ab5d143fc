"""Where a series of measurements moved to another level, and stayed there.

The segmentation is ruptures' (BSD-2-Clause; Truong, Oudre & Vayatis, Selective review of offline change point detection
methods, Signal Processing 167, 2020): PELT, the exact optimum of squared error plus a penalty per change. Apache Otava,
which is made for this very purpose, pins numpy 2.2 and cannot live beside the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slimdiff.errors import require

LEAST = 3
"""Results that make a level: one outlier, or two, are none."""
PENALTY = 6.0
"""Per change, in units of variance times log(length). BIC has 2, for noise of known size. With 6, and the noise taken
from the series, 2 of 100 simulated series without a change showed one, 3 of 100 with an outlier of six deviations."""


def change_points(values: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Indices of the first value of every level but the first.

    The noise is estimated from the differences of neighbours, which a change of level hardly touches; where they are by
    chance smaller than the measurements' own errors, from these.

    Args:
        values: positive, by time; it is their logarithms that are looked at.
        errors: standard errors of these logarithms.

    Raises:
        MissingPackageError: without ruptures.
    """
    if len(values) < 2 * LEAST:
        return []
    ruptures = require("ruptures", "history")
    logs = np.log(np.asarray(values, dtype=float))
    # Three quarters of normal differences are within 1.1503 of their standard deviations, the noise's times root two.
    noise = float(np.quantile(np.abs(np.diff(logs)), 0.75)) / 1.1503 / 2**0.5
    noise = max(noise, float(np.median(errors)), 1e-6)  # equal values differ by rounding
    search = ruptures.Pelt(model="l2", min_size=LEAST, jump=1).fit(logs.reshape(-1, 1))
    return [int(i) for i in search.predict(pen=PENALTY * noise**2 * np.log(len(logs)))[:-1]]
