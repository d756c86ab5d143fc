"""One process at a time in a folder that commands write to and go on from: a build's, a calibration's, engines'.

The lock is the operating system's, on the file `.lock` in the folder, so it goes when its process goes, however it
ends; the pid in the file only serves the message.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

from deploy.cli.console import log
from slimdiff.errors import InputError
from slimdiff.storage.atomic import clear_leftovers
from slimdiff.storage.manifest import LOCK

try:
    import fcntl
except ImportError:  # Windows: processes are not protected from one another there
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def locked(folder: Path, work: str = "build", out: Path | None = None, *, stays: bool = True) -> Iterator[None]:
    """Hold a folder, for two processes would write over each other there. What killed ones left is cleared away.

    Args:
        folder: made if it is not there.
        work: what is done there, for the message.
        out: what the user calls the folder; None: `folder`.
        stays: whether the file stays there; not in what is handed on as it is.

    Raises:
        InputError: at once if another process holds it, naming that process.
    """
    with _taken(folder, work, out or folder) as file:
        clear_leftovers(folder)
        try:
            yield
        finally:
            file.truncate(0)
            if not stays:  # who waits for it sees that it is gone, and makes another
                (folder / LOCK).unlink(missing_ok=True)


def remove_empty(folder: Path) -> None:
    """Remove a folder that holds nothing but its lock; by the process that has it."""
    if folder.is_dir() and all(entry.name == LOCK for entry in folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(file: IO[Any]) -> bool:
    """Lock an open file until it is closed, as soon as nobody else holds it; False where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


@contextmanager
def _taken(folder: Path, work: str, out: Path) -> Iterator[TextIO]:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / LOCK).open("a+", encoding="utf-8")
        except FileNotFoundError:  # who held the folder has just removed it
            continue
        with file:
            _take(file, work, out)
            if not _is_there(file, folder / LOCK):
                continue
            file.seek(0)
            file.truncate()
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield file
            return


def _take(file: TextIO, work: str, out: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        pid = file.read().strip() or "unknown"
        raise InputError(
            f"another {work} (process {pid}) is at work in {out}: wait for it, or give another --out"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: the file system has no locks, so see to it that nothing else works there meanwhile", out)


def _is_there(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
