"""One side of a process pair; `pair.py` starts it.

Commands are lines of JSON, the first its argument, the others on stdin; answers are lines of JSON on stdout:

    {"do": "prepare", "path", "runtime": a row of the registry, "threads", "batch", "shapes"}   import what it runs in
    {"do": "open", "cores": [1] or null, "warmup": 3}             open it on these cores, run it until it is warm
    {"do": "run", "count": 10}                                    time that many runs
    {"do": "end"}                                                 peak memory

It ends with its stdin and with the process that started it, so none is left behind. ONNX Runtime and OpenVINO need
neither torch nor diffusers: a process then starts in a fraction of a second, and more of them can be had in the same
time.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from exporters.machine import peak_memory
from exporters.registry import Runtime
from exporters.runtimes.split import open_parts
from slimdiff.errors import InputError, SlimdiffError

WARM_SECONDS = 2.0
STEADY = 0.02
"""Runs are warm when the last few are no faster than those before, to this share."""
LOST = 0.01
"""Share of a run's time that threads must have waited for a core, for it to count as disturbed. The process that asks
for the run is on the same core at times, and takes some hundredths of a millisecond of nearly every one."""


def noise(inputs: Mapping[str, tuple[Sequence[int | str | None], str]], batch: int) -> dict[str, np.ndarray]:
    """Arrays for a graph's inputs, its open dims being the batch: noise, and zeros where numbers must be whole.

    Latency does not depend on the values.
    """
    generator = np.random.default_rng(0)
    arrays = {}
    for name, (shape, dtype) in inputs.items():
        sizes = [size if isinstance(size, int) else batch for size in shape]
        arrays[name] = (
            generator.standard_normal(sizes).astype(dtype) if dtype.startswith("float") else np.zeros(sizes, dtype)
        )
    return arrays


def timed(run: Callable[[], Any], count: int) -> dict[str, Any]:
    """Time runs one by one.

    Returns:
        per run, `wall_ms`, `cpu_ms` (of all threads of this process) and `preempted`: 1 if its threads waited for a
        core for more than `LOST` of the time; where the system does not tell, if they lost it at all.
    """
    wall, cpu, preempted = [], [], []
    for _ in range(count):
        waited, switches, cpu_start, start = _waited(), _switches(), time.process_time_ns(), time.perf_counter_ns()
        run()
        end, cpu_end = time.perf_counter_ns(), time.process_time_ns()
        lost, waited_end = _switches() - switches > 0, _waited()
        if waited is not None and waited_end is not None:
            lost = waited_end - waited > LOST * (end - start)
        wall.append((end - start) / 1e6)
        cpu.append((cpu_end - cpu_start) / 1e6)
        preempted.append(int(lost))
    return {"wall_ms": wall, "cpu_ms": cpu, "preempted": preempted}


def warm(run: Callable[[], Any], at_least: int) -> list[float]:
    """Run until the last runs are no faster than the ones before them, or `WARM_SECONDS` are over.

    Returns:
        milliseconds of each run.
    """
    window, times, start = max(3, at_least), [], time.perf_counter()
    while True:
        times += timed(run, 1)["wall_ms"]
        last, before = times[-window:], times[-2 * window : -window]
        steady = len(before) == window and median(last) > (1 - STEADY) * median(before)
        if len(times) >= at_least and (steady or time.perf_counter() - start > WARM_SECONDS):
            return times


def _waited() -> int | None:
    """Nanoseconds that this process's threads were ready to run and had no core; None where the system does not say."""
    try:
        tasks = [f"/proc/self/task/{task}/schedstat" for task in os.listdir("/proc/self/task")]
        return sum(int(Path(task).read_bytes().split()[1]) for task in tasks)
    except (OSError, IndexError, ValueError):  # not Linux, a kernel without it, or a thread that has just ended
        return None


def _switches() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class Side:
    """What the commands do."""

    def prepare(
        self,
        path: str,
        runtime: dict[str, Any],
        threads: int | None,
        batch: int,
        shapes: Mapping[str, Sequence[int]] | None,
    ) -> dict[str, Any]:
        """Import what the artifact runs in.

        Args:
            threads: of a runtime on the CPU; its own choice if not given.
            batch: samples in a call, where the artifact does not fix it and `shapes` says nothing.
            shapes: of a graph's inputs, where it leaves them open.
        """
        self.name, self.batch, self.given = path, batch, shapes or {}
        row = Runtime(**runtime)
        if row.takes != "engine":  # whose folder is looked at first
            row.require()
        self.takes_model = row.takes == "model"
        if self.takes_model:
            self.open_it = partial(row.load(), path, threads, batch=batch, **row.options)
        else:
            self.open_it = partial(open_parts, row, Path(path), threads)
        return {}

    def open(self, cores: list[int] | None, warmup: int) -> dict[str, Any]:
        """Open the artifact on these cores and warm it."""
        if cores is not None:
            os.sched_setaffinity(0, cores)
        start = time.perf_counter()
        opened = self.open_it()
        self.run_it = opened.run
        if self.takes_model:
            shapes = opened.shapes
        else:
            inputs = {name: (self.given.get(name, shape), opened.dtypes[name]) for name, shape in opened.inputs.items()}
            feed = noise(inputs, self.batch)
            shapes = {name: list(array.shape) for name, array in feed.items()}
            self.run_it = partial(opened.run, feed)
        load = time.perf_counter() - start
        first = timed(self.run_it, 1)["wall_ms"][0]
        times = warm(self.run_it, warmup)
        gc.collect()
        gc.disable()
        return {
            "load_ms": 1e3 * load,
            "first_run_ms": first,
            "run_ms": median(times[-3:]),
            "title": opened.runtime,
            "shapes": shapes,
            "schedule": getattr(opened, "schedule", None),
        }

    def run(self, count: int) -> dict[str, Any]:
        """Time that many runs."""
        return timed(self.run_it, count)

    def end(self) -> dict[str, Any]:
        """Peak memory, in bytes."""
        return {"peak_memory_bytes": peak_memory()}


def main(argv: Sequence[str]) -> int:
    """Answer the command `argv[0]`, then those on stdin until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    side = Side()
    for line in chain(argv, sys.stdin):
        command = json.loads(line)
        try:
            answer = getattr(side, command.pop("do"))(**command)
        except SlimdiffError as error:
            answer = {"error": str(error), "exit_code": error.exit_code}
        except Exception as error:  # whatever a runtime raises: there is nobody here to tell but the other end
            lines = str(error).strip().splitlines() or [type(error).__name__]
            answer = {"error": f"{side.name} does not run: {lines[0]}", "exit_code": InputError.exit_code}
        print(json.dumps(answer), file=answers, flush=True)
    return 0
