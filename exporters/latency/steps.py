"""What each kind of step of a picture takes in a runtime, and what a picture takes beside its steps.

Whole pictures are made, by a schedule that has every kind in turn: so each call finds the caches, the threads and the
memory as it does when users wait for it, and what slows the machine down for a while slows all kinds. What was measured
is kept beside the table of latencies (`exporters.latency.table`), for the same machine, runtime and threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from exporters.graphs.pipeline import example_call
from exporters.graphs.scheduled import export_scheduled_pipeline
from exporters.latency.alone import FEWEST, interval_width, threads_of
from exporters.latency.table import cache_folder, conditions, measure_latency
from exporters.layout import SHALLOW
from exporters.runtimes.opening import open_session
from exporters.runtimes.pipeline import load_pipeline
from exporters.runtimes.scheduled import GraphPasses
from exporters.settings import ExportSettings, TableSettings
from slimdiff.denoising.precision import in_float32
from slimdiff.denoising.scheduled import Passes, Scheduled, TorchPasses
from slimdiff.denoising.schedulers import calls_of, with_scheduler
from slimdiff.denoising.tasks import neutral_inputs
from slimdiff.denoising.torch_state import on_threads, own_torch_state
from slimdiff.denoising.trajectory import sample_batch, with_denoiser
from slimdiff.errors import InputError
from slimdiff.planning.costs import CostTable
from slimdiff.planning.pictures import Kind, Picture, PictureTimes, StepCosts, name_of
from slimdiff.progress import bar
from slimdiff.schedule import Schedule, levels_of
from slimdiff.settings import PlanSettings, Sampling
from slimdiff.storage import manifest

LEAST = 3
"""Pictures at least, whatever the intervals."""
log = logging.getLogger("slimdiff")


@own_torch_state()
def measure_steps(
    pipeline: DiffusionPipeline,
    sampling: Sampling,
    *,
    depth: str | None,
    unguided: bool,
    settings: TableSettings | None = None,
    cache: Path | None = None,
) -> StepCosts:
    """Milliseconds of each kind of step of one picture, and of what is beside them: text encoders, scheduler, VAE.

    Args:
        sampling: steps, guidance, size and scheduler of the picture.
        depth: that steps reuse; none: all are whole.
        unguided: whether some run without guidance.
        cache: folder of the measurements; as for `measure_latency`.

    Raises:
        InputError: if the pipeline's denoiser is no UNet, or cannot follow such a schedule.
        MissingPackageError: if the runtime is not here.
    """
    settings = settings or TableSettings()
    pipeline = with_scheduler(in_float32(pipeline), sampling.model_copy(update={"batch": 1}))
    unet: Any = getattr(pipeline, "unet", None)
    levels = levels_of(getattr(unet, "config", {}))
    if levels is None:
        raise InputError(f"{type(pipeline).__name__} has no UNet with up blocks: schedules are of those")
    kinds = [(g, w) for g in (True, False)[: 1 + unguided] for w in (True, False)[: 1 + (depth is not None)]]
    sampling = sampling.model_copy(update={"batch": 1, "steps": max(sampling.steps, len(kinds))})
    calls = calls_of(pipeline, sampling.steps)
    turns = [kinds[step % len(kinds)] for step in range(calls)]
    guided = [step for step, (guides, _) in enumerate(turns) if guides]
    whole = [step for step, (_, runs_all) in enumerate(turns) if runs_all]
    content = {"levels": levels, "steps": calls, "depth": depth, "guided": guided, "whole": whole}
    schedule = Schedule.parse(content, "the schedule")
    where = conditions(settings)
    config = {k: v for k, v in dict(unet.config).items() if not k.startswith("_")}
    asked = sampling.model_dump(include={"guidance", "height", "width"})
    shapes = [list(p.shape) for p in unet.parameters()]
    key = manifest.fingerprint({"config": config, "weights": shapes, "kinds": kinds, "depth": depth, **asked})
    file = (cache or cache_folder()) / f"steps-{manifest.fingerprint(where)[:16]}.json"
    known: dict[str, Any] = manifest.read_json(file) if file.is_file() else dict(where)
    if key not in known:
        log.info("steps: making pictures of %d calls in %s, to time each kind of step", calls, where["runtime"])
        known[key] = _measure(pipeline, schedule, sampling, settings)
        manifest.write_json(file, known)
    times = known[key]
    return StepCosts({kind: times[name_of(kind)] for kind in kinds}, times["rest"])


def measure_picture(
    pipeline: DiffusionPipeline,
    picture: Picture,
    sampling: Sampling,
    planning: PlanSettings | None = None,
    settings: TableSettings | None = None,
    *,
    cache: Path | None = None,
) -> CostTable:
    """Milliseconds of a whole picture by layer and rank: those of its calls, as often as the schedule makes them.

    Raises:
        InputError, MissingPackageError: as `measure_steps` and `measure_latency`.
    """
    schedule, pipeline = picture.schedule, in_float32(pipeline)
    unguided = not schedule.guides_always()
    guided = {True: bool(schedule.guided), False: unguided}
    asked: Any = {"settings": settings, "cache": cache}
    steps = measure_steps(pipeline, sampling, depth=schedule.depth, unguided=unguided, **asked)
    calls = _measure_calls(pipeline, sampling, [one for one, runs in guided.items() if runs], planning, **asked)
    unet: nn.Module = pipeline.unet  # type: ignore[attr-defined]
    return PictureTimes({schedule.depth: steps}, calls).table(picture, unet)


def measure_pictures(
    pipeline: DiffusionPipeline,
    sampling: Sampling,
    planning: PlanSettings | None = None,
    settings: TableSettings | None = None,
    *,
    depths: Sequence[str],
    unguided: bool,
    cache: Path | None = None,
) -> PictureTimes:
    """What tables of pictures by any schedule are made of: one measurement for all of these depths.

    Args:
        depths: that schedules may reuse.
        unguided: whether they may leave out guidance.

    Raises:
        InputError, MissingPackageError: as `measure_steps` and `measure_latency`.
    """
    pipeline = in_float32(pipeline)
    asked: Any = {"settings": settings, "cache": cache}
    reused: Sequence[str | None] = depths or [None]
    steps = {depth: measure_steps(pipeline, sampling, depth=depth, unguided=unguided, **asked) for depth in reused}
    calls = _measure_calls(pipeline, sampling, (True, False)[: 1 + unguided], planning, **asked)
    return PictureTimes(steps, calls)


def _measure_calls(
    pipeline: Any,
    sampling: Sampling,
    guided: Sequence[bool],
    planning: PlanSettings | None,
    settings: TableSettings | None,
    cache: Path | None,
) -> dict[bool, CostTable]:
    """Tables of a call with guidance and of one without."""
    size: Any = {"height": sampling.height, "width": sampling.width}
    calls = {one: example_call(pipeline, **size, guidance=sampling.guidance if one else 1.0) for one in guided}
    return {one: measure_latency(pipeline.unet, call, planning, settings, cache=cache) for one, call in calls.items()}


class _Timed:
    """Passes of a scheduled denoiser, which note how long each call takes, by kind."""

    def __init__(self, passes: Passes, clock: Callable[[], float]):
        self.passes, self.clock = passes, clock
        self.denoiser = passes.denoiser
        self.seconds: list[tuple[bool, float]] = []
        """Whether a call was whole, and what it took; in their order."""

    def whole(self, arguments: Mapping[str, Any], depth: str | None) -> tuple[Tensor, Tensor | None]:
        start = self.clock()
        answer = self.passes.whole(arguments, depth)
        self.seconds.append((True, self.clock() - start))
        return answer

    def shallow(self, arguments: Mapping[str, Any], depth: str, kept: Tensor) -> Tensor:
        start = self.clock()
        answer = self.passes.shallow(arguments, depth, kept)
        self.seconds.append((False, self.clock() - start))
        return answer


def _measure(pipeline: Any, schedule: Schedule, sampling: Sampling, settings: TableSettings) -> dict[str, float]:
    """Median milliseconds by the kinds' names, and of the `rest`."""
    # On one thread, processor time is latency without the waits for whoever else is on that core.
    clock = time.process_time if threads_of(settings) == 1 else time.perf_counter
    times: dict[Kind, list[float]] = {kind: [] for kind in schedule.kinds()}
    rest: list[float] = []
    inputs, sampling = neutral_inputs(pipeline, 1, sampling)
    with _opened(pipeline, schedule, sampling, settings) as (runs, passes), on_threads(settings.threads):
        timed = _Timed(passes, clock)
        other = with_denoiser(runs, Scheduled(timed, schedule))
        with bar(total=settings.rounds, name="steps", unit="picture") as shown:
            for count in range(settings.rounds + 1):
                timed.seconds.clear()
                start = clock()
                sample_batch(other, inputs, [0], sampling, "pil")
                total = clock() - start
                shown.update()
                if not count:  # first runs allocate
                    continue
                if [whole for whole, _ in timed.seconds] != [whole for _, whole in schedule.kinds()]:
                    raise InputError(
                        f"{type(pipeline.scheduler).__name__} calls the UNet several times a step, so that no kind of "
                        "step can be timed: take another scheduler, or count multiply-adds (without --runtime)"
                    )
                for kind, (_, seconds) in zip(schedule.kinds(), timed.seconds, strict=True):
                    times[kind].append(seconds)
                rest.append(total - sum(seconds for _, seconds in timed.seconds))
                narrow = (len(s) >= FEWEST and interval_width(s) <= settings.interval for s in times.values())
                if count >= LEAST and all(narrow):
                    break
    found = {name_of(kind): 1e3 * float(np.median(seconds)) for kind, seconds in times.items()}
    return {**found, "rest": 1e3 * float(np.median(rest))}


@contextmanager
def _opened(
    pipeline: Any, schedule: Schedule, sampling: Sampling, settings: TableSettings
) -> Iterator[tuple[DiffusionPipeline, Passes]]:
    """The pipeline in the runtime, and both ways of its UNet."""
    if settings.runtime == "torch":
        yield pipeline, TorchPasses(pipeline.unet, schedule.depth)
        return
    size: Any = {"height": sampling.height, "width": sampling.width}
    call = example_call(pipeline, **size, guidance=sampling.guidance)
    with TemporaryDirectory(prefix="slimdiff-steps-") as scratch:
        folder = Path(scratch)
        export_scheduled_pipeline(pipeline, folder, schedule, ExportSettings(), call=call)
        runs: Any = load_pipeline(folder, settings.runtime, threads=settings.threads)
        file = folder / "unet" / SHALLOW
        shallow = open_session(file, settings.runtime, settings.threads) if schedule.depth is not None else None
        yield runs, GraphPasses(runs.unet, shallow)
