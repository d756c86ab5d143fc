"""Opening the pipeline that a user names: the embedded model, a local diffusers directory, or a hub id."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import slimdiff.models  # noqa: F401  (slim classes must be importable before a slim pipeline is loaded)
from slimdiff import artifacts, embedded
from slimdiff.errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load_pipeline(
    model: str | Path, dtype: torch.dtype = torch.float32, *, without: Sequence[str] = ()
) -> DiffusionPipeline:
    """Load `demo`, a local diffusers directory (dense or slim), or a hub id; safetensors only.

    A directory with a manifest is checked against it first.

    Args:
        without: components that are not needed, and are neither fetched nor loaded: they become None.

    Raises:
        InputError: if it is not a diffusers pipeline, or its weights are pickles.
    """
    left_out = dict.fromkeys(without)
    if str(model) == "demo":
        return DiffusionPipeline.from_pretrained(embedded.path(), torch_dtype=dtype, use_safetensors=True, **left_out)
    path = Path(model)
    if path.exists():
        _check_directory(path)
    elif not _HUB_ID.fullmatch(str(model)) or str(model).startswith("."):
        raise InputError(f"{model}: no such directory; a model is 'demo', a diffusers pipeline directory or a hub id")
    try:
        return DiffusionPipeline.from_pretrained(
            str(model), torch_dtype=dtype, use_safetensors=True, trust_remote_code=False, **left_out
        )
    except InputError:
        raise
    except Exception as error:  # diffusers raises anything from OSError to KeyError for a broken directory
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{model} could not be loaded as a diffusers pipeline: {reason[0]}") from error


def _check_directory(path: Path) -> None:
    index = path / "model_index.json"
    if not path.is_dir():
        raise InputError(f"{path} is a file: a model is a diffusers pipeline directory (with model_index.json)")
    if not index.is_file():
        raise InputError(f"{path} is not a diffusers pipeline directory: it has no model_index.json")
    if (path / artifacts.MANIFEST).is_file():
        artifacts.verify_manifest(path)
    try:
        components = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{index} is not JSON: {error}") from error
    for name, entry in components.items():
        folder = path / name
        if not (isinstance(entry, list) and folder.is_dir()) or any(folder.glob("*.safetensors")):
            continue
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".ckpt", ".pt", ".pth")]
        if pickles:
            raise InputError(
                f"{folder / pickles[0]} is a pickle, which can run code when opened: refused; "
                "save the model again with safe_serialization=True"
            )
