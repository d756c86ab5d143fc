"""Whether a build fits into memory, before it is tried."""

from __future__ import annotations

from pathlib import Path

import psutil

from slimdiff.errors import InputError

PER_WEIGHT_BYTE = 2.9
"""Bytes that TensorRT-RTX 1.7 builds with, per byte of weights, above `BASE`.

Measured peaks: 1.46 GB for 0.31 GB of weights (fp16; for one target or five), 2.36 GB for 0.63 GB (fp32), 5.5 GB for
1.72 GB (Stable Diffusion 1.5, fp16)."""

BASE = 0.56e9
"""What a builder takes before any weights, bytes: the line through the same measurements."""

_CGROUP = Path("/sys/fs/cgroup")


def build_memory(weights: int) -> float:
    """Estimate of the bytes that a build needs, from those of the graph's weights."""
    return BASE + PER_WEIGHT_BYTE * weights


def available_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes that a new process can have: what the system has left, or the container if that is less.

    Args:
        cgroup: where the container's limits are (cgroup v2); a container without limits has none there.
    """
    left = psutil.virtual_memory().available
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return left
    return left if limit == "max" else min(left, int(limit) - used + int(statistics.get("inactive_file", 0)))


def demand_memory(weights: int, available: int) -> None:
    """Refuse a build that would not fit.

    Raises:
        InputError: saying what it needs, what there is, and what to do.
    """
    need = build_memory(weights)
    if need > available:
        raise InputError(
            f"building an engine of {weights / 1e9:.1f} GB of weights takes about {need / 1e9:.1f} GB of memory, and "
            f"{available / 1e9:.1f} GB are free: free some, export in fp16, or build with check_memory: false "
            "(--ignore-memory)"
        )
