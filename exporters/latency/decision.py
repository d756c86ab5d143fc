"""When enough process pairs have been measured, and what they say.

The log ratios of the pairs are independent draws, so their mean has Student's t-interval. A bootstrap was not taken:
its percentile interval lies within the range of the pairs, and the truth is outside the range of six in one case of 32,
whatever level is asked for. Looking at the interval after every pair and stopping at the first one that convinces would
find something sooner or later in pure noise. So there are five *looks*, after numbers of pairs fixed beforehand, and
each look's interval is as much wider as makes all five right at once with 95 %: the looks' chances of error add up to
5 % (the union bound, two-sided), however their outcomes hang together. Such *repeated confidence intervals* (Jennison &
Turnbull, Interim Analyses: The Repeated Confidence Interval Approach, JRSS-B 51, 1989) stay valid whatever rule stops
the measurement, running out of time included, since no look is used twice. Always-valid bounds that may be looked at
after every pair were not taken: with an unknown variance and pairs that cost seconds each, they are far wider at these
sizes. Pocock's constants, which count on the looks' correlation, would be 2 to 7 % narrower at the last three looks.

What a verdict means, for a gate on latency <= 1 + tolerance:

- *pass*: the whole interval lies within the bound. The candidate is shown not to be slower than allowed
  (non-inferiority); that it is as fast is not said.
- *fail*: the whole interval lies beyond it. The candidate is shown to be slower than allowed.
- *inconclusive*: the bound is inside the interval when the looks or the seconds are used up.

A candidate that sits exactly on the bound fails, or passes, with a chance of at most 2.5 %; one that is as fast as the
baseline fails far less often.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from slimdiff.errors import InputError

Verdict = Literal["pass", "fail", "inconclusive"]

ERROR = 0.05
"""Chance, at most, that the truth is outside the interval of any look."""


@dataclass(frozen=True)
class Gate:
    """A bound that the candidate must keep: `latency<=1.03` (its time over the baseline's) or `speedup>=1.1`."""

    metric: Literal["latency", "speedup"]
    bound: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read a gate.

        Raises:
            InputError: for anything else than `latency<=X` and `speedup>=X` with X above 0, and at most 1000.
        """
        match = re.fullmatch(r"\s*(?:(latency)\s*<=|(speedup)\s*>=)\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*", text)
        if not match or not 0 < float(match[3]) <= 1000:
            raise InputError(f"a gate is like latency<=1.03 or speedup>=1.1, not {text!r}")
        return cls("latency" if match[1] else "speedup", float(match[3]))

    def __str__(self) -> str:
        return f"{self.metric}{'<=' if self.metric == 'latency' else '>='}{self.bound:g}"

    def verdict(self, low: float, high: float) -> Verdict:
        """Where the interval `[low, high]` of the speedup (baseline over candidate) lies: pass, fail, or neither."""
        needed = self.bound if self.metric == "speedup" else 1 / self.bound
        if low >= needed:
            return "pass"
        return "fail" if high < needed else "inconclusive"


@dataclass(frozen=True)
class Look:
    """A time at which the pairs so far are judged."""

    pairs: int
    error: float
    """This look's share of `ERROR`, two-sided."""


LOOKS = (Look(6, 0.006), Look(9, 0.008), Look(13, 0.010), Look(19, 0.012), Look(28, 0.014))
"""Half as many pairs again each time. More error is left to later looks, where hard cases are decided."""


@dataclass(frozen=True)
class Interval:
    """Of a speedup: baseline's time over candidate's."""

    low: float
    median: float
    """Of the pairs' speedups."""
    high: float


def interval(log_ratios: Sequence[float], error: float) -> Interval:
    """Student's interval of the speedup.

    Args:
        log_ratios: log(candidate's time / baseline's) of at least two process pairs.
        error: chance that the truth is outside, both sides together.
    """
    values = -np.asarray(log_ratios, dtype=float)
    half = float(stdtrit(len(values) - 1, 1 - error / 2) * values.std(ddof=1) / np.sqrt(len(values)))
    mean = float(values.mean())
    low, high = mean - half, mean + half
    # Few and skewed pairs can have their median outside an interval of the mean: it is then drawn to the nearest end.
    return Interval(exp(low), exp(float(np.clip(np.median(values), low, high))), exp(high))
