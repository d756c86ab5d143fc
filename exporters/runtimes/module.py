"""What the drop-ins have in common: they are modules to diffusers, and their sessions stay where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimdiff.errors import InputError
from slimdiff.storage import manifest

CONFIG = "config.json"


class RuntimeModule(nn.Module):
    """A module that computes in a session. Moving or casting it does nothing.

    Attributes:
        dtype: of the graph, not of the arithmetic inside.
        device: the CPU, where tensors are handed over.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.device = torch.device("cpu")
        # Whoever asks a module for its dtype by its first parameter gets the graph's.
        self.anchor = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    def _apply(self, fn: Any, recurse: bool = True) -> RuntimeModule:
        return self


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
