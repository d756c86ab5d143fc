"""Writing a pipeline as an artifact: nothing of this machine in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slimdiff.transformers_files import write_vocabulary


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Save a diffusers pipeline as safetensors; the paths that diffusers notes in its JSON are taken out again."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    for name, component in pipeline.components.items():
        write_vocabulary(component, folder / name)
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and {"_name_or_path", "name_or_path"} & set(content):
            kept = {k: v for k, v in content.items() if k not in ("_name_or_path", "name_or_path")}
            file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
