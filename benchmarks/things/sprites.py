"""Fetch two sets of emoji and pack their sprites: `python -m benchmarks.things.sprites --out runs/things/sprites.npz`.

Needs npm. The sprites serve training alone: neither the trained model nor its evaluation reads them.
`NOTICES.md` keeps both licences. `concepts.txt` names the things: a line holds the emoji's short name in
emoji-datasource, then its name in captions. Flags, people, clocks' hands, keycaps, letters and plain shapes were left
out by name, and of two emoji that look alike in either style one was left out by distance
(`nearest_pair`: the closest two that stay differ by more than two near-twins such as a ram and a sheep do).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SPRITE = 48  # pixels a side
CONCEPTS = Path(__file__).with_name("concepts.txt")
LEAST_DISTANCE = 7.9  # between two concepts, over premultiplied thumbnails of 16x16


class DataError(Exception):
    """What is wrong with the data, in one line."""


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    sha512: str  # base64, the registry's integrity

    @property
    def file(self) -> str:
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


SHADED = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)
FLAT = Package(
    "emoji-datasource-google",
    "16.0.0",
    "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
)


def concepts() -> list[tuple[str, str]]:
    """Pairs of the emoji's short name and its name in captions, in the order of the classes."""
    lines = CONCEPTS.read_text().splitlines()
    return [(short, name) for short, _, name in (line.partition(" ") for line in lines)]


def download(package: Package, folder: Path) -> Path:
    """The package's archive in `folder`, fetched with npm when it is not there, and checked."""
    file = folder / package.file
    if not file.exists():
        command = ["npm", "pack", f"{package.name}@{package.version}", "--pack-destination", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise DataError(f"npm is not installed; it fetches {package.name} {package.version}") from None
        except subprocess.CalledProcessError as error:
            said = (error.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(f"npm could not fetch {package.name} {package.version}: {said}") from None
    check(package, file)
    return file


def check(package: Package, file: Path) -> None:
    if not file.exists():
        raise DataError(f"{file} is missing: npm did not write {package.name} {package.version}")
    digest = base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()
    if digest != package.sha512:
        raise DataError(f"{file} is not {package.name} {package.version} as published (cut short, or another version)")


def crop(picture: Image.Image, size: int = SPRITE) -> np.ndarray:
    """The picture's visible part, centred in a square, with premultiplied colours: uint8 `[size, size, 4]`."""
    rgba = np.asarray(picture.convert("RGBA"), dtype=np.float32)
    rgba = np.concatenate([rgba[..., :3] * rgba[..., 3:] / 255, rgba[..., 3:]], -1)
    rows, columns = np.nonzero(rgba[..., 3] > 25)
    rgba = rgba[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = rgba.shape[:2]
    side = max(height, width)
    square = np.zeros((side, side, 4), np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = rgba
    method = Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC
    channels = [np.asarray(Image.fromarray(square[..., c]).resize((size, size), method)) for c in range(4)]
    return np.stack(channels, -1).round().clip(0, 255).astype(np.uint8)


def reader(archive: tarfile.TarFile) -> Callable[[str], bytes]:
    members = {member.name: member for member in archive.getmembers()}

    def read(name: str) -> bytes:
        try:
            return archive.extractfile(members[f"package/{name}"]).read()  # type: ignore[union-attr]
        except (KeyError, AttributeError):
            raise DataError(f"{archive.name} holds no {name}") from None

    return read


def pack(shaded: Path, flat: Path) -> np.ndarray:
    """Sprites of all concepts in both styles: uint8 `[2, N, 48, 48, 4]`, premultiplied; style 0 is shaded."""
    with tarfile.open(shaded) as first, tarfile.open(flat) as second:
        read_shaded, read_flat = reader(first), reader(second)
        entries = {entry["short_name"]: entry for entry in json.loads(read_flat("emoji.json"))}
        sprites = np.zeros((2, len(concepts()), SPRITE, SPRITE, 4), np.uint8)
        for i, (short, _) in enumerate(concepts()):
            entry = entries[short]
            sprites[0, i] = crop(Image.open(io.BytesIO(read_shaded(f"assets/{entry['unified'].lower()}.webp"))))
            sprites[1, i] = crop(Image.open(io.BytesIO(read_flat(f"img/google/64/{entry['image']}"))))
    return sprites


def nearest_pair(sprites: np.ndarray) -> tuple[float, str, str]:
    """The two concepts that look most alike in either style, and how far apart they are."""
    names = [name for _, name in concepts()]
    styles, count = sprites.shape[:2]
    thumbnails = (sprites.astype(np.float32) / 255).reshape(styles, count, 16, 3, 16, 3, 4).mean((3, 5))
    least = (np.inf, "", "")
    for style in thumbnails.reshape(styles, count, -1):
        products = style @ style.T
        squares = np.diag(products)
        distances = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * products, 0))
        np.fill_diagonal(distances, np.inf)
        i, j = np.unravel_index(distances.argmin(), distances.shape)
        least = min(least, (float(distances[i, j]), names[i], names[j]))
    return least


def load(path: Path) -> np.ndarray:
    """Packed sprites, uint8 `[2, N, 48, 48, 4]`.

    Raises:
        DataError: the file is missing, cut short, or holds other concepts.
    """
    if not path.exists():
        raise DataError(f"no sprites at {path}; fetch them with python -m benchmarks.things.sprites --out {path}")
    try:
        with np.load(path) as file:
            sprites, names = file["sprites"], file["names"].tolist()
    except Exception:
        raise DataError(f"{path} can't be read (cut short?); delete it and fetch the sprites again") from None
    if names != [name for _, name in concepts()] or sprites.shape[:1] != (2,):
        raise DataError(f"{path} holds other things than {CONCEPTS.name}; fetch the sprites again")
    return sprites


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/things/sprites.npz"))
    parser.add_argument("--archives", type=Path, help="where the packages' archives are, or are kept")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.archives or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        sprites = pack(download(SHADED, folder), download(FLAT, folder))
    distance, first, second = nearest_pair(sprites)
    if distance < LEAST_DISTANCE:
        raise DataError(f"{first} and {second} look alike ({distance:.2f}); leave one out of {CONCEPTS.name}")
    partial = arguments.out.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, sprites=sprites, names=np.array([name for _, name in concepts()]))
    partial.rename(arguments.out)
    print(f"{sprites.shape[1]} things in 2 styles, nearest {first} and {second} ({distance:.2f}) -> {arguments.out}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
