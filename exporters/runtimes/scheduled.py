"""A UNet's two graphs as the passes of a scheduled denoiser, in any runtime that takes graphs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from exporters.graphs.inputs import KEPT
from exporters.graphs.scheduled import depth_of
from exporters.layout import SHALLOW
from exporters.runtimes.module import answer
from exporters.runtimes.opening import open_session
from exporters.runtimes.session import Session
from exporters.runtimes.unet import UNet
from slimdiff.denoising.scheduled import Scheduled, guides_as_known
from slimdiff.denoising.trajectory import with_denoiser
from slimdiff.errors import InputError
from slimdiff.schedule import Schedule


class GraphPasses:
    """Both passes of a UNet that `export_scheduled` wrote."""

    def __init__(self, unet: UNet, shallow: Session | None = None):
        self.denoiser = unet
        self.session = shallow

    def whole(self, arguments: Mapping[str, Any], depth: str | None) -> tuple[Tensor, Tensor | None]:
        found = answer(self.denoiser.session, self.denoiser.named(**arguments))
        return self._like(arguments, found["out_sample"]), None if depth is None else found[KEPT]

    def shallow(self, arguments: Mapping[str, Any], depth: str, kept: Tensor) -> Tensor:
        assert self.session is not None
        found = answer(self.session, {**self.denoiser.named(**arguments), KEPT: kept})
        return self._like(arguments, found["out_sample"])

    def _like(self, arguments: Mapping[str, Any], noise: Tensor) -> Tensor:
        return noise.to(arguments["sample"].device, arguments["sample"].dtype)


def schedule_graphs(
    pipeline: DiffusionPipeline, schedule: Schedule, graph: Path, runtime: str, threads: int | None = None
) -> DiffusionPipeline:
    """A pipeline like this one, whose UNet runs in a runtime, that makes its images by a schedule.

    Args:
        graph: the whole UNet's file, beside which the shallow graph lies.

    Raises:
        InputError: if there is no shallow graph of the schedule's depth, or a fixed batch that steps without guidance
            would not fill; and as `schedule_pipeline`.
    """
    unet: Any = pipeline.unet  # type: ignore[attr-defined]
    other = "export the model with this schedule (slimdiff export --schedule), or say --schedule none"
    if not schedule.guides_always():
        if isinstance(unet.inputs["sample"][0], int):
            raise InputError(f"{graph} takes one batch alone, and steps without guidance are half of it: {other}")
        if hasattr(type(pipeline), "do_classifier_free_guidance") and not guides_as_known(pipeline):
            raise InputError(f"{type(pipeline).__name__} arranges its guidance in a way that is not known: {other}")
    session = None
    if schedule.depth is not None:
        file = graph.parent / SHALLOW
        if not file.is_file() or KEPT not in unet.session.outputs:
            raise InputError(f"{graph.parent} has no {SHALLOW}, and the schedule reuses {schedule.depth}: {other}")
        if (depth := depth_of(file)) != schedule.depth:
            raise InputError(f"{file} begins with {depth}, and the schedule reuses {schedule.depth}: {other}")
        session = open_session(file, runtime, threads)
    return with_denoiser(pipeline, Scheduled(GraphPasses(unet, session), schedule))
