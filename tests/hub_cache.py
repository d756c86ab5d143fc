"""The hub's local cache, as its library lays it."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def cached(source: Path, cache: Path, name: str) -> Path:
    """A snapshot of a folder as the hub's cache keeps it."""
    repository, revision = cache / f"models--{name.replace('/', '--')}", "a" * 40
    snapshot, blobs = repository / "snapshots" / revision, repository / "blobs"
    blobs.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    for file in (path for path in source.rglob("*") if path.is_file()):
        blob, place = blobs / hashlib.sha256(file.read_bytes()).hexdigest(), snapshot / file.relative_to(source)
        shutil.copyfile(file, blob)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(blob, place.parent))
    return snapshot
