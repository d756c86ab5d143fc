"""Folders of images: those that other tools compare, with equal names on both sides, and those of real images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimdiff.errors import InputError
from slimdiff.prompts.material import find_pictures, open_picture
from slimdiff.storage import manifest

KIND = "images"
"""What the manifest calls such a folder."""


def save_images(
    folder: Path, dense: Sequence[Any], slim: Sequence[Any], captions: Sequence[str], made_from: dict[str, Any]
) -> None:
    """Write `dense/00000.png` and so on, `slim/` with equal names, and `captions.txt` with a line for each pair."""
    for name, images in (("dense", dense), ("slim", slim)):
        (folder / name).mkdir()
        for number, image in enumerate(images):
            image.save(folder / name / f"{number:05d}.png")
    lines = [" ".join(caption.split()) for caption in captions[: len(slim)]]
    (folder / "captions.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    manifest.write_manifest(folder, KIND, made_from)


class Pictures(Sequence[Any]):
    """Pictures of files in RGB, each opened when it is asked for: a folder of real images may hold many thousands."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, at: Any) -> Any:
        files = self._files[at]
        return [open_picture(file) for file in files] if isinstance(at, slice) else open_picture(files)


def read_images(folder: Path, at_least: int) -> Pictures:
    """The images in a folder, in the order of their names.

    Raises:
        InputError: if there is no such folder, one cannot be read, or there are fewer.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} of reference images")
    return Pictures(find_pictures(folder, "reference images", at_least))
