"""The models of an exported pipeline as a server sees them: a file, named inputs and outputs, a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploy.triton.settings import TritonSettings
from exporters.engine.check import ENGINE, read_engine
from exporters.graphs import reading
from exporters.graphs.reading import inputs_of, outputs_of, read_graph, weight_files
from exporters.graphs.timesteps import timestep_per_sample
from exporters.layout import GRAPH
from slimdiff.errors import InputError

Backend = Literal["onnxruntime", "tensorrt"]
MODELS = ("text_encoder", "text_encoder_2", "unet", "vae_decoder")
"""The parts of a pipeline that are models, those that text to image needs."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: numpy's name of its dtype, and its sizes; -1 is open."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Component:
    """A model to be served.

    Attributes:
        name: one of `MODELS`.
        folder: where its file and `config.json` lie.
        graph: the ONNX model without its weights, as it is to be served; None for an engine.
        max_batch: largest batch that it takes; 0 where its batch is fixed, and is the first size of all tensors.
        made_for: what an engine runs on, for people; empty for a graph.
    """

    name: str
    backend: Backend
    folder: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int
    graph: Any = None
    made_for: str = ""

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return self.inputs + self.outputs

    @property
    def fixed_batch(self) -> int | None:
        """The batch of every call, where it is fixed."""
        return None if self.max_batch else self.inputs[0].shape[0]


def find_components(source: Path, settings: TritonSettings) -> list[Component]:
    """The models of an exported pipeline: engines where they are wanted and there are some, else graphs.

    Args:
        source: a folder in optimum's layout; an engine lies beside the graph that it takes the place of.
        settings: backend and largest batch.

    Raises:
        InputError: if a model is missing or damaged, or an engine cannot be served.
    """
    found = []
    for name in MODELS:
        folder = source / name
        if settings.backend == "tensorrt" and (folder / ENGINE).is_file():
            found.append(_engine(name, folder, settings))
        elif (folder / GRAPH).is_file():
            found.append(_graph(name, folder, settings))
        elif name != "text_encoder_2":
            raise InputError(f"{source} has no {name}/{GRAPH}: name a folder that `slimdiff export` wrote")
    for component in found:
        _demand_fixed_sizes(component)
    if settings.backend == "tensorrt" and not any(c.name == "unet" and c.backend == "tensorrt" for c in found):
        raise InputError(
            f"there is no engine of the UNet in {source}: put what `slimdiff engine` wrote into its folder unet, or "
            "take the onnxruntime backend"
        )
    return found


def _graph(name: str, folder: Path, settings: TritonSettings) -> Component:
    model = read_graph(folder / GRAPH)
    weight_files(folder / GRAPH, model)
    if name == "unet":
        timestep_per_sample(model)
    inputs, outputs = _of_graph(inputs_of(model)), _of_graph(outputs_of(model))
    max_batch = settings.max_batch if _is_open(inputs + outputs) else 0
    return Component(name, "onnxruntime", folder, tuple(inputs), tuple(outputs), max_batch, model)


def _of_graph(specs: Mapping[str, reading.TensorSpec]) -> list[TensorSpec]:
    return [TensorSpec(n, s.dtype, tuple(d if isinstance(d, int) else -1 for d in s.shape)) for n, s in specs.items()]


def _engine(name: str, folder: Path, settings: TritonSettings) -> Component:
    report = read_engine(folder)
    if report["backend"] != "tensorrt":
        raise InputError(f"{folder} is an engine for {report['backend']}, and Triton runs those of TensorRT alone")
    shapes = report["parts"]["shapes"]
    profiles = shapes.get("profiles", [])
    inputs, outputs = (
        [TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in report[side]] for side in ("inputs", "outputs")
    )
    scalars = [t.name for t in inputs if not t.shape]
    if scalars:
        raise InputError(
            f"{folder} takes {scalars[0]} as a scalar, which Triton does not have: write the repository for ONNX "
            f"Runtime first, and build the engine from its graph (slimdiff engine REPOSITORY/models/{name}/1)"
        )
    if not _is_open(inputs + outputs):
        max_batch = 0
    elif min(ends["min"][0] for profile in profiles for ends in profile.values()) > 1:
        raise InputError(
            f"{folder} takes no batch of 1, which requests without guidance have: build its profile from 1"
        )
    else:
        max_batch = min(settings.max_batch, *(ends["max"][0] for profile in profiles for ends in profile.values()))
    place = report["parts"]["runs_on"]
    gpu = place["gpu"]["name"] if "gpu" in place else ", ".join(place["targets"])
    made_for = f"TensorRT {report['version']}, {gpu}"
    return Component(name, "tensorrt", folder, tuple(inputs), tuple(outputs), max_batch, made_for=made_for)


def _demand_fixed_sizes(component: Component) -> None:
    for tensor in component.tensors:
        if -1 in tensor.shape[1 if component.max_batch else 0 :]:
            raise InputError(
                f"{component.folder} leaves more open than the batch ({tensor.name} is {list(tensor.shape)}): a server "
                "makes images of one size, so export for that (slimdiff export --height --width)"
            )


def _is_open(tensors: Sequence[TensorSpec]) -> bool:
    """Whether the batch is open, which Triton asks of all tensors or none."""
    return all(t.shape and t.shape[0] == -1 for t in tensors)
