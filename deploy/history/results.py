"""Results of `slimdiff bench` over time: one line of JSON each, in a file that only grows.

A result is appended under the operating system's lock on the file, so that two processes do not mix their lines, and
is on the disk when `append` returns. What does not fit there is taken back. Whoever reads it leaves out lines that are
not whole (a killed machine), and says how many.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from io import FileIO
from itertools import pairwise
from math import log
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import AliasPath, BaseModel, Field, ValidationError

from deploy.artifacts.build_folder import strict
from deploy.history.change_points import change_points
from slimdiff.errors import InputError
from slimdiff.storage.lock import wait_for

SCHEMA = 1
Trend = Literal["ratio", "milliseconds"]


class Entry(BaseModel):
    """One result of `exporters.latency.measure.bench`, as far as a trend needs it; other keys pass."""

    schema_: Literal[1] = Field(alias="schema")
    time: datetime
    label: str = ""
    verdict: Literal["pass", "fail", "inconclusive"]
    gate: str | None
    speedup: float = Field(gt=0, validation_alias=AliasPath("speedup", "median"))
    """Baseline's time over the candidate's, from `low` to `high`."""
    low: float = Field(gt=0, validation_alias=AliasPath("speedup", "low"))
    high: float = Field(gt=0, validation_alias=AliasPath("speedup", "high"))
    baseline: str = Field(validation_alias=AliasPath("baseline", "name"))
    candidate: str = Field(validation_alias=AliasPath("candidate", "name"))
    milliseconds: float = Field(gt=0, validation_alias=AliasPath("candidate", "median_ms"))
    runtime: str = Field(validation_alias=AliasPath("runtimes", "candidate"))
    base_runtime: str = Field(validation_alias=AliasPath("runtimes", "baseline"))
    of: Literal["call", "image"] = "call"
    """What was timed; results of before say nothing, and are of calls."""
    threads: int
    machine: str
    machine_id: str = Field(validation_alias=AliasPath("fingerprint", "id"))
    """Tells two machines apart (`exporters.machine.fingerprint`)."""

    @property
    def title(self) -> str:
        """The label, or else the time."""
        return self.label or self.time.strftime("%Y-%m-%d %H:%M")

    @property
    def error(self) -> float:
        """Standard error of the ratio's logarithm, about: the interval is some 2.5 of it to either side."""
        return log(self.high / self.low) / 5

    def value(self, trend: Trend) -> float:
        """Candidate's time over the baseline's, or the candidate's milliseconds."""
        return 1 / self.speedup if trend == "ratio" else self.milliseconds

    def bounds(self, trend: Trend) -> tuple[float, float]:
        """The interval of `value`; milliseconds have none."""
        return (1 / self.high, 1 / self.low) if trend == "ratio" else (self.milliseconds, self.milliseconds)


@dataclass(frozen=True)
class Level:
    """Results, one after the other, between which nothing changed."""

    start: int
    end: int
    """Index after the last."""
    value: float
    """Their median."""


@dataclass(frozen=True)
class Series:
    """Results that may be compared: of the same kind, the same two names, runtimes and threads, on the same machine."""

    baseline: str
    candidate: str
    runtime: str
    machine: str
    entries: list[Entry]
    trend: Trend
    levels: list[Level]

    @property
    def creep(self) -> float:
        """The level now over the lowest that there was: 1.06 is 6 % slower."""
        return self.levels[-1].value / min(level.value for level in self.levels)


def append(file: Path, result: Mapping[str, Any], label: str = "") -> None:
    """Add a result of `exporters.latency.measure.bench` to a history, which is made if it is not there.

    Raises:
        InputError: if the file cannot be written; then it is as it was.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    line = json.dumps(strict({"schema": SCHEMA, "time": now, "label": label, **result}), allow_nan=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+", buffering=0) as stream:
            held = wait_for(stream)
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, end - 1))
            torn = stream.read() not in (b"", b"\n")  # else that line would swallow this one
            try:
                _write(stream, (("\n" if torn else "") + line + "\n").encode())
            except OSError:
                if held:
                    stream.truncate(end)
                raise
    except OSError as error:
        raise InputError(
            f"--history {file} cannot be written ({error.strerror}): name a file that can be, or make room"
        ) from error


def _write(stream: FileIO, data: bytes) -> None:
    while data:
        data = data[stream.write(data) :]  # a disk that is almost full takes the first part alone
    os.fsync(stream.fileno())


def read(file: Path) -> tuple[list[Entry], int]:
    """The results of a history by time, and how many lines were no results.

    Raises:
        InputError: if there is no such file, or no result in it.
    """
    if not file.is_file():
        raise InputError(f"there is no history {file}: slimdiff bench BASE CANDIDATE --history {file} begins one")
    entries, skipped = [], 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entries.append(Entry.model_validate_json(line))
        except ValidationError:
            skipped += bool(line.strip())
    if not entries:
        raise InputError(f"{file} holds no results: it is not a history that slimdiff bench wrote")
    return sorted(entries, key=lambda entry: entry.time), skipped


def all_series(
    entries: Sequence[Entry], trend: Trend = "ratio", *, across_machines: bool = False, last: int | None = None
) -> list[Series]:
    """Entries that may be compared, with the levels that they were at.

    Args:
        trend: the figure that is followed.
        across_machines: compare what different machines measured. Their ratios may differ as much as their times do.
        last: keep only this many of each.

    Raises:
        MissingPackageError: without ruptures, which finds the levels.
    """
    alike: dict[tuple[Any, ...], list[Entry]] = defaultdict(list)
    for e in entries:
        machine = None if across_machines else e.machine_id
        alike[e.baseline, e.candidate, e.of, e.base_runtime, e.runtime, e.threads, machine].append(e)
    series = []
    for group in alike.values():
        kept = group[-last:] if last else group
        machines = " and ".join(dict.fromkeys(entry.machine for entry in kept))
        newest = kept[-1]
        runtime = " against ".join(dict.fromkeys((newest.base_runtime, newest.runtime)))
        levels = _levels(kept, trend)
        series.append(Series(newest.baseline, newest.candidate, runtime, machines, kept, trend, levels))
    return series


def _levels(entries: Sequence[Entry], trend: Trend) -> list[Level]:
    values = [entry.value(trend) for entry in entries]
    starts = [0, *change_points(values, [entry.error for entry in entries]), len(values)]
    return [Level(start, end, median(values[start:end])) for start, end in pairwise(starts)]
