"""What figures were measured on: names for people, and a fingerprint that tells two machines apart.

Loads next to nothing for a process that is to be timed: it can then be small.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import psutil

_HARDWARE = ("cpu", "architecture", "cores", "memory_gib", "governor", "gpus")
_PACKAGES = ("slimdiff", "torch", "diffusers", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "numpy")
EXACT_INT8 = "SLIMDIFF_EXACT_INT8"
"""The environment variable that says `exact_int8` in the system's place: 1 or 0."""
_CPUINFO = Path("/proc/cpuinfo")
_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"}
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def core_numbers() -> list[int] | None:
    """Numbers of the cores that this process may run on; None where processes cannot be kept on cores."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def usable_cores() -> int:
    """How many cores this process may run on."""
    numbers = core_numbers()
    return os.cpu_count() or 1 if numbers is None else len(numbers)


def machine_name() -> str:
    """CPU model, cores that this process may use, and memory, in one line."""
    cores = usable_cores()
    return f"{_cpu()}, {cores} core{'s' if cores != 1 else ''}, {_memory_gib()} GiB"


def fingerprint() -> dict[str, Any]:
    """This machine, as far as it decides how fast things are.

    Returns:
        `cpu`, `architecture`, `cores` (of the machine), `memory_gib`, `governor` (None if unreadable), `gpus` (name and
        driver of each, as `nvidia-smi` has them) and `id`, a hash of these: what has the same id may be compared.
        Beside them `usable_cores`, `kernel`, `python` and `versions`, which change on one machine: not in the id.
    """
    from slimdiff.storage import manifest

    facts: dict[str, Any] = {
        "cpu": _cpu(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "governor": _GOVERNOR.read_text().strip() if os.access(_GOVERNOR, os.R_OK) else None,
        "gpus": _gpus(),
        "usable_cores": usable_cores(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": manifest.versions(_PACKAGES),
    }
    text = json.dumps({name: facts[name] for name in _HARDWARE}, sort_keys=True)
    return {"id": hashlib.sha256(text.encode()).hexdigest()[:12], **facts}


def exact_int8() -> bool | None:
    """Whether this processor adds products of bytes exactly; None where the system does not tell.

    x86 does with VNNI (AMX-int8 has its own sums); without, see `exporters.graphs.int8`. Other architectures have no
    such instruction: ONNX Runtime's page on quantisation says so of Arm. Only Linux lists an x86 processor's flags.
    """
    if (said := os.environ.get(EXACT_INT8)) in ("0", "1"):
        return said == "1"
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686", "x86"):
        return True
    flags = re.search(r"^flags\s*:(.*)$", _CPUINFO.read_text() if _CPUINFO.is_file() else "", re.MULTILINE)
    return not _DOT_PRODUCTS.isdisjoint(flags[1].split()) if flags else None


def peak_memory() -> int | None:
    """Most bytes that this process has had; None where the system does not tell.

    The kernel's own mark: `getrusage`'s starts from the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _cpu() -> str:
    if _CPUINFO.is_file() and (match := re.search(r"^model name\s*:\s*(.+)$", _CPUINFO.read_text(), re.MULTILINE)):
        return match[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> int:
    return round(psutil.virtual_memory().total / 2**30)


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # no such tool, or none of its driver
        return []
    return [line.strip() for line in said.splitlines() if line.strip()]
