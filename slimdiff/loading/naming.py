"""What a user may name as a model, looked at before torch and diffusers are loaded."""

from __future__ import annotations

import re
from pathlib import Path

from slimdiff import embedded
from slimdiff.errors import InputError

INDEX = "model_index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_model(model: str | Path) -> Path | None:
    """The directory of `demo` or of a local diffusers pipeline; None for a hub id.

    Raises:
        InputError: if it is none of these.
    """
    path = embedded.path() if str(model) == "demo" else Path(model)
    if path.is_file():
        raise InputError(f"{path} is a file: a model is a diffusers pipeline directory (with {INDEX})")
    if path.is_dir():
        if not (path / INDEX).is_file():
            raise InputError(f"{path} is not a diffusers pipeline directory: it has no {INDEX}")
        return path
    if not _HUB_ID.fullmatch(str(model)) or str(model).startswith("."):
        raise InputError(f"{model}: no such directory; a model is 'demo', a diffusers pipeline directory or a hub id")
    return None
