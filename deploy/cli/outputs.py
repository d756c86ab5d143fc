"""Files that commands are given, and places where they write: whole or not at all, and only over what is ours.

Every check is made before the long work, and raises an InputError that says what is wrong and what would be right.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.artifacts.kinds import kind_of
from slimdiff.errors import InputError
from slimdiff.loading.naming import find_model
from slimdiff.storage import manifest


def check_folder(folder: Path, *marks: str) -> None:
    """Refuse a place to write into that is a file, cannot be written, or holds other people's files.

    Args:
        marks: a folder that slimdiff wrote has at least one of these files.
    """
    check_writable(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / mark).exists() for mark in marks):
        raise InputError(f"--out {folder} holds files that slimdiff did not write: name another folder, or empty it")


def check_writable(path: Path, flag: str = "--out") -> None:
    """Refuse a place, named by a flag, that cannot be written; if it is not there, look where it would be made."""
    whole = path.absolute()
    place = next(p for p in (whole, *whole.parents) if p.exists())
    if os.access(place, os.W_OK | (os.X_OK if place.is_dir() else 0)):
        return
    read_only = hasattr(os, "statvfs") and os.statvfs(place).f_flag & os.ST_RDONLY
    why = "it is on a read-only file system" if read_only else "permission denied"
    raise InputError(f"{flag} {path} cannot be written ({why}): give another")


def check_file(path: str, flag: str) -> None:
    """Refuse a file to read, named by a flag, that is not there."""
    if not Path(path).is_file():
        raise InputError(f"{flag} {path}: there is no such file")


def check_runnable(*names: str | None) -> None:
    """Refuse artifacts to open that are neither here nor on the hub, or nothing that slimdiff knows."""
    for name in names:
        if name is not None and kind_of(name) == "model":
            find_model(name)


def check_artifact(out: Path) -> None:
    """Refuse a place where no artifact can appear: see `check_folder`, and a mount point, which cannot be replaced."""
    if os.path.ismount(out):
        raise InputError(f"--out {out} is a mount point, which cannot be replaced as a whole: name a folder in it")
    check_folder(out, manifest.MANIFEST)
    check_writable(out.absolute().parent)


@contextmanager
def artifact_folder(out: Path) -> Iterator[Path]:
    """A folder to write an artifact into, which takes the place of `out` when the block ends well."""
    check_artifact(out)
    with manifest.replacing(out) as temporary:
        yield temporary
