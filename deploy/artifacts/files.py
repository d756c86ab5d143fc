"""Writing a pipeline as an artifact, with its licences and without a trace of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from slimdiff.loading.naming import places_of
from slimdiff.loading.transformers_files import write_vocabulary
from slimdiff.progress import working
from slimdiff.settings import WeightSettings

_LICENSES = ("license", "licence", "notice", "copying")


@working("save the model")
def save_pipeline(pipeline: Any, folder: Path, weights: WeightSettings | None = None) -> None:
    """Save a diffusers pipeline as safetensors; the paths that diffusers notes in its JSON are taken out again.

    Args:
        weights: whose variant and size of shards the files have; their dtype is the pipeline's own.
    """
    how = weights.model_dump(include={"variant", "max_shard_size"}, exclude_none=True) if weights else {}
    pipeline.save_pretrained(folder, safe_serialization=True, **how)
    for name, component in pipeline.components.items():
        write_vocabulary(component, folder / name)
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and {"_name_or_path", "name_or_path"} & set(content):
            kept = {k: v for k, v in content.items() if k not in ("_name_or_path", "name_or_path")}
            file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def license_files(folder: Path) -> list[Path]:
    """Files in a folder, or beside a file, whose names say that they are licences or notices; none if it is absent."""
    folder = folder.parent if folder.is_file() else folder
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in found if p.is_file() and p.name.lower().startswith(_LICENSES)]


def copy_licenses(source: Path | str, folder: Path) -> None:
    """Copy what is a licence from the folder of a model to that of what was made from it; `demo`'s is our own.

    Of a component folder, those of its pipeline go along.
    """
    places = places_of(source) if str(source) != "demo" else []
    for file in (file for place in reversed(places) for file in license_files(place)):
        shutil.copyfile(file, folder / file.name)
