"""Ranks, precision and schedule for a speedup of the whole picture in a runtime."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from exporters.latency.steps import measure_pictures
from exporters.settings import TableSettings
from slimdiff.compression import Compressor
from slimdiff.denoising.trajectory import Inputs
from slimdiff.errors import InputError
from slimdiff.planning.schedules import Images, measure_changes
from slimdiff.planning.together import Choosing

log = logging.getLogger("slimdiff")


def choose_together(
    work: Compressor, prompts: Sequence[Inputs], speedup: float, settings: TableSettings | None = None
) -> Choosing:
    """What a schedule and a plan are chosen by (`Choosing.best`), all of it measured: what each kind of step and each
    layer takes in the runtime, and what leaving out guidance and depth changes in final images.

    Args:
        work: without a schedule, which is what is chosen.
        prompts: of the images that changes are measured on.
        speedup: of a picture, the dense model's at full schedule over the slim one's by its schedule.

    Raises:
        InputError: if the pipeline's denoiser is no UNet, or neither guidance nor depth can be left out of it.
        MissingPackageError: if the runtime is not here.
    """
    if work.schedule is not None:
        raise InputError("a schedule is chosen together with the ranks: leave out the one that there is")
    sampling = work.calibration.sampling
    images = Images(work.pipeline, prompts, sampling.model_copy(update={"batch": min(sampling.batch, len(prompts))}))
    depths, unguided = images.depths(), images.guidance_can_go
    times = measure_pictures(work.pipeline, sampling, work.planning, settings, depths=depths, unguided=unguided)
    log.info("together: %d images in %d steps, again for each step and what is left out", len(prompts), images.steps)
    changes = measure_changes(images, depths, times.steps)
    return Choosing(work.planner, images, changes, times, speedup)
