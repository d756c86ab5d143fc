"""Making images by a schedule, whatever the artifact, and what that saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy.artifacts.figures import image_macs
from deploy.opening.openers import Opened
from deploy.opening.pairs import Side
from exporters.graphs.pipeline import example_call
from exporters.runtimes.scheduled import schedule_graphs
from slimdiff.denoising.scheduled import schedule_pipeline
from slimdiff.denoising.schedulers import calls_of, with_scheduler
from slimdiff.schedule import Schedule
from slimdiff.settings import Sampling


def with_schedule(
    pipeline: Any, opened: Opened, schedule: Schedule | None, asked: str | None, threads: int | None = None
) -> tuple[Any, Schedule | None]:
    """A pipeline that makes its images by a schedule, and the schedule; the pipeline itself if there is none.

    Args:
        schedule: what `find_schedule` found; of a bundle, which may be an archive, the one inside counts if nobody
            `asked` for another.
        threads: of a runtime on the CPU; its own choice if not given.

    Raises:
        InputError: if the schedule is of another model, or the artifact cannot follow it.
    """
    if asked is None and opened.kind == "bundle":
        schedule = opened.pipeline.schedule
    if schedule is None:
        return pipeline, None
    if opened.kind == "model":
        return schedule_pipeline(pipeline, schedule), schedule
    graph = Path(opened.denoiser.session.source)
    return schedule_graphs(pipeline, schedule, graph, opened.runtime, threads), schedule


def as_followed(schedule: Schedule | None, pipeline: Any, sampling: Sampling) -> Schedule | None:
    """The schedule as images of so many steps follow it: carried over to their calls if it is for another number."""
    return schedule and schedule.at(calls_of(with_scheduler(pipeline, sampling), sampling.steps))


def compute_of(dense: Side, slim: Side, sampling: Sampling, images: int) -> dict[str, Any]:
    """Multiply-adds of the denoiser's calls for an image, counted: of dense with every step guided and whole, and of
    slim by its schedule. `saved` is a share; all are None where a side is no model in torch.

    Args:
        images: that slim has made, and no others.
    """
    if not dense.opened.kind == slim.opened.kind == "model":
        return {"dense": None, "slim": None, "saved": None}
    shapes: dict[str, Any] = {"height": sampling.height, "width": sampling.width, "guidance": sampling.guidance}
    call = example_call(dense.pipeline, **shapes)
    runs = -(-images // sampling.batch)
    return image_macs(dense.opened.denoiser, slim.opened.denoiser, call, slim.pipeline.unet, runs)
