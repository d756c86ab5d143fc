"""Sites that do not fit into memory together take turns; what is done of a turn is recorded, and gone on with."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from slimdiff.errors import InputError
from slimdiff.groups import GROUPS
from slimdiff.groups.group import Site
from slimdiff.settings import StatisticsSettings
from slimdiff.statistics import Statistics, read_metadata

# Seconds between records of an unfinished calibration, and how many times longer than writing one that must be.
RECORD_EVERY = 60.0
RECORD_SHARE = 20


def split_into_turns(sites: Sequence[Site], settings: StatisticsSettings) -> list[list[Site]]:
    """Sites in as few groups as the memory limit allows, in the model's order and of about the same size.

    A site that needs more than the limit makes a group of its own.
    """
    needs = [GROUPS[site.group].moment_bytes(site) for site in sites]

    def filled(limit: float) -> list[list[Site]]:
        groups: list[list[Site]] = [[]]
        used = 0
        for site, need in zip(sites, needs, strict=True):
            if groups[-1] and used + need > limit:
                groups.append([])
                used = 0
            groups[-1].append(site)
            used += need
        return groups

    limit = settings.memory_limit * 2**30
    fewest = len(filled(limit))
    even = sum(needs) / fewest
    while even < limit and len(filled(even)) > fewest:
        even *= 1.02
    return filled(min(even, limit))


class Records:
    """Files of what is done of each turn of one process.

    Args:
        folder: None keeps nothing, unless there are several turns: then a temporary folder keeps the finished ones out
            of memory while files are open from it.
        key: what the calibration is; records of another are ignored.
    """

    def __init__(self, folder: Path | None, key: str, process: int, turns: int) -> None:
        self.key = key
        self.process = process
        self.several = turns > 1
        self.temporary = None
        if folder is None and self.several:
            self.temporary = tempfile.TemporaryDirectory(prefix="slimdiff-")
            folder = Path(self.temporary.name)
        self.folder = folder

    def begin(self, turn: int, items: int, device: torch.device) -> tuple[Statistics | None, int]:
        """What an interrupted run of the same calibration left of a turn, and how many of its `items` that is."""
        self.wait, self.written = RECORD_EVERY, time.monotonic()
        file = self._file("turn", turn)
        try:
            meta = read_metadata(file) if file is not None else {}
        except InputError:  # none, of another version, or not whole: no reason to refuse what can be done again
            meta = {}
        if file is None or meta.get("key") != self.key:
            return None, 0
        found, done = Statistics.load(file, self.temporary), meta["done"]
        if done < items or not self.several:
            found.moments, found.firsts = (
                {name: tensor.to(device, copy=True) for name, tensor in stored.items()}
                for stored in (found.moments, found.firsts)
            )
        return found, done

    def keep(self, statistics: Statistics, turn: int, done: int) -> None:
        """Record a turn's sums after `done` items, if the last record is long enough ago."""
        file = self._file("turn", turn)
        if file is not None and time.monotonic() - self.written > self.wait:
            begun = time.monotonic()
            statistics.save(file, done=done, key=self.key)
            self.written = time.monotonic()
            self.wait = max(RECORD_EVERY, RECORD_SHARE * (self.written - begun))

    def finish(self, statistics: Statistics, turn: int, items: int) -> Statistics:
        """Record a whole turn; the same sums, in the file if other turns need the memory."""
        file = self._file("turn", turn)
        if file is None:
            return statistics
        statistics.save(file, done=items, key=self.key)
        return Statistics.load(file, self.temporary) if self.several else statistics

    def total(self, statistics: Statistics, turn: int) -> Statistics:
        """Sums over all processes, which are taken as they are read: in a file, or in memory if there is one turn."""
        file = self._file("sum", turn)
        if file is None or not self.several:
            statistics.moments, statistics.firsts = dict(statistics.moments), dict(statistics.firsts)
            return statistics
        statistics.save(file)
        return Statistics.load(file, self.temporary)

    def _file(self, what: str, turn: int) -> Path | None:
        return self.folder / f"process-{self.process}-{what}-{turn}.safetensors" if self.folder else None
