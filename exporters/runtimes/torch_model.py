"""A denoiser in torch, opened by itself to be timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

import slimdiff.models
from exporters.graphs.export import unet_inputs
from exporters.graphs.pipeline import example_call
from slimdiff.denoising.torch_state import on_threads
from slimdiff.denoising.trajectory import Call, denoiser_name, predict
from slimdiff.errors import InputError
from slimdiff.loading.components import load_component
from slimdiff.loading.model_directory import library_class
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.loading.weights import find_weights
from slimdiff.storage import manifest

CALL = "call.pt"


def save_model(denoiser: nn.Module, call: Call, folder: Path) -> None:
    """Write a denoiser and a call of it to where `TorchModel` opens them."""
    denoiser.save_pretrained(folder)  # type: ignore[operator]
    torch.save({"timestep": call.timestep, "arguments": call.arguments}, folder / CALL)


class TorchModel:
    """A denoiser with a call of it.

    Args:
        path: a pipeline, as `load_pipeline` takes it; it is called as its example is. Or a folder of `save_model`.
        batch: samples in a call, of a pipeline.
        dtype: torch's name of the dtype that the weights are cast to.
        compiled: whether `torch.compile` is tried on it.

    Attributes:
        runtime: for people.
        shapes: of the call's inputs, by name.

    Raises:
        InputError: if it is no model.
    """

    def __init__(
        self,
        path: Path | str,
        threads: int | None = None,
        *,
        batch: int = 2,
        dtype: str = "float32",
        compiled: bool = False,
    ):
        self._threads = threads
        if (Path(path) / CALL).is_file():
            denoiser, self._call = _saved(Path(path))
        else:
            pipeline = load_pipeline(path, torch.float32)
            denoiser = getattr(pipeline, denoiser_name(pipeline))
            self._call = example_call(pipeline, batch=batch)
        denoiser = denoiser.to(getattr(torch, dtype))
        self._denoiser: Any = torch.compile(denoiser, dynamic=False) if compiled else denoiser
        options = [dtype] * (dtype != "float32") + ["compiled"] * compiled
        self.runtime = ", ".join([f"torch {torch.__version__.partition('+')[0]}", *options])
        self.shapes = {name: list(tensor.shape) for name, tensor in _tensors(self._call).items()}

    def run(self) -> Any:
        """One call."""
        with on_threads(self._threads):
            return predict(self._denoiser, self._call)


def _saved(folder: Path) -> tuple[Any, Call]:
    config = folder / "config.json"
    name = str(manifest.read_json(config).get("_class_name"))
    library = "slimdiff.models" if hasattr(slimdiff.models, name) else "diffusers"
    kind = library_class([library, name], config, (diffusers.ModelMixin,))
    saved = torch.load(folder / CALL, weights_only=True)
    denoiser = load_component(folder, kind, find_weights(folder, kind), torch.float32)
    return denoiser, Call(0, saved["timestep"], saved["arguments"])


def _tensors(call: Call) -> dict[str, torch.Tensor]:
    """A call's inputs by the names that a graph has for them, or by its own where no graph is made of it."""
    try:
        return unet_inputs(call)
    except InputError:
        return {name: value for name, value in call.arguments.items() if isinstance(value, torch.Tensor)}
