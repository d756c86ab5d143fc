"""Making images by a schedule, whatever the artifact, and what that saves."""

from __future__ import annotations

import copy
from typing import Any

from deploy.artifacts.kinds import graph_of
from deploy.opening.openers import Opened
from deploy.opening.pairs import Side
from exporters.graphs.pipeline import example_call
from exporters.runtimes.scheduled import schedule_graphs
from slimdiff.denoising.scheduled import schedule_pipeline
from slimdiff.errors import InputError
from slimdiff.planning.costs import batch_of, count_macs, shallow_share
from slimdiff.schedule import Schedule
from slimdiff.settings import Sampling


def with_schedule(pipeline: Any, opened: Opened, name: str, schedule: Schedule | None) -> Any:
    """A pipeline that makes its images by the schedule; itself if there is none.

    Raises:
        InputError: if the schedule is of another model, or of another kind of pipeline.
    """
    if schedule is None:
        return pipeline
    if opened.kind == "onnx":
        return schedule_graphs(pipeline, schedule, graph_of(name, verified=False), opened.runtime)
    if opened.kind != "model":
        raise InputError(
            f"this {opened.kind} takes no schedule: name the model that it was made from, or say --schedule none"
        )
    return schedule_pipeline(pipeline, schedule)


def compute_of(dense: Side, slim: Side, schedule: Schedule, sampling: Sampling) -> dict[str, Any]:
    """Multiply-adds of the denoiser's calls for an image, counted: of dense with every step guided and whole, and of
    slim by the schedule. `saved` is a share; all are None where a side is no model in torch.
    """
    if not dense.opened.kind == slim.opened.kind == "model":
        return {"dense": None, "slim": None, "saved": None}
    shapes: dict[str, Any] = {"height": sampling.height, "width": sampling.width, "guidance": sampling.guidance}
    call = example_call(dense.pipeline, **shapes)
    unet = slim.opened.denoiser
    own = schedule.at(calls_of(slim.pipeline, sampling.steps))
    share = 1.0 if own.depth is None else shallow_share(unet, own.depth, call)
    whole = count_macs(dense.opened.denoiser, call) * own.steps
    by_schedule = count_macs(unet, call) * own.steps * own.cost(share, batch_of(call))
    return {"dense": whole, "slim": round(by_schedule), "saved": 1 - by_schedule / whole}


def calls_of(pipeline: Any, steps: int) -> int:
    """How often a pipeline calls its denoiser in that many steps: some samplers do so several times a step."""
    scheduler = copy.deepcopy(pipeline.scheduler)
    try:
        scheduler.set_timesteps(steps)
        return len(scheduler.timesteps)
    except Exception:  # they raise anything for a number that they do not take, and ask for more than it
        return steps
