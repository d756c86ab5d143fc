"""A UNet's two graphs, or their engines, as the passes of a scheduled denoiser, in any runtime that takes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from exporters.engine.scheduled import find_shallow, remedy
from exporters.graphs.inputs import KEPT
from exporters.registry import runtime_of
from exporters.runtimes.module import answer
from exporters.runtimes.opening import open_session
from exporters.runtimes.session import Session
from exporters.runtimes.split import SplitSession
from exporters.runtimes.unet import UNet
from slimdiff.denoising.scheduled import Scheduled, check_guides
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
        inputs = {**self.denoiser.named(**arguments), KEPT: kept}
        found = answer(self.session, {name: inputs[name] for name in self.session.inputs})
        return self._like(arguments, found["out_sample"])

    def _like(self, arguments: Mapping[str, Any], noise: Tensor) -> Tensor:
        return noise.to(arguments["sample"].device, arguments["sample"].dtype)


def schedule_graphs(
    pipeline: DiffusionPipeline, schedule: Schedule, graph: Path, runtime: str, threads: int | None = None
) -> DiffusionPipeline:
    """A pipeline like this one, whose UNet runs in a runtime, that makes its images by a schedule.

    Args:
        graph: the file, or folder, of the whole UNet's graph or engine, beside which the shallow one's lies.

    Raises:
        InputError: if there is no shallow graph of the schedule's depth, or a fixed batch that steps without guidance
            would not fill; and as `schedule_pipeline`.
    """
    unet: Any = pipeline.unet  # type: ignore[attr-defined]
    engine = runtime_of(runtime).takes == "engine"
    shallow = find_shallow(graph, schedule, engine=engine)
    if shallow is not None and KEPT not in unet.session.outputs:
        raise InputError(f"{graph} does not give what {shallow} reuses: {remedy(engine)}")
    if not schedule.guides_always():
        if isinstance(unet.inputs["sample"][0], int):
            half = "takes one batch alone, and steps without guidance are half of it"
            raise InputError(f"{graph} {half}: {remedy(engine)}")
        check_guides(pipeline)
    session = None if shallow is None else open_session(shallow, runtime, threads)
    if session is not None and isinstance(unet.session, SplitSession):
        session = unet.session.with_step(session)
    return with_denoiser(pipeline, Scheduled(GraphPasses(unet, session), schedule))
