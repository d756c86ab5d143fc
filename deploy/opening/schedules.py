"""Making images by a schedule, whatever the artifact, and what that saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
from accelerate import init_empty_weights

from deploy.artifacts.figures import image_macs
from deploy.opening.openers import Opened
from deploy.opening.pairs import Side
from exporters.graphs.pipeline import example_call
from exporters.runtimes.scheduled import schedule_graphs
from slimdiff import models
from slimdiff.denoising.offloading import hollow
from slimdiff.denoising.scheduled import schedule_pipeline
from slimdiff.denoising.schedulers import calls_of, with_scheduler
from slimdiff.denoising.trajectory import with_denoiser
from slimdiff.errors import InputError
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
    slim by its schedule. `saved` is a share. Where they cannot be counted all are None, and `why` says in a line why.

    Args:
        images: that slim has made, and no others.
    """
    shapes: dict[str, Any] = {"height": sampling.height, "width": sampling.width, "guidance": sampling.guidance}
    runs = -(-images // sampling.batch)
    try:
        one, other = (_in_torch(side) for side in (dense, slim))
        call = example_call(with_denoiser(dense.pipeline, one), **shapes)
        return image_macs(one, other, call, slim.pipeline.unet, runs)
    except InputError as error:
        if dense.opened.kind == slim.opened.kind == "model":
            raise
        return {"dense": None, "slim": None, "saved": None, "why": str(error)}


def _in_torch(side: Side) -> Any:
    """The denoiser as torch has it, to be counted; of a graph or an engine, one by its configuration, without weights.

    Raises:
        InputError: if its configuration does not say all.
    """
    if side.opened.kind == "model":
        return side.opened.denoiser
    own = side.opened.denoiser
    if any(name.startswith("image_embeds_") for name in own.inputs):
        raise InputError(f"{side.name} has the layers of an IP-Adapter, which its config.json does not say")
    name = str(own.config.get("_class_name"))
    if name.startswith("Slim") and not own.config.get("slim_plan"):
        raise InputError(f"{side.name} does not have its plan any more, as bundles for an edge do not")
    with init_empty_weights():
        made = getattr(models if name.startswith("Slim") else diffusers, name).from_config(dict(own.config))
    return hollow(made).eval()
