"""Provenance: hashes, versions, stages, machine and the whole recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def build(results: Mapping[str, Any], _folder: Path) -> dict[str, Any]:
    """`recipe`: as YAML."""
    return {"recipe": yaml.safe_dump(results["build"].get("recipe") or {}, sort_keys=False, allow_unicode=True)}
