"""A diffusers pipeline whose unet, VAE and text encoders run in another runtime."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from exporters.runtimes.text_encoder import TextEncoder
from exporters.runtimes.unet import UNet
from exporters.runtimes.vae import VAE
from slimdiff import artifacts
from slimdiff.errors import InputError

INDEX = "model_index.json"
_LIBRARIES = ("diffusers", "transformers")
_ENCODERS = ("text_encoder", "text_encoder_2")
_CONFIGURED = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor")


def load_pipeline(
    folder: Path | str, runtime: str = "onnxruntime", *, threads: int | None = None, unet: Any = None
) -> DiffusionPipeline:
    """Load a folder in optimum's layout, which `slimdiff export` wrote, or one with engines in the same places.

    The pipeline is diffusers' own class, so that its schedulers, callbacks and `from_pipe` (to image to image, or to
    inpainting) are what they are in torch. Graphs of a fixed batch make that many images at once (half of it with
    guidance), and no other number.

    Args:
        folder: with `model_index.json`, a folder per component, scheduler and tokenizers.
        runtime: of every component; see `exporters.runtimes`.
        threads: of a runtime on the CPU; its own choice if not given.
        unet: takes the place of the folder's own, which is then not opened.

    Raises:
        InputError: if the folder is none of ours or not what its manifest says, or a component cannot be opened.
        MissingPackageError: if the runtime is not here.
    """
    folder = Path(folder)
    index = _index(folder)
    class_name = str(index.get("_class_name", "")).removeprefix("ORT")
    kind = getattr(diffusers, class_name, None)
    if not (inspect.isclass(kind) and issubclass(kind, DiffusionPipeline)):
        raise InputError(f"{folder / INDEX} names the pipeline {class_name!r}, which this diffusers does not have")
    if (folder / artifacts.MANIFEST).is_file():
        artifacts.verify_manifest(folder)
    parts: dict[str, Any] = {}
    for name in inspect.signature(kind).parameters:
        value = index.get(name)
        if not isinstance(value, list):
            parts |= {name: value} if name in index else {}
        elif name == "unet":
            parts[name] = unet or UNet.open(folder / name, runtime, threads)
        elif name == "vae":
            parts[name] = VAE.open(folder, runtime, threads)
        elif name in _ENCODERS and value[0] is not None:
            parts[name] = TextEncoder.open(folder / name, runtime, threads)
        else:
            parts[name] = None if value[0] is None else _from_library(folder, name, value)
    return kind(**parts)


def _index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    if not file.is_file():
        raise InputError(f"{folder} is no exported pipeline: it has no {INDEX}; make one with `slimdiff export`")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    if not isinstance(index, dict) or not isinstance(index.get("unet"), list):
        raise InputError(f"{file} names no unet: only pipelines with one are exported")
    if any((folder / "unet").glob("*.safetensors")):
        raise InputError(f"{folder} is a model in torch, not in ONNX: export it first with `slimdiff export`")
    return index


def _from_library(folder: Path, name: str, entry: list[Any]) -> Any:
    """A scheduler, a tokenizer or a feature extractor, of a class that the two libraries bring: no other code."""
    library, kind = entry
    if name not in _CONFIGURED or library not in _LIBRARIES:
        raise InputError(
            f"{folder / INDEX} asks for the {name} {library}.{kind}; taken are {', '.join(_CONFIGURED)} "
            f"of {' and '.join(_LIBRARIES)}"
        )
    found: Any = getattr(importlib.import_module(library), str(kind), None)
    if not hasattr(found, "from_pretrained"):
        raise InputError(f"{folder / INDEX} asks for {library}.{kind}, which this {library} does not have")
    try:
        return found.from_pretrained(folder / name)
    except Exception as error:  # both libraries raise anything from OSError to KeyError for broken files
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"the {name} in {folder} could not be loaded: {reason[0]}") from error
