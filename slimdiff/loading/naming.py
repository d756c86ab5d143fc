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
    return None


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
