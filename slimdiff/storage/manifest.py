"""The manifest that says what an artifact is made of, and JSON that is written whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slimdiff.errors import InputError
from slimdiff.progress import AFTER, bar
from slimdiff.storage.atomic import is_leftover
from slimdiff.storage.atomic import replacing as replacing

MANIFEST = "manifest.json"
LOCK = ".lock"
"""In folders that several processes may write to; no part of what they write."""
SCHEMA = 1
MOST_JSON = 64 * 2**20
"""Bytes of the largest JSON file that is read."""
_VERSIONED = ("slimdiff", "torch", "diffusers", "transformers", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13")


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path, is_file=True) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sha256_of(path: Path, advance: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file's bytes, hexadecimal; `advance` gets the number of bytes as they are read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if advance is not None:
                advance(len(block))
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a value's canonical JSON: equal values, equal fingerprints."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def versions(names: Iterable[str] = _VERSIONED) -> dict[str, str]:
    """Versions of packages, by default of those that an artifact may depend on; of those that are installed."""
    found = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class FileEntry(BaseModel):
    """What a manifest says of a file."""

    model_config = ConfigDict(strict=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Manifest(BaseModel):
    """What `manifest.json` holds, besides its schema's number."""

    model_config = ConfigDict(strict=True)

    kind: str
    """What the folder is, e.g. `slim-model`, `onnx`, `engine`, `build`."""
    made_from: dict[str, Any]
    """Hashes and settings of what it was made from."""
    runs_on: dict[str, Any]
    """Runtime, compute capability, shapes, precision, where they are fixed."""
    versions: dict[str, str]
    """Of the packages that made it."""
    files: dict[str, FileEntry]
    """By path below the folder, with forward slashes."""


def write_manifest(
    folder: Path, kind: str, made_from: dict[str, Any], runs_on: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Describe every file below `folder` in its `manifest.json`; see `Manifest` for the arguments.

    A lock and what killed processes left are no part of the artifact.
    """
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    files = {name: file for name, file in files.items() if _is_content(Path(name))}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    with bar(name="hash files", unit="B", total=sum(sizes.values()), unit_scale=True, delay=AFTER, leave=False) as done:
        hashes = {name: sha256_of(file, done.update) for name, file in files.items()}
    manifest = {
        "schema": SCHEMA,
        "kind": kind,
        "made_from": made_from,
        "runs_on": runs_on or {},
        "versions": versions(),
        "files": {name: {"sha256": hashes[name], "bytes": sizes[name]} for name in files},
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def put_file(folder: Path, name: str, write: Callable[[Path], object]) -> None:
    """Write a file into a folder, and into its manifest where it has one; nothing else of either changes.

    Killed in between, it leaves a file that the manifest does not list, and never one that is not as it says.
    """
    whole = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if whole is not None and whole["files"].pop(name, None) is not None:
        write_json(folder / MANIFEST, whole)
    write(folder / name)
    if whole is not None:
        whole["files"][name] = {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size}
        write_json(folder / MANIFEST, whole)


def strangers(folder: Path) -> Iterator[Path]:
    """Files and links below a folder that neither its manifest nor one in a folder below it lists.

    Raises:
        InputError: if one of the manifests cannot be read.
    """
    known: set[Path] = set()
    for place, folders, names in os.walk(folder):
        here = Path(place)
        if MANIFEST in names:
            known.update(here / name for name in read_manifest(here)["files"])
        folders[:] = [name for name in folders if not is_leftover(name)]
        for name in (*names, *(name for name in folders if (here / name).is_symlink())):
            if name not in (MANIFEST, LOCK) and here / name not in known:
                yield here / name


def _is_content(name: Path) -> bool:
    return name.as_posix() not in (MANIFEST, LOCK) and not any(is_leftover(part) for part in name.parts)


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: if it is not there, is larger than `MOST_JSON`, or is not JSON.
    """
    try:
        if not file.is_file():
            raise InputError(f"there is no file {file}")
        if file.stat().st_size > MOST_JSON:
            raise InputError(
                f"{file} has {file.stat().st_size} bytes, and no JSON of ours has over {MOST_JSON}: refused"
            )
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({error})") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest, unchecked against its files.

    Raises:
        InputError: if there is none, it is not JSON, its schema is not ours, or a file of it is not below the folder.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise InputError(f"{folder} has no {MANIFEST}: it was not written by slimdiff, or not wholly")
    try:
        manifest = read_json(file)
    except InputError as error:
        raise InputError(f"{error}: the artifact is damaged, build it again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise InputError(f"{file} is not a slimdiff manifest: it has no table of files")
    if manifest.get("schema") != SCHEMA:
        raise InputError(f"{file} has schema {manifest.get('schema')!r}, this slimdiff reads {SCHEMA}: update slimdiff")
    outside = next((name for name in manifest["files"] if not is_inside(name)), None)
    if outside is not None:
        raise InputError(f"{file} names {outside!r}, which is outside the artifact: refused")
    try:
        Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{file} is not a slimdiff manifest: {place}: {first['msg'].lower()}") from error
    return manifest


def is_inside(name: str) -> bool:
    """Whether a name is a path below a folder: relative, with forward slashes, nowhere up, short enough to exist."""
    if not name.isprintable() or re.search(r"[\\:]", name) or len(name.encode()) > 1024:
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in name.split("/"))


def verify_manifest(
    folder: Path, *, exact: bool = False, under: str = "", editable: Collection[str] = ()
) -> dict[str, Any]:
    """Check every file against the manifest; a progress bar shows if that takes over two seconds.

    Args:
        exact: refuse files that the manifest does not list, too, and links of any kind.
        under: only the files whose names begin so.
        editable: files that people change or remove; whoever reads one holds it against rules of its own.

    Raises:
        InputError: naming the first file that is missing or differs.
    """
    manifest = read_manifest(folder)
    if exact:
        _refuse_others(folder, manifest["files"])
    files = {
        name: entry for name, entry in manifest["files"].items() if name.startswith(under) and name not in editable
    }
    total = sum(entry["bytes"] for entry in files.values())
    with bar(name=f"verify {folder.name}", unit="B", total=total, unit_scale=True, delay=AFTER, leave=False) as done:
        for name, expected in files.items():
            file = folder / name
            if not leads_inside(file, folder):
                raise InputError(f"{folder / MANIFEST} names {name!r}, which is outside the artifact: refused")
            if not file.is_file():
                raise InputError(f"{folder} lacks {name}, which its manifest lists: copy the artifact again, whole")
            if file.stat().st_size != expected["bytes"] or sha256_of(file, done.update) != expected["sha256"]:
                raise InputError(
                    f"{file} is not the file that the manifest describes (SHA-256 differs): it was changed"
                )
    return manifest


def leads_inside(file: Path, folder: Path) -> bool:
    """Whether a file below a folder is there, wherever links lead: below it, or in the blobs of the hub's cache of it.

    The hub's cache keeps `models--ORG--NAME/snapshots/REVISION` as links into the `blobs` of the same repository.
    """
    roots = [folder.resolve(), *_hub_blobs(folder)]
    return any(_resolved(file).is_relative_to(root) for root in roots)


def _hub_blobs(folder: Path) -> list[Path]:
    """The blobs of the repository in the hub's cache that a folder is, or lies in, a snapshot of; none elsewhere."""
    places = [folder.resolve(), *folder.resolve().parents]
    return [
        place.parents[1] / "blobs"
        for place in places
        if place.parent.name == "snapshots" and place.parents[1].name.startswith("models--")
    ][:1]


def _resolved(file: Path) -> Path:
    try:
        return file.resolve()
    except (OSError, RuntimeError) as error:  # Python below 3.13 raises RuntimeError where links go round in a circle
        raise InputError(f"{file} cannot be read: {error}") from error


def _refuse_others(folder: Path, files: dict[str, Any]) -> None:
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place) / name
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink() and not (path.is_file() and _hub_blobs(folder) and leads_inside(path, folder)):
                raise InputError(f"{path} is a link, and this artifact has none: refused")
            if name in names and relative not in files and relative != MANIFEST:
                raise InputError(
                    f"{path} is not in the artifact's manifest: it was not there when it was written, refused"
                )
