"""Which of TensorRT and TensorRT-RTX builds here, and in which version."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Literal

from exporters.engine.gpu import AskGpu, gpu_here
from slimdiff.errors import InputError, MissingPackageError

if TYPE_CHECKING:
    from exporters.settings import EngineSettings

Backend = Literal["tensorrt", "tensorrt-rtx"]
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
EXTRAS = {"tensorrt": "gpu", "tensorrt-rtx": "tensorrt-rtx"}
_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
}


def available_backend(gpu: AskGpu = gpu_here) -> Backend | None:
    """The backend that `auto` takes here; None if neither is installed."""
    installed = [name for name, module in MODULES.items() if importlib.util.find_spec(module)]
    if "tensorrt" in installed and (len(installed) == 1 or gpu() is not None):
        return "tensorrt"
    return "tensorrt-rtx" if "tensorrt-rtx" in installed else None


def installed_version(backend: str) -> str | None:
    """Version of an installed backend, which is that of its distribution; None if it is not installed."""
    for name in _DISTRIBUTIONS[backend]:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if importlib.util.find_spec(MODULES[backend]) is None:
        return None
    return str(importlib.import_module(MODULES[backend]).__version__)  # unpacked from an archive: no distribution


def choose_backend(settings: EngineSettings, gpu: AskGpu = gpu_here) -> Backend:
    """The backend that builds what is asked for.

    Raises:
        MissingPackageError: if it, or the GPU that it builds on, is not here.
        InputError: if it cannot build that.
    """
    backend = available_backend(gpu) if settings.backend == "auto" else settings.backend
    if backend is None:
        raise MissingPackageError(
            "neither tensorrt nor tensorrt_rtx is installed: pip install 'slimdiff[tensorrt-rtx]', which also builds "
            "without a GPU, or 'slimdiff[gpu]'"
        )
    for module in (MODULES[backend], "polygraphy"):
        if importlib.util.find_spec(module) is None:
            raise MissingPackageError(f"{module} is not installed: pip install 'slimdiff[{EXTRAS[backend]}]'")
    if backend == "tensorrt" and settings.targets:
        raise InputError("TensorRT builds for the GPU that it runs on: targets are for the backend tensorrt-rtx")
    if gpu() is None:
        if backend == "tensorrt":
            raise MissingPackageError("TensorRT builds on a GPU, and there is none here; tensorrt-rtx needs none")
        if not settings.targets:
            raise InputError("there is no GPU here to build for: name targets, e.g. sm89")
    return backend
