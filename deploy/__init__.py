"""The chain from a recipe to a report, and the command line.

`deploy.run_build(recipe, name, folder)` is what `slimdiff build` runs, with a recipe of `deploy.recipe.recipe`.
`deploy.load(path)` opens a bundle as a diffusers pipeline.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy.build.chain import run_build
    from deploy.bundle.load import load

__all__ = ["load", "run_build"]

_HOMES = {"load": "deploy.bundle.load", "run_build": "deploy.build.chain"}


def __getattr__(name: str) -> Any:
    """Import a name at its first use (PEP 562): torch and diffusers take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
