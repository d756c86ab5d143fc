"""An artifact's whole picture as one run: text encoders, all steps by its schedule, and the VAE, to be timed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from deploy.artifacts.kinds import kind_of
from deploy.opening.openers import open_denoiser, runtime_for, whole_pipeline
from deploy.opening.pairs import Side
from deploy.opening.schedules import as_followed, with_schedule
from exporters.graphs.pipeline import example_call, export_pipeline
from exporters.graphs.scheduled import export_scheduled_pipeline
from exporters.latency.pair import Job
from exporters.registry import names
from exporters.runtimes.opening import version_of
from exporters.settings import ExportSettings
from slimdiff.denoising.schedulers import with_scheduler
from slimdiff.denoising.tasks import neutral_inputs
from slimdiff.denoising.torch_state import on_threads
from slimdiff.denoising.trajectory import sample_images
from slimdiff.loading.naming import find_component
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.planning.costs import batch_of
from slimdiff.progress import show_progress
from slimdiff.schedule import FILE, Schedule
from slimdiff.settings import Sampling

log = logging.getLogger("slimdiff")


class Picture:
    """What makes an artifact's images, opened by a process of its own: a run makes `sampling.batch` of them.

    It has the attributes of a `TorchModel`; `Job.opens` names it.

    Args:
        path: of a model, an ONNX folder or a pipeline of engines.
        threads: of the runtime and of torch; their own choice if not given.
        runtime: of `exporters.registry`.
        sampling: how images are made, as JSON has it; where graphs fix it, they decide how many there are at once.
        schedule: they are made by, as JSON has it; none: every step is guided and whole.
        rest: the model that gives the other components to a denoiser alone.
        variant, rest_variant: of their weights.

    Raises:
        InputError: if it makes no images, or none of the size that is asked for.
    """

    def __init__(
        self,
        path: str,
        threads: int | None = None,
        *,
        runtime: str,
        sampling: dict[str, Any],
        schedule: dict[str, Any] | None = None,
        rest: str | None = None,
        variant: str | None = None,
        rest_variant: str | None = None,
        **_of_a_call: Any,
    ):
        show_progress(False)
        self._threads = threads
        asked = Sampling(**sampling)
        opened = open_denoiser(path, runtime, rest=rest, variant=variant, threads=threads)
        pipeline = whole_pipeline(opened, path, rest, rest_variant, threads)
        own = opened.fitted(asked, pipeline, path)
        self._inputs, self._sampling = neutral_inputs(pipeline, own.batch, own)
        read = None if schedule is None else Schedule.parse(schedule, "the schedule")
        self._pipeline, read = with_schedule(pipeline, opened, read, "", threads)
        followed = as_followed(read, self._pipeline, self._sampling)
        self.schedule = followed and {"says": str(followed), **followed.model_dump(exclude_none=True)}
        """As it is followed, in plain values."""
        torch_version = f"torch {torch.__version__.partition('+')[0]}"
        self.runtime = torch_version if opened.kind == "model" else opened.denoiser.session.runtime
        size = [own.height, own.width] if own.height else list(Side(path, opened, pipeline).size.values())
        self.shapes = {"images": [own.batch, *size], "steps": [own.steps]}

    def run(self) -> Any:
        """Make the images."""
        with on_threads(self._threads):
            return sample_images(self._pipeline, self._inputs, self._sampling)


def picture_job(
    name: str,
    runtime: str | None,
    sampling: Sampling,
    schedule: Schedule | None,
    scratch: Path,
    *,
    rest: str | None = None,
    variant: str | None = None,
    rest_variant: str | None = None,
) -> Job:
    """An artifact whose whole picture is to be timed; a model is exported to `scratch` first if the runtime takes
    graphs, which is the default.

    Raises:
        InputError: if it is nothing that can be run, that runtime does not take it, or it cannot follow the schedule.
        MissingPackageError: if the runtime is not here.
    """
    kind, path = kind_of(name), name
    own: dict[str, Any] = {"rest": rest, "variant": variant, "rest_variant": rest_variant}
    if kind == "model" and runtime in (None, *names("graph")):
        runtime = runtime or "onnxruntime"
        version_of(runtime)  # whether it is here shows before the export
        log.info("bench: exporting %s", name)
        more: Any = {"variant": variant, "rest": rest if find_component(name) else None}
        pipeline = with_scheduler(load_pipeline(name, "fp32", **more), sampling)
        path, own = str(_export(pipeline, sampling, schedule, scratch)), {}
    else:
        runtime = runtime_for(name, kind, runtime)
    options = {
        "runtime": runtime,
        "sampling": sampling.model_dump(),
        "schedule": schedule.model_dump(exclude_none=True) if schedule else None,
        **own,
    }
    return Job(name, path, runtime, opens=f"{__name__}:{Picture.__name__}", options=options)


def _export(pipeline: Any, sampling: Sampling, schedule: Schedule | None, folder: Path) -> Path:
    size: Any = {"height": sampling.height, "width": sampling.width}
    call = example_call(pipeline, **size, guidance=sampling.guidance)
    if sampling.batch > 1:
        call = example_call(pipeline, **size, batch=sampling.batch * batch_of(call))
    folder.mkdir(parents=True)
    if schedule is None:
        export_pipeline(pipeline, folder, ExportSettings(), call=call)
    else:
        schedule.save(folder / FILE)
        export_scheduled_pipeline(pipeline, folder, schedule, ExportSettings(), call=call)
    return folder
