"""Writing artifacts whole or not at all, and the manifest that says what they are made of."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimdiff.errors import InputError

MANIFEST = "manifest.json"
SCHEMA = 1
_VERSIONED = ("slimdiff", "torch", "diffusers", "transformers", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13")


@contextmanager
def replacing(path: Path, *, is_file: bool = False) -> Iterator[Path]:
    """Write to a temporary sibling that takes the place of `path` when the block ends well, and is removed if not.

    Args:
        path: the file or folder to appear.
        is_file: whether the block writes a file; else a new, empty folder is made for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    if not is_file:
        temporary.mkdir()
    try:
        yield temporary
        if path.is_dir() and not path.is_symlink():
            # A folder cannot be replaced in one step: move the old one aside first, so that a whole one always exists.
            old = temporary.with_suffix(".old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path, is_file=True) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a value's canonical JSON: equal values, equal fingerprints."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that an artifact may depend on, those that are installed."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_manifest(
    folder: Path, kind: str, made_from: dict[str, Any], runs_on: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Describe every file below `folder` in its `manifest.json`.

    Args:
        kind: what the folder is, e.g. `slim-model`, `onnx`, `engine`, `build`.
        made_from: hashes and settings of what it was made from.
        runs_on: runtime, compute capability, shapes, precision, where they are fixed.
    """
    files = {
        p.relative_to(folder).as_posix(): {"sha256": sha256_of(p), "bytes": p.stat().st_size}
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    }
    manifest = {
        "schema": SCHEMA,
        "kind": kind,
        "made_from": made_from,
        "runs_on": runs_on or {},
        "versions": versions(),
        "files": files,
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest, unchecked against its files.

    Raises:
        InputError: if there is none, it is not JSON, or its schema is newer than this version of slimdiff.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise InputError(f"{folder} has no {MANIFEST}: it was not written by slimdiff, or not wholly")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}): the artifact is damaged, build it again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise InputError(f"{file} is not a slimdiff manifest: it has no table of files")
    if manifest.get("schema") != SCHEMA:
        raise InputError(f"{file} has schema {manifest.get('schema')!r}, this slimdiff reads {SCHEMA}: update slimdiff")
    return manifest


def verify_manifest(folder: Path) -> dict[str, Any]:
    """Check every file against the manifest.

    Raises:
        InputError: naming the first file that is missing or differs.
    """
    manifest = read_manifest(folder)
    root = folder.resolve()
    for name, expected in manifest["files"].items():
        file = (folder / name).resolve()
        if not file.is_relative_to(root):
            raise InputError(f"{folder / MANIFEST} names {name!r}, which is outside the artifact: refused")
        if not file.is_file():
            raise InputError(f"{folder} lacks {name}, which its manifest lists: copy the artifact again, whole")
        if file.stat().st_size != expected["bytes"] or sha256_of(file) != expected["sha256"]:
            raise InputError(f"{file} is not the file that the manifest describes (SHA-256 differs): it was changed")
    return manifest
