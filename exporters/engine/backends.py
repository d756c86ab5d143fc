"""Which of TensorRT and TensorRT-RTX builds here, and in which version."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Literal

from exporters.engine.gpu import AskGpu, gpu_here
from exporters.registry import runtime_of
from slimdiff.errors import InputError, MissingPackageError
from slimdiff.storage import manifest

if TYPE_CHECKING:
    from exporters.settings import EngineSettings

Backend = Literal["tensorrt", "tensorrt-rtx"]
BACKENDS: tuple[Backend, ...] = ("tensorrt", "tensorrt-rtx")


def available_backend(gpu: AskGpu = gpu_here) -> Backend | None:
    """The backend that `auto` takes here; None if neither is installed."""
    installed = [name for name in BACKENDS if importlib.util.find_spec(runtime_of(name).module)]
    if "tensorrt" in installed and (len(installed) == 1 or gpu() is not None):
        return "tensorrt"
    return "tensorrt-rtx" if "tensorrt-rtx" in installed else None


def installed_version(backend: str) -> str | None:
    """Version of an installed backend, which is that of its distribution; None if it is not installed."""
    row = runtime_of(backend)
    if found := manifest.versions(row.packages):
        return next(iter(found.values()))
    # Unpacked from an archive, it has no distribution.
    return str(row.require().__version__) if importlib.util.find_spec(row.module) else None


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
    row = runtime_of(backend)
    for module in (row.module, "polygraphy"):
        if importlib.util.find_spec(module) is None:
            raise MissingPackageError(f"{module} is not installed: pip install 'slimdiff[{row.extra}]'")
    if backend == "tensorrt" and settings.targets:
        raise InputError("TensorRT builds for the GPU that it runs on: targets are for the backend tensorrt-rtx")
    if gpu() is None:
        if backend == "tensorrt":
            raise MissingPackageError("TensorRT builds on a GPU, and there is none here; tensorrt-rtx needs none")
        if not settings.targets:
            raise InputError("there is no GPU here to build for: name targets, e.g. sm89")
    return backend
