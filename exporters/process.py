"""Worker processes: they have our own packages, whatever the working directory holds, and end with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_ON_PARENT_DEATH = 1  # PR_SET_PDEATHSIG of Linux
_ROOT = str(Path(__file__).resolve().parents[1])
# Our packages are found by name in our own root. Putting that root first on the path would not do: of an installed
# package it is site-packages, and what lies there must not come before the standard library.
_BOOT = """import sys
sys.path[:] = {path!r}
from importlib.machinery import PathFinder
class Ours:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{root!r}]) if name in ("slimdiff", "exporters") else None
sys.meta_path.insert(0, Ours)
from exporters.process import end_with
end_with({parent})
from {module} import main
sys.exit(main(sys.argv[1:]))
"""


def worker_command(module: str, *arguments: str) -> list[str]:
    """The command of a worker process: `main(arguments)` of a module of ours, whose result is the exit code.

    The process has this one's import path, as those of `multiprocessing` have, so it finds what was imported here. The
    working directory is not on it unless it was put there by name, and a folder `exporters` or `slimdiff` on it is
    passed over. The process ends with this one (on Linux).
    """
    path = [entry for entry in sys.path if entry]
    boot = _BOOT.format(path=path, root=_ROOT, parent=os.getpid(), module=module)
    return [sys.executable, "-c", boot, *arguments]


def end_with(parent: int) -> None:
    """Have the system kill this process when its parent, by pid, is gone, killed or not; on Linux alone.

    If the parent is gone already, this process ends at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_ON_PARENT_DEATH, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
