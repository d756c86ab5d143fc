"""One process pair: two fresh processes on the same core, warmed, then timed in turn."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from math import log
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import psutil

from exporters.machine import core_numbers
from exporters.process import worker_command
from exporters.registry import Runtime, runtime_of
from exporters.settings import LEAST_ROUNDS, BenchSettings, ExportSettings
from slimdiff.errors import InputError, MissingPackageError, SlimdiffError

if TYPE_CHECKING:
    from torch import nn

    from slimdiff.denoising.trajectory import Call

BLOCK_MS = 15.0
"""Length of a block, unless one run is longer: long beside the change from one process to the other, and short beside
what makes a machine slow for a while, which on shared hosts is often no more than a tenth of a second."""
PAIR_MS = 2000.0
"""What the blocks of a pair take together, or as long as its processes took to open, if that is more: beyond that,
another pair tells more than further rounds of this one."""
ROUNDS = 60
FEW = 3
"""Undisturbed rounds that make a pair."""
TRIM = 1 / 3
"""Share of the rounds that are left out at either end: their mean is as safe from outliers as the median and scatters
less, and of three rounds it is the median."""


@dataclass(frozen=True)
class Job:
    """An artifact to be timed."""

    name: str
    """For people."""
    path: str
    """A model's directory or id, a graph's file, an engine's folder."""
    runtime: str
    """Of `exporters.registry`, one that takes such an artifact."""
    shapes: dict[str, list[int]] | None = None
    """Of a graph's inputs, where it leaves them open; by default, open dims are as large as the batch."""
    opens: str = ""
    """What opens it in the place of the runtime's own function, if a run is to be more than a call of the denoiser: see
    `Runtime.opens`, and what that says of models."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of that function, by name: plain values."""

    @property
    def row(self) -> Runtime:
        """The runtime, as the process of this job opens it."""
        row = runtime_of(self.runtime)
        return replace(row, takes="model", opens=self.opens, options=self.options) if self.opens else row


def write_job(
    name: str,
    denoiser: nn.Module,
    call: Call,
    runtime: str,
    folder: Path,
    settings: ExportSettings | None = None,
    calibration: Sequence[Call] = (),
) -> Job:
    """Write a denoiser to a new folder, as fresh processes open it: its weights, or a graph for a call's shapes.

    Args:
        settings: of a graph; `calibration` is what int8 is calibrated on.

    Raises:
        InputError: for a runtime that takes neither models nor graphs, or models alone where a graph is asked for; or a
            denoiser that is not exported.
    """
    if runtime_of(runtime, "model", "graph").takes == "model":
        if settings is not None:
            raise InputError(f"{runtime} takes models, and {settings.precision} is asked of a graph: time it elsewhere")
        from exporters.runtimes.torch_model import save_model

        save_model(denoiser, call, folder)
        return Job(name, str(folder), runtime)
    from exporters.graphs.export import export_unet

    return Job(name, str(export_unet(denoiser, folder, call, settings, calibration=calibration)), runtime)


@dataclass
class SideTimes:
    """What one process of a pair showed."""

    title: str
    """Its runtime."""
    shapes: dict[str, list[int]]
    load_ms: float
    """Opening the artifact, imports not counted."""
    first_run_ms: float
    peak_memory_bytes: int | None
    wall_ms: list[float] = field(default_factory=list)
    """Every timed run."""
    preempted: int = 0
    """How many of them lost their core meanwhile."""
    schedule: dict[str, Any] | None = None
    """That its images are made by, if a run makes them by one."""


@dataclass
class PairTimes:
    """What a pair showed."""

    sides: tuple[SideTimes, SideTimes]
    """Baseline and candidate."""
    log_ratio: float
    """Trimmed mean over rounds of log(candidate's block / baseline's), wall time; a block is the median of its runs."""
    cpu_log_ratio: float
    """The same of the processes' CPU time."""
    cores: list[int] | None
    """Where they were kept."""


class Worker:
    """The process of one side; ends with the block that it is opened for. Its first answer says that it is prepared.

    Args:
        pauses: stop it whenever it is not asked anything. Threads of runtimes spin for a while after a run, which takes
            cores from the other side.
    """

    def __init__(self, job: Job, settings: BenchSettings, pauses: bool = False):
        self.job = job
        self._pauses = pauses and hasattr(signal, "SIGSTOP")
        self._stderr = TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        arguments = {"threads": settings.threads or None, "batch": settings.batch, "shapes": job.shapes}
        prepare = {"do": "prepare", "path": job.path, "runtime": asdict(job.row), **arguments}
        self._process = subprocess.Popen(
            worker_command("exporters.latency.worker", json.dumps(prepare)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with suppress(BrokenPipeError), self._stderr, self._process:  # which closes its pipes and waits
            pass

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the command.

        Raises:
            InputError: if the artifact does not run.
            MissingPackageError: if its runtime is not here.
            SlimdiffError: if the process died.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._stderr.seek(0)
            said = self._stderr.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
            why = "killed, perhaps for memory" if code == -9 else f"exit code {code}"
            raise SlimdiffError(f"the process that ran {self.job.name} died ({why}): {said[-1]}")
        answer = json.loads(line)
        if "error" in answer:
            kinds = {kind.exit_code: kind for kind in (InputError, MissingPackageError)}
            raise kinds.get(answer["exit_code"], SlimdiffError)(answer["error"])
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        if self._pauses:
            self._process.send_signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # `answer` says what became of it
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
        answer = self.answer()
        if self._pauses:
            self._process.send_signal(signal.SIGSTOP)
        return answer


def measure_pair(baseline: Job, candidate: Job, settings: BenchSettings, *, first: int = 0) -> PairTimes:
    """Start both, time them in turn, end both.

    Args:
        first: 0 if the baseline is opened and timed first, 1 if the candidate: take turns, for the first process may
            find the better memory.

    Raises:
        InputError: if one does not run, or they take inputs of different shapes.
        MissingPackageError: if a runtime is not here.
        SlimdiffError: if a process died.
    """
    jobs = (baseline, candidate)
    on_cpu = all(runtime_of(job.runtime).device == "cpu" for job in jobs)
    start = time.perf_counter()
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(job, settings, pauses=on_cpu)) for job in jobs]
        for worker in workers:
            worker.answer()
        cores = idle_cores(settings.threads) if settings.threads and on_cpu else None
        opened: list[dict[str, Any]] = [{}, {}]
        for index in (first, 1 - first):
            opened[index] = workers[index].ask("open", cores=cores, warmup=settings.warmup)
        if opened[0]["shapes"] != opened[1]["shapes"]:
            shapes = " and ".join(str(side["shapes"]) for side in opened)
            what, size = ("make images", ", or --height and --width") if baseline.opens else ("take calls", "")
            raise InputError(f"the two {what} of different shapes, {shapes}: say --batch{size}")
        run_ms = fmean(side.pop("run_ms") for side in opened)
        count = max(1, round(BLOCK_MS / run_ms))
        lead = 1 if count > 1 else 0  # the other process has been through the caches: a short run would notice
        pair_ms = max(PAIR_MS, 1e3 * (time.perf_counter() - start))
        pair_rounds = pair_ms / (2 * (count + lead) * run_ms)
        rounds = settings.rounds or int(min(ROUNDS, max(LEAST_ROUNDS, pair_rounds)))
        blocks: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
        for index in range(rounds):
            for side in (first, 1 - first) if index % 2 == 0 else (1 - first, first):
                runs = workers[side].ask("run", count=count + lead)
                blocks[side].append({name: values[lead:] for name, values in runs.items()})
        for shown, worker in zip(opened, workers, strict=True):
            shown.update(worker.ask("end"))
    sides = [
        SideTimes(
            **side,
            wall_ms=[ms for block in own for ms in block["wall_ms"]],
            preempted=sum(sum(block["preempted"]) for block in own),
        )
        for side, own in zip(opened, blocks, strict=True)
    ]
    return PairTimes((sides[0], sides[1]), _log_ratio(blocks, "wall_ms"), _log_ratio(blocks, "cpu_ms"), cores)


def idle_cores(count: int) -> list[int] | None:
    """The cores, of those that may be used, that do least just now; None where processes cannot be kept on cores.

    Raises:
        InputError: for more than there are.
    """
    usable = core_numbers()
    if usable is None:
        return None
    if count > len(usable):
        raise InputError(f"--threads {count}: this process may use {len(usable)} cores; 0 leaves it to the runtime")
    busy = psutil.cpu_percent(interval=0.1, percpu=True)
    return sorted(sorted(usable, key=lambda core: busy[core] if core < len(busy) else 0.0)[:count])


def _log_ratio(blocks: tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]], clock: str) -> float:
    """Over the rounds in which no run lost its core, if there are a few; else over all.

    Which rounds lose it depends on how long they are, but on both sides alike.
    """
    rounds = list(zip(*blocks, strict=True))
    kept = [both for both in rounds if not any(times for block in both for times in block["preempted"])]
    used = kept if len(kept) >= FEW else rounds
    ratios = sorted(log(median(b[clock]) / median(a[clock])) for a, b in used)
    cut = int(len(ratios) * TRIM)
    return fmean(ratios[cut : len(ratios) - cut])
