"""One process at a time in a folder that commands write to and go on from: a build's, a calibration's, engines'.

The lock is the operating system's, on the file `.lock` in the folder, so it goes when its process goes, however it
ends. The pid in the file serves the message alone.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import BaseFileLock, FileLock, Timeout, lock_descriptor

from slimdiff.errors import InputError
from slimdiff.storage.atomic import clear_leftovers
from slimdiff.storage.manifest import LOCK

log = logging.getLogger("slimdiff")

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def locked(folder: Path, work: str = "build", out: Path | None = None, *, stays: bool = True) -> Iterator[None]:
    """Hold a folder, for two processes would write over each other there. Leftovers of killed ones are cleared away.

    Args:
        folder: made if it is not there.
        work: that is done there, for the message.
        out: the user's name for the folder; None: `folder`.
        stays: whether the lock's file stays there; not in a folder that is handed on as it is.

    Raises:
        InputError: at once if another process holds it, naming that process.
    """
    file = folder / LOCK
    lock = FileLock(file, timeout=0)
    _acquire(lock, file, work, out or folder)
    try:
        file.write_text(f"{os.getpid()}\n", encoding="utf-8")
        clear_leftovers(folder)
        try:
            yield
        finally:
            if stays:
                file.write_text("", encoding="utf-8")
            else:  # a process that waits for it sees that it is gone, and makes another
                file.unlink(missing_ok=True)
    finally:
        lock.release()


def _acquire(lock: BaseFileLock, file: Path, work: str, out: Path) -> None:
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
            return
        except FileNotFoundError:  # the process that held the folder has just removed it
            continue
        except Timeout:
            pid = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
            raise InputError(
                f"another {work} (process {pid or 'unknown'}) is at work in {out}: wait for it, or give another --out"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("%s: the file system has no locks, so see to it that nothing else works there meanwhile", out)
            return


def wait_for(file: IO[Any]) -> bool:
    """Lock an open file until it is closed, as soon as nobody else holds it; False where there are no locks."""
    try:
        return lock_descriptor(file.fileno())
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False


def remove_empty(folder: Path) -> None:
    """Remove a folder that holds nothing but its lock; by the process that holds it."""
    if folder.is_dir() and all(entry.name == LOCK for entry in folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)
