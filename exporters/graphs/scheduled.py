"""Graphs for a schedule: the whole UNet, which also gives what is kept, and the part of it that reuses that.

They lie in one folder and have one file of weights: the shallow graph's are the whole graph's.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from exporters.graphs.export import Denoiser, export_called, export_unet
from exporters.graphs.inputs import KEPT, arguments_from
from exporters.graphs.pipeline import export_pipeline
from exporters.graphs.reading import read_graph
from exporters.graphs.shapes import check_leftovers
from exporters.graphs.vae import settings_for_unet
from exporters.layout import SHALLOW
from exporters.settings import ExportSettings
from slimdiff.denoising.scheduled import TorchPasses
from slimdiff.denoising.sizes import autoencoder_of
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.denoising.trajectory import Call
from slimdiff.errors import InputError, require
from slimdiff.models import plan_of
from slimdiff.schedule import Schedule

_DEPTH = "slimdiff.depth"
"""In the shallow graph's metadata: the path of the up block that it begins with."""


@own_torch_state()
def export_scheduled(
    unet: nn.Module,
    folder: Path | str,
    call: Call,
    schedule: Schedule,
    settings: ExportSettings | None = None,
    *,
    scheduler: Any = None,
    calibration: Sequence[Call] = (),
) -> list[Path]:
    """Export a UNet as `export_unet` does, with `shallow.onnx` beside it if the schedule reuses a depth.

    The whole graph then has a second output, `kept`, which the shallow graph takes as one more input. Where steps go
    without guidance, both are open in the batch.

    Raises:
        InputError: if the schedule is of another UNet, residuals of a ControlNet steer this one, or it is to reuse a
            depth in parts or in int8.
        MissingPackageError: without onnx and onnxscript.
    """
    settings, folder = settings or ExportSettings(), Path(folder)
    schedule.check(unet.config, "the schedule")  # type: ignore[arg-type]
    if not schedule.guides_always():
        settings = settings.model_copy(update={"dynamic_batch": True})
    depth = schedule.depth
    if depth is None:
        return [export_unet(unet, folder, call, settings, scheduler=scheduler, calibration=calibration)]
    for asked, what in ((settings.split, "in parts"), (settings.precision == "int8", "in int8")):
        if asked:
            raise InputError(f"a UNet {what} cannot reuse {depth} yet: export it otherwise, or make another schedule")
    if any("residual" in name for name in call.arguments):
        raise InputError("residuals steer this UNet, and its graphs cannot reuse a depth: export without the schedule")
    whole, shallow = _wrappers(depth)
    file = export_called(whole, unet, folder, call, settings, ["out_sample", KEPT], scheduler=scheduler)
    if plan := plan_of(unet):
        check_leftovers(file, plan)
    with torch.no_grad():
        parameter = next(unet.parameters())
        kept = TorchPasses(unet, depth).whole(call.to(parameter.device, parameter.dtype), depth)[1]
    assert kept is not None
    more = Call(call.step, call.timestep, {**call.arguments, KEPT: kept.cpu()}, call.dtype)
    apart = folder / "shallow"
    try:
        other = export_called(shallow, unet, apart, more, settings, ["out_sample"], scheduler=scheduler)
        _share_weights(other, file, folder / SHALLOW, depth)
    finally:
        shutil.rmtree(apart, ignore_errors=True)
    return [file, folder / SHALLOW]


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
    """`export_pipeline` with its UNet by `export_scheduled`, whose files come first."""
    unet: Any = pipeline.unet  # type: ignore[attr-defined]
    own = settings_for_unet(unet, autoencoder_of(pipeline), settings)
    more: Any = {"scheduler": getattr(pipeline, "scheduler", None), "calibration": calibration}
    files = export_scheduled(unet, folder / "unet", call, schedule, own, **more)
    return files + export_pipeline(pipeline, folder, settings, call=call, without=("unet",), vae_tile=vae_tile)


def depth_of(shallow: Path) -> str:
    """The up block that a shallow graph begins with."""
    return str(read_graph(shallow).metadata_props.get(_DEPTH, ""))


def _wrappers(depth: str) -> tuple[type[Denoiser], type[Denoiser]]:
    """The whole and the shallow UNet as modules with tensors only, in and out."""

    def given(names: tuple[str, ...], inputs: tuple[Tensor, ...]) -> dict[str, Any]:
        return {"encoder_hidden_states": None, **arguments_from(dict(zip(names, inputs, strict=True)))}

    class Whole(Denoiser):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            noise, kept = TorchPasses(self.unet).whole(given(self.names, inputs), depth)
            assert kept is not None
            return noise, kept

    class Shallow(Denoiser):
        def forward(self, *inputs: Tensor) -> Tensor:
            arguments = given(self.names, inputs)
            kept = arguments.pop(KEPT)
            return TorchPasses(self.unet).shallow(arguments, depth, kept)

    return Whole, Shallow


def _share_weights(source: Path, whole: Path, target: Path, depth: str) -> None:
    """Write a graph beside another whose weights it has: each tensor as a place in the other's file of weights."""
    onnx = require("onnx", "onnx")
    weights = onnx.load(str(whole), load_external_data=False).graph.initializer
    places = {_digest(tensor, whole): tensor for tensor in weights if tensor.external_data}
    model = onnx.load(str(source), load_external_data=False)
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    for tensor in kept:
        if not tensor.external_data:  # a small one, which lies in the graph itself
            continue
        if (there := places.get(_digest(tensor, source))) is None:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(source.parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
        tensor.ClearField("external_data")
        tensor.external_data.extend(there.external_data if there is not None else [])
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.metadata_props.add(key=_DEPTH, value=depth)
    target.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(target), full_check=True)


def _digest(tensor: Any, graph: Path) -> tuple[Any, ...]:
    """What two tensors of equal values have in common."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    with (graph.parent / entries["location"]).open("rb") as file:
        file.seek(int(entries.get("offset", 0)))
        content = file.read(int(entries["length"]))
    return (tensor.data_type, *tensor.dims, hashlib.sha256(content).hexdigest())
