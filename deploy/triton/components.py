"""The models of an exported pipeline as a server sees them: a file, named inputs and outputs, a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploy.triton.settings import TritonSettings
from exporters.engine.check import ENGINE, read_engine
from exporters.engine.scheduled import find_shallow
from exporters.graphs.reading import TensorSpec, inputs_of, outputs_of, read_graph, weight_files
from exporters.graphs.timesteps import timestep_per_sample
from exporters.layout import CONFIG, GRAPH, SAFETY_CHECKER, SHALLOW, SHALLOW_ENGINE, STEP, parts_of, shallow_of
from slimdiff.errors import InputError
from slimdiff.schedule import Schedule

_OPTIONAL = ("text_encoder_2", SAFETY_CHECKER)
MODELS = ("text_encoder", "unet", "vae_decoder", *_OPTIONAL)
"""The parts of a pipeline that are models, those that text to image needs."""
SHALLOW_UNET = "unet_shallow"
"""What a schedule runs in the place of the UNet in some steps."""
Tensors = dict[str, TensorSpec]
"""Inputs or outputs by name; an open size is -1."""


@dataclass(frozen=True)
class Component:
    """A model to be served.

    Attributes:
        name: one of `MODELS`; of a UNet in parts, `unet_prompt`, `unet_time` and `unet_step`; by a schedule, also
            `unet_shallow`.
        file: the graph or engine.
        config: its `config.json`.
        max_batch: largest batch that it takes; 0 where its batch is fixed, and is the first size of all tensors.
        graph: the ONNX model without its weights, as it is to be served; None for an engine.
        made_for: what an engine runs on, for people; empty for a graph.
    """

    name: str
    backend: Literal["onnxruntime", "tensorrt"]
    file: Path
    config: Path
    inputs: Tensors
    outputs: Tensors
    max_batch: int
    graph: Any = None
    made_for: str = ""

    @property
    def folder(self) -> Path:
        """Where its file lies."""
        return self.file.parent

    @property
    def fixed_batch(self) -> int | str | None:
        """The batch of every call, where it is fixed."""
        return None if self.max_batch else next(iter(self.inputs.values())).shape[0]


def find_components(
    source: Path, index: Mapping[str, Any], settings: TritonSettings, schedule: Schedule | None = None
) -> list[Component]:
    """The models of an exported pipeline: engines where they are asked for and there are some, else graphs.

    Args:
        source: a folder in optimum's layout; an engine lies beside the graph that it takes the place of.
        index: names the optional models that the pipeline has.
        schedule: that images are made by.

    Raises:
        InputError: if a model is missing or damaged, an engine cannot be served, or the graphs do not follow the
            schedule.
    """
    components = []
    wanted = [part for part in MODELS if part not in _OPTIONAL or index.get(part)]
    places = [place for part in wanted for place in _places(part, source / part)]
    if schedule is not None and schedule.depth is not None:
        engine = settings.backend == "tensorrt" and shallow_of(source / "unet", engine=True) is not None
        find_shallow(source / "unet", schedule, engine=engine)
        folder = parts_of(source / "unet").get(STEP, source / "unet")
        places.append((SHALLOW_UNET, folder / SHALLOW))
    for name, file in places:
        folder = file.parent / SHALLOW_ENGINE if name == SHALLOW_UNET else file.parent
        if settings.backend == "tensorrt" and (folder / ENGINE).is_file():
            components.append(_engine(name, folder, settings, _config(file.parent)))
        elif file.is_file():
            components.append(_graph(name, file, settings))
        else:
            raise InputError(f"{source} has no {file.relative_to(source)}: name a folder that `slimdiff export` wrote")
    for component in components:
        for name, tensor in (component.inputs | component.outputs).items():
            if -1 in tensor.shape[1 if component.max_batch else 0 :]:
                raise InputError(
                    f"{component.folder} leaves more open than the batch ({name} is {list(tensor.shape)}): a server "
                    "makes images of one size, so export for that (slimdiff export --height --width)"
                )
    sides = {c.name: (c.inputs.get("sample") or c.inputs.get("latent_sample")) for c in components}
    denoiser = "unet" if "unet" in sides else f"unet_{STEP}"
    unet, vae = (spec and spec.shape[-2:] for spec in (sides[denoiser], sides["vae_decoder"]))
    if unet != vae:
        raise InputError(
            f"the UNet in {source} takes latents of {unet} and the VAE of {vae}: a server makes no images by tiles, so "
            "export both for one size, without --vae-tile"
        )
    _check_batches(components, schedule, denoiser)
    if settings.backend == "tensorrt" and not any(c.name == denoiser and c.backend == "tensorrt" for c in components):
        raise InputError(
            f"there is no engine of the UNet in {source}: put what `slimdiff engine` wrote into its folder unet, or "
            "take the onnxruntime backend"
        )
    return components


def _check_batches(components: list[Component], schedule: Schedule | None, denoiser: str) -> None:
    """Refuse a UNet of one batch where steps of the schedule go without guidance, with half of it."""
    if schedule is None or schedule.guides_always():
        return
    fixed = [c for c in components if c.name in (denoiser, SHALLOW_UNET) and c.fixed_batch not in (None, 1)]
    if fixed:
        raise InputError(
            f"{fixed[0].file} takes one batch alone, and steps without guidance are half of it: export the model with "
            "this schedule (slimdiff export --schedule), and build engines for a range of batches"
        )


def _places(name: str, folder: Path) -> list[tuple[str, Path]]:
    """The models of a component, each with where its graph lies: one, or one for each part.

    Raises:
        InputError: if parts do not fit.
    """
    if (folder / STEP / GRAPH).is_file():
        read_graph(folder)
    parts = [(f"{name}_{part}", place / GRAPH) for part, place in parts_of(folder).items()]
    return parts or [(name, folder / GRAPH)]


def _config(folder: Path) -> Path:
    """A model's configuration: that of a denoiser's parts lies around them."""
    return next((place / CONFIG for place in (folder, folder.parent) if (place / CONFIG).is_file()), folder / CONFIG)


def _graph(name: str, file: Path, settings: TritonSettings) -> Component:
    model, folder = read_graph(file), file.parent
    weight_files(file, model)
    if name in ("unet", SHALLOW_UNET) and "timestep" in inputs_of(model):
        timestep_per_sample(model)
    inputs, outputs = (
        {n: TensorSpec(t.dtype, tuple(d if isinstance(d, int) else -1 for d in t.shape)) for n, t in side.items()}
        for side in (inputs_of(model), outputs_of(model))
    )
    max_batch = settings.max_batch if _is_open(inputs | outputs) else 0
    return Component(name, "onnxruntime", file, _config(folder), inputs, outputs, max_batch, model)


def _engine(name: str, folder: Path, settings: TritonSettings, config: Path) -> Component:
    report = read_engine(folder)
    if report["backend"] != "tensorrt":
        raise InputError(f"{folder} is an engine for {report['backend']}, and Triton runs those of TensorRT alone")
    inputs, outputs = (
        {t["name"]: TensorSpec(t["dtype"], tuple(t["shape"])) for t in report[side]} for side in ("inputs", "outputs")
    )
    scalar = next((n for n, t in inputs.items() if not t.shape), None)
    if scalar is not None:
        raise InputError(
            f"{folder} takes {scalar} as a scalar, which Triton does not have: write the repository for ONNX "
            f"Runtime first, and build the engine from its graph (slimdiff engine REPOSITORY/models/{name}/1)"
        )
    max_batch = 0
    if _is_open(inputs | outputs):
        ranges = [ends for profile in report["parts"]["shapes"].get("profiles", []) for ends in profile.values()]
        if min(ends["min"][0] for ends in ranges) > 1:
            raise InputError(
                f"{folder} takes no batch of 1, which requests without guidance have: build its profile from 1"
            )
        max_batch = min(settings.max_batch, *(ends["max"][0] for ends in ranges))
    place = report["parts"]["runs_on"]
    gpu = place["gpu"]["name"] if "gpu" in place else ", ".join(place["targets"])
    made_for = f"TensorRT {report['version']}, {gpu}"
    return Component(name, "tensorrt", folder / ENGINE, config, inputs, outputs, max_batch, made_for=made_for)


def _is_open(tensors: Tensors) -> bool:
    """Whether the batch is open, which Triton asks of all tensors or none."""
    return all(t.shape and t.shape[0] == -1 for t in tensors.values())
