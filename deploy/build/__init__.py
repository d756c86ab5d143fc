"""The build: stages from a recipe to a verdict, and a sweep alone; with what single commands share with its stages."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "run_build": "chain",
    "run_sweep": "chain",
    "quality": "steps.compare",
    "shapes": "steps.export",
    "spread": "workshop",
}


def __getattr__(name: str) -> Any:
    """Import a name at its first use (PEP 562): torch and diffusers take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
