"""Latency of two things that do the same, in one process, measured in pairs, with an interval and a verdict.

`exporters.latency` measures in fresh processes; its docstring says when that is needed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from exporters.machine import machine_name
from exporters.settings import LatencySettings
from slimdiff.errors import InputError

Verdict = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True)
class Gate:
    """A bound that the candidate must keep: `latency<=1.03` (its time over the baseline's) or `speedup>=1.1`."""

    metric: Literal["latency", "speedup"]
    bound: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read a gate.

        Raises:
            InputError: for anything else than `latency<=X` and `speedup>=X` with X above 0.
        """
        match = re.fullmatch(r"\s*(?:(latency)\s*<=|(speedup)\s*>=)\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*", text)
        if not match or float(match[3]) <= 0:
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


def paired_latency(
    baseline: Callable[[], Any],
    candidate: Callable[[], Any],
    settings: LatencySettings | None = None,
    *,
    gate: str | Gate | None = None,
    runtime: str = "",
    progress: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Time two functions in turn, in the order ABBA, so that what slows the machine down for a while slows both down.

    Args:
        baseline: one run; it must return when the work is done (synchronise a GPU in it).
        candidate: likewise.
        settings: rounds, warm-up, seed.
        gate: what the verdict is about; without one nothing can fail, and it is `pass`.
        runtime: what it runs in, for the result.
        progress: name of the progress bar on stderr; None: no bar.
        clock: seconds.

    Returns:
        `verdict`, `gate` (text or None), `speedup` (`median` of the pairs' ratios baseline over candidate; `low` and
        `high` bound its 95 % bootstrap interval), `baseline` and `candidate` (`median_ms`, `p90_ms`), `drift` (median
        speedup of the second half of the pairs over that of the first: far from 1, the machine was not at rest),
        `runtime`, `machine` and `rounds`.

    Raises:
        InputError: for a gate that cannot be read.
    """
    settings = settings or LatencySettings()
    wanted = Gate.parse(gate) if isinstance(gate, str) else gate
    sides = (baseline, candidate)
    for run in sides:
        for _ in range(settings.warmup):
            run()
    seconds = np.zeros((settings.rounds, 2))
    for pair in tqdm(range(settings.rounds), desc=progress, disable=progress is None, unit="pair"):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            start = clock()
            sides[side]()
            seconds[pair, side] = clock() - start
    ratios = seconds[:, 0] / seconds[:, 1]
    low, high = _interval(ratios, settings.seed)
    halves = np.array_split(ratios, 2)
    return {
        "verdict": wanted.verdict(low, high) if wanted else "pass",
        "gate": str(wanted) if wanted else None,
        "speedup": {"median": float(np.median(ratios)), "low": low, "high": high},
        "baseline": _summary(seconds[:, 0]),
        "candidate": _summary(seconds[:, 1]),
        "drift": float(np.median(halves[1]) / np.median(halves[0])),
        "runtime": runtime,
        "machine": machine_name(),
        "rounds": settings.rounds,
    }


def _interval(ratios: np.ndarray, seed: int) -> tuple[float, float]:
    from scipy.stats import bootstrap  # takes a second to import, and whoever needs a `Gate` alone does without

    if np.ptp(ratios) == 0:  # scipy calls the interval of a constant undefined
        return float(ratios[0]), float(ratios[0])
    result = bootstrap(
        (ratios,), np.median, n_resamples=4999, method="percentile", rng=np.random.default_rng(seed), vectorized=True
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _summary(seconds: np.ndarray) -> dict[str, float]:
    return {"median_ms": float(np.median(seconds) * 1e3), "p90_ms": float(np.percentile(seconds, 90) * 1e3)}
