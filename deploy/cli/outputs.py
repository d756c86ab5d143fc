"""Files that commands are given, and places where they write: whole or not at all, and only over what is ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimdiff.errors import InputError
from slimdiff.storage import manifest


def check_folder(folder: Path, *marks: str) -> None:
    """Refuse a place that holds something else.

    Args:
        folder: where a command is to write.
        marks: files of which a folder that slimdiff wrote has at least one.

    Raises:
        InputError: if it is a file, a folder with other people's files in it, or cannot be written.
    """
    check_writable(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / mark).exists() for mark in marks):
        raise InputError(f"--out {folder} holds files that slimdiff did not write: name another folder, or empty it")


def check_writable(path: Path, flag: str = "--out") -> None:
    """Refuse a place that cannot be written, before the long work and not after it.

    Args:
        path: to be written; what is not there yet is looked at where it would be made.
        flag: that named it, for the message.

    Raises:
        InputError: saying why it cannot.
    """
    whole = path.absolute()
    place = next(p for p in (whole, *whole.parents) if p.exists())
    if os.access(place, os.W_OK | (os.X_OK if place.is_dir() else 0)):
        return
    read_only = hasattr(os, "statvfs") and os.statvfs(place).f_flag & os.ST_RDONLY
    why = "it is on a read-only file system" if read_only else "permission denied"
    raise InputError(f"{flag} {path} cannot be written ({why}): give another")


def check_file(path: str, flag: str) -> None:
    """A file that a command is to read.

    Raises:
        InputError: if it is not there.
    """
    if not Path(path).is_file():
        raise InputError(f"{flag} {path}: there is no such file")


def check_runnable(*names: str | None) -> None:
    """Artifacts that a command is to open, as the user names them; None for one that was not named.

    Raises:
        InputError: if one is neither here nor the id of a model on the hub, or is nothing that slimdiff knows.
    """
    from deploy.artifacts.kinds import kind_of
    from slimdiff.loading.naming import find_model

    for name in names:
        if name is not None and kind_of(name) == "model":
            find_model(name)


def check_artifact(out: Path) -> None:
    """Refuse a place where no artifact can appear.

    Raises:
        InputError: see `check_folder`; also for a mount point, which nothing can take the place of.
    """
    if os.path.ismount(out):
        raise InputError(f"--out {out} is a mount point, which cannot be replaced as a whole: name a folder in it")
    check_folder(out, manifest.MANIFEST)
    check_writable(out.absolute().parent)


@contextmanager
def artifact_folder(out: Path) -> Iterator[Path]:
    """A folder to write an artifact into, which takes the place of `out` when the block ends well.

    Raises:
        InputError: if `out` is not free to be written.
    """
    check_artifact(out)
    with manifest.replacing(out) as temporary:
        yield temporary
