"""The chain from a recipe to a report, and the command line.

`deploy.load(path)` opens a bundle as a diffusers pipeline.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy.bundle.load import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":  # loads torch and diffusers, which `slimdiff --help` does without
        from deploy.bundle.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
