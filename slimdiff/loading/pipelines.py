"""Opening the pipeline that a user names: the embedded model, a local diffusers directory, or a hub id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import slimdiff.models  # noqa: F401  (slim classes must be importable before a slim pipeline is loaded)
from slimdiff.errors import InputError
from slimdiff.loading.model_directory import check_model_directory
from slimdiff.loading.naming import find_model
from slimdiff.progress import working


@working("load the model")
def load_pipeline(
    model: str | Path, dtype: torch.dtype = torch.float32, *, without: Sequence[str] = ()
) -> DiffusionPipeline:
    """Load `demo`, a local diffusers directory (dense or slim), or a hub id; safetensors only, and no code but ours.

    What is loaded is looked through first (`check_model_directory`), and held against its manifest if it has one.

    Args:
        without: components that are not needed, and are neither fetched nor loaded: they become None.

    Raises:
        InputError: if it is not a diffusers pipeline, its weights are pickles, or it asks for code of its own.
    """
    left_out = dict.fromkeys(without)
    try:
        path = find_model(model)
        if path is None:
            safe = {"use_safetensors": True, "trust_remote_code": False}
            path = Path(DiffusionPipeline.download(str(model), **safe, **left_out))
        check_model_directory(path)
        return DiffusionPipeline.from_pretrained(
            str(path), torch_dtype=dtype, use_safetensors=True, trust_remote_code=False, **left_out
        )
    except InputError:
        raise
    except Exception as error:  # diffusers raises anything from OSError to KeyError for a broken directory
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{model} could not be loaded as a diffusers pipeline: {reason[0]}") from error
