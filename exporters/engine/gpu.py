"""Which GPU is here, asked of the CUDA driver itself: torch may be a build for CPUs, TensorRT may not be installed."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_KERNEL_MODULE = Path("/proc/driver/nvidia/version")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Gpu:
    """A GPU as far as engines care."""

    name: str
    capability: str
    """Compute capability, e.g. `sm89`."""
    driver: str
    """Version of the NVIDIA driver, e.g. `580.65.06`; the CUDA version that it offers where it does not say."""


AskGpu = Callable[[], Gpu | None]
"""How engines learn what GPU is here; tests and tools that plan for another machine put their own in place."""


def gpu_here() -> Gpu | None:
    """The first GPU that CUDA shows (`CUDA_VISIBLE_DEVICES` counts); None without a driver or a GPU."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    device, major, minor, version = (ctypes.c_int() for _ in range(4))
    name = ctypes.create_string_buffer(256)
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        or cuda.cuDriverGetVersion(ctypes.byref(version))
    )
    if failed:
        return None
    return Gpu(name.value.decode(), f"sm{major.value}{minor.value}", _driver(version.value))


def _driver(cuda_version: int) -> str:
    if _KERNEL_MODULE.is_file() and (found := re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", _KERNEL_MODULE.read_text())):
        return found[0]
    return f"CUDA {cuda_version // 1000}.{cuda_version % 1000 // 10}"
