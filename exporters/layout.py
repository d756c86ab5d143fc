"""Optimum's layout of an exported pipeline: what lies where, by name, and the models' configurations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimdiff.errors import InputError
from slimdiff.storage import manifest

INDEX = "model_index.json"
GRAPH = "model.onnx"
CONFIG = "config.json"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
VAES = ("vae_decoder", "vae_encoder")
GRAPHS = ("unet", *TEXT_ENCODERS, *VAES)
"""Folders with a graph each, or an engine of it."""
IMAGE_ENCODER = "image_encoder"
"""A folder with a graph of what IP-Adapters are shown pictures by."""
SAFETY_CHECKER = "safety_checker"
"""A folder with a graph, beside engines too: it is in float32 wherever it runs, as rounding could turn its verdict."""
STEERING = ("controlnet", "adapter")
"""Components that give the UNet residuals, beside its prompt. A second one lies in `controlnet_1`."""
FINAL_NORM = ("final_layer_norm.weight", "final_layer_norm.bias")
"""Outputs `[B, D]` of a text encoder's graph beside its hidden states, where its pipeline puts that norm on them."""
CONFIGURED = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor")
"""Folders with settings alone."""
_CHECKER = "StableDiffusionSafetyChecker"
_CARRIED = ("unet", "vae", *TEXT_ENCODERS, IMAGE_ENCODER, SAFETY_CHECKER, *STEERING, *CONFIGURED)
ENGINE_PIPELINE = "engine-pipeline"
"""The kind, in its manifest, of a folder with engines in the graphs' places."""


def check_carried(index: Mapping[str, Any], where: Path | str) -> None:
    """Refuse a pipeline with a component that an exported one has no place for: none is dropped without a word.

    Args:
        index: what `model_index.json` has, or a pipeline's `config`: of components, their library and class.

    Raises:
        InputError: naming the first of them.
    """
    for name, entry in index.items():
        if not is_component(entry) or (name in _CARRIED and name != SAFETY_CHECKER) or entry[1] == _CHECKER:
            continue
        remedy = f"take it out where images do not need it ({name}=None; in {INDEX} [null, null]), or stay in torch"
        if name == SAFETY_CHECKER:
            remedy = "export without it (slimdiff export --no-safety-checker, or ExportSettings(safety_checker=False))"
        raise InputError(
            f"{where} asks for the {name} {'.'.join(entry)}, which exported pipelines cannot have: {remedy}"
        )


def steering_folders(folder: Path) -> list[str]:
    """The names of the folders with ControlNets and adapters in an exported pipeline."""
    found = [name for name in STEERING if (folder / name).is_dir()]
    while (folder / (another := f"controlnet_{len(found)}")).is_dir():
        found.append(another)
    return found


def is_component(entry: Any) -> bool:
    """Whether an entry of `model_index.json` names the library and class of a component that is there."""
    return isinstance(entry, list | tuple) and len(entry) == 2 and all(isinstance(part, str) for part in entry)


def without_safety_checker(index: Mapping[str, Any]) -> dict[str, Any]:
    """An index that says that images are not checked."""
    said = {SAFETY_CHECKER: [None, None], "requires_safety_checker": False}
    return {**index, **{name: value for name, value in said.items() if name in index}}


def read_config(path: Path | str) -> dict[str, Any]:
    """The `config.json` of the model that a folder's graph or engine, or this file, was made from.

    Raises:
        InputError: if it is not there, or no JSON.
    """
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / CONFIG
    if not file.is_file():
        raise InputError(f"there is no {file}: a model in ONNX or an engine has its config.json beside it")
    try:
        return dict(manifest.read_json(file))
    except (InputError, ValueError, TypeError) as error:
        raise InputError(f"{file} is not a model's config: {error}") from error


def latent_scale(vae: Mapping[str, Any]) -> int:
    """Pixels per latent, along a side, of an AutoencoderKL, by its configuration.

    Raises:
        InputError: if it is another model's.
    """
    blocks = vae.get("block_out_channels")
    if not isinstance(blocks, list | tuple) or not blocks:
        raise InputError("the VAE's config.json has no block_out_channels: only AutoencoderKL is taken")
    return 2 ** (len(blocks) - 1)
