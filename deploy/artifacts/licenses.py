"""Licences go with the weights that they are of, from one artifact to the next."""

from __future__ import annotations

import shutil
from pathlib import Path

_NAMES = ("license", "licence", "notice", "copying")


def license_files(folder: Path) -> list[Path]:
    """Files in a folder whose names say that they are licences or notices; none if there is no such folder."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in found if p.is_file() and p.name.lower().startswith(_NAMES)]


def copy_licenses(source: Path | str, folder: Path) -> None:
    """Copy what is a licence from the folder of a model to that of what was made from it; `demo`'s is our own."""
    for file in license_files(Path(source)) if str(source) != "demo" else []:
        shutil.copyfile(file, folder / file.name)
