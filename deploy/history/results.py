"""Results of `slimdiff bench` over time: one line of JSON each, in a file that only grows.

A result is appended under the operating system's lock on the file, so that two processes do not mix their lines, and
is on the disk when `append` returns. What does not fit there is taken back. Whoever reads it leaves out lines that are
not whole (a killed machine), and says how many.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from io import FileIO
from itertools import pairwise
from math import log
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deploy.artifacts.build_folder import strict
from deploy.history.change_points import change_points
from slimdiff.errors import InputError
from slimdiff.storage.lock import wait_for

SCHEMA = 1
Trend = Literal["ratio", "milliseconds"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")  # what later versions add is theirs


class Speedup(_Part):
    """Baseline's time over the candidate's, with its interval."""

    median: float = Field(gt=0)
    low: float = Field(gt=0)
    high: float = Field(gt=0)


class Side(_Part):
    """What was timed."""

    name: str
    median_ms: float = Field(gt=0)


class Runtimes(_Part):
    """What it ran in."""

    baseline: str
    candidate: str


class Fingerprint(_Part):
    """Which machine it was; see `exporters.machine.fingerprint`."""

    id: str


class Entry(_Part):
    """One result, as far as a trend needs it."""

    schema_: Literal[1] = Field(alias="schema")
    time: datetime
    label: str = ""
    verdict: Literal["pass", "fail", "inconclusive"]
    gate: str | None
    speedup: Speedup
    baseline: Side
    candidate: Side
    runtimes: Runtimes
    threads: int
    machine: str
    fingerprint: Fingerprint

    @property
    def title(self) -> str:
        """The label, or else the time."""
        return self.label or self.time.strftime("%Y-%m-%d %H:%M")

    @property
    def error(self) -> float:
        """Standard error of the ratio's logarithm, about: the interval is some 2.5 of it to either side."""
        return log(self.speedup.high / self.speedup.low) / 5

    def value(self, trend: Trend) -> float:
        """Candidate's time over the baseline's, or the candidate's milliseconds."""
        return 1 / self.speedup.median if trend == "ratio" else self.candidate.median_ms


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
    """Results that may be compared: the same two names, runtimes and threads, on the same machine."""

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
    with _opened(file) as stream:
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


@contextmanager
def _opened(file: Path) -> Iterator[FileIO]:
    """The file to be read and appended to, made if it is not there; a failure is one line."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+", buffering=0) as stream:
            yield stream
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
        entries: by time.
        trend: the figure that is followed.
        across_machines: compare what different machines measured. Their ratios may differ as much as their times do.
        last: leave out all but so many of each.

    Raises:
        MissingPackageError: without ruptures, which finds the levels.
    """
    found: dict[tuple[Any, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        machine = None if across_machines else entry.fingerprint.id
        names, runtimes = (entry.baseline.name, entry.candidate.name), tuple(vars(entry.runtimes).values())
        found[(*names, *runtimes, entry.threads, machine)].append(entry)
    series = []
    for group in found.values():
        kept = group[-last:] if last else group
        machines = dict.fromkeys(entry.machine for entry in kept)
        runtime = " against ".join(dict.fromkeys((kept[-1].runtimes.baseline, kept[-1].runtimes.candidate)))
        names = kept[-1].baseline.name, kept[-1].candidate.name
        series.append(Series(*names, runtime, " and ".join(machines), kept, trend, _levels(kept, trend)))
    return series


def _levels(entries: Sequence[Entry], trend: Trend) -> list[Level]:
    values = [entry.value(trend) for entry in entries]
    starts = [0, *change_points(values, [entry.error for entry in entries]), len(values)]
    return [Level(start, end, median(values[start:end])) for start, end in pairwise(starts)]
