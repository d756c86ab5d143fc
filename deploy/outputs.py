"""Where commands write: whole or not at all, and never over what is not slimdiff's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimdiff import artifacts
from slimdiff.errors import InputError


def check_folder(folder: Path, *marks: str) -> None:
    """Refuse a place that holds something else.

    Args:
        folder: where a command is to write.
        marks: files of which a folder that slimdiff wrote has at least one.

    Raises:
        InputError: if it is a file, or a folder with other people's files in it.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / mark).exists() for mark in marks):
        raise InputError(f"--out {folder} holds files that slimdiff did not write: name another folder, or empty it")


@contextmanager
def artifact_folder(out: Path) -> Iterator[Path]:
    """A folder to write an artifact into, which takes the place of `out` when the block ends well.

    Raises:
        InputError: if `out` is not free to be written.
    """
    check_folder(out, artifacts.MANIFEST)
    with artifacts.replacing(out.absolute()) as temporary:
        yield temporary
