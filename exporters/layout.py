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
CONFIGURED = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor")
"""Folders with settings alone."""
ENGINE_PIPELINE = "engine-pipeline"
"""The kind, in its manifest, of a folder with engines in the graphs' places."""


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
