"""Latency of a candidate against a baseline in process pairs, until there is a verdict or the time is used up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from exporters.graphs.int8 import check_int8
from exporters.latency.decision import ERROR, LOOKS, Gate, Interval, Look, Verdict, interval
from exporters.latency.pair import FEW, Job, PairTimes, SideTimes, measure_pair
from exporters.machine import fingerprint, machine_name
from exporters.settings import BenchSettings
from slimdiff.progress import bar

PREEMPTED = 0.2
"""Share of runs that lost their core, above which the result says so."""


@dataclass(frozen=True)
class Judged:
    """What the pairs so far say."""

    verdict: Verdict
    speedup: Interval
    error: float
    """Chance that the truth is outside `speedup`."""


def bench(
    baseline: Job,
    candidate: Job,
    settings: BenchSettings | None = None,
    *,
    gate: Gate | None = None,
) -> dict[str, Any]:
    """Measure process pairs until a gate's verdict is certain; see `exporters.latency.decision` for what it means.

    Args:
        baseline: what the candidate, which takes the same inputs, is held against.
        gate: what the verdict is about; without one nothing can fail, and it is `pass`.

    Returns:
        `verdict`, `gate` (text or None), `speedup` (`median` of the pairs' speedups, baseline over candidate; `low` and
        `high` bound its interval, of 95 % or more), `cpu_speedup` (the same of CPU time), `baseline` and `candidate`
        (`summary`'s keys with `name`), `runtime` and `runtimes`, `machine` and `fingerprint`, `threads`, `batch`,
        `process_pairs`, `log_ratios` of each, `scatter` (their standard deviation), `confidence` (of the interval),
        `seconds`, and `hints` for people.

    Raises:
        InputError, MissingPackageError, SlimdiffError: `measure_pair`'s.
    """
    settings = settings or BenchSettings()
    for job in (baseline, candidate):
        if job.row.takes != "model":
            check_int8(job.path, job.row)
    start = time.perf_counter()
    turn = partial(measure_pair, baseline, candidate, settings)
    pairs, judged = sample(turn, settings, gate, time.perf_counter)
    cpu = interval([pair.cpu_log_ratio for pair in pairs], judged.error)
    log_ratios = [pair.log_ratio for pair in pairs]
    sides = [summary([pair.sides[side] for pair in pairs]) for side in (0, 1)]
    titles = dict.fromkeys(side.title for side in pairs[0].sides)
    return {
        "verdict": judged.verdict,
        "gate": str(gate) if gate else None,
        "speedup": vars(judged.speedup),
        "cpu_speedup": vars(cpu),
        "baseline": {"name": baseline.name, **sides[0]},
        "candidate": {"name": candidate.name, **sides[1]},
        "runtime": " against ".join(titles),
        "runtimes": {"baseline": baseline.runtime, "candidate": candidate.runtime},
        "machine": machine_name(),
        "fingerprint": fingerprint(),
        "threads": settings.threads,
        "batch": settings.batch,
        "process_pairs": len(pairs),
        "log_ratios": [round(value, 6) for value in log_ratios],
        "scatter": stdev(log_ratios),
        "confidence": 1 - judged.error,
        "seconds": round(time.perf_counter() - start, 2),
        "hints": hints(judged, cpu, pairs, gate),
    }


def sample(
    turn: Callable[..., PairTimes],
    settings: BenchSettings,
    gate: Gate | None,
    clock: Callable[[], float],
) -> tuple[list[PairTimes], Judged]:
    """Measure pairs, look by look, until the gate's verdict is certain or the time is used up.

    Args:
        turn: measures a pair; `first` says which side goes first.
        clock: seconds.
    """
    fixed = settings.processes or (None if gate else LOOKS[0].pairs)
    start = clock()
    pairs: list[PairTimes] = []
    with bar(name="bench", unit="pair") as shown:
        for look in (Look(fixed, ERROR),) if fixed else LOOKS:
            while len(pairs) < look.pairs:
                spent = clock() - start
                if len(pairs) >= 2 and spent + spent / len(pairs) > settings.max_seconds:
                    break
                pairs.append(turn(first=len(pairs) % 2))
                shown.update()
            speedup = interval([pair.log_ratio for pair in pairs], look.error)
            verdict = gate.verdict(speedup.low, speedup.high) if gate else "pass"
            judged = Judged(verdict, speedup, look.error)
            if verdict != "inconclusive" or len(pairs) < look.pairs:
                break
    return pairs, judged


def summary(sides: Sequence[SideTimes]) -> dict[str, Any]:
    """One side over all processes.

    Returns:
        `median_ms`, `p50_ms` (the same), `p90_ms`, `p95_ms`, `p99_ms` and `calls_per_second` (one after the other)
        over all runs; `load_ms`, `first_run_ms` and `peak_memory_bytes` (None where the system does not tell),
        medians over processes; `runs` and `preempted`, the share of them that lost their core; `schedule` that images
        were made by, None without one.
    """
    runs = np.concatenate([side.wall_ms for side in sides])
    peaks = [side.peak_memory_bytes for side in sides if side.peak_memory_bytes is not None]
    return {
        "median_ms": float(np.median(runs)),
        **{f"p{share}_ms": float(np.percentile(runs, share)) for share in (50, 90, 95, 99)},
        "calls_per_second": float(1e3 / runs.mean()),
        "load_ms": median(side.load_ms for side in sides),
        "first_run_ms": median(side.first_run_ms for side in sides),
        "peak_memory_bytes": int(median(peaks)) if peaks else None,
        "runs": len(runs),
        "preempted": sum(side.preempted for side in sides) / len(runs),
        "schedule": sides[0].schedule,
    }


def hints(judged: Judged, cpu: Interval, pairs: Sequence[PairTimes], gate: Gate | None) -> list[str]:
    """What people should know before they believe the verdict, or when there is none."""
    said = []
    by_cpu = gate.verdict(cpu.low, cpu.high) if gate else judged.verdict
    if {by_cpu, judged.verdict} == {"pass", "fail"} or cpu.low > judged.speedup.high or cpu.high < judged.speedup.low:
        said.append(
            f"by CPU time the speedup is {cpu.median:.3f}x ({cpu.low:.3f} to {cpu.high:.3f}): the rest of the "
            "difference is waiting, for threads, a device, or other work on this machine"
        )
    lost = fmean(side.preempted / len(side.wall_ms) for pair in pairs for side in pair.sides)
    if lost > PREEMPTED:
        said.append(
            f"{lost:.0%} of the runs lost their core to other work: the machine was busy, and times in ms are "
            "longer for it. The speedup is of the rounds that kept their core; where a pair of processes has fewer "
            f"than {FEW}, it is of all rounds, in which both models waited, and its interval is wider"
        )
    if judged.verdict == "inconclusive" and gate is not None:
        needed = np.log(gate.bound if gate.metric == "speedup" else 1 / gate.bound)
        speedups = [-pair.log_ratio for pair in pairs]
        gap, scatter = abs(fmean(speedups) - needed), stdev(speedups)
        said.append(
            f"{len(pairs)} process pairs scatter by {scatter:.1%}, and their mean is {gap:.1%} from the bound: "
            + ("give it more --max-seconds or a quieter machine" if gap > scatter / 4 else "it sits on the bound")
        )
    return said
