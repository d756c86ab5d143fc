"""Optimum's layout of an exported pipeline: what lies where, by name. Loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimdiff.errors import InputError

INDEX = "model_index.json"
GRAPH = "model.onnx"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
GRAPHS = ("unet", *TEXT_ENCODERS, "vae_decoder", "vae_encoder")
"""Folders with a graph each, or an engine of it."""
CONFIGURED = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor")
"""Folders with settings alone."""
ENGINE_PIPELINE = "engine-pipeline"
"""The kind, in its manifest, of a folder with engines in the graphs' places."""


def latent_scale(vae: Mapping[str, Any]) -> int:
    """Pixels per latent, along a side, of an AutoencoderKL, by its configuration.

    Raises:
        InputError: if it is another model's.
    """
    blocks = vae.get("block_out_channels")
    if not isinstance(blocks, list | tuple) or not blocks:
        raise InputError("the VAE's config.json has no block_out_channels: only AutoencoderKL is taken")
    return 2 ** (len(blocks) - 1)
