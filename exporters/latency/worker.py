"""One side of a process pair; `pair.py` starts it.

Commands are lines of JSON on stdin, answers on stdout:

    {"do": "prepare", "path", "kind", "runtime", "threads", "batch"}   import what the artifact runs in
    {"do": "open", "cores": [1] or null, "warmup": 3}                  open it there, run it until it is warm
    {"do": "run", "count": 10}                                         time so many runs
    {"do": "end"}                                                      peak memory

It ends with its stdin and with the process that started it, so none is left behind. ONNX Runtime needs neither torch
nor diffusers: a process then starts in a fraction of a second, and more of them can be had in the same time.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from exporters.machine import peak_memory
from slimdiff.errors import InputError, SlimdiffError

WARM_SECONDS = 2.0
STEADY = 0.02
"""Runs are warm when the last few are no faster than those before, to this share."""
LOST = 0.01
"""Share of a run's time that threads must have waited for a core, for it to count as disturbed. The process that asks
for the run is on the same core at times, and takes some hundredths of a millisecond of nearly every one."""

_NUMPY = {"float": "float32", "double": "float64"}
"""ONNX Runtime's words for dtypes, where they are not numpy's."""
_PROVIDERS = {"onnxruntime": "cpu", "onnxruntime-cuda": "cuda", "onnxruntime-tensorrt": "tensorrt"}


@dataclass
class Opened:
    """What is to be timed."""

    run: Callable[[], Any]
    title: str
    """Its runtime, for people."""
    shapes: dict[str, list[int]]
    """Of the inputs."""


def opener(job: Mapping[str, Any]) -> Callable[[], Opened]:
    """Import what the artifact runs in; what is returned opens it."""
    if job["kind"] == "model":
        return _torch_opener(job)
    if job["runtime"] in _PROVIDERS:
        return _ort_opener(job)
    return _session_opener(job)


def _ort_opener(job: Mapping[str, Any]) -> Callable[[], Opened]:
    from exporters.runtimes.ort import inference_session
    from slimdiff.errors import require

    provider = _PROVIDERS[job["runtime"]]
    version = require("onnxruntime", "onnx" if provider == "cpu" else "gpu").__version__

    def open_it() -> Opened:
        session = inference_session(Path(job["path"]), provider, job["threads"])
        dtypes = {i.name: i.type.removeprefix("tensor(").rstrip(")") for i in session.get_inputs()}
        wanted = {i.name: (i.shape, _NUMPY.get(dtypes[i.name], dtypes[i.name])) for i in session.get_inputs()}
        feed = noise(wanted, job["batch"])
        title = f"ONNX Runtime {version}, {'CPU' if provider == 'cpu' else provider}"
        return Opened(partial(session.run, None, feed), title, _shapes(feed))

    return open_it


def _session_opener(job: Mapping[str, Any]) -> Callable[[], Opened]:
    import torch

    from exporters.runtimes.opening import open_session

    if job["runtime"].startswith("openvino"):
        importlib.import_module("openvino")

    def open_it() -> Opened:
        session = open_session(job["path"], job["runtime"], job["threads"])
        wanted = {name: (shape, str(session.dtypes[name]).split(".")[1]) for name, shape in session.inputs.items()}
        feed = noise(wanted, job["batch"])
        tensors = {name: torch.from_numpy(array) for name, array in feed.items()}
        return Opened(partial(session.run, tensors), session.runtime, _shapes(feed))

    return open_it


def _torch_opener(job: Mapping[str, Any]) -> Callable[[], Opened]:
    import torch

    from exporters.graphs.export import unet_inputs
    from exporters.graphs.pipeline import example_call
    from slimdiff.denoising.trajectory import denoiser_name, predict
    from slimdiff.loading.pipelines import load_pipeline

    if job["threads"] is not None:
        torch.set_num_threads(job["threads"])

    def open_it() -> Opened:
        pipeline = load_pipeline(job["path"])
        denoiser = getattr(pipeline, denoiser_name(pipeline))
        call = example_call(pipeline, batch=job["batch"])
        shapes = {name: list(tensor.shape) for name, tensor in unet_inputs(call).items()}
        return Opened(partial(predict, denoiser, call), f"torch {torch.__version__.partition('+')[0]}", shapes)

    return open_it


def noise(inputs: Mapping[str, tuple[Sequence[int | str | None], str]], batch: int) -> dict[str, np.ndarray]:
    """Arrays for a graph's inputs, its open dims being the batch: noise, and ones where numbers must be whole.

    Latency does not depend on the values.
    """
    generator = np.random.default_rng(0)
    arrays = {}
    for name, (shape, dtype) in inputs.items():
        sizes = [size if isinstance(size, int) else batch for size in shape]
        arrays[name] = (
            generator.standard_normal(sizes).astype(dtype) if dtype.startswith("float") else np.ones(sizes, dtype)
        )
    return arrays


def _shapes(feed: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    return {name: list(array.shape) for name, array in feed.items()}


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
    """Nanoseconds that the threads of this process were ready to run and had no core; None where that is not told."""
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

    name = "the artifact"

    def prepare(self, **job: Any) -> dict[str, Any]:
        """Import what the artifact runs in."""
        self.name = job["path"]
        self.open_it = opener(job)
        return {}

    def open(self, cores: list[int] | None, warmup: int) -> dict[str, Any]:
        """Open the artifact on these cores and warm it."""
        if cores is not None:
            os.sched_setaffinity(0, cores)
        start = time.perf_counter()
        self.opened = self.open_it()
        load = time.perf_counter() - start
        first = timed(self.opened.run, 1)["wall_ms"][0]
        times = warm(self.opened.run, warmup)
        gc.collect()
        gc.disable()
        return {
            "load_ms": 1e3 * load,
            "first_run_ms": first,
            "warm_runs": len(times),
            "run_ms": median(times[-3:]) if times else first,
            "title": self.opened.title,
            "shapes": self.opened.shapes,
        }

    def run(self, count: int) -> dict[str, Any]:
        """Time so many runs."""
        return timed(self.opened.run, count)

    def end(self) -> dict[str, Any]:
        """Peak memory, in bytes."""
        return {"peak_memory_bytes": peak_memory()}


def main(_: Sequence[str]) -> int:
    """Answer commands until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    side = Side()
    for line in sys.stdin:
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
