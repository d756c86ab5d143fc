"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_ON_PARENT_DEATH = 1  # PR_SET_PDEATHSIG of Linux


def end_with(parent: int) -> None:
    """Have the system kill this process when the one that started it is gone, killed or not; on Linux alone.

    Args:
        parent: pid of the one that started it. If it is gone already, this one ends at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_ON_PARENT_DEATH, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
