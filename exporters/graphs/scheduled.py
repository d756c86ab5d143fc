"""Graphs for a schedule: the whole UNet, which also gives what is kept, and the part of it that reuses that.

They lie in one folder and have one file of weights: the shallow graph's are the whole graph's. Of a UNet in parts, both
are of its step, and take what the other parts give.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from exporters.graphs.export import Denoiser, export_called, export_unet, in_parts, in_precision, warn_of_precision
from exporters.graphs.inputs import KEPT, arguments_from
from exporters.graphs.pipeline import export_pipeline
from exporters.graphs.quantise import check_calibration, quantise_graph
from exporters.graphs.reading import DEPTH
from exporters.graphs.shapes import check_leftovers
from exporters.graphs.vae import settings_for_unet
from exporters.layout import GRAPH, SHALLOW, STEP
from exporters.settings import ExportSettings
from slimdiff.denoising.scheduled import TorchPasses
from slimdiff.denoising.sizes import autoencoder_of
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.denoising.trajectory import Call
from slimdiff.errors import InputError, require
from slimdiff.models import plan_of
from slimdiff.schedule import Schedule


@own_torch_state()
def export_scheduled(
    unet: nn.Module,
    folder: Path | str,
    call: Call,
    schedule: Schedule | None,
    settings: ExportSettings | None = None,
    *,
    scheduler: Any = None,
    calibration: Sequence[Call] = (),
) -> list[Path]:
    """Export a UNet as `export_unet` does, with `shallow.onnx` beside it if there is a schedule that reuses a depth; in
    parts, beside the step's.

    The whole graph then has a second output, `kept`, which the shallow graph takes as one more input. Of residuals that
    steer a UNet, the shallow graph takes those of its own blocks. Where steps go without guidance, both are open in the
    batch.

    Raises:
        InputError: if the schedule is of another UNet; and as `export_unet`.
        MissingPackageError: without onnx and onnxscript.
    """
    settings, folder = settings or ExportSettings(), Path(folder)
    if schedule is None:
        return [export_unet(unet, folder, call, settings, scheduler=scheduler, calibration=calibration)]
    schedule.check(unet.config, "the schedule")  # type: ignore[arg-type]
    if not schedule.guides_always():
        settings = settings.model_copy(update={"dynamic_batch": True})
    depth = schedule.depth
    if depth is None:
        return [export_unet(unet, folder, call, settings, scheduler=scheduler, calibration=calibration)]
    if settings.precision == "int8":
        check_calibration(calibration)
    file = export_called(_wrapper(depth), unet, folder, call, settings, ["out_sample", KEPT], scheduler=scheduler)
    plan = plan_of(unet)
    if plan is not None:
        check_leftovers(file, plan)
        warn_of_precision(plan, settings)
    if settings.precision == "int8":
        quantise_graph(file, in_precision(unet, torch.float32), calibration, settings, plan)
    if settings.split:
        file = in_parts(file)
    step = file / STEP / GRAPH if settings.split else file
    _cut_shallow(step, step.with_name(SHALLOW), depth)
    return [file, step.with_name(SHALLOW)]


def export_scheduled_pipeline(
    pipeline: DiffusionPipeline,
    folder: Path,
    schedule: Schedule,
    settings: ExportSettings,
    *,
    call: Call,
    vae_tile: int | None = None,
    calibration: Sequence[Call] = (),
) -> list[Path]:
    """`export_pipeline` with its UNet by `export_scheduled`, whose files come first.

    Raises:
        InputError: for a pipeline without one, or see both.
    """
    if (unet := getattr(pipeline, "unet", None)) is None:
        raise InputError(f"{type(pipeline).__name__} has no UNet: a schedule is exported with one, so leave it out")
    own = settings_for_unet(unet, autoencoder_of(pipeline), settings)
    more: Any = {"scheduler": getattr(pipeline, "scheduler", None), "calibration": calibration}
    files = export_scheduled(unet, folder / "unet", call, schedule, own, **more)
    return files + export_pipeline(pipeline, folder, settings, call=call, without=("unet",), vae_tile=vae_tile)


def _wrapper(depth: str) -> type[Denoiser]:
    """The whole UNet as a module with tensors only, in and out."""

    class Whole(Denoiser):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            named = dict(zip(self.names, inputs, strict=True))
            arguments = {"encoder_hidden_states": None, **arguments_from(named)}
            noise, kept = TorchPasses(self.unet).whole(arguments, depth)
            assert kept is not None
            return noise, kept

    return Whole


def _cut_shallow(whole: Path, target: Path, depth: str) -> None:
    """Write what a whole graph does with `kept` beside it: the same nodes, and weights as places in its file."""
    onnx = require("onnx", "onnx")
    model = onnx.load(str(whole), load_external_data=False)
    inputs = [value.name for value in model.graph.input]
    part = onnx.utils.Extractor(model).extract_model([*inputs, KEPT], ["out_sample"])
    read = {name for node in part.graph.node for name in node.input}
    used = [value for value in part.graph.input if value.name in read]
    del part.graph.input[:]
    part.graph.input.extend(used)
    onnx.helper.set_model_props(part, {DEPTH: depth})  # what the whole graph says of its layers is not true of these
    target.write_bytes(part.SerializeToString())
    onnx.checker.check_model(str(target), full_check=True)
