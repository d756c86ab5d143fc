"""What a user may name as a model, looked at before torch and diffusers are loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from slimdiff import embedded
from slimdiff.errors import InputError
from slimdiff.storage import manifest

INDEX = "model_index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_model(model: str | Path) -> Path | None:
    """The directory of `demo` or of a local diffusers pipeline; None for a hub id.

    Raises:
        InputError: if it is none of these; see `read_index` too.
    """
    path = embedded.path() if str(model) == "demo" else Path(model)
    if path.is_file():
        raise InputError(f"{path} is a file: a model is a diffusers pipeline directory (with {INDEX})")
    if path.is_dir():
        read_index(path)
        return path
    if not _HUB_ID.fullmatch(str(model)) or str(model).startswith("."):
        raise InputError(f"{model}: no such directory; a model is 'demo', a diffusers pipeline directory or a hub id")
    snapshot = cached_snapshot(str(model))
    if snapshot is not None:
        read_index(snapshot)
    return snapshot


def cached_snapshot(name: str) -> Path | None:
    """The folder of a hub id in the local cache where `HF_HUB_OFFLINE` is set.

    None for what is no hub id, and where the hub may be asked.

    Raises:
        InputError: if it is not in the cache.
    """
    if name == "demo" or Path(name).exists() or not _HUB_ID.fullmatch(name) or name.startswith("."):
        return None
    from huggingface_hub import constants, try_to_load_from_cache

    if not constants.HF_HUB_OFFLINE:
        return None
    for file in (INDEX, manifest.MANIFEST):  # a model, and any artifact of ours
        if isinstance(found := try_to_load_from_cache(name, file, constants.HF_HUB_CACHE), str):
            return Path(found).parent
    raise InputError(
        f"{name} is not in the hub's cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: fetch it first"
    )


def read_index(folder: Path) -> dict[str, Any]:
    """The content of a folder's `model_index.json`.

    Raises:
        InputError: if there is none, or it is no JSON object.
    """
    file = folder / INDEX
    if not file.is_file():
        raise InputError(f"{folder} is not a diffusers pipeline directory: it has no {INDEX}")
    content = manifest.read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a JSON object")
    return content
