"""What decides an artifact, as hashes: a model's files, a folder's files, the source code that made it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from slimdiff.loading.naming import find_component, find_model
from slimdiff.progress import working
from slimdiff.settings import SteeringSettings
from slimdiff.storage import manifest

_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/[^/]+$")


def public_name(model: str) -> str:
    """A model's name without a path of this machine, for what others read; the hub's id of a snapshot in its cache."""
    if cached := _SNAPSHOT.search(Path(model).as_posix()):
        return cached[1].replace("--", "/", 1)
    return Path(model).name if Path(model).is_absolute() or model.startswith(".") else model


def model_hash(model: str, rest: str | None = None) -> str:
    """A hash of a model's files, which are not loaded: it changes when any of them does. Of one file its SHA-256.

    Args:
        rest: the model that gives the other components to a denoiser alone, whose files count, too.

    Raises:
        InputError: if there is no such model.
    """
    if rest is not None and find_model(model, rest):
        return manifest.fingerprint({"denoiser": folder_hash(Path(model)), "rest": model_hash(rest)})
    if (component := find_component(model)) is not None and component.pipeline is None:
        return folder_hash(component.folder)
    if (found := find_model(model)) is not None:
        return folder_hash(found) if found.is_dir() else manifest.sha256_of(found)
    from deploy.artifacts.figures import denoiser_of
    from slimdiff.calibration.calibrate import weights_hash
    from slimdiff.loading.pipelines import load_pipeline

    # A hub id: the cache is named by its commit. Loading it says what is wrong if there is none.
    return manifest.fingerprint({"hub": model, "weights": weights_hash(denoiser_of(load_pipeline(model)))})


def content_hash(place: Path) -> str:
    """SHA-256 of a file, or a hash of a folder's files (`folder_hash`)."""
    return folder_hash(place) if place.is_dir() else manifest.sha256_of(place)


@working("hash the model's files")
def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files, hidden ones and the manifest aside."""
    names = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file() and p.name != manifest.MANIFEST]
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return manifest.fingerprint({name.as_posix(): manifest.sha256_of(folder / name) for name in shown})


def steering_hashes(steering: SteeringSettings) -> dict[str, Any]:
    """What is added to a model to steer it, by its files."""
    folders = [*steering.controlnet, *([steering.adapter] if steering.adapter is not None else [])]
    found: dict[str, Any] = {"steering": [folder_hash(Path(folder)) for folder in folders]} if folders else {}
    if (shown := steering.ip_adapter) is not None:
        found["ip_adapter"] = {"sha256": manifest.sha256_of(Path(shown.file)), "scale": shown.scale}
    return found


def source_hash(package: Path, *patterns: str) -> str:
    """SHA-256 over a package's source: the same version may compute something else after a change."""
    files = sorted({p for pattern in patterns or ("**/*.py",) for p in package.glob(pattern) if p.is_file()})
    return manifest.fingerprint({p.relative_to(package).as_posix(): manifest.sha256_of(p) for p in files})
